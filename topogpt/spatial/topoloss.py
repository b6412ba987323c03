"""TopoNets' loss for anybody's model, in the lines that the package `topoloss` is used with.

    topo_loss = topogpt.TopoLoss([
        topogpt.LaplacianPyramid.from_layer(model, model.fc, factor_h=8.0, factor_w=8.0, scale=1.0)])
    (cross_entropy + topo_loss.compute(model)).backward()

The import is all that changes; its numbers are the package's (Deb et al., TopoNets, ICLR 2025; arXiv
2501.16396; github.com/toponets/topoloss of 2026-03-18), held by tests/spatial/parity. Put right here:

- factors are compared with the sheet's height and width, not with its depth and height (of a wrong factor
  the package says nothing, or refuses a right one where the depth is small), and 49 fits into 49
- from_layer finds a layer by identity, refuses one that is not the model's, and keeps the attribute's name
- two losses on one layer are both counted: the second gets the key "fc#2" instead of the place of the first
- with no loss that has a scale, compute says so instead of dividing by zero
- save_json leaves the losses as they are
- a TauScheduler begins at its start value at once and is at its end value after num_steps steps, where the
  package lags by one; the cosine stays down after num_steps instead of rising again; a loss of scale None
  (log only) stays so; an unknown mode is a sentence and not an AttributeError
- sums are float32 under autocast and with bfloat16 weights; a unit of zero weights gets no huge gradient
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, overload

import torch
from torch import Tensor, nn

from topogpt.spatial.toponets import Interpolation, blur_of, check_factors, toponets_loss
from topogpt.spatial.weights import (
    at_least_float32,
    bias_sheet,
    cosines,
    input_sheet,
    no_autocast,
    output_sheet,
)

Mode = Literal["linear", "cosine_decay"]


@dataclass
class LaplacianPyramid:
    """TopoNets' loss on the weights of one layer; its sheet is that of the layer's outputs.

    Args:
        layer_name: the layer's name in the model, as in model.named_modules().
        factor_h: how many times lower the small copy of the sheet is; 1 to the sheet's height.
        factor_w: how many times narrower.
        interpolation: bilinear (the paper's), nearest, nearest-exact, bicubic or area.
        scale: tau, the weight of the loss; None: it is logged, not trained on.
        custom_weight_attribute_name: which parameter of the layer, if not weight, such as weight_hh_l0 of an
            nn.RNN (with TopoLoss's strict_layer_type=False).
    """

    layer_name: str
    factor_h: float
    factor_w: float
    interpolation: Interpolation = "bilinear"
    scale: float | None = 1.0
    custom_weight_attribute_name: str | None = None

    @classmethod
    def from_layer(
        cls,
        model: nn.Module,
        layer: nn.Module,
        factor_h: float,
        factor_w: float,
        scale: float | None = 1.0,
        interpolation: Interpolation = "bilinear",
        custom_weight_attribute_name: str | None = None,
    ) -> Self:
        """The loss on a layer of a model, which is found by identity.

        Raises:
            ValueError: the layer is not in the model, or has no such sheet, or a factor does not fit it.
        """
        names = [name for name, module in model.named_modules() if module is layer]
        if not names:
            raise ValueError(f"the {type(layer).__name__} is no layer of the {type(model).__name__}")
        loss = cls(names[0], factor_h, factor_w, interpolation, scale, custom_weight_attribute_name)
        loss.sheet(layer)
        return loss

    def sheet(self, layer: nn.Module) -> Tensor:
        """The layer's weights on its sheet, (h, w, depth); ValueError if it has none or a factor is wrong."""
        sheet = self.lay(layer)
        check_factors(*sheet.shape[:2], self.factor_h, self.factor_w, self.layer_name)
        return sheet

    def loss(self, layer: nn.Module) -> Tensor:
        """The loss of a layer without its scale: a scalar of at least float32, 0 to 2."""
        return toponets_loss(self.sheet(layer), self.factor_h, self.factor_w, self.interpolation)

    def lay(self, layer: nn.Module) -> Tensor:
        return output_sheet(self.parameter(layer, self.custom_weight_attribute_name or "weight", (2, 4)))

    def parameter(self, layer: nn.Module, name: str, dims: tuple[int, ...]) -> Tensor:
        found = getattr(layer, name, None)
        if not isinstance(found, Tensor) or found.dim() not in dims:
            shape = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
            wanted = " or ".join(map(str, dims))
            raise ValueError(
                f"layer {self.layer_name}: {name} of a {type(layer).__name__} is {shape}; "
                f"{type(self).__name__} needs one of {wanted} dimensions"
            )
        return found


@dataclass
class LaplacianPyramidOnInput(LaplacianPyramid):
    """The same with the units that an nn.Linear takes in on the sheet, (h, w, out); arguments as there."""

    def lay(self, layer: nn.Module) -> Tensor:
        return input_sheet(self.parameter(layer, self.custom_weight_attribute_name or "weight", (2,)))


@dataclass
class LaplacianPyramidOnBias(LaplacianPyramid):
    """The same on the biases of a layer: one cosine, between its whole sheet (h, w) and the blurred one."""

    def lay(self, layer: nn.Module) -> Tensor:
        return bias_sheet(self.parameter(layer, self.custom_weight_attribute_name or "bias", (1,)))

    def loss(self, layer: nn.Module) -> Tensor:
        """1 - the cosine between the biases and the blurred ones, a scalar; 1 of biases that are all zero."""
        sheet = at_least_float32(self.sheet(layer))
        h, w, _ = sheet.shape
        blur = blur_of(h, w, self.factor_h, self.factor_w, self.interpolation, sheet.device)
        with no_autocast(sheet):
            return 1 - cosines(sheet.flatten(), blur(sheet).flatten())


KINDS = {kind.__name__: kind for kind in (LaplacianPyramid, LaplacianPyramidOnInput, LaplacianPyramidOnBias)}


class TopoLoss:
    """TopoNets' loss over some layers of any model; see the module for what differs from the package's.

    Args:
        losses: one or more for each layer that shall be topographic.
        strict_layer_type: refuse layers that are neither nn.Linear nor nn.Conv2d.
    """

    def __init__(self, losses: Sequence[LaplacianPyramid], strict_layer_type: bool = True) -> None:
        self.losses = list(losses)
        self.strict_layer_type = strict_layer_type

    @overload
    def compute(
        self, model: nn.Module, reduce_mean: Literal[True] = True, do_scaling: bool = True
    ) -> Tensor: ...

    @overload
    def compute(
        self, model: nn.Module, reduce_mean: Literal[False], do_scaling: bool = True
    ) -> dict[str, Tensor]: ...

    def compute(
        self, model: nn.Module, reduce_mean: bool = True, do_scaling: bool = True
    ) -> Tensor | dict[str, Tensor]:
        """Mean over losses of scale * loss, a scalar; without reduce_mean each of them by layer name.

        Args:
            model: the one that the losses were made for, not wrapped.
            reduce_mean: False: layer name -> scalar; another loss on the same layer is "name#2".
            do_scaling: False: without the scales, and with the losses whose scale is None.

        Raises:
            ValueError: a layer is missing, of a wrong type or too small; or no loss has a scale.
        """
        found = self.get_layerwise_topo_losses(model, do_scaling)
        if not reduce_mean:
            return found
        if not found:
            raise ValueError("no loss has a scale, so nothing is trained on; compute(do_scaling=False) logs")
        return torch.stack(list(found.values())).mean()

    def get_layerwise_topo_losses(self, model: nn.Module, do_scaling: bool = True) -> dict[str, Tensor]:
        """Layer name -> scalar, as compute with reduce_mean=False."""
        found: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for loss in self.losses:
            name = loss.layer_name
            counts[name] = counts.get(name, 0) + 1
            key = name if counts[name] == 1 else f"{name}#{counts[name]}"
            layer = self.layer(model, name)
            if not do_scaling:
                found[key] = loss.loss(layer)
            elif loss.scale is not None:
                found[key] = loss.scale * loss.loss(layer)
        return found

    def layer(self, model: nn.Module, name: str) -> nn.Module:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"layer {name} is not in the {type(model).__name__}") from None
        if self.strict_layer_type and not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"layer {name} is a {type(layer).__name__}, neither nn.Linear nor nn.Conv2d; "
                "strict_layer_type=False allows it"
            )
        return layer

    def get_wandb_logging_dict(self, model: nn.Module) -> dict[str, float]:
        """Layer name -> loss without its scale, and "mean" over them."""
        with torch.no_grad():
            each = {k: v.item() for k, v in self.get_layerwise_topo_losses(model, do_scaling=False).items()}
        return each | {"mean": sum(each.values()) / max(1, len(each))}

    def save_json(self, filename: str | Path) -> None:
        """Write the losses, and not the model, to a file that from_json and the package read."""
        data = [asdict(loss) | {"name": type(loss).__name__} for loss in self.losses]
        for entry in data:  # which not all of the package's classes and versions know
            if entry["custom_weight_attribute_name"] is None:
                del entry["custom_weight_attribute_name"]
        Path(filename).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, filename: str | Path) -> Self:
        """The losses of a file of save_json, ours or the package's; ValueError for one of another kind."""
        losses = []
        for entry in json.loads(Path(filename).read_text(encoding="utf-8")):
            name = entry.pop("name", None)
            if name not in KINDS:
                raise ValueError(f"{filename}: name = {name} must be one of {', '.join(KINDS)}")
            losses.append(KINDS[name](**entry))
        return cls(losses)


class TauScheduler:
    """Moves the scales of a TopoLoss from start_value to end_value in num_steps steps, then leaves them.

    Args:
        topo_loss: its losses get the scale at once and at every step, but for those whose scale is None.
        start_value: tau before the first step.
        end_value: tau after num_steps steps and ever after.
        num_steps: at least 1.
        mode: linear, or cosine_decay: half a cosine, from a higher start_value down.
        verbose: print a line per layer and step.

    Raises:
        ValueError: an unknown mode, no steps, a cosine that would not fall, or no TopoLoss.
    """

    def __init__(
        self,
        topo_loss: TopoLoss,
        start_value: float,
        end_value: float,
        num_steps: int,
        mode: Mode = "linear",
        verbose: bool = False,
    ) -> None:
        if not isinstance(topo_loss, TopoLoss):
            raise ValueError(f"topo_loss is a {type(topo_loss).__name__} and no TopoLoss")
        if mode not in get_args(Mode):
            raise ValueError(f"mode = {mode!r} must be one of {', '.join(get_args(Mode))}")
        if num_steps < 1:
            raise ValueError(f"num_steps = {num_steps} must be at least 1")
        if mode == "cosine_decay" and end_value >= start_value:
            raise ValueError(f"cosine_decay falls: end_value = {end_value}, start_value = {start_value}")
        self.topo_loss, self.mode, self.verbose = topo_loss, mode, verbose
        self.start_value, self.end_value, self.num_steps = start_value, end_value, num_steps
        self.current_step = 0
        self.apply()

    def compute_value(self, current_step: int) -> float:
        """Tau after so many steps, a pure function of their number."""
        done = min(current_step, self.num_steps) / self.num_steps
        if self.mode == "cosine_decay":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start_value + (self.end_value - self.start_value) * done

    def get_current_tau(self) -> float:
        """The value that the losses have."""
        return self.compute_value(self.current_step)

    def step(self, current_step: int | None = None) -> None:
        """Go on by one step, or to the given one, and set the scales."""
        self.current_step = self.current_step + 1 if current_step is None else current_step
        self.apply()

    def apply(self) -> None:
        tau = self.get_current_tau()
        for loss in self.topo_loss.losses:
            if loss.scale is not None:
                loss.scale = tau
                if self.verbose:
                    print(f"{loss.layer_name}: tau {tau:.4f} at step {self.current_step}/{self.num_steps}")

    def settings(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("start_value", "end_value", "num_steps", "mode")}

    def save_json(self, filename: str | Path) -> None:
        """Write the schedule, and not how far it is, to a file."""
        Path(filename).write_text(json.dumps(self.settings(), indent=4) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, filename: str | Path, topo_loss: TopoLoss, verbose: bool = False) -> Self:
        """The schedule of a file of save_json, at its start."""
        data = json.loads(Path(filename).read_text(encoding="utf-8"))
        return cls(topo_loss, **data, verbose=verbose)


class ChainedTauScheduler:
    """TauSchedulers one after the other: each takes its num_steps, the last one's end value stays.

    Raises ValueError for no schedulers.
    """

    def __init__(self, schedulers: Sequence[TauScheduler]) -> None:
        if not schedulers:
            raise ValueError("schedulers are none; give at least one")
        self.schedulers, self.current_step = list(schedulers), 0
        self.apply()

    def active(self) -> tuple[TauScheduler, int]:
        """Whose turn it is, and how many steps of it are done."""
        done = self.current_step
        for scheduler in self.schedulers[:-1]:
            if done < scheduler.num_steps:
                return scheduler, done
            done -= scheduler.num_steps
        return self.schedulers[-1], done

    def get_current_tau(self) -> float:
        """The value that the losses have."""
        scheduler, done = self.active()
        return scheduler.compute_value(done)

    def step(self) -> None:
        """Go on by one step and set the scales."""
        self.current_step += 1
        self.apply()

    def apply(self) -> None:
        scheduler, done = self.active()
        scheduler.step(done)

    def save_json(self, filename: str | Path) -> None:
        """Write the schedules, and not how far they are, to a file."""
        data = [scheduler.settings() for scheduler in self.schedulers]
        Path(filename).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, filename: str | Path, topo_loss: TopoLoss, verbose: bool = False) -> Self:
        """The schedules of a file of save_json, at their start."""
        data = json.loads(Path(filename).read_text(encoding="utf-8"))
        return cls([TauScheduler(topo_loss, **entry, verbose=verbose) for entry in data])
