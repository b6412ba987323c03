"""The weights of a run trained under a connectome as masks and values: what is not there takes a bit.

    name.mask      uint8: a bit a weight, row by row, as numpy.packbits has them (1: it is there)
    name.values    the weights that are there, row by row
    name           what was not pruned, as it is

Names and shapes are those of model.safetensors beside it; `load` is all that it takes to read it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from topogpt.errors import UserError
from topogpt.files import permit
from topogpt.model import connectome

if TYPE_CHECKING:
    from torch import Tensor

    from topogpt.settings import GPTConfig

FILE = "sparse.safetensors"


def load(path: str | Path) -> "dict[str, Tensor]":
    """All weights by name, dense: what load_state_dict takes."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.endswith(".mask")}
        for name, shape in shapes.items():
            bits = np.unpackbits(file.get_tensor(f"{name}.mask").numpy(), count=np.prod(shape))
            there, values = torch.from_numpy(bits).bool().view(shape), tensors.pop(f"{name}.values")
            tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(there, values)
    return tensors


def write(folder: Path, run: Path, cfg: "GPTConfig") -> str:
    """Write sparse.safetensors beside the model.safetensors of an export, compare them, and say its size."""
    import torch
    from safetensors.torch import load_file, save_file

    dense, masks = load_file(folder / "model.safetensors"), masks_of(run, cfg)
    stored = {name: tensor for name, tensor in dense.items() if name not in masks}
    for name, mask in masks.items():
        stored[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.numpy()))
        stored[f"{name}.values"] = dense[name][mask]
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    save_file(stored, folder / FILE, metadata={"format": "pt", "shapes": shapes})
    permit(folder / FILE)
    back = load(folder / FILE)
    assert back.keys() == dense.keys() and all(torch.equal(back[name], dense[name]) for name in dense)
    sizes = [(folder / name).stat().st_size / 1e6 for name in (FILE, "model.safetensors")]
    kept = sum(int(mask.count_nonzero()) for mask in masks.values())
    kept += sum(t.numel() for name, t in dense.items() if name not in masks)
    n = sum(t.numel() for t in dense.values())
    return f"{FILE}: {kept:,} of {n:,} weights in {sizes[0]:.1f} MB; dense {sizes[1]:.1f} MB"


def masks_of(run: Path, cfg: "GPTConfig") -> "dict[str, Tensor]":
    """Masks, bool, of the pruned weights, under the names and in the shapes of the stock class."""
    import torch

    from topogpt.model.gpt import GPT
    from topogpt.sharing.stock import to_stock

    wiring, model = connectome.read(run, cfg).wiring, GPT(cfg)
    with torch.no_grad():  # masks go the way of the weights, whatever that does to names and shapes
        for name, weight in model.named_parameters():
            weight.copy_(wiring[name] != 0 if name in wiring else torch.ones_like(weight))
    return {name: t != 0 for name, t in to_stock(model, "float32")[0].items() if not t.all()}


def check(run: Path) -> None:
    """Refuse a run that has all of its weights."""
    if not (run / connectome.RECORD).is_file():
        raise UserError(f"sparse = True: {run} was trained under no connectome; leave --sparse out")
