"""Attacks on runs that take a second: is anything lost, is anything damaged trained on?

    make faults     every attack, in some minutes; its table is docs/FAULTS.md

Exits with 1 where an attack was lost, and says which. A few of each kind: tests/runs/test_faults.py.
"""

import contextlib
import functools
import itertools
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import tiny
import yaml

from topogpt.runs import folder as runfolder
from topogpt.runs import lock, provenance, seal
from topogpt.settings import TrainConfig
from topogpt.training.maps import draw

N = 8  # steps; checkpoints at 0, 3, 6, 8 and after every best evaluation (each 4 steps)
SHORT = {"max_steps": N, "save_every": 3, "eval_every": 4, "batch_size": 4, "val_tokens": 64}
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Writes(NamedTuple):
    """The call before which the disk is full."""

    place: str
    call: int = 1  # the how manieth of this place
    resumed: bool = False  # in a finished run that is started with --resume


WRITES = {
    ".lock": Writes("topogpt.runs.lock.take"),
    "config.yaml": Writes("topogpt.training.setup.write_text"),
    "provenance.json": Writes("topogpt.training.setup.write_json"),
    "metrics.jsonl": Writes("topogpt.training.log:RunLog.record", 6),
    "log.txt": Writes("topogpt.training.log:RunLog.write", 12),
    "maps/*.npz": Writes("topogpt.training.maps.save_arrays", 2),
    "maps/*.png": Writes("topogpt.training.maps.draw", 2),
    "model.safetensors": Writes("topogpt.runs.checkpoint.save_weights", 2),
    "optimizer.pt": Writes("torch.save", 2),
    "state.json": Writes("topogpt.runs.seal.state_text", 2),
    "config.yaml, resumed": Writes("topogpt.training.setup.write_text", resumed=True),
    "provenance.json, resumed": Writes("topogpt.training.setup.write_json", resumed=True),
    "metrics.jsonl, resumed": Writes("topogpt.training.log.clean", resumed=True),
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


def strike(after: int, wait: float, number: int, ranks: Sequence[int] = (0,)) -> None:
    """Let another process send this one a signal, whatever it does then.

    Args:
        after: how many records; their number, not the clock, spreads the moments evenly on a busy machine.
        wait: for so much longer, in spans between records, or in seconds before the first.
    """
    from topogpt.training.log import RunLog

    victim, record, times = os.getpid(), RunLog.record, [time.monotonic()]

    def begin() -> None:
        span = (times[-1] - times[0]) / after if after else 1.0
        if len(times) == after + 1 and os.fork() == 0:
            time.sleep(wait * span)
            if os.getppid() == victim:
                os.kill(victim, number)
            os._exit(0)

    def wrapped(self, values) -> None:
        record(self, values)
        times.append(time.monotonic())
        begin()

    if int(os.environ.get("RANK", 0)) in ranks:
        RunLog.record = wrapped
        begin()


def struck(field: Field, number: int, chance: random.Random, world: int = 1, most: int = 40):
    """A run that a signal has met before its end, its exit codes and what it said."""
    field.whole(world)
    for _ in range(most):
        cfg = field.config(signal.Signals(number).name)
        ranks = chance.choice([[0], [1], [0, 1]]) if world > 1 else [0]
        # of rank 0, which records the evaluations, too; one that is too late is made again
        records = N + 2 if ranks == [0] else N - 1
        blow = functools.partial(strike, chance.randint(0, records), chance.random(), number, ranks)
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


def kill(field: Field, chance: random.Random, world: int = 1) -> str:
    """SIGKILL at a random moment; of two ranks the one, the other or both."""
    cfg, codes, said = struck(field, signal.SIGKILL, chance, world)
    assert -signal.SIGKILL in codes and all(codes), (codes, said)
    found = reached(tiny.folder_of(cfg))
    field.finish(cfg, world)
    return found


def ask(field: Field, number: int, chance: random.Random) -> str:
    """A signal that asks for the end saves and exits with 0; before there is a run, it just ends."""
    cfg, (code,), said = struck(field, number, chance)
    run = tiny.folder_of(cfg)
    assert "Traceback" not in said, said
    if code == 0:
        assert "stopped by a signal at step" in said, said
        step = seal.check(run / "last")["train_state"]["step"]
        assert f"stopped by a signal at step {step}" in said, said
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


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own; OSError where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"no tmpfs can be mounted: {error.stderr.decode().strip()}") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_before(where: Writes, disk: Path, appended: Path) -> None:
    """Let the disk be full from the n-th call of a place on; a file appended to has no room in its page."""
    from topogpt.training import maps

    if where.place.endswith(".draw"):
        maps.draw = draw  # no_pictures has taken it away
    owner, _, name = where.place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    usual, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == where.call:
            if appended.is_file():
                with appended.open("ab") as file:
                    file.write(b"\n" * (-appended.stat().st_size % 4096))
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return usual(*args, **kwargs)

    setattr(owner, name, wrapped)


def full(field: Field, name: str) -> str:
    """A write that finds the disk full ends the run with 2 and one line; with room again it goes on."""
    where, number = WRITES[name], next(field.numbers)
    with small_disk(field.folder / f"disk-{number}") as disk:
        cfg = field.config("full", out_dir=str(disk))
        run = tiny.folder_of(cfg)
        if where.resumed:
            field.copy_of_whole(cfg)
        accident = functools.partial(fill_before, where, disk, run / name)
        codes, said = field.start(replace(cfg, resume=where.resumed), accident)
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


class Row(NamedTuple):
    attack: str
    made: int
    happened: Counter
    lost: list[str]
    seconds: float


def attack(name: str, calls: Sequence[Callable[[], str]], at_once: int = 4) -> Row:
    """Make attacks of a kind; whatever one raises is a loss."""

    def outcome(call: Callable[[], str]) -> tuple[str, str]:
        try:
            return call(), ""
        except Exception as error:  # an attack that breaks down has shown nothing
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "LOST", f"{name}: {type(error).__name__} at {where.name}: {where.line}: {error}"

    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(outcome, calls))
    happened = Counter(what for what, _ in found)
    return Row(name, len(calls), happened, [why for _, why in found if why], time.monotonic() - began)


def every(field: Field) -> Iterator[Row]:
    def times(n: int, call: Callable, *args) -> list[Callable[[], str]]:
        """The same with other chances."""
        return [functools.partial(call, *args, chance=random.Random(f"{args[1:]} {i}")) for i in range(n)]

    yield attack("SIGKILL to one process", times(50, kill, field))
    yield attack("SIGKILL to one or both of two ranks", times(10, functools.partial(kill, world=2), field), 1)
    yield attack("two starts of one name at once", [functools.partial(two_starts, field)] * 5, 1)
    for name in seal.FILES:
        yield attack(f"a bit flipped in {name}", times(20, damage, field, name))
    for number in SIGNALS:
        yield attack(signal.Signals(number).name, times(10, ask, field, number))
    for name in WRITES:
        yield attack(f"disk full at {name}", [functools.partial(full, field, name)])


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    field = Field(folder)
    commit = (provenance.git("rev-parse", "--short=7", "HEAD") or "unknown")[:7]
    changed = " with changes" if provenance.code()["changed"] else ""
    began, lost = time.monotonic(), []
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit}{changed}, {os.cpu_count()} CPU cores\n")
    print("| attack | made | held | what happened | seconds |\n|---|---|---|---|---|")
    for row in every(field):
        what = "; ".join(f"{n} {text}" if len(row.happened) > 1 else text for text, n in row.happened.items())
        held = row.made - len(row.lost)
        print(f"| {row.attack} | {row.made} | {held} | {what} | {row.seconds:.0f} |", flush=True)
        lost += row.lost
    print(
        f"\n{f'{len(lost)} attacks lost' if lost else 'none lost'}, {time.monotonic() - began:.0f} s in all"
    )
    for why in lost:
        print(f"\nLOST: {why}", file=sys.stderr)
    if lost:
        print(f"the runs are kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return bool(lost)


if __name__ == "__main__":
    import faults  # under its own name, by which other processes find its functions

    sys.exit(faults.main())
