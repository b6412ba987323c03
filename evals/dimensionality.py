"""Dimensionality: how many dimensions the activations of a layer use, on held-out text.

    python -m evals.dimensionality out/topolm --control out/control
    python -m evals.dimensionality out/topolm --names "layer.3.*" "transformer.h.*.ln_2"

Effective dimensionality is (sum l)^2 / sum l^2 over the eigenvalues l of the units' covariance C: n for n
independent units of equal variance, 1 where all follow one (topogpt/analysis/dimensions.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topogpt.analysis import dimensions, heldout, plots
from topogpt.analysis.dimensions import Dimensionality
from topogpt.analysis.kinds import by_kind
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Card, Drawing, Number, Section, Table, labels
from topogpt.analysis.subject import EvalConfig, Subject, protocol_of
from topogpt.analysis.untrained import untrained
from topogpt.drawing import new_figure
from topogpt.errors import UserError, check_at_least, run_main


@dataclass(frozen=True, kw_only=True)
class DimensionalityConfig(EvalConfig):
    """Count the dimensions that activations use: python -m evals.dimensionality RUN [--control RUN]."""

    names: tuple[str, ...] = ("layer.*",)  # of activations and modules; * stands for anything
    text: str | None = None  # held-out text: a .txt file or shards; None: the run's validation shards
    n_tokens: int = 8192  # of the text
    skip: int = 1  # first tokens of every window that do not count: they have no context to look at
    untrained: bool = True  # measure a model of the same shape before training, too
    seed: int = 0  # of that model

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("n_tokens", self.n_tokens, 3)
        check_at_least("skip", self.skip, 0)
        if not self.names:
            raise UserError("names is empty; give names of sheets or modules, such as layer.*.mlp")


# ---- what is measured ----------------------------------------------------------------------------


def measure(cfg: DimensionalityConfig, subject: Subject, windows: np.ndarray) -> dict[str, Dimensionality]:
    """Of every named sheet and module, in one pass over the text."""
    return dimensions.measure(subject, windows, cfg.names, cfg.skip)


def analyse(cfg: DimensionalityConfig, subject: Subject) -> Outcome:
    text = heldout.read(subject, cfg.text, cfg.n_tokens, cfg.vocab_dir)
    n_windows, length = text.tokens.shape
    n_tokens = n_windows * (length - cfg.skip)
    if length <= cfg.skip or n_tokens < 3:
        raise UserError(f"skip = {cfg.skip} leaves too little of windows of {length} tokens; give less")
    found = measure(cfg, subject, text.tokens)
    fresh = measure(cfg, untrained(subject, cfg.seed), text.tokens) if cfg.untrained else {}
    by_name = {
        name: d._asdict() | {"untrained": fresh[name].value if fresh else None} for name, d in found.items()
    }
    results: dict[str, Any] = {
        "text": text.source,
        "n_tokens": n_tokens,
        "by_name": by_name,
        "kinds": {
            kind: {"names": names, "n_units": by_name[names[0]]["n_units"]}
            | {key: mean([by_name[name][key] for name in names]) for key in ("value", *NULLS)}
            for kind, names in by_kind(by_name).items()
        },
    }
    summary = {}
    for kind, d in results["kinds"].items():
        summary[f"effective dimensionality, {kind}"] = d["value"]
        summary |= {f"{said}, {kind}": d[key] for key, said in NULLS.items() if d[key] is not None}
    return Outcome(protocol_of(cfg) | PROTOCOL, {text.source: text.sha256}, results, {}, summary)


NULLS = {"shuffled": "units shuffled", "untrained": "untrained"}
PROTOCOL = {
    "dimensionality": "trace(C)^2 / trace(C^2) of the covariance C of units over tokens",
    "shuffled": "expected with each unit shuffled over tokens by itself: same variances, no covariance",
    "untrained_model": "same shape at random initialisation, same text",
}


def mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


# ---- what is shown -------------------------------------------------------------------------------


ABOUT = (
    "How many dimensions do the activations of a layer use? Effective dimensionality is (sum l)\u00b2 / sum "
    "l\u00b2 over the eigenvalues l of the covariance between units: the number of units where they are "
    "independent and vary alike, 1 where all follow one. Read it against two nulls: every unit shuffled over "
    "the tokens by itself, the most that these variances and this many tokens allow, and a model of the same "
    "shape before training."
)
PUBLISHED = (
    "TopoNets (Deb et al. 2025) report that topography lowers it: 41.6 without their loss, 25.5, 19.6 and 11 "
    "with weights of 0.5, 1 and 50 (read off a figure; which layer and which text is not said)."
)


def section(found: Sequence[Result]) -> Section:
    first = found[0].results
    head = ["mean over layers", "units", *labels(found), *labels(found, ": units shuffled")]
    head += labels(found, ": untrained")
    rows = [
        [kind, d["n_units"], *(cell(r, "kinds", kind, k) for k in ("value", *NULLS) for r in found)]
        for kind, d in first["kinds"].items()
    ]
    each = [
        [name, d["n_units"], *(cell(r, "by_name", name, k) for k in ("value", *NULLS) for r in found)]
        for name, d in first["by_name"].items()
    ]
    where = f"Effective dimensionality on {first['n_tokens']:,} tokens of {first['text']}"
    return Section(
        "Dimensionality",
        [
            ABOUT,
            PUBLISHED,
            Table(head, rows, where),
            Table(["layer", *head[1:]], each, "Every layer", folded=True),
        ],
        cards=cards(found),
    )


def cell(result: Result, part: str, name: str, key: str) -> Number:
    return Number(result.results[part].get(name, {}).get(key), 1)


def cards(found: Sequence[Result]) -> list[Card]:
    """The kind that was named last: c_fc, on which TopoNets has its sheets, unless told otherwise."""
    kind, first = list(found[0].results["kinds"].items())[-1]
    values = [r.results["kinds"].get(kind, {}).get("value") for r in found]
    beside = {said: first[key] for key, said in NULLS.items() if first[key] is not None}
    return [Card("Effective dimensionality", f"{kind}, mean over layers", values, beside, 1)]


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    kinds = found[0].results["kinds"]
    columns = min(3, len(kinds))
    n_rows = -(-len(kinds) // columns)
    figure = new_figure(2.5 * columns + 1.7, 2.2 * n_rows + 0.3)
    axes = figure.subplots(n_rows, columns, sharey=True, squeeze=False).ravel()
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis, (kind, d) in zip(axes, kinds.items(), strict=False):
        for r, colour, marker in zip(found, plots.COLOURS, "os", strict=False):
            by_name, names = r.results["by_name"], r.results["kinds"].get(kind, {"names": []})["names"]
            values = {k: [by_name[n][k] for n in names] for k in ("value", *NULLS)}
            axis.plot(values["value"], marker, ls="-", ms=3.5, color=colour, label=r.label)
            axis.plot(values["shuffled"], ":", color=colour, label=f"{r.label}, units shuffled")
            if r is found[0] and None not in values["untrained"]:
                axis.plot(values["untrained"], "--", color=plots.FLOOR, label="untrained")
        axis.axhline(d["n_units"], color=plots.FLOOR, lw=0.8, label="number of units")
        axis.set(title=kind, yscale="log", xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.set_major_formatter("{x:g}")
    for axis in axes[::columns]:
        axis.set_ylabel("effective dimensionality")
    plots.legend(figure, axes[: len(kinds)])
    yield Drawing(
        "dimensionality",
        figure,
        "Effective dimensionality of activations on held-out text (dimensions, logarithmic), layer by layer. "
        "Dotted: the same with every unit shuffled over the tokens by itself, which leaves its variance and "
        "nothing else; dashed: a model of the same shape before training; grey line: the number of units.",
    )


ANALYSIS = Analysis(DimensionalityConfig, analyse, section, draw, order=35)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
