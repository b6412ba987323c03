"""Which sheets a model has, and how their units lie."""

from collections.abc import Sequence

import numpy as np

from topogpt import topo
from topogpt.settings import TopoConfig


def sheet_positions(cfg: TopoConfig, sheets: Sequence[str], n_units: int) -> dict[str, np.ndarray]:
    """Positions of every sheet, each (n_units, 2): row and column of each unit."""
    return {name: topo.positions(cfg.positions, n_units, cfg.seed, name) for name in sheets}
