"""What training minimises: the model's cross-entropy and the spatial loss on its sheets."""

import importlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.settings import TrainConfig

FLASH = [SDPBackend.FLASH_ATTENTION]
ANY = [*FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
MEASURED = "topolm"  # what is measured on the sheets of a run that trains no loss on its activations


def loss_class(name: str) -> type[nn.Module]:
    """The spatial loss that topo.loss names: `LOSS` of the file of that name in spatial/."""
    return importlib.import_module(f"topogpt.spatial.{name}").LOSS


class Objective(nn.Module):
    """The model and the spatial loss on its sheets: what is compiled, and what DDP wraps."""

    def __init__(
        self, model: GPT, cfg: TrainConfig, positions: Mapping[str, np.ndarray], ranks: Ranks
    ) -> None:
        """positions: sheet -> (n_units, 2)."""
        super().__init__()
        self.model = model
        named = {name: loss_class(name) for name in cfg.topo.objectives}
        try:
            self.of_weights = {n: c(cfg.topo, model) for n, c in named.items() if hasattr(c, "of_weights")}
        except ValueError as error:
            raise UserError(f"topo.loss = {cfg.topo.loss}: {error}") from None
        of_activations = [name for name in named if name not in self.of_weights]
        if len(of_activations) > 1:
            raise UserError(f"topo.loss = {cfg.topo.loss}: one loss on activations at a time; leave one out")
        self.with_spatial = bool(of_activations)
        self.spatial = loss_class(*of_activations or [MEASURED])(cfg.topo, positions)
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
            shown = () if chosen is None else self.spatial.sheets
            out = self.model(tokens, targets, activations=shown, keep_logits=False)
        if chosen is None:
            return out.loss, out.loss.new_zeros(len(self.spatial.sheets))
        return out.loss, self.spatial(out.activations, chosen)

    def loss_of_weights(self, name: str) -> Tensor:
        """A loss on weights alone, its mean over layers; once a step, as no micro-batch changes it."""
        return self.of_weights[name](self.model).mean()

    def describe(self, compiled: bool) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        attention = "flash attention only" if self.flash else "any attention kernel"
        return f"{dtype}, {'compiled' if compiled else 'not compiled'}, {attention}"
