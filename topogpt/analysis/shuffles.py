"""The label null: what a contrast of the same items shows when it is not known which are of which kind.

    labels = shuffled(first, pairs, 300, seed)           # (300, n_items): which are called the first kind
    under_shuffles(patterns, labels, "queen").mean(1)    # Moran's I of the t-maps, mean over sheets: (300,)

A topographic model's t-maps are smooth whatever the labels, so a high Moran's I says nothing of a contrast
that shuffled labels reach as well (PAPERS.md, section 10). All sheets see the same shuffles, so that a mean
over sheets has its own null.
"""

from typing import NamedTuple

import numpy as np

from topogpt import rng, topo
from topogpt.analysis.measures import ROUNDING, Contiguity
from topogpt.analysis.nulls import share_reaching

MOST_SELECTIVE = 0.1  # share of units that a half of the items chooses


def shuffled(first: np.ndarray, pairs: np.ndarray | None, n: int, seed: int, name: str = "") -> np.ndarray:
    """Labels of items (n_items,) bool, shuffled n times: (n, n_items) bool.

    Args:
        pairs: (n_items,) numbers of pairs or larger groups; labels change places within each alone.
    """
    groups = np.zeros(len(first), int) if pairs is None else pairs
    places = np.argsort(groups, kind="stable")
    found = np.empty((n, len(first)), bool)
    for k, labels in enumerate(found):
        order = rng.permutation(len(first), seed, "labels", name, k)
        labels[places] = first[order[np.argsort(groups[order], kind="stable")]]
    return found


class Test(NamedTuple):
    t: np.ndarray  # (n, n_units), Welch
    d: np.ndarray  # (n, n_units): Cohen's d, the difference over the root of the mean variance


def welch_of_labels(x: np.ndarray, labels: np.ndarray) -> Test:
    """`measures.welch` of items x (n_items, n_units) for many labels (n, n_items) at once.

    Sums over the first kind are one product of matrices; those over the second are what is left.
    """
    largest = np.abs(x).max(0).astype(np.float64)
    x = x / np.where(largest > 0, largest, 1.0)
    x = x - x.mean(0)
    n_first, one = labels.sum(1, keepdims=True), labels.astype(np.float64)
    sums, squares = one @ x, one @ (x * x)

    def moments(total: np.ndarray, square: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return total / n, np.maximum((square - total * total / n) / (n - 1), ROUNDING**2)

    n_second = len(x) - n_first
    a, var_a = moments(sums, squares, n_first)
    b, var_b = moments(x.sum(0) - sums, (x * x).sum(0) - squares, n_second)
    return Test((a - b) / np.sqrt(var_a / n_first + var_b / n_second), (a - b) / np.sqrt((var_a + var_b) / 2))


def under_shuffles(patterns: np.ndarray, labels: np.ndarray, contiguity: Contiguity) -> np.ndarray:
    """Moran's I of the t-maps of patterns (S, n_items, h, w) for many labels (n, n_items): (n, S)."""
    found = np.empty((len(labels), len(patterns)))
    for s, sheet in enumerate(patterns):
        t = welch_of_labels(sheet.reshape(len(sheet), -1), labels).t
        found[:, s] = np.nan_to_num(topo.morans_i(t.reshape(-1, *sheet.shape[1:]), contiguity))
    return found


def beside(value: float, at_random: np.ndarray) -> dict[str, float]:
    """A value beside what shuffled labels give, (n,); p: share of them that reach it, itself among them."""
    spread = {"mean": float(at_random.mean()), "sd": float(at_random.std())}
    return {"value": value} | spread | {"p": share_reaching(at_random, value)}


# ---- again on the other half -------------------------------------------------------------------------------


def half_of(first: np.ndarray, pairs: np.ndarray | None, seed: int) -> np.ndarray:
    """A random half of the items of each kind, or of the pairs, (n_items,) bool."""
    half = np.zeros(len(first), bool)
    sides = (("first", np.flatnonzero(first)), ("second", np.flatnonzero(~first)))
    for name, places in sides if pairs is None else (("pairs", np.unique(pairs)),):
        chosen = places[rng.permutation(len(places), seed, "split", name)[: len(places) // 2]]
        half |= np.isin(pairs, chosen) if pairs is not None else np.isin(np.arange(len(first)), chosen)
    return half


def again(
    patterns: np.ndarray, first: np.ndarray, pairs: np.ndarray | None, n: int, seed: int
) -> dict[str, dict[str, float]] | None:
    """What half of the items shows, on the other half, beside n shuffles of the labels within each half.

    correlation_of_t: of the t-values of all units between the halves: does the place of what is selective
    repeat? effect_size: Cohen's d, signed as t is in the first half, of the tenth of units with the largest
    |t| there. None where a half has fewer than two items of a kind.
    """
    half = half_of(first, pairs, seed)
    halves = []
    for name, there in (("here", half), ("there", ~half)):
        labels, groups = first[there], None if pairs is None else pairs[there]
        if min(labels.sum(), (~labels).sum()) < 2:
            return None
        all_labels = np.concatenate([labels[None], shuffled(labels, groups, n, seed, name)])
        x = patterns[:, there].reshape(len(patterns), len(labels), -1)
        each = [welch_of_labels(sheet, all_labels) for sheet in x]
        halves.append(Test(*(np.concatenate(parts, axis=1) for parts in zip(*each, strict=True))))
    here, other = halves
    k = max(1, round(MOST_SELECTIVE * here.t.shape[1]))
    most = np.argpartition(-np.abs(here.t), k - 1, axis=1)[:, :k]
    signs = np.sign(np.take_along_axis(here.t, most, 1))
    effects = (signs * np.take_along_axis(other.d, most, 1)).mean(1)
    centred = [test.t - test.t.mean(1, keepdims=True) for test in halves]
    norms = np.prod([np.sqrt((c * c).sum(1)) for c in centred], axis=0)
    product = (centred[0] * centred[1]).sum(1)
    correlations = np.divide(product, norms, out=np.zeros_like(norms), where=norms > 0)
    values = {"effect_size": effects, "correlation_of_t": correlations}
    return {key: beside(float(x[0]), x[1:]) for key, x in values.items()}
