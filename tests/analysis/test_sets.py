"""Random sets are as large as a target and lie where they should; p-values count what they say.

pytest tests/analysis/test_sets.py
"""

import numpy as np
import pytest

from topogpt import topo
from topogpt.analysis import sets


def test_random_units_are_as_many_in_each_sheet_and_others_at_each_draw():
    target = np.zeros((3, 16), bool)
    target[0, :12] = target[2, 3:6] = True
    draws = [sets.random_units(target, seed, draw) for seed in (0, 1) for draw in range(40)]
    assert all(draw.sum(1).tolist() == [12, 0, 3] for draw in draws)
    assert len({draw.tobytes() for draw in draws}) == 80
    for s, share in ((0, 12 / 16), (2, 3 / 16)):  # each unit is drawn with this probability
        assert abs(np.mean(draws, axis=0)[s] - share).max() < 5 * (share * (1 - share) / 80) ** 0.5
    assert not np.array_equal(draws[0][0], np.roll(draws[0][2], 1))
    assert np.array_equal(draws[3], sets.random_units(target, 0, 3))


def cells(mask: np.ndarray) -> frozenset:
    """Cells from the first row and column on."""
    at = np.argwhere(mask)
    return frozenset(map(tuple, (at - at.min(0)).tolist()))


def test_a_shape_is_kept_wherever_it_is_put():
    shape = np.zeros((4, 5), bool)
    shape[:3, 0] = shape[2, 1] = True  # an L: eight ways to lie
    found = sets.placements(shape)
    alike = {cells(np.rot90(side, k)) for side in (shape, shape[:, ::-1]) for k in range(4)}
    assert {cells(mask) for mask in found} == alike and len(alike) == 8
    assert len(found) == len({mask.tobytes() for mask in found}) == 4 * 2 * 4 + 4 * 3 * 3
    assert any(np.array_equal(mask, shape) for mask in found)
    assert len(sets.placements(np.ones((4, 5), bool))) == 1


@pytest.mark.parametrize("kind", ["permuted", "identity"])
def test_random_places_keep_the_shape_on_the_sheet_of_the_target(kind):
    positions = {sheet: topo.positions(kind, 30, 0, sheet) for sheet in "abc"}
    grid = np.zeros((5, 6), bool)
    grid[1:3, 2:5] = True
    units = np.zeros((3, 30), bool)
    units[1] = grid[positions["b"][:, 0], positions["b"][:, 1]]
    found = sets.sets_of(sets.Target("block", units, 1), positions, 200, 0)
    assert found.n_places == 4 * 4 + 3 * 5
    assert len(found.units) == len(found.shape) == 200
    seen = {topo.on_grid(placed[1], positions["b"]).tobytes() for placed in found.shape}
    for placed in found.shape:
        assert placed.sum(1).tolist() == [0, 6, 0]
        lying = cells(topo.on_grid(placed[1], positions["b"]))
        assert lying in (cells(grid), cells(grid.T))
    assert len(seen) == 31  # every place is drawn
    scattered = sets.sets_of(sets.Target("units", units), positions, 5, 0)
    assert scattered.shape == [] and scattered.n_places is None and len(scattered.units) == 5


def test_p_counts_the_random_sets_that_are_as_extreme():
    found = sets.compare(3.0, [1.0, 2.0, 3.0, 4.0], "high")
    assert (found.mean, found.p) == (2.5, 3 / 5)
    assert (found.low, found.high) == pytest.approx((1.075, 3.925))
    assert sets.compare(3.0, [1.0, 2.0, 3.0, 4.0], "low").p == 4 / 5
    assert sets.compare(9.0, [1.0] * 99, "high").p == sets.compare(-9.0, [1.0] * 99, "low").p == 1 / 100
    # the mean of all five is 2: 0 is 2 from it, as 4 is; 1 and 3 are nearer
    assert sets.compare(0.0, [1.0, 2.0, 3.0, 4.0], "both").p == 2 / 5
    assert sets.compare(-9.0, [1.0] * 99, "both").p == sets.compare(9.0, [1.0] * 99, "both").p == 1 / 100
    assert sets.compare(1.0, [1.0] * 9, "both").p == 1
    assert sets.compare(float("nan"), [1.0], "both") is None


@pytest.mark.parametrize("extreme", ["high", "low", "both"])
def test_p_is_uniform_where_the_target_is_a_random_set(extreme):
    draw = np.random.default_rng(0)
    ps = np.array([sets.compare(x[0], x[1:], extreme).p for x in draw.standard_normal((4000, 20)) ** 3])
    for k in range(1, 21):
        assert abs((ps <= k / 20 + 1e-9).mean() - k / 20) < 0.04
