"""Contrasts of two groups of items: Welch's t of every unit, on maps read out raw or smoothed."""

from typing import NamedTuple

import numpy as np

from topogpt.analysis import measures
from topogpt.analysis.subject import MapConfig


class TMaps(NamedTuple):
    t: np.ndarray  # (S, h, w)
    p: np.ndarray  # (S, h, w), adjusted for the false discovery rate over all of them
    significant: np.ndarray  # (S, h, w) bool


def t_maps(cfg: MapConfig, a: np.ndarray, b: np.ndarray, fwhm_mm: float) -> TMaps:
    """Welch t of smoothed items a (S, n_a, h, w) minus b (S, n_b, h, w)."""
    a, b = (measures.smooth(x, fwhm_mm, cfg.unit_distance_mm) for x in (a, b))
    test = measures.welch(a.swapaxes(0, 1), b.swapaxes(0, 1))
    p = measures.fdr(test.p)
    return TMaps(test.t, p, p < cfg.alpha)


def chosen(found: TMaps, top_percent: float | None) -> np.ndarray:
    """Units that the first group drives, (S, h, w) bool: significant ones, or the top share of all units."""
    if top_percent is None:
        return found.significant & (found.t > 0)
    return measures.most_selective(found.t, max(1, round(found.t.size * top_percent / 100)))


def clusters_of(network: np.ndarray, smallest: int = 1) -> list[tuple[int, np.ndarray]]:
    """Clusters of units (S, h, w), sheet by sheet, as (index of the sheet, mask); largest first."""
    found = [(s, mask) for s, sheet in enumerate(network) for mask in measures.clusters(sheet, smallest)]
    return sorted(found, key=lambda pair: -int(pair[1].sum()))
