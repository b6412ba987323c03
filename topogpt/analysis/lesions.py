"""Lesions: units that add nothing, or a constant, to the residual stream, and what is lost with them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from topogpt import rng
from topogpt.analysis.activations import batches

if TYPE_CHECKING:
    from torch import Tensor

    from topogpt.model.gpt import GPT


@contextlib.contextmanager
def hooked(model: "GPT", sheets: Sequence[str], hooks: Sequence[Callable]) -> Iterator[None]:
    """Run a hook on the output of the branch behind each sheet, before it joins the residual stream."""
    with contextlib.ExitStack() as stack:
        for sheet, hook in zip(sheets, hooks, strict=True):
            _, layer, branch = sheet.split(".")
            handle = getattr(model.transformer.h[int(layer)], branch).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def lesioned(
    model: "GPT", sheets: Sequence[str], units: np.ndarray, fill: np.ndarray
) -> contextlib.AbstractContextManager[None]:
    """The model with units, (S, n_units) bool, showing the values in fill, (S, n_units), for every token."""
    import torch

    mask = torch.from_numpy(units).to(model.device)
    values = torch.from_numpy(fill.astype(np.float32)).to(model.device)

    def replace(i: int, module: object, inputs: object, out: "Tensor") -> "Tensor":
        return torch.where(mask[i], values[i].to(out.dtype), out)

    return hooked(model, sheets, [partial(replace, i) for i in range(len(sheets))])


def mean_outputs(model: "GPT", sheets: Sequence[str], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean output of every unit's branch over the tokens of rows of equal length, (S, n_units)."""
    totals = np.zeros((len(sheets), model.cfg.n_embd))

    def add(i: int, module: object, inputs: object, out: "Tensor") -> None:
        totals[i] += out.float().sum((0, 1)).double().cpu().numpy()

    with hooked(model, sheets, [partial(add, i) for i in range(len(sheets))]):
        cross_entropy(model, rows)
    return totals / sum(len(row) - 1 for row in rows)


def random_units(among: np.ndarray, k: int, seed: int, draw: int) -> np.ndarray:
    """k random units among some, (S, n_units) bool; a draw's smaller lesions lie within its larger ones."""
    candidates = np.flatnonzero(among)
    mask = np.zeros(among.shape, bool)
    mask.flat[candidates[rng.permutation(len(candidates), seed, "lesion", draw)[:k]]] = True
    return mask


def cross_entropy(model: "GPT", rows: Sequence[np.ndarray]) -> float:
    """Nats per token over all tokens of all rows but the first of each, which nothing predicts."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for batch in batches([len(row) - 1 for row in rows]):
            longest = max(len(rows[i]) for i in batch)
            tokens = torch.zeros(len(batch), longest - 1, dtype=torch.int64)
            targets = torch.full_like(tokens, -1)
            for line, i in enumerate(batch):
                row = torch.from_numpy(rows[i].astype(np.int64))
                tokens[line, : len(row) - 1], targets[line, : len(row) - 1] = row[:-1], row[1:]
            loss = model(tokens.to(model.device), targets.to(model.device), keep_logits=False).loss
            total += loss.item() * int((targets >= 0).sum())
    return total / sum(len(row) - 1 for row in rows)
