"""What units do: lesioned or stimulated, beside random sets of as many units of the same sheets.

    python -m evals.ablate out/topolm --control out/control           # the 1 % most selective, as localised
    python -m evals.ablate out/topolm --units 28 196 784 --blimp blimp.parquet
    python -m evals.ablate out/topolm --cluster 3                     # the largest clusters of the t-maps
    python -m evals.ablate out/topolm --disc layer.3.mlp --centre 14 14 --radius 5

A lesioned unit shows 0 at every token (--lesion mean: its mean over the held-out text), a stimulated one
--strength of its own standard deviations more than it would. Topo-Omni (PAPERS.md section 9) lesions and
stimulates too, but adds one number to all units, or the mean of a condition. TopoLM's released code lesions
columns of the weights that read the residual stream, where every layer before has written; here it is what a
unit itself computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from topogpt import topo
from topogpt.analysis import heldout, measures, own_stimuli, pairs, plots, stimuli
from topogpt.analysis.activations import token_lists
from topogpt.analysis.contrast import FEW_ITEMS, TMaps, chosen, clusters_of
from topogpt.analysis.experiment import MEASURES, Bench, contrast, experiment
from topogpt.analysis.lesions import moments
from topogpt.analysis.measures import most_selective
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.section import Analysis, Drawing, Label, Number, Section, Table, need
from topogpt.analysis.sets import Target, sets_of
from topogpt.analysis.subject import PoolingConfig, Subject, check_alpha, protocol_of
from topogpt.drawing import new_figure
from topogpt.errors import UserError, check_at_least, run_main

DEFAULT_PERCENT = 1  # of all units, where nothing else is named
FEW_PLACES = 20  # fewer cannot make p small


@dataclass(frozen=True, kw_only=True)
class AblateConfig(PoolingConfig):
    """Lesion and stimulate units, beside random sets: python -m evals.ablate RUN [--control RUN]."""

    do: tuple[Literal["lesion", "stimulate"], ...] = ("lesion", "stimulate")  # what is done to each set
    units: tuple[int, ...] | None = None  # targets: so many most selective units; 1 % if none is named
    cluster: int | None = None  # targets: the so many largest clusters of units that the contrast drives
    disc: str | None = None  # target: units within a disc on this sheet (layer.3.mlp)
    centre: tuple[int, int] | None = None  # row and column of its centre, counted from 0
    radius: float | None = None  # l2 distance in cells up to which units belong to it; 0: the centre alone
    top_percent: float | None = None  # clusters of this share of units, the most selective, whatever their p
    lesion: Literal["zero", "mean"] = "zero"  # what lesioned units show: 0, or their mean over the text
    strength: float = 2.0  # what stimulated units show more, in their standard deviations over the text
    stimuli: str | None = None  # CSV with the columns item and condition; None: the language localiser
    conditions: tuple[str, str] = ("S", "N")  # of the contrast, first - second; selective: t is large
    n_items: int = 40  # of each condition that the change of the contrast is measured on, the first ones
    text: str | None = None  # file of held-out text; None: the validation shards of the run
    n_tokens: int = 512  # of the held-out text that are predicted, the first ones; more on a GPU
    blimp: str | None = None  # minimal pairs, .parquet or .jsonl: sentence_good, sentence_bad, phenomenon
    blimp_pairs: int = 10  # of each phenomenon, the first ones of its paradigms in turn
    random_draws: int = 100  # random sets that every target is compared with
    alpha: float = 0.05  # level of the false discovery rate: of selective units, and of effects
    seed: int = 0  # of the random sets

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units is not None:
            if not self.units or len(set(self.units)) < len(self.units):
                raise UserError(f"units = {list(self.units)} must be different numbers of units")
            check_at_least("units", min(self.units), 1)
        if not self.do or len(set(self.do)) < len(self.do):
            raise UserError(f"do = {' '.join(self.do)} must be lesion, stimulate or both")
        self.check_places()
        for name in ("n_tokens", "blimp_pairs", "random_draws"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("n_items", self.n_items, 2)
        check_at_least("strength", self.strength, 0)
        check_alpha(self.alpha)
        if self.conditions[0] == self.conditions[1]:
            raise UserError(f"conditions = {' '.join(self.conditions)} must be two; a contrast needs both")

    def check_places(self) -> None:
        for name in ("centre", "radius"):
            if self.disc is None and getattr(self, name) is not None:
                raise UserError(f"{name} has no effect without a disc; add --disc SHEET")
            if self.disc is not None and getattr(self, name) is None:
                raise UserError(f"disc = {self.disc} needs a {name}; add --centre ROW COLUMN --radius CELLS")
        if self.radius is not None:
            check_at_least("radius", self.radius, 0)
        if self.cluster is not None:
            check_at_least("cluster", self.cluster, 1)
        if self.top_percent is not None:
            if self.cluster is None:
                raise UserError("top_percent has no effect without clusters; add --cluster N")
            if not 0 < self.top_percent <= 100:
                raise UserError(f"top_percent = {self.top_percent} must be above 0 and at most 100")


# ---- which units ---------------------------------------------------------------------------------


def check_fits(cfg: AblateConfig, subject: Subject) -> None:
    """Refuse units and discs that the model has not."""
    n_units = sum(map(len, subject.positions.values()))
    if cfg.units is not None and max(cfg.units) > n_units:
        raise UserError(f"units = {max(cfg.units)} are more than the {n_units} that {subject.label} has")
    if cfg.disc is None:
        return
    if cfg.disc not in subject.sheets:
        there = ", ".join(subject.sheets)
        raise UserError(f"disc = {cfg.disc} is no sheet of {subject.label}; its sheets are {there}")
    (row, column), (h, w) = cfg.centre, topo.grid_of(subject.positions[cfg.disc])
    if not (0 <= row < h and 0 <= column < w):
        inside = f"rows are 0 to {h - 1}, columns 0 to {w - 1}"
        raise UserError(f"centre = {row} {column} is outside the {h}x{w} sheet; {inside}")


def targets_of(cfg: AblateConfig, subject: Subject, intact: measures.TTest) -> list[Target]:
    """All sets of units that are intervened on; intact: the contrast of every unit, each (S, n_units)."""
    t, places = intact.t, list(subject.positions.values())
    found = []
    sizes = cfg.units
    if sizes is None and cfg.cluster is None and cfg.disc is None:
        sizes = (max(1, round(t.size * DEFAULT_PERCENT / 100)),)
    for k in sorted(sizes or ()):
        found.append(Target(f"{k} most selective", most_selective(t, k)))
    if cfg.cluster is not None:
        p = measures.fdr(intact.p)
        maps = TMaps(*(subject.on_grid(x) for x in (t, p, p < cfg.alpha)))
        clusters = clusters_of(chosen(maps, cfg.top_percent))[: cfg.cluster]
        if not clusters:
            raise UserError(
                f"cluster = {cfg.cluster}: no unit of {subject.label} answers significantly more to "
                f"{cfg.conditions[0]}; add --top_percent 1, or use --units"
            )
        for n, (s, mask) in enumerate(clusters, start=1):
            units = np.zeros(t.shape, bool)
            units[s] = mask[places[s][:, 0], places[s][:, 1]]
            found.append(Target(f"cluster {n}, {subject.sheets[s]}", units, s))
    if cfg.disc is not None:
        (row, column), s = cfg.centre, subject.sheets.index(cfg.disc)
        units = np.zeros(t.shape, bool)
        units[s] = np.linalg.norm(places[s] - np.array(cfg.centre), axis=1) <= cfg.radius
        name = f"disc of radius {cfg.radius:g} at {cfg.disc} {row},{column}"
        found.append(Target(name, units, s))
    return found


# ---- the analysis --------------------------------------------------------------------------------


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


def analyse(cfg: AblateConfig, subject: Subject) -> Outcome:
    need("scipy")
    check_fits(cfg, subject)
    source = Path(cfg.stimuli or Path(cfg.stimuli_dir) / "fedorenko2010_localizer")
    if cfg.stimuli is None and own_stimuli.stand_in(cfg.stimuli_dir):
        found = own_stimuli.localizer()
    else:
        found = stimuli.read(source) if cfg.stimuli is not None else stimuli.localizer(source)
    what = " - ".join(cfg.conditions)
    groups = [found.where(name) for name in cfg.conditions]
    stimuli.check_groups(found, *groups, what)
    rows, data = held_out(cfg, subject)
    data |= {found.source if stimuli.is_own({found.source: ""}) else source.name: found.sha256}
    minimal = pairs.read(Path(cfg.blimp), cfg.blimp_pairs) if cfg.blimp is not None else None
    data |= {minimal.source: minimal.sha256} if minimal else {}

    items = token_lists(cfg, subject, found)
    items_of = [[items[i] for i in np.flatnonzero(group)] for group in groups]
    selectivity = contrast(subject, *items_of, cfg.pooling)
    targets = targets_of(cfg, subject, selectivity)
    usual = moments(subject.model, subject.sheets, selectivity.t.shape[1], rows)
    bench = Bench(
        subject=subject,
        rows=rows,
        first=items_of[0][: cfg.n_items],
        second=items_of[1][: cfg.n_items],
        pooling=cfg.pooling,
        pairs=pairs.token_lists(subject, minimal, cfg.vocab_dir) if minimal else None,
        phenomena=np.array(minimal.phenomena if minimal else []),
        fill=usual.mean if cfg.lesion == "mean" else np.zeros(usual.mean.shape),
        added=cfg.strength * usual.sd,
    )
    sets = [sets_of(target, subject.positions, cfg.random_draws, cfg.seed) for target in targets]
    intact, effects = experiment(bench, sets, cfg.do)
    said = {"what": what, "n_units": selectivity.t.size, "post_residual": subject.model.cfg.post_residual}
    said |= {"n_items": [len(bench.first), len(bench.second)], "n_pairs": len(bench.phenomena)}
    said |= {"intact": intact, "effects": effects}
    arrays = {"t": subject.on_grid(selectivity.t).astype(np.float32)}
    arrays |= {f"target.{target.name}": subject.on_grid(target.units).astype(np.uint8) for target in targets}
    protocol = protocol_of(cfg) | {"tokens_predicted": sum(len(row) - 1 for row in rows)}
    return Outcome(protocol, data, said, arrays)


# ---- what is shown -------------------------------------------------------------------------------


def section(found: Sequence[Result]) -> Section:
    protocol = found[0].content["protocol"]
    placed = any(effect["n_places"] for r in found for effect in r.results["effects"])
    parts: list[str | Table] = [explained(protocol, found[0].results), tested(protocol, placed)]
    parts += [table_of(name, found, placed) for name in measured(found)]
    parts += [phenomena_of(r) for r in found if "phenomena" in r.results["intact"]]
    return Section("Lesions and stimulation", parts, list(warnings_of(found)))


def measured(found: Sequence[Result]) -> list[str]:
    """What all of these results have."""
    return [name for name in MEASURES if all(name in r.results["intact"] for r in found)]


def explained(protocol: dict[str, Any], results: dict[str, Any]) -> str:
    shown = "0" if protocol["lesion"] == "zero" else "its mean over the held-out text"
    done = {
        "lesion": f"a lesioned unit shows {shown} at every token",
        "stimulate": f"a stimulated unit shows {protocol['strength']:g} of its own standard deviations more "
        "than it would",
    }
    a, b = results["n_items"]
    text = (
        f"What do units do? Here {' and '.join(done[do] for do in protocol['do'])}. Measured each time, "
        f"on the same tokens: the loss on {protocol['tokens_predicted']:,} tokens of held-out text; how "
        f"much all other units show the contrast {results['what']} (mean |t|; {a} and {b} items)"
    )
    if results["n_pairs"]:
        text += (
            f"; and how many of {results['n_pairs']:,} minimal pairs are right: the good sentence has the "
            "higher summed log-probability (chance: 50 %)"
        )
    return f"{text}."


def tested(protocol: dict[str, Any], placed: bool) -> str:
    draws = protocol["random_draws"]
    text = (
        f"Every change stands beside those of {draws} sets of as many random units of the same sheets: do "
        "these units matter more than others of their layers?"
    )
    if placed:
        text += (
            " Random units lie scattered, but neighbours on a map do alike things. So a cluster or a disc "
            f"also stands beside its own shape at random places of its sheet ({draws} times, turned and "
            "mirrored, too): does this place matter more than other places?"
        )
    return (
        f"{text} p = (1 + random sets at least as extreme) / (1 + {draws}). Extreme: as much more loss, as "
        "many fewer pairs right, a contrast as far from the mean on either side. p adj.: "
        "Benjamini-Hochberg over all rows of all tables, for one model and one kind of random set."
    )


def table_of(name: str, found: Sequence[Result], placed: bool) -> Table:
    measure, rows = MEASURES[name], []
    for i, r in enumerate(found):
        value = Number(r.results["intact"][name], measure.digits)
        rows.append([Label(f"{r.label}, intact: {value} {measure.unit}", i)])
        for effect in r.results["effects"]:
            of = effect["measures"][name]
            row = [name_of(effect), effect["k"], Number(of["change"], measure.digits)]
            rows.append(row + [x for kind in kinds(placed) for x in cells(of[kind], measure.digits)])
    head = ["target", "units", "change", "random units (95 % range)", "p", "p adj."]
    head += ["same shape elsewhere (95 % range)", "p", "p adj."] if placed else []
    return Table(head, rows, f"{measure.title}, change ({measure.unit})")


def kinds(placed: bool) -> tuple[str, ...]:
    return ("units", "shape") if placed else ("units",)


def cells(test: dict[str, float] | None, digits: int) -> list[Any]:
    if test is None:
        return [None] * 3
    mean, low, high = (f"{round(test[key], digits) + 0.0:.{digits}f}" for key in ("mean", "low", "high"))
    return [f"{mean} ({low} to {high})", test["p"], test["p_adjusted"]]


def name_of(effect: dict[str, Any]) -> str:
    return f"{effect['target']}, {'lesioned' if effect['do'] == 'lesion' else 'stimulated'}"


def phenomena_of(result: Result) -> Table:
    rows: list[list[Any]] = []
    for effect in result.results["effects"]:
        rows.append([name_of(effect)])
        for name, intact in result.results["intact"]["phenomena"].items():
            values = (intact, effect["phenomena"][name], effect["phenomena_random"][name])
            rows.append([name, *(Number(value, 1, " %") for value in values)])
    head = ["phenomenon", "intact", "changed", "random units, mean"]
    return Table(head, rows, f"Minimal pairs of {result.label} by phenomenon, chance 50 %", folded=True)


def warnings_of(found: Sequence[Result]) -> Iterator[str]:
    for r in found:
        if r.results["post_residual"]:
            yield f"{r.label}: sheets show the residual stream; changed is what their branch adds to it."
        if min(r.results["n_items"]) < FEW_ITEMS:
            yield f"{r.label}: the contrast is of fewer than {FEW_ITEMS} items on a side, so it is noisy."
        effects, wanted = r.results["effects"], r.content["protocol"]["cluster"]
        n = len({effect["target"] for effect in effects if effect["target"].startswith("cluster")})
        if wanted is not None and n < wanted:
            yield f"{r.label}: {n} cluster(s), as there are no more."
        for name, places in dict.fromkeys((e["target"], e["n_places"]) for e in effects):
            if places is not None and places < FEW_PLACES:
                yield f"{r.label}: {name} fits in {places} place(s) of its sheet, too few for a small p."


def draw(found: Sequence[Result]) -> Iterator[Drawing]:
    """A row an intervention, a panel a measure: the change, and the range of random sets."""
    rows = [(r, effect, plots.COLOURS[i]) for i, r in enumerate(found) for effect in r.results["effects"]]
    names = measured(found)
    figure = new_figure(1.9 + 2.3 * len(names), 1.3 + 0.27 * len(rows))
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    alpha = found[0].content["protocol"]["alpha"]
    for axis, name in zip(axes, names, strict=True):
        for y, (r, effect, colour) in enumerate(rows):
            of = effect["measures"][name]
            tests = [of[kind]["p_adjusted"] for kind in ("units", "shape") if of[kind]]
            face = colour if tests and max(tests) < alpha else "white"
            if of["change"] is not None:
                axis.plot(of["change"], y, "o", ms=5, mec=colour, mfc=face, label=r.label, zorder=3)
            for kind, grey, dy in (("units", "0.72", -0.13), ("shape", "0.45", 0.13)):
                if of[kind]:
                    where = "as many random units" if kind == "units" else "same shape elsewhere"
                    line = {"color": grey, "lw": 5, "solid_capstyle": "butt", "zorder": 1}
                    axis.plot([of[kind]["low"], of[kind]["high"]], [y + dy] * 2, label=where, **line)
                    axis.plot(of[kind]["mean"], y + dy, "|", color="black", ms=5, zorder=2)
        axis.axvline(0, color=plots.FLOOR, lw=0.8, zorder=0)
        axis.set(title=MEASURES[name].title, xlabel=f"change ({MEASURES[name].unit})")
    axes[0].set_yticks(range(len(rows)), [name_of(effect) for _, effect, _ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    plots.legend(figure, axes)
    yield Drawing(
        "ablate",
        figure,
        "What an intervention changes (circle), beside random sets: their middle 95 % "
        "(bar) and mean (stroke). Filled: "
        f"adjusted p below {alpha:g} against each kind of random set.",
    )


ANALYSIS = Analysis(AblateConfig, analyse, section, draw, order=40, costly=True)

if __name__ == "__main__":
    run_main(ANALYSIS.main)
