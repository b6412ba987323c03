"""Which sheets there are and how their units lie. Run: pytest tests/spatial/test_sheets.py"""

import numpy as np
import pytest
import torch

from topogpt import topo
from topogpt.errors import UserError
from topogpt.settings import GPTConfig, TopoConfig
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.topolm import TopoLMLoss

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=36, block_size=16, vocab_size=64)
ONE = TopoConfig(layout="one_sheet", radius=3, neighbourhoods=0)


@pytest.mark.parametrize(
    "layout, n_sheets, shape",
    [("per_branch", 24, (28, 28)), ("c_fc", 12, (56, 56)), ("one_sheet", 1, (168, 112))],
)
def test_sheets_of_topolm(layout, n_sheets, shape):
    found = sheet_positions(TopoConfig(layout=layout), GPTConfig())
    assert list(found) == topo.sheet_names(12, layout) and len(found) == n_sheets
    for p in found.values():
        assert topo.grid_of(p) == shape == topo.sheet_shape(layout, 12, 784, 3136)
        topo.units_by_cell(p)  # one unit in every cell
    assert topo.layout_of(reversed(list(found)), 12) == layout


@pytest.mark.parametrize(
    "n_layer, n_embd, shape", [(4, 144, (32, 36)), (12, 768, (144, 128)), (1, 7, (2, 7))]
)
def test_the_one_sheet_is_as_square_as_whole_rows_allow(n_layer, n_embd, shape):
    assert topo.sheet_shape("one_sheet", n_layer, n_embd, 4 * n_embd) == shape


@pytest.mark.parametrize("kind", ["permuted", "identity"])
def test_each_branch_has_rows_of_its_own_in_order_of_depth(kind):
    position = sheet_positions(TopoConfig(layout="one_sheet", positions=kind, radius=3), SMALL)["all"]
    h, w = topo.grid_of(position)
    assert (h, w) == (12, 12)
    for i, of_branch in enumerate(np.split(position, 4)):
        assert set(of_branch[:, 0]) == set(range(3 * i, 3 * i + 3))
    cells = position[:, 0] * w + position[:, 1]
    assert np.array_equal(cells, np.arange(144)) == (kind == "identity")
    other = sheet_positions(TopoConfig(layout="one_sheet", positions=kind, radius=3, seed=1), SMALL)["all"]
    assert np.array_equal(other, position) == (kind == "identity")


def test_neighbourhoods_reach_across_branches():
    loss = TopoLMLoss(ONE, sheet_positions(ONE, SMALL))
    branches = loss.units[0] // SMALL.n_embd  # (neighbourhoods, 25)
    across = torch.tensor([len(set(b)) for b in branches.tolist()])
    assert across.min() == 2 and across.max() == 3  # five rows, and three to a branch


def test_units_of_two_branches_that_fire_together_are_pulled_together():
    """The loss on the one sheet sees correlations that no sheet of a single branch shows."""
    torch.manual_seed(0)
    loss = TopoLMLoss(ONE, sheet_positions(ONE, SMALL))
    x = torch.randn(1, 200, 144, requires_grad=True)
    chosen = torch.full((1, 1), 0)
    loss({"all": x}, chosen).sum().backward()
    touched = x.grad[0].abs().sum(0).view(4, 36).gt(0).sum(1).tolist()
    assert touched == [15, 10, 0, 0]  # the first square: three rows of the first branch, two of the next


@pytest.mark.parametrize("sheets", [[], ["layer.0.attn"], ["layer.0.fc", "layer.1.fc", "all"], ["nothing"]])
def test_sheets_of_no_layout_are_refused(sheets):
    with pytest.raises(ValueError, match="are not those of a model of 2 layers: layer.0.attn, layer.0.mlp"):
        topo.layout_of(sheets, 2)


def test_losses_on_weights_want_their_units_row_by_row():
    with pytest.raises(UserError, match="--topo.positions identity"):
        TopoConfig(loss="topolm+wiring", layout="c_fc")
    TopoConfig(loss="topolm+wiring", layout="c_fc", positions="identity")
