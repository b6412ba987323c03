"""The label null: a plain loop with scipy, planted truths. pytest tests/analysis/test_shuffles.py"""

import re

import numpy as np
import pytest
from scipy import stats

from topogpt import topo
from topogpt.analysis import contrast, measures, nulls, shuffles
from topogpt.analysis.contrast import Items
from topogpt.analysis.stimuli import Stimuli
from topogpt.analysis.subject import MapConfig
from topogpt.errors import UserError

CFG = MapConfig(run="-", permutations=199)


def smooth_sheets(n_items: int, n_sheets: int = 2, side: int = 10, seed: int = 0) -> np.ndarray:
    """Items on sheets whose neighbours fire together, (S, n_items, h, w): smooth noise, whatever the item."""
    noise = np.random.default_rng(seed).standard_normal((n_sheets, n_items, side, side))
    return measures.smooth(noise, 3.0) + 0.01 * noise


def plain_moran(grid: np.ndarray) -> float:
    """Cell by cell: the mean of a cell's neighbours against itself."""
    z, (h, w) = grid - grid.mean(), grid.shape
    total = 0.0
    for i in range(h):
        for j in range(w):
            near = [
                z[a, b]
                for a in range(max(0, i - 1), min(h, i + 2))
                for b in range(max(0, j - 1), min(w, j + 2))
                if (a, b) != (i, j)
            ]
            total += z[i, j] * np.mean(near)
    return total / (z * z).sum()


@pytest.mark.parametrize("pairs", [None, np.array([*range(6), *range(6), 0, 1])])
def test_mean_and_p_are_those_of_a_plain_loop(pairs):
    """Every shuffle with scipy, sheet by sheet and unit by unit; Moran's I cell by cell."""
    x = smooth_sheets(14, side=5)
    items, cfg = Items(x, np.arange(14) < 6, pairs), MapConfig(run="-", permutations=9, shuffles=40)
    found = contrast.mapped(cfg, ["a", "b"], items, 2.0)
    read_out, at_random = measures.smooth(x, 2.0), []
    for labels in [items.first, *shuffles.shuffled(items.first, pairs, 40, cfg.seed)]:
        t = stats.ttest_ind(read_out[:, labels], read_out[:, ~labels], axis=1, equal_var=False).statistic
        at_random.append([plain_moran(sheet) for sheet in t])
    (observed, *null) = np.array(at_random)
    assert found.moran["mean"] == pytest.approx(observed.mean(), abs=1e-6)
    labels, mean = found.moran["labels"], np.mean(null, axis=1)
    assert labels["value"] == pytest.approx(observed.mean(), abs=1e-6)
    assert labels["mean"] == pytest.approx(mean.mean(), abs=1e-6)
    assert labels["sd"] == pytest.approx(mean.std(), abs=1e-6)
    assert labels["p"] == (1 + (mean >= observed.mean()).sum()) / 41
    for s, sheet in enumerate(found.moran["by_sheet"].values()):
        assert sheet["labels_mean"] == pytest.approx(np.mean(null, axis=0)[s], abs=1e-6)
        assert sheet["p_labels"] == (1 + sum(values[s] >= observed[s] for values in null)) / 41


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_t_of_many_labels_is_welchs_of_each(dtype):
    """Also of units that are constant, or constant within a kind, or far from 0."""
    x = np.random.default_rng(0).standard_normal((9, 6)).astype(dtype)
    labels = np.array([[True] * 4 + [False] * 5, [False, True] * 4 + [True]])
    x[:, 1], x[:, 2], x[:, 3] = 7.3, labels[0], x[:, 3] * 1e-3 + 500
    found = shuffles.welch_of_labels(x, labels)
    for k, first in enumerate(labels):
        expected = measures.welch(x[first], x[~first]).t
        np.testing.assert_allclose(found.t[k], expected, rtol=1e-4, atol=1e-5)
        a, b = x[first].astype(float), x[~first].astype(float)
        d = (a.mean(0) - b.mean(0))[4:] / np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)[4:]
        np.testing.assert_allclose(found.d[k, 4:], d, rtol=1e-5)


def test_a_contrast_that_is_there_exceeds_its_shuffles_and_smooth_noise_does_not():
    """Both maps are far above white noise and above shuffled units; only one is about its labels."""
    noise, real = smooth_sheets(60, seed=3), smooth_sheets(60, seed=3)
    y, x = np.mgrid[:10, :10] / 9
    real[:, :30] += 0.4 * np.cos(np.pi * x) * np.cos(np.pi * y)
    of_noise, of_real = (
        contrast.mapped(CFG, ["a", "b"], Items(each, np.arange(60) < 30, None), 0.0).moran
        for each in (noise, real)
    )
    for found in (of_noise, of_real):
        assert found["mean"] > 0.6 and found["floor"] < 0.05  # both look like a map,
        assert all(sheet["p"] == sheet["p_floor"] == 0.005 for sheet in found["by_sheet"].values())
    assert of_noise["labels"]["p"] > 0.05 and of_real["labels"]["p"] == pytest.approx(1 / 301)
    assert of_noise["labels"]["mean"] > 0.6  # as the same items do under any labels
    again = [shuffles.again(each, np.arange(60) < 30, None, 99, 0) for each in (noise, real)]
    for key in ("effect_size", "correlation_of_t"):
        by_chance, found = (each[key] for each in again)
        assert by_chance["p"] > 0.05 and found["p"] == 0.01 and found["value"] > 0.7
        assert abs(found["mean"]) < 0.2


def test_p_is_evenly_spread_where_labels_mean_nothing():
    p = []
    for seed in range(60):
        items = Items(smooth_sheets(24, 1, 5, seed), np.arange(24) < 12, None)
        labels = shuffles.shuffled(items.first, None, 39, seed)
        values = shuffles.under_shuffles(items.patterns, labels, "queen").mean(1)
        t = shuffles.under_shuffles(items.patterns, items.first[None], "queen")[0, 0]
        p.append(nulls.share_reaching(values, t))
    assert stats.kstest(p, "uniform").pvalue > 0.01


# ---- labels ------------------------------------------------------------------------------------------------


def test_labels_change_places_and_keep_their_number():
    first = np.arange(9) < 4
    found = shuffles.shuffled(first, None, 200, 0)
    assert (found.sum(1) == 4).all() and len(np.unique(found, axis=0)) > 80
    np.testing.assert_allclose(found.mean(0), 4 / 9, atol=0.15)
    assert np.array_equal(found, shuffles.shuffled(first, None, 200, 0))
    assert not np.array_equal(found, shuffles.shuffled(first, None, 200, 1))


def test_paired_items_change_places_within_their_pair_alone():
    first, pairs = np.array([1, 1, 1, 0, 0, 0], bool), np.array([7, 3, 5, 5, 7, 3])
    found = shuffles.shuffled(first, pairs, 300, 0)
    for pair in (3, 5, 7):
        assert (found[:, pairs == pair].sum(1) == 1).all()
    assert len(np.unique(found, axis=0)) == 8  # every one of the 2 ** 3
    half = shuffles.half_of(np.arange(40) < 20, np.arange(40) % 20, 0)
    assert half.sum() == 20 and np.array_equal(half[:20], half[20:])  # pairs stay together


def test_a_half_is_half_of_either_kind():
    first = np.arange(31) < 11
    half = shuffles.half_of(first, None, 0)
    assert half[first].sum() == 5 and half[~first].sum() == 10
    assert shuffles.again(smooth_sheets(6), np.arange(6) < 3, None, 9, 0) is None  # a half has one item


def test_pairs_that_are_of_one_kind_are_refused():
    found = Stimuli("mine.csv", list("abcd"), list("xxyy"), "", ["1", "1", "2", "2"])
    sides = [found.where(kind) for kind in "xy"]
    with pytest.raises(UserError, match="mine.csv: no pair has items of both kinds") as error:
        contrast.items_of(found, smooth_sheets(4), *sides)
    assert "\n" not in str(error.value)
    paired = contrast.items_of(found._replace(pairs=["1", "2", "1", "2"]), smooth_sheets(4), *sides)
    assert paired.pairs.tolist() == [0, 1, 0, 1] and paired.first.tolist() == [True, True, False, False]


def test_items_are_in_the_order_of_their_kinds():
    found = Stimuli("f", list("abcde"), list("yxyzx"), "")
    x = np.arange(5.0)[None, :, None, None] * np.ones((1, 1, 2, 2))
    items = contrast.items_of(found, x, found.where("x"), found.where("y"))
    a, b = items.sides
    assert a[0, :, 0, 0].tolist() == [1, 4] and b[0, :, 0, 0].tolist() == [0, 2] and items.pairs is None


# ---- what is said of it ------------------------------------------------------------------------------------


def moran(p: float) -> dict:
    labels = {"value": 0.78, "mean": 0.77, "sd": 0.01, "p": p}
    return {"mean": 0.78, "floor": 0.58, "labels": labels}


@pytest.mark.parametrize(
    "p, percent, grey",
    [
        (0.01, 12.0, ""),
        (0.01, 0.0, "No unit is significant."),
        (0.4, 12.0, "Shuffled labels reach it .p = 0.40"),
    ],
)
def test_a_headline_shows_only_what_the_null_allows(p, percent, grey):
    card = contrast.card([moran(p), moran(0.5)], [20, 30], percent)
    assert re.match(grey, card.grey) and bool(card.grey) == bool(grey)
    assert card.values == [0.78, 0.78] and card.beside["labels shuffled"] == 0.77 and card.beside["p"] == p


def test_few_items_make_no_headline_and_a_warning():
    assert contrast.card([moran(0.01)], [19, 30], 50.0) is None
    assert contrast.summary_of("a - b", [30, 19], {"0.0": moran(0.01)}, {"0.0": 50.0}) == {}
    said = contrast.summary_of("a - b", [20, 20], {"0.0": moran(0.01), "2.0": moran(0.4)}, {"2.0": 50.0})
    assert said["Moran's I of a - b, FWHM 2 mm"]["p"] == 0.4  # the widest, as on the card
    apart = {"n": [19, 30], "tokens": [3.0, 3.1], "first_word": [["a", 0.9], ["a", 0.9]]}
    (line,) = contrast.warnings_of("a - b", apart)
    assert "19 and 30 items; fewer than 20" in line
    assert contrast.warnings_of("a - b", apart | {"n": [20, 30]}) == []


def test_what_else_tells_items_apart_is_said():
    items = ["to run on", "to sing", "to be", "the sea", "the big old tree", "a hill"]
    found = Stimuli("f", items, list("vvvnnn"), "")
    sides = [found.where(kind) for kind in "vn"]
    apart = contrast.told_apart(found, [3, 2, 2, 2, 9, 4], sides)
    assert apart["n"] == [3, 3] and apart["tokens"] == pytest.approx([7 / 3, 5])
    assert apart["first_word"] == [["to", 1.0], ["the", 2 / 3]]
    few, tokens, words = contrast.warnings_of("v - n", apart)
    assert (
        "2.3 and 5.0 tokens" in tokens
        and "100% of the first begin with to, 67% of the second with the" in words
    )
    assert [str(cell) for cell in contrast.apart_row("v - n", apart)[3:]] == [
        "2.3",
        "5.0",
        "to (100%)",
        "the (67%)",
    ]


def test_moran_of_the_plain_loop_is_the_one_of_the_package():
    grid = np.random.default_rng(0).standard_normal((4, 7))
    assert plain_moran(grid) == pytest.approx(topo.morans_i(grid), abs=1e-12)
