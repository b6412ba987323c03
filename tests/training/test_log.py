"""The record of a run and its copy on wandb. Run: pytest tests/training/test_log.py"""

import sys
import types
from pathlib import Path

import pytest
import tiny

import train
from topogpt.training import maps


class FakeRun:
    """Stands in for a run of wandb: keeps what is logged."""

    id = "abc"

    def __init__(self, fails_at: int | None = None) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.fails_at, self.finished = fails_at, False

    def log(self, values: dict, step: int) -> None:
        if len(self.logged) == self.fails_at:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """A module wandb whose init returns the FakeRun; Image remembers the path and content of its file."""

    def make(fails_at: int | None = None) -> FakeRun:
        module, run = types.ModuleType("wandb"), FakeRun(fails_at)
        module.init = lambda **settings: run
        module.Image = lambda path: ("image", path, Path(path).read_bytes())
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setattr(maps, "draw", lambda path, *args: path.write_bytes(b"png"))
        return run

    return make


def test_losses_moran_by_sheet_and_pictures_go_to_wandb(folder, fake):
    run = fake()
    cfg = tiny.config(folder, "copied", wandb=True, max_steps=8)
    train.train(cfg)
    record = {r["step"]: r for r in tiny.records(tiny.folder_of(cfg), "val")}
    assert list(record) == [0, 4, 8]
    for step, values in record.items():
        curves = [v for s, v in run.logged if s == step and "val/moran" in v]
        assert len(curves) == 1
        assert curves[0]["val/cross_entropy"] == values["cross_entropy"]
        for sheet in ("layer.0.attn", "layer.0.mlp"):
            assert curves[0][f"val/moran_by_sheet/{sheet}"] == values["moran_by_sheet"][sheet]
        path = str(tiny.folder_of(cfg) / "maps" / f"step-{step:06d}.png")
        assert (step, {"val/sheets": ("image", path, b"png")}) in run.logged
    assert any("train/cross_entropy" in v for _, v in run.logged)
    assert not any(key.endswith("/step") or key.endswith("/split") for _, v in run.logged for key in v)
    assert run.finished


def test_wandb_may_fail_in_the_middle_and_the_run_goes_on(folder, fake, capsys):
    run = fake(fails_at=3)
    cfg = tiny.config(folder, "alone", wandb=True, max_steps=8)
    assert train.train(cfg).step == 8
    assert len(run.logged) == 3
    assert capsys.readouterr().out.count("no route to host; going on without it") == 1
    assert len(tiny.records(tiny.folder_of(cfg), "val")) == 3
