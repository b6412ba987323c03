"""What the sections of bench.gpu share: the settings, and what is made once from them."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bench.common import Report, training_steps
from topogpt.errors import check_at_least
from topogpt.settings import GPTConfig, TopoConfig, TrainConfig

Section = Literal[
    "ceiling", "step", "checks", "syncs", "profile", "spatial", "cross_entropy", "attention", "optimizer",
    "step_variants", "compile_modes",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Measure what needs a GPU: python -m bench.gpu [--sections ceiling step ...]."""

    sections: tuple[Section, ...] = get_args(Section)  # in this order
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA, where it is there
    tiny: bool = False  # sizes that a CPU does in seconds, and no code generation
    train_data_dir: tuple[str, ...] = ()  # token shards; without them the tokens are random
    per_device_batch_size: int = 48  # sequences of 1024 tokens in a micro-step
    repeats: int = 10  # of each measurement, in turns
    time_limit: int = 530  # seconds for everything
    json: bool = False  # one JSON object a line on stdout

    def __post_init__(self) -> None:
        for name in ("per_device_batch_size", "repeats", "time_limit"):
            check_at_least(name, getattr(self, name), 1)


class Bench:
    """What the sections share: sizes, data, the report, and trainers that are made once."""

    def __init__(self, cfg: GpuConfig, report: Report, device, stack: ExitStack, end: float) -> None:
        self.cfg, self.report, self.device, self.stack, self.end = cfg, report, device, stack, end
        self.cuda, self.tiny, self.repeats = device.type == "cuda", cfg.tiny, cfg.repeats
        self.trainers: dict = {}
        self.backend = "aot_eager" if cfg.tiny else "inductor"
        model = GPTConfig()
        if cfg.tiny:
            model = GPTConfig(n_layer=1, n_head=2, n_embd=36, block_size=32, vocab_size=128)
        topo = TopoConfig(radius=3, neighbourhoods=2) if cfg.tiny else TopoConfig()
        batch = 2 if cfg.tiny else cfg.per_device_batch_size
        data = {"per_device_batch_size": batch, "batch_size": batch, "train_data_dir": cfg.train_data_dir}
        how = {"dtype": "bfloat16", "compile": "on", "seed": 0}
        self.train = TrainConfig(run_name="bench", model=model, topo=topo, **data, **how)
        self.n_tokens = batch * model.block_size

    def seconds_left(self) -> float:
        return self.end - time.perf_counter()

    def steps(self, train: TrainConfig | None = None) -> Iterator:
        """Micro-batches of each step of a run, from train.py's loader."""
        return training_steps(train or self.train, self.device, self.stack)

    def trainer(self, name: str):
        """One of training.SETUPS, kept for later sections."""
        from bench.training import SETUPS

        if name not in self.trainers:
            self.trainers[name] = self.new_trainer(SETUPS[name])
        return self.trainers[name]

    def new_trainer(self, setup, train: TrainConfig | None = None):
        from bench.training import Trainer

        return Trainer(train or self.train, replace(setup, backend=self.backend), self.device)

    def free(self) -> None:
        """Give back memory that nothing holds, and gradients."""
        import gc

        import torch

        for trainer in self.trainers.values():
            trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
