"""A run's best checkpoint on the Hub, while it trains or at its end; a failure harms nothing."""

import queue
import threading
import time
from pathlib import Path
from typing import Any

from topogpt.errors import UserError, masked
from topogpt.retry import described
from topogpt.settings import TrainConfig
from topogpt.sharing import push
from topogpt.sharing.export import export
from topogpt.training.interrupt import StopSignals
from topogpt.training.log import RunLog


class Publisher:
    """Exports between two steps and pushes in a thread beside them: a push may outlast ranks' patience."""

    def __init__(self, run: Path, cfg: TrainConfig, log: RunLog) -> None:
        self.run, self.name, self.log = run, cfg.run_name, log
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # the log is the main thread's alone
        self.thread = threading.Thread()

    def begin(self) -> None:
        """Export the best checkpoint and start to push it, unless the push before is still under way."""
        if not self.log.is_main:
            return
        if self.thread.is_alive():
            self.log.say("not pushed: the push before is still under way")
            return
        try:
            exported = export(self.run, "best", say=self.log.say)
        except Exception as error:
            self.log.say(self.failed(error))
            return
        self.thread = threading.Thread(target=self.push, args=(exported,), daemon=True)
        self.thread.start()

    def push(self, exported: Path) -> None:
        try:
            name = push.full_name(self.name, self.lines.put)
            self.lines.put(f"pushed: {push.push(exported, name, say=self.lines.put)}")
        except Exception as error:
            self.lines.put(self.failed(error))

    def failed(self, error: Exception) -> str:
        reason = str(error) if isinstance(error, UserError) else masked(described(error))
        return f"not pushed: {reason}; later: python export.py {self.run} --push_to_hf"

    def report(self) -> None:
        """Say what the push has said since."""
        while not self.lines.empty():
            self.log.say(self.lines.get())

    def wait(self, ranks: Any, signals: StopSignals) -> None:
        """Wait for the push or a signal; all ranks do, and talk meanwhile, so that none gives up."""
        while ranks.any(self.thread.is_alive()) and not ranks.any(signals.received):
            self.report()
            self.thread.join(0.2) if self.log.is_main else time.sleep(0.2)
        self.report()
        if self.thread.is_alive():
            self.log.say(self.failed(UserError("told to stop meanwhile")))
