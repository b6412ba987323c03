"""The report of a run: one HTML file with its training, its maps, every analysis and an interactive reader.

    python -m evals.report out/topolm --control out/control
    python -m evals.report USER/topolm                    # or an exported folder, without curves

It runs the analyses whose results are missing or of other weights, draws their figures, and writes
evals/report.html inside the run. The file needs nothing but a browser: no network, no other file.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, make_dataclass
from typing import Any, NamedTuple

import evals
from evals.report import overview, page, reader
from evals.report.overview import Model
from evals.report.page import Image, Part
from topogpt.analysis import own_stimuli, section, stimuli
from topogpt.analysis.results import Result, kind_of, read
from topogpt.analysis.section import Analysis
from topogpt.analysis.subject import ELSEWHERE, EvalConfig, load_subjects
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.files import write_text
from topogpt.terminal import say


@dataclass(frozen=True, kw_only=True)
class ReportConfig(EvalConfig):
    """Write the report of a run, one HTML file: python -m evals.report RUN [--control RUN]."""

    redo: bool = False  # run the analyses again, though their results are there
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

    def runs(self, analysis: Analysis) -> bool:
        """Whether the report may run an analysis itself."""
        return not analysis.by_hand and (not analysis.costly or getattr(self, analysis.name))


def config_with(analyses: dict[str, Analysis]) -> type[ReportConfig]:
    """The settings, with a flag for each analysis that takes long: --ablate."""
    costly = [name for name, analysis in analyses.items() if analysis.costly]
    flags, options = [(name, bool, False) for name in costly], {"frozen": True, "kw_only": True}
    made = make_dataclass("ReportConfig", flags, bases=(ReportConfig,), **options)
    what = "too, where missing; hours on a CPU for a model of TopoLM's size"
    said = [f"    {name}: run {name}, {what}" for name in costly]
    made.__module__ = __name__  # so that the comments of the settings above are found for --help
    made.__doc__ = "\n".join([ReportConfig.__doc__, "", "Args:", *said])
    return made


def main(argv: list[str]) -> None:
    analyses = section.discover(evals)
    cfg = parse(config_with(analyses), argv, prog="python -m evals.report")
    subjects = load_subjects(cfg)
    texts = reader.choose_texts(subjects, cfg.texts, cfg.budget, cfg.vocab_dir)
    models = [Model(*named, i) for i, named in enumerate(zip(cfg.sources, subjects, strict=True))]
    found = [shown(cfg, name, analyses[kind_of(name)], models) for name in names(cfg, analyses, models)]
    path = subjects[0].results / "report.html"
    write_text(path, html_of(cfg, models, found, texts))
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


# ---- results of the analyses ---------------------------------------------------------------------


class Shown(NamedTuple):
    """What there is of one analysis."""

    name: str
    analysis: Analysis
    found: list[Result]  # of the model and its control; empty without the model's
    images: list[Image]
    done: list[str]  # what was run, and why
    missing: list[str]

    @property
    def section(self) -> section.Section:
        if not self.found:
            return section.Section(self.name.capitalize(), [])
        return self.analysis.said(self.found)


def names(cfg: ReportConfig, analyses: dict[str, Analysis], models: Sequence[Model]) -> Iterator[str]:
    """Of all results, in order: each analysis, then what a user made with it, such as contrasts-mine."""
    folder = models[0].subject.results
    for name, analysis in analyses.items():
        if not analysis.by_hand or (folder / f"{name}.json").is_file():
            yield name
        yield from sorted(path.stem for path in folder.glob(f"{name}-*.json"))


def shown(cfg: ReportConfig, name: str, analysis: Analysis, models: Sequence[Model]) -> Shown:
    """Results of an analysis, run first where they are missing or stale, and its figures."""
    found, images, done, missing = [], [], [], []
    for model in models:
        try:
            done += make_current(cfg, name, analysis, model)
            found.append(read(model.subject.results, name))
        except UserError as error:
            missing.append(f"{model.label}: no results. {error}")
            if not found:
                break
    if found and cfg.figures:
        try:
            for path, caption, title, alt in section.draw(analysis, found):
                images.append(Image(path.stem, path.read_bytes(), caption, title, alt))
        except UserError as error:
            missing.append(f"The figures were not drawn: {error}")
    for line in done + missing:
        say(f"{name}: {line}")
    return Shown(name, analysis, found, images, done, missing)


def make_current(cfg: ReportConfig, name: str, analysis: Analysis, model: Model) -> list[str]:
    """Run an analysis if there is a reason to, and say the reason."""
    by_hand = analysis.by_hand or name != analysis.name
    reason = why_run(cfg, name, analysis, model, redo=cfg.redo and cfg.runs(analysis) and not by_hand)
    if reason is None:
        return []
    command = f"python -m evals.{analysis.name} {shlex.quote(model.source)}"
    if by_hand:
        raise UserError(f"{reason}; make them again: `{command} --stimuli FILE`")
    if not cfg.runs(analysis):
        raise UserError(
            f"The report does not run {name}, which takes long, unless told so ({reason}); `{command}` or "
            f"--{name} does"
        )
    try:
        settings = {f.name: getattr(cfg, f.name) for f in fields(EvalConfig)}
        analysis.save(analysis.config(**settings), model.subject)
    except UserError as error:
        raise UserError(f"{error} (then `{command}`, or the report again)") from None
    return [f"{model.label}: analysed now, as {reason}."]


def why_run(cfg: ReportConfig, name: str, analysis: Analysis, model: Model, redo: bool) -> str | None:
    if not (model.subject.results / f"{name}.json").is_file():
        return "there were no results"
    if redo:
        return "--redo says so"
    try:
        content = read(model.subject.results, name).content
    except UserError as error:
        return str(error)
    if content["model"]["weights_sha256"] != model.subject.weights_sha256:
        return f"the results were of other weights ({content['model']['checkpoint']})"
    own = {f.name for f in fields(analysis.config)} - {f.name for f in fields(EvalConfig)}
    if unsaid := sorted(own - content["protocol"].keys() - set(ELSEWHERE)):
        return f"the results are of an older version, without {', '.join(unsaid)}"
    if stimuli.is_own(content["data_sha256"]) and not own_stimuli.stand_in(cfg.stimuli_dir):
        return "the results were of our own stimuli"
    if content["model"]["sheets"] != model.subject.sheets:
        return f"the results were of other sheets ({content['model']['sheets'][0]}, ...)"
    if content["protocol"].get("positions") != cfg.positions:
        return f"the results were of other positions ({content['protocol'].get('positions')})"
    return None


# ---- the page ------------------------------------------------------------------------------------


def html_of(cfg: ReportConfig, models: Sequence[Model], found: Sequence[Shown], texts: reader.Texts) -> str:
    import yaml

    sections = [one.section for one in found]
    results = [result for one in found for result in one.found]
    details = []
    for r in results:
        lines = (f"{key}: {json.dumps(value)}" for key, value in r.content["protocol"].items())
        details.append((f"Protocol: {r.content['analysis']} of {r.label}", "\n".join(lines)))
    for m in models:
        if settings := m.subject.settings:
            details.append((f"Settings of {m.label}", yaml.safe_dump(settings, sort_keys=False)))
    return page.render(
        models=models,
        lead=overview.lead(models[0]),
        notes=overview.notes(models),
        cards=[*overview.cards(models), *(card for said in sections for card in said.cards)],
        training=overview.training(models, cfg.figures),
        sections=[
            Part(one.name, said.title, [*one.missing, *said.warnings], said.parts, one.images)
            for one, said in zip(found, sections, strict=True)
        ],
        reader_notes=[f"No held-out text to read: {texts.missing}"] if texts.missing else [],
        reader_data=reader.data([m.subject for m in models], texts, cfg.vocab_dir) if texts.shown else None,
        facts=overview.facts(models),
        results=results,
        done=[f"{one.name}: {line}" for one in found for line in one.done],
        commands=commands(cfg, found),
        details=details,
    )


def commands(cfg: ReportConfig, found: Sequence[Shown]) -> list[str]:
    """Command lines that make the results and the page again."""
    models = shlex.quote(cfg.run) + (f" --control {shlex.quote(cfg.control)}" if cfg.control else "")
    lines = [
        " ".join([f"python -m evals.{one.analysis.name} {models}", *flags(one.analysis.config, one.found[0])])
        for one in found
        if one.found
    ]
    return [*lines, f"python -m evals.report {models}"]


def flags(config: type[EvalConfig], result: Result) -> Iterator[str]:
    """What of a result's protocol is not by default, as flags."""
    for f in fields(config):
        value: Any = result.content["protocol"].get(f.name, MISSING)
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        if value is MISSING or value == default:
            continue
        if isinstance(value, bool):
            yield f"--{'' if value else 'no_'}{f.name}"
        else:
            yield shlex.join([f"--{f.name}", *map(str, value if isinstance(value, list) else [value])])


if __name__ == "__main__":
    run_main(main)
