"""Interventions: units that show a constant at every token (lesion), or more than usual (stimulation)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from topogpt.analysis.activations import batches
from topogpt.topo import ONE_SHEET, sheet_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from topogpt.model.gpt import GPT

Hook = Callable[["Tensor", slice], "Tensor | None"]  # output, which units of the sheet it holds -> another


def module_of(model: "GPT", sheet: str) -> "Module":
    """What computes a sheet: layer.3.attn, layer.3.mlp, or layer.3.fc (before the GELU)."""
    _, layer, branch = sheet.split(".")
    block = model.transformer.h[int(layer)]
    return block.mlp.c_fc if branch == "fc" else getattr(block, branch)


def pieces(model: "GPT", sheet: str) -> Iterator[tuple["Module", slice]]:
    """The modules behind a sheet, and which of its units each computes: all, but for the sheet all."""
    if sheet != ONE_SHEET:
        yield module_of(model, sheet), slice(None)
        return
    width = model.cfg.n_embd
    for i, branch in enumerate(sheet_names(model.cfg.n_layer)):
        yield module_of(model, branch), slice(i * width, (i + 1) * width)


@contextlib.contextmanager
def hooked(model: "GPT", sheets: Sequence[str], hooks: Sequence[Hook]) -> Iterator[None]:
    """Run a hook on what the modules behind each sheet compute, before anything reads it.

    Args:
        hooks: of each sheet, called as hook(out (B, T, n), units) with the slice of the sheet's units that
            out holds. What it returns is used instead of out; None: out.
    """

    def run(hook: Hook, units: slice, module: object, inputs: object, out: "Tensor") -> "Tensor | None":
        return hook(out, units)

    with contextlib.ExitStack() as stack:
        for sheet, hook in zip(sheets, hooks, strict=True):
            for module, units in pieces(model, sheet):
                handle = module.register_forward_hook(partial(run, hook, units))
                stack.callback(handle.remove)
        yield


def lesioned(
    model: "GPT", sheets: Sequence[str], units: np.ndarray, fill: np.ndarray
) -> contextlib.AbstractContextManager[None]:
    """The model with units, (S, n_units) bool, showing the values in fill, (S, n_units), for every token."""
    return changed(model, sheets, units, fill, lambda out, values: values)


def stimulated(
    model: "GPT", sheets: Sequence[str], units: np.ndarray, added: np.ndarray
) -> contextlib.AbstractContextManager[None]:
    """The model with units, (S, n_units) bool, showing added, (S, n_units), more than they would."""
    return changed(model, sheets, units, added, lambda out, values: out + values)


def changed(
    model: "GPT",
    sheets: Sequence[str],
    units: np.ndarray,
    values: np.ndarray,
    new: Callable[["Tensor", "Tensor"], "Tensor"],
) -> contextlib.AbstractContextManager[None]:
    """The model with units, (S, n_units) bool, showing new(output, values)."""
    import torch

    def replace(mask: "Tensor", value: "Tensor", out: "Tensor", which: slice) -> "Tensor":
        return torch.where(mask[which], new(out, value[which].to(out.dtype)), out)

    hooked_sheets, hooks = [], []
    for sheet, mask, value in zip(sheets, units, values.astype(np.float32), strict=True):
        if mask.any():
            hooked_sheets.append(sheet)
            hooks.append(partial(replace, *(torch.from_numpy(x).to(model.device) for x in (mask, value))))
    return hooked(model, hooked_sheets, hooks)


class Moments(NamedTuple):
    """Of every unit over tokens, (S, n_units) float64."""

    mean: np.ndarray
    sd: np.ndarray


def moments(model: "GPT", sheets: Sequence[str], n_units: int, rows: Sequence[np.ndarray]) -> Moments:
    """Mean and standard deviation of what every unit shows over the tokens of rows of equal length."""
    from topogpt.distributed import widest

    totals, squares = np.zeros((2, len(sheets), n_units))

    def add(i: int, out: "Tensor", units: slice) -> None:
        x = out.to(widest(out.device))
        totals[i, units] += x.sum((0, 1)).cpu().numpy()
        squares[i, units] += (x * x).sum((0, 1)).cpu().numpy()

    with hooked(model, sheets, [partial(add, i) for i in range(len(sheets))]):
        cross_entropy(model, rows)
    n = sum(len(row) - 1 for row in rows)
    mean = totals / n
    return Moments(mean, np.sqrt(np.maximum(squares / n - mean**2, 0)))


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
