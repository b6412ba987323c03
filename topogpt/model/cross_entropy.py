"""Cross-entropy of a linear head without storing the logits.

The logits of 48 x 1024 tokens over 50,304 words take 10 GB in fp32, more than everything else in a step. Here
they exist for a chunk of tokens at a time, and their gradient is taken while they do, so none are kept.
"""

import torch
from torch import Tensor

from topogpt.model.cost import CHUNK_ELEMENTS


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(x @ weight.T) in nats, as F.cross_entropy of the logits in fp32.

    Matrix products are in x's dtype, or autocast's where that is on; all else is fp32 or wider.

    Args:
        x: (N, C).
        weight: (V, C).
        targets: (N,) int64; -1 does not count. Where none counts, the loss is 0.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient is known at the end of the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, grad_enabled: bool) -> Tensor:
        """grad_enabled: as the caller has it; in here it is off, and needs_input_grad does not tell."""
        wide = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(x.dtype)
        counts = targets != -1
        share = counts.to(wide) / counts.sum().clamp_min(1)  # of each token in the mean
        want_grad = grad_enabled and any(ctx.needs_input_grad)
        loss, dx = torch.zeros((), dtype=wide, device=x.device), []
        dw = torch.zeros(weight.shape if want_grad else (0,), dtype=wide, device=x.device)
        chunk = max(1, CHUNK_ELEMENTS.get(x.device.type, 1 << 24) // len(w))
        for rows, target, each in zip(x.split(chunk), targets.split(chunk), share.split(chunk), strict=True):
            target, each = target.clamp_min(0)[:, None], each[:, None]  # (n, 1)
            log_p = (rows @ w.T).to(wide).log_softmax(-1)  # (n, V)
            loss = loss - (log_p.gather(1, target) * each).sum()
            if not want_grad:
                continue
            # a token's dloss/dlogits
            p = log_p.exp_().scatter_add_(1, target, -torch.ones_like(each)).to(x.dtype)
            dx.append(p @ w * each.to(x.dtype))
            rows = rows * each.to(x.dtype)
            dw = dw.addmm_(p.T, rows) if x.dtype == wide else dw.add_(p.T @ rows)
        ctx.save_for_backward(torch.cat(dx) if want_grad else x.new_zeros(0), dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), (dw * grad).to(ctx.weight_dtype), None, None
