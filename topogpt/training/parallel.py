"""The objective as a device runs it: compiled, and in parallel over ranks."""

import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topogpt.distributed import Ranks
from topogpt.settings import TrainConfig


def compiles(cfg: TrainConfig, device: torch.device) -> bool:
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def wrap(cfg: TrainConfig, ranks: Ranks, objective: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The objective as evaluation calls it (compiled), and as training does (in parallel over ranks)."""
    compiled = torch.compile(objective, dynamic=False) if compiles(cfg, ranks.device) else objective
    if ranks.world == 1:
        return compiled, compiled
    accepted = inspect.signature(DistributedDataParallel).parameters
    # renamed in torch 2.13
    name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    return compiled, DistributedDataParallel(compiled, gradient_as_bucket_view=True, **{name: False})
