"""The weights of spatial losses over training, pure functions of the step."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topogpt.settings import TopoConfig

# The weight of a loss among the settings of the sheets, where it is not `weight`.
WEIGHTS = {"toponets": "tau", "neighbour": "neighbour_weight", "wiring": "wiring_weight"}


def weight_at(cfg: TopoConfig, step: int, max_steps: int, loss: str = "topolm") -> float:
    """Weight of a loss at an optimiser step: its own, times the share that the schedule leaves of it."""
    return getattr(cfg, WEIGHTS.get(loss, "weight")) * share_at(cfg, step, max_steps)


def share_at(cfg: TopoConfig, step: int, max_steps: int) -> float:
    """Constant 1; linear from 0 up to 1; cosine from 1 down to 0 at max_steps; chained: up, then down."""
    warmup = cfg.weight_warmup_steps
    if cfg.weight_schedule == "linear" or (cfg.weight_schedule == "chained" and step < warmup):
        return min(1.0, (step + 1) / max(1, warmup))
    if cfg.weight_schedule in ("cosine", "chained"):
        done = (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
    return 1.0


def losses_in_words(topo: Mapping[str, Any]) -> str:
    """The spatial losses of a run's recorded settings with their weights: topolm, weight 2.5; none."""
    names = topo["loss"].split("+") if topo["loss"] != "none" else []
    keys = [WEIGHTS.get(name, "weight") for name in names]
    return " + ".join(f"{n}, {k} {topo[k]}" for n, k in zip(names, keys, strict=True)) or "none"
