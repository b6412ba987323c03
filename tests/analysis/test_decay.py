"""The mixture of a power law and an exponential. pytest tests/analysis/test_decay.py"""

import numpy as np
import pytest

from topogpt.analysis import decay

optimize = pytest.importorskip("scipy.optimize")


def one(x, a, b, c):
    return c * (x + 1) ** (-a) + (1 - c) * np.exp(-b * x)


def of_scipy(theta: np.ndarray) -> np.ndarray:
    bounds = ([0, 0, 0], [10, 10, 1])
    return optimize.curve_fit(one, np.arange(len(theta)), theta, p0=[1, 1, 0.5], bounds=bounds)[0]


def test_planted_curves_are_recovered():
    draw = np.random.default_rng(0)
    a, b, c = draw.uniform(0.3, 2, 300), draw.uniform(0.3, 3, 300), draw.uniform(0.1, 0.9, 300)
    planted = decay.curve(a, b, c, 21)
    np.testing.assert_allclose(planted[7], one(np.arange(21), a[7], b[7], c[7]))
    found = decay.fit(planted)
    assert found.error.max() < 1e-5
    # where the two parts are alike, many mixtures of them make the same curve
    apart = np.abs(decay.curve(a, b, 1, 21) - decay.curve(a, b, 0, 21)).max(1) > 0.25
    assert apart.sum() > 100
    for ours, planted_one in zip(found[:3], (a, b, c), strict=True):
        assert np.median(np.abs(ours - planted_one)[apart]) < 1e-4


def test_it_fits_no_worse_than_curve_fit_and_finds_the_same():
    draw = np.random.default_rng(1)
    a, b, c = draw.uniform(0.2, 3, 60), draw.uniform(0.2, 5, 60), draw.uniform(0, 1, 60)
    theta = decay.curve(a, b, c, 21) + 0.02 * draw.standard_normal((60, 21))
    theta[:, 0] = 1
    found = decay.fit(theta)
    theirs = np.array([of_scipy(y) for y in theta])
    error = ((theta - decay.curve(*theirs.T, 21)) ** 2).sum(1)
    assert (found.error <= error * 1.001 + 1e-9).mean() >= 0.95  # each may end in another dip
    same = np.abs(found.error - error) < 1e-6
    assert same.mean() > 0.9
    assert np.median(np.abs(found.c - theirs[:, 2])[same]) < 1e-3


def test_pure_curves_lie_at_the_bounds():
    at_once, never, halves = np.eye(1, 21)[0], np.ones(21), 0.5 ** np.arange(21)
    found = decay.fit(np.stack([at_once, never, halves]))
    assert found.error.max() < 1e-5
    assert found.c[2] < 1e-3 and found.b[2] == pytest.approx(np.log(2), abs=1e-3)
    fitted = decay.curve(*found[:3], 21)
    assert fitted[0, 1:].max() < 2e-3 and fitted[1].min() > 0.999
    assert (
        all((p >= 0).all() for p in found) and found.c.max() <= 1 and max(found.a.max(), found.b.max()) <= 10
    )
