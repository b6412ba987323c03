"""The optimiser, its parameter groups, and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from topogpt.settings import OptimConfig


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> "torch.optim.Optimizer | Together":
    """Fused AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Weight decay is on matrices and embeddings only.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_muon = {name: p for name, p in named.items() if cfg.name == "muon" and ".h." in name and p.dim() == 2}
    rest = [p for name, p in named.items() if name not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = groups if cfg.name == "adamw" else [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    if cfg.name == "adamw":
        return adamw
    # updates as large as AdamW's, so that its learning rates and decay serve (Liu et al., arXiv 2502.16982)
    how = {"momentum": cfg.muon_momentum, "adjust_lr_fn": "match_rms_adamw"}
    muon = Muon(by_muon.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, **how)
    for group in muon.param_groups:
        group["times_lr"] = 1.0 if cfg.muon_lr is None else cfg.muon_lr / cfg.lr
    return Together(muon, adamw)


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which leaves everything as it is where found_inf is 1.

    As AdamW's fused kernel does, and like it without waiting for the device.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        if self.found_inf is None:
            super().step()
            return
        skip, trained = self.found_inf.bool(), [p for group in self.param_groups for p in group["params"]]
        trained = [p for p in trained if p.grad is not None]
        before = [p.clone() for p in trained]
        for p in trained:  # what Muon's running mean is drawn towards: itself
            held = self.state[p].get("momentum_buffer", torch.zeros_like(p))
            p.grad = torch.where(skip, held, p.grad)
        super().step()
        for p, old in zip(trained, before, strict=True):
            p.copy_(torch.where(skip, old, p))


class Together:
    """Several optimisers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def found_inf(self) -> Tensor | None:
        return self.parts[0].found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        for part in self.parts:
            part.found_inf = value

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        each = [part.state_dict() for part in self.parts]
        return {key: [one[key] for one in each] for key in ("state", "param_groups")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part, state, groups in zip(self.parts, saved["state"], saved["param_groups"], strict=True):
            part.load_state_dict({"state": state, "param_groups": groups})


def set_lr(optimizer: "torch.optim.Optimizer | Together", lr: float) -> None:
    """Of every group its share: Muon's matrices may have a rate of their own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times_lr", 1.0)


def lr_at(cfg: OptimConfig, step: int, max_steps: int) -> float:
    """Linear warm-up to lr; then by the schedule to min_lr at decay_steps (max_steps where that is None).

    cosine: half a cosine. trapezoid: lr, and linearly down over the last warmdown_steps.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    end = max_steps if cfg.decay_steps is None else cfg.decay_steps
    if cfg.schedule == "trapezoid":
        left = min(1.0, max(0.0, (end - step) / cfg.warmdown_steps))
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * left
    done = min(1.0, (step - cfg.warmup_steps) / max(1, end - cfg.warmup_steps))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
