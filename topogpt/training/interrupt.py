"""Signals that ask a run to save and end."""

import contextlib
import signal
from types import FrameType


class StopSignals(contextlib.AbstractContextManager):
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask for a checkpoint and a clean end; a second ends at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> "StopSignals":
        self.received = False
        self.before = {s: signal.signal(s, self.handle) for s in self.SIGNALS}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.restore()

    def restore(self) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def __exit__(self, *error: object) -> None:
        self.restore()
