"""summary.py: the first and last figures of a run, its sheets before and after.

pytest tests/test_summary.py
"""

import json

import pytest
import tiny

import summary
from topogpt.errors import UserError
from topogpt.training import maps
from train import train

DRAW = maps.draw  # as it is before a fixture of conftest.py takes it away


@pytest.fixture(scope="module")
def run(folder):
    cfg = tiny.config(folder, "summed-up", max_steps=8)
    train(cfg)
    return tiny.folder_of(cfg)


def test_first_and_last_evaluation_are_printed_and_the_sheets_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(maps, "draw", DRAW)
    summary.main([str(run)])
    said = capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    values = [r for r in map(json.loads, lines) if r["split"] == "val"]
    for key in ("cross_entropy", "spatial_loss", "moran"):
        assert f"{values[0][key]:12.3f}{values[-1][key]:12.3f}" in said
    assert "trained for 8 steps on 1,024 tokens" in said
    assert (run / "maps" / "before-and-after.png").stat().st_size > 10_000


def test_a_record_cut_off_by_a_kill_does_not_count(run, capsys):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 12, "split": "va')
    summary.main([str(run)])
    (run / "metrics.jsonl").write_text(whole)
    assert "trained for 8 steps" in capsys.readouterr().out


def test_a_folder_without_a_record_is_no_run(tmp_path):
    with pytest.raises(UserError, match="has no metrics.jsonl; give the folder of a run"):
        summary.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no evaluation yet"):
        summary.main([str(tmp_path)])
