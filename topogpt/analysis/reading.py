"""One pass over a text: activations of sheets and of any module by name, and what is kept of them."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np

from topogpt import topo
from topogpt.analysis.activations import check_finite
from topogpt.analysis.covariance import Covariance
from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.terminal import progress

TOKENS_PER_BATCH = 2048


def read(subject: Subject, windows: np.ndarray, names: Iterable[str], take: Callable) -> None:
    """Read windows (n, length), and call take(name, start, x) with what each sheet or module puts out.

    start is the place of the batch's first token in the text, x is (B, T, n_units) on the model's device.
    """
    import torch

    model, names = subject.model, list(names)
    n_windows, length = windows.shape
    modules = dict(model.named_modules())
    sheets = [name for name in names if name not in modules]
    per_batch, start = max(1, TOKENS_PER_BATCH // length), 0

    def hand_over(name: str, out: object) -> None:
        if not isinstance(out, torch.Tensor) or out.shape[:-1] != batch.shape:
            raise UserError(f"names: {name} gives no activation per token; name a layer, such as layer.*.mlp")
        take(name, start * length, out)

    def hook(name: str, module: object, inputs: tuple, out: object) -> None:
        hand_over(name, out)

    with torch.inference_mode(), ExitStack() as stack:
        for name in names:
            if name in modules:
                stack.callback(modules[name].register_forward_hook(partial(hook, name)).remove)
        for start in progress(range(0, n_windows, per_batch), f"{subject.label}: reading text"):
            batch = torch.from_numpy(windows[start : start + per_batch]).to(model.device)
            named = model(batch, activations=sheets, last_only=True).activations
            for name in sheets:
                hand_over(name, named.pop(name))


# ---- sheets ----------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """What one pass over the text leaves of each sheet, units in the order of the grid."""

    covariance: dict[str, np.ndarray]  # sheet -> (h w, h w): sums of products of centred activations
    maps: np.ndarray  # (S, n_maps, h, w): single tokens
    tokens: list[int]  # of the maps


def collect(subject: Subject, windows: np.ndarray, n_maps: int) -> Statistics:
    """Read the text once; the maps of n_maps tokens, evenly spaced over it, are kept."""
    import torch

    at = np.linspace(0, windows.size - 1, min(n_maps, windows.size)).round().astype(int)
    device = subject.model.device
    order = {s: torch.from_numpy(topo.units_by_cell(p)).to(device) for s, p in subject.positions.items()}
    sums = {sheet: Covariance() for sheet in order}
    maps: dict[str, list[np.ndarray]] = {sheet: [] for sheet in order}

    def take(sheet: str, start: int, x: torch.Tensor) -> None:
        x = x.flatten(0, 1).float()[:, order[sheet]]  # (N, h w)
        maps[sheet].append(x[at[(at >= start) & (at < start + len(x))] - start].cpu().numpy())
        sums[sheet].add(x)

    read(subject, windows, subject.sheets, take)
    covariance = {sheet: found.scatter.numpy() for sheet, found in sums.items()}
    check_finite(covariance)
    grids = np.stack([np.concatenate(found).reshape(-1, *subject.grid) for found in maps.values()])
    return Statistics(covariance, grids, windows.flatten()[at].tolist())
