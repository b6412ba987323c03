"""What the report says of the run itself: headline, curves of its training, and where it came from."""

import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.report.page import Image
from topogpt.analysis import matching, nulls
from topogpt.analysis.section import Card, Label, need
from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.runs.folder import read_metrics
from topogpt.spatial.schedule import losses_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIPPED = 0.05  # of the training, whose cross-entropy does not widen the axis


class Model(NamedTuple):
    """The model, or its control."""

    source: str  # as it was named
    subject: Subject
    place: int = 0  # 1: the control

    @property
    def label(self) -> Label:
        return Label(self.subject.label, self.place)


def step_of(subject: Subject) -> int | None:
    state = subject.checkpoint / "state.json"
    return json.loads(state.read_text(encoding="utf-8"))["train_state"]["step"] if state.is_file() else None


def evaluation_of(model: Model) -> dict[str, Any]:
    """The run's own record of the checkpoint; empty for a model that is no run."""
    step = step_of(model.subject)
    return next((r for r in read_metrics(Path(model.source), "val") if r["step"] == step), {})


def lead(model: Model) -> str:
    """What the model is, in a sentence."""
    subject, cfg = model.subject, model.subject.model.cfg
    h, w = subject.grid
    text = (
        f"A GPT of {cfg.n_layer} layers, {cfg.n_embd} wide ({subject.model.n_parameters() / 1e6:.1f}M "
        f"parameters), with {len(subject.sheets)} sheets of {h}\u00d7{w} units"
    )
    if subject.settings:
        sheets, n = subject.settings["topo"], evaluation_of(model).get("tokens")
        text += (
            "; no spatial loss (a control)"
            if sheets["loss"] == "none"
            else f"; spatial loss {losses_in_words(sheets)}"
        )
        step = step_of(subject)
        text += f"; checkpoint of step {step:,}" if step is not None else ""
        text += f", after {n:,} training tokens" if n else ""
    return f"{text}."


def notes(models: Sequence[Model]) -> list[str]:
    """What a reader must know before anything else: untrained, interrupted, a control that is none."""
    return [f"{line}." for line in matching.notes([model.subject for model in models])]


def cards(models: Sequence[Model]) -> list[Card]:
    values = [evaluation_of(model).get("cross_entropy") for model in models]
    if values[0] is None:
        return []
    blind = math.log(models[0].subject.model.cfg.n_vocab)
    grey = "" if values[0] < blind else "No better than a blind guess."
    return [
        Card("Cross-entropy", "validation text, nats per token", values, {"blind guess": blind}, grey=grey)
    ]


# ---- training ------------------------------------------------------------------------------------


class Training(NamedTuple):
    notes: list[str]
    images: list[Image]


def training(models: Sequence[Model], figures: bool) -> Training:
    """Curves of metrics.jsonl, and the sheets before and after."""
    notes, images = [], []
    if not read_metrics(Path(models[0].source), "val"):
        return Training([f"{models[0].label} has no metrics.jsonl, so there are no curves."], [])
    if figures:
        try:
            png, alt = picture_of(models)
            images.append(Image("training", png, CURVES, alt=alt))
        except UserError as error:
            notes.append(f"The curves were not drawn: {error}")
    before_and_after = Path(models[0].source) / "maps" / "before-and-after.png"
    if before_and_after.is_file():
        picture = before_and_after.read_bytes()
        images.append(Image("before-and-after", picture, BEFORE_AND_AFTER, alt=BEFORE_AND_AFTER))
    return Training(notes, images)


CURVES = (
    "Training. Left: cross-entropy on fixed validation text and, thin, of the training steps (nats per "
    "token; the axis ends below what is higher in the first 5 %). Middle: spatial loss on the same "
    "text (dimensionless), mean over sheets; 0 is a perfect map. Right: Moran's I (dimensionless) of "
    "the raw maps of 64 tokens of the first validation text, mean over tokens and sheets. Dotted: what "
    "independent units reach."
)
BEFORE_AND_AFTER = (
    "The same held-out token on every sheet at the first and the last evaluation: activation of "
    "each unit in standard deviations of its sheet (dimensionless), cut at \u00b1 2.5."
)


def picture_of(models: Sequence[Model]) -> tuple[bytes, str]:
    """The curves as PNG, and in words."""
    need("matplotlib")
    import matplotlib

    from topogpt.analysis.plots import STYLE
    from topogpt.drawing import DPI, in_words

    with matplotlib.rc_context(STYLE), BytesIO() as file:
        figure = draw_training(models)
        figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue(), in_words(figure)


def draw_training(models: Sequence[Model]) -> "Figure":
    """Cross-entropy, spatial loss and Moran's I over tokens of training, each beside its null."""
    from matplotlib.ticker import EngFormatter

    from topogpt.analysis.plots import COLOURS, FLOOR, legend
    from topogpt.drawing import new_figure

    floor = nulls.noise_morans(*models[0].subject.grid, 0.0, 1.0, "queen", 999, 0).mean()
    figure = new_figure(12.4, 2.7)
    axes = figure.subplots(1, 3)
    kinds = {"cross_entropy": ("cross-entropy (nats per token)", None), "spatial_loss": ("spatial loss", 0.5)}
    kinds |= {"moran": ("Moran's I", floor)}
    for axis, (key, (name, level)) in zip(axes, kinds.items(), strict=True):
        inside = []
        for split, width in (("train", 0.5), ("val", 1.8)):
            for model, colour, style in zip(models, COLOURS, ("-", "--"), strict=False):
                points = points_of(model, split, key) if split == "val" or level is None else []
                if points:
                    label = f"{model.label}{', training steps' if split == 'train' else ''}"
                    axis.plot(*zip(*points, strict=True), style, color=colour, lw=width, label=label)
                    inside += [y for x, y in points if x >= SKIPPED * points[-1][0]]
        if level is not None:
            axis.axhline(level, color=FLOOR, ls=":", label="no map")
        elif inside:
            room = 0.05 * (max(inside) - min(inside) or 1)
            axis.set_ylim(min(inside) - room, max(inside) + room)
        axis.set(title=name, xlabel="training tokens", xlim=(0, None))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(axis="y", color="0.92")
    legend(figure, axes)
    return figure


def points_of(model: Model, split: str, key: str) -> list[tuple[int, float]]:
    records = read_metrics(Path(model.source), split)
    return [(r["tokens"], r[key]) for r in records if "tokens" in r and math.isfinite(r.get(key, math.nan))]


# ---- provenance ----------------------------------------------------------------------------------


class Fact(NamedTuple):
    text: str = ""
    code: str = ""


def facts(models: Sequence[Model]) -> dict[str, list[Fact]]:
    each = [facts_of(model) for model in models]
    return {key: [one[key] for one in each] for key in each[0] if any(any(one[key]) for one in each)}


def facts_of(model: Model) -> dict[str, Fact]:
    """Where a model came from; what is known of its training only for a run."""
    subject, record = model.subject, Path(model.source) / "provenance.json"
    start = json.loads(record.read_text(encoding="utf-8"))[-1] if record.is_file() else {}
    data, settings = start.get("data_sha256", {}), subject.settings or {}
    found = {
        "given as": Fact(code=model.source),
        "checkpoint": Fact(code=str(subject.checkpoint)),
        "weights, SHA-256": Fact(code=subject.weights_sha256),
    }
    for name, key in (("training text", "train_data_dir"), ("validation text", "val_data_dir")):
        found[name] = Fact(", ".join(settings.get(key, ())), data.get(key, ""))
    if not start:
        return found | dict.fromkeys(("trained with", "code", "machine", "versions"), Fact())
    changed = "with uncommitted changes:" if start["git_diff"] else ""
    versions = {"python": start["python"], **start["packages"]}
    return found | {
        "trained with": Fact(code=" ".join(start["command"])),
        "code": Fact(changed, (start["git_sha"] or "unknown")[:12]),
        "machine": Fact(f"{start['world_size']} x {start['device']}, {start['platform']}"),
        "versions": Fact(", ".join(f"{k} {v}" for k, v in versions.items())),
    }
