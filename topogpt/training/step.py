"""One optimiser step: accumulate micro-batches, clip, step. Nothing in it waits for a CUDA device."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from topogpt import rng
from topogpt.spatial.schedule import weight_at
from topogpt.text.loader import MicroBatch
from topogpt.training.optim import lr_at, set_lr
from topogpt.training.setup import Training


class Step(NamedTuple):
    """What a step came to, on the device of this rank."""

    losses: Tensor  # cross-entropy and spatial loss per sheet, means over this rank's micro-batches; and
    # each loss on weights, its mean over layers, in the order of Objective.of_weights
    grad_norm: Tensor  # before clipping
    skip: Tensor  # 1 where the gradient was not finite and nothing was changed, else 0


def optimizer_step(t: Training, step: int, batches: Sequence[MicroBatch]) -> Step:
    """Take optimiser step number `step` on this rank's micro-batches of it."""
    cfg = t.cfg
    weight = weight_at(cfg.topo, step, cfg.max_steps)
    set_lr(t.optimizer, lr_at(cfg.optim, step, cfg.max_steps))
    losses = torch.zeros(2, device=t.ranks.device)
    for i, batch in enumerate(batches):
        chosen = t.objective.choose(cfg.seed, step, batch.index)
        torch.manual_seed(rng.seed(cfg.seed, "dropout", step, batch.index))  # no random state to save
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or t.ranks.world == 1 else t.parallel.no_sync():
            ce, spatial = t.parallel(batch.tokens, batch.targets, chosen)
            ((ce + weight * spatial.sum()) / len(batches)).backward()
        losses += torch.stack([ce, spatial.mean()]).detach() / len(batches)
    of_weights = add_losses_of_weights(t, step)
    t.masks.of_gradients()
    grad_norm = nn.utils.clip_grad_norm_(t.model.parameters(), cfg.optim.grad_clip or torch.inf)
    skip = (~grad_norm.isfinite()).float()
    if t.ranks.device.type in ("cuda", "cpu"):
        t.optimizer.found_inf = skip  # their fused kernels leave everything as it is where this is 1
        t.optimizer.step()
    elif not skip:  # others may not look at it, so the host waits for the device
        t.optimizer.step()
    t.masks.of_weights()
    t.optimizer.zero_grad(set_to_none=True)
    return Step(torch.cat([losses, *of_weights]), grad_norm, skip)


def add_losses_of_weights(t: Training, step: int) -> list[Tensor]:
    """Add the gradients of the losses on weights alone to what all ranks share; return the losses, (1,) each.

    Every rank has the same weights, so each adds the same numbers after the reduction, past DDP's hooks.
    """
    found, parameters = [], [p for p in t.model.parameters() if p.requires_grad]
    for name in t.objective.of_weights:
        loss = weight_at(t.cfg.topo, step, t.cfg.max_steps, name) * (
            value := t.objective.loss_of_weights(name)
        )
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                p.grad.add_(grad)
        found.append(value.detach().reshape(1))
    return found
