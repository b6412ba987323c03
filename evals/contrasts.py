"""Contrasts: which units answer more to one kind of item than to another, and do they lie together?

    python -m evals.contrasts out/topolm --control out/control      # nouns and verbs, concrete and abstract
    python -m evals.contrasts out/topolm --stimuli mine.csv --conditions music speech

A contrast is a Welch t-test of every unit, its first condition minus its second, on activations read out raw
and smoothed; maps are never thresholded for Moran's I. Significant: false discovery rate over all units of
all sheets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals import activations
from evals.common import Analysis, MapConfig, Subject, moran_of_sheets, need, protocol_of, run_analyses
from topogpt.analysis import measures, stimuli
from topogpt.analysis.stimuli import Stimuli
from topogpt.errors import UserError, run_main
from topogpt.terminal import print_table, say


@dataclass(frozen=True, kw_only=True)
class ContrastsConfig(MapConfig):
    """Map contrasts between items: python -m evals.contrasts RUN [--control RUN] [--stimuli CSV]."""

    stimuli: str | None = None  # CSV file with the columns item and condition, instead of the published sets
    item: tuple[str, ...] = ("item",)  # its column, or several to be joined by a space
    condition: tuple[str, ...] = ("condition",)  # the same for the condition, joined by _
    conditions: tuple[str, ...] = ()  # first and second side of its contrast; empty: its two, as they come

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stimuli is None:
            for name, default in (("item", ("item",)), ("condition", ("condition",)), ("conditions", ())):
                if getattr(self, name) != default:
                    raise UserError(f"{name} has no effect without --stimuli FILE.csv")
        if len(self.conditions) not in (0, 2) or len(set(self.conditions)) < len(self.conditions):
            raise UserError(f"conditions = {' '.join(self.conditions)} must be two different ones")

    @property
    def result_name(self) -> str:
        """contrasts; contrasts-mine for those of mine.csv, which leave the published ones alone."""
        return f"contrasts-{Path(self.stimuli).stem}" if self.stimuli else "contrasts"


class Contrast(NamedTuple):
    name: str
    what: str  # first side - second side
    source: Stimuli
    first: str | Callable[[str], bool]
    second: str | Callable[[str], bool]


class Published(NamedTuple):
    """Mean Moran's I over 24 sheets in TopoLM's released files; its "unsmoothed" is most likely FWHM 1 mm."""

    topo_unsmoothed: float
    topo_smoothed: float
    control_unsmoothed: float
    control_smoothed: float


# Rathi et al. 2025, eval/moran/*.csv of the released code; the paper rounds them.
PUBLISHED = {
    "moseley_concrete": Published(0.8039, 0.8940, 0.1111, 0.6004),
    "moseley_abstract": Published(0.2538, 0.7039, 0.1196, 0.6020),
    "moseley_abstract-concrete": Published(0.7977, 0.8999, 0.1214, 0.5973),
    "moseley_noun-verb": Published(0.7834, 0.8943, 0.1156, 0.6032),
    "hauptman_verb-noun": Published(0.4815, 0.8149, 0.1146, 0.6043),
}
SMOOTHED = {"1.0": "unsmoothed", "2.0": "smoothed"}  # FWHM in mm -> TopoLM's word for it


def published_contrasts(folder: Path) -> list[Contrast]:
    """TopoLM's five, with its signs."""
    words = stimuli.moseley(folder / "moseley2014.csv")
    pairs = stimuli.hauptman(folder / "elli_hauptman2024.csv")

    def has(part: str) -> Callable[[str], bool]:
        return lambda condition: part in condition.split("_")

    return [
        Contrast("moseley_concrete", "concrete nouns - verbs", words, "concrete_noun", "concrete_verb"),
        Contrast("moseley_abstract", "abstract nouns - verbs", words, "abstract_noun", "abstract_verb"),
        Contrast("moseley_abstract-concrete", "abstract - concrete", words, has("abstract"), has("concrete")),
        Contrast("moseley_noun-verb", "nouns - verbs", words, has("noun"), has("verb")),
        Contrast("hauptman_verb-noun", "verb pairs - noun pairs", pairs, "verb", "noun"),
    ]


def contrast_of(cfg: ContrastsConfig) -> Contrast:
    """The one contrast of a file of the user's."""
    found = stimuli.read(Path(cfg.stimuli), cfg.item, cfg.condition)
    there = list(dict.fromkeys(found.conditions))
    sides = list(cfg.conditions) or there
    if len(sides) != 2:
        raise UserError(
            f"{cfg.stimuli} has {len(there)} condition(s) ({stimuli.counted(found)}), but a contrast is of "
            "two; " + ("name them: --conditions A B" if len(there) > 2 else "add items of another condition")
        )
    for side in sides:
        if side not in there:
            raise UserError(f"conditions: {cfg.stimuli} has no {side}; it has {stimuli.counted(found)}")
    return Contrast("_".join(sides), " - ".join(sides), found, *sides)


def analyse(cfg: ContrastsConfig, subject: Subject) -> Analysis:
    need("scipy")
    asked = [contrast_of(cfg)] if cfg.stimuli else published_contrasts(Path(cfg.stimuli_dir))
    for c in asked:
        stimuli.check_groups(c.source, c.source.where(c.first), c.source.where(c.second), c.what)
    patterns = {
        source: subject.on_grid(activations.of_stimuli(cfg, subject, found))
        for source, found in {c.source.source: c.source for c in asked}.items()
    }
    results, arrays = {}, {}
    for c in asked:
        a, b = (patterns[c.source.source][:, c.source.where(side)] for side in (c.first, c.second))
        moran, percent = {}, {}
        for fwhm in cfg.fwhm_mm:
            found = t_maps(cfg, a, b, fwhm)
            moran[str(fwhm)] = moran_of_sheets(cfg, subject, found.t, fwhm)
            percent[str(fwhm)] = 100 * float(found.significant.mean())
            arrays[f"t.{c.name}.{fwhm}"] = found.t.astype(np.float32)
            arrays[f"significant.{c.name}.{fwhm}"] = found.significant.astype(np.uint8)
        results[c.name] = {
            "what": c.what,
            "source": c.source.source,
            "n": [a.shape[1], b.shape[1]],
            "significant_percent": percent,
            "moran": moran,
            "published": PUBLISHED[c.name]._asdict() if c.name in PUBLISHED and not cfg.stimuli else None,
        }
    data = {c.source.source: c.source.sha256 for c in asked}
    summary = {
        f"Moran's I of {found['what']}, FWHM {float(fwhm):g} mm": moran["mean"]
        for found in results.values()
        for fwhm, moran in found["moran"].items()
    }
    return Analysis(protocol_of(cfg), data, {"contrasts": results}, arrays, summary)


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


def table(contents: list[dict[str, Any]]) -> None:
    labels = [c["model"]["label"] for c in contents]
    rows = []
    for name, first in contents[0]["results"]["contrasts"].items():
        both = [c["results"]["contrasts"][name] for c in contents]
        for fwhm, moran in first["moran"].items():
            kind = SMOOTHED.get(fwhm)
            published = first["published"] and kind
            rows.append(
                [
                    first["what"] if fwhm == next(iter(first["moran"])) else "",
                    f"{float(fwhm):g}",
                    *(c["moran"][fwhm]["mean"] for c in both),
                    moran["floor"],
                    first["published"][f"topo_{kind}"] if published else None,
                    first["published"][f"control_{kind}"] if published else None,
                    *(f"{c['significant_percent'][fwhm]:.1f}" for c in both),
                ]
            )
    say("Moran's I of t-maps, mean over sheets, and share of significant units:")
    head = ["contrast", "FWHM mm", *labels, "floor", "TopoLM", "its control"]
    print_table([*head, *(f"% of {label}" for label in labels)], rows)


def main(argv: list[str]) -> None:
    run_analyses("contrasts", ContrastsConfig, argv, analyse, table)


if __name__ == "__main__":
    run_main(main)
