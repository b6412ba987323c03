"""What a run writes down: metrics.jsonl (the record), log.txt, lines or a bar on screen, a copy on wandb."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from topogpt.errors import UserError, silence
from topogpt.files import write_bytes
from topogpt.runs.folder import record_of
from topogpt.settings import TrainConfig


class RunLog:
    """Writes on the main rank; on the others every call does nothing.

    A file that cannot be written (a full disk) stops no call: `trouble` says so, and the loop saves and ends.
    """

    def __init__(
        self, run: Path, is_main: bool, step: int, max_steps: int, evaluated_at: int | None = None
    ) -> None:
        """Open the log of a run at `step` (-1: before the first) whose last evaluation was at `evaluated_at`;
        what a killed run wrote beyond these is dropped.
        """
        self.is_main, self.run = is_main, run
        self.wandb: Any = None
        self.said: set[str] = set()
        self.trouble: str | None = None
        if not is_main:
            return
        try:
            n_broken = clean(run / "metrics.jsonl", step, -1 if evaluated_at is None else evaluated_at)
            self.metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
            self.text = (run / "log.txt").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename} cannot be written: {error.strerror}; make room") from None
        self.bar = tqdm(
            total=max_steps,
            initial=max(step, 0),
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format="step {n_fmt}/{total_fmt}{postfix}",
            dynamic_ncols=True,
        )
        if n_broken:
            self.say(f"note: {n_broken} damaged lines of metrics.jsonl are now in metrics.damaged.txt")

    @contextlib.contextmanager
    def writing(self, what: Path | str) -> Iterator[None]:
        """Take note of what cannot be written."""
        try:
            yield
        except OSError as error:
            self.trouble = self.trouble or f"{what} cannot be written: {error.strerror or error}"

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint counts on them."""
        if self.is_main:
            with self.writing(self.run / "metrics.jsonl"):
                self.metrics.flush()  # what could not be written before, too
                os.fsync(self.metrics.fileno())

    def say(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.is_main:
            self.write(line)
            with shown_on(sys.stdout):
                print(line, flush=True) if self.bar.disable else self.bar.write(line)

    def say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def write(self, line: str) -> None:
        with self.writing(self.run / "log.txt"):
            self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self.text.flush()

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl, and copy its numbers to wandb, those of each sheet too."""
        if not self.is_main:
            return
        with self.writing(self.run / "metrics.jsonl"):
            self.metrics.write(json.dumps(strict(values), allow_nan=False) + "\n")
            self.metrics.flush()
        if self.wandb is not None:
            self.mirror(lambda: self.wandb.log(curves(values), values["step"]))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Copy a picture to wandb."""

        def copy() -> None:
            import wandb

            self.wandb.log({name: wandb.Image(str(path))}, step)

        if self.is_main and self.wandb is not None:
            self.mirror(copy)

    def advance(self, step: int, line: str) -> None:
        """Move the bar to `step`, or print the line where nobody watches a bar."""
        if not self.is_main:
            return
        if self.bar.disable:
            self.say(line)
        else:
            self.write(line)
            with shown_on(sys.stderr):
                self.bar.set_postfix_str(short(line), refresh=False)
                self.bar.update(step - self.bar.n)

    def start_wandb(self, cfg: TrainConfig, run_id: str | None) -> str | None:
        """Start the copy on wandb and return the run's id there; a failure is said and does no harm."""
        if not self.is_main:
            return run_id

        def begin() -> str:
            import wandb

            self.wandb = wandb.init(
                project=cfg.wandb_project,
                name=cfg.run_name,
                id=run_id,
                resume="allow",
                config=dataclasses.asdict(cfg),
                dir=str(self.run),
            )
            return self.wandb.id

        return self.mirror(begin) or run_id

    def mirror(self, call: Any) -> Any:
        """Do something with wandb; where it fails, say so once and go on without it."""
        try:
            return call()
        except Exception as error:  # wandb may fail in any way it likes; the run must not
            self.wandb = None
            self.say(
                f"wandb: {type(error).__name__}: {error}; going on without it, metrics.jsonl has everything"
            )
            return None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_main:
            self.bar.close()
            if self.wandb is not None:
                self.mirror(self.wandb.finish)
            for file in (self.metrics, self.text):
                with self.writing(file.name):
                    file.close()


@contextlib.contextmanager
def shown_on(stream: TextIO) -> Iterator[None]:
    """Whoever read the stream may be gone, such as the tee that Ctrl-C ended too: log.txt has it all."""
    try:
        yield
    except OSError:
        silence(stream.fileno())


def short(line: str) -> str:
    """A training step's line as the bar shows it: 80 columns, the one ETA first, the least needed out."""
    parts = line.split("  ")[1:]
    kept = [p for p in parts[:-1] if not p.startswith(("lr ", "grad norm", "MFU")) and not p.endswith("GB")]
    return "  ".join([*parts[-1:], *kept])[:58]


def curves(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by the names of their curves: val/moran, val/moran_by_sheet/layer.0.attn."""
    found = {}
    for key, value in values.items():
        nested = value if isinstance(value, Mapping) else {"": value}
        for inner, number in nested.items():
            if isinstance(number, int | float) and key != "step":
                found["/".join(filter(None, [values["split"], key, inner]))] = number
    return found


def strict(values: Any) -> Any:
    """As JSON has it: no number is not finite, but null."""
    if isinstance(values, Mapping):
        return {key: strict(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def clean(metrics: Path, step: int, evaluated_at: int) -> int:
    """Keep the lines up to `step`, and evaluations up to `evaluated_at`, as a later one is made again.

    Damaged lines are moved aside; returns their number.
    """
    if not metrics.exists():
        return 0
    lines = [line + b"\n" for line in metrics.read_bytes().split(b"\n") if line.strip()]
    records = [record_of(line) for line in lines]
    broken = [line for line, record in zip(lines, records, strict=True) if record is None]
    if broken:
        with metrics.with_name("metrics.damaged.txt").open("ab") as file:
            file.writelines(broken)
    ends = {"val": evaluated_at}
    pairs = zip(lines, records, strict=True)
    kept = (line for line, r in pairs if r and r["step"] <= ends.get(r.get("split"), step))
    write_bytes(metrics, b"".join(kept))
    return len(broken)
