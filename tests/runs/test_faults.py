"""A few of the attacks of make faults, and that an attack can be lost. pytest tests/runs/test_faults.py"""

import random
import shutil
from functools import partial

import faults
import pytest
import tiny
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    return faults.Field(tmp_path_factory.mktemp("field"))


def test_runs_hold_against_kills_signals_and_flipped_bits(field):
    chance = random.Random()  # other moments in every run of the tests
    calls = [
        *[partial(faults.kill, field, chance=chance)] * 2,
        partial(faults.ask, field, faults.SIGNALS[0], chance=chance),
        partial(faults.damage, field, "state.json", chance=chance),
    ]
    assert faults.make({"quick": calls}) == []


def test_a_run_holds_against_a_full_disk(field):
    """Skipped where no small disk can be mounted."""
    assert faults.full(field, "metrics.jsonl").startswith("exit 2, one line; resumed from step ")


def test_what_is_lost_is_seen_and_named(field, capsys):
    """A finished run whose end is not that of the undisturbed one."""
    cfg = field.config("another")
    weights = field.copy_of_whole(cfg) / "last" / "model.safetensors"
    other = field.whole().with_name("other")
    shutil.copytree(field.whole(), other, symlinks=True)
    tensors = load_file(weights)
    tensors["transformer.wte.weight"][0, 0] += 1e-6
    save_file(tensors, other / "last" / "model.safetensors")
    calls = [lambda: tiny.assert_same_run(tiny.folder_of(cfg), other), lambda: "well"]
    (lost,) = faults.make({"weights": calls})
    assert lost.startswith("weights: AssertionError at assert_same_tensors: ") and "transformer.wte" in lost
    assert "| weights | 2 | 1 | 1 LOST; 1 well |" in capsys.readouterr().out
