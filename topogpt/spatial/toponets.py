"""TopoNets' loss (Deb et al., TopoNets, ICLR 2025; arXiv 2501.16396): weights smooth over the sheet.

The weights of a layer, on its sheet, should point where those of a blurred copy point, unit by unit; the copy
is the sheet made smaller and as large as before, so what is finer than the factor is lost in it. Training
adds the mean over layers, times tau (topo.weight).
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topogpt.distributed import widest
from topogpt.spatial.weights import (
    WeightConfig,
    WeightLoss,
    at_least_float32,
    cosines,
    no_autocast,
    output_sheet,
)
from topogpt.topo import grid_shape

Interpolation = Literal["bilinear", "nearest", "nearest-exact", "bicubic", "area"]


class TopoNetsConfig(WeightConfig, Protocol):
    """The settings that the loss reads."""

    @property
    def factor_h(self) -> float:
        """How many times lower the small copy is than the sheet; at least 1."""

    @property
    def factor_w(self) -> float:
        """How many times narrower."""


class Blur(NamedTuple):
    """What making a sheet (h, w, depth) smaller and large again does, as matrices; (m, n) is the small size.

    The products are what torch.nn.functional.interpolate computes, in a quarter of its time on a CPU, and
    their gradient is the same every time, on a GPU too, where that of interpolate is not.
    """

    down: Tensor  # (m, h)
    across: Tensor  # (w, w): narrower and as wide as before
    up: Tensor  # (h, m)

    def __call__(self, sheet: Tensor) -> Tensor:
        """The blurred sheet, (h, w, depth)."""
        h, w, depth = sheet.shape
        down, across, up = (matrix.to(sheet.dtype) for matrix in self)
        small = torch.matmul(across, (down @ sheet.reshape(h, -1)).view(-1, w, depth))  # (m, w, depth)
        return (up @ small.view(len(small), -1)).view(h, w, depth)


def toponets_loss(
    sheet: Tensor, factor_h: float, factor_w: float, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """1 - the mean over units of the cosine between a unit's weights and the blurred ones: a scalar, 0 to 2.

    A unit whose weights, or blurred weights, are all zero counts as cosine 0, without a gradient. At least
    float32, also under autocast (Deb et al., arXiv 2501.16396; the released package's numbers).

    Args:
        sheet: (h, w, depth), of any float dtype.
        factor_h: the copy in between is floor(h / factor_h) units high.
        factor_w: and floor(w / factor_w) wide.
        interpolation: a mode of torch.nn.functional.interpolate; the paper's is bilinear.

    Raises:
        ValueError: a factor below 1 or larger than the sheet, or an unknown interpolation.
    """
    sheet = at_least_float32(sheet)
    h, w, _ = sheet.shape
    with no_autocast(sheet):
        blurred = blur_of(h, w, factor_h, factor_w, interpolation, sheet.device)(sheet)
        return 1 - cosines(sheet, blurred).mean()


@lru_cache
def blur_of(
    h: int,
    w: int,
    factor_h: float,
    factor_w: float,
    interpolation: Interpolation = "bilinear",
    device: torch.device | None = None,
) -> Blur:
    """The matrices of a blur, float64, or what the device has."""
    check_factors(h, w, factor_h, factor_w)
    if interpolation not in get_args(Interpolation):
        names = ", ".join(get_args(Interpolation))
        raise ValueError(f"interpolation = {interpolation!r} must be one of {names}")
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        down_h, up_h = smaller_and_larger(h, factor_h, interpolation)
        down_w, up_w = smaller_and_larger(w, factor_w, interpolation)
    return Blur(*(matrix.to(device, widest(device)) for matrix in (down_h, up_w @ down_w, up_h)))


def smaller_and_larger(n: int, factor: float, interpolation: Interpolation) -> tuple[Tensor, Tensor]:
    """(m, n) and (n, m): interpolation along one axis, read off what it makes of each unit alone."""
    # The factor is handed over, not the small size: of 64 units by 3 every third is taken, and one is left.
    down = F.interpolate(impulses(n), scale_factor=(scale_of(n, factor), 1.0), mode=interpolation)
    up = F.interpolate(impulses(down.shape[2]), size=(n, 1), mode=interpolation)
    return down[0, :, :, 0].T, up[0, :, :, 0].T


def impulses(n: int) -> Tensor:
    """Columns of n units as images, (1, n, n, 1): in the i-th only unit i is 1."""
    return torch.eye(n, dtype=torch.float64)[None, :, :, None]


def scale_of(n: int, factor: float) -> float:
    """1 / factor, or the next number where rounding would make floor(n / factor) one less (49 by 49)."""
    scale = 1 / factor
    return scale if int(n * scale) == int(n / factor) else math.nextafter(scale, 2)


def check_factors(h: int, w: int, factor_h: float, factor_w: float, layer: str = "") -> None:
    """Raise ValueError, with the layer, the factor and the size, for a factor that does not fit the sheet."""
    whose = f"layer {layer}: " if layer else ""
    for key, factor, n in (("factor_h", factor_h, h), ("factor_w", factor_w, w)):
        if not (math.isfinite(factor) and factor >= 1):
            raise ValueError(f"{whose}{key} = {factor} must be a finite number of at least 1")
        if factor > n:
            raise ValueError(
                f"{whose}{key} = {factor} is larger than the {h}x{w} sheet; it must be at most {n}"
            )


class TopoNetsLoss(WeightLoss):
    """TopoNets' loss of each layer that cfg.modules names; its sheet is that of the layer's outputs.

    Raises:
        ValueError: as WeightLoss, and for a factor larger than one of the sheets.
    """

    def __init__(self, cfg: TopoNetsConfig, model: nn.Module) -> None:
        super().__init__(cfg, model)
        for name in self.layers:
            h, w = grid_shape(len(model.get_submodule(name).weight))
            check_factors(h, w, cfg.factor_h, cfg.factor_w, name)
            for part, matrix in blur_of(h, w, cfg.factor_h, cfg.factor_w)._asdict().items():
                self.register_buffer(f"{part}_{h}x{w}", matrix.float(), persistent=False)

    def of_layer(self, name: str, weight: Tensor) -> Tensor:
        """TopoNets' loss of one layer, a scalar."""
        sheet = output_sheet(weight)
        grid = f"{sheet.shape[0]}x{sheet.shape[1]}"
        blur = Blur(*(getattr(self, f"{part}_{grid}") for part in Blur._fields))
        return 1 - cosines(sheet, blur(sheet)).mean()


LOSS = TopoNetsLoss
