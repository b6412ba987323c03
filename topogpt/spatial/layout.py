"""Which sheets a model has, and how their units lie."""

from typing import Literal

import numpy as np

from topogpt import rng, topo
from topogpt.settings import GPTConfig, TopoConfig

Kind = Literal["permuted", "identity"]


def sheet_positions(cfg: TopoConfig, model: GPTConfig) -> dict[str, np.ndarray]:
    """Positions of every sheet that settings name, each (n_units, 2): row and column of each unit."""
    return laid_out(model, cfg.layout, cfg.positions, cfg.seed)


def laid_out(model: GPTConfig, layout: topo.Layout, kind: Kind, seed: int = 0) -> dict[str, np.ndarray]:
    """Positions of every sheet of a layout, each (n_units, 2)."""
    names = topo.sheet_names(model.n_layer, layout)
    if layout == "one_sheet":
        return {topo.ONE_SHEET: positions_on_one_sheet(model, kind, seed)}
    n_units = model.n_hidden if layout == "c_fc" else model.n_embd
    return {name: topo.positions(kind, n_units, seed, name) for name in names}


def positions_on_one_sheet(model: GPTConfig, kind: Kind, seed: int) -> np.ndarray:
    """(2 * n_layer * n_embd, 2): branch after branch, each on rows of its own (Topo-Omni, arXiv 2606.09770).

    Permuted positions change places inside the rows of their branch alone.
    """
    _, w = topo.sheet_shape("one_sheet", model.n_layer, model.n_embd, model.n_hidden)
    n, cells = model.n_embd, []
    for i, branch in enumerate(topo.sheet_names(model.n_layer)):
        order = rng.permutation(n, seed, "positions", branch) if kind == "permuted" else np.arange(n)
        cells.append(i * n + order)
    return np.stack(np.divmod(np.concatenate(cells), w), axis=1)
