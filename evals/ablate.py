"""Lesions: what a model loses with its most selective units, or with a disc on one sheet.

    python -m evals.ablate out/topolm --control out/control           # of the language localiser
    python -m evals.ablate out/topolm --disc layer.3.mlp --centre 14 14 --radius 5
    python -m evals.ablate out/topolm --stimuli items.csv --conditions noun verb --text held-out.txt

A lesioned unit adds nothing to the residual stream (--lesion zero), or its mean over the held-out text. What
is measured, also of as many random units: the cross-entropy on held-out text and on the items of each
condition, and how much of the contrast the other units still show. TopoLM's released code instead zeroes
columns of the weights that read the stream, where every layer before has written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from topogpt.analysis import heldout, measures, plots, stimuli
from topogpt.analysis.activations import of_tokens, token_lists
from topogpt.analysis.lesions import cross_entropy, lesioned, mean_outputs, random_units
from topogpt.analysis.measures import most_selective
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Drawing, Label, Number, Section, Table, need
from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import PoolingConfig, Subject, check_alpha, protocol_of
from topogpt.drawing import new_figure
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.terminal import progress

UNITS = (1, 28, 196, 784, 1568, 3136)  # sizes of lesions, of those that TopoLM made


@dataclass(frozen=True, kw_only=True)
class AblateConfig(PoolingConfig):
    """Lesion the most selective units, or a disc on a sheet: python -m evals.ablate RUN [--control RUN]."""

    units: tuple[int, ...] | None = None  # sizes of lesions; None: 1 28 196 784 1568 3136 if there are
    disc: str | None = None  # sheet of a disc (layer.3.mlp) that is lesioned instead
    centre: tuple[int, int] | None = None  # row and column of its centre, counted from 0
    radius: float | None = None  # l2 distance in cells up to which units belong to it; 0: the centre alone
    lesion: Literal["zero", "mean"] = "zero"  # what lesioned units show: 0, or their mean over the text
    stimuli: str | None = None  # CSV with the columns item and condition; None: the language localiser
    conditions: tuple[str, str] = ("S", "N")  # of the contrast, first - second; selective: t is large
    text: str | None = None  # file of held-out text; None: the validation shards of the run
    n_tokens: int = 16_384  # of the held-out text that are predicted, the first ones
    random_draws: int = 3  # lesions of as many random units, to compare with; a disc's are on its sheet
    alpha: float = 0.05  # level of the false discovery rate over all units that are left
    seed: int = 0  # of the random units

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units is not None:
            if not self.units or len(set(self.units)) < len(self.units):
                raise UserError(f"units = {list(self.units)} must be different numbers of units")
            check_at_least("units", min(self.units), 1)
        self.check_disc()
        check_at_least("n_tokens", self.n_tokens, 1)
        check_at_least("random_draws", self.random_draws, 1)
        check_alpha(self.alpha)
        if self.conditions[0] == self.conditions[1]:
            raise UserError(f"conditions = {' '.join(self.conditions)} must be two; a contrast needs both")

    def check_disc(self) -> None:
        for name in ("centre", "radius"):
            if self.disc is None and getattr(self, name) is not None:
                raise UserError(f"{name} has no effect without a disc; add --disc SHEET")
            if self.disc is not None and getattr(self, name) is None:
                raise UserError(f"disc = {self.disc} needs a {name}; add --centre ROW COLUMN --radius CELLS")
        if self.disc is not None and self.units is not None:
            raise UserError("disc and units exclude each other; give one of them")
        if self.radius is not None:
            check_at_least("radius", self.radius, 0)


# ---- which units ---------------------------------------------------------------------------------


class Lesion(NamedTuple):
    name: str
    units: np.ndarray  # (S, n_units) bool
    among: np.ndarray  # (S, n_units) bool: where as many random units are drawn


def check_fits(cfg: AblateConfig, subject: Subject) -> None:
    """Refuse units and discs that the model has not."""
    n_units, (h, w) = len(subject.sheets) * subject.model.cfg.n_embd, subject.grid
    if cfg.units is not None and max(cfg.units) > n_units:
        raise UserError(f"units = {max(cfg.units)} are more than the {n_units} that {subject.label} has")
    if cfg.disc is None:
        return
    if cfg.disc not in subject.sheets:
        there = ", ".join(subject.sheets)
        raise UserError(f"disc = {cfg.disc} is no sheet of {subject.label}; its sheets are {there}")
    row, column = cfg.centre
    if not (0 <= row < h and 0 <= column < w):
        inside = f"rows are 0 to {h - 1}, columns 0 to {w - 1}"
        raise UserError(f"centre = {row} {column} is outside the {h}x{w} sheet; {inside}")


def lesions_of(cfg: AblateConfig, subject: Subject, t: np.ndarray) -> list[Lesion]:
    """All lesions of an analysis; t: selectivity of every unit, (S, n_units)."""
    if cfg.disc is not None:
        row, column = cfg.centre
        name = f"disc of radius {cfg.radius:g} at {cfg.disc} {row},{column}"
        sheet = np.broadcast_to(np.array(subject.sheets)[:, None] == cfg.disc, t.shape)
        apart = np.linalg.norm(subject.positions[cfg.disc] - np.array(cfg.centre), axis=1)
        return [Lesion(name, sheet & (apart <= cfg.radius), sheet)]
    sizes = sorted(cfg.units) if cfg.units is not None else [k for k in UNITS if k <= t.size]
    return [Lesion(f"{k} most selective", most_selective(t, k), np.ones(t.shape, bool)) for k in sizes]


# ---- what is measured ----------------------------------------------------------------------------


def held_out(cfg: AblateConfig, subject: Subject) -> tuple[list[np.ndarray], dict[str, str]]:
    """Rows of tokens, a context long and one more, as in a run's evaluations; and their source -> SHA-256."""
    if cfg.text is not None:
        stream, source, sha256 = heldout.text_file(Path(cfg.text), cfg.vocab_dir)
    else:
        stream, source, sha256 = heldout.shards(subject, None, cfg.n_tokens)
    stream = stream[: cfg.n_tokens + 1]
    if len(stream) < 2:
        raise UserError(f"text: {source} is empty; give a file of text")
    size = min(subject.model.cfg.block_size, len(stream) - 1)
    return [stream[i : i + size + 1] for i in range(0, len(stream) - size, size)], {source: sha256}


class Bench(NamedTuple):
    """What every lesion is measured on."""

    cfg: AblateConfig
    subject: Subject
    rows: list[np.ndarray]  # of the held-out text
    items: list[np.ndarray]  # tokens of each item, to be pooled
    conditions: dict[str, list[np.ndarray]]  # after an end-of-text token, so that all tokens are predicted
    first: np.ndarray  # (n_items,) bool: of the first condition of the contrast
    second: np.ndarray

    def contrast(self) -> measures.TTest:
        """Of every unit as it is now, each (S, n_units)."""
        patterns = of_tokens(self.subject.model, self.items, self.cfg.pooling)
        x = np.stack([patterns[sheet] for sheet in self.subject.sheets], axis=1)  # (n_items, S, n_units)
        return measures.welch(x[self.first], x[self.second])

    def measure(self, left: np.ndarray) -> dict[str, Any]:
        """The numbers of the model as it is now; the contrast's in the units that are left."""
        model = self.subject.model
        return {
            "cross_entropy": cross_entropy(model, self.rows),
            "conditions": {name: cross_entropy(model, rows) for name, rows in self.conditions.items()},
            "contrast": strength(self.contrast(), left, self.cfg.alpha),
        }

    def under(self, units: np.ndarray, fill: np.ndarray) -> dict[str, Any]:
        with lesioned(self.subject.model, self.subject.sheets, units, fill):
            return self.measure(~units)


def bench_of(cfg: AblateConfig, subject: Subject, found: Stimuli, rows: list[np.ndarray]) -> Bench:
    from topogpt.text import tokenizer

    items = token_lists(cfg, subject, found)
    eot = np.array([tokenizer.EOT])
    after_eot = items if cfg.eot else [np.concatenate([eot, tokens]) for tokens in items]
    conditions: dict[str, list[np.ndarray]] = {}
    for condition, tokens in zip(found.conditions, after_eot, strict=True):
        conditions.setdefault(condition, []).append(tokens)
    first, second = (found.where(name) for name in cfg.conditions)
    return Bench(cfg, subject, rows, items, dict(sorted(conditions.items())), first, second)


def strength(found: measures.TTest, left: np.ndarray, alpha: float) -> dict[str, float]:
    """Share of the units that are left whose contrast is significant, and its mean |t| there."""
    if not left.any():
        return {"significant_percent": float("nan"), "mean_abs_t": float("nan")}
    significant = measures.fdr(found.p[left]) < alpha
    return {"significant_percent": 100 * significant.mean(), "mean_abs_t": np.abs(found.t[left]).mean()}


def summary(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over draws of each number, as NAME_mean and NAME_sd."""
    found: dict[str, Any] = {}
    for key, value in draws[0].items():
        each = [draw[key] for draw in draws]
        if isinstance(value, dict):
            found[key] = summary(each)
        else:
            found[f"{key}_mean"] = float(np.mean(each))
            found[f"{key}_sd"] = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return found


# ---- the analysis --------------------------------------------------------------------------------


def analyse(cfg: AblateConfig, subject: Subject) -> Outcome:
    need("scipy")
    check_fits(cfg, subject)
    source = Path(cfg.stimuli or Path(cfg.stimuli_dir) / "fedorenko2010_localizer")
    found = stimuli.read(source) if cfg.stimuli is not None else stimuli.localizer(source)
    what = " - ".join(cfg.conditions)
    stimuli.check_groups(found, *(found.where(name) for name in cfg.conditions), what)
    rows, data = held_out(cfg, subject)
    bench = bench_of(cfg, subject, found, rows)
    model, sheets = subject.model, subject.sheets

    intact = bench.contrast()
    shape = intact.t.shape
    fill = mean_outputs(model, sheets, rows) if cfg.lesion == "mean" else np.zeros(shape)
    none = bench.measure(np.ones(shape, bool))
    results, arrays = [], {"t": subject.on_grid(intact.t).astype(np.float32)}
    for lesion in progress(lesions_of(cfg, subject, intact.t), "lesions"):
        k = int(lesion.units.sum())
        seen = bench.under(lesion.units, fill)
        draws = [random_units(lesion.among, k, cfg.seed, draw) for draw in range(cfg.random_draws)]
        seen |= {"contrast_intact": strength(intact, ~lesion.units, cfg.alpha)}
        seen |= {"random": summary([bench.under(units, fill) for units in draws])}
        results.append({"name": lesion.name, "k": k} | seen)
        arrays[f"lesioned.{lesion.name}"] = subject.on_grid(lesion.units).astype(np.uint8)
    protocol = protocol_of(cfg) | {"tokens_predicted": sum(len(row) - 1 for row in rows)}
    said = {"what": what, "conditions": list(cfg.conditions), "n_units": intact.t.size}
    said |= {"lesioned": "what a unit of a branch adds to the residual stream"}
    said |= {"post_residual": model.cfg.post_residual, "no_lesion": none, "lesions": results}
    return Outcome(protocol, {source.name: found.sha256} | data, said, arrays)


# ---- what is shown -------------------------------------------------------------------------------


def section(found: Sequence[Result]) -> Section:
    rows: list[list[Any]] = []
    for i, result in enumerate(found):
        none = result.results["no_lesion"]
        rows.append([Label(f"{result.label}, cross-entropy in nats per token, and its increase (+)", i)])
        untouched = Number(none["contrast"]["significant_percent"], 1, " %")
        rows.append(["no lesion", 0, none["cross_entropy"], *[None] * 4, untouched])
        rows += [lesion_row(result.results, lesion) for lesion in result.results["lesions"]]
    first, second = found[0].results["conditions"]
    head = ["lesion", "units", "text", "+", "+ random units", f"+ items {first}", f"+ items {second}"]
    return Section(
        "Ablation",
        [
            "What is lost with units that add nothing to the residual stream any more? Cross-entropy (nats "
            "per token) on held-out text and its increase, beside that of as many random units (\u00b1 "
            "standard deviation over draws), and on the items of either condition. Units that matter "
            "for more than their number cost more than random ones. Last: share of the remaining units "
            "in which the contrast is significant.",
            Table([*head, "significant"], rows),
        ],
        [
            f"{r.label}: sheets show the residual stream; lesioned is what the branch of a sheet adds to it."
            for r in found
            if r.results["post_residual"]
        ],
    )


def lesion_row(found: dict[str, Any], lesion: dict[str, Any]) -> list[Any]:
    none, random = found["no_lesion"], lesion["random"]
    at_random = random["cross_entropy_mean"] - none["cross_entropy"]
    return [
        lesion["name"], lesion["k"], lesion["cross_entropy"],
        Number(lesion["cross_entropy"] - none["cross_entropy"]),
        Number(at_random, spread=random["cross_entropy_sd"]),
        *(Number(lesion["conditions"][c] - none["conditions"][c]) for c in found["conditions"]),
        Number(lesion["contrast"]["significant_percent"], 1, " %"),
    ]  # fmt: skip


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    """What lesions cost on held-out text, beside as many random units."""
    figure = new_figure(4.6, 2.8)
    axis = figure.subplots()
    for r, colour, marker in zip(found, plots.COLOURS, "os", strict=False):
        none, lesions = r.results["no_lesion"]["cross_entropy"], r.results["lesions"]
        k = [lesion["k"] for lesion in lesions]
        cost = [lesion["cross_entropy"] - none for lesion in lesions]
        axis.plot(k, cost, marker, ls="-", color=colour, label=r.label)
        mean = [lesion["random"]["cross_entropy_mean"] - none for lesion in lesions]
        sd = [lesion["random"]["cross_entropy_sd"] or 0 for lesion in lesions]
        axis.errorbar(k, mean, sd, color=colour, ls=":", capsize=2, label=f"{r.label}, random units")
    axis.set(xscale="log", xlabel="lesioned units", ylabel="increase of cross-entropy (nats per token)")
    axis.axhline(0, color=plots.FLOOR, lw=0.8)
    axis.set_title(f"Lesions of the units most selective for {found[0].results['what']}")
    if found[0].content["protocol"]["disc"]:
        axis.set_title(found[0].results["lesions"][0]["name"])
    axis.legend()
    yield Drawing(
        "ablate",
        figure,
        "Increase of cross-entropy on held-out text (nats per token) against the number of lesioned units: "
        "the most selective ones, and dotted as many random ones (mean and standard deviation over draws).",
    )


ANALYSIS = Analysis(AblateConfig, analyse, section, draw, order=40, costly=True)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
