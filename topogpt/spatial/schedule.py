"""The weights of spatial losses over training, pure functions of the step."""

import numpy as np

from topogpt.settings import TopoConfig

KEYS = {"toponets": "tau", "neighbour": "neighbour_weight", "wiring": "wiring_weight"}  # of topo, by loss


def weight_at(cfg: TopoConfig, step: int, max_steps: int, loss: str = "topolm") -> float:
    """Weight of a loss at an optimiser step: its own, times the share that the schedule leaves of it."""
    return getattr(cfg, KEYS.get(loss, "weight")) * share_at(cfg, step, max_steps)


def share_at(cfg: TopoConfig, step: int, max_steps: int) -> float:
    """Constant 1; linear from 0 up to 1; cosine from 1 down to 0 at max_steps; chained: up, then down."""
    warmup = cfg.weight_warmup_steps
    if cfg.weight_schedule == "linear" or (cfg.weight_schedule == "chained" and step < warmup):
        return min(1.0, (step + 1) / max(1, warmup))
    if cfg.weight_schedule in ("cosine", "chained"):
        done = (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
    return 1.0
