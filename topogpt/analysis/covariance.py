"""Covariance of units over any number of tokens, in memory that does not depend on it."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Covariance:
    """Sums over tokens, in float64, of deviations from the first batch's mean and of their products.

    The deviations are small, so that products of one batch may be taken in float32.
    """

    def __init__(self) -> None:
        self.n_tokens = 0

    def add(self, x: "Tensor") -> None:
        """Count the activations of some tokens, (N, n_units)."""
        import torch

        from topogpt.distributed import widest

        if not self.n_tokens:
            self.shift = x.float().mean(0)
            self.total = torch.zeros(x.shape[1], dtype=torch.float64)
            self.products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        x = x.float() - self.shift
        self.n_tokens += len(x)
        self.total += x.sum(0, dtype=widest(x.device)).cpu()
        self.products += (x.T @ x).cpu()  # the sum is float64

    @property
    def scatter(self) -> "Tensor":
        """Sums of products of centred activations, (n_units, n_units): N - 1 times the covariance."""
        return self.products - self.total.outer(self.total) / self.n_tokens


def correlations_of(covariance: np.ndarray) -> np.ndarray:
    """Pearson correlations; a unit without variance correlates with nothing."""
    variance = covariance.diagonal()
    scale = np.where(variance > 1e-12, 1 / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
    return covariance * scale[:, None] * scale
