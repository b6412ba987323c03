"""Measures on maps: smoothing, t-tests, the pairs behind Moran's I, clusters, curves over distance.

Maps are numpy arrays (..., h, w); every function takes as many of them at once as it is given. What a value
is compared with is in nulls.py.
"""

import functools
from typing import Literal, NamedTuple

import numpy as np

Contiguity = Literal["queen", "rook"]
ROUNDING = float(np.finfo(np.float32).eps)  # of activations, relative to the largest of a unit


# ---- smoothing -----------------------------------------------------------------------------------


def smooth(grids: np.ndarray, fwhm_mm: float, unit_distance_mm: float = 1.0) -> np.ndarray:
    """Gaussian readout of maps (..., h, w), as a voxel samples its surround (TopoLM, section 5); 0: as it is.

    sigma = FWHM / sqrt(8 ln 2). At the border weights are those of the cells inside, and add up to 1, so that
    a constant map stays constant; TopoLM's code leaves them smaller there, which no t-value can tell.
    """
    if fwhm_mm == 0:
        return grids
    h, w = grids.shape[-2:]
    down, across = (smoothing_weights(n, fwhm_mm, unit_distance_mm) for n in (h, w))
    return (down @ grids @ across.T).astype(grids.dtype)


def smoothing_weights(n: int, fwhm_mm: float, unit_distance_mm: float) -> np.ndarray:
    """Weights along one side, (n, n), rows adding up to 1; a Gaussian of the plane is a product of two."""
    sigma = fwhm_mm / np.sqrt(8 * np.log(2)) / unit_distance_mm  # in cells
    distance = np.arange(n)[:, None] - np.arange(n)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdims=True)


def width(fwhm: str | float) -> str:
    return f"FWHM {float(fwhm):g} mm"


def smoothing(fwhm: str | float) -> str:
    """A readout in words."""
    return "raw" if float(fwhm) == 0 else width(fwhm)


# ---- contrasts -----------------------------------------------------------------------------------


class TTest(NamedTuple):
    t: np.ndarray
    p: np.ndarray  # two-sided


def welch(a: np.ndarray, b: np.ndarray) -> TTest:
    """Welch's t-test of a (n_a, ...) against b (n_b, ...) over their first axis; a constant unit: t 0, p 1.

    Values are known to the rounding of float32, so the spread within a group counts as no less: a unit that
    is constant within each group, but not the same in both, has a huge t rather than an infinite one.
    """
    from scipy import special

    assert min(len(a), len(b)) > 1, "a group of one has no variance"
    largest = np.maximum(np.abs(a).max(0), np.abs(b).max(0)).astype(np.float64)
    a, b = (x / np.where(largest > 0, largest, 1.0) for x in (a, b))
    of_a, of_b = (np.maximum(x.var(0, ddof=1), ROUNDING**2) / len(x) for x in (a, b))
    t = (a.mean(0) - b.mean(0)) / np.sqrt(of_a + of_b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return TTest(t, 2 * special.stdtr(freedom, -np.abs(t)))


def fdr(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for the false discovery rate over all of them (Benjamini & Hochberg 1995)."""
    from scipy import stats

    return stats.false_discovery_control(p.ravel(), method="bh").reshape(p.shape)


def most_selective(t: np.ndarray, k: int) -> np.ndarray:
    """The k units of largest t over all of them, a mask of t's shape; the first ones where t is the same."""
    mask = np.zeros(t.shape, bool)
    mask.flat[np.argsort(-t, axis=None, kind="stable")[:k]] = True
    return mask


# ---- Moran's I -----------------------------------------------------------------------------------


class Edges(NamedTuple):
    """Neighbouring pairs of cells, and the two row-standardised weights of each pair added up."""

    i: np.ndarray
    j: np.ndarray
    weight: np.ndarray


@functools.lru_cache(maxsize=8)
def edges(h: int, w: int, contiguity: Contiguity) -> Edges:
    cells = np.arange(h * w).reshape(h, w)
    pairs = [(cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])]
    if contiguity == "queen":
        pairs += [(cells[:-1, :-1], cells[1:, 1:]), (cells[:-1, 1:], cells[1:, :-1])]
    i, j = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    n_neighbours = np.bincount(np.concatenate([i, j]), minlength=h * w)
    return Edges(i, j, 1 / n_neighbours[i] + 1 / n_neighbours[j])


def gram_of(maps: np.ndarray) -> np.ndarray:
    """Mean over maps (n, h, w) of z z^T / z^T z, with z the deviations from a map's mean; (h w, h w) float32.

    The mean Moran's I of the maps is a sum over the pairs of neighbours in it, so that a permutation costs
    the same for one map and for thousands. A constant map counts as 0.
    """
    z = maps.reshape(len(maps), -1).astype(np.float64)
    z = z - z[:, :1]  # a constant map is 0 now, which its mean, rounded, would not make it
    z = z - z.mean(1, keepdims=True)
    norm = np.sqrt((z * z).sum(1, keepdims=True))
    z = np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)
    return (z.T @ z / len(z)).astype(np.float32)


# ---- clusters ------------------------------------------------------------------------------------


def clusters(chosen: np.ndarray, smallest: int = 1) -> list[np.ndarray]:
    """Sets of chosen cells (h, w) that touch along sides, largest first, as masks (h, w).

    Growing a cluster from its best unit by its best neighbour until none is significant (TopoLM, section 5)
    ends at the same set, whatever the order.
    """
    from scipy import ndimage

    labels, n = ndimage.label(chosen)
    found = [labels == k for k in range(1, n + 1)]
    return sorted((m for m in found if m.sum() >= smallest), key=lambda m: -int(m.sum()))


class ClusterSizes(NamedTuple):
    """Of each map, in units; 0 where it has none."""

    largest: np.ndarray
    mean: np.ndarray


def cluster_sizes(chosen: np.ndarray) -> ClusterSizes:
    """Sizes of the clusters of many maps, (..., h, w) -> (...)."""
    from scipy import ndimage

    alone = np.zeros((3, 3, 3), int)
    alone[1] = ndimage.generate_binary_structure(2, 1)  # neighbours on the same map only
    flat = chosen.reshape(-1, *chosen.shape[-2:])
    labels, n = ndimage.label(flat, structure=alone)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    sizes[0] = 0
    largest = sizes[labels].max(axis=(-2, -1))
    n_clusters = np.diff(np.maximum.accumulate(labels.max(axis=(-2, -1))), prepend=0)  # labels count upwards
    mean = flat.sum(axis=(-2, -1)) / np.maximum(n_clusters, 1)
    return ClusterSizes(largest.reshape(chosen.shape[:-2]), mean.reshape(chosen.shape[:-2]))


# ---- curves over distance ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def distances(h: int, w: int) -> np.ndarray:
    """l2 distance between cells, in cells, (h w, h w)."""
    places = np.stack(np.divmod(np.arange(h * w), w), axis=1).astype(float)
    return np.linalg.norm(places[:, None] - places, axis=-1)


class Curve(NamedTuple):
    distance: np.ndarray  # middle of each bin, in cells
    value: np.ndarray  # mean over pairs of units in it


def curve(pairs: np.ndarray, h: int, w: int, bins: int | None = None) -> Curve:
    """Mean of a quantity of pairs of units (h w, h w) against their distance; each pair counts once.

    bins: of equal width up to the largest distance; None: one a cell, 0.5 to 1.5, 1.5 to 2.5 and so on, up
    to the longer side of the sheet, as beyond it a few pairs of corners are all there is.
    """
    first, second = np.triu_indices(h * w, 1)
    apart = distances(h, w)[first, second]
    if bins is None:
        near = apart < max(h, w) + 0.5
        first, second, apart = first[near], second[near], apart[near]
        at = np.round(apart).astype(int) - 1
        middle = np.arange(1.0, at.max() + 2)
    else:
        limits = np.linspace(0, apart.max(), bins + 1)
        at = np.clip(np.searchsorted(limits, apart, side="left") - 1, 0, bins - 1)
        middle = (limits[1:] + limits[:-1]) / 2
    n = np.bincount(at, minlength=len(middle))
    total = np.bincount(at, weights=pairs[first, second], minlength=len(middle))
    return Curve(middle[n > 0], total[n > 0] / n[n > 0])


def correlations(patterns: np.ndarray) -> np.ndarray:
    """Pearson correlation of units over samples (n, n_units); 0 for a constant unit."""
    z = patterns.astype(np.float64) - patterns[0]  # exactly 0 for a constant unit
    z = z - z.mean(0)
    norm = np.sqrt((z * z).sum(0))
    z = np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)
    return z.T @ z


def smoothness_tdann(selectivity: np.ndarray, bins: int = 20) -> float:
    """TDANN's smoothness of a map (h, w): (max - first) / max of |difference in selectivity| over distance.

    1: neighbours are alike and distant units differ; 0: distance says nothing (Margalit et al. 2024, code).
    """
    values = selectivity.ravel().astype(float)
    found = curve(np.abs(values[:, None] - values), *selectivity.shape, bins).value
    return float((found.max() - found[0]) / found.max()) if found.max() > 0 else 0.0


def smoothness_correlation(curve_of_correlations: Curve) -> float:
    """Largest minus smallest value of the curve of pairwise correlations over distance.

    It reaches beyond 1, as TopoNets' figures do; their definition is not released (this one is inferred).
    """
    return float(curve_of_correlations.value.max() - curve_of_correlations.value.min())


def wiring_length(correlation: np.ndarray, h: int, w: int, partners: int = 20) -> float:
    """Mean distance of a unit to its most correlated `partners`, over that of all pairs: 1 without a map.

    A functional measure: how long the wires would be if units that fire together were wired together.
    """
    apart = distances(h, w)
    off_diagonal = correlation - 2 * np.eye(len(correlation))  # never its own partner
    partners = min(partners, len(correlation) - 1)  # a small sheet has no more
    nearest = np.argpartition(-off_diagonal, partners - 1, axis=1)[:, :partners]
    return float(np.take_along_axis(apart, nearest, 1).mean() / apart[np.triu_indices(h * w, 1)].mean())
