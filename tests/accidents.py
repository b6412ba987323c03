"""What befalls runs in their own process: signals at random moments, disks that fill up. For faults.py."""

import contextlib
import itertools
import os
import pkgutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import SkipTest

from topogpt.training.maps import draw


def strike(after: int, wait: float, number: int, ranks: Sequence[int] = (0,)) -> None:
    """Let another process send this one a signal, whatever it does then.

    It comes some records after the start, which spreads the moments evenly on a busy machine, too, and a wait
    later: in spans between records, or in seconds before the first.
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


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own; SkipTest where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise SkipTest("no tmpfs can be mounted, which takes Linux and root or a user namespace (unshare)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_before(place: str, call: int, disk: Path, appended: Path) -> None:
    """Let the disk be full from the n-th call of a place on; a file appended to has no room in its page."""
    from topogpt.training import maps

    if place.endswith(".draw"):
        maps.draw = draw  # no_pictures has taken it away
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    usual, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            if appended.is_file():
                with appended.open("ab") as file:
                    file.write(b"\n" * (-appended.stat().st_size % 4096))
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return usual(*args, **kwargs)

    setattr(owner, name, wrapped)
