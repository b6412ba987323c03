"""The neighbour loss: the weights of units side by side point alike (after arXiv 2508.00043).

The mean over pairs of 8-neighbours on a layer's sheet of 1 - the cosine between their weights: the shortest
reach that a loss on a sheet can have, to compare TopoNets with. Training adds the mean over layers.
"""

import torch
from torch import Tensor, nn

from topogpt.spatial.weights import (
    WeightConfig,
    WeightLoss,
    at_least_float32,
    no_autocast,
    output_sheet,
    scales,
)
from topogpt.topo import grid_shape


def neighbour_loss(sheet: Tensor) -> Tensor:
    """Mean over pairs of 8-neighbours of 1 - cos of their weights: a scalar, 0 to 2.

    Pairs across the edge there are none. A unit whose weights are all zero has cosine 0 with its neighbours,
    without a gradient. At least float32, also under autocast.

    Args:
        sheet: (h, w, depth), of any float dtype, of at least two units.

    Raises:
        ValueError: the sheet holds one unit.
    """
    sheet = at_least_float32(sheet)
    h, w, _ = sheet.shape
    if h * w < 2:
        raise ValueError(f"a sheet of {h}x{w} units has no neighbours")
    with no_autocast(sheet):
        unit = sheet * scales(sheet)[..., None]  # directions
        rows, columns = (band(n, sheet) for n in (h, w))
        around = torch.matmul(columns, (rows @ unit.reshape(h, -1)).view(unit.shape))  # of 3x3 units, summed
        twice = torch.linalg.vecdot(unit, around - unit).sum()  # every pair is seen from both of its units
    return 1 - twice / (2 * n_pairs(h, w))


def band(n: int, like: Tensor) -> Tensor:
    """(n, n): 1 where two rows, or columns, of a sheet are the same or side by side."""
    return torch.ones(n, n, dtype=like.dtype, device=like.device).tril(1).triu(-1)


def n_pairs(h: int, w: int) -> int:
    """Pairs of 8-neighbours on an h x w grid."""
    return (h - 1) * w + h * (w - 1) + 2 * (h - 1) * (w - 1)


class NeighbourLoss(WeightLoss):
    """The neighbour loss of each layer that cfg.modules names; its sheet is that of the layer's outputs.

    Raises:
        ValueError: as WeightLoss, and for a layer of one unit.
    """

    def __init__(self, cfg: WeightConfig, model: nn.Module) -> None:
        super().__init__(cfg, model)
        for name in self.layers:
            h, w = grid_shape(len(model.get_submodule(name).weight))
            if h * w < 2:
                raise ValueError(f"layer {name}: a sheet of {h}x{w} units has no neighbours")

    def of_layer(self, name: str, weight: Tensor) -> Tensor:
        return neighbour_loss(output_sheet(weight))


LOSS = NeighbourLoss
