"""Contrasts of two groups of items: Welch's t of every unit, on maps raw or smoothed, beside its nulls.

What is said of a contrast is said here for every analysis: its numbers, what else tells its items apart, and
whether it may be a headline.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from topogpt.analysis import measures, shuffles
from topogpt.analysis.nulls import moran_of_sheets
from topogpt.analysis.section import Card, Number
from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import MapConfig
from topogpt.errors import UserError

FEW_ITEMS = 20  # fewer on a side: shown with a warning, and no headline
ALPHA = 0.05  # p against shuffled labels that a headline needs
MANY = 0.5  # share of items with the same first word that is worth a warning
LONGER = 1.1  # ratio of token counts that is


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


# ---- beside shuffled labels --------------------------------------------------------------------------------


class Items(NamedTuple):
    """The items of a contrast, those of its first kind before those of its second."""

    patterns: np.ndarray  # (S, n_items, h, w)
    first: np.ndarray  # (n_items,) bool
    pairs: np.ndarray | None  # (n_items,) numbers of the pairs that labels are shuffled within

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        return self.patterns[:, self.first], self.patterns[:, ~self.first]


def items_of(found: Stimuli, patterns: np.ndarray, a: np.ndarray, b: np.ndarray) -> Items:
    """Those of masks a and b (n,) of the stimuli, whose patterns are (S, n, h, w)."""
    places = np.concatenate([np.flatnonzero(a), np.flatnonzero(b)])
    first = np.arange(len(places)) < a.sum()
    pairs = None
    if found.pairs is not None:
        pairs = np.unique([found.pairs[i] for i in places], return_inverse=True)[1]
        if not set(pairs[first]) & set(pairs[~first]):
            raise UserError(
                f"{found.source}: no pair has items of both kinds, so labels cannot be shuffled within; give "
                "items that belong together the same name in the column of pairs"
            )
    return Items(patterns[:, places], first, pairs)


class Mapped(NamedTuple):
    maps: TMaps
    moran: dict[str, Any]  # `moran_of_sheets`, and the same under shuffled labels


def mapped(cfg: MapConfig, sheets: list[str], items: Items, fwhm_mm: float) -> Mapped:
    """t-maps of a contrast, and their Moran's I beside smoothed noise and shuffled labels."""
    smoothed = items._replace(patterns=measures.smooth(items.patterns, fwhm_mm, cfg.unit_distance_mm))
    maps = t_maps(cfg, *smoothed.sides, 0.0)
    moran = moran_of_sheets(cfg, sheets, maps.t, fwhm_mm, of_t=True)
    labels = shuffles.shuffled(items.first, items.pairs, cfg.shuffles, cfg.seed)
    at_random = shuffles.under_shuffles(smoothed.patterns, labels, cfg.contiguity)
    moran["labels"] = shuffles.beside(float(moran["mean"]), at_random.mean(1))
    for (_, sheet), values in zip(moran["by_sheet"].items(), at_random.T, strict=True):
        of_sheet = shuffles.beside(sheet["value"], values)
        sheet |= {"labels_mean": of_sheet["mean"], "p_labels": of_sheet["p"]}
    return Mapped(maps, moran)


def again(cfg: MapConfig, items: Items) -> dict[str, dict[str, float]] | None:
    """What half of the items shows, on the other half (`shuffles.again`)."""
    return shuffles.again(items.patterns, items.first, items.pairs, cfg.shuffles, cfg.seed)


def summary_of(
    what: str, n_items: Sequence[int], moran: dict[str, Any], percent: dict[str, float]
) -> dict[str, Any]:
    """The lines of a contrast on a model card: the widest readout, beside its nulls; none of few items."""
    if min(n_items) < FEW_ITEMS:
        return {}
    fwhm = max(moran, key=float)
    of, said = moran[fwhm]["labels"], f"{what}, {measures.smoothing(fwhm)}"
    nulls = {"item labels shuffled": of["mean"], "p": of["p"], "white noise": moran[fwhm]["floor"]}
    return {
        f"Moran's I of {said}": {"value": of["value"]} | nulls,
        f"significant units of {said} (%; without an effect 0)": percent[fwhm],
    }


def beside_cells(of: dict[str, float] | None) -> list[Number]:
    """Value, mean under shuffled labels and p, for a table."""
    if of is None:
        return [Number(None)] * 3
    return [Number(of["value"]), Number(of["mean"], 3, "", of["sd"]), Number(of["p"])]


AGAIN = {
    "effect_size": "effect on the other half of the items (d)",
    "correlation_of_t": "place: correlation of t between the halves",
}


def rows_of_again(each: Sequence[dict[str, dict[str, float]] | None]) -> list[list[Any]]:
    """Rows of what `again` found in each model."""
    return [
        [said, *(cell for one in each for cell in beside_cells((one or {}).get(key)))]
        for key, said in AGAIN.items()
    ]


def card(morans: Sequence[dict[str, Any]], n_items: Sequence[int], significant_percent: float) -> Card | None:
    """Moran's I of t-maps of the model and its control beside shuffled labels; None of too few items."""
    if min(n_items) < FEW_ITEMS:
        return None
    of, values = morans[0]["labels"], [moran["labels"]["value"] for moran in morans]
    beside = {"labels shuffled": of["mean"], "p": of["p"]}
    if morans[1:]:
        beside["control, shuffled"] = morans[1]["labels"]["mean"]
    return Card(
        "Moran's I of t", "", values, beside | {"white noise": morans[0]["floor"]},
        grey=doubt(significant_percent, of["p"]),
    )  # fmt: skip


def doubt(significant_percent: float, p: float) -> str:
    """Why a contrast is no finding; empty where it is one."""
    if significant_percent == 0:
        return "No unit is significant."
    return f"Shuffled labels reach it (p = {p:.2f}): it says nothing of this contrast." if p > ALPHA else ""


# ---- what else tells the items apart -----------------------------------------------------------------------


def told_apart(found: Stimuli, lengths: Sequence[int], sides: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of both kinds, masks (n_items,): number, mean tokens read, most frequent first word and its share."""
    said: dict[str, Any] = {"n": [], "tokens": [], "first_word": []}
    for side in sides:
        places = np.flatnonzero(side)
        word, n = Counter(found.items[i].split()[0] for i in places).most_common(1)[0]
        said["n"].append(len(places))
        said["tokens"].append(float(np.mean([lengths[i] for i in places])))
        said["first_word"].append([word, n / len(places)])
    return said


def apart_row(what: str, apart: dict[str, Any]) -> list[Any]:
    """A row of the table of APART_HEAD."""
    words = (f"{word} ({share:.0%})" for word, share in apart["first_word"])
    return [what, *(f"{x:,}" for x in apart["n"]), *(Number(x, 1) for x in apart["tokens"]), *words]


APART_HEAD = ["contrast: first - second", "items: first", "second", "tokens: first", "second"]
APART_HEAD += ["most frequent first word: first", "second"]


def warnings_of(what: str, apart: dict[str, Any]) -> list[str]:
    """A line for each thing that makes a contrast say less than its name."""
    found, (a, b), (first, second) = [], apart["tokens"], apart["first_word"]
    if min(apart["n"]) < FEW_ITEMS:
        found.append(
            f"{what}: {apart['n'][0]} and {apart['n'][1]} items; fewer than {FEW_ITEMS} on a side carry no "
            "headline"
        )
    if max(a, b) > LONGER * min(a, b):
        found.append(
            f"{what}: its items have {a:.1f} and {b:.1f} tokens on average, which tells them apart, too"
        )
    if first[0] != second[0] and min(first[1], second[1]) > MANY:
        found.append(
            f"{what}: {first[1]:.0%} of the first begin with {first[0]}, {second[1]:.0%} of the second with "
            f"{second[0]}, which tells them apart, too"
        )
    return found
