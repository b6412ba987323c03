"""The weight of the spatial loss over training, a pure function of the step."""

import numpy as np

from topogpt.settings import TopoConfig


def weight_at(cfg: TopoConfig, step: int, max_steps: int) -> float:
    """Weight of the spatial loss at an optimiser step: constant, warmed up from 0, or decayed to 0."""
    if cfg.weight_schedule == "linear":
        return cfg.weight * min(1.0, (step + 1) / max(1, cfg.weight_warmup_steps))
    if cfg.weight_schedule == "cosine":
        return cfg.weight * 0.5 * (1 + np.cos(np.pi * min(1.0, step / max_steps)))
    return cfg.weight
