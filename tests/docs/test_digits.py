"""The example on scikit-learn's digits, for fewer epochs. Run: pytest tests/docs/test_digits.py"""

import importlib.util

import pytest
import tiny


def test_its_filters_become_smooth_and_it_still_reads_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("digits", tiny.ROOT / "docs" / "examples" / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    without, topographic = (digits.train(tau, seed=0, epochs=4) for tau in (0.0, 5.0))
    assert abs(without.smoothness) < 0.1 and topographic.smoothness > 0.2
    assert without.accuracy > 0.95 and topographic.accuracy > 0.85
    digits.draw({"without": without, "topographic": topographic}, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 5000
