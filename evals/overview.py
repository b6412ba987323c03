"""What the report says of the run itself: headline numbers, curves of its training, and where it came from.

python -m evals.report out/topolm --control out/control         # writes the page they are on
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evals import page
from evals.common import Subject
from evals.findings import smoothing
from evals.page import Card, Html, Level, Line, join, number, paragraph, tag
from topogpt.runs.folder import read_metrics
from topogpt.settings import N_VOCAB


class Model(NamedTuple):
    """The model, or its control."""

    source: str  # as it was named
    subject: Subject


class Section(NamedTuple):
    """What there is of one analysis."""

    contents: list[dict[str, Any]]  # of the model and its control; empty without the model's
    done: list[str]  # what was run, and why
    missing: list[str]


def step_of(subject: Subject) -> int | None:
    state = subject.checkpoint / "state.json"
    return json.loads(state.read_text(encoding="utf-8"))["train_state"]["step"] if state.is_file() else None


def evaluation_of(model: Model) -> dict[str, Any]:
    """The run's own record of the checkpoint; empty for a model that is no run."""
    step = step_of(model.subject)
    return next((r for r in read_metrics(Path(model.source), "val") if r["step"] == step), {})


def head(models: Sequence[Model], found: dict[str, Section]) -> Html:
    subject, cfg = models[0].subject, models[0].subject.model.cfg
    h, w = subject.grid
    text = (
        f"A GPT of {cfg.n_layer} layers, {cfg.n_embd} wide ({subject.model.n_parameters() / 1e6:.1f}M "
        f"parameters): {len(subject.sheets)} sheets of {h}\u00d7{w} units, one for the attention and one "
        "for the MLP of each layer"
    )
    if subject.settings:
        sheets, n = subject.settings["topo"], evaluation_of(models[0]).get("tokens")
        text += (
            "; no spatial loss (a control)"
            if sheets["loss"] == "none"
            else f"; spatial loss {sheets['loss']} of weight {sheets['weight']:g}"
        )
        step = step_of(subject)
        text += f"; checkpoint of step {step:,}" if step is not None else ""
        text += f", after {n:,} training tokens" if n else ""
    beside = [tag("p", "Control: ", tag("b", m.subject.label), cls="lead") for m in models[1:]]
    return join(
        [
            tag("h1", subject.label),
            tag("p", f"{text}.", cls="lead"),
            *beside,
            page.cards(headline(models, found)),
        ]
    )


def headline(models: Sequence[Model], found: dict[str, Section]) -> list[Card]:
    """The numbers to look at first; those of analyses without results are left out."""
    evaluations = [evaluation_of(model) for model in models]
    topography, contrasts, network = (
        [c["results"] for c in found[name].contents] for name in ("topography", "contrasts", "localize")
    )
    cards = []
    if "cross_entropy" in evaluations[0]:
        blind = math.log(min(N_VOCAB, models[0].subject.model.cfg.vocab_size))
        values = [e.get("cross_entropy") for e in evaluations]
        cards.append(card("Cross-entropy", "validation text, nats per token", values, {"blind guess": blind}))
    for fwhm in [*topography[0]["moran"]][:: len(topography[0]["moran"]) - 1 or 1] if topography else []:
        values = [t["moran"][fwhm]["mean"] for t in topography]
        what = f"single-token maps, {smoothing(fwhm)}"
        cards.append(card("Moran's I", what, values, {"no map": topography[0]["moran"][fwhm]["floor"]}))
    if topography:
        values = [t["spatial_loss"]["mean"] for t in topography]
        cards.append(card("Spatial loss", "per sheet, all neighbourhoods", values, {"independent": 0.5}))
    for name, first in [*contrasts[0]["contrasts"].items()][:1] if contrasts else []:
        fwhm = max(first["moran"], key=float)
        beside = {"no map": first["moran"][fwhm]["floor"]}
        if first["published"] and float(fwhm) == 2:
            beside["TopoLM"] = first["published"]["topo_smoothed"]
        values = [c["contrasts"][name]["moran"][fwhm]["mean"] for c in contrasts if name in c["contrasts"]]
        cards.append(card("Moran's I of t", f"{first['what']}, {smoothing(fwhm)}", values, beside))
    if network:
        values = [r["network_percent"] for r in network]
        beside = {"units": network[0]["n_network"], "of": network[0]["n_units"]}
        cards.append(card("Language network", "share of all units", values, beside, 1, " %"))
    return cards


def card(
    name: str, what: str, values: Sequence[Any], beside: dict[str, float], digits: int = 3, unit: str = ""
) -> Card:
    """Of the model's value and the control's, if there is one."""
    first, *others = (number(value, digits, unit) for value in values)
    lines: list[tuple[Any, Any]] = [(join([page.swatch(1), "control"]), value) for value in others]
    return Card(name, what, first, lines + [(key, number(value)) for key, value in beside.items()])


def training(models: Sequence[Model], found: dict[str, Section]) -> Html:
    """Curves of metrics.jsonl, and the sheets before and after."""
    records = {kind: [read_metrics(Path(m.source), kind) for m in models] for kind in ("val", "train")}

    def lines(kind: str, key: str) -> list[Line]:
        runs = [
            [r for r in run if "tokens" in r and math.isfinite(r.get(key, math.nan))] for run in records[kind]
        ]
        return [
            Line([r["tokens"] for r in run], [r[key] for r in run], i, kind == "train")
            for i, run in enumerate(runs)
        ]

    if not records["val"][0]:
        return paragraph(f"{models[0].subject.label} has no metrics.jsonl, so there are no curves.")
    topography = found["topography"].contents
    floor = topography[0]["results"]["moran"].get("0.0") if topography else None
    cross_entropy = [*lines("val", "cross_entropy"), *lines("train", "cross_entropy")]
    no_map = Level("no map", floor["floor"]) if floor else None
    charts = [
        page.line_chart("Cross-entropy", "nats per token", cross_entropy, skip=0.05),
        page.line_chart(
            "Spatial loss per sheet", "", lines("val", "spatial_loss"), Level("independent units", 0.5)
        ),
        page.line_chart("Moran's I of single-token maps", "", lines("val", "moran"), no_map),
    ]
    caption = (
        "Training. Left: cross-entropy on fixed validation text and, thin, of the training steps (nats per "
        "token; the axis ends below what is higher in the first 5 %). Middle: spatial loss on the same "
        "text (dimensionless), mean over sheets; 0 is a perfect map. Right: Moran's I (dimensionless) of "
        "the raw maps of 64 tokens of the first validation text, mean over tokens and sheets. A line has "
        f"at most {page.MAX_POINTS} points, means of neighbouring records."
    )
    names = page.legend([m.subject.label for m in models], "to compare with")
    parts = [tag("figure", names, tag("div", *charts, cls="charts"), tag("figcaption", caption))]
    before_and_after = Path(models[0].source) / "maps" / "before-and-after.png"
    if before_and_after.is_file():
        what = (
            "The same held-out token on every sheet at the first and the last evaluation: activation of "
            "each unit in standard deviations of its sheet (dimensionless), cut at \u00b1 2.5."
        )
        parts.append(page.picture(before_and_after, what))
    return join(parts)


# ---- provenance ----------------------------------------------------------------------------------


def provenance(models: Sequence[Model], found: dict[str, Section], commands: Sequence[str]) -> Html:
    each = [facts(model) for model in models]
    contents = [c for section in found.values() for c in section.contents]
    analyses = [[c["analysis"], c["model"]["label"], c["written"], code_of(c), data_of(c)] for c in contents]
    parts = [
        page.table(
            ["", *page.models_head([m.subject.label for m in models])],
            [[key, *(one[key] for one in each)] for key in each[0] if any(one[key] for one in each)],
            "facts",
        ),
        tag("h3", "Analyses"),
        page.table(["analysis", "model", "written", "code", "data (SHA-256)"], analyses, "facts"),
        *(paragraph(f"{name}: {line}") for name, section in found.items() for line in section.done),
        tag("h3", "To do it again"),
        tag("pre", "\n".join(commands)),
    ]
    for c in contents:
        lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in c["protocol"].items())
        parts.append(page.folded(f"Protocol: {c['analysis']} of {c['model']['label']}", tag("pre", lines)))
    for model in models:
        if model.subject.settings:
            text = yaml.safe_dump(model.subject.settings, sort_keys=False)
            parts.append(page.folded(f"Settings of {model.subject.label}", tag("pre", text)))
    return join(parts)


def facts(model: Model) -> dict[str, Any]:
    """Where a model came from; what is known of its training only for a run."""
    record = Path(model.source) / "provenance.json"
    start = json.loads(record.read_text(encoding="utf-8"))[-1] if record.is_file() else {}
    settings, data = model.subject.settings or {}, start.get("data_sha256", {})
    shards = {key: ", ".join(settings.get(key, ())) for key in ("train_data_dir", "val_data_dir")}
    return {
        "given as": tag("code", model.source),
        "checkpoint": tag("code", model.subject.checkpoint),
        "weights, SHA-256": tag("code", model.subject.weights_sha256),
        "training text": join([shards["train_data_dir"], " ", tag("code", data.get("train_data_dir", ""))]),
        "validation text": join([shards["val_data_dir"], " ", tag("code", data.get("val_data_dir", ""))]),
        "trained with": tag("code", " ".join(start["command"])) if start else "",
        "code": code(start["git_sha"], bool(start["git_diff"])) if start else "",
        "machine": f"{start['world_size']} x {start['device']}, {start['platform']}" if start else "",
        "versions": ", ".join(f"{k} {v}" for k, v in {"python": start["python"], **start["packages"]}.items())
        if start
        else "",
    }


def code(git_sha: str | None, changed: bool) -> Html:
    return join([tag("code", (git_sha or "unknown")[:12]), " with uncommitted changes" if changed else ""])


def code_of(content: dict[str, Any]) -> Html:
    return code(content["code"]["git_sha"], content["code"]["changed"])


def data_of(content: dict[str, Any]) -> Html:
    lines = [join([name, " ", tag("code", digest)]) for name, digest in content["data_sha256"].items()]
    return join(tag("div", line) for line in lines)
