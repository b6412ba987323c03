"""Sheets, neighbourhoods and Moran's I against known answers and slow references.

pytest tests/test_topo.py
"""

import subprocess
import sys

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from topogpt import rng, topo


@pytest.mark.parametrize(
    "n_units, shape",
    [(784, (28, 28)), (3072, (48, 64)), (768, (24, 32)), (2304, (48, 48)), (1, (1, 1)), (31, (1, 31))],
)
def test_the_grid_is_the_most_nearly_square_one(n_units, shape):
    assert topo.grid_shape(n_units) == shape


@given(st.integers(1, 3000))
def test_a_grid_holds_every_unit_and_none_is_squarer(n_units):
    h, w = topo.grid_shape(n_units)
    assert h * w == n_units and h <= w
    assert not [a for a in range(h + 1, w) if n_units % a == 0 and a <= n_units // a]


# ---- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["permuted", "identity"])
@pytest.mark.parametrize("n_units", [784, 768, 7])
def test_positions_put_one_unit_in_every_cell(kind, n_units):
    h, w = topo.grid_shape(n_units)
    position = topo.positions(kind, n_units, 0, "layer.0.attn")
    assert position.shape == (n_units, 2)
    assert sorted(map(tuple, position.tolist())) == [(i, j) for i in range(h) for j in range(w)]


def test_identity_lays_units_in_order_row_by_row():
    position = topo.positions("identity", 768, 5, "layer.0.attn")  # 24x32
    assert position[0].tolist() == [0, 0] and position[33].tolist() == [1, 1]
    assert position[767].tolist() == [23, 31]


def test_permuted_positions_are_a_pure_function_of_seed_and_sheet():
    first = topo.positions("permuted", 784, 0, "layer.3.mlp")
    assert np.array_equal(first, topo.positions("permuted", 784, 0, "layer.3.mlp"))
    others = [("layer.3.attn", 0), ("layer.4.mlp", 0), ("layer.3.mlp", 1), ("identity", None)]
    for sheet, seed in others:
        kind = "identity" if seed is None else "permuted"
        other = topo.positions(kind, 784, seed or 0, sheet)
        assert (first == other).all(1).mean() < 0.05, (sheet, seed)


def test_permutations_are_the_ones_of_runs_made_so_far():
    """Checkpoints carry positions, but data order and neighbourhoods are drawn anew when a run is resumed."""
    assert rng.permutation(8, 1337, "epoch", 0).tolist() == [1, 4, 5, 2, 0, 7, 6, 3]


def test_keys_of_other_types_or_other_cuts_draw_other_numbers():
    keys = [(1, "a"), ("1", "a"), ("1a",), (1, "a", 0), (1,), ("a", 1)]
    assert len({rng.seed(*key) for key in keys}) == len(keys)
    assert all(0 <= rng.seed(*key) < 2**63 for key in keys)


def test_units_by_cell_is_the_inverse_of_positions():
    position = topo.positions("permuted", 768, 0, "layer.0.attn")
    units = topo.units_by_cell(position)
    assert position[units].tolist() == [[i, j] for i in range(24) for j in range(32)]


def test_on_grid_puts_the_value_of_a_unit_where_the_unit_lies():
    position = topo.positions("permuted", 768, 0, "layer.0.attn")
    values = np.random.default_rng(0).normal(size=(2, 3, 768))
    grids = topo.on_grid(values, position)
    assert grids.shape == (2, 3, 24, 32)
    for unit in (0, 1, 400, 767):
        i, j = position[unit]
        assert np.array_equal(grids[..., i, j], values[..., unit])


def test_two_units_in_one_cell_are_refused():
    position = topo.positions("identity", 9, 0, "")
    position[3] = position[4]
    with pytest.raises(ValueError, match="exactly one unit"):
        topo.units_by_cell(position)


# ---- neighbourhoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "h, w, radius, n, n_units",
    [(28, 28, 5, 400, 81), (28, 28, 10, 100, 361), (24, 32, 5, 384, 81), (3, 3, 2, 1, 9)],
)
def test_numbers_of_neighbourhoods_and_of_their_units(h, w, radius, n, n_units):
    assert topo.neighbourhood_cells(h, w, radius).shape == (n, n_units)


def test_neighbourhoods_are_the_squares_around_the_centres_they_fit_around():
    h, w, radius = 6, 9, 3
    expected = []
    for i in range(h):
        for j in range(w):
            square = [(a, b) for a in range(h) for b in range(w) if max(abs(a - i), abs(b - j)) < radius]
            if len(square) == (2 * radius - 1) ** 2:
                expected.append([a * w + b for a, b in square])
    assert topo.neighbourhood_cells(h, w, radius).tolist() == expected


def test_a_radius_too_large_for_the_sheet_is_refused():
    topo.neighbourhood_cells(9, 20, 5)
    with pytest.raises(ValueError, match="11x11.*9x20.*radius is too large"):
        topo.neighbourhood_cells(9, 20, 6)


def test_the_mean_distance_in_a_9x9_neighbourhood_is_that_of_its_3240_pairs():
    distance = 1 / topo.inverse_distances(5) - 1
    pairs = distance[np.triu_indices(81, 1)]
    assert len(pairs) == 3240
    assert pairs.mean() == pytest.approx(4.7204, abs=5e-5)


@pytest.mark.parametrize("norm, corner", [("l2", 8 * 2**0.5), ("l1", 16), ("linf", 8)])
def test_distances_by_norm(norm, corner):
    inverse = topo.inverse_distances(5, norm)
    assert inverse[0, 0] == 1 and inverse[0, 1] == inverse[0, 9] == 1 / 2
    assert inverse[0, 80] == pytest.approx(1 / (1 + corner))
    assert np.array_equal(inverse, inverse.T)


# ---- Moran's I ---------------------------------------------------------------------------------------------


def dense_morans_i(grid: np.ndarray, contiguity: str) -> float:
    """The definition, with the whole matrix of weights."""
    h, w = grid.shape
    cells = [(i, j) for i in range(h) for j in range(w)]
    weights = np.zeros((h * w, h * w))
    for a, (i, j) in enumerate(cells):
        for b, (k, m) in enumerate(cells):
            steps = abs(i - k) + abs(j - m)
            touching = steps == 1 if contiguity == "rook" else max(abs(i - k), abs(j - m)) == 1
            weights[a, b] = float(touching)
    weights /= weights.sum(axis=1, keepdims=True)
    z = grid.ravel() - grid.mean()
    return len(z) / weights.sum() * (z @ weights @ z) / (z @ z)


@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (1, 12), (2, 3)])
def test_morans_i_equals_the_dense_definition(contiguity, shape):
    grids = np.random.default_rng(0).normal(size=(3, *shape)).cumsum(axis=-1) + 100
    expected = [dense_morans_i(grid, contiguity) for grid in grids]
    assert topo.morans_i(grids, contiguity) == pytest.approx(expected, rel=1e-9)


def test_a_checkerboard_is_the_opposite_of_a_map():
    board = np.indices((28, 28)).sum(0) % 2
    assert topo.morans_i(board, "rook") == pytest.approx(-1)
    assert -0.1 < topo.morans_i(board, "queen") < 0.1  # diagonal neighbours are alike, the others are not


def test_two_halves_are_almost_a_perfect_map():
    halves = np.repeat([[0.0] * 14 + [1.0] * 14], 28, axis=0)
    for contiguity in ("queen", "rook"):
        assert 0.9 < topo.morans_i(halves, contiguity) < 1


def test_white_noise_is_about_zero_on_the_mean():
    noise = np.random.default_rng(0).normal(size=(500, 28, 28))
    for contiguity in ("queen", "rook"):
        assert abs(topo.morans_i(noise, contiguity).mean() + 1 / 783) < 0.005  # expected: -1 / (n - 1)


def test_a_constant_map_has_no_morans_i():
    both = topo.morans_i(np.stack([np.full((4, 4), 3.0), np.eye(4)]))
    assert np.isnan(both[0]) and np.isfinite(both[1])


def test_morans_i_of_float32_and_of_integers_is_that_of_float64():
    grid = np.random.default_rng(0).integers(0, 50, (6, 6))
    assert topo.morans_i(grid) == topo.morans_i(grid.astype(float))
    offset = grid.astype(np.float32) + np.float32(1e4)
    assert topo.morans_i(offset) == pytest.approx(topo.morans_i(grid), rel=1e-6)


def test_a_map_can_be_read_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    code = "import topo; p = topo.positions('permuted', 784, 0, 'a'); print(topo.on_grid(p[:, 0], p).shape)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tiny.ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{tiny.ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(28, 28)\n", done.stderr
