"""What is not in the product: the usual implementations, to compare with, and candidates once considered.

Every spatial loss here is a module with the signature of spatial.TopoLMLoss.forward.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import relative_error
from topogpt import topo
from topogpt.model.gpt import Attention
from topogpt.settings import TopoConfig
from topogpt.spatial.topolm import TopoLMLoss, correlation_loss

# ---- the usual spatial loss ----------------------------------------------------------------------


class LoopLoss(nn.Module):
    """The usual loop: for each neighbourhood a boolean mask, torch.corrcoef and 1 / (1 + distance)."""

    def __init__(self, cfg: TopoConfig, positions: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.sheets = list(positions)
        self.norm = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}[cfg.distance]
        stacked = torch.from_numpy(np.stack(list(positions.values()))).float()  # (S, C, 2)
        h, w = topo.grid_shape(stacked.shape[1])
        inside = range(cfg.radius - 1, h - cfg.radius + 1), range(cfg.radius - 1, w - cfg.radius + 1)
        centres = torch.tensor([(i, j) for i in inside[0] for j in inside[1]])  # (n, 2)
        reach = (stacked[:, None] - centres[:, None]).abs().amax(-1)  # (S, n, C)
        self.register_buffer("coordinates", stacked, persistent=False)
        self.register_buffer("masks", reach < cfg.radius, persistent=False)

    def forward(self, activations: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        losses = []
        for s, name in enumerate(self.sheets):
            x = activations[name].flatten(0, -2)
            of_sheet = []
            for k in chosen[s].tolist():
                mask = self.masks[s, k]
                near = self.coordinates[s][mask].to(torch.promote_types(x.dtype, torch.float32))
                d = 1 / (1 + torch.cdist(near, near, p=self.norm))
                r = torch.corrcoef(x[:, mask].T)
                i, j = torch.tril_indices(len(near), len(near), -1, device=x.device)
                of_sheet.append(0.5 * (1 - torch.corrcoef(torch.stack([r[i, j], d[i, j].to(r.dtype)]))[0, 1]))
            losses.append(torch.stack(of_sheet).mean())
        return torch.stack(losses)


# ---- candidates for the spatial loss -------------------------------------------------------------


class How(NamedTuple):
    """How a candidate takes Gram matrices and gradients."""

    gather: bool  # take the columns of the chosen neighbourhoods; else all columns of the sheet
    joint: bool  # one Gram matrix of all columns taken; else one for each neighbourhood
    dense: bool  # gradient by one product with a mostly empty matrix; else by index_add_ (atomic on CUDA)
    half: bool  # operands as they are (bf16), sums in fp32; else operands in fp32 (TF32 where allowed)
    batched: bool = False  # all sheets in one batched product; else sheet by sheet


CANDIDATES = {
    "gather, bmm, index_add, fp32": How(True, False, False, False),  # a Gram matrix each, atomic additions
    "gather, bmm, dense, fp32": How(True, False, True, False),  # a Gram matrix each, no atomic additions
    "gather, bmm, dense, bf16": How(True, False, True, True),
    # (K * U, K * U), five times the arithmetic
    "gather, one Gram, dense, fp32": How(True, True, True, False),
    "gather, one Gram, dense, bf16": How(True, True, True, True),
    "gather, one Gram, dense, bf16, all sheets": How(True, True, True, True, True),  # one bmm for 24 sheets
    "sheet Gram, fp32": How(False, True, True, False),  # (C, C): all 400 neighbourhoods could be read from it
    "sheet Gram, bf16": How(False, True, True, True),
}


class CandidateLoss(nn.Module):
    """TopoLMLoss computed another way; the statistics of all sheets are taken together."""

    def __init__(self, product: TopoLMLoss, how: How) -> None:
        super().__init__()
        self.product, self.how = product, how
        self.sheets = product.sheets

    def forward(self, activations: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        xs = [activations[name].flatten(0, -2) for name in self.sheets]
        units = self.product.units
        units = units.gather(1, chosen[..., None].expand(-1, -1, units.shape[-1]))  # (S, K, U)
        target = self.product.target.to(torch.promote_types(xs[0].dtype, torch.float32))
        return AllSheets.apply(*self.how, units, target, *xs)


class AllSheets(torch.autograd.Function):
    """The loss of every sheet, (S,), with its gradient written out as in spatial.NeighbourhoodLoss."""

    @staticmethod
    def forward(ctx, gather, joint, dense, half, batched, units, target, *xs) -> Tensor:
        s, k, u = units.shape
        n, c = xs[0].shape
        wide = target.dtype
        half = half and xs[0].dtype != wide
        columns = [x.index_select(1, i.flatten()) if gather else x for x, i in zip(xs, units, strict=True)]
        mean = torch.stack([x.mean(0, dtype=wide) for x in columns])  # (S, R)
        if not half:
            columns = [x.to(wide) - m for x, m in zip(columns, mean, strict=True)]
        if batched:
            columns = [torch.stack(columns)]  # one of (S, N, R) instead of S of (N, R)
        if joint:
            grams = [product(x.mT, x, wide) for x in columns]
            grams = grams[0] if batched else torch.stack(grams)  # (S, R, R)
            if half:
                grams = grams - n * mean[:, :, None] * mean[:, None]
        else:
            each = [x.view(n, k, u).transpose(0, 1) for x in columns]  # (K, N, U)
            grams = torch.stack([product(x.mT, x, wide) for x in each])  # (S, K, U, U)
            if half:
                m = mean.view(s, k, u)
                grams = grams - n * m[..., None] * m[:, :, None]
        if not gather:
            pairs = torch.arange(s, device=units.device).view(s, 1, 1, 1), units[..., None], units[:, :, None]
            grams = grams[pairs]
        elif joint:
            grams = grams.view(s, k, u, k, u).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        loss, m = correlation_loss(grams.reshape(s * k, u, u), target)
        m = m.view(s, k, u, u) / k
        if not gather:
            m = m.new_zeros(s, c, c).index_put_(pairs, m, accumulate=True)  # (S, R, C)
        elif dense:
            spread = m.new_zeros(s, k, u, c)
            m = spread.scatter_(3, units[:, :, None].expand(-1, -1, u, -1), m).flatten(1, 2)  # (S, R, C)
        ctx.save_for_backward(mean, units, m, *columns)
        ctx.how, ctx.shape, ctx.dtype = (dense, half, batched), (n, c), xs[0].dtype
        return loss.view(s, k).mean(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        mean, units, m, *columns = ctx.saved_tensors
        dense, half, batched = ctx.how
        m = m * grad.view(-1, *[1] * (m.dim() - 1))
        if dense:
            shift = -(mean[:, None] @ m) if half else m.new_zeros(len(m), 1, 1)  # (S, 1, C) or nothing
            m, shift = m.to(columns[0].dtype), shift.to(columns[0].dtype)
            if batched:
                dx = torch.baddbmm(shift, columns[0], m) if half else torch.bmm(columns[0], m)
            else:
                sheets = zip(columns, m, shift, strict=True)
                dx = [torch.addmm(b, x, f) if half else x @ f for x, f, b in sheets]
        else:
            dx = []
            for x, i, f in zip(columns, units, m, strict=True):
                each = torch.bmm(x.view(-1, *i.shape).transpose(0, 1), f)  # (K, N, U)
                each = each.transpose(0, 1).flatten(1)  # (N, K * U)
                dx.append(each.new_zeros(ctx.shape).index_add_(1, i.flatten(), each))
        return *[None] * 7, *(d.to(ctx.dtype) for d in dx)


def product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b with sums and result in `wide`."""
    if a.dtype == wide or a.device.type != "cuda":  # no other device sums bf16 products in fp32
        return a.to(wide) @ b.to(wide)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=wide)


def gradients(loss: nn.Module, leaves: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss of each sheet and the gradients of their sum; leaves: (1, N, C) for each sheet."""
    values = loss(dict(zip(loss.sheets, leaves, strict=True)), chosen)
    return values.detach(), torch.autograd.grad(values.sum(), leaves)


def draw_activations(n_sheets: int, n_tokens: int, n_units: int, **to: Any) -> list[Tensor]:
    """(1, N, C) for each sheet, whose units share factors and have means, as a network's do."""
    generator = torch.Generator(to.get("device", "cpu")).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def sheet() -> Tensor:
        shared = normal(n_tokens, 32) @ normal(32, n_units) / 32**0.5
        return (shared + normal(n_tokens, n_units) + normal(1, n_units)).to(**to)[None].requires_grad_()

    return [sheet() for _ in range(n_sheets)]


def spatial_errors(
    losses: Mapping[str, nn.Module], reference: nn.Module, leaves: Sequence[Tensor], chosen: Tensor
) -> dict[str, tuple[float, float]]:
    """Relative errors of values and gradients against the reference in float64, by name."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    value, grads = gradients(reference, exact, chosen)
    errors = {}
    for name, loss in losses.items():
        mine, my_grads = gradients(loss, leaves, chosen)
        errors[name] = relative_error(mine, value), relative_error(torch.stack(my_grads), torch.stack(grads))
    return errors


# ---- padded heads --------------------------------------------------------------------------------


class PaddedAttention(nn.Module):
    """model.Attention with heads of zeros up to a width, so that flash attention needs no copies to pad them.

    The weights stay as they are and are padded in each forward pass, which autocast copies anyway.
    """

    def __init__(self, attention: Attention, width: int) -> None:
        super().__init__()
        self.attention, self.width = attention, width

    def padded_weights(self) -> tuple[Tensor, Tensor]:
        """c_attn (3 * H * width, C) and c_proj (C, H * width)."""
        qkv, proj = self.attention.c_attn.weight, self.attention.c_proj.weight
        c, n_head = qkv.shape[1], self.attention.n_head
        more = self.width - c // n_head
        qkv = F.pad(qkv.view(3 * n_head, -1, c), (0, 0, 0, more)).flatten(0, 1)
        return qkv, F.pad(proj.view(c, n_head, -1), (0, more)).flatten(1)

    def forward(self, x: Tensor, cache: None = None, rotation: None = None) -> Tensor:
        y = attend(x, *self.padded_weights(), self.attention.n_head)
        return self.attention.resid_dropout(y)


def attend(x: Tensor, qkv: Tensor, proj: Tensor, n_head: int) -> Tensor:
    """Causal attention whose heads may be wider than C / n_head, the rest zeros."""
    b, t, c = x.shape
    q, k, v = F.linear(x, qkv).view(b, t, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, width)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(c // n_head) ** -0.5)
    return F.linear(y.transpose(1, 2).reshape(b, t, -1), proj)


def pad_heads(model: nn.Module, width: int) -> None:
    """Give every block of a GPT padded attention."""
    for block in model.transformer.h:
        block.attn = PaddedAttention(block.attn, width)
