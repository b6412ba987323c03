"""Sheets of weights: the units of a layer on a grid, each with its weights; what the losses on them share.

Unit i lies in cell i, row by row, of the most nearly square grid (topo.grid_shape), as in TopoNets. Nothing
here needs activations or data, so such a loss costs the same for every batch size.
"""

import contextlib
import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from topogpt.topo import grid_shape

TINY = 1e-16  # a vector of a smaller squared norm has no direction: its cosines and their gradients are 0
N_NEAR = 3  # names that an error lists


class WeightConfig(Protocol):
    """The setting that every loss on weights reads."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Patterns (fnmatch) of module names, such as *.mlp.c_fc."""


def output_sheet(weight: Tensor) -> Tensor:
    """Units are what a layer puts out: (out, in) or (out, in, kh, kw) -> (h, w, in or in * kh * kw)."""
    return weight.reshape(*grid_shape(len(weight)), -1)


def input_sheet(weight: Tensor) -> Tensor:
    """Units are what a linear layer takes in: (out, in) -> (h, w, out)."""
    return output_sheet(weight.T)


def bias_sheet(bias: Tensor) -> Tensor:
    """Units are what a layer puts out, by their biases alone: (out,) -> (h, w, 1)."""
    return output_sheet(bias[:, None])


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """What follows is computed in the dtype it has, also where the caller's is not."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)  # not on meta
    return torch.autocast(kind, enabled=False) if available else contextlib.nullcontext()


def scales(vectors: Tensor) -> Tensor:
    """One over the lengths of vectors along the last axis, (..., depth) -> (...); 0 where one is zero."""
    squares = torch.linalg.vecdot(vectors, vectors)
    alive = squares > TINY
    return torch.where(alive, squares, 1.0).rsqrt() * alive


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between vectors along the last axis, (..., depth) twice -> (...); 0 where one is zero."""
    return torch.linalg.vecdot(a, b) * scales(a) * scales(b)


def weight_of(layer: nn.Module) -> Tensor:
    """What a layer multiplies with: its weight, and what adapters of peft (LoRA) in it add to that."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight
    return layer.weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)


class WeightLoss(nn.Module):
    """A loss on the weights of some layers of a model; a file an objective says what it is of one of them.

    Args:
        cfg: modules are patterns of the names of layers, in fnmatch's manner.
        model: the layers are found in it, and their sizes checked; it is not kept.

    Raises:
        ValueError: a pattern matches nothing, or something that has no sheet.
    """

    of_weights = True  # forward takes the model, not activations
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)

    def __init__(self, cfg: WeightConfig, model: nn.Module) -> None:
        super().__init__()
        self.layers = find_layers(model, cfg.modules, self.kinds)

    def forward(self, model: nn.Module) -> Tensor:
        """Loss of each layer, (n_layers,), of at least float32, also under autocast."""
        device, losses = model.get_submodule(self.layers[0]).weight.device, []
        if any(buffer.device != device for buffer in self.buffers()):
            self.to(device)  # once, wherever the model was moved to
        for name in self.layers:
            layer = model.get_submodule(name)
            with no_autocast(layer.weight):
                losses.append(self.of_layer(name, at_least_float32(weight_of(layer))))
        return torch.stack(losses)

    def of_layer(self, name: str, weight: Tensor) -> Tensor:
        """Loss of one layer, a scalar."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{len(self.layers)} layers: {', '.join(self.layers)}"


def find_layers(
    model: nn.Module, patterns: Iterable[str], kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
) -> list[str]:
    """Names of a model's layers that match one of the patterns, in the model's order.

    Raises ValueError for a pattern that matches no module, and for a module that is of none of the kinds.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    there = [name for name, module in modules.items() if isinstance(module, kinds)]
    found: set[str] = set()
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError(f"modules name no layer; there are {near('', there)}")
    for pattern in patterns:
        matching = [name for name in modules if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"modules = {pattern} matches no layer; near it: {near(pattern, there)}")
        for name in matching:
            if not isinstance(modules[name], kinds):
                wanted = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
                raise ValueError(
                    f"modules = {pattern} matches {name}, a {type(modules[name]).__name__} and no {wanted}; "
                    f"near it: {near(name, there)}"
                )
        found.update(matching)
    return [name for name in modules if name in found]


def near(name: str, there: list[str]) -> str:
    """The names most like one that was not found, and at least some."""
    return ", ".join(difflib.get_close_matches(name, there, N_NEAR, 0.4) or there[:N_NEAR]) or "none"
