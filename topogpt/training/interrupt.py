"""Signals that ask a run to save and end, and a parent that is gone."""

import contextlib
import os
import signal
import stat
from types import FrameType

from topogpt.errors import silence
from topogpt.ranks import read_place


class StopSignals(contextlib.AbstractContextManager):
    """SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGHUP ask for a checkpoint and a clean end; a second ends at once.

    So does the death of torchrun or of SLURM's step, which leaves its ranks behind: they save and end. A run
    that is a process of its own outlives the shell that started it, if nohup has had SIGHUP ignored. Inside
    one another, as train_itp.py's and those of the runs it starts, all of them are told.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __enter__(self) -> "StopSignals":
        self.told, self.place, self.parent = False, read_place(), os.getppid()
        wanted = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self.handle) for s in wanted}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: writing to it fails from here on
            silence(*(stream for stream in (1, 2) if stat.S_ISCHR(os.fstat(stream).st_mode)))
        self.stop(signal.Signals(number).name)

    def stop(self, why: str) -> None:
        """Ask for the end. The next signal ends the process without a word, but not one of several.

        torchrun sends more of them while it waits, and SIGKILL in the end.
        """
        self.told, alone = True, self.place.world == 1
        for s in self.before:
            signal.signal(s, signal.SIG_DFL if alone else signal.SIG_IGN)
        if self.place.rank == 0:
            again = "; once more ends it now, without saving" if alone else ""
            with contextlib.suppress(OSError):  # whoever read it may be gone, too
                # past Python's buffers, which the interrupted code may be writing to
                os.write(2, f"\n{why}: saving a checkpoint, then ending{again}\n".encode())

    @property
    def received(self) -> bool:
        """Whether the run is to end; looked at once a step."""
        if not self.told and self.place.world > 1 and os.getppid() != self.parent:
            self.stop("the process that started this one is gone")
        return self.told

    def __exit__(self, *error: object) -> None:
        outer = getattr(self.before[signal.SIGTERM], "__self__", None)
        if self.told and isinstance(outer, StopSignals):
            outer.told = True
            return  # the next signal still ends at once; the outer one restores all
        for s, handler in self.before.items():
            signal.signal(s, handler)
