"""Attacks on runs that take a second: is anything lost, is anything damaged trained on?

    make faults     every attack, in some minutes; its table is docs/FAULTS.md

Exits with 1 where an attack was lost, and says which. A few of each kind: tests/runs/test_faults.py.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import SkipTest

import accidents
import tiny
import yaml

from topogpt.runs import folder as runfolder
from topogpt.runs import lock, provenance, seal
from topogpt.settings import TrainConfig

N = 8  # steps; checkpoints at 0, 3, 6, 8 and after every best evaluation (each 4 steps)
SHORT = {"max_steps": N, "save_every": 3, "eval_every": 4, "batch_size": 4, "val_tokens": 64}
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


# What is written, the call before which the disk is full, and which of these calls.
WRITES = {
    ".lock": ("topogpt.runs.lock.take", 1),
    "config.yaml": ("topogpt.training.setup.write_text", 1),
    "provenance.json": ("topogpt.training.setup.write_json", 1),
    "metrics.jsonl": ("topogpt.training.log:RunLog.record", 6),
    "log.txt": ("topogpt.training.log:RunLog.write", 12),
    "maps/*.npz": ("topogpt.training.maps.save_arrays", 2),
    "maps/*.png": ("topogpt.training.maps.draw", 2),
    "model.safetensors": ("topogpt.runs.checkpoint.save_weights", 2),
    "optimizer.pt": ("torch.save", 2),
    "state.json": ("topogpt.runs.seal.state_text", 2),
    "config.yaml, resumed": ("topogpt.training.setup.write_text", 1),
    "provenance.json, resumed": ("topogpt.training.setup.write_json", 1),
    "metrics.jsonl, resumed": ("topogpt.training.log.clean", 1),
}


class Field:
    """A folder with shards in which runs are attacked, and how the same runs end that nothing disturbs."""

    def __init__(self, folder: Path) -> None:
        self.folder = tiny.write_shards(folder, used=16)  # so that every evaluation is the best one
        self.numbers, self.one_at_a_time = itertools.count(), threading.RLock()
        self.wholes: dict[tuple[int, int], Path] = {}

    def config(self, kind: str, **settings) -> TrainConfig:
        return tiny.config(self.folder, f"{kind}-{next(self.numbers)}", **SHORT | settings)

    def start(self, cfg: TrainConfig, prepare: Callable = tiny.nothing, world: int = 1):
        """Train in processes of their own; their exit codes, and what they said."""
        output = self.folder / f"output-{next(self.numbers)}"
        output.touch()
        codes = tiny.run_in_child(tiny.train_after, prepare, cfg, world=world, output=output)
        said = output.read_text(errors="replace")
        assert "Timeout (" not in said, f"a process hangs: {said}"
        return codes, said

    def whole(self, world: int = 1, seed: int = TrainConfig.seed) -> Path:
        with self.one_at_a_time:
            if (world, seed) not in self.wholes:
                cfg = self.config("whole", seed=seed)
                codes, said = self.start(cfg, world=world)
                assert codes == [0] * world, said
                self.wholes[world, seed] = tiny.folder_of(cfg)
        return self.wholes[world, seed]

    def finish(self, cfg: TrainConfig, world: int = 1) -> str:
        """Resume a run to its end, which must be that of the undisturbed one, bit for bit; what it says."""
        run = tiny.folder_of(cfg)
        codes, said = self.start(replace(cfg, resume=run.is_dir()), world=world)
        assert codes == [0] * world, said
        tiny.assert_same_run(run, self.whole(world, cfg.seed))
        assert not (run / lock.NAME).exists()
        return said

    def copy_of_whole(self, cfg: TrainConfig) -> Path:
        return shutil.copytree(self.whole(), tiny.folder_of(cfg), symlinks=True)


# ---- kills and signals -------------------------------------------------------------------------------------


def struck(field: Field, number: int, chance: random.Random, world: int = 1, most: int = 40):
    """A run that a signal has met before its end, its exit codes and what it said."""
    field.whole(world)
    for _ in range(most):
        cfg = field.config(signal.Signals(number).name)
        ranks = chance.choice([[0], [1], [0, 1]]) if world > 1 else [0]
        after = chance.randint(0, N + 2 if ranks == [0] else N - 1)  # only rank 0 records the evaluations
        if not after:  # one alone would wait for the other, until torchrun ended it, which is not here
            ranks = list(range(world))
        blow = partial(accidents.strike, after, chance.random(), number, ranks)
        codes, said = field.start(cfg, blow, world)
        if any(codes) or ": saving a checkpoint" in said:
            return cfg, codes, said
        shutil.rmtree(tiny.folder_of(cfg))  # it came too late
    raise AssertionError(f"{most} signals all came too late")


def reached(run: Path) -> str:
    """How far a killed run came."""
    there = runfolder.complete(run)
    if any(run.glob("checkpoints/.*.tmp")):
        return "a checkpoint half written or half deleted"
    if not there:
        return "no checkpoint yet"
    steps = [r["step"] for r in runfolder.read_metrics(run)]
    return "beyond the last checkpoint" if max(steps) > runfolder.step_of(there[-1]) else "at a checkpoint"


def kill(field: Field, world: int = 1, *, chance: random.Random) -> str:
    """SIGKILL at a random moment; of two ranks the one, the other or both."""
    cfg, codes, said = struck(field, signal.SIGKILL, chance, world)
    assert -signal.SIGKILL in codes and (all(codes) or "finished at step" in said), (codes, said)
    found = reached(tiny.folder_of(cfg))
    field.finish(cfg, world)
    return found


def ask(field: Field, number: int, chance: random.Random) -> str:
    """A signal that asks for the end saves and exits with 0; before there is a run, it just ends."""
    cfg, (code,), said = struck(field, number, chance)
    run = tiny.folder_of(cfg)
    assert "Traceback" not in said, said
    if code == 0:
        step = seal.check(run / "last")["train_state"]["step"]
        assert f"stopped by a signal at step {step}" in said or f"finished at step {N}" in said, said
    else:  # nothing had begun, or all was done
        assert code in (-number, 130), (code, said)
        assert runfolder.is_empty(run) or "finished at step" in said, said
    field.finish(cfg)
    return "saved, exit 0" if code == 0 else f"before its first line or after its last, exit {code}"


# ---- two at once, damage, a full disk ----------------------------------------------------------------------


def only_line(said: str) -> str:
    """The one error line, the last thing said."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) <= 400, said
    return errors[0]


def two_starts(field: Field) -> str:
    """Of two starts of one name with other seeds one trains to its end, and the other is one line."""
    cfg = field.config("twice")
    both = [cfg, replace(cfg, seed=cfg.seed + 1)]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(field.start, both))
    codes = [code for (code,), _ in ends]
    assert sorted(codes) == [0, 2], ends
    winner, (_, said) = both[codes.index(0)], ends[codes.index(2)]
    assert said.strip() == only_line(said), said
    run = tiny.folder_of(cfg)
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == winner.seed
    tiny.assert_same_run(run, field.whole(1, winner.seed))
    return "refused as held" if "is being written by process" in said else "refused as there already"


def damage(field: Field, name: str, chance: random.Random) -> str:
    """A flipped bit in the newest checkpoint is said, and the one before it is used."""
    cfg = field.config("damaged")
    path = field.copy_of_whole(cfg) / "last" / name
    data, at = bytearray(path.read_bytes()), chance.randrange(path.stat().st_size)
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    said = field.finish(cfg)
    last = f"step-{N:06d}"
    assert f"WARNING: checkpoint {path.parents[1]}/checkpoints/{last} is damaged: {name}" in said, (at, said)
    assert f"going on from step-000006 (kept as {last}.damaged)" in said, said
    return "said, and gone on from the one before"


def full(field: Field, name: str) -> str:
    """A write that finds the disk full ends the run with 2 and one line; with room again it goes on."""
    resume = name.endswith(", resumed")
    with accidents.small_disk(field.folder / f"disk-{next(field.numbers)}") as disk:
        cfg = field.config("full", out_dir=str(disk))
        run = field.copy_of_whole(cfg) if resume else tiny.folder_of(cfg)
        accident = partial(accidents.fill_before, *WRITES[name], disk, run / name)
        codes, said = field.start(replace(cfg, resume=resume), accident)
        assert (disk / "filler").exists(), said
        assert codes == [2] and "No space left on device" in only_line(said), (codes, said)
        there = [p.name for p in runfolder.complete(run)]
        (disk / "filler").unlink()
        for picture in run.glob("maps/*.png"):
            picture.unlink()  # the undisturbed run has drawn none
        said = field.finish(cfg)
        step = int(there[-1][5:]) if there else 0
        assert f"resuming at step {step};" in said or step == 0, (there, said)
        return f"exit 2, one line; resumed from {'step ' + str(step) if there else 'the start'}"


# ---- all of them -------------------------------------------------------------------------------------------


def every(field: Field) -> dict[str, list[Callable[[], str]]]:
    def times(n: int, call: Callable, *args) -> list[Callable[[], str]]:
        """The same with other chances."""
        return [partial(call, field, *args, chance=random.Random(f"{args} {i}")) for i in range(n)]

    flips = {f"a bit flipped in {name}": times(20, damage, name) for name in seal.FILES}
    signals = {signal.Signals(number).name: times(10, ask, number) for number in SIGNALS}
    disks = {f"disk full at {name}": [partial(full, field, name)] for name in WRITES}
    return {
        "SIGKILL to one process": times(50, kill),
        "SIGKILL to one or both of two ranks": times(10, kill, 2),
        "two starts of one name at once": [partial(two_starts, field)] * 5,
    } | (flips | signals | disks)


def outcome(call: Callable[[], str]) -> tuple[str, str]:
    """What an attack has shown, and why it is lost, if it is: by whatever it raises."""
    try:
        return call(), ""
    except SkipTest as why:
        return f"NOT MADE: {why}", ""
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "LOST", f"{type(error).__name__} at {where.name}: {where.line}: {error}"


def make(attacks: dict[str, list[Callable[[], str]]], at_once: int = 4) -> list[str]:
    """Make attacks, print a row of the table for each kind, and return which were lost, and why."""
    lost = []
    print("| attack | times | held | what happened |\n|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {name: [pool.submit(outcome, call) for call in calls] for name, calls in attacks.items()}
        for name, of_kind in jobs.items():
            found = Counter(job.result()[0] for job in of_kind)
            what = "; ".join(f"{n} {text}" if len(found) > 1 else text for text, n in found.most_common())
            held = sum(n for text, n in found.items() if not text.startswith(("LOST", "NOT MADE")))
            print(f"| {name} | {len(of_kind)} | {held} | {what} |", flush=True)
            lost += [f"{name}: {why}" for job in of_kind if (why := job.result()[1])]
    return lost


def main() -> int:
    folder, began = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    commit = (provenance.git("rev-parse", "HEAD") or "unknown")[:7]
    changed = " with changes" if provenance.code()["changed"] else ""
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit}{changed}, {os.cpu_count()} CPU cores\n")
    lost = make(every(Field(folder)))
    print(f"\n{len(lost) or 'none'} lost; {time.monotonic() - began:.0f} s in all")
    for why in lost:
        print(f"\nLOST: {why}", file=sys.stderr)
    if lost:
        print(f"\nthe runs are kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return bool(lost)


if __name__ == "__main__":
    import faults  # under its own name, by which other processes find its functions

    sys.exit(faults.main())
