"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) in the linear layers of a GPT, by the package peft.

An adapted layer computes W x + s B A x: W (out, in) is frozen, A (rank, in) is drawn at random, B (out, rank)
starts at 0, and s = alpha / rank; no dropout, no biases of its own. With alpha fixed, the best learning rate
hardly depends on the rank. peft gives what lies inside such a layer other names (base_layer, lora_A.default);
they are translated here and nowhere else. Nothing here imports torch before there is a model.
"""

import difflib
import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from topogpt.errors import UserError
from topogpt.model.cost import weight_shapes
from topogpt.settings import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from topogpt.model.gpt import GPT

ADAPTER = "default"  # peft's name for the only adapter of a layer


def linear_layers(cfg: GPTConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the head; in the model's order."""
    matrices = {name: shape for name, shape in weight_shapes(cfg).items() if len(shape) == 2}
    return {name.removesuffix(".weight"): s for name, s in matrices.items() if ".h." in name}


def layers_to_adapt(cfg: GPTConfig, patterns: Sequence[str], rank: int) -> dict[str, tuple[int, int]]:
    """The linear layers that match one of the patterns (fnmatch); what cannot be adapted is a UserError."""
    layers, found = linear_layers(cfg), set()
    if not patterns:
        raise UserError("lora_modules is empty; name layers, such as --lora_modules '*.mlp.*'")
    for pattern in patterns:
        matching = [name for name in layers if fnmatchcase(name, pattern)]
        if not matching:
            near = ", ".join(difflib.get_close_matches(pattern, layers, 3, 0.4) or list(layers)[:3])
            raise UserError(f"lora_modules = {pattern} matches no layer that takes adapters; near it: {near}")
        found.update(matching)
    for name in filter(found.__contains__, layers):
        if rank > min(layers[name]):
            out, into = layers[name]
            raise UserError(
                f"lora_rank = {rank} is larger than {name}, {out}x{into}; give {min(layers[name])} or less, "
                "or --lora_rank 0 to train every weight"
            )
    return {name: shape for name, shape in layers.items() if name in found}


def check_peft(rank: int) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"lora_rank = {rank} needs the package peft: pip install peft, or give --lora_rank 0")


def adapt(model: "GPT", rank: int, alpha: float, patterns: Sequence[str]) -> None:
    """Freeze the model and put adapters into its layers, A drawn from torch's random state."""
    from peft import LoraConfig, inject_adapter_in_model

    names = list(layers_to_adapt(model.cfg, patterns, rank))
    model.requires_grad_(False)
    cfg = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(cfg, model, ADAPTER)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}.{ADAPTER}.weight" for n in names for x in "AB"}, sorted(trained)


def n_adapter_parameters(cfg: GPTConfig, patterns: Sequence[str], rank: int) -> int:
    """rank * (in + out), over the adapted layers."""
    return sum(rank * sum(shape) for shape in layers_to_adapt(cfg, patterns, rank).values())


def is_adapted(model: "GPT") -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


# ---- names ---------------------------------------------------------------------------------------


def split_weights(model: "GPT") -> tuple[dict[str, "Tensor"], dict[str, "Tensor"]]:
    """On the CPU, the weights as they were before the adapters, under the usual names; and the adapters'.

    A tied head is left out. The latter are called LAYER.lora_A.weight and LAYER.lora_B.weight; there are none
    in a plain model.
    """
    base, adapters = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.cfg.tied:
            continue  # it is transformer.wte.weight
        plain = name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")
        (adapters if ".lora_" in name else base)[plain] = tensor.detach().cpu().contiguous()
    return base, adapters


def merge(model: "GPT", base: dict[str, "Tensor"], adapters: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """W + s B A under the usual names; what has no adapter is as it was.

    In float64 on the CPU, as the products of a GPU may be rounded to TF32.
    """
    merged = dict(base)
    for name in [n.removesuffix(".lora_A.weight") for n in adapters if n.endswith(".lora_A.weight")]:
        weight, scale = base[f"{name}.weight"], model.get_submodule(name).scaling[ADAPTER]
        a, b = (adapters[f"{name}.lora_{x}.weight"].double() for x in "AB")
        merged[f"{name}.weight"] = (weight.double() + scale * (b @ a)).to(weight.dtype)
    return merged


def load_adapters(model: "GPT", adapters: dict[str, "Tensor"]) -> None:
    """Raises ValueError where they are not those of the model's adapted layers."""
    there = {name: t.shape for name, t in split_weights(model)[1].items()}
    if there != {name: t.shape for name, t in adapters.items()}:
        raise ValueError("it holds other adapters than the settings name")
    renamed = {f"{name.removesuffix('weight')}{ADAPTER}.weight": t for name, t in adapters.items()}
    model.load_state_dict(renamed, strict=False)
