"""Which sheets a model has, and how their units lie."""

import numpy as np

from topogpt import rng, topo
from topogpt.settings import GPTConfig, TopoConfig


def sheet_positions(cfg: TopoConfig, model: GPTConfig) -> dict[str, np.ndarray]:
    """Positions of every sheet of cfg.layout, each (n_units, 2): row and column of each unit."""
    names = topo.sheet_names(model.n_layer, cfg.layout)
    if cfg.layout == "one_sheet":
        return {topo.ONE_SHEET: positions_on_one_sheet(cfg, model)}
    n_units = model.n_hidden if cfg.layout == "c_fc" else model.n_embd
    return {name: topo.positions(cfg.positions, n_units, cfg.seed, name) for name in names}


def positions_on_one_sheet(cfg: TopoConfig, model: GPTConfig) -> np.ndarray:
    """(2 * n_layer * n_embd, 2): branch after branch, each on rows of its own (Topo-Omni, arXiv 2606.09770).

    Permuted positions change places inside the rows of their branch alone.
    """
    _, w = topo.sheet_shape(cfg.layout, model.n_layer, model.n_embd, model.n_hidden)
    n, cells = model.n_embd, []
    for i, branch in enumerate(topo.sheet_names(model.n_layer)):
        is_random = cfg.positions == "permuted"
        order = rng.permutation(n, cfg.seed, "positions", branch) if is_random else np.arange(n)
        cells.append(i * n + order)
    return np.stack(np.divmod(np.concatenate(cells), w), axis=1)
