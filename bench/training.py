"""Optimiser steps to be measured: the product's own, with pieces exchanged, and the usual eager loop."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bench.variants import CandidateLoss, How, LoopLoss, pad_heads
from topogpt.distributed import Ranks
from topogpt.model.gpt import GPT, Output
from topogpt.settings import TrainConfig
from topogpt.spatial.schedule import weight_at
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.text.loader import MicroBatch
from topogpt.training import setup as product
from topogpt.training.parallel import compiles
from topogpt.training.step import optimizer_step

Mark = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a step is computed; the defaults are the product's."""

    spatial: Literal["product", "none", "loop"] | How = "product"  # which spatial loss
    stored_logits: bool = False  # F.cross_entropy of all logits
    compile: str = ""  # mode of torch.compile, or "eager"; "" = as train.py: default on CUDA, else eager
    backend: str = "inductor"  # of torch.compile
    head_width: int = 0  # pad heads to this; 0 = as they are
    usual: bool = False  # AdamW without fusion, and the host waits for the loss of every micro-step


SETUPS = {
    "topographic": Setup(),
    "control": Setup(spatial="none"),
    "usual eager loop": Setup(spatial="loop", stored_logits=True, compile="eager", usual=True),
}


class InPlace(nn.Module):
    """Another spatial loss in the place of the product's, on the same neighbourhoods."""

    def __init__(self, ours: TopoLMLoss, other: nn.Module) -> None:
        super().__init__()
        self.ours, self.other = ours, other
        self.sheets, self.positions, self.choose = ours.sheets, ours.positions, ours.choose

    def forward(self, activations: dict[str, Tensor], chosen: Tensor) -> Tensor:
        return self.other(activations, chosen)


class StoredLogits(nn.Module):
    """The model, which keeps its logits whatever it is told."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, *, activations: bool, keep_logits: bool) -> Output:
        return self.model(tokens, targets, activations=activations, keep_logits=True)


class Trainer:
    """What the product trains with, to take steps one at a time."""

    def __init__(self, cfg: TrainConfig, setup: Setup, device: torch.device) -> None:
        allow_recompiles()
        if setup.spatial == "none":
            cfg = replace(cfg, topo=replace(cfg.topo, loss="none"))
        self.cfg, self.setup, self.device, self.n_steps = cfg, setup, device, 0
        with device:  # drawing the weights on the CPU takes longer than all the rest
            self.t = product.build(cfg, Ranks(0, 1, device))
        self.model, self.objective, self.optimizer = self.t.model, self.t.objective, self.t.optimizer
        self.exchange(setup)
        mode = setup.compile or ("default" if compiles(cfg, device) else "eager")
        self.compiled = mode != "eager"
        self.t.parallel = compiled(self.objective, mode, setup.backend) if self.compiled else self.objective

    def exchange(self, setup: Setup) -> None:
        """Put the pieces that a setup names into the place of the product's."""
        if setup.head_width:
            pad_heads(self.model, setup.head_width)
        ours = self.objective.spatial
        if setup.spatial == "loop":
            other = LoopLoss(self.cfg.topo, ours.positions)
            self.objective.spatial = InPlace(ours, other.to(self.device))
        elif isinstance(setup.spatial, How):
            self.objective.spatial = InPlace(ours, CandidateLoss(ours, setup.spatial))
        if setup.stored_logits:
            self.objective.model = StoredLogits(self.model)
        if setup.usual:
            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in self.optimizer.param_groups]
            optim = self.cfg.optim
            self.optimizer = torch.optim.AdamW(
                groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), foreach=True
            )
            self.t.optimizer = self.optimizer

    def losses(self, batch: MicroBatch, step: int = 0, *, eager: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy and spatial loss per sheet, with their graph."""
        if self.setup.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        chosen = self.objective.choose(self.cfg.seed, step, batch.index)
        call = self.objective if eager else self.t.parallel
        return call(batch.tokens, batch.targets, chosen)

    def step(self, batches: Sequence[MicroBatch], mark: Mark | None = None) -> None:
        """One optimiser step as train.py takes it, or as is usual; `mark` is told of each part as it ends."""
        step = self.n_steps
        self.n_steps += 1
        if self.setup.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with watched(self, mark) if mark else contextlib.nullcontext():
            if self.setup.usual:
                self.usual_step(step, batches)
            else:
                optimizer_step(self.t, step, batches)

    def usual_step(self, step: int, batches: Sequence[MicroBatch]) -> None:
        weight, total = weight_at(self.cfg.topo, step, self.cfg.max_steps), 0.0
        for batch in batches:
            ce, spatial = self.losses(batch, step)
            ((ce + weight * spatial.sum()) / len(batches)).backward()
            total += ce.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.grad_clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def watched(trainer: Trainer, mark: Mark) -> Iterator[None]:
    """Tell `mark` of the parts of a step: data, forward, spatial (not compiled), backward, optimiser."""
    t, parallel, before = trainer.t, trainer.t.parallel, iter(["data"])

    def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        mark(next(before, "backward"))
        losses = parallel(*arguments)
        mark("forward")
        return losses

    with contextlib.ExitStack() as stack:
        hooks = [t.optimizer.register_step_pre_hook(lambda *_: mark("backward"))]  # with the clipping
        if not trainer.compiled:
            spatial = trainer.objective.spatial
            hooks.append(spatial.register_forward_pre_hook(lambda *_: mark("forward")))
            hooks.append(spatial.register_forward_hook(lambda *_: mark("spatial")))
        for hook in hooks:
            stack.callback(hook.remove)
        t.parallel = call
        stack.callback(setattr, t, "parallel", parallel)
        yield
    mark("optimiser")


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
