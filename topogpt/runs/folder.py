"""The run folder: its layout, and files that are whole or not there.

    out/RUN/config.yaml  provenance.json  metrics.jsonl  log.txt  maps/
    out/RUN/checkpoints/step-000500/   model.safetensors, optimizer.pt, state.json (checkpoint.py)
    out/RUN/best, out/RUN/last         links to two of them

Nothing here imports torch, so that preflight.py can look into a run at once.
"""

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from topogpt.errors import UserError
from topogpt.files import similar
from topogpt.runs.state import TrainState

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "state.json")


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """Folder of a run's checkpoint; `which` is best, last or step-N."""
    if not run.is_dir():
        otherwise = "give the folder of a run, such as out/NAME"
        raise UserError(f"run {run} does not exist; {similar(run, otherwise)}")
    if which.startswith("step-"):
        folder = step_folder(run, int(which[5:])) if which[5:].isdigit() else run / "checkpoints" / which
    elif which in ("best", "last"):
        folder = run / which
    else:
        raise UserError(f"checkpoint = {which} is not best, last or step-N")
    if not folder.is_dir():
        there = ", ".join(p.name for p in complete(run)) or "none"
        raise UserError(f"run {run} has no checkpoint {which}; it has: {there}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint: config, data fingerprint, train_state."""
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {folder} is incomplete: {missing[0]} is missing; use another checkpoint")
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"checkpoint {folder} is damaged: state.json: {error}; use another checkpoint"
        ) from None


def read_metrics(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Records in metrics.jsonl, of a split or all, up to a line that a kill cut off; none without a file."""
    records = []
    try:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            records.append(json.loads(line))
    except (OSError, ValueError):
        pass  # what was read until there counts
    return [record for record in records if split in (None, record.get("split"))]


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
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"maps {path} are damaged: {' '.join(str(error).split())}; delete the file to go on without them"
        ) from None
    return found


def prune(run: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest keep_last and `best`, and what killed runs left half written."""
    best = (run / "best").resolve()
    for old in complete(run)[:-keep_last]:
        if old != best:
            doomed = old.with_name(f".{old.name}.tmp")
            old.rename(doomed)  # so that a kill in the middle of the deletion leaves no half checkpoint
    for doomed in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(doomed)


def complete(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(
        (run / "checkpoints").resolve().glob("step-*"), key=lambda p: int(p.name.removeprefix("step-"))
    )


def newest(run: Path) -> Path | None:
    """The checkpoint to resume from."""
    return (complete(run) or [None])[-1]


def point(link: Path, target: Path) -> None:
    """Set a relative link, atomically."""
    part = link.with_name(f".{link.name}.tmp")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    part.replace(link)


def restore_links(run: Path, state: TrainState) -> None:
    """Set `last` and `best` as they were when the newest checkpoint was written, if a kill came before."""
    point(run / "last", step_folder(run, state.step))
    if state.best_step is not None and step_folder(run, state.best_step).is_dir():
        point(run / "best", step_folder(run, state.best_step))
