"""Make the MLPs of a trained GPT smaller, four ways; every function returns a new model and its size.

    downsample(model, 0.5)      # each c_fc as a sheet (h, w, n_embd), resized and scaled up again (TopoNets)
    every_nth(model, 0.5)       # equally spaced units of the sheet; the others give nothing
    l1(model, 0.5)              # the largest weights of each c_fc, wherever they lie: the yardstick
    units(model, 0.5, choices)  # a narrower model, its c_proj fitted so that kept units stand for the others

The outputs of c_fc lie on a sheet row by row, as square as it can be (3072 units: 48x64). Biases stay whole
where only weights are resized or cut. `units` takes what `HiddenProducts` gathered on some text; the rest
takes the weights alone.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topogpt.errors import UserError
from topogpt.model.gpt import GPT, MLP
from topogpt.topo import grid_shape

RIDGE = (
    1e-6  # of the mean square of a hidden unit, added to each: what rounding and little text may not decide
)
BLOCK = 32  # units that `pivot_order` takes at a time


class Compressed(NamedTuple):
    model: GPT  # of the shape of the one before, but for `units`
    n_parameters: int  # that are left: what has to be stored
    n_index_bits: int = 0  # besides, where it has to be said which ones these are


# ---- by the weights alone --------------------------------------------------------------------------------


def downsampled_shape(n_units: int, keep: float) -> tuple[int, int]:
    """Height and width of a sheet of n_units at a share: 3072 (48x64) at 0.5 -> (33, 45); UserError at 0."""
    h, w = grid_shape(n_units)
    small = int(h * keep**0.5 + 1e-9), int(w * keep**0.5 + 1e-9)  # 0.7 * 10 is 7
    if min(small) < 1:
        raise UserError(f"keep = {keep} leaves nothing of a sheet of {h}x{w} units; give a larger --keep")
    return small


def downsample(model: GPT, keep: float) -> Compressed:
    """Each c_fc as a sheet, bilinearly resized to a share of its units, and scaled up again to be used."""
    small, removed = copy.deepcopy(model), 0
    for block in small.transformer.h:
        weight = block.mlp.c_fc.weight
        n, depth = weight.shape
        shape = downsampled_shape(n, keep)
        weight.data = resized(resized(weight.data, grid_shape(n), shape), shape, grid_shape(n))
        removed += (n - shape[0] * shape[1]) * depth
    return Compressed(small, model.n_parameters() - removed)


def resized(weight: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Weights (h * w, depth) of a sheet, bilinearly resized: (h' * w', depth)."""
    sheet = weight.T.reshape(1, -1, *before)  # (1, depth, h, w)
    sheet = F.interpolate(sheet, size=after, mode="bilinear", align_corners=False)
    return sheet.reshape(weight.shape[1], -1).T.contiguous()


def n_kept(n: int, keep: float) -> int:
    return max(1, round(keep * n))


def spaced(n: int, k: int) -> Tensor:
    """k of n units, equally spaced in the order of the sheet, (k,) int64."""
    return ((torch.arange(k) + 0.5) * n / k).long()


def every_nth(model: GPT, keep: float) -> Compressed:
    """Every n-th unit of each sheet; the others get weights of zero, and GELU(0) = 0 of c_proj's input.

    What is left is a model of fewer hidden units, so neither their weights nor those that read them count.
    """
    small, removed = copy.deepcopy(model), 0
    for block in small.transformer.h:
        c_fc = block.mlp.c_fc
        n = c_fc.out_features
        dropped = torch.ones(n, dtype=torch.bool)
        dropped[spaced(n, n_kept(n, keep))] = False
        for parameter in c_fc.parameters():
            parameter.data[dropped] = 0.0
            removed += parameter[dropped].numel()
        removed += int(dropped.sum()) * block.mlp.c_proj.out_features
    return Compressed(small, model.n_parameters() - removed)


def l1(model: GPT, keep: float) -> Compressed:
    """Of each c_fc the share of weights that are largest; the others are zero (prune.l1_unstructured's)."""
    small, removed, n_bits = copy.deepcopy(model), 0, 0
    for block in small.transformer.h:
        weight = block.mlp.c_fc.weight
        if not weight.count_nonzero():
            raise UserError("l1 has no weights to choose from: a c_fc of the model is zero; leave out l1")
        n = weight.numel() - round(keep * weight.numel())
        weight.data.view(-1)[weight.data.abs().view(-1).topk(n, largest=False).indices] = 0.0
        removed += n
        n_bits += weight.numel() if n else 0  # a bit a weight: whether it is there
    return Compressed(small, model.n_parameters() - removed, n_bits)


# ---- a narrower model, fitted ----------------------------------------------------------------------------


class HiddenProducts:
    """Sums over tokens of the products of an MLP's hidden units, and of 1: the normal equations of any fit.

    (n + 1, n + 1) float64 for each layer, whatever the number of tokens.
    """

    def __init__(self, n_layer: int, n_hidden: int, device: torch.device | str = "cpu") -> None:
        double = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.sums = [
            torch.zeros(n_hidden + 1, n_hidden + 1, dtype=torch.float64, device=double)
            for _ in range(n_layer)
        ]

    def add(self, layer: int, hidden: Tensor) -> None:
        """Take in hidden units of some tokens, (..., n)."""
        sums = self.sums[layer]
        rows = hidden.detach().flatten(0, -2).to(sums.device, torch.float64)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        step = -(-rows.shape[1] // 8)
        for i in range(0, rows.shape[1], step):  # what lies above the diagonal, and little else
            sums[i : i + step, i:].addmm_(rows[:, i : i + step].T, rows[:, i:])

    def __getitem__(self, layer: int) -> Tensor:
        upper = self.sums[layer].triu()
        return upper + upper.triu(1).T


@contextlib.contextmanager
def watched(model: GPT, products: HiddenProducts) -> Iterator[None]:
    """Add to the products what the hidden units of every layer do while the model reads."""
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.transformer.h):

            def take(module: nn.Module, inputs: tuple[Tensor, ...], layer: int = i) -> None:
                products.add(layer, inputs[0])

            stack.callback(block.mlp.c_proj.register_forward_pre_hook(take).remove)
        yield


class Choice(NamedTuple):
    """Of one layer: products of hidden units, and these in the order in which they are kept."""

    products: Tensor  # (n + 1, n + 1) float64
    order: Tensor | None  # (k,) int64, for every number of units up to k; None: equally spaced ones


def choose(
    model: GPT, products: HiddenProducts, keep: float, how: Literal["pivot", "spaced"] = "pivot"
) -> list[Choice]:
    """Which units `units` keeps, for every share up to `keep`.

    pivot: one after the other, the unit of which those chosen before explain least, in what it adds to the
    MLP's output (a Cholesky factorisation with pivots). spaced: equally spaced on the sheet; on a map the
    neighbours of a unit that is dropped do what it does.
    """
    found = []
    for i, block in enumerate(model.transformer.h):
        n, sums, order = block.mlp.c_fc.out_features, products[i], None
        if how == "pivot":
            weight = block.mlp.c_proj.weight.detach().to(sums)
            size = weight.norm(dim=0).clamp_min(1e-12)
            order = pivot_order(size[:, None] * sums[:n, :n] * size, n_kept(n, keep))
        found.append(Choice(sums, order))
    return found


def pivot_order(products: Tensor, k: int) -> Tensor:
    """The first k pivots of a Cholesky factorisation of (n, n) products, (k,) int64, found block by block."""
    n = len(products)
    ridge = RIDGE * products.diagonal().mean().clamp_min(1e-300)
    products = products + ridge * torch.eye(n).to(products)
    left = products.diagonal().clone()  # of each unit: what those chosen do not explain
    factor, order = products.new_zeros(n, k), torch.empty(0, dtype=torch.int64, device=products.device)
    while len(order) < k:
        j = len(order)
        b = min(BLOCK, k - j)
        candidates = left.topk(min(4 * b, n - j)).indices
        known = factor[candidates, :j]
        small = products[candidates][:, candidates] - known @ known.T
        new = candidates[first_pivots(small, b)]
        rest = products[new] - factor[new, :j] @ factor[:, :j].T  # (b, n)
        lower = torch.linalg.cholesky(rest[:, new])
        factor[:, j : j + b] = torch.linalg.solve_triangular(lower, rest, upper=False).T
        left -= factor[:, j : j + b].square().sum(1)
        left[new] = -torch.inf
        order = torch.cat([order, new])
    return order


def first_pivots(products: Tensor, k: int) -> Tensor:
    """The same one by one, of a small matrix."""
    rest, chosen = products.cpu().numpy().copy(), []  # small operations, which cost numpy less
    for _ in range(k):
        left = rest.diagonal().copy()
        left[chosen] = -np.inf
        i = int(left.argmax())
        chosen.append(i)
        rest -= np.outer(rest[i], rest[i] / max(rest[i, i], 1e-300))
    return torch.tensor(chosen, device=products.device)


def units(model: GPT, keep: float, choices: Sequence[Choice]) -> Compressed:
    """A model of fewer hidden units, each with its c_fc row; c_proj is fitted so that they stand for all."""
    n = model.cfg.n_hidden
    k = n_kept(n, keep)
    cfg = replace(model.cfg, n_inner=k if k != 4 * model.cfg.n_embd else None)
    small = copy.deepcopy(model)
    small.cfg = cfg
    for block, (products, order) in zip(small.transformer.h, choices, strict=True):
        before = block.mlp
        kept = (spaced(n, k) if order is None else order[:k]).to(before.c_fc.weight.device).sort().values
        block.mlp = MLP(cfg).to(kept.device).train(before.training)
        fitted = refit(before.c_proj, products, kept)
        weights = {f"c_fc.{name}": t[kept] for name, t in before.c_fc.state_dict().items()}
        block.mlp.load_state_dict(weights | {f"c_proj.{name}": t for name, t in fitted.items()})
    return Compressed(small, small.n_parameters())


def refit(c_proj: nn.Linear, products: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Weight and bias of a c_proj that reads the kept units alone, and gives what it gave before.

    Ridge least squares of what the dropped units gave on the kept ones, and on a constant where c_proj has
    a bias; nothing to fit where none is dropped, so keeping all changes nothing.
    """
    weight = c_proj.weight.detach()
    n = weight.shape[1]
    found = {name: t.detach().clone() for name, t in c_proj.named_parameters()}
    found["weight"] = weight[:, kept].clone()
    dropped = torch.ones(n, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    if not dropped.any():
        return found
    kept, dropped = kept.to(products.device), dropped.nonzero()[:, 0].to(products.device)
    predictors = torch.cat([kept, kept.new_tensor([n])]) if c_proj.bias is not None else kept
    among = products[predictors][:, predictors]
    ridge = RIDGE * products.diagonal()[:n].mean().clamp_min(1e-300)
    factor = torch.linalg.cholesky(among + ridge * torch.eye(len(among)).to(among))
    targets = products[predictors][:, dropped] @ weight.to(products)[:, dropped].T  # (k, n_embd)
    extra = torch.cholesky_solve(targets, factor).to(weight)
    found["weight"] += extra[: len(kept)].T
    if c_proj.bias is not None:
        found["bias"] += extra[-1]
    return found
