"""One process at a time writes into the folder of a run: a lock that is gone with its process.

The lock is the kernel's (flock) on a file .lock, which also says who holds it, and lies there only as long.
Nothing here imports torch.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from topogpt.errors import UserError
from topogpt.ranks import read_place
from topogpt.terminal import say

NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some file systems of networks
PATIENCE = 0.5  # seconds
OURS: set[tuple[int, int]] = set()  # device and inode of what this process holds


@contextlib.contextmanager
def held(run: Path, *, make: bool = True) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made where it is missing; other ranks than 0 need none.

    Args:
        make: a folder that is missing is made; where nothing else comes to lie in it, it goes again.
    """
    if read_place().rank or not (make or run.is_dir()):
        yield
        return
    made = not run.is_dir()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = take(run)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be written: {error.strerror}; choose another") from None
    try:
        yield
    finally:
        OURS.discard(identity(file))
        with contextlib.suppress(OSError):  # of a folder that was taken away meanwhile
            (run / NAME).unlink()
        file.close()
        if made and run.is_dir() and not any(run.iterdir()):
            run.rmdir()


def check(run: Path) -> None:
    """Raise UserError where another process holds the lock; changes nothing."""
    try:
        file = open(run / NAME, "r+")  # noqa: SIM115
    except OSError:
        return  # there is none, or the run cannot be written, which is found elsewhere
    with file:
        if identity(file) not in OURS:
            lock(file, run)


def take(run: Path) -> IO[str]:
    """The lock file, locked and with our name in it; UserError where another process holds it."""
    while True:
        file = open(run / NAME, "a+")  # noqa: SIM115
        try:
            lock(file, run)
            there = os.stat(run / NAME)
        except FileNotFoundError:  # the holder before has just ended, and taken it away
            file.close()
            continue
        except BaseException:
            file.close()
            raise
        if identity(file) == (there.st_dev, there.st_ino):
            break
        file.close()
    OURS.add(identity(file))
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (started {started})\n")
    file.flush()
    return file


def lock(file: IO[str], run: Path) -> None:
    """Lock a file, at once or within PATIENCE: a killed holder's child may be about to close its copy."""
    try:
        import fcntl
    except ImportError:
        return  # Windows
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            raise UserError(
                f"run {run} is being written by {holder}; wait for it, end it, or choose another --run_name"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return say(
                f"warning: {run} cannot be locked ({error.strerror}); let no other process write into it"
            )


def identity(file: IO[str]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino
