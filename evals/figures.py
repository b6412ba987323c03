"""Draw the figures of all analyses again, PNG and SVG, from their JSON and array files alone.

python -m evals.figures out/topolm [--control out/control]
"""

from dataclasses import dataclass
from pathlib import Path

import evals
from topogpt.analysis import section
from topogpt.analysis.results import kind_of, read
from topogpt.analysis.subject import results_folder
from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.terminal import say


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """Draw the figures of all analyses of a run again: python -m evals.figures RUN [--control RUN]."""

    run: str  # a run, an exported folder, or a name on the Hub that was analysed here
    control: str | None = None  # its control, drawn beside it
    results_dir: str | None = None  # folder of the results; None: evals/ inside the run or folder


def main(argv: list[str]) -> None:
    cfg = parse(FiguresConfig, argv, prog="python -m evals.figures")
    folder = Path(cfg.results_dir) if cfg.results_dir else results_folder(cfg.run)
    control, analyses = results_folder(cfg.control) if cfg.control else None, section.discover(evals)
    there = [path.stem for path in sorted(folder.glob("*.json")) if kind_of(path.stem) in analyses]
    if not there:
        raise UserError(
            f"{folder} holds no results to draw; make some, such as `python -m evals.topography {cfg.run}`"
        )
    for name in there:
        beside = [control] if control and (control / f"{name}.json").is_file() else []
        for picture in section.draw(analyses[kind_of(name)], [read(f, name) for f in (folder, *beside)]):
            say(str(picture.path))
            say(str(picture.path.with_suffix(".svg")))


if __name__ == "__main__":
    run_main(main)
