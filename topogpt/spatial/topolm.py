"""TopoLM's loss (Rathi et al. 2025, equations 1-2; arXiv 2410.11516): close together, firing together.

In each neighbourhood of a sheet the correlations r between units over the batch's tokens should follow their
inverse distances d: (1 - corr(r, d)) / 2.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from topogpt import rng, topo
from topogpt.settings import TopoConfig

TINY = 1e-12  # variances below this count as zero: a unit without variance correlates with nothing


class TopoLMLoss(nn.Module):
    """TopoLM's loss for a fixed set of sheets, each with its own positions."""

    def __init__(self, cfg: TopoConfig, positions: Mapping[str, np.ndarray]) -> None:
        """positions: sheet name -> (n_units, 2) grid coordinates."""
        super().__init__()
        self.positions = dict(positions)
        self.sheets = list(positions)
        self.per_sheet = cfg.neighbourhoods
        self.dense: bool | None = None  # NeighbourhoodLoss: None = as the device likes it
        grid = topo.grid_of(next(iter(positions.values())))
        cells = topo.neighbourhood_cells(*grid, cfg.radius)  # (neighbourhoods, U)
        units = np.stack([topo.units_by_cell(p)[cells] for p in positions.values()])
        self.n_neighbourhoods = len(cells)
        target = topo.inverse_distances(cfg.radius, cfg.distance)
        self.register_buffer("units", torch.from_numpy(units), persistent=False)  # (S, neighbourhoods, U)
        # (U, U) float64, which Apple's GPUs lack: not a buffer, so that it stays where it is
        self.exact = standardised_pairs(torch.from_numpy(target))
        self.register_buffer("target", self.exact.float(), persistent=False)

    def choose(self, seed: int, step: int, micro_batch: int) -> Tensor:
        """Neighbourhoods of one micro-batch, (S, K) int64 on the device of the loss.

        They are a pure function of the micro-batch's place in the run. micro_batch is its index in the global
        batch, so the number of ranks changes nothing.
        """
        n = self.n_neighbourhoods
        if self.per_sheet == 0 or self.per_sheet >= n:
            return torch.arange(n, device=self.units.device).expand(len(self.sheets), n)
        draws = rng.raw(len(self.sheets) * n, seed, "neighbourhoods", step, micro_batch).reshape(-1, n)
        chosen = torch.from_numpy(np.argsort(draws, axis=1, kind="stable")[:, : self.per_sheet].copy())
        if self.units.is_cuda:
            chosen = chosen.pin_memory()  # so that the copy need not wait
        return chosen.to(self.units.device, non_blocking=self.units.is_cuda)

    def forward(self, activations: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Loss of each sheet, (S,): the mean over its chosen neighbourhoods.

        Args:
            activations: sheet name -> (B, T, n_units), any float dtype.
            chosen: (S, K) int64, from `choose`.
        """
        sheets = [activations[name].flatten(0, -2) for name in self.sheets]  # (N, C) each
        units = self.units.gather(1, chosen[..., None].expand(-1, -1, self.units.shape[-1]))  # (S, K, U)
        wide = sheets[0].dtype == torch.float64
        target = self.exact.to(sheets[0].device) if wide else self.target.float()
        dense = self.dense if self.dense is not None else target.device.type != "cpu"
        losses = [NeighbourhoodLoss.apply(x, u, target, dense) for x, u in zip(sheets, units, strict=True)]
        return torch.stack(losses)


class NeighbourhoodLoss(torch.autograd.Function):
    """Mean loss over neighbourhoods of one sheet, with the gradient written out.

    The loss depends on the activations through Gram matrices alone, so its gradient is known at the end of
    the forward pass: dL/dX = X M. A few neighbourhoods gather their columns of X and take a Gram matrix each
    (U x U); where that would be more columns than X has, all read one Gram matrix of the whole sheet (C x C)
    instead. On a CPU the gradient of gathered columns is added up token by token, elsewhere by one product
    with a matrix that is mostly zeros: more arithmetic, but no atomic additions, so the same result every
    time. Statistics are fp32 or wider, also under autocast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, units: Tensor, target: Tensor, dense: bool) -> Tensor:
        """Return the loss, a scalar.

        Args:
            x: (N, C) activations.
            units: (K, U) columns of x.
            target: (U, U) from standardised_pairs.
            dense: whether the gradient of gathered columns is one dense product.
        """
        k, u = units.shape
        if k * u <= x.shape[1]:
            columns = x.index_select(1, units.flatten()).to(target.dtype)  # (N, R), R = K * U
            centre_(columns)
            each = columns.view(-1, k, u).transpose(0, 1)  # (K, N, U)
            loss, m = correlation_loss(torch.bmm(each.transpose(1, 2), each), target)
            if dense:
                spread = m.new_zeros(k, u, x.shape[1])
                m = spread.scatter_(2, units[:, None, :].expand(-1, u, -1), m).flatten(0, 1)  # (R, C)
        else:
            columns = centre_(x.to(target.dtype, copy=True))  # (N, R), R = C
            sheet, pairs = columns.T @ columns, (units[:, :, None], units[:, None, :])
            loss, m = correlation_loss(sheet[pairs], target)
            m = torch.zeros_like(sheet).index_put_(pairs, m, accumulate=True)  # (R, C)
        ctx.save_for_backward(columns, units, m / k)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return loss.mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        columns, units, m = ctx.saved_tensors
        m = grad * m
        if m.dim() == 2:
            return (columns @ m).to(ctx.dtype), None, None, None
        each = zip(columns.split(units.shape[1], 1), m, strict=True)
        d = torch.cat([of_neighbourhood @ one for of_neighbourhood, one in each], 1)  # (N, R)
        dx = torch.zeros(ctx.shape, dtype=m.dtype, device=m.device)
        dx.scatter_add_(1, units.flatten().expand(len(d), -1), d)
        return dx.to(ctx.dtype), None, None, None


def centre_(columns: Tensor) -> Tensor:
    """Subtract the mean of each column of (N, R), in place.

    First its first row: the mean of a constant is not that constant in fp32, and what remained would count as
    a variance, with a gradient a million times that of other units.
    """
    columns -= columns[:1].clone()
    columns -= columns.mean(0)
    return columns


def correlation_loss(gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of neighbourhoods from their Gram matrices, and the matrix that turns activations into gradients.

    Args:
        gram: (K, U, U) products of centred activations, X^T X.
        target: (U, U) from standardised_pairs.

    Returns:
        loss (K,) = (1 - corr(r, d)) / 2 over pairs of units, and M (K, U, U) with dloss/dX = X M. From
            r_ij = G_ij / (s_i s_j) with s_i^2 = G_ii and e = dloss/dr: M_ij = e_ij / (s_i s_j), M_ii = -sum_j
            e_ij r_ij / s_i^2.
    """
    variance = gram.diagonal(dim1=-2, dim2=-1)
    alive = (variance > TINY).to(gram.dtype)
    scale = alive * variance.clamp_min(TINY).rsqrt()  # 1 / s_i, (K, U)
    scales = scale[:, :, None] * scale[:, None, :]
    off_diagonal = 1 - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    r = gram * scales * off_diagonal
    centred = (r - r.sum((-2, -1), keepdim=True) / off_diagonal.sum()) * off_diagonal
    norm = centred.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(TINY)
    centred = centred / norm
    corr = (centred * target).sum((-2, -1), keepdim=True)
    # dloss/dr_ij of a pair: -1/2, twice, as the sums hold both triangles
    e = (corr * centred - target) / norm
    diagonal = -(e * r).sum(-1) * scale.square()
    return (1 - corr[:, 0, 0]) / 2, e * scales + torch.diag_embed(diagonal)


def standardised_pairs(d: Tensor) -> Tensor:
    """Off-diagonal entries of (U, U) with mean 0 and norm 1, zeros on the diagonal; both triangles count."""
    off_diagonal = 1 - torch.eye(len(d), dtype=d.dtype, device=d.device)
    d = (d - (d * off_diagonal).sum() / off_diagonal.sum()) * off_diagonal
    return d / d.norm()


LOSS = TopoLMLoss
