"""Runs side by side: loss, map, smoothness, dimensionality and what is lost at 20 %, by objective and seed.

    python -m evals.compare out/none-1 out/none-2 out/toponets-1 out/toponets-2 --out out/compare

One table for the terminal, and with --out as markdown, CSV and JSON, with a figure of the gap to the control
(topo.loss none, the same seed, the same everything else) against Moran's I. Sheets are of two kinds: the
outputs of the branches, where TopoLM's loss acts, and those of mlp.c_fc, where losses on weights act. What
was measured on a run lies in its evals/compare.json, so that a second call is quick and one that was
interrupted goes on.
"""

import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from topogpt import drawing, rng, topo
from topogpt.analysis import comparison, measures, sidebyside
from topogpt.analysis.comparison import Comparison, Member
from topogpt.analysis.results import plain
from topogpt.analysis.section import need
from topogpt.analysis.sidebyside import Found, Numbers, Value
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.files import read_json, sha256, write_bytes, write_json, write_text
from topogpt.runs.folder import find_checkpoint, read_metrics, read_state
from topogpt.terminal import duration, say, table

if TYPE_CHECKING:
    from topogpt.analysis.subject import Subject
    from topogpt.text.loader import Corpus

FORMAT = "topogpt-compare-1"
N_LAYOUTS = 8  # of the same units at random, whose smoothness is a sheet's null
SKIP = 1  # first tokens of a window that dimensionality leaves out: they have no context
PROTOCOL = {
    "moran": "of single tokens' maps, raw; mean over maps and sheets; null: white noise on the grid",
    "smooth": "largest - smallest mean correlation of units against distance, mean over sheets; null: the "
    f"same units laid at random, mean of {N_LAYOUTS} layouts",
    "dim": "trace(C)^2 / trace(C^2) of the units' covariance C, mean over layers; null: units shuffled",
    "kept": "cross-entropy with every c_fc resized to a share of its units and back; null: the whole model",
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put runs side by side, by objective and seed: python -m evals.compare RUN RUN ... [--out FOLDER]."""

    runs: tuple[str, ...]  # folders of runs (out/NAME), their controls (topo.loss none) among them
    by: tuple[str, ...] = ()  # settings that make an objective; none: all in which the runs differ
    out: str | None = None  # folder for compare.md, .csv, .json and .png; None: only the table is shown
    checkpoint: str = "best"  # of every run: best, last or step-N
    n_tokens: int = 8192  # validation tokens that are read for all but the validation loss
    n_maps: int = 64  # of them, evenly spaced, whose maps are looked at
    keep: float = 0.2  # share of every c_fc's units that is kept, as compress.py's downsample does
    names: tuple[str, ...] = ("layer.*.fc",)  # activations and modules whose dimensions are counted
    sheets: tuple[str, ...] = ("*",)  # of these sheets, such as layer.3.* or *.mlp
    val_data_dir: tuple[str, ...] = ()  # where the runs' validation shards lie; none: where each run says
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs are missing; give folders of runs, such as out/NAME")
        check_at_least("n_tokens", self.n_tokens, 3)
        check_at_least("n_maps", self.n_maps, 1)
        if not 0 < self.keep <= 1:
            raise UserError(f"keep = {self.keep} must be above 0 and at most 1")
        for name in ("names", "sheets"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; leave --{name} out, or name some")


# ---- what is measured ------------------------------------------------------------------------------------


def protocol_of(cfg: CompareConfig) -> dict[str, Any]:
    """What the numbers depend on besides weights and text."""
    return PROTOCOL | {
        key: plain(getattr(cfg, key)) for key in ("n_tokens", "n_maps", "keep", "names", "sheets")
    }


def layouts_of(own: topo.Layout, others: Iterable[topo.Layout], is_control: bool) -> list[topo.Layout]:
    """Sheets to look at: a run's own, those of c_fc, and of a control those of every other run.

    The branches of a run with one sheet lie on that alone.
    """
    wanted = {own, "c_fc"} | ({"per_branch"} if own != "one_sheet" else set())
    wanted |= set(others) if is_control else set()
    return [layout for layout in topo.LAYOUTS if layout in wanted]


def numbers_of(cfg: CompareConfig, m: Member, folder: Path, layouts: list[topo.Layout]) -> dict[str, Any]:
    """What was measured on a run, now or before; kept in the run."""
    path = Path(m.source) / "evals" / "compare.json"
    wanted = {
        "format": FORMAT,
        "weights_sha256": sha256(folder / "model.safetensors"),
        "val_data_sha256": m.val_text,
        "protocol": protocol_of(cfg),
        "layouts": layouts,
    }
    known = read_json(path)
    if all(known.get(key) == value for key, value in wanted.items()):
        return known
    from topogpt.runs import provenance  # with torch, which takes seconds

    t0 = time.monotonic()
    found = measure(cfg, m, layouts)
    say(f"{m.source}: measured in {duration(time.monotonic() - t0)}")
    numbers = {column: value._asdict() for column, value in found.items()}
    record = wanted | {"step": m.step, "code": provenance.code(), "summary": {}, "numbers": numbers}
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}), so the next call measures {m.source} again")
    return record


def measure(cfg: CompareConfig, m: Member, layouts: Sequence[topo.Layout]) -> Numbers:
    from topogpt.analysis import compression, dimensions, heldout
    from topogpt.analysis.kinds import by_kind
    from topogpt.model import compress

    subject = subject_of(cfg, m)
    model = subject.model
    compress.downsampled_shape(model.cfg.n_hidden, cfg.keep)
    corpus = validation_text(m, subject)
    windows = heldout.windows_of(
        corpus.window(0, min(cfg.n_tokens, corpus.n_tokens)), cfg.n_tokens, model.cfg.block_size
    )
    found: Numbers = {}
    on_sheets = {layout: restricted(subject.on_layout(layout), cfg.sheets) for layout in layouts}
    if not any(on.positions for on in on_sheets.values()):
        raise UserError(
            f"sheets = {' '.join(cfg.sheets)} are none of layer.0.attn, layer.0.mlp, layer.0.fc ..."
        )
    for layout, on in on_sheets.items():
        if on.positions:
            found |= map_of(on, windows, cfg.n_maps, sidebyside.LAYOUTS[layout])
    each = dimensions.measure(subject, windows, cfg.names, SKIP)
    for kind, names in by_kind(each).items():
        values = [(each[name].value, each[name].shuffled) for name in names]
        found[f"dim {kind}"] = Value(*np.mean(values, axis=0).tolist())
    small = compress.downsample(model, cfg.keep).model
    whole, kept = (compression.cross_entropy(x, corpus, cfg.n_tokens) for x in (model, small))
    return found | {f"loss at {100 * cfg.keep:g} %": Value(kept, whole)}


def subject_of(cfg: CompareConfig, m: Member) -> "Subject":
    from topogpt.analysis.subject import Subject
    from topogpt.distributed import pick_device
    from topogpt.runs.checkpoint import load_run

    run = load_run(Path(m.source), cfg.checkpoint, pick_device(cfg.device))
    settings = run.state["config"] | ({"val_data_dir": cfg.val_data_dir} if cfg.val_data_dir else {})
    return Subject(m.source, run.model, run.positions, Path(m.source) / "evals", run.folder, settings, "")


def validation_text(m: Member, subject: "Subject") -> "Corpus":
    """The shards that the run was validated on."""
    from topogpt.text.loader import open_corpus

    patterns, cfg, key = subject.settings["val_data_dir"], subject.model.cfg, f"val_data_dir of {m.source}"
    try:
        corpus = open_corpus(patterns, key=key, vocab_size=cfg.vocab_size, log=lambda line: None)
        corpus.n_windows(cfg.block_size)
    except UserError as error:
        raise UserError(f"{error}; or say where they lie: --val_data_dir") from None
    if comparison.FINGERPRINT.fullmatch(m.val_text) and corpus.fingerprint != m.val_text:
        raise UserError(
            f"{key}: {' '.join(patterns)} is not the text that its loss is of; say where that lies: "
            "--val_data_dir"
        )
    return corpus


def restricted(subject: "Subject", patterns: Sequence[str]) -> "Subject":
    """With those of its sheets alone that the patterns name."""
    at = {s: p for s, p in subject.positions.items() if any(fnmatchcase(s, q) for q in patterns)}
    return subject._replace(positions=at)


def map_of(subject: "Subject", windows: np.ndarray, n_maps: int, name: str) -> Numbers:
    """Moran's I and smoothness, means over sheets, beside their nulls, in columns of this name."""
    from topogpt.analysis import nulls, reading
    from topogpt.analysis.covariance import correlations_of

    h, w = subject.grid
    statistics = reading.collect(subject, windows, n_maps)
    morans = [nulls.moran(grids, 0.0) for grids in statistics.maps]
    smooth = [smoothness(correlations_of(c), h, w) for c in statistics.covariance.values()]
    return {
        f"I {name}": Value(float(np.mean([m.value for m in morans])), morans[0].floor),
        f"smooth {name}": Value(*np.mean(smooth, axis=0).tolist()),
    }


def smoothness(correlation: np.ndarray, h: int, w: int) -> Value:
    """Of a sheet (h w, h w), and of the same units laid at random."""

    def of(order: np.ndarray) -> float:
        return measures.smoothness_correlation(measures.curve(correlation[order][:, order], h, w))

    at_random = [of(rng.permutation(h * w, 0, "smoothness", k)) for k in range(N_LAYOUTS)]
    return Value(of(np.arange(h * w)), float(np.mean(at_random)))


# ---- the command -----------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    cfg = parse(CompareConfig, argv, prog="python -m evals.compare")
    check_once(cfg.runs)
    folders = {source: open_run(source, cfg.checkpoint) for source in cfg.runs}
    states = {source: read_state(folder) for source, folder in folders.items()}
    members = [comparison.member(s, state, read_metrics(Path(s), "val")) for s, state in states.items()]
    compared = comparison.compare(members, cfg.by)
    own = {s: state["config"]["topo"].get("layout", "per_branch") for s, state in states.items()}
    if any(len(o.members) > 2 for o in compared.objectives):
        need("scipy")  # for the intervals
    if cfg.out:
        make_folder(Path(cfg.out))
    records = {}
    for m in members:
        layouts = layouts_of(own[m.source], own.values(), m.is_control)
        records[m.source] = numbers_of(cfg, m, folders[m.source], layouts)
    found = collect(cfg, compared, records)
    head, rows = sidebyside.head_of(found), sidebyside.rows_of(found)
    say(table(head, rows))
    notes = sidebyside.notes(found)
    for line in [*(textwrap.fill(note, 110) for note in notes), *compared.warnings]:
        say(line)
    if cfg.out:
        said = [
            sidebyside.markdown(head, rows),
            "",
            *(f"- {line}" for line in [*notes, *compared.warnings]),
            "",
        ]
        write(Path(cfg.out), found, "\n".join(said))


def collect(cfg: CompareConfig, compared: Comparison, records: Mapping[str, dict[str, Any]]) -> Found:
    """What the runs' records say, put together."""
    numbers = {s: {k: Value(**v) for k, v in record["numbers"].items()} for s, record in records.items()}
    columns = list(dict.fromkeys(column for found in numbers.values() for column in found))
    origins = {s: {key: record[key] for key in ("weights_sha256", "code")} for s, record in records.items()}
    return Found(compared, numbers, sidebyside.in_order(columns), protocol_of(cfg), origins)


def write(out: Path, found: Found, said: str) -> None:
    """compare.md, .csv and .json in a folder; and .png, where there is a gap to draw, and matplotlib."""
    written = {kind: out / f"compare.{kind}" for kind in ("md", "csv", "json", "png")}
    now = {"format": FORMAT, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_text(written["md"], said)
    write_text(written["csv"], sidebyside.csv_of(found))
    write_json(written["json"], plain(now | sidebyside.content_of(found)))
    if find_spec("matplotlib") is None:
        say("no figure: matplotlib is not installed (pip install matplotlib)")
    if find_spec("matplotlib") is None or not found.comparison.controls:
        written["png"].unlink(missing_ok=True)  # of other runs
        del written["png"]
    else:
        drawing.save(sidebyside.draw(found), written["png"])
    for path in written.values():
        say(f"written: {path}")


def check_once(runs: Sequence[str]) -> None:
    there: dict[Path, str] = {}
    for source in runs:
        path = Path(source).resolve()
        if path in there:
            raise UserError(f"runs: {there[path]} and {source} are one run; give it once")
        there[path] = source


def make_folder(out: Path) -> None:
    """What would fail once everything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / ".compare", b"")
        (out / ".compare").unlink()
    except OSError as error:
        raise UserError(f"out = {out} cannot be written: {error.strerror}; choose another --out") from None


def open_run(source: str, checkpoint: str) -> Path:
    """Folder of a run's checkpoint."""
    run = Path(source)
    if (run / "topography.json").is_file() and not (run / "checkpoints").is_dir():
        raise UserError(
            f"{source} is an exported folder, without seed or control; give the run it is of: out/NAME"
        )
    return find_checkpoint(run, checkpoint)


if __name__ == "__main__":
    run_main(main)
