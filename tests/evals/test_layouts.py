"""Analyses on other sheets than those of the branches. Run: pytest tests/evals/test_layouts.py"""

import numpy as np
import pytest
import tiny
import torch

import topogpt
from evals import dimensionality, topography
from topogpt import topo
from topogpt.analysis.results import read
from topogpt.analysis.subject import EvalConfig, load_subject
from topogpt.errors import UserError

SHARED = {"vocab_size": tiny.VOCAB}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each layout, of the same shape."""
    out = tmp_path_factory.mktemp("out")
    tiny.write_shards(out)
    made = {}
    for layout in topo.LAYOUTS:
        settings = {"layout": layout, "positions": "identity", "radius": 2}
        made[layout] = tiny.random_run(out, layout, topo=settings, **SHARED)
    return out, made


def analyse(out, *given):
    command = [*given, "--text", out / "val", "--n_tokens", 480, "--permutations", 19, "--no_figures"]
    topography.ANALYSIS.main(list(map(str, command)))


def test_other_sheets_of_a_model_lie_beside_its_own(runs, capsys):
    out, made = runs
    run = made["per_branch"]
    analyse(out, run)
    own = (run / "evals" / "topography.json").read_bytes()
    analyse(out, run, "--layout", "c_fc")
    assert (run / "evals" / "topography.json").read_bytes() == own
    found = read(run / "evals" / "c_fc", "topography")
    assert found.sheets == ["layer.0.fc", "layer.1.fc"] and found.content["model"]["grid"] == [8, 8]
    assert found.content["protocol"]["layout"] == "c_fc"
    assert read(run / "evals", "topography").content["protocol"]["layout"] is None
    assert "c_fc/topography.json" in capsys.readouterr().out


def test_a_control_is_looked_at_on_the_sheets_of_the_model(runs):
    out, made = runs
    analyse(out, made["c_fc"], "--control", made["per_branch"], "--fwhm_mm", 0)
    model, control = (
        read(folder, "topography")
        for folder in (made["c_fc"] / "evals", made["per_branch"] / "evals" / "c_fc")
    )
    assert model.sheets == control.sheets == ["layer.0.fc", "layer.1.fc"]
    # the same weights, and units in order on both: the same numbers
    assert model.results["moran"] == control.results["moran"]


def test_the_numbers_of_the_one_sheet_are_those_of_all_branches_laid_on_it(runs):
    out, made = runs
    analyse(out, made["one_sheet"], "--n_maps", 8)
    found = read(made["one_sheet"] / "evals", "topography")
    subject = load_subject(EvalConfig(run=str(made["one_sheet"])), str(made["one_sheet"]))
    assert found.sheets == ["all"] and subject.grid == (8, 8) and subject.n_units == 64
    text = np.fromfile(out / "val" / "one.bin", "<u2", offset=1024)[:480].astype(np.int64)
    windows = torch.from_numpy(text.reshape(-1, subject.model.cfg.block_size))
    with torch.no_grad():
        branches = subject.model(windows, activations=True).activations
    x = torch.cat(list(branches.values()), -1).flatten(0, 1).numpy()  # units in order, row by row
    at = np.linspace(0, len(x) - 1, 8).round().astype(int)
    expected = topo.morans_i(x[at].reshape(8, 8, 8)).mean()
    assert found.results["moran"]["0.0"]["mean"] == pytest.approx(expected, abs=1e-5)


def test_dimensionality_knows_the_activations_of_every_layout(runs):
    out, made = runs
    given = [
        made["c_fc"],
        "--text",
        out / "val",
        "--names",
        "layer.*",
        "all",
        "--no_untrained",
        "--no_figures",
    ]
    dimensionality.ANALYSIS.main([*map(str, given), "--n_tokens", "480"])
    found = read(made["c_fc"] / "evals", "dimensionality").results["by_name"]
    assert list(found) == [*topo.sheet_names(2), "layer.0.fc", "layer.1.fc", "all"]
    assert [found[name]["n_units"] for name in ("layer.0.mlp", "layer.0.fc", "all")] == [16, 64, 64]


def test_positions_of_another_layout_are_refused_in_one_line(runs):
    _, made = runs
    cfg = EvalConfig(
        run=str(made["per_branch"]),
        layout="c_fc",
        positions=str(made["one_sheet"] / "checkpoints" / "step-000008"),
    )
    with pytest.raises(UserError, match="positions = .* are of 1 sheets of 64 units, but .* has 2 of 64"):
        load_subject(cfg, cfg.run)


def test_a_notebook_sees_them_too(runs):
    _, made = runs
    run = topogpt.load(made["per_branch"], layout="c_fc")
    assert run.sheets == ["layer.0.fc", "layer.1.fc"] and run.grid == (8, 8)
    maps = topogpt.activations(run, [[1, 2, 3]])
    with torch.no_grad():
        x = run.model(torch.tensor([[1, 2, 3]]), activations=["layer.1.fc"]).activations["layer.1.fc"]
    assert np.array_equal(maps["layer.1.fc"], x[0].reshape(3, 8, 8).numpy())
    assert topogpt.load(made["one_sheet"]).sheets == ["all"]
    with pytest.raises(ValueError, match="positions must be arrays"):
        topogpt.Run(run.model, {f"layer.{i}.fc": topo.positions("identity", 16, 0, "") for i in (0, 1)})
