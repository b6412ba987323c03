"""Optimiser steps to be measured: as train.py takes them, and as the usual eager loop does.

The objective is train.py's, with switches for what is compared; nothing here evaluates, logs or saves.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.variants import CandidateLoss, How, LoopLoss, pad_heads
from topogpt import rng
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import TrainConfig
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.schedule import weight_at
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.text.loader import MicroBatch
from topogpt.training.optim import build_optimizer

Mark = Callable[[str], object]
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION]  # pinned as in train.py: another kernel is an error


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a step is computed; the defaults are the product's."""

    spatial: Literal["product", "none", "loop"] | How = "product"  # which spatial loss
    stored_logits: bool = False  # F.cross_entropy of all logits
    compile: str = ""  # mode of torch.compile, or "eager"; "" = as train.py: default on CUDA, else eager
    backend: str = "inductor"  # of torch.compile
    optimizer: Literal["fused", "foreach"] = "fused"  # AdamW
    item: bool = False  # wait for the loss of every micro-step
    head_width: int = 0  # pad heads to this; 0 = as they are


SETUPS = {
    "topographic": Setup(),
    "control": Setup(spatial="none"),
    "usual eager loop": Setup(
        spatial="loop", stored_logits=True, compile="eager", optimizer="foreach", item=True
    ),
}


class Objective(nn.Module):
    """Cross-entropy and spatial loss of each sheet of a micro-batch."""

    def __init__(
        self, model: GPT, spatial: nn.Module | None, dtype: torch.dtype, stored_logits: bool
    ) -> None:
        super().__init__()
        self.model, self.spatial, self.dtype, self.stored_logits = model, spatial, dtype, stored_logits

    def forward(
        self, tokens: Tensor, targets: Tensor, chosen: Tensor | None, mark: Mark | None = None
    ) -> tuple[Tensor, Tensor]:
        autocast = torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast:
            if tokens.device.type == "cuda" and self.dtype == torch.bfloat16:
                with sdpa_kernel(CUDA_BACKENDS):
                    out = self.run(tokens, targets)
            else:
                out = self.run(tokens, targets)
        if mark is not None:
            mark("forward")
        if self.spatial is None:
            return out.loss, out.loss.new_zeros(2 * self.model.cfg.n_layer)
        losses = self.spatial(out.activations, chosen)
        if mark is not None:
            mark("spatial")
        return out.loss, losses

    def run(self, tokens: Tensor, targets: Tensor):
        activations = self.spatial is not None
        return self.model(tokens, targets, activations=activations, keep_logits=self.stored_logits)


class Trainer:
    """A model with its optimiser, to take steps one at a time."""

    def __init__(self, cfg: TrainConfig, setup: Setup, device: torch.device) -> None:
        self.cfg, self.setup, self.device = cfg, setup, device
        self.per_step = cfg.batch_size // cfg.per_device_batch_size
        allow_recompiles()
        torch.set_float32_matmul_precision("high")  # as train.py
        bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        torch.manual_seed(rng.seed(cfg.seed, "initialisation"))
        with device:  # drawing on the CPU takes longer than all the rest
            self.model = GPT(cfg.model)
        if setup.head_width:
            pad_heads(self.model, setup.head_width)
        positions = sheet_positions(cfg.topo, sheet_names(cfg.model.n_layer), cfg.model.n_embd)
        self.product = TopoLMLoss(cfg.topo, positions)
        losses = {"none": None, "product": self.product, "loop": LoopLoss(cfg.topo, positions)}
        how = setup.spatial
        spatial = losses[how] if isinstance(how, str) else CandidateLoss(self.product, how)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.objective = Objective(self.model, spatial, dtype, setup.stored_logits).to(device)
        self.product.to(device)
        self.optimizer = build_optimizer(self.model, cfg.optim)
        if setup.optimizer == "foreach":
            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in self.optimizer.param_groups]
            betas = cfg.optim.beta1, cfg.optim.beta2
            self.optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=betas, foreach=True)
        mode = setup.compile or ("default" if compiles(cfg, device) else "eager")
        self.compiled = mode != "eager"
        self.call = compiled(self.objective, mode, setup.backend) if self.compiled else self.objective
        self.n_steps, self.cross_entropy = 0, math.nan

    def choose(self, step: int, micro_batch: int) -> Tensor | None:
        if self.objective.spatial is None:
            return None
        return self.product.choose(self.cfg.seed, step, micro_batch)

    def losses(self, batch: MicroBatch, step: int = 0, mark: Mark | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy and spatial loss per sheet, with their graph."""
        if self.setup.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        chosen = self.choose(step, batch.index)
        if self.compiled:
            values = self.call(batch.tokens, batch.targets, chosen)
            if mark:
                mark("forward")
            return values
        return self.objective(batch.tokens, batch.targets, chosen, mark)

    def step(self, batches: Iterable[MicroBatch], mark: Mark | None = None) -> None:
        """One optimiser step as train.py takes it; `mark` is told of each part as it ends."""
        step, cfg = self.n_steps, self.cfg
        self.n_steps += 1
        weight = weight_at(cfg.topo, step, cfg.max_steps)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            if mark:
                mark("data")
            ce, spatial = self.losses(batch, step, mark)
            ((ce + weight * spatial.sum()) / self.per_step).backward()
            if self.setup.item:
                total += ce.item() / self.per_step
            else:
                total += ce.detach() / self.per_step
            if mark:
                mark("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optim.grad_clip or torch.inf)
        if self.setup.optimizer == "fused":
            self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.cross_entropy = total
        if mark:
            mark("optimiser")


def compiles(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether train.py compiles with these settings."""
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def compiled(function: Callable, mode: str, backend: str) -> Callable:
    if backend != "inductor":  # others have no modes
        return torch.compile(function, dynamic=False, backend=backend)
    return torch.compile(function, dynamic=False, mode=mode)


def allow_recompiles() -> None:
    """Many variants share one forward(): none of them may fall back to eager unseen."""
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 256)
            break
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True
