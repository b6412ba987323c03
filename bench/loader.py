"""How long a training step waits for its data, at a target rate, with a cold and a warm page cache.

    python -m bench.loader --train_data_dir data/fineweb-edu-10B/train --tokens_per_s 500000
    python -m bench.loader --device cuda --steps 30          # random tokens

A consumer sleeps as long as a step would take and measures how long next() then blocks. Compared with reading
the same windows only when asked for. Cold is a new process, after the kernel was told to forget the files.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.common import Report, device_label, random_corpus, said_by, start, summary, synchronize
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.settings import N_VOCAB
from topogpt.text.loader import Corpus, Share, TokenLoader, open_corpus
from topogpt.text.shards import Shard

LEAST = 1e-3  # ms: a shorter wait is not told from none


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Measure the wait for data: python -m bench.loader [--train_data_dir PATHS] [--tokens_per_s 500000]."""

    train_data_dir: tuple[str, ...] = ()  # token shards; without them, one of random tokens is written
    random_tokens: int = 50_000_000  # in that one
    tokens_per_s: float = 500_000  # rate of training, on this device
    block_size: int = 1024  # tokens of a sequence
    batch_size: int = 48  # sequences of an optimiser step
    per_device_batch_size: int = 48  # sequences of a micro-step
    steps: int = 20  # timed steps
    seed: int = 1337  # of the order
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    json: bool = False  # one JSON object a line on stdout
    cold: bool = False  # print the milliseconds of a cold cache as JSON and stop (used by this script)

    def __post_init__(self) -> None:
        for name in ("random_tokens", "block_size", "batch_size", "per_device_batch_size", "steps"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("tokens_per_s", self.tokens_per_s, 1)
        if self.batch_size % self.per_device_batch_size:
            raise UserError("batch_size is not a multiple of per_device_batch_size; give a multiple")

    @property
    def step_ms(self) -> float:
        return 1e3 * self.batch_size * self.block_size / self.tokens_per_s


def main(argv: list[str]) -> None:
    cfg = parse(LoaderConfig, argv, prog="python -m bench.loader")
    import torch

    device = start(cfg.device)
    torch.zeros(1, device=device)  # start the device before the clock
    with ExitStack() as stack:
        if cfg.train_data_dir:
            options = {"vocab_size": 1 << 16, "verify": False, "log": sys.stderr.write}
            corpus = open_corpus(cfg.train_data_dir, key="train_data_dir", **options)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            corpus = random_corpus(folder, cfg.random_tokens, N_VOCAB)
        if cfg.cold:
            print(json.dumps(waits(cfg, forgotten(corpus), device, ahead=True)))
            return
        report = Report(as_json=cfg.json, device=device_label(device))
        report.say(
            f"wait for data: steps of {cfg.batch_size} x {cfg.block_size} tokens at {cfg.tokens_per_s:,.0f} "
            f"tokens/s ({cfg.step_ms:.1f} ms), {corpus.n_tokens:,} tokens in {len(corpus.shards)} shard(s); "
            f"{report.device}"
        )
        files = [str(shard.path) for shard in corpus.shards]
        again = [*argv, "--cold", "--train_data_dir", *files]
        measured = {
            "cold": said_by("bench.loader", again, "with a cold cache"),
            "warm": waits(cfg, corpus, device, ahead=True),
            "warm, read when asked for": waits(cfg, corpus, device, ahead=False),
        }
    rows, usual = [], max(summary(measured["warm, read when asked for"][1:]).median, LEAST)
    for name, (first, *rest) in measured.items():
        wait = summary(rest)
        share, worst = wait.median / cfg.step_ms, wait.high / cfg.step_ms
        times = [f"{first:.2f}", f"{wait.median:.3f}", f"{wait.high:.3f}"]
        rows.append([name, *times, f"{share:.3%}", f"{worst:.2%}"])
        if "asked" not in name:
            detail = {"share_of_step": share, "first_ms": first, "largest_ms": wait.high}
            detail |= {"step_ms": cfg.step_ms}
            report.record(f"data wait, {name}", max(wait.median, LEAST), usual, "ms/step", **detail)
    report.table(["data wait", "first, ms", "median, ms", "largest, ms", "share of step", "largest"], rows)
    report.finish()


def waits(cfg: LoaderConfig, corpus: Corpus, device, *, ahead: bool) -> list[float]:
    """Milliseconds that each step waits; the first one is the start."""
    options = {"batch_size": cfg.batch_size, "per_device_batch_size": cfg.per_device_batch_size}
    options |= {"block_size": cfg.block_size, "seed": cfg.seed, "ranks": Share(device=device)}
    found = []
    with TokenLoader(corpus, **options) as loader:
        t0 = time.perf_counter()
        steps = loader.steps(0) if ahead else map(loader.step, range(1 + cfg.steps))
        for _ in range(1 + cfg.steps):
            next(steps)
            synchronize(device)
            found.append(1e3 * (time.perf_counter() - t0))
            time.sleep(cfg.step_ms / 1e3)
            t0 = time.perf_counter()
    return found


def forgotten(corpus: Corpus) -> Corpus:
    """The corpus opened again, after its files' pages were dropped from the page cache (Linux)."""
    shards: tuple[Shard, ...] = corpus.shards
    corpus.maps.clear()  # a page that is mapped stays
    for shard in shards:
        with open(shard.path, "rb") as file:
            os.fsync(file.fileno())  # a page not yet written stays, too
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Corpus(shards)


if __name__ == "__main__":
    run_main(main)
