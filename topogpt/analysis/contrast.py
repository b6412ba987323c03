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
