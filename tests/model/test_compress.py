"""Smaller MLPs: the sizes of the paper, what must not change, fits. pytest tests/model/test_compress.py"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from topogpt.errors import UserError
from topogpt.model import compress
from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig

NANO = GPTConfig(n_head=12, n_embd=768)
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=64)
KINDS = [SMALL, dataclasses.replace(SMALL, bias=True), dataclasses.replace(SMALL, n_inner=30)]


def made(cfg: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """A model whose hidden units are far from linear, with biases that are not zero."""
    torch.manual_seed(seed)
    model = GPT(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.dim() == 2 else 1).add_(0.05 * torch.randn_like(parameter))
    return model


def some_tokens(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (n, 32), generator=torch.Generator().manual_seed(seed))


def gathered(model: GPT, tokens: torch.Tensor, size: int = 16) -> compress.HiddenProducts:
    products = compress.HiddenProducts(model.cfg.n_layer, model.cfg.n_hidden)
    with torch.inference_mode(), compress.watched(model, products):
        for rows in tokens.split(size):
            model(rows, last_only=True)
    return products


def narrowed(model: GPT, keep: float, how: str = "pivot") -> compress.Compressed:
    choices = compress.choose(model, gathered(model, some_tokens()), keep, how)
    return compress.units(model, keep, choices)


def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def hidden_of(model: GPT, tokens: torch.Tensor, layer: int) -> np.ndarray:
    found = []
    hook = model.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    logits(model, tokens)
    hook.remove()
    return found[0].flatten(0, 1).double().numpy()


# ---- downsample ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep, shape, millions",
    [(1.0, (48, 64), 124.4), (0.8, (42, 57), 118.1), (0.5, (33, 45), 109.7), (0.2, (21, 28), 101.5)],
)
def test_the_sheets_and_sizes_are_the_paper_s(keep, shape, millions):
    assert compress.downsampled_shape(3072, keep) == shape
    with torch.device("meta"):
        model = GPT(NANO)
    found = compress.downsample(model, keep)
    assert found.n_parameters == model.n_parameters() - 12 * 768 * (3072 - shape[0] * shape[1])
    assert round(found.n_parameters / 1e6, 1) == millions
    assert found.model.transformer.h[3].mlp.c_fc.weight.shape == (3072, 768)


def test_a_root_that_is_whole_is_not_rounded_down():
    assert compress.downsampled_shape(100, 0.49) == (7, 7)
    assert compress.downsampled_shape(3136, 0.25) == (28, 28)
    assert compress.downsampled_shape(100, 0.81) == (9, 9)


def test_sheets_are_resized_row_by_row():
    """Against numpy: at half the side, a unit is the mean of four, and the weights' other axis stays."""
    weight = torch.randn(64, 3)
    small = compress.resized(weight, (8, 8), (4, 4)).numpy()
    assert np.allclose(small, weight.numpy().reshape(4, 2, 4, 2, 3).mean((1, 3)).reshape(16, 3), atol=1e-6)


def test_what_is_the_same_over_the_sheet_survives_exactly():
    model = made()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data = torch.randn(1, 16).repeat(64, 1)
    for keep in (0.8, 0.5, 0.2, 0.02):
        after = compress.downsample(model, keep).model
        for a, b in zip(model.transformer.h, after.transformer.h, strict=True):
            assert torch.allclose(a.mlp.c_fc.weight, b.mlp.c_fc.weight, rtol=1e-6, atol=0)


def test_a_smooth_sheet_loses_less_than_a_rough_one():
    smooth, rough = made(), made()
    ramp = torch.linspace(-1, 1, 8)[:, None] + torch.linspace(-1, 1, 8)
    for i, block in enumerate(smooth.transformer.h):
        weight = ramp.reshape(-1, 1) * torch.randn(1, 16)
        block.mlp.c_fc.weight.data = weight
        rough.transformer.h[i].mlp.c_fc.weight.data = weight[torch.randperm(64)]
    changes = []
    for model in (smooth, rough):
        before, after = (
            m.transformer.h[0].mlp.c_fc.weight for m in (model, compress.downsample(model, 0.5).model)
        )
        changes.append((before - after).norm().item())
    assert changes[0] < 0.3 * changes[1]


# ---- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", KINDS, ids=["plain", "bias", "n_inner"])
@pytest.mark.parametrize("method", ["downsample", "every_nth", "l1", "units"])
def test_keeping_all_changes_nothing_and_the_model_given_never_changes(cfg, method):
    model, tokens = made(cfg), some_tokens(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for keep in (1.0, 0.5):
        found = narrowed(model, keep) if method == "units" else getattr(compress, method)(model, keep)
        if keep == 1.0:
            assert found.model.cfg == model.cfg and found.n_parameters == model.n_parameters()
            assert found.n_index_bits == 0
            assert torch.equal(logits(found.model, tokens), logits(model, tokens))
        else:
            assert found.n_parameters < model.n_parameters()
            assert (logits(found.model, tokens) - logits(model, tokens)).abs().max() > 1e-3
        assert found.model.lm_head.weight is found.model.transformer.wte.weight
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_every_nth_keeps_units_that_are_equally_far_apart():
    assert compress.spaced(12, 6).tolist() == [1, 3, 5, 7, 9, 11]
    assert compress.spaced(10, 2).tolist() == [2, 7]
    assert compress.spaced(7, 7).tolist() == list(range(7))
    for n, k in ((3136, 2509), (3072, 614), (64, 13)):
        gaps = np.diff(compress.spaced(n, k).numpy())
        assert len(gaps) == k - 1 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("bias", [False, True])
def test_every_nth_is_a_narrower_model_that_is_not_fitted(bias):
    model = made(dataclasses.replace(SMALL, bias=bias))
    found = compress.every_nth(model, 0.25)
    hidden = hidden_of(found.model, some_tokens(2), 0)
    alive = np.zeros(64, bool)
    alive[compress.spaced(64, 16).numpy()] = True
    assert (hidden[:, ~alive] == 0).all() and (hidden[:, alive] != 0).any(0).all()
    with torch.device("meta"):
        narrow = GPT(dataclasses.replace(model.cfg, n_inner=16))
    assert found.n_parameters == narrow.n_parameters()


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
def test_l1_is_torch_s(keep):
    model = made()
    found = compress.l1(model, keep)
    zeros = 0
    for a, b in zip(model.transformer.h, found.model.transformer.h, strict=True):
        prune.l1_unstructured(a.mlp.c_fc, "weight", amount=1 - keep)
        assert torch.equal(a.mlp.c_fc.weight, b.mlp.c_fc.weight)
        zeros += int((b.mlp.c_fc.weight == 0).sum())
    assert found.n_parameters == found.model.n_parameters() - zeros
    assert found.n_index_bits == 2 * 64 * 16


def test_what_cannot_be_made_smaller_is_refused():
    with pytest.raises(UserError, match="keep = 0.01 leaves nothing of a sheet of 8x8 units"):
        compress.downsample(made(), 0.01)
    model = made()
    model.transformer.h[1].mlp.c_fc.weight.data.zero_()
    with pytest.raises(UserError, match="l1 has no weights to choose from"):
        compress.l1(model, 0.5)


# ---- units ---------------------------------------------------------------------------------------


def test_sums_do_not_depend_on_how_the_tokens_come():
    model, tokens = made(), some_tokens()
    rows = hidden_of(model, tokens, 1)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    expected = rows.T @ rows
    for size in (64, 16, 7):
        assert np.allclose(gathered(model, tokens, size)[1].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", ["pivot", "spaced"])
def test_the_fit_is_least_squares(bias, how, monkeypatch):
    """Against numpy.linalg.lstsq on all tokens at once, without ridge."""
    monkeypatch.setattr(compress, "RIDGE", 1e-14)
    model, tokens = made(dataclasses.replace(SMALL, bias=bias)), some_tokens()
    choices = compress.choose(model, gathered(model, tokens), 0.4, how)
    small = compress.units(model, 0.4, choices).model
    for i, (before, after) in enumerate(zip(model.transformer.h, small.transformer.h, strict=True)):
        order = choices[i].order
        kept = (compress.spaced(64, 26) if order is None else order).sort().values
        assert torch.equal(after.mlp.c_fc.weight, before.mlp.c_fc.weight[kept])
        rows = hidden_of(model, tokens, i)
        predictors = rows[:, kept.numpy()]
        if bias:
            predictors = np.concatenate([predictors, np.ones((len(rows), 1))], 1)
        outputs = rows @ before.mlp.c_proj.weight.detach().double().numpy().T
        fitted = np.linalg.lstsq(predictors, outputs, rcond=None)[0]
        assert np.allclose(after.mlp.c_proj.weight.detach().numpy(), fitted[:26].T, atol=1e-4)
        if bias:
            expected = before.mlp.c_proj.bias.detach().numpy() + fitted[26]
            assert np.allclose(after.mlp.c_proj.bias.detach().numpy(), expected, atol=1e-4)


def test_the_fit_beats_dropping_units_on_other_text():
    model, others = made(), some_tokens(seed=9)
    before = logits(model, others)
    plain = compress.every_nth(model, 0.5).model
    errors = {"plain": F.mse_loss(logits(plain, others), before).item()}
    for how in ("spaced", "pivot"):
        errors[how] = F.mse_loss(logits(narrowed(model, 0.5, how).model, others), before).item()
    assert errors["pivot"] < errors["spaced"] < errors["plain"]


@pytest.mark.parametrize("bias", [False, True])
def test_identical_pairs_are_halved_without_loss(bias):
    """Wherever the two of a pair lie."""
    model, tokens = made(dataclasses.replace(SMALL, bias=bias)), some_tokens(seed=9)
    for i, block in enumerate(model.transformer.h):
        twin = torch.randperm(64, generator=torch.Generator().manual_seed(i))
        for parameter in block.mlp.c_fc.parameters():
            parameter.data[twin[32:]] = parameter.data[twin[:32]]
    small = narrowed(model, 0.5)
    assert small.model.cfg.n_inner == 32
    assert (logits(small.model, tokens) - logits(model, tokens)).abs().max() < 1e-3
    assert (logits(compress.every_nth(model, 0.5).model, tokens) - logits(model, tokens)).abs().max() > 0.1


def test_neighbours_that_are_alike_are_halved_by_spacing():
    model, tokens = made(), some_tokens(seed=9)
    for block in model.transformer.h:
        weight = block.mlp.c_fc.weight.data
        weight[::2] = weight[1::2]
    small = narrowed(model, 0.5, "spaced").model
    assert (logits(small, tokens) - logits(model, tokens)).abs().max() < 1e-3


def slow_pivots(products: np.ndarray, k: int) -> list[int]:
    rest, order = products.copy(), []
    for _ in range(k):
        left = rest.diagonal().copy()
        left[order] = -np.inf
        i = int(left.argmax())
        order.append(i)
        rest -= np.outer(rest[i], rest[i]) / rest[i, i]
    return order


def test_pivots_explain_what_those_of_a_plain_loop_do():
    rows = np.random.default_rng(0).standard_normal((500, 90)) @ np.diag(np.linspace(0.1, 3, 90) ** 2)
    rows[:, 60:] += rows[:, :30] * 2  # not all of them are needed
    products = rows.T @ rows
    assert compress.first_pivots(torch.from_numpy(products), 20).tolist() == slow_pivots(products, 20)

    def unexplained(order: list[int]) -> float:
        fitted = np.linalg.lstsq(rows[:, order], rows, rcond=None)[0]
        return float(((rows - rows[:, order] @ fitted) ** 2).sum())

    for k in (20, 70):
        ours = compress.pivot_order(torch.from_numpy(products), k).tolist()
        assert len(set(ours)) == k
        assert unexplained(ours) <= 1.3 * unexplained(slow_pivots(products, k)) + 1e-6
    assert sorted(compress.pivot_order(torch.from_numpy(products), 90).tolist()) == list(range(90))


def test_a_unit_that_never_fires_is_the_first_to_go():
    model = made()
    for block in model.transformer.h:
        block.mlp.c_proj.weight.data[:, 7] = 0.0
    for choice in compress.choose(model, gathered(model, some_tokens()), 1.0):
        assert choice.order[-1] == 7
