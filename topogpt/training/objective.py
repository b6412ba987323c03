"""What training minimises: the model's cross-entropy and the spatial loss on its sheets."""

import importlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from topogpt.distributed import Ranks
from topogpt.model.gpt import GPT
from topogpt.settings import TopoConfig, TrainConfig

FLASH = [SDPBackend.FLASH_ATTENTION]
ANY = [*FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
MEASURED = "topolm"  # what is measured on the sheets of a control


def spatial_loss(cfg: TopoConfig, positions: Mapping[str, np.ndarray]) -> nn.Module:
    """The spatial loss that topo.loss names: `LOSS` of the file of that name in spatial/."""
    name = MEASURED if cfg.loss == "none" else cfg.loss
    return importlib.import_module(f"topogpt.spatial.{name}").LOSS(cfg, positions)


class Objective(nn.Module):
    """The model and the spatial loss on its sheets: what is compiled, and what DDP wraps."""

    def __init__(
        self, model: GPT, cfg: TrainConfig, positions: Mapping[str, np.ndarray], ranks: Ranks
    ) -> None:
        """positions: sheet -> (n_units, 2)."""
        super().__init__()
        self.model, self.spatial = model, spatial_loss(cfg.topo, positions)
        self.with_spatial = cfg.topo.loss != "none"
        bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and ranks.device.type == "cuda")
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32  # of matrix products
        self.flash = bfloat16 and ranks.has_flash  # no other attention kernel, so that none is slow unseen

    @property
    def positions(self) -> dict[str, np.ndarray]:
        return self.spatial.positions

    def choose(self, seed: int, step: int, micro_batch: int) -> Tensor | None:
        """What the spatial loss draws for a micro-batch of training; None without one."""
        return self.spatial.choose(seed, step, micro_batch) if self.with_spatial else None

    def forward(self, tokens: Tensor, targets: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy and the spatial loss per sheet, (S,); zeros where chosen is None."""
        autocast = torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, sdpa_kernel(FLASH if self.flash else ANY):
            out = self.model(tokens, targets, activations=chosen is not None, keep_logits=False)
        if chosen is None:
            return out.loss, out.loss.new_zeros(len(self.spatial.sheets))
        return out.loss, self.spatial(out.activations, chosen)

    def describe(self, compiled: bool) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        attention = "flash attention only" if self.flash else "any attention kernel"
        return f"{dtype}, {'compiled' if compiled else 'not compiled'}, {attention}"
