"""Read models back: a folder of a stock class as weights of ours, and any run, folder or Hub name as a model.

cfg, weights, positions = load_folder("out/topolm/hf")    # or a repository of the Hub, USER/NAME
model = load_model("out/topolm").model                         # a run, an exported folder or USER/NAME
cfg, weights, positions = initial(cfg.model, "out/topolm/hf")  # to start a run of this shape from it
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from topogpt import topo, topography
from topogpt.errors import UserError
from topogpt.files import inside, similar
from topogpt.model.gpt import GPT
from topogpt.runs.checkpoint import load_run, load_weights
from topogpt.settings import GPTConfig
from topogpt.sharing.stock import from_stock
from topogpt.sharing.tokenizer_files import strict_json

SHAPE = """n_layer n_head n_embd n_inner vocab_size bias gelu norm position tied scale_attention
    block_size""".split()  # what a run must share with the model it starts from
PADDING_FILE = "padding.safetensors"  # the rows that an export cuts off, so that coming back changes nothing
ASKED_FILES = ["*.json", "*.safetensors", "merges.txt", "training_config.yaml"]


class Imported(NamedTuple):
    cfg: GPTConfig
    weights: dict[str, Tensor]  # our names and shapes, float32, without the tied head
    positions: dict[str, np.ndarray] | None  # sheet -> (n_units, 2); None where the folder has none


class LoadedModel(NamedTuple):
    model: GPT  # in eval mode
    positions: dict[str, np.ndarray] | None  # sheet -> (n_units, 2)
    folder: Path  # of the checkpoint or the exported folder


def load_model(
    path_or_name: str | Path, checkpoint: str = "best", device: str | torch.device = "cpu"
) -> LoadedModel:
    """A model from the folder of a run, an exported folder or the Hub.

    `checkpoint` is best, last or step-N; for a repository of the Hub, step-N is the tag.
    """
    path = Path(path_or_name)
    if (path / "checkpoints").is_dir() or (path.is_dir() and not (path / "config.json").exists()):
        run = load_run(path, checkpoint, device)
        return LoadedModel(run.model, run.positions, run.folder)
    folder = find_folder(path_or_name, checkpoint if checkpoint.startswith("step-") else None)
    cfg, weights, positions = load_folder(folder)
    model = GPT(cfg)
    load_weights(model, weights)
    return LoadedModel(model.to(device).eval(), positions, folder)


def initial(cfg: GPTConfig, path_or_name: str | Path) -> Imported:
    """Weights to start a run of shape `cfg` from: of a run's best checkpoint, a folder or the Hub.

    Sizes must be those of cfg; a shorter context takes the first positions. Load them with
    `checkpoint.load_weights`.
    """
    loaded = load_model(path_or_name)
    there = loaded.model.cfg
    for key in SHAPE:
        has, wanted = (getattr(c, "n_hidden" if key == "n_inner" else key) for c in (there, cfg))
        if has != wanted and not (key == "block_size" and has > wanted):
            raise UserError(
                f"init_from = {path_or_name} has {key} {has}, but model.{key} = {wanted}; give "
                + (
                    f"--model.{'' if has else 'no_'}{key}"
                    if isinstance(has, bool)
                    else f"--model.{key} {has}"
                )
            )
    weights = {name: t.detach() for name, t in loaded.model.named_parameters()}
    if cfg.position == "learned":
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: cfg.block_size].clone()
    return Imported(cfg, weights, loaded.positions)


def load_folder(path_or_repo: str | Path) -> Imported:
    """Weights and shape of a folder or repository (GPT-2, Arcee), in our names, and its positions if any."""
    folder = find_folder(path_or_repo)
    kept = folder / PADDING_FILE
    padding = read_file(kept) if kept.is_file() else None
    cfg, weights = from_stock(folder, strict_json(folder / "config.json"), read_tensors(folder), padding)
    return Imported(cfg, weights, read_positions(folder, cfg))


# ---- files ---------------------------------------------------------------------------------------


def find_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a copy of the repository of the Hub, in the Hub's own cache."""
    path, name = Path(path_or_repo), str(path_or_repo)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give an exported folder, such as out/NAME/hf")
        return path
    known = "give a run, an exported folder or USER/NAME"
    if "/" in name and path.parent.is_dir() and not path.exists():
        # a typo: the network is not asked
        raise UserError(f"{name} does not exist; {similar(path, known)}")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = similar(Path("out", name), "") if len(path.parts) == 1 else ""
        raise UserError(
            f"{name} is neither a folder nor the name of a repository of the Hub (USER/NAME)"
            + (f"; {hint}" if hint else "")
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=ASKED_FILES))
    except Exception as error:  # no network, no such repository or tag, no right to read it
        offline = type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        reason = "it cannot be reached" if offline else " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is no folder here and could not be fetched from the Hub ({reason}); {known}"
        ) from None


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or missing: {error}; export it again") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder, from one file or from several with their index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return read_file(folder / "model.safetensors")
    try:
        paths = sorted({inside(folder, name) for name in strict_json(index)["weight_map"].values()})
    except (KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}); export it again") from None
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_file(path)
    return tensors


def read_positions(folder: Path, cfg: GPTConfig) -> dict[str, np.ndarray] | None:
    if not (folder / "topography.safetensors").exists():
        return None
    try:
        positions = topography.load_topography(folder).positions
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        shape = topo.sheet_shape(
            topo.layout_of(positions, cfg.n_layer), cfg.n_layer, cfg.n_embd, cfg.n_hidden
        )
    except ValueError as error:
        raise UserError(f"{folder}/topography.safetensors: {error}") from None
    if {topo.grid_of(p) for p in positions.values()} != {shape}:
        h, w = shape
        raise UserError(f"{folder}/topography.safetensors does not hold sheets of {h}x{w} units")
    return positions
