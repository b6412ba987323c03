"""Measures on maps against esda, scipy, plain loops, known answers and TopoLM's released values.

pytest tests/analysis/test_measures.py
"""

import csv
import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import make_moran

from topogpt import rng, topo
from topogpt.analysis import measures, nulls
from topogpt.analysis.subject import MoranConfig

pytest.importorskip("scipy")
RELEASED = tiny.ROOT.parent / "shared" / "data" / "reference" / "topolm"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason=f"no {RELEASED}")
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def closest(values: np.ndarray, expected: float) -> float:
    """Distance of the values' mean from what is expected, in standard errors."""
    return float(abs(np.mean(values) - expected) / (np.std(values, ddof=1) / math.sqrt(len(values))))


# ---- smoothing -----------------------------------------------------------------------------------


def topolm_kernel(h: int, w: int, fwhm_mm: float) -> np.ndarray:
    """TopoLM's weights between all cells, (h w, h w), 1 mm between neighbours: too small at the border."""
    sigma = fwhm_mm / math.sqrt(8 * math.log(2))
    cells = [(i, j) for i in range(h) for j in range(w)]
    squared = np.array([[(i - k) ** 2 + (j - m) ** 2 for k, m in cells] for i, j in cells])
    return np.exp(-squared / (2 * sigma**2)) / (2 * math.pi * sigma**2)


def normalised(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum(1, keepdims=True)


@pytest.mark.parametrize("shape, fwhm", [((28, 28), 2.0), ((24, 32), 1.0), ((5, 7), 3.0), ((1, 9), 2.0)])
def test_smoothing_is_the_dense_kernel_normalised(shape, fwhm):
    grids = normal(3, *shape)
    dense = normalised(topolm_kernel(*shape, fwhm))
    expected = (grids.reshape(3, -1) @ dense.T).reshape(grids.shape)
    assert measures.smooth(grids, fwhm) == pytest.approx(expected, abs=1e-12)


def test_the_width_is_that_of_half_the_maximum():
    peak = np.zeros((41, 41))
    peak[20, 20] = 1.0
    found = measures.smooth(peak, 6.0)
    assert found[20, 23] == pytest.approx(found[20, 20] / 2) and found[17, 20] == pytest.approx(found[20, 23])


def test_smoothing_leaves_a_constant_map_and_at_0_any_map():
    grids = normal(2, 6, 8)
    assert measures.smooth(grids, 0.0) is grids
    assert measures.smooth(np.full((24, 32), 3.7), 2.0) == pytest.approx(np.full((24, 32), 3.7), rel=1e-14)
    single = grids.astype(np.float32)
    assert measures.smooth(single, 2.0).dtype == np.float32
    assert measures.smooth(single, 2.0) == pytest.approx(measures.smooth(single.astype(float), 2.0), rel=1e-6)


@pytest.mark.parametrize("distance", [0.5, 3.0])
def test_only_the_width_in_cells_counts(distance):
    grids = normal(12, 12)
    scaled = measures.smooth(grids, 2.0 * distance, distance)
    assert scaled == pytest.approx(measures.smooth(grids, 2.0), abs=1e-14)
    a = nulls.noise_morans(12, 12, 2.0 * distance, distance, "queen", 50, 0)
    assert a == pytest.approx(nulls.noise_morans(12, 12, 2.0, 1.0, "queen", 50, 0), abs=1e-12)


@few
@given(seeds, st.floats(0.3, 5), st.floats(-10, 10))
def test_smoothing_is_linear(seed, fwhm, factor):
    first, second = normal(2, 6, 9, seed=seed)
    both = measures.smooth(first + factor * second, fwhm)
    apart = measures.smooth(first, fwhm) + factor * measures.smooth(second, fwhm)
    assert both == pytest.approx(apart, abs=1e-12)


def test_no_t_value_can_tell_topolms_border_from_ours():
    a, b = normal(30, 28, 28) + 0.2, normal(40, 28, 28, seed=1)
    kernel = topolm_kernel(28, 28, 2.0)
    assert kernel[0].sum() < 0.6 < 0.99 < kernel[400].sum()  # a corner; a cell inside
    theirs = measures.welch(*(x.reshape(len(x), -1) @ kernel.T for x in (a, b)))
    ours = measures.welch(*(measures.smooth(x, 2.0).reshape(len(x), -1) for x in (a, b)))
    assert ours.t == pytest.approx(theirs.t, rel=1e-9) and ours.p == pytest.approx(theirs.p, rel=1e-9)


# ---- contrasts -----------------------------------------------------------------------------------


def plain_welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The formulas of t and of its degrees of freedom (Welch 1938, Satterthwaite 1946), written out."""
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return (a.mean() - b.mean()) / math.sqrt(of_a + of_b), freedom


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_welch_is_scipys_and_the_formula_unit_by_unit(dtype):
    from scipy import stats

    scale = np.logspace(-6, 6, 5)[:, None] * np.ones(6)
    a = ((normal(9, 5, 6) + 0.8) * scale).astype(dtype)
    b = ((2.5 * normal(31, 5, 6, seed=1) + 3) * scale).astype(dtype)
    found = measures.welch(a, b)
    assert found.t.shape == found.p.shape == (5, 6)
    for i, j in np.ndindex(5, 6):
        x, y = a[:, i, j].astype(float), b[:, i, j].astype(float)
        theirs = stats.ttest_ind(x, y, equal_var=False)
        t, freedom = plain_welch(x, y)
        assert found.t[i, j] == pytest.approx(theirs.statistic, rel=1e-9) == pytest.approx(t, rel=1e-9)
        assert found.p[i, j] == pytest.approx(theirs.pvalue, rel=1e-7)
        assert found.p[i, j] == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-30])
def test_a_constant_unit_is_not_selective(value, dtype):
    found = measures.welch(np.full((7, 2), value, dtype), np.full((11, 2), value, dtype))
    assert found.t.tolist() == [0, 0] and found.p.tolist() == [1, 1]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.1, 0.3), (-1000.0, -999.0)])
def test_a_unit_that_separates_the_groups_perfectly_is_selective(low, high):
    found = measures.welch(np.full((10, 1), high, np.float32), np.full((12, 1), low, np.float32))
    assert np.isfinite(found.t).all() and found.t > 1000 and 0 <= found.p < 1e-20
    reverse = measures.welch(np.full((12, 1), low, np.float32), np.full((10, 1), high, np.float32))
    assert reverse.t == -found.t and reverse.p == found.p


def test_a_unit_constant_in_one_group_is_tested_against_the_spread_of_the_other():
    a, b = normal(10), np.full(12, 1.5)
    t, _ = plain_welch(a, b)
    assert measures.welch(a, b).t == pytest.approx(t, rel=1e-9)


def test_the_rounding_of_a_constant_unit_is_no_selectivity():
    """Batches of other sizes give other last bits."""
    ulp = np.spacing(np.float32(0.3))
    a = np.float32(0.3) + ulp * np.array([0, 1, 0, 1, 0, 1], np.float32)[:, None]
    assert abs(measures.welch(a, np.full((6, 1), 0.3, np.float32)).t) < 1


def test_a_group_of_one_cannot_be_tested():
    with pytest.raises(AssertionError, match="no variance"):
        measures.welch(normal(1, 4), normal(9, 4))


@few
@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_welch_knows_neither_unit_nor_offset(seed, factor, offset):
    a, b = normal(6, 10, seed=seed), normal(8, 10, seed=seed + 1)
    plain, other = measures.welch(a, b), measures.welch(factor * a + offset, factor * b + offset)
    assert other.t == pytest.approx(plain.t, rel=1e-6, abs=1e-9) and ((plain.p > 0) & (plain.p <= 1)).all()


@few
@given(seeds, st.integers(1, 60))
def test_fdr_is_benjamini_and_hochbergs(seed, n):
    p = np.random.default_rng(seed).choice([0.0, 0.001, 0.01, 0.02, 0.3, 0.5, 1.0], size=n) ** 1.5
    order = sorted(range(n), key=lambda i: p[i])
    expected = {
        i: min([1.0] + [p[order[k]] * n / (k + 1) for k in range(rank, n)]) for rank, i in enumerate(order)
    }
    assert measures.fdr(p) == pytest.approx([expected[i] for i in range(n)], rel=1e-12)


def test_fdr_is_over_all_sheets_at_once():
    p = np.random.default_rng(0).random((3, 4, 5)) ** 3
    assert np.array_equal(measures.fdr(p).ravel(), measures.fdr(p.ravel()))
    assert not np.allclose(measures.fdr(p)[0], measures.fdr(p[0]))


# ---- Moran's I against esda ----------------------------------------------------------------------

ESDA = json.loads(Path(make_moran.__file__).with_name("moran.json").read_text(encoding="utf-8"))
MAPS = make_moran.maps()
against_esda = pytest.mark.parametrize(
    "found", ESDA["found"], ids=lambda found: f"{found['map']}-{found['contiguity']}"
)


@functools.cache
def at_random(name: str, contiguity: str) -> np.ndarray:
    """Moran's I of permutations of a map, as moran() finds them; as many more of a small map as are cheap."""
    h, w = MAPS[name].shape
    permutations = 9999 if h * w < 100 else ESDA["permutations"]
    places = nulls.permuted_edges(h, w, contiguity, permutations, 0)
    return measures.gram_of(MAPS[name][None]).take(places) @ measures.edges(h, w, contiguity).weight


def test_esda_was_asked_about_every_map():
    asked = {(found["map"], found["contiguity"]) for found in ESDA["found"]}
    assert asked == {(name, c) for name in MAPS for c in ("queen", "rook")} and len(ESDA["found"]) == 20


@against_esda
def test_morans_i_is_esdas(found):
    grid = MAPS[found["map"]]
    assert topo.morans_i(grid, found["contiguity"]) == pytest.approx(found["I"], abs=1e-10)
    ours = nulls.moran(grid, 0.0, contiguity=found["contiguity"])
    assert ours.value == pytest.approx(found["I"], abs=1e-6)


@against_esda
def test_the_permutations_have_esdas_mean_and_variance(found):
    n_units = MAPS[found["map"]].size
    assert found["expectation"] == pytest.approx(-1 / (n_units - 1))
    values = at_random(found["map"], found["contiguity"])
    assert closest(values, found["expectation"]) < 4
    assert closest((values - values.mean()) ** 2, found["variance_rand"]) < 4
    spread = math.hypot(
        values.std() / math.sqrt(len(values)), found["sim_sd"] / math.sqrt(ESDA["permutations"])
    )
    assert abs(values.mean() - found["sim_mean"]) < 4 * spread


def test_the_variance_of_a_map_with_a_peak_is_not_that_of_normal_noise():
    """Nor would the test above pass with it."""
    for found in ESDA["found"][-4:-2]:
        values = at_random(found["map"], found["contiguity"])
        assert closest((values - values.mean()) ** 2, found["variance_norm"]) > 10


@against_esda
def test_p_is_esdas_of_the_upper_side(found):
    ours = nulls.moran(MAPS[found["map"]], 0.0, contiguity=found["contiguity"]).p
    esdas = found["p_sim"]
    if found["I"] < found["sim_mean"]:  # esda counts the permutations on the nearer side, we those above
        esdas = 1 - esdas
    within = 4 * math.sqrt(2 * esdas * (1 - esdas) / ESDA["permutations"]) + 1e-3
    assert abs(ours - esdas) < within
    z = (found["I"] - found["expectation"]) / math.sqrt(found["variance_rand"])
    assert math.erfc(abs(z) / math.sqrt(2)) == pytest.approx(found["p_rand"], rel=1e-6)
    if found["map"] in ("white noise", "24x32"):  # where the normal distribution is near
        assert abs(ours - math.erfc(z / math.sqrt(2)) / 2) < within + 0.01


# ---- Moran's I: permutations, many maps ----------------------------------------------------------


def brute_force(maps: np.ndarray, contiguity: str, permutations: int, seed: int) -> np.ndarray:
    """Mean Moran's I of the maps, all permuted alike, for every permutation."""
    flat = maps.reshape(len(maps), -1)
    found = []
    for k in range(permutations):
        order = rng.permutation(flat.shape[1], seed, "moran", k)
        found.append(np.nan_to_num(topo.morans_i(flat[:, order].reshape(maps.shape), contiguity)).mean())
    return np.array(found)


@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("shape", [(1, 8, 9), (5, 6, 6), (2, 1, 12)])
def test_permuting_edges_is_permuting_maps(shape, contiguity):
    _, h, w = shape
    maps = normal(*shape).cumsum(-1)
    places = nulls.permuted_edges(h, w, contiguity, 99, 7)
    found = measures.gram_of(maps).take(places) @ measures.edges(h, w, contiguity).weight
    expected = brute_force(maps, contiguity, 99, 7)
    assert found == pytest.approx(expected, abs=1e-6)
    ours = nulls.moran(maps, 0.0, contiguity=contiguity, permutations=99, seed=7)
    value = topo.morans_i(maps, contiguity).mean()
    assert ours.value == pytest.approx(value, abs=1e-6)
    assert ours.p == (1 + (expected >= value - 1e-7).sum()) / 100


def test_many_maps_count_alike_and_constant_ones_as_0():
    maps = np.concatenate(
        [normal(4, 10, 10).cumsum(-1) * np.logspace(-8, 8, 4)[:, None, None], np.ones((2, 10, 10))]
    )
    value = nulls.moran(maps, 0.0, permutations=9).value
    assert value == pytest.approx(topo.morans_i(maps[:4]).sum() / 6, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -1e9 / 7])
def test_a_constant_map_is_no_map(value):
    found = nulls.moran(np.full((12, 12), value), 0.0, permutations=99)
    assert found.value == 0 and found.p == 1  # no permutation changes it
    assert 0.2 < found.p_floor < 0.8  # about half of noise is above 0


def test_known_maps():
    halves, board = MAPS["halves"], MAPS["checkerboard"]
    # Of the 56 cells beside the line, 52 have 3 of 8 neighbours in the other half, those at its ends 2 of 5.
    queen = nulls.moran(halves, 0.0)
    assert queen.value == pytest.approx(1 - 2 * (52 * 3 / 8 + 4 * 2 / 5) / 784, abs=1e-6) and queen.p == 0.001
    # Without diagonals 1 of 4, and 1 of 3.
    rook = nulls.moran(halves, 0.0, contiguity="rook")
    assert rook.value == pytest.approx(1 - 2 * (52 / 4 + 4 / 3) / 784, abs=1e-6) and rook.p == 0.001
    opposite = nulls.moran(board, 0.0, contiguity="rook")
    assert opposite.value == pytest.approx(-1, abs=1e-6) and opposite.p == opposite.p_floor == 1


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    grid = MAPS["white noise"]
    first = nulls.moran(grid, 2.0, permutations=199)
    for cached in (nulls.permuted_edges, nulls.noise_morans):
        cached.cache_clear()
    assert nulls.moran(grid, 2.0, permutations=199) == first
    other = nulls.moran(grid, 2.0, permutations=199, seed=1)
    assert other.value == first.value and other.p != first.p and other.floor != first.floor
    places = [nulls.permuted_edges(28, 28, "queen", 199, seed) for seed in (0, 1)]
    assert (places[0] == places[1]).mean() < 0.01


@few
@given(seeds, st.floats(1e-3, 1e3), st.booleans(), st.floats(-100, 100))
def test_morans_i_knows_neither_unit_nor_offset_nor_sign(seed, factor, negate, offset):
    grid = normal(7, 8, seed=seed)
    other = (-factor if negate else factor) * grid + offset
    plain, found = (nulls.moran(x, 1.0, permutations=49) for x in (grid, other))
    assert found.value == pytest.approx(plain.value, abs=1e-6)
    for p in (plain.p, plain.p_floor, found.p, found.p_floor):
        assert 0 < p <= 1


# ---- Moran's I: the floor ------------------------------------------------------------------------


def test_the_floor_of_token_maps_is_not_that_of_t_maps():
    """Smoothed noise varies more at the border, where fewer cells are averaged; t-values do not."""
    noise = measures.smooth(normal(4000, 12, 12), 2.0)
    of_tokens = topo.morans_i(noise).mean()
    of_t = topo.morans_i(noise / noise.std(0)).mean()
    assert of_t - of_tokens > 0.005
    for kind, expected in ((False, of_tokens), (True, of_t)):
        found = nulls.noise_morans(12, 12, 2.0, 1.0, "queen", 4000, 1, of_t=kind).mean()
        assert found == pytest.approx(expected, abs=0.004)
    cfg = MoranConfig(run="-")
    assert nulls.moran_of_sheets(cfg, ["a"], noise[None, :64], 2.0)["floor"] < of_t - 0.004


def test_the_band_of_a_mean_is_that_of_as_many_maps():
    """64 maps a sheet on 4 sheets: of white noise alone, their means spread by an eighth and a sixteenth."""
    cfg = MoranConfig(run="-")
    noise = normal(200, 4, 64, 6, 6)
    of_one = nulls.moran(noise[0, 0, 0], 0.0)
    found = nulls.moran_of_sheets(cfg, list("abcd"), noise[0], 0.0)
    sheet, each = found["by_sheet"]["a"], topo.morans_i(noise).mean(2)  # (200, 4)
    assert of_one.floor_sd == pytest.approx(topo.morans_i(noise[0]).std(), rel=0.15)
    assert sheet["floor_sd"] == pytest.approx(each.std(), rel=0.15)
    assert found["floor_sd"] == pytest.approx(each.mean(1).std(), rel=0.2)
    p = [nulls.moran(noise[k, 0], 0.0).p_floor for k in range(100)]
    assert 0.3 < np.mean(p) < 0.7 and min(p) < 0.1 < 0.9 < max(p)  # evenly spread, as p is under the null


@pytest.mark.parametrize("fwhm, published", [(0.0, -1 / 783), (1.0, 0.074), (2.0, 0.608)])
def test_the_floor_is_the_published_one_of_smoothed_noise(fwhm, published):
    found = nulls.moran(MAPS["gradient"], fwhm, of_t=True)
    assert found.floor == pytest.approx(published, abs=0.01)
    assert 0.01 < found.floor_sd < 0.04 and found.p_floor == 0.001


@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("h, w, fwhm", [(28, 28, 0.0), (28, 28, 1.0), (28, 28, 2.0), (24, 32, 2.0)])
def test_the_floor_follows_from_the_covariance_of_smoothed_noise(h, w, fwhm, contiguity):
    """Expectation of the numerator of Moran's I over that of its denominator."""
    kernel = normalised(topolm_kernel(h, w, fwhm)) if fwhm else np.eye(h * w)
    covariance = kernel @ kernel.T
    sd = np.sqrt(covariance.diagonal())
    correlation = covariance / np.outer(sd, sd)
    centred = correlation - correlation.mean(0)
    centred -= centred.mean(1, keepdims=True)
    found = measures.edges(h, w, contiguity)
    expected = (centred[found.i, found.j] * found.weight).sum() / centred.trace()
    noise = nulls.noise_morans(h, w, fwhm, 1.0, contiguity, 999, 0, of_t=True)
    assert noise.mean() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("fwhm", [1.0, 2.0])
def test_the_floor_is_that_of_t_maps_of_noise(fwhm):
    groups = [measures.smooth(normal(80, 24, 28, 28, seed=seed), fwhm) for seed in (0, 1)]
    of_t = topo.morans_i(measures.welch(*groups).t)
    noise = nulls.noise_morans(28, 28, fwhm, 1.0, "queen", 999, 0, of_t=True)
    error = math.hypot(of_t.std(ddof=1) / math.sqrt(24), noise.std() / math.sqrt(999))
    assert abs(of_t.mean() - noise.mean()) < 4 * error < 0.03
    assert of_t.std() == pytest.approx(noise.std(), rel=0.6)


# ---- clusters ------------------------------------------------------------------------------------


def grown(t: np.ndarray, chosen: np.ndarray) -> list[frozenset]:
    """TopoLM's clusters: from the best unit left, add the best neighbour until none is significant."""
    h, w = t.shape
    left = {(i, j) for i, j in np.ndindex(h, w) if chosen[i, j]}
    found = []
    while left:
        cluster = {max(left, key=lambda cell: t[cell])}
        while True:
            beside = {(i + a, j + b) for i, j in cluster for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))}
            beside = {(i, j) for i, j in beside - cluster if 0 <= i < h and 0 <= j < w}
            best = max(beside, key=lambda cell: t[cell])
            if best not in left:
                break
            cluster.add(best)
        left -= cluster
        found.append(frozenset(cluster))
    return found


def cells_of(mask: np.ndarray) -> frozenset:
    return frozenset(map(tuple, np.argwhere(mask).tolist()))


@few
@given(seeds, st.floats(-0.5, 1), st.integers(1, 12))
def test_clusters_are_those_grown_from_the_best_unit(seed, threshold, smallest):
    t = measures.smooth(normal(9, 11, seed=seed), 1.5) * 3
    chosen = t > threshold
    found, expected = measures.clusters(chosen, smallest), grown(t, chosen)
    assert {cells_of(m) for m in found} == {c for c in expected if len(c) >= smallest}
    sizes = [int(m.sum()) for m in found]
    assert sizes == sorted(sizes, reverse=True) and all(m.shape == (9, 11) for m in found)


def test_clusters_touch_along_sides_not_corners_or_around_the_edge():
    chosen = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]], bool)
    assert [m.sum() for m in measures.clusters(chosen)] == [3, 1, 1, 1, 1]
    assert measures.clusters(np.zeros((4, 4), bool)) == []


@few
@given(seeds, st.floats(0, 1))
def test_cluster_sizes_are_those_of_each_map_alone(seed, density):
    chosen = np.random.default_rng(seed).random((2, 3, 7, 5)) < density
    found = measures.cluster_sizes(chosen)
    assert found.largest.shape == found.mean.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        sizes = [m.sum() for m in measures.clusters(chosen[i, j])]
        assert found.largest[i, j] == max(sizes, default=0)
        assert found.mean[i, j] == pytest.approx(np.mean(sizes) if sizes else 0)
    assert measures.cluster_sizes(chosen[0, 0]).largest == found.largest[0, 0]


# ---- curves over distance ------------------------------------------------------------------------


@pytest.mark.parametrize("h, w, bins", [(5, 7, None), (6, 6, None), (5, 7, 20), (4, 9, 6), (1, 8, 3)])
def test_a_curve_is_the_mean_over_pairs_of_each_distance(h, w, bins):
    pairs = normal(h * w, h * w)
    cells = [(i, j) for i in range(h) for j in range(w)]
    largest = math.dist(cells[0], cells[-1])
    limits = np.linspace(0, largest, bins + 1) if bins else [k + 0.5 for k in range(max(h, w) + 1)]
    total, n = Counter(), Counter()
    for a in range(h * w):
        for b in range(a + 1, h * w):
            apart = math.dist(cells[a], cells[b])
            if bins is None and apart > limits[-1]:
                continue  # among the last few pairs, from corner to corner
            k = next((k for k, limit in enumerate(limits[1:]) if apart <= limit), len(limits) - 2)
            total[k] += pairs[a, b]
            n[k] += 1
    found = measures.curve(pairs, h, w, bins)
    assert found.distance == pytest.approx([(limits[k] + limits[k + 1]) / 2 for k in sorted(n)])
    assert found.value == pytest.approx([total[k] / n[k] for k in sorted(n)])
    assert (sum(n.values()) == h * w * (h * w - 1) / 2) == (bins is not None or largest < max(h, w) + 0.5)


def test_distances_are_those_between_cells():
    found = measures.distances(24, 32)
    assert found[0, 1] == found[0, 32] == 1 and found[0, 33] == pytest.approx(2**0.5)
    assert found[0, 767] == found.max() == pytest.approx(math.hypot(23, 31)) and np.array_equal(
        found, found.T
    )


@pytest.mark.parametrize("dtype, constant", [(np.float64, 0.1), (np.float32, 0.1), (np.float64, 1e9 / 7)])
def test_correlations_are_numpys_and_a_constant_unit_has_none(dtype, constant):
    patterns = (normal(50, 8) @ normal(8, 8, seed=1) * np.logspace(-6, 3, 8) + 5).astype(dtype)
    assert measures.correlations(patterns) == pytest.approx(np.corrcoef(patterns.T.astype(float)), abs=1e-9)
    patterns[:, [2, 5]] = constant
    found = measures.correlations(patterns)
    assert (found[[2, 5]] == 0).all() and (found[:, [2, 5]] == 0).all() and found[0, 0] == pytest.approx(1)


# ---- smoothness and wiring -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_tdanns_smoothness_is_that_of_a_plain_loop(seed):
    t = measures.smooth(normal(7, 9, seed=seed), 1.0 * seed)
    apart = measures.distances(7, 9)
    width = apart.max() / 20
    by_bin = {}
    for a, b in zip(*np.triu_indices(63, 1), strict=True):
        k = min(19, math.ceil(apart[a, b] / width - 1e-9) - 1)
        by_bin.setdefault(k, []).append(abs(t.flat[a] - t.flat[b]))
    means = [np.mean(by_bin[k]) for k in sorted(by_bin)]
    assert measures.smoothness_tdann(t) == pytest.approx((max(means) - means[0]) / max(means))


def test_tdanns_smoothness_of_maps_noise_and_nothing():
    row = np.indices((28, 28))[0]
    # In the first bin rows differ by 0 or 1, in the last, from corner to corner, by about 26.
    assert 0.95 < measures.smoothness_tdann(row) < 1
    # Noise is not at 0: the largest of 20 bins lies above the first by chance, as the last hold few pairs.
    assert -0.05 < np.mean([measures.smoothness_tdann(noise) for noise in normal(8, 28, 28)]) < 0.2
    assert measures.smoothness_tdann(np.full((28, 28), 0.1)) == 0


@few
@given(seeds, st.floats(1e-3, 1e3), st.booleans(), st.floats(-10, 10))
def test_tdanns_smoothness_knows_neither_unit_nor_offset_nor_sign(seed, factor, negate, offset):
    t = normal(6, 7, seed=seed)
    other = (-factor if negate else factor) * t + offset
    assert measures.smoothness_tdann(other) == pytest.approx(measures.smoothness_tdann(t), abs=1e-6)


def patterns_of(fwhm: float, n: int = 300) -> np.ndarray:
    return measures.correlations(measures.smooth(normal(n, 14, 14), fwhm).reshape(n, -1))


def test_the_smoothness_of_correlations_is_the_range_of_their_curve():
    found = measures.curve(np.cos(measures.distances(1, 9)), 1, 9)
    assert measures.smoothness_correlation(found) == pytest.approx(math.cos(6) - math.cos(3))
    noise, smooth = (
        measures.smoothness_correlation(measures.curve(patterns_of(fwhm), 14, 14)) for fwhm in (0.0, 4.0)
    )
    assert noise < 0.15 and 0.8 < smooth < 1.3


@pytest.mark.parametrize("partners", [1, 20])
def test_wiring_length_is_that_of_a_plain_loop(partners):
    r = measures.correlations(normal(40, 35))
    cells = [divmod(cell, 7) for cell in range(35)]
    wires = []
    for a in range(35):
        others = sorted((b for b in range(35) if b != a), key=lambda b: -r[a, b])
        wires += [math.dist(cells[a], cells[b]) for b in others[:partners]]
    every = [math.dist(a, b) for k, a in enumerate(cells) for b in cells[:k]]
    assert measures.wiring_length(r, 5, 7, partners) == pytest.approx(np.mean(wires) / np.mean(every))


def test_wires_are_short_on_a_map_and_as_long_as_any_in_noise():
    assert measures.wiring_length(patterns_of(0.0), 14, 14) == pytest.approx(1, abs=0.02)
    assert measures.wiring_length(patterns_of(4.0), 14, 14) < 0.4


@pytest.mark.parametrize("h, w", [(2, 3), (3, 7)])
def test_on_a_small_sheet_all_others_are_partners(h, w):
    r = measures.correlations(normal(30, h * w))
    assert measures.wiring_length(r, h, w) == pytest.approx(1)


# ---- TopoLM's released values --------------------------------------------------------------------

PUBLISHED = {  # means over layers; PAPERS.md, 1.5.4
    "moseley_concrete-concrete": [0.8039, 0.8940, 0.1111, 0.6004],
    "moseley_abstract-abstract": [0.2538, 0.7039, 0.1196, 0.6020],
    "moseley_abstract-concrete": [0.7977, 0.8999, 0.1214, 0.5973],
    "moseley_noun-verb": [0.7834, 0.8943, 0.1156, 0.6032],
    "elli_noun_verb": [0.4815, 0.8149, 0.1146, 0.6043],
}


def by_layer(name: str) -> dict[str, np.ndarray]:
    """Contrast -> Moran's I of its 24 sheets."""
    with (RELEASED / f"moran_{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    return {contrast: np.array([float(row[contrast]) for row in rows]) for contrast in PUBLISHED}


@released
def test_the_table_of_published_values_is_that_of_the_released_files():
    columns = ["preresid_unsmoothed", "preresid_smoothed", "nontopo_unsmoothed", "nontopo_smoothed"]
    for column, name in enumerate(columns):
        for contrast, values in by_layer(name).items():
            assert values.mean() == pytest.approx(PUBLISHED[contrast][column], abs=6e-5), (name, contrast)


@released
def test_the_non_topographic_model_is_at_our_floor():
    """Smoothed: as noise is. "Unsmoothed": 1 mm, above ours as some units of theirs share a place."""
    smoothed, unsmoothed = by_layer("nontopo_smoothed"), by_layer("nontopo_unsmoothed")
    at_2, at_1 = (nulls.moran(MAPS["white noise"], fwhm) for fwhm in (2.0, 1.0))
    for contrast in PUBLISHED:
        assert abs(smoothed[contrast].mean() - at_2.floor) < 4 * at_2.floor_sd / math.sqrt(24), contrast
        assert (
            at_1.floor + 4 * at_1.floor_sd / math.sqrt(24) < unsmoothed[contrast].mean() < at_1.floor + 0.06
        )
        assert by_layer("preresid_smoothed")[contrast].mean() > at_2.floor + 3 * at_2.floor_sd, contrast


@released
def test_the_released_permutations_are_sheets_of_ours():
    with np.load(RELEASED / "positions_permuted_28x28.npz") as file:
        sheets = {name: file[name].astype(np.int64) for name in file}
    assert len(sheets) == 24 and set(sheets) == {f"layer.{k}.{b}" for k in range(12) for b in ("attn", "mlp")}
    cells = topo.neighbourhood_cells(28, 28, 5)
    assert len(cells) == 400
    identity = topo.positions("identity", 784, 0, "")
    for position in sheets.values():
        units = topo.units_by_cell(position)  # raises where two units share a cell
        assert np.array_equal(position[units], identity) and not np.array_equal(position, identity)
        apart = [
            np.linalg.norm(position[a][:, None] - position[a], axis=-1).sum() for a in units[cells][::57]
        ]
        assert np.mean(apart) / (81 * 80) == pytest.approx(4.7204, abs=5e-5)
