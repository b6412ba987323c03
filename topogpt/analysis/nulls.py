"""What a value on a map is compared with: shuffled units, and white noise smoothed in the same way.

A topographic value without its null says nothing: smoothing alone makes neighbours alike. That of a contrast
has one more, its labels shuffled (shuffles.py).
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from topogpt import rng, topo
from topogpt.analysis.measures import Contiguity, edges, gram_of, smooth, smoothing_weights
from topogpt.analysis.subject import MoranConfig


class Moran(NamedTuple):
    """Of one map, or of the mean over maps; compare it with the floor of the same smoothing and grid."""

    value: float
    p: float  # of the units shuffled over the grid: share of permutations that reach the value
    floor: float  # mean of smoothed white noise
    floor_sd: float  # of the mean over as many maps of it as the value has
    p_floor: float  # share of such means that reach the value; takes units and maps for independent


def moran(
    maps: np.ndarray,
    fwhm_mm: float,
    unit_distance_mm: float = 1.0,
    contiguity: Contiguity = "queen",
    permutations: int = 999,
    seed: int = 0,
    of_t: bool = False,
) -> Moran:
    """Mean Moran's I of maps (n, h, w), or of one map (h, w), that were smoothed at fwhm_mm.

    p is the pseudo p-value of esda's Moran, one-sided: (1 + permutations that reach the value) / (1 + all).
    Smoothing alone makes neighbours alike, so for a smoothed map p_floor is the one to look at.
    of_t: whether they are maps of t, whose variance is the same everywhere (`noise_morans`).
    """
    *_, h, w = maps.shape
    gram = gram_of(maps.reshape(-1, h, w))
    found = edges(h, w, contiguity)
    value = float(gram[found.i, found.j] @ found.weight)
    at_random = gram.take(permuted_edges(h, w, contiguity, permutations, seed)) @ found.weight
    noise = noise_morans(h, w, fwhm_mm, unit_distance_mm, contiguity, permutations, seed, of_t)
    n = maps.size // (h * w)
    means = noise
    if n > 1:
        means = noise[np.random.default_rng((seed, n)).integers(len(noise), size=(permutations, n))].mean(1)
    p, p_floor = (share_reaching(values, value) for values in (at_random, means))
    return Moran(value, p, float(noise.mean()), float(noise.std() / np.sqrt(n)), p_floor)


def moran_of_sheets(
    cfg: MoranConfig, sheets: list[str], maps: np.ndarray, fwhm_mm: float, of_t: bool = False
) -> dict[str, Any]:
    """Moran's I of every sheet, beside its floor; floor_sd is that of their mean.

    Args:
        maps: (S, h, w), or (S, n, h, w) for the mean over n maps; smoothed at fwhm_mm.
    """
    found = {
        sheet: moran(grids, fwhm_mm, cfg.unit_distance_mm, cfg.contiguity, cfg.permutations, cfg.seed, of_t)
        for sheet, grids in zip(sheets, maps, strict=True)
    }
    first = next(iter(found.values()))
    return {
        "mean": np.mean([m.value for m in found.values()]),
        "floor": first.floor,
        "floor_sd": first.floor_sd / np.sqrt(len(found)),
        "by_sheet": {sheet: m._asdict() for sheet, m in found.items()},
    }


def share_reaching(values: np.ndarray, value: float) -> float:
    return float((1 + (values >= value - 1e-9).sum()) / (1 + len(values)))


@functools.lru_cache(maxsize=4)
def permuted_edges(h: int, w: int, contiguity: Contiguity, permutations: int, seed: int) -> np.ndarray:
    """Places in a flat (h w, h w) matrix where each permutation finds the pairs, (permutations, n_edges)."""
    found, n = edges(h, w, contiguity), h * w
    order = np.stack([rng.permutation(n, seed, "moran", k) for k in range(permutations)])
    return (order[:, found.i] * n + order[:, found.j]).astype(np.int32)


@functools.lru_cache(maxsize=32)
def noise_morans(
    h: int,
    w: int,
    fwhm_mm: float,
    unit_distance_mm: float,
    contiguity: Contiguity,
    n: int,
    seed: int,
    of_t: bool = False,
) -> np.ndarray:
    """Moran's I of n maps of smoothed white noise.

    of_t: scaled to the same variance everywhere, as t-maps are: smoothing averages fewer cells at the border,
    so that maps of other values vary more there.
    """

    def readout(grids: np.ndarray) -> np.ndarray:
        down, across = (smoothing_weights(m, fwhm_mm, unit_distance_mm) for m in (h, w))
        sd = np.sqrt(np.outer((down**2).sum(1), (across**2).sum(1))) if of_t else 1.0
        return smooth(grids, fwhm_mm, unit_distance_mm) / sd

    return topo.noise_morans(h, w, n, (seed, n), contiguity, readout if fwhm_mm else None)
