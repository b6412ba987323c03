"""A few of the attacks of make faults, and that an attack can be lost. pytest tests/runs/test_faults.py"""

import functools
import random
import shutil

import faults
import pytest
import tiny


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    return faults.Field(tmp_path_factory.mktemp("field"))


def test_runs_hold_against_kills_signals_and_flipped_bits(field):
    chance = random.Random()  # other moments in every run of the tests
    calls = [
        *[functools.partial(faults.kill, field, chance)] * 2,
        functools.partial(faults.ask, field, faults.SIGNALS[0], chance),
        functools.partial(faults.damage, field, "state.json", chance),
    ]
    row = faults.attack("quick", calls)
    assert (row.made, row.lost) == (4, [])


def test_a_run_holds_against_a_full_disk(field, tmp_path):
    try:
        with faults.small_disk(tmp_path / "disk"):
            pass
    except OSError as error:
        pytest.skip(str(error))
    assert faults.full(field, "metrics.jsonl").startswith("exit 2, one line; resumed from step ")


def test_what_is_lost_is_seen_and_named(field, monkeypatch):
    """A resumed run that ends otherwise than the undisturbed one; it is not resumed, but trained anew."""
    cfg = field.config("another", seed=5)
    shutil.copytree(field.whole(), tiny.folder_of(cfg), symlinks=True)
    row = faults.attack("seeds", [functools.partial(field.finish, cfg), lambda: "held"])
    assert row.happened == {"LOST": 1, "held": 1}
    assert (
        len(row.lost) == 1 and row.lost[0].startswith("seeds: AssertionError: ") and "seed = 5" in row.lost[0]
    )
