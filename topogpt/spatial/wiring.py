"""The wiring loss: strong weights where the way is short (after BIMT, arXiv 2305.08746).

The mean over the weights of a linear layer of |W_ij| times the distance between the units i and j that it
connects. Its inputs lie on one sheet and its outputs on another, laid over each other: each is scaled to the
unit square, so that sizes may differ. Of a GPT's block these are mlp.c_fc, from the sheet of the stream
(n_embd units) to that of the hidden units (4 * n_embd), and mlp.c_proj, back from there: give both as
modules, "*.mlp.c_fc" and "*.mlp.c_proj". attn.c_attn puts out queries, keys and values, so three sheets and
not one: leave it out. The sheets are row by row; with identity positions the outputs' sheet of mlp.c_proj is
the one whose activations are shown.
"""

import numpy as np
import torch
from torch import Tensor, nn

from topogpt.spatial.weights import WeightConfig, WeightLoss
from topogpt.topo import positions, unit_square


def wiring_loss(weight: Tensor, distance: Tensor) -> Tensor:
    """Mean of |W_ij| * distance_ij, a scalar; both are (out, in)."""
    return torch.dot(weight.abs().flatten(), distance.flatten().to(weight.dtype)) / weight.numel()


def distances(n_out: int, n_in: int) -> Tensor:
    """Euclidean distances between units of two sheets on the unit square, (n_out, n_in) float32."""
    a, b = (unit_square(positions("identity", n, 0, "")) for n in (n_out, n_in))
    squares = np.square(a[:, None, 0] - b[:, 0]) + np.square(a[:, None, 1] - b[:, 1])
    return torch.from_numpy(np.sqrt(squares).astype(np.float32))


class WiringLoss(WeightLoss):
    """The wiring loss of each linear layer that cfg.modules names.

    It is as small as the weights are (0.008 of weights at N(0, 0.02)) and falls with them, so its weight is
    of another order than TopoNets' tau.

    Raises:
        ValueError: as WeightLoss; a convolution has no sheet of inputs.
    """

    kinds = (nn.Linear,)

    def __init__(self, cfg: WeightConfig, model: nn.Module) -> None:
        super().__init__(cfg, model)
        for shape in {model.get_submodule(name).weight.shape for name in self.layers}:
            self.register_buffer(buffer_name(shape), distances(*shape), persistent=False)

    def of_layer(self, name: str, weight: Tensor) -> Tensor:
        return wiring_loss(weight, getattr(self, buffer_name(weight.shape)))


def buffer_name(shape: torch.Size) -> str:
    """One table of distances serves all layers of a shape."""
    return f"distances_{shape[0]}_{shape[1]}"


LOSS = WiringLoss
