"""The report of a run: one HTML file with its training, its maps, every analysis and an interactive reader.

    python -m evals.report out/topolm --control out/control
    python -m evals.report USER/topolm                    # or an exported folder, without curves

It runs the analyses whose results are missing or of other weights, draws their figures, and writes
evals/report.html inside the run. The file needs nothing but a browser: no network, no other file.
"""

import importlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from evals import figures, overview, page, reader
from evals.common import EvalConfig, Subject, load_subject, read, save
from evals.findings import FINDINGS
from evals.overview import Model, Section
from evals.page import Html, join, shown
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.files import write_text
from topogpt.terminal import say

ANALYSES = {  # module and settings
    "topography": ("evals.topography", "TopographyConfig"),
    "contrasts": ("evals.contrasts", "ContrastsConfig"),
    "localize": ("evals.localize", "LocalizeConfig"),
    "ablate": ("evals.ablate", "AblateConfig"),
}
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(EvalConfig):
    """Write the report of a run, one HTML file: python -m evals.report RUN [--control RUN]."""

    redo: bool = False  # run the analyses again, though their results are there
    ablate: bool = False  # run the lesions, too, where missing; hours on a CPU for a model of TopoLM's size
    texts: tuple[str, ...] = ()  # .txt files for the reader, instead of held-out text
    reader_tokens: int | None = None  # of each text in the reader; None: 64, with a control 40
    sample_tokens: int = 8192  # of held-out text, for each unit's mean, deviation and top tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sample_tokens", self.sample_tokens, 2)
        if self.sample_tokens > 1 << 16:
            raise UserError(f"sample_tokens = {self.sample_tokens} must be at most {1 << 16}")
        if self.reader_tokens is not None:
            check_at_least("reader_tokens", self.reader_tokens, 2)

    @property
    def budget(self) -> reader.Budget:
        return reader.Budget(self.reader_tokens or (64 if self.control is None else 40), self.sample_tokens)


def main(argv: list[str]) -> None:
    cfg = parse(ReportConfig, argv, prog="python -m evals.report")
    subjects = [load_subject(cfg, source) for source in cfg.sources]
    check_matched(subjects)
    texts = reader.choose_texts(subjects, cfg.texts, cfg.budget, cfg.vocab_dir)
    models = [Model(*pair) for pair in zip(cfg.sources, subjects, strict=True)]
    own = sorted(path.stem for path in subjects[0].results.glob("contrasts-*.json"))  # of the user's stimuli
    found = {name: section_of(cfg, name, models) for name in [*ANALYSES, *own]}
    path = subjects[0].results / "report.html"
    write_text(path, html_of(cfg, models, found, texts))
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check_matched(subjects: Sequence[Subject]) -> None:
    """The reader shows both on the same tokens and sheets."""
    for key in ("n_layer", "n_embd", "vocab_size"):
        values = [getattr(s.model.cfg, key) for s in subjects]
        if len(set(values)) > 1:
            raise UserError(
                f"{subjects[0].label} has {key} {values[0]}, but control {subjects[1].label} has "
                f"{values[1]}; give its matched control"
            )


# ---- results of the analyses ---------------------------------------------------------------------


def section_of(cfg: ReportConfig, name: str, models: Sequence[Model]) -> Section:
    """Results of an analysis, run first where they are missing or stale, and its figures drawn."""
    contents, done, missing = [], [], []
    for model in models:
        try:
            done += make_current(cfg, name, model)
            contents.append(read(model.subject.results, name))
        except UserError as error:
            missing.append(f"{model.subject.label}: no results. {error}")
            if not contents:
                break
    if contents and cfg.figures:
        try:
            figures.draw(name, *(model.subject.results for model in models[: len(contents)]))
        except UserError as error:
            missing.append(f"The figures were not drawn: {error}")
    for line in done + missing:
        say(f"{name}: {line}")
    return Section(contents, done, missing)


def make_current(cfg: ReportConfig, name: str, model: Model) -> list[str]:
    """Run an analysis if there is a reason to, and say the reason."""
    reason = why_run(cfg, name, model)
    if reason is None:
        return []
    command = f"python -m evals.{name} {shlex.quote(model.source)}"
    if name == "ablate" and not cfg.ablate:
        raise UserError(f"The report runs no lesions unless told so ({reason}); `{command}` or --ablate does")
    if name not in ANALYSES:
        raise UserError(
            f"{reason}; make them again: `python -m evals.contrasts {model.source} --stimuli FILE`"
        )
    module, config = ANALYSES[name]
    module = importlib.import_module(module)
    try:
        settings = {f.name: getattr(cfg, f.name) for f in fields(EvalConfig)}
        save(name, model.subject, module.analyse(getattr(module, config)(**settings), model.subject))
    except UserError as error:
        raise UserError(f"{error} (then `{command}`, or the report again)") from None
    return [f"{model.subject.label}: analysed now, as {reason}."]


def why_run(cfg: ReportConfig, name: str, model: Model) -> str | None:
    if not (model.subject.results / f"{name}.json").is_file():
        return "there were no results"
    if cfg.redo and (name != "ablate" or cfg.ablate):
        return "--redo says so"
    try:
        content = read(model.subject.results, name)
    except UserError as error:
        return str(error)
    if content["model"]["weights_sha256"] != model.subject.weights_sha256:
        return f"the results were of other weights ({content['model']['checkpoint']})"
    if content["protocol"].get("positions") != cfg.positions:
        return f"the results were of other positions ({content['protocol'].get('positions')})"
    return None


# ---- the page ------------------------------------------------------------------------------------


def html_of(
    cfg: ReportConfig, models: Sequence[Model], found: dict[str, Section], texts: reader.Texts
) -> str:
    parts = {
        "TITLE": shown(f"{models[0].subject.label}: report"),
        "HEAD": overview.head(models, found),
        "TRAINING": overview.training(models, found),
        "ANALYSES": join(
            page.section(
                name,
                title_of(name),
                page.notes(section.missing),
                FINDINGS[figures.kind_of(name)][1](section.contents, models[0].subject.results)
                if section.contents
                else "",
            )
            for name, section in found.items()
        ),
        "READER_NOTE": page.notes([f"No held-out text to read: {texts.missing}"] if texts.missing else []),
        "READER_DATA": reader_data(cfg, [model.subject for model in models], texts),
        "PROVENANCE": overview.provenance(models, found, commands(cfg, found)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"<!-- ([A-Z_]+) -->", lambda match: parts[match[1]], template)  # one pass: never refilled


def title_of(name: str) -> str:
    kind, _, own = name.partition("-")
    return f"{FINDINGS[kind][0]}: {own}" if own else FINDINGS[kind][0]


def reader_data(cfg: ReportConfig, subjects: Sequence[Subject], texts: reader.Texts) -> Html:
    """JSON for the page's script, null without texts; `<` is escaped, so that nothing ends its element."""
    data = reader.data(subjects, texts, cfg.vocab_dir) if texts.shown else None
    return Html(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def commands(cfg: ReportConfig, found: dict[str, Section]) -> list[str]:
    """Command lines that make the results and the page again."""
    models = shlex.quote(cfg.run) + (f" --control {shlex.quote(cfg.control)}" if cfg.control else "")
    lines = []
    for name in (n for n in found if found[n].contents):
        own = found[name].contents[0]["protocol"]["stimuli"] if name not in ANALYSES else None
        of_own = f" --stimuli {shlex.quote(own)}" if own else ""
        lines.append(f"python -m evals.{figures.kind_of(name)} {models}{of_own}")
    return [*lines, f"python -m evals.report {models}"]


if __name__ == "__main__":
    run_main(main)
