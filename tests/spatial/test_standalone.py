"""The spatial loss on models that are not ours. Run: pytest tests/spatial/test_standalone.py"""

import numpy as np
import pytest
import torch

from topogpt import topo
from topogpt.settings import TopoConfig
from topogpt.spatial.standalone import SpatialLoss
from topogpt.spatial.topolm import TopoLMLoss

SHEETS, N_UNITS = ["a", "b"], 72  # 8x9
POSITIONS = {sheet: topo.positions("permuted", N_UNITS, 0, sheet) for sheet in SHEETS}


def batch(dtype=torch.float32, seed=0, sheets=SHEETS, n_units=N_UNITS) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {sheet: torch.randn(2, 20, n_units, generator=g).to(dtype) for sheet in sheets}


@pytest.mark.parametrize("settings", [{}, {"neighbourhoods": 0}, {"distance": "linf", "neighbourhoods": 2}])
def test_it_is_the_loss_that_training_uses(settings):
    cfg = TopoConfig(radius=3, **settings)
    theirs = TopoLMLoss(cfg, POSITIONS)
    ours = SpatialLoss(POSITIONS, radius=3, seed=4, **settings)
    expected = theirs(batch(), theirs.choose(4, 7, 0))
    assert torch.equal(ours(batch(), step=7, reduce=False), expected)
    assert torch.equal(ours(batch(), step=7), expected.mean())


def test_calls_are_counted_and_the_count_is_kept():
    loss = SpatialLoss(POSITIONS, radius=2)
    first, second = loss(batch()), loss(batch())
    assert first != second and loss.calls == 2
    assert loss(batch(), step=0) == first and loss.calls == 2
    again = SpatialLoss(POSITIONS, radius=2)
    assert list(loss.state_dict()) == ["_extra_state"]
    again.load_state_dict(loss.state_dict())
    assert again(batch()) == loss(batch()) and again.calls == 3


def test_one_sheet_needs_no_name_and_sheets_without_positions_are_left_alone():
    named = SpatialLoss({"a": POSITIONS["a"]}, radius=2)(batch())
    assert SpatialLoss(POSITIONS["a"], radius=2)(batch()["a"]) == named
    assert SpatialLoss(torch.from_numpy(POSITIONS["a"]), radius=2)(batch()["a"].flatten(0, 1)) == named


def test_sheets_may_have_any_rectangle_and_differ():
    rectangle = np.stack(np.divmod(np.random.default_rng(0).permutation(60), 20), 1)  # 3x20, not 6x10
    activations = batch() | batch(sheets=["long"], n_units=60)
    loss = SpatialLoss({"a": POSITIONS["a"], "long": rectangle, "b": POSITIONS["b"]}, radius=2)
    each = loss(activations, step=3, reduce=False)
    assert torch.equal(each[[0, 2]], SpatialLoss(POSITIONS, radius=2)(activations, step=3, reduce=False))
    phase = torch.linspace(0, 3, 20)[rectangle[:, 1]]  # waves that run along the sheet: neighbours are alike
    waves = torch.sin(torch.linspace(0, 50, 400)[:, None] + phase)
    of_waves = [
        SpatialLoss(p, radius=2, neighbourhoods=0)(waves) for p in (rectangle, rectangle[::-1].copy())
    ]
    assert of_waves[0] < 0.3 < 0.4 < of_waves[1]


def test_autocast_changes_nothing_and_bfloat16_little():
    loss = SpatialLoss(POSITIONS, radius=3)
    exact = loss(batch(), step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(batch(), step=0), exact)
        x = {sheet: x.requires_grad_() for sheet, x in batch(torch.bfloat16).items()}
        rounded = loss(x, step=0)
    assert rounded.dtype == torch.float32 and abs(rounded - exact) < 1e-3
    rounded.backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.abs().sum() > 0 for x in x.values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SpatialLoss({}), "no sheet"),
        (lambda: SpatialLoss(POSITIONS), "sheet 'a': neighbourhoods of 9x9 do not fit the 8x9 sheet"),
        (lambda: SpatialLoss(POSITIONS, radius=1), r"^radius = 1 must be"),
        (lambda: SpatialLoss(POSITIONS, distance="cosine"), "distance = 'cosine' must be one of l2"),
        (lambda: SpatialLoss({"a": POSITIONS["a"][:-1]}, radius=2), "'a': .* exactly one unit in every cell"),
        (lambda: SpatialLoss({"a": POSITIONS["a"] + 0.5}, radius=2), "'a' must be whole numbers"),
        (lambda: SpatialLoss(POSITIONS["a"].T, radius=2), r"have shape \(2, 72\), not \(n_units, 2\)"),
    ],
)
def test_wrong_positions_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "activations, message",
    [
        (lambda x: {"a": x["a"], "c": x["b"]}, "sheet 'b' are missing; there are: a, c"),
        (lambda x: x | {"b": x["b"][..., :70]}, r"'b' have shape \(2, 20, 70\), not \(..., 72\)"),
        (lambda x: x | {"a": x["a"][:1, :1]}, "'a' have shape .* one token or none; correlations need two"),
        (lambda x: x | {"a": (x["a"], None)}, "'a' are a tuple, not a tensor"),
        (lambda x: x | {"a": x["a"].long()}, "'a' are torch.int64"),
        (lambda x: x["a"], "activations are a Tensor; give sheet -> tensor of a, b"),
    ],
)
def test_wrong_activations_are_named_and_not_counted(activations, message):
    loss = SpatialLoss(POSITIONS, radius=2)
    with pytest.raises(ValueError, match=message):
        loss(activations(batch()))
    assert loss.calls == 0


def test_a_stock_gpt2_becomes_topographic():
    """Forward hooks on transformers' GPT-2: gradients reach what is hooked, and the loss falls."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cfg = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=N_UNITS, n_positions=32, vocab_size=50)
    model, seen = transformers.GPT2LMHeadModel(cfg), {}
    for i, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda module, args, out, i=i: seen.update({f"mlp.{i}": out}))
    loss = SpatialLoss(
        {f"mlp.{i}": topo.positions("permuted", N_UNITS, 0, f"mlp.{i}") for i in range(2)}, radius=3
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(50, (8, 32))

    def value() -> torch.Tensor:
        model(tokens)
        return loss(seen, step=0)

    before = value().item()
    for _ in range(40):
        model(tokens)
        optimizer.zero_grad()
        loss(seen).backward()
        assert all(block.mlp.c_fc.weight.grad.abs().sum() > 0 for block in model.transformer.h)
        optimizer.step()
    after = value().item()
    assert 0.4 < before < 0.6 and after < before - 0.1, (before, after)
