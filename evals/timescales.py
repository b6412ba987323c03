"""Timescales: over how many words does a unit integrate? One word is swapped, and the units are watched.

    python -m evals.timescales out/topolm --control out/control
    python -m evals.timescales out/topolm --substitutes fills.csv --n_sequences 100

The procedure of Skrill & Norman-Haignere (NeurIPS 2023), which TopoNets maps: D[k, t] is the mean over
sequences of |activation at word t - the same with word k swapped|, a word's activation the mean over its
tokens; theta(delta) = D[t - delta, t] / D[t, t], the median over t; and theta is fitted by
c (delta + 1)^-a + (1 - c) e^(-b delta): a power law (long windows) mixed with an exponential (short ones).
Their division of D by the median of its diagonal cancels in theta, so it is left out. Every swapped sequence
is read from its first word up to the last lag, as a model's cache of keys goes on by single tokens only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from topogpt import drawing
from topogpt.analysis import decay, plots, swaps
from topogpt.analysis.kinds import by_kind
from topogpt.analysis.measures import smooth, smoothing
from topogpt.analysis.nulls import moran_of_sheets
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels, need
from topogpt.analysis.subject import MoranConfig, Subject, protocol_of
from topogpt.analysis.swaps import Differences, Swappable, differences
from topogpt.analysis.untrained import untrained
from topogpt.errors import UserError, check_at_least, run_main

LITTLE = 0.5  # variance of theta: where the fit explains less, its parameters mean little
FIRST = 2  # word that is swapped first: the original keeps times t with all t - delta > 1


@dataclass(frozen=True, kw_only=True)
class TimescalesConfig(MoranConfig):
    """Measure over how many words units integrate: python -m evals.timescales RUN [--control RUN]."""

    text: str | None = None  # held-out text: a .txt file or shards; None: the run's validation shards
    n_sequences: int = 24  # of words in lower case without punctuation, each within a document
    n_words: int = 50  # of a sequence (the paper: 600)
    lags: int = 20  # largest distance in words between the swapped word and the one looked at
    substitutes: str = "own"  # own: of the model's likeliest next words; or a CSV with word,substitute
    top_k: int = 5  # of these many likeliest words one is drawn (the paper: of a masked model's 5)
    untrained: bool = True  # measure a model of the same shape before training, too

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("n_sequences", "top_k"):
            check_at_least(key, getattr(self, key), 1)
        check_at_least("lags", self.lags, 3)  # as many points as the curve has parameters, and one more
        if self.n_words < self.lags + FIRST + 1:
            raise UserError(
                f"n_words = {self.n_words} must be at least lags + {FIRST + 1} = {self.lags + FIRST + 1}"
            )


# ---- what is measured ----------------------------------------------------------------------------


class Windows(NamedTuple):
    theta: np.ndarray  # (S, n_units, lags + 1)
    times: np.ndarray  # words t that it is the median over
    silent: np.ndarray  # (S, n_units): answer to no swap at some t, and count as if they forgot at once


def windows(lagged: np.ndarray, n_swaps: np.ndarray) -> Windows:
    """theta of sums (S, n_words, lags + 1, n_units): D[t - delta, t] / D[t, t], the median over t."""
    n_words, n_lags = lagged.shape[1:3]
    back = np.arange(n_lags)
    times = np.array([t for t in range(FIRST + n_lags - 1, n_words) if (n_swaps[t - back] > 0).all()], int)
    if not len(times):
        raise UserError(
            f"substitutes: no {n_lags} words in a row were all swapped in some sequence; give substitutes of "
            "more words, more --n_sequences, or fewer --lags"
        )
    at = times[:, None] - back  # (n_times, n_lags): which word was swapped
    d = lagged[:, at, back] / n_swaps[at][:, :, None]  # (S, n_times, n_lags, n_units)
    silent = (d[:, :, 0] == 0).any(1)
    theta = np.median(d / np.where(d[:, :, :1] == 0, 1, d[:, :, :1]), axis=1).swapaxes(1, 2)
    theta[silent] = np.eye(1, n_lags)
    return Windows(theta, times, silent)


MEASURES = {
    "window": (
        "window (words)",
        "Sum of theta over all lags: 1 for a unit that knows the last word alone; no fit.",
    ),
    "c": (
        "c: power law",
        "Share of the power law: 0 all exponential, 1 all power law; either where theta stays flat.",
    ),
    "a": ("a: its exponent", "The smaller, the longer the window; it says nothing where c is near 0."),
    "b": (
        "b: rate per word",
        "Of the exponential: the smaller, the longer; it says nothing where c is near 1.",
    ),
}


def measures_of(found: Windows) -> dict[str, np.ndarray]:
    """Every measure of every unit, (S, n_units), and how much of its curve the fit explains."""
    theta = found.theta.reshape(-1, found.theta.shape[-1])
    fit = decay.fit(theta)
    spread = theta.var(1) * theta.shape[1]
    explained = np.where(spread > 1e-12, 1 - fit.error / np.maximum(spread, 1e-12), 1.0)
    values = {"window": theta.sum(1), "c": fit.c, "a": fit.a, "b": fit.b, "explained": explained}
    return {key: x.reshape(found.silent.shape) for key, x in values.items()}


def analyse(cfg: TimescalesConfig, subject: Subject) -> Outcome:
    need("scipy")
    found = swaps.read(subject, cfg.text, cfg.n_sequences, cfg.n_words, cfg.vocab_dir)
    data = {found.source: found.sha256}
    if cfg.substitutes == "own":
        made = swaps.of_model(subject.model, found, FIRST, cfg.top_k, cfg.vocab_dir, cfg.seed)
    else:
        made, digest = swaps.from_file(cfg.substitutes, found, FIRST, cfg.vocab_dir, cfg.seed)
        data[cfg.substitutes] = digest
    seen = differences(subject, made, cfg.lags)
    curves = windows(seen.lagged.sum(0), seen.n_swaps.sum(0))
    measured = measures_of(curves)
    on_sheets = {key: subject.on_grid(measured[key]) for key in MEASURES}
    diagonal = seen.lagged[:, :, :, 0].sum() / seen.n_swaps.sum() / seen.lagged[0, :, 0, 0].size
    results: dict[str, Any] = {
        "text": found.source,
        "n_sequences": len(made),
        "n_swaps": int(seen.n_swaps.sum()),
        "times": [int(curves.times[0]), int(curves.times[-1])],
        "examples": examples(found, made, cfg.vocab_dir),
        "before": seen.before / float(diagonal) if diagonal > 0 else None,
        "reliability": reliability(seen),
        "model": medians(subject.sheets, curves, measured),
        "untrained": None,
        "moran": {
            key: {
                str(fwhm): moran_of_sheets(
                    cfg, subject.sheets, smooth(maps, fwhm, cfg.unit_distance_mm), fwhm
                )
                for fwhm in cfg.fwhm_mm
            }
            for key, maps in on_sheets.items()
        },
    }
    if cfg.untrained:
        fresh = differences(untrained(subject, cfg.seed), made, cfg.lags)
        curves = windows(fresh.lagged.sum(0), fresh.n_swaps.sum(0))
        results["untrained"] = medians(subject.sheets, curves, measures_of(curves))
    summary = {}
    for kind, values in results["model"]["kinds"].items():
        for key in ("window", "c"):
            summary[f"{MEASURES[key][0]}, {kind}"] = values[key]
            if cfg.untrained:
                fresh_value = results["untrained"]["kinds"][kind][key]
                summary[f"{MEASURES[key][0]}, {kind}, untrained"] = fresh_value
    for key in ("window", "c"):
        moran = next(iter(results["moran"][key].values()))
        summary |= {f"Moran's I of {key}": moran["mean"], f"its floor, {key}": moran["floor"]}
    arrays = {key: maps.astype(np.float32) for key, maps in on_sheets.items()}
    return Outcome(protocol_of(cfg) | PROTOCOL, data, results, arrays, summary)


PROTOCOL = {
    "words": "runs of letters in lower case, each after a blank, n_words in a row of a document, after EOT",
    "own_substitutes": "one of the model's own top_k next words in the left context alone, never the word "
    "itself, with as many tokens, so that no later token changes its position; the paper draws from a masked "
    "model, which sees both sides",
    "theta": "D[t - delta, t] / D[t, t], median over all t with t - delta > 1 (words counted from 0)",
    "fit": "c (delta + 1)^-a + (1 - c) exp(-b delta), least squares, a and b in [0, 10], c in [0, 1], "
    "from (1, 1, 0.5)",
    "untrained_model": "same shape at random initialisation, same sequences and swaps",
    "reliability": "correlation over units of windows from even and from odd sequences, mean over sheets",
}


def medians(sheets: Sequence[str], found: Windows, measured: dict[str, np.ndarray]) -> dict[str, Any]:
    """Over units: of each kind of sheet, and of each sheet."""

    def of(names: Sequence[str]) -> dict[str, Any]:
        at = [sheets.index(name) for name in names]
        values: dict[str, Any] = {k: np.median(measured[k][at]) for k in (*MEASURES, "explained")}
        silent = int(found.silent[at].sum())
        return values | {"theta": np.median(found.theta[at], axis=(0, 1)), "silent": silent}

    return {
        "kinds": {kind: of(names) for kind, names in by_kind(sheets).items()},
        "by_sheet": {sheet: of([sheet]) for sheet in sheets},
    }


def reliability(seen: Differences) -> float | None:
    """Whether a unit's window is its own: correlation of two halves of the sequences, mean over sheets."""
    if not (seen.n_swaps > 0)[:, FIRST:].all():
        return None
    first, second = (windows(d, n).theta.sum(-1) for d, n in zip(seen.lagged, seen.n_swaps, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = [np.corrcoef(x, y)[0, 1] for x, y in zip(first, second, strict=True)]
    return float(np.mean(found))


def examples(found: swaps.Sequences, made: Sequence[Swappable], vocab_dir: str | None) -> list[list[str]]:
    """The first swaps: word and substitute."""
    from topogpt.text import tokenizer

    encoding = tokenizer.load(vocab_dir)
    first = list(made[0].substitutes.items())[:10]
    return [[found.words[0][k], encoding.decode(tokens).strip()] for k, tokens in first]


# ---- what is shown -------------------------------------------------------------------------------


ABOUT = (
    "Over how many words does a unit integrate? One word of a sequence is swapped for a probable other, and "
    "the change of every unit is followed over the next words: theta is its size at each distance, over "
    "that at the swapped word. A power law fades slowly (a long window), an exponential fast. A model of the "
    "same shape before training shows what attention that looks everywhere alike does by itself."
)
PUBLISHED = (
    "For GPT-2 small on sequences of 600 words Skrill & Norman-Haignere (2023) report medians of c "
    "from 0.108 (layer 1) to 0.274 (layer 11), and of a from 1.02 (layer 3) to 0.51 (layer 12)."
)
MAPPED = (
    "Do units of like windows lie together? Read Moran's I against the floor of white noise smoothed in the "
    "same way; units that fire together share their windows, too, so a map of activations is enough to make "
    "one of windows. A map of noise has no order: the reliability says how much of a unit's window two "
    "halves of the sequences agree on (correlation over units)."
)


def section(found: Sequence[Result]) -> Section:
    first = found[0].results
    rows: list[list[Any]] = []
    for kind in first["model"]["kinds"]:
        rows.append([kind])
        for key, (name, _) in MEASURES.items():
            rows.append([name, *(of(r, who, kind, key) for who in ("model", "untrained") for r in found)])
    said = ["", *(what for _, what in MEASURES.values())] * len(first["model"]["kinds"])
    head = ["median over units", *labels(found), *labels(found, ": untrained")]
    where = f"{first['n_swaps']:,} swaps in {first['n_sequences']} sequences of {first['text']}"
    maps = [
        [f"{key}, {smoothing(fwhm)}", *(r.results["moran"][key][fwhm]["mean"] for r in found), moran["floor"]]
        for key in MEASURES
        for fwhm, moran in first["moran"][key].items()
    ]
    maps.append(["reliability of windows", *(Number(r.results["reliability"]) for r in found), None])
    fits = [
        [f"{r.label}, {kind}", Number(values["explained"]), values["silent"]]
        for r in found
        for kind, values in r.results["model"]["kinds"].items()
    ]
    return Section(
        "Timescales",
        [
            ABOUT,
            PUBLISHED,
            Table(head, rows, where, said),
            MAPPED,
            Table(["Moran's I, mean over sheets", *labels(found), "floor: no map"], maps),
            Table(["fit", "explained variance (median)", "units that answer to no swap"], fits, folded=True),
            by_sheet(found),
        ],
        warnings(found),
        cards(found),
    )


def warnings(found: Sequence[Result]) -> list[str]:
    said = [
        f"{r.label}: words before a swapped one change by up to {r.results['before']:.2g} of the usual "
        "change at it; a causal model's do not."
        for r in found
        if (r.results["before"] or 0) > 1e-2
    ]
    return said + [
        f"{r.label}, {kind}: the fitted curve explains {max(values['explained'], 0):.0%} of theta's variance "
        "(median over units); read the window there, not c, a and b."
        for r in found
        for kind, values in r.results["model"]["kinds"].items()
        if values["explained"] < LITTLE
    ]


def of(result: Result, who: str, kind: str, key: str) -> Number:
    values = result.results[who]
    return Number(values["kinds"].get(kind, {}).get(key) if values else None)


def by_sheet(found: Sequence[Result]) -> Table:
    head, rows = ["sheet"], [[sheet] for sheet in found[0].sheets]
    for key in MEASURES:
        for who, about in (("model", ""), ("untrained", ", untrained")):
            for label, result in zip(labels(found, f": {key}{about}"), found, strict=True):
                if result.results[who]:
                    head.append(label)
                    values = result.results[who]["by_sheet"]
                    for row in rows:
                        row.append(Number(values.get(row[0], {}).get(key)))
    return Table(head, rows, "Every sheet, median over units", folded=True)


def cards(found: Sequence[Result]) -> list[Card]:
    """The last kind of sheet: attention looks back by itself, the MLP only at what attention brought."""
    kind, fresh = list(found[0].results["model"]["kinds"])[-1], found[0].results["untrained"]
    values = [r.results["model"]["kinds"].get(kind, {}).get("window") for r in found]
    beside = {"the word alone": 1.0} | ({"untrained": fresh["kinds"][kind]["window"]} if fresh else {})
    return [Card("Integration window", f"{kind}, median over units", values, beside, 2, " words")]


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    yield Drawing(
        "timescales-windows",
        draw_windows(found),
        "Size of a unit's change, over that at the swapped word, against the distance from it in words, "
        "median over units (thin lines are sheets). Last: the sum of the curve, the window in words, of each "
        "sheet, median over units. Dashed: a model of the same shape before training; 1: no context.",
    )
    for key in ("window", "c", "a", "b"):
        name, how = MEASURES[key]
        shown = [plots.maps_of(r, r.label, drawing.standardised(r.arrays[key])) for r in found]
        unit = f"{key} (sd of its sheet)"
        yield Drawing(
            f"timescales-{key}",
            drawing.draw_sheets(shown, f"Integration windows, {name}", unit, drawing.LIMIT),
            f"{name} of every unit, in standard deviations of its sheet about its mean, cut at \u00b1 2.5. "
            f"{how} {plots.MAPS}",
            f"Maps: {name}",
        )


def draw_windows(found: Sequence[Result]) -> Any:
    kinds, fresh = list(found[0].results["model"]["kinds"]), found[0].results["untrained"]
    figure = drawing.new_figure(2.4 * len(kinds) + 4.2, 2.7)
    *curves, last = figure.subplots(1, len(kinds) + 1)
    for axis, kind in zip(curves, kinds, strict=True):
        for r, colour in zip(found, plots.COLOURS, strict=False):
            model = r.results["model"]
            for name in by_kind(r.sheets).get(kind, []):
                axis.plot(model["by_sheet"][name]["theta"], color=colour, lw=0.5, alpha=0.3)
            if kind in model["kinds"]:
                axis.plot(model["kinds"][kind]["theta"], color=colour, lw=2, label=r.label)
        if fresh:
            axis.plot(fresh["kinds"][kind]["theta"], "--", color=plots.FLOOR, lw=1.5, label="untrained")
        axis.set(title=kind, xlabel="words since the swapped one")
        axis.set_ylim(bottom=0)
    curves[0].set_ylabel("change, over that at the swapped word")
    for r, colour, marker in zip(found, plots.COLOURS, "os", strict=False):
        values = [sheet["window"] for sheet in r.results["model"]["by_sheet"].values()]
        last.plot(values, marker, ms=3.5, color=colour, label=r.label)
    if fresh:
        values = [sheet["window"] for sheet in fresh["by_sheet"].values()]
        last.plot(values, "_", ms=8, color=plots.FLOOR, label="untrained")
    last.axhline(1, color=plots.FLOOR, lw=0.8)
    plots.sheet_axis(last, found[0].sheets)
    last.set(ylabel="window (words)")
    plots.legend(figure, [*curves, last])
    return figure


ANALYSIS = Analysis(TimescalesConfig, analyse, section, draw, order=45, costly=True)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
