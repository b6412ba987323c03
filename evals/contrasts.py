"""Contrasts: which units answer more to one kind of item than to another, and do they lie together?

    python -m evals.contrasts out/topolm --control out/control      # nouns and verbs, concrete and abstract
    python -m evals.contrasts out/topolm --stimuli mine.csv --conditions music speech

A contrast is a Welch t-test of every unit, its first condition minus its second, on activations read out raw
and smoothed; maps are never thresholded for Moran's I. Significant: false discovery rate over all units of
all sheets. Whether a map says something of its contrast is told by the same items with shuffled labels: on a
smooth sheet their t-maps are as smooth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt.analysis import contrast, own_stimuli, plots, stimuli
from topogpt.analysis.activations import of_tokens, token_lists
from topogpt.analysis.contrast import told_apart
from topogpt.analysis.measures import smoothing
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels, need
from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import MapConfig, Subject, protocol_of
from topogpt.drawing import draw_sheets, new_figure
from topogpt.errors import UserError, run_main
from topogpt.terminal import progress


@dataclass(frozen=True, kw_only=True)
class ContrastsConfig(MapConfig):
    """Map contrasts between items: python -m evals.contrasts RUN [--control RUN] [--stimuli CSV]."""

    stimuli: str | None = None  # CSV file with the columns item and condition, instead of the published sets
    item: tuple[str, ...] = ("item",)  # its column, or several to be joined by a space
    condition: tuple[str, ...] = ("condition",)  # the same for the condition, joined by _
    conditions: tuple[str, ...] = ()  # first and second side of its contrast; empty: its two, as they come
    pair: str | None = None  # its column that says which items belong together: labels are shuffled within

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stimuli is None:
            for name in ("item", "condition", "conditions", "pair"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(f"{name} has no effect without --stimuli FILE.csv")
        if len(self.conditions) not in (0, 2) or len(set(self.conditions)) < len(self.conditions):
            raise UserError(f"conditions = {' '.join(self.conditions)} must be two different ones")

    @property
    def variant(self) -> str:
        """contrasts-mine.json for those of mine.csv, which leaves the published ones alone."""
        return Path(self.stimuli).stem if self.stimuli else ""


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
    """TopoLM's five, with its signs; and its pairs without the words that tell them apart."""
    words = stimuli.moseley(folder / "moseley2014.csv")
    pairs = stimuli.hauptman(folder / "elli_hauptman2024.csv")
    content = stimuli.content_words(pairs)

    def has(part: str) -> Callable[[str], bool]:
        return lambda condition: part in condition.split("_")

    return [
        Contrast("moseley_concrete", "concrete nouns - verbs", words, "concrete_noun", "concrete_verb"),
        Contrast("moseley_abstract", "abstract nouns - verbs", words, "abstract_noun", "abstract_verb"),
        Contrast("moseley_abstract-concrete", "abstract - concrete", words, has("abstract"), has("concrete")),
        Contrast("moseley_noun-verb", "nouns - verbs", words, has("noun"), has("verb")),
        Contrast("hauptman_verb-noun", "verb pairs - noun pairs", pairs, "verb", "noun"),
        Contrast("hauptman_content", "content words: verbs - nouns", content, "verb", "noun"),
    ]


def own_contrasts() -> list[Contrast]:
    """Of our own stimuli, none of them a published one."""
    words, texts = own_stimuli.words(), own_stimuli.profiles()
    asked = [("nouns", "verbs", words), ("abstract", "concrete", words)]
    asked += [("sentences", "shuffled words", texts), ("shuffled words", "nonwords", texts)]
    sides = {"nouns": lambda c: c.endswith("noun"), "verbs": lambda c: c.endswith("verb")}
    sides |= {"abstract": lambda c: c.startswith("abstract"), "concrete": lambda c: c.startswith("concrete")}
    sides |= {"sentences": "S", "shuffled words": "W", "nonwords": "N"}
    return [
        Contrast(f"own_{a}-{b}".replace(" ", "_"), f"{a} - {b} (own stimuli)", found, sides[a], sides[b])
        for a, b, found in asked
    ]


def asked_for(cfg: ContrastsConfig) -> list[Contrast]:
    if cfg.stimuli:
        return [contrast_of(cfg)]
    own = own_stimuli.stand_in(cfg.stimuli_dir)
    return own_contrasts() if own else published_contrasts(Path(cfg.stimuli_dir))


def contrast_of(cfg: ContrastsConfig) -> Contrast:
    """The one contrast of a file of the user's."""
    found = stimuli.read(Path(cfg.stimuli), cfg.item, cfg.condition, cfg.pair)
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


def analyse(cfg: ContrastsConfig, subject: Subject) -> Outcome:
    need("scipy")
    asked = asked_for(cfg)
    for c in asked:
        stimuli.check_groups(c.source, c.source.where(c.first), c.source.where(c.second), c.what)
    sources = {c.source.source: c.source for c in asked}
    read = {name: token_lists(cfg, subject, found) for name, found in sources.items()}
    patterns = {
        name: subject.on_grid(of_tokens(subject.model, tokens, cfg.pooling, subject.sheets))
        for name, tokens in read.items()
    }
    results, arrays, summary = {}, {}, {}
    for c in progress(asked, f"{subject.label}: contrasts"):
        name = c.source.source
        sides = [c.source.where(side) for side in (c.first, c.second)]
        items = contrast.items_of(c.source, patterns[name], *sides)
        moran, percent = {}, {}
        for fwhm in cfg.fwhm_mm:
            maps, moran[str(fwhm)] = contrast.mapped(cfg, subject.sheets, items, fwhm)
            percent[str(fwhm)] = 100 * float(maps.significant.mean())
            arrays[f"t.{c.name}.{fwhm}"] = maps.t.astype(np.float32)
            arrays[f"significant.{c.name}.{fwhm}"] = maps.significant.astype(np.uint8)
        apart = told_apart(c.source, [len(tokens) for tokens in read[name]], sides)
        results[c.name] = {
            "what": c.what,
            "source": name,
            "n": apart["n"],
            "apart": apart,
            "significant_percent": percent,
            "moran": moran,
            "again": contrast.again(cfg, items),
            "published": PUBLISHED[c.name]._asdict() if c.name in PUBLISHED and not cfg.stimuli else None,
        }
        summary |= contrast.summary_of(c.what, apart["n"], moran, percent)
    data = {name: found.sha256 for name, found in sources.items()}
    return Outcome(protocol_of(cfg), data, {"contrasts": results}, arrays, summary)


# ---- what is shown -------------------------------------------------------------------------------


def published(contrast: dict[str, Any], who: str, fwhm: str) -> float | None:
    """TopoLM's value of a contrast, for topo or control; None where there is none."""
    return (contrast["published"] or {}).get(f"{who}_{SMOOTHED.get(fwhm)}")


def section(found: Sequence[Result]) -> Section:
    contrasts, n = found[0].results["contrasts"], found[0].content["protocol"]["shuffles"]
    head = [name for r in labels(found) for name in (r, "labels shuffled", "p")]
    title = f"Moran's I of t-maps, mean over sheets, beside {n} shuffles of the item labels"
    tables = [Table(["readout", *head, "white noise", "TopoLM", "its control"], rows_of_moran(found), title)]
    title = "What the contrasts say"
    tables.append(Table(["", *head], rows_of_effects(found), title))
    rows = [contrast.apart_row(c["what"], c["apart"]) for c in contrasts.values()]
    tables.append(Table(contrast.APART_HEAD, rows, "What else tells the items apart"))
    own = found[0].content["analysis"].partition("-")[2]
    return Section(
        f"Contrasts: {own}" if own else "Contrasts",
        [ABOUT, tables[0], ABOUT_EFFECTS, tables[1], ABOUT_ITEMS, tables[2]],
        [line for c in contrasts.values() for line in contrast.warnings_of(c["what"], c["apart"])],
        [] if own else cards(found),
    )


ABOUT = (
    "Which units answer more to one kind of item than to another, and do they lie together? Of every unit "
    "a Welch t-test, the first kind minus the second; then Moran's I of the map of t-values, mean over "
    "sheets. Read it against the same items with shuffled labels (mean \u00b1 standard deviation; p: share"
    " of shuffles that reach the value): where units that lie together fire together, t-maps are smooth "
    "whatever the labels, and only what exceeds the shuffles is about the contrast. White noise smoothed "
    "in the same way is what a sheet without a map reaches. TopoLM and its control: from its released "
    "files (Rathi et al. 2025), without this null; values without smoothing are most likely of a readout "
    "of 1 mm."
)
ABOUT_EFFECTS = (
    "What does carry information. Significant: share of units whose p survives the false discovery rate "
    "over all units of all sheets, expected to be 0 where the labels say nothing. Effect: the tenth of all"
    " units with the largest |t| on a random half of the items, on the other half (Cohen's d, signed as on"
    " the first). Place: correlation of the t-values of all units between the halves. Both raw, beside "
    "shuffled labels."
)
ABOUT_ITEMS = (
    "A contrast is of whatever tells its items apart: their length and their first word, too. The verb and"
    " noun pairs stand here once as published and once without the and to."
)


def rows_of_moran(found: Sequence[Result]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, first in found[0].results["contrasts"].items():
        both = [r.results["contrasts"].get(name) for r in found]
        rows.append([f"{first['what']} ({first['n'][0]} and {first['n'][1]} items)"])
        for fwhm, moran in first["moran"].items():
            row = [smoothing(fwhm)]
            for c in both:
                row += contrast.beside_cells((c or {}).get("moran", {}).get(fwhm, {}).get("labels"))
            rows.append(row + [moran["floor"], *(published(first, who, fwhm) for who in ("topo", "control"))])
    return rows


def rows_of_effects(found: Sequence[Result]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, first in found[0].results["contrasts"].items():
        both = [r.results["contrasts"].get(name) or {} for r in found]
        rows.append([first["what"]])
        for fwhm in first["significant_percent"]:
            row = [f"significant units, {smoothing(fwhm)}"]
            for c in both:
                row += [Number(c.get("significant_percent", {}).get(fwhm), 1, " %"), None, None]
            rows.append(row)
        rows += contrast.rows_of_again([c.get("again") for c in both])
    return rows


def cards(found: Sequence[Result]) -> list[Card]:
    """Moran's I of the first contrast with the widest readout, beside its shuffled labels."""
    name, first = next(iter(found[0].results["contrasts"].items()))
    fwhm = max(first["moran"], key=float)
    there = [r.results["contrasts"][name] for r in found if name in r.results["contrasts"]]
    made = contrast.card([c["moran"][fwhm] for c in there], first["n"], first["significant_percent"][fwhm])
    return [made._replace(what=f"{first['what']}, {smoothing(fwhm)}")] if made else []


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    """Of all contrasts Moran's I; of each the maps, raw and most smoothed."""
    prefix = found[0].content["analysis"]
    yield Drawing(
        f"{prefix}-moran",
        draw_moran_of_contrasts(found),
        "Moran's I of the t-maps of every contrast (dimensionless), by readout: a line is a sheet, a dot the "
        "mean over sheets, an open diamond a published mean. The pale bar below a dot is the same mean under "
        f"shuffled item labels, \u00b1 2 standard deviations: the contrast's own null. {plots.BAND}",
    )
    for name, first in found[0].results["contrasts"].items():
        widths = sorted(first["moran"], key=float)
        groups = []
        for fwhm in dict.fromkeys([widths[0], widths[-1]]):
            for r in found:
                t, outlined = (r.arrays[f"{what}.{name}.{fwhm}"] for what in ("t", "significant"))
                groups.append(plots.maps_of(r, f"{r.label}, {smoothing(fwhm)}", t, outlined > 0))
        title = f"{first['what']}; outlined: significant (FDR over all units)"
        yield Drawing(
            f"{prefix}-{name}-maps",
            draw_sheets(groups, title, "t (Welch)", least=plots.LEAST_T),
            "t-value of every unit for the contrast in the title (Welch, dimensionless; its first kind of "
            "item is positive), raw and with the widest readout. Outlined: significant at the false "
            f"discovery rate over all units of all sheets. {plots.MAPS} {plots.OUTLINED}",
            f"Maps: {first['what']}",
        )


def draw_moran_of_contrasts(found: Sequence[Result]) -> Any:
    """Moran's I of every sheet and contrast, model beside control, with floor and published means."""
    contrasts = found[0].results["contrasts"]
    widths = list(next(iter(contrasts.values()))["moran"])
    figure = new_figure(2.6 * len(widths) + 1.6, 0.45 * len(contrasts) + 1.3)
    axes = figure.subplots(1, len(widths), sharey=True, sharex=True, squeeze=False)[0]
    for axis, fwhm in zip(axes, widths, strict=True):
        for i, (r, colour) in enumerate(zip(found, plots.COLOURS, strict=False)):
            for k, name in enumerate(contrasts):
                one, height = r.results["contrasts"][name], k + 0.2 * (2 * i - len(found) + 1)
                values = [m["value"] for m in one["moran"][fwhm]["by_sheet"].values()]
                null = one["moran"][fwhm]["labels"]
                low, high = (null["mean"] + j * null["sd"] for j in (-2, 2))
                label = f"{r.label}, labels shuffled"
                axis.plot([low, high], [height + 0.14] * 2, color=colour, lw=4, alpha=0.4, label=label)
                axis.plot(values, [height] * len(values), "|", ms=6, color=colour, alpha=0.6)
                axis.plot(np.mean(values), height, "os"[i], ms=4, color=colour, label=r.label)
                value = published(one, ("topo", "control")[i], fwhm)
                if value is not None:
                    label = ("TopoLM, published", "its control, published")[i]
                    axis.plot(value, height, "D", ms=5, mfc="none", color=colour, label=label)
        plots.band(axis.axvspan, next(iter(contrasts.values()))["moran"][fwhm])
        axis.set(title=smoothing(fwhm), xlabel="Moran's I", xlim=(-0.15, 1))
    axes[0].set_yticks(range(len(contrasts)), [c["what"] for c in contrasts.values()])
    axes[0].set_ylim(len(contrasts) - 0.5, -0.5)
    plots.legend(figure, axes)
    figure.suptitle("Moran's I of t-maps; a line: a sheet, the dot: their mean", fontsize=9)
    return figure


ANALYSIS = Analysis(ContrastsConfig, analyse, section, draw, order=20)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
