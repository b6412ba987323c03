"""The run folder: its layout, and files that are whole or not there.

    out/RUN/config.yaml  provenance.json  metrics.jsonl  log.txt  maps/
    out/RUN/checkpoints/step-000500/   model.safetensors, optimizer.pt, state.json (checkpoint.py)
    out/RUN/best, out/RUN/last         links to two of them
    out/RUN/.lock                      while a process writes here (lock.py)

Nothing here imports torch, so that preflight.py can look into a run at once.
"""

import json
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from topogpt.errors import UserError
from topogpt.files import similar
from topogpt.runs import lock
from topogpt.runs.seal import read_state
from topogpt.runs.state import TrainState


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def check_there(run: Path) -> None:
    if not run.is_dir():
        otherwise = "give the folder of a run, such as out/NAME"
        raise UserError(f"run {run} does not exist; {similar(run, otherwise)}")


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """Folder of a run's checkpoint; `which` is best, last or step-N."""
    check_there(run)
    if which.startswith("step-"):
        folder = step_folder(run, int(which[5:])) if which[5:].isdecimal() else run / "checkpoints" / which
    elif which in ("best", "last"):
        folder = run / which
    else:
        raise UserError(f"checkpoint = {which} is not best, last or step-N")
    if not folder.is_dir():
        there = ", ".join(p.name for p in complete(run)) or "none"
        raise UserError(f"run {run} has no checkpoint {which}; it has: {there}")
    return folder


def read_metrics(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Records in metrics.jsonl, of a split or all, null as NaN; none without a file.

    Lines that are no records are counted, and that is said; not the last one, which a run may be writing.
    """
    try:
        *lines, last = (run / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{run / 'metrics.jsonl'} cannot be read: {error.strerror}") from None
    records = [record_of(line) for line in lines if line.strip()]
    if broken := records.count(None):
        note(f"note: {run / 'metrics.jsonl'}: {broken} of {len(records)} lines are damaged and left out")
    found = [record for record in [*records, record_of(last)] if record]
    return [record for record in found if split in (None, record.get("split"))]


def record_of(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, null as NaN; None where it is no record of a step."""
    try:
        record = json.loads(line, object_hook=with_nan)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


@cache
def note(line: str) -> None:
    """Say something once."""
    print(line, file=sys.stderr, flush=True)


def read_maps(run: Path, step: int) -> dict[str, np.ndarray] | None:
    """Maps of single tokens at an evaluation, sheet -> (n_maps, h, w); None where they were not kept."""
    path = run / "maps" / f"step-{step:06d}.npz"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
        if not found or len({a.shape for a in found.values()}) > 1 or next(iter(found.values())).ndim != 3:
            raise ValueError("not the maps of sheets")
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"maps {path} are damaged: {' '.join(str(error).split())}; delete the file to go on without them"
        ) from None
    return found


def prune(run: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest keep_last and `best`, and what killed runs left half written."""
    best = (run / "best").resolve()
    for old in complete(run)[:-keep_last]:
        if old.resolve() != best:
            doomed = old.with_name(f".{old.name}.tmp")
            old.rename(doomed)  # so that a kill in the middle of the deletion leaves no half checkpoint
    for doomed in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(doomed)


def complete(run: Path) -> list[Path]:
    """Checkpoints of a run that have their final name, oldest first; step-000012.bak is none."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted((p for p in found if p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest(run: Path) -> Path | None:
    """The checkpoint to resume from: the newest whose state.json is whole, or that is at least there."""
    there = complete(run)[::-1]
    return next((folder for folder in there if is_readable(folder)), (there or [None])[0])


def is_readable(folder: Path) -> bool:
    try:
        return bool(read_state(folder))
    except UserError:
        return False


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint, so that it is none any more: step-000012.damaged; a person may delete it."""
    names = (f"{folder.name}.{why}" + (f"-{n}" if n else "") for n in range(10**6))
    return folder.rename(next(p for name in names if not (p := folder.with_name(name)).exists()))


def point(link: Path, target: Path) -> None:
    """Set a relative link, atomically; `cp -rL` has made a folder of the link before."""
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    part = link.with_name(f".{link.name}.tmp")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    part.replace(link)


def restore_links(run: Path, state: TrainState) -> None:
    """Set `last` and `best` as they were when the newest checkpoint was written, if a kill came before.

    Where the best one is gone (the one that followed it was left out, being damaged), it is the one that is
    resumed from, or the next to be evaluated.
    """
    for name in ("best", "last"):
        keep_copy(run, run / name)
    point(run / "last", step_folder(run, state.step))
    if state.best_step is not None and not step_folder(run, state.best_step).is_dir():
        evaluated = state.evaluated_at == state.step
        state.best_cross_entropy = state.last_cross_entropy if evaluated else None
        state.best_step = state.step if evaluated else None
    if state.best_step is not None:
        point(run / "best", step_folder(run, state.best_step))
    elif (run / "best").is_symlink():
        (run / "best").unlink()


def keep_copy(run: Path, link: Path) -> None:
    """What `cp -rL` has made of a link goes to the checkpoints, if the one it is a copy of is not there."""
    if link.is_dir() and not link.is_symlink() and is_readable(link):
        own = step_folder(run, read_state(link)["train_state"]["step"])
        if not own.exists():
            link.rename(own)


def clear(run: Path) -> None:
    """Delete what is in a run's folder, but for its lock."""
    for path in run.iterdir():
        if path.name != lock.NAME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_empty(run: Path) -> bool:
    """Whether there is nothing in the folder of a run, or only its lock."""
    return not run.exists() or run.is_dir() and all(path.name == lock.NAME for path in run.iterdir())
