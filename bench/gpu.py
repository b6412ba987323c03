"""Everything that needs a GPU, on one GPU, in under nine minutes: section by section, and a table at the end.

    python -m bench.gpu                               # topolm.yaml's micro-step: 48 x 1024 tokens, bf16
    python -m bench.gpu --sections ceiling step spatial --train_data_dir data/fineweb-edu-10B/train
    python -m bench.gpu --device cpu --tiny           # the same code on a CPU, to see that it works
    bench/gpu.sh OUT.txt                              # this, and the other measurements on the GPU

A section prints as it ends; one that fails, or runs out of time, is reported and stops no other. The last two
sections compile the whole step once for each variant, and leave out those they have no time for.
"""

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bench.common import Report, device_label, start
from bench.gpu_bench import Bench, GpuConfig
from topogpt.config import parse
from topogpt.errors import run_main

SHORTEST = 10  # seconds: with less left, no section is begun


class OutOfTime(BaseException):
    """The time limit came in the middle of a section. No `except Exception` may swallow it."""


def main(argv: list[str]) -> None:
    t0 = time.perf_counter()
    cfg = parse(GpuConfig, argv, prog="python -m bench.gpu")
    import torch

    from bench import gpu_kernels, gpu_steps

    device = start(cfg.device)
    report = Report(as_json=cfg.json, device=device_label(device))
    report.say(f"{report.device}; limit {cfg.time_limit} s")
    failures: list[str] = []
    torch._dynamo.utils.counters.clear()  # of graph breaks
    with ExitStack() as stack:
        bench = Bench(cfg, report, device, stack, end=t0 + cfg.time_limit)
        for name in cfg.sections:
            left = bench.seconds_left()
            if left < SHORTEST:
                failures.append(f"{name}: not begun, no time left")
                continue
            section = getattr(gpu_kernels, name, None) or getattr(gpu_steps, name)
            report.say(f"\n==== {name} ({left:.0f} s left)")
            try:
                with time_limit(left):
                    section(bench)
            except (Exception, OutOfTime) as error:  # whatever it is, the next section may work
                failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                report.say(f"{name} failed:\n{traceback.format_exc()[-3000:]}")
            bench.free()
    report.say(f"\n==== all results; {report.device}; {time.perf_counter() - t0:.0f} s")
    rows = []
    for r in report.records:
        numbers = [f"{r[k]:,.4g}" if r[k] is not None else "-" for k in ("ours", "reference", "ratio")]
        rows.append([r["name"], *numbers, r["unit"]])
    report.table(["name", "ours", "reference", "ratio", "unit"], rows)
    report.failed += failures
    report.finish()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so long; where there is no such alarm (Windows, threads), do nothing."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"time limit reached after {seconds:.0f} s")

    try:
        before: Callable | int | None = signal.signal(signal.SIGALRM, ring)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    run_main(main)
