"""The whole optimiser step: topographic, its control, and the usual eager loop, in turns on the same data.

    python -m bench.step configs/debug.yaml --steps 20
    python -m bench.step configs/topolm.yaml --batch_size 48 --train_data_dir data/fineweb-edu-10B/train

All settings of train.py can be given; without --train_data_dir the tokens are random. The usual eager loop
stores the logits, goes over neighbourhoods one by one, uses AdamW without fusion and waits for every loss.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.common import Marks, Report, device_label, milliseconds, said_by, start, summary, training_steps
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.settings import TrainConfig

if TYPE_CHECKING:
    from bench.training import Trainer
    from topogpt.text.loader import MicroBatch

NAMES = ("topographic", "control", "usual eager loop")
PARTS = ("data", "forward", "spatial", "backward", "optimiser")


@dataclass(frozen=True, kw_only=True)
class StepConfig(TrainConfig):
    """Time the whole step: python -m bench.step [config.yaml] [--steps 20] [--flag value ...]."""

    run_name: str = "bench"  # not used here
    train_data_dir: tuple[str, ...] = ()  # token shards; without them the tokens are random
    steps: int = 20  # timed steps of each variant, in turns
    warmup: int = 2  # steps of each before the clock starts
    threads: int | None = None  # of the CPU; None: torch's choice
    memory: bool = True  # measure peak memory too, on a CPU in a process for each variant
    json: bool = False  # one JSON object a line on stdout
    memory_of: str = ""  # print the peak memory of one variant, in bytes, and stop (used for `memory`)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("steps", self.steps, 1)
        check_at_least("warmup", self.warmup, 0)
        if self.batch_size % self.per_device_batch_size:
            raise UserError(
                f"batch_size = {self.batch_size} is not a multiple of per_device_batch_size = "
                f"{self.per_device_batch_size}; give a multiple"
            )
        if self.memory_of and self.memory_of not in NAMES:
            raise UserError(f"memory_of = {self.memory_of} is none of {', '.join(NAMES)}")


def main(argv: list[str]) -> None:
    cfg = parse(StepConfig, argv, prog="python -m bench.step")
    import torch

    from bench.training import SETUPS, Trainer
    from topogpt.distributed import Ranks

    device = start(cfg.device, cfg.threads)
    ranks = Ranks(0, 1, device)
    with contextlib.ExitStack() as stack:
        steps = training_steps(cfg, device, stack)
        if cfg.memory_of:
            print(peak_memory(Trainer(cfg, SETUPS[cfg.memory_of], device), steps, ranks))
            return
        report = Report(as_json=cfg.json, device=device_label(device))
        trainers, memory = {}, dict.fromkeys(NAMES, 0.0)
        for name in NAMES:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            trainers[name] = Trainer(cfg, SETUPS[name], device)
            if cfg.memory and device.type == "cuda":
                memory[name] = peak_memory(trainers[name], steps, ranks) - before
            elif cfg.memory:
                memory[name] = said_by("bench.step", [*argv, "--memory_of", name], f"the memory of {name}")
        n_tokens = cfg.batch_size * cfg.model.block_size
        report.say(
            f"optimiser step: {trainers['control'].model.n_parameters():,} parameters, {n_tokens:,} tokens a "
            f"step in micro-batches of {cfg.per_device_batch_size} x {cfg.model.block_size}, "
            f"{str(trainers['control'].objective.dtype).removeprefix('torch.')}; {report.device}"
        )
        times, parts = measure(cfg, trainers, steps)
    flops = trainers["control"].model.flops_per_token()
    rows = []
    for name in NAMES:
        t = summary(times[name])
        speed = n_tokens / t.median * 1e3
        mfu = f"{speed * flops / ranks.peak_flops:.1%}" if ranks.peak_flops else "-"
        gb = f"{memory[name] / 1e9:.2f}" if memory[name] else "-"
        by_part = [f"{parts[name].get(part, 0):.2f}" for part in PARTS]
        rows.append(
            [name, f"{t.median:.1f}", f"{t.low:.1f}-{t.high:.1f}", f"{speed:,.0f}", mfu, *by_part, gb]
        )
        if name != "topographic":
            detail = {"ms_by_part": parts[name], "ours_by_part": parts["topographic"], "mfu": mfu}
            detail |= {"ours_bytes": memory["topographic"], "reference_bytes": memory[name]}
            ours = n_tokens / summary(times["topographic"]).median * 1e3
            report.record(f"step against {name}", ours, speed, "tokens/s", more_is_better=True, **detail)
    head = ["step", "ms", "range", "tokens/s", "MFU", *PARTS, "peak GB"]
    report.table(head, rows)
    say_share(report, times, compiled=trainers["topographic"].compiled)
    report.finish()


def say_share(report: Report, times: dict[str, list[float]], compiled: bool) -> None:
    """The spatial loss's share: difference of the two steps of each turn."""
    if compiled:
        report.say("compiled: the forward pass of the spatial loss is inside `forward`")
    ours, control = times["topographic"], times["control"]
    extra = summary([a - b for a, b in zip(ours, control, strict=True)]).median
    fastest, middle = min(ours) - min(control), summary(control).median
    detail = {"share_of_control": extra / middle, "between_fastest_steps": fastest}
    report.record("spatial loss over control", extra, None, "ms", **detail)
    report.say(
        f"spatial loss, forward and backward: a step takes {extra:.2f} ms more than control's, "
        f"{extra / middle:.1%} (median of turns); between the fastest steps {fastest:.2f} ms, "
        f"{fastest / min(control):.1%}"
    )


def measure(
    cfg: StepConfig, trainers: dict[str, "Trainer"], steps: Iterator[list["MicroBatch"]]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Milliseconds of each step by variant, and their medians by part."""
    device = next(iter(trainers.values())).device
    marks = Marks(device)
    times = {name: [] for name in trainers}
    parts: dict[str, dict[str, list[float]]] = {name: {} for name in trainers}
    for i in range(cfg.warmup + cfg.steps):
        for name in list(trainers) if i % 2 == 0 else list(trainers)[::-1]:
            marks.restart()
            ms = milliseconds(lambda t=trainers[name]: t.step(next(steps), marks), device)
            if i >= cfg.warmup:
                times[name].append(ms)
                for part, dt in marks.read().items():
                    parts[name].setdefault(part, []).append(dt)
    return times, {
        name: {part: summary(values).median for part, values in of.items()} for name, of in parts.items()
    }


def peak_memory(trainer: "Trainer", steps: Iterator[list["MicroBatch"]], ranks) -> float:
    """Bytes, over the second and third step: on the GPU, else of the process."""
    import torch

    trainer.step(next(steps))
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    for _ in range(2):
        trainer.step(next(steps))
    # getrusage() would count the memory of the process that started this one
    status = Path("/proc/self/status")
    if ranks.device.type != "cuda" and status.exists():
        return 1024.0 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return ranks.peak_memory()


if __name__ == "__main__":
    run_main(main)
