"""Sets of units that interventions are made on, and the random sets that each is compared with.

As many random units of the same sheets answer: is it these units? They lie scattered, though, and neighbours
on a map are alike; so a cluster or a disc is also compared with its own shape elsewhere on its sheet, which
answers: is it this place?
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from topogpt import rng, topo
from topogpt.analysis.nulls import share_reaching


class Target(NamedTuple):
    name: str
    units: np.ndarray  # (S, n_units) bool
    sheet: int | None = None  # of a set that lies together on one sheet


def random_units(units: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """As many random units in every sheet as a set has there, (S, n_units) bool."""
    found = np.zeros(units.shape, bool)
    for s, k in enumerate(units.sum(1)):
        found[s, rng.permutation(units.shape[1], seed, "random units", draw, s)[:k]] = True
    return found


def placements(shape: np.ndarray) -> list[np.ndarray]:
    """Every way to put a set of cells (h, w) on its sheet, also turned and mirrored, with all cells inside.

    Each different mask (h, w) once; the set as it is belongs to them.
    """
    h, w = shape.shape
    rows, columns = np.nonzero(shape)
    cut = shape[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    turned = [np.rot90(side, k) for side in (cut, cut[:, ::-1]) for k in range(4)]
    found: dict[bytes, np.ndarray] = {}
    for piece in {(p.shape, p.tobytes()): p for p in turned}.values():
        a, b = piece.shape
        for top in range(h - a + 1):
            for left in range(w - b + 1):
                mask = np.zeros((h, w), bool)
                mask[top : top + a, left : left + b] = piece
                found[mask.tobytes()] = mask
    return list(found.values())


class Sets(NamedTuple):
    """A target, and the random sets that it is compared with, (S, n_units) bool each."""

    target: Target
    units: list[np.ndarray]  # as many random units of the same sheets
    shape: list[np.ndarray]  # its shape elsewhere on its sheet; none of units that lie scattered
    n_places: int | None  # where its shape fits


def sets_of(target: Target, positions: Mapping[str, np.ndarray], n: int, seed: int) -> Sets:
    """A target with n random sets of each kind.

    Args:
        positions: sheet -> (n_units, 2).
    """
    units = [random_units(target.units, seed, draw) for draw in range(n)]
    if target.sheet is None:
        return Sets(target, units, [], None)
    place = list(positions.values())[target.sheet]
    there = placements(topo.on_grid(target.units[target.sheet], place))
    moved = np.zeros((n, *target.units.shape), bool)
    chosen = rng.raw(n, seed, "random places", target.name) % np.uint64(len(there))
    for units_of, k in zip(moved, chosen.tolist(), strict=True):
        units_of[target.sheet] = there[k][place[:, 0], place[:, 1]]
    return Sets(target, units, list(moved), len(there))


class Compared(NamedTuple):
    """Where a change lies among those of random sets."""

    mean: float  # of the random sets
    low: float  # 2.5th and 97.5th percentile
    high: float
    p: float  # (1 + random sets at least as extreme) / (1 + random sets)


def compare(change: float, at_random: Sequence[float], extreme: str) -> Compared | None:
    """A change beside those of random sets; None where there is no number (no unit is left, say).

    Args:
        extreme: high, low, or both: as far or farther on either side from the mean of all the changes, the
            target's among them, so that under the null each is as likely to be the farthest.
    """
    values = np.asarray(at_random, float)
    if not (np.isfinite(change) and np.isfinite(values).all()):
        return None
    centre = np.append(values, change).mean()
    far = {"high": lambda x: x, "low": lambda x: -x, "both": lambda x: abs(x - centre)}[extreme]
    low, high = np.quantile(values, [0.025, 0.975])
    p = share_reaching(far(values), float(far(change)))
    return Compared(float(values.mean()), float(low), float(high), p)
