"""What training minimises: the model's cross-entropy and the spatial loss on its sheets."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from topogpt.model.gpt import GPT
from topogpt.spatial.topolm import TopoLMLoss

FLASH = [SDPBackend.FLASH_ATTENTION]
ANY = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class Objective(nn.Module):
    """The model and the spatial loss on its sheets: what is compiled, and what DDP wraps."""

    def __init__(self, model: GPT, spatial: TopoLMLoss, dtype: torch.dtype, flash: bool = False) -> None:
        """dtype: of matrix products. flash: allow no other attention kernel, so that none is slow unseen."""
        super().__init__()
        self.model, self.spatial, self.dtype, self.flash = model, spatial, dtype, flash

    def forward(self, tokens: Tensor, targets: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy and the spatial loss per sheet, (S,); zeros where chosen is None."""
        autocast = torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, sdpa_kernel(FLASH if self.flash else ANY):
            out = self.model(tokens, targets, activations=chosen is not None, keep_logits=False)
        if chosen is None:
            return out.loss, out.loss.new_zeros(len(self.spatial.sheets))
        return out.loss, self.spatial(out.activations, chosen)
