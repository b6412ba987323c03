"""topo.py: what a run came to, its map beside its floor, from its record. pytest tests/test_topo_tool.py"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import topo as script
from topogpt import terminal, topo
from topogpt.errors import UserError
from topogpt.runs.folder import read_maps
from topogpt.training import maps
from train import train

DRAW = maps.draw  # as it is before a fixture of conftest.py takes it away
FLOOR = topo.noise_floor(4, 4)


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    cfg = tiny.config(folder, "looked-at", max_steps=8, model={"n_layer": 2})
    train(cfg)
    return tiny.folder_of(cfg)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "looked-at", symlinks=True))


def said_of(capsys, *argv: object) -> str:
    script.main([str(arg) for arg in argv])
    return capsys.readouterr().out


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "val"]


# ---- a run -------------------------------------------------------------------------------------------------


def test_figures_of_the_first_and_last_evaluation(run, capsys):
    said, (first, *_, last) = said_of(capsys, run, "--checkpoint", "last"), records(run)
    for key in ("cross_entropy", "spatial_loss", "moran"):
        row = next(line for line in said.splitlines() if line.startswith(script.FIGURES[key]))
        assert f"{first[key]:.3f}" in row and f"{last[key]:.3f}" in row
    assert "trained for 8 steps on 1,024 tokens" in said
    assert "4 of 4x4 units, 64 in all; positions: permuted, seed 0" in said
    assert "step 8 (last)" in said


def test_every_sheets_moran_stands_beside_its_floor(run, capsys):
    said, floor = said_of(capsys, run, "--checkpoint", "last"), script.shown_floor(FLOOR)
    value = records(run)[-1]["moran_by_sheet"]
    for layer in ("layer.0", "layer.1"):
        row = next(line for line in said.splitlines() if line.startswith(layer + " "))
        words = [f"{value[f'{layer}.{branch}']:.3f}" for branch in ("attn", "mlp")]
        assert row.split() == [layer, *words, *floor.split()]
    assert floor in next(line for line in said.splitlines() if line.startswith("mean Moran's I"))


def test_the_recorded_moran_is_that_of_the_arrays(run, capsys):
    """A record without it (of an older run) is made good from the arrays, to the same table."""
    said = said_of(capsys, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    older = [{k: v for k, v in line.items() if k != "moran_by_sheet"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    assert said_of(capsys, run) == said
    shutil.rmtree(run / "maps")
    assert "Moran's I of each sheet: not recorded here" in said_of(capsys, run)


def test_a_step_is_chosen(run, capsys):
    value = records(run)[1]
    assert value["step"] == 4
    said = said_of(capsys, run, "--checkpoint", "step-4")
    assert f"{value['moran_by_sheet']['layer.0.attn']:.3f}" in said and "step 4 (step-4)" in said
    with pytest.raises(UserError, match="was not evaluated at step-000005; its last evaluations: 0, 4, 8"):
        script.main([str(run), "--checkpoint", "step-5"])
    with pytest.raises(UserError, match="checkpoint = worst is not best, last or step-N"):
        script.main([str(run), "--checkpoint", "worst"])


def test_a_run_that_has_no_checkpoint_yet(run, capsys):
    for name in ("best", "last"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    said = said_of(capsys, run)
    assert "sheets: 4x4 units; there is no checkpoint yet" in said and "step 8 (last)" in said


def test_positions_that_are_not_those_of_the_seed_are_not_called_so(run, capsys):
    state = (run / "best" / "state.json").resolve()
    state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
    assert "positions: of their own" in said_of(capsys, run)


def test_the_sheets_are_drawn_before_and_after(run, capsys, monkeypatch):
    monkeypatch.setattr(maps, "draw", DRAW)
    picture = run / "maps" / "before-and-after.png"
    assert f"before and after: {picture}" in said_of(capsys, run, "--draw")
    assert picture.stat().st_size > 10_000


def test_a_record_cut_off_by_a_kill_does_not_count(run, capsys):
    said = said_of(capsys, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "split": "va')
    assert said_of(capsys, run) == said


# ---- an exported folder ------------------------------------------------------------------------------------


def exported(run: Path, folder: Path) -> Path:
    from topogpt.runs.checkpoint import load_run
    from topogpt.sharing.export import write_topography

    folder.mkdir()
    write_topography(folder, load_run(run))
    return folder


def test_an_exported_folder_says_what_it_has_and_what_it_has_not(run, tmp_path, capsys):
    folder = exported(run, tmp_path / "hf")
    said = said_of(capsys, folder)
    assert "4 of 4x4 units, 64 in all; positions: permuted, seed 0" in said
    assert "not recorded here (no metrics.jsonl)" in said and "picture: none is stored here" in said
    shutil.copy(run / "metrics.jsonl", folder)
    shutil.copy(run / "config.yaml", folder / "training_config.yaml")
    said = said_of(capsys, folder)
    assert "looked-at: a GPT of 2 layers, 16 wide; spatial loss: topolm, weight 2.5" in said
    assert "(exported)" in said and script.shown_floor(FLOOR) in said
    with pytest.raises(UserError, match="only a run keeps its maps as arrays"):
        script.main([str(folder), "--draw"])


def test_a_repository_of_the_hub(run, tmp_path, capsys, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    folder = exported(run, tmp_path / "hf")
    shutil.copy(run / "metrics.jsonl", folder)

    def fetch(repo: str, name: str) -> str:
        assert repo == "USER/NAME"
        if not (folder / name).is_file():
            raise EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert "trained for 8 steps" in said_of(capsys, "USER/NAME")
    (folder / "topography.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match="its topography could not be read from the Hub: 404"):
        script.main(["USER/NAME"])
    (tmp_path / "kept.json").rename(folder / "topography.json")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: fetch(repo, name) if "topo" in name else 1 / 0
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be read from the Hub: division by zero"):
        script.main(["USER/NAME"])  # what is not there is passed over, what goes wrong is not


# ---- mistakes ----------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def test_what_cannot_be_read_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no metrics.jsonl.*nor an exported folder.*give the folder of a run"):
        script.main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"lookedat does not exist \(runs in .*: looked-at\)"):
        script.main([str(run.parent / "lookedat")])
    damage(run / "maps" / f"step-{records(run)[-1]['step']:06d}.npz")
    with pytest.raises(UserError, match=r"maps .*npz are damaged: .*; delete the file"):
        script.main([str(run), "--checkpoint", "last"])
    damage((run / "last" / "model.safetensors").resolve())
    with pytest.raises(UserError, match="cannot be read as a topography.*use another checkpoint"):
        script.main([str(run), "--checkpoint", "last"])
    (run / "metrics.jsonl").write_text('{"step": 0, "spl')
    with pytest.raises(UserError, match="has no evaluation yet; wait for its first one"):
        script.main([str(run)])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        script.main([str(run)])


@pytest.mark.parametrize("content", ["model: [", "model: 3", "", "topo: {loss: none}"])
def test_settings_that_are_no_runs(run, content):
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml cannot be read: "):
        script.main([str(run)])


def test_maps_of_other_shapes_are_refused(tmp_path):
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / "step-000000.npz", a=np.zeros((1, 3, 3)), b=np.zeros((1, 3, 4)))
    with pytest.raises(UserError, match="not the maps of sheets"):
        read_maps(tmp_path, 0)
    assert read_maps(tmp_path, 1) is None


def test_it_takes_no_torch(run):
    code = "import sys, topo; topo.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, run], cwd=tiny.ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "topo.py", "no/such/run"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- the picture -------------------------------------------------------------------------------------------


def test_cells_in_letters_and_in_colours():
    values = [[-1.0, 1.0], [0.0, 9.0], [-9.0, 0.5]]
    assert terminal.picture(values, colours=False) == ["  @@", "==@@", "  ##"]
    upper, lower = terminal.picture(values, colours=True)
    half = "\u2580"
    assert upper == (
        f"\033[38;2;10;42;96m\033[48;2;249;249;248m{half}\033[38;2;112;38;4m\033[48;2;112;38;4m{half}\033[0m"
    )
    assert re.findall(r"48;2", lower) == [] and lower.count(half) == 2


def test_the_picture_fits_the_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(script, "has_colours", lambda: False)
    said = said_of(capsys, run)
    assert "layer.0.attn  layer.1.mlp" in said
    grid = read_maps(run, records(run)[-1]["step"])
    assert all(topo.morans_i(m).shape == (16,) for m in grid.values())
    monkeypatch.setattr(script, "has_colours", lambda: True)
    assert "\033[38;2;" in said_of(capsys, run)


def test_colours_are_for_a_person_at_a_terminal(monkeypatch):
    assert not terminal.has_colours()  # pytest takes the output
    monkeypatch.setattr(sys, "stdout", type("Tty", (), {"isatty": lambda s: True, "encoding": "utf-8"})())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.has_colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colours()
