"""An experiment on units: what a lesion or a stimulation changes, beside the same done to random sets."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from topogpt.analysis import measures, pairs
from topogpt.analysis.activations import of_tokens
from topogpt.analysis.lesions import cross_entropy, lesioned, stimulated
from topogpt.analysis.sets import Sets, compare
from topogpt.analysis.subject import Subject
from topogpt.terminal import duration, progress, say


class Measure(NamedTuple):
    title: str
    unit: str
    extreme: Literal["high", "low", "both"]  # which changes count as extreme
    digits: int = 3


MEASURES = {
    "loss": Measure("Loss on held-out text", "nats per token", "high"),
    "contrast": Measure("Contrast in the other units", "mean |t|", "both"),
    "accuracy": Measure("Minimal pairs", "% right, chance 50", "low", 1),
}


class Seen(NamedTuple):
    """The numbers of a model as it is at a time."""

    loss: float
    t: np.ndarray  # (S, n_units), of the contrast
    right: np.ndarray  # (n_pairs,) bool


class Bench(NamedTuple):
    """What every set of units is measured on."""

    subject: Subject
    rows: list[np.ndarray]  # of the held-out text
    first: list[np.ndarray]  # tokens of the items of each condition of the contrast
    second: list[np.ndarray]
    pooling: Literal["mean", "last"]
    pairs: list[np.ndarray] | None  # tokens of good sentences, then of bad ones
    phenomena: np.ndarray  # (n_pairs,) str
    fill: np.ndarray  # (S, n_units): what a lesioned unit shows
    added: np.ndarray  # (S, n_units): what a stimulated unit shows more

    def measure(self) -> Seen:
        """The numbers of the model as it is now."""
        model = self.subject.model
        right = np.zeros(0, bool)
        if self.pairs is not None:
            right = pairs.right(pairs.log_probabilities(model, self.pairs))
        t = contrast(self.subject, self.first, self.second, self.pooling).t
        return Seen(cross_entropy(model, self.rows), t, right)

    def under(self, do: str, units: np.ndarray) -> Seen:
        """The numbers with units, (S, n_units) bool, lesioned or stimulated."""
        change, values = (lesioned, self.fill) if do == "lesion" else (stimulated, self.added)
        with change(self.subject.model, self.subject.sheets, units, values):
            return self.measure()

    def by_phenomenon(self, right: np.ndarray) -> dict[str, float]:
        """Percentage of right pairs, of shares (n_pairs,)."""
        names = sorted(set(self.phenomena.tolist()))
        return {name: 100 * float(right[self.phenomena == name].mean()) for name in names}


def contrast(
    subject: Subject, first: list[np.ndarray], second: list[np.ndarray], pooling: Literal["mean", "last"]
) -> measures.TTest:
    """Of every unit of the model as it is now, first - second items, each (S, n_units)."""
    patterns = of_tokens(subject.model, first + second, pooling, subject.sheets)
    x = np.stack([patterns[sheet] for sheet in subject.sheets], axis=1)  # (n_items, S, n_units)
    return measures.welch(x[: len(first)], x[len(first) :])


def changes(intact: Seen, seen: Seen, left: np.ndarray) -> dict[str, float]:
    """What an intervention changed; the contrast in the units that are left, (S, n_units) bool."""
    before, after = (np.abs(x.t[left]).mean() if left.any() else np.nan for x in (intact, seen))
    found = {"loss": seen.loss - intact.loss, "contrast": float(after - before)}
    if len(seen.right):
        found["accuracy"] = 100 * float(seen.right.mean() - intact.right.mean())
    return found


def experiment(
    bench: Bench, all_sets: Sequence[Sets], do: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure every target and its random sets on the same tokens: the intact model, and the effects."""
    start = time.perf_counter()
    intact = bench.measure()
    each = time.perf_counter() - start
    n = sum(1 + len(sets.units) + len(sets.shape) for sets in all_sets) * len(do)
    say(f"{n} interventions, {each:.2f} s each: about {duration(n * each)}")
    effects: list[dict[str, Any]] = []
    counter = iter(progress(range(n), "interventions"))
    for sets in all_sets:
        for what in do:
            effects.append(effect_of(bench, intact, sets, what, counter))
    adjust(effects)
    said: dict[str, Any] = {"loss": intact.loss, "contrast": float(np.abs(intact.t).mean())}
    if len(intact.right):
        said["accuracy"] = 100 * float(intact.right.mean())
        said["phenomena"] = bench.by_phenomenon(intact.right)
    return said, effects


def effect_of(bench: Bench, intact: Seen, sets: Sets, do: str, counter: Iterator[int]) -> dict[str, Any]:
    """What one intervention on a target changed, beside its random sets."""
    target = sets.target.units

    def done_to(units: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        next(counter)
        seen = bench.under(do, units)
        return changes(intact, seen, ~(units | target)), seen.right

    change, right = done_to(target)
    at_random = {"units": [done_to(units) for units in sets.units]}
    at_random["shape"] = [done_to(units) for units in sets.shape]
    counts = zip(bench.subject.sheets, target.sum(1), strict=True)
    found: dict[str, Any] = {"target": sets.target.name, "do": do, "k": int(target.sum())}
    found |= {"by_sheet": {sheet: int(n) for sheet, n in counts if n}, "n_places": sets.n_places}
    found["measures"] = {name: {"change": value} for name, value in change.items()}
    for name, measured in found["measures"].items():
        for kind, draws in at_random.items():
            values = [draw[name] for draw, _ in draws]
            compared = compare(change[name], values, MEASURES[name].extreme) if values else None
            measured[kind] = compared and compared._asdict()
    if len(right):
        found["phenomena"] = bench.by_phenomenon(right)
        found["phenomena_random"] = bench.by_phenomenon(np.mean([r for _, r in at_random["units"]], axis=0))
    return found


def adjust(effects: Iterable[dict[str, Any]]) -> None:
    """Add p_adjusted (Benjamini-Hochberg) over all effects and measures, of each kind of random set."""
    for kind in ("units", "shape"):
        tests = [m[kind] for effect in effects for m in effect["measures"].values() if m[kind]]
        if tests:
            for test, p in zip(tests, measures.fdr(np.array([test["p"] for test in tests])), strict=True):
                test["p_adjusted"] = float(p)
