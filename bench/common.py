"""What the measurements share: interleaved timing, checks, tables, and records for `--json`.

    python -m bench.NAME --help      # spatial, step, loader, prepare, gpu; from the repository's root

Without --json a script prints tables. With it, stdout gets one JSON object a line: name, ours, reference,
ratio (above 1: ours is better), unit, device, detail; the tables then go to stderr. A failed check ends with
exit code 1.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from topogpt.settings import N_VOCAB, TrainConfig
from topogpt.terminal import table
from topogpt.text.loader import Corpus, MicroBatch, Share, TokenLoader, open_corpus
from topogpt.text.shards import HEADER_BYTES, Shard, header

if TYPE_CHECKING:  # --help and mistakes answer at once
    import torch
    from torch import Tensor

ROOT = Path(__file__).parent.parent
AHEAD_CYCLES = 80_000_000  # of the GPU, about 40 ms: so long the host may queue work before the clock starts


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    low: float
    high: float


# ---- the machine, and processes of their own ------------------------------------------------------


def start(device: str, threads: int | None = None) -> "torch.device":
    """The device of a flag, set up as train.py does."""
    import torch

    from topogpt.distributed import keep_freed_memory, pick_device

    if threads:
        torch.set_num_threads(threads)
    if (picked := torch.device(pick_device(device))).type == "cpu":
        keep_freed_memory()
    return picked


def environment() -> dict[str, str]:
    """For processes that find these files from any folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def said_by(module: str, argv: Sequence[str], what: str) -> Any:
    """The JSON in the last line that a new process prints."""
    command = [sys.executable, "-m", module, *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {what} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- timing --------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: "torch.device",
    *,
    repeats: int,
    warmup: int = 2,
    seconds: float = float("inf"),
    ahead: bool = False,
) -> dict[str, Times]:
    """Time calls in turns, every other round backwards; no new round after `seconds`.

    ahead: on CUDA, keep the device busy while the host queues the call, so that the time is the device's own.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in range(repeats):
        if i and time.perf_counter() > end:
            break
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            found[name].append(milliseconds(calls[name], device, ahead))
    return {name: summary(values) for name, values in found.items()}


def milliseconds(call: Callable[[], object], device: "torch.device", ahead: bool = False) -> float:
    if device.type != "cuda":
        t0 = time.perf_counter()
        call()
        synchronize(device)
        return 1e3 * (time.perf_counter() - t0)
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if ahead and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def summary(values: Sequence[float]) -> Times:
    return Times(statistics.median(values), min(values), max(values))


def synchronize(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Marks:
    """Time between marks, summed by part: `marks("forward")` ends the part called forward."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.points = [("", self.now())]

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, part: str) -> None:
        self.points.append((part, self.now()))

    def read(self) -> dict[str, float]:
        """Milliseconds by part; waits for the device."""
        synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, before), (part, after) in zip(self.points, self.points[1:], strict=False):
            dt = before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
            parts[part] = parts.get(part, 0.0) + dt
        return parts


# ---- checks --------------------------------------------------------------------------------------


def relative_error(out: "Tensor", reference: "Tensor") -> float:
    """|out - reference| / |reference| in float64; infinite where anything is not finite."""
    out, reference = out.detach().double(), reference.detach().to(out.device).double()
    error = float((out - reference).norm() / reference.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


# ---- tables and records --------------------------------------------------------------------------


class Report:
    """Prints results as they come, and keeps them for the table at the end."""

    def __init__(self, *, as_json: bool, device: str) -> None:
        self.as_json, self.device = as_json, device
        self.records: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def say(self, text: str = "") -> None:
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.say(table(head, rows))

    def record(
        self,
        name: str,
        ours: float,
        reference: float | None,
        unit: str,
        *,
        more_is_better: bool = False,
        **detail: object,
    ) -> float | None:
        """Keep a result, print its line under --json; return the ratio, None without a reference."""
        ratio = None
        if reference is not None:
            better, worse = (ours, reference) if more_is_better else (reference, ours)
            ratio = better / max(worse, 1e-12)
        values = {"name": name, "ours": ours, "reference": reference, "ratio": ratio, "unit": unit}
        self.records.append(values | {"device": self.device, "detail": detail})
        if self.as_json:
            print(json.dumps(self.records[-1]), flush=True)
        return ratio

    def check(self, name: str, error: float, tolerance: float) -> str:
        """A word for the table; a failed check is remembered."""
        if error <= tolerance:
            return f"{error:.1e} ok"
        self.failed.append(f"{name}: error {error:.1e} is above {tolerance:.0e}")
        return f"{error:.1e} WRONG"

    def compare(
        self, title: str, times: Mapping[str, Times], reference: str, checks: Mapping[str, str] | None = None
    ) -> None:
        """Table and records of calls timed together, each against the one called `reference`."""
        base, rows = times[reference].median, []
        for name, t in times.items():
            detail = {"low": t.low, "high": t.high, "against": reference}
            if checks:
                detail["error"] = checks.get(name, "")
            ratio = self.record(f"{title}: {name}", t.median, base, "ms", **detail)
            rows.append([name, f"{t.median:.3f}", f"{t.low:.3f}-{t.high:.3f}", f"{ratio:.2f}"])
            if checks:
                rows[-1].append(checks.get(name, ""))
        head = [title, "ms", "range", "times faster"] + (["error"] if checks else [])
        self.table(head, rows)

    def finish(self) -> None:
        """Say which checks failed, if any, and end with code 1 then."""
        for line in self.failed:
            self.say(f"check failed: {line}")
        if self.failed:
            sys.exit(1)


def device_label(device: "torch.device") -> str:
    """What a record says of the machine."""
    import torch

    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        name = device.type.upper()
    return f"{name}, torch {torch.__version__}"


# ---- data ----------------------------------------------------------------------------------------


def random_corpus(folder: Path, n_tokens: int, n_vocab: int) -> Corpus:
    """Write one shard of random tokens and open it, unseen by the cache of checked shards."""
    path = folder / "random.bin"
    tokens = np.random.default_rng(0).integers(0, min(n_vocab, 1 << 16), n_tokens, dtype=np.uint16)
    path.write_bytes(header(n_tokens) + tokens.astype("<u2").tobytes())
    return Corpus([Shard(path, n_tokens, HEADER_BYTES, "")])


def training_steps(
    cfg: TrainConfig, device: "torch.device", stack: contextlib.ExitStack
) -> Iterator[list[MicroBatch]]:
    """Micro-batches of each step of a run, from train.py's loader; random tokens without train_data_dir."""
    vocab, block = cfg.model.vocab_size, cfg.model.block_size
    if cfg.train_data_dir:
        corpus = open_corpus(cfg.train_data_dir, key="train_data_dir", vocab_size=vocab)
    else:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpus = random_corpus(folder, 8 * cfg.batch_size * block + 1, min(vocab, N_VOCAB))
    size = {"batch_size": cfg.batch_size, "per_device_batch_size": cfg.per_device_batch_size}
    loader = TokenLoader(corpus, block_size=block, **size, seed=cfg.seed, ranks=Share(device=device))
    return stack.enter_context(loader).steps(0)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
