"""An analysis in one file: what it brings, how it is found, and what `python -m evals.NAME` does.

    ANALYSIS = Analysis(Config, analyse, section, draw)       # at the end of evals/NAME.py

Nothing else names it: the terminal, the report with its navigation, the figures and the model card find it.
`section` returns plain data, which the terminal shows as tables and the report as a page.
"""

import importlib
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from topogpt.analysis import results, stimuli
from topogpt.analysis.matching import notes
from topogpt.analysis.results import Outcome, Result
from topogpt.analysis.subject import EvalConfig, Subject, load_subjects
from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.terminal import print_table, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---- what a section is made of -------------------------------------------------------------------


class Number(NamedTuple):
    """A number as tables show it."""

    value: float | None
    digits: int = 3
    unit: str = ""
    spread: float | None = None  # +- this

    def __str__(self) -> str:
        if self.value is None or not math.isfinite(self.value):
            return "-"
        text = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:.{self.digits}f}"
        spread = "" if self.spread is None else f" +- {self.spread:.{self.digits}f}"
        return text + spread + self.unit


class Label(str):
    """Text about one of the models: the page puts the colour of its lines before it."""

    model: int  # 0: the model, 1: its control

    def __new__(cls, text: str, model: int) -> "Label":
        made = super().__new__(cls, text)
        made.model = model
        return made


def labels(found: Sequence[Result], about: str = "") -> list[Label]:
    """A column's name for each model."""
    return [Label(result.label + about, i) for i, result in enumerate(found)]


Cell = str | int | float | Number | None


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]  # a row of one cell is a heading of those below
    title: str = ""
    explanations: Sequence[str] = ()  # of each row, on the page
    folded: bool = False  # details, for the page alone: shown when they are asked for


class Card(NamedTuple):
    """A number to look at first, beside what it is compared with."""

    name: str
    what: str  # of what, and in which unit
    values: Sequence[float | None]  # of the model, and of its control
    beside: dict[str, float]
    digits: int = 3
    unit: str = ""
    grey: str = ""  # why its null does not allow it as a finding; it is shown grey, with this


class Section(NamedTuple):
    """What an analysis says: plain data."""

    title: str
    parts: Sequence[str | Table]  # paragraphs, which the terminal leaves out, and tables
    warnings: Sequence[str] = ()
    cards: Sequence[Card] = ()


class Drawing(NamedTuple):
    stem: str  # of its files
    figure: "Figure"
    caption: str
    title: str = ""  # the page folds it under this


class Picture(NamedTuple):
    """A drawing that lies in a file."""

    path: Path  # PNG
    caption: str
    title: str
    alt: str  # what is seen on it


# ---- an analysis ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """All there is to an analysis; results are of the model, then of its control if there is one."""

    config: type[EvalConfig]
    analyse: Callable[[Any, Subject], Outcome]
    section: Callable[[Sequence[Result]], Section]
    draw: Callable[[Sequence[Result]], Iterable[Drawing]] | None = None
    order: int = 100  # of its section in the report; the same: by name
    costly: bool = False  # the report runs it only when told so, by a flag of its name
    by_hand: bool = False  # it needs to be told what to look at: the report shows it where it was run

    def __post_init__(self) -> None:
        """An analysis's own settings come first in --help, then those that it shares."""
        by_place = self.config.__dataclass_fields__
        own = [name for kind in self.config.__mro__ for name in getattr(kind, "__annotations__", ())]
        ordered = {name: by_place[name] for name in dict.fromkeys(own) if name in by_place}
        by_place.clear()
        by_place.update(ordered)

    @property
    def name(self) -> str:
        """Its file's."""
        return Path(sys.modules[self.config.__module__].__file__).stem

    def save(self, cfg: EvalConfig, subject: Subject) -> str:
        """Analyse and write; return the name of the results."""
        name = f"{self.name}-{cfg.variant}" if cfg.variant else self.name
        results.save(name, subject, self.analyse(cfg, subject))
        return name

    def said(self, found: Sequence[Result]) -> Section:
        """Its section, with a note where its stimuli are our own."""
        made = self.section(found)
        own = any(stimuli.is_own(result.content["data_sha256"]) for result in found)
        return made._replace(warnings=[stimuli.OWN_NOTE, *made.warnings]) if own else made

    def main(self, argv: list[str]) -> None:
        """For the model, then its control, analyse and save; print the tables; draw."""
        cfg, found = parse(self.config, argv, prog=f"python -m evals.{self.name}"), []
        subjects = load_subjects(cfg)
        for line in notes(subjects):
            say(f"note: {line}")
        for subject in subjects:
            found.append(results.read(subject.results, self.save(cfg, subject)))
        show(self.said(found))
        say(f"numbers: {found[0].folder / found[0].content['analysis']}.json")
        for picture in draw(self, found) if cfg.figures else ():
            for path in (picture.path, picture.path.with_suffix(".svg")):
                say(f"figure:  {path}")


def discover(package: ModuleType) -> dict[str, Analysis]:
    """The analyses of a package, by name, in their order: files that set ANALYSIS; no other is imported."""
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        path = Path(module.module_finder.path, f"{module.name}.py")
        if path.is_file() and re.search(r"^ANALYSIS\b", path.read_text(encoding="utf-8"), re.M):
            found[module.name] = importlib.import_module(f"{package.__name__}.{module.name}").ANALYSIS
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def draw(analysis: Analysis, found: Sequence[Result]) -> list[Picture]:
    """Draw an analysis into the model's folder, PNG and SVG of each figure."""
    if analysis.draw is None:
        return []
    need("matplotlib")
    import matplotlib

    from topogpt import drawing
    from topogpt.analysis.plots import STYLE

    pictures = []
    with matplotlib.rc_context(STYLE):
        for stem, figure, caption, title in analysis.draw(found):
            figure.draw_without_rendering()  # finds the layout, once for both files
            figure.set_layout_engine("none")
            path = found[0].folder / f"{stem}.png"
            drawing.save(figure, path)
            drawing.save(figure, path.with_suffix(".svg"), metadata={"Date": None})
            pictures.append(Picture(path, caption, title, drawing.in_words(figure)))
    return pictures


def show(section: Section) -> None:
    """The tables of a section on the terminal, with their titles, and its warnings."""
    for part in section.parts:
        if isinstance(part, Table) and not part.folded:
            if part.title:
                say(f"{part.title}:")
            print_table(part.head, part.rows)
    for warning in section.warnings:
        say(warning)


def need(*packages: str) -> None:
    """Say in one line which package of the `evals` extra is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install -e '.[evals]' -c constraints.txt")
