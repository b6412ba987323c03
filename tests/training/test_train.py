"""The loop: what it writes, when it stops, what it does about a broken gradient.

pytest tests/training/test_train.py
"""

import dataclasses
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from topogpt import topo
from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.runs import checkpoint
from topogpt.runs import folder as runfolder
from topogpt.runs.checkpoint import load_run
from topogpt.runs.state import TrainState
from topogpt.settings import TrainConfig
from topogpt.training import maps
from topogpt.training.objective import Objective
from train import train


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A finished run of 18 steps: checkpoints every 5, evaluations every 4."""
    cfg = tiny.config(folder)
    state = train(cfg)
    assert state.step == cfg.max_steps
    return tiny.folder_of(cfg)


# ---- the state ---------------------------------------------------------------------------------------------


def update(state: TrainState, *cross_entropies: float) -> list[bool]:
    best = []
    for cross_entropy in cross_entropies:
        state.step += 10
        best.append(state.update(cross_entropy))
    return best


def test_increases_are_counted_against_the_previous_evaluation_and_in_a_row():
    state, increases = TrainState(), []
    for cross_entropy in [5.0, 4.0, 4.5, 4.4, 4.6, 4.7, 4.8, 4.8, 4.9]:
        update(state, cross_entropy)
        increases.append(state.increases)
    assert increases == [0, 0, 1, 0, 1, 2, 3, 0, 1]  # 4.4 is below the one before, though above the best


def test_the_best_is_the_lowest_so_far_and_the_first_of_equals():
    state = TrainState()
    assert update(state, 5.0, 4.0, 4.5, 4.0, 3.9, 6.0) == [True, True, False, False, True, False]
    assert (state.best_cross_entropy, state.best_step) == (3.9, 50)
    assert (state.last_cross_entropy, state.evaluated_at) == (6.0, 60)


def test_nan_is_an_increase_and_never_the_best():
    state = TrainState()
    assert update(state, math.nan, 5.0, math.nan, math.nan, math.inf) == [False, True, False, False, False]
    assert (state.best_cross_entropy, state.best_step) == (5.0, 20)
    state = TrainState()
    update(state, 5.0, math.nan, math.nan, math.nan)
    assert state.increases == 3


def test_recovering_from_nan_is_not_an_increase():
    state = TrainState()
    update(state, 5.0, math.nan, 4.9)
    assert state.increases == 0


# ---- the folder of a run -----------------------------------------------------------------------------------


def test_a_run_leaves_the_files_that_the_readme_names(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "log.txt",
        "maps",
        "checkpoints",
        "best",
        "last",
    }
    assert {p.name for p in (run / "last").iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}


def test_the_settings_kept_with_a_run_start_it_again(run, folder):
    again = parse(TrainConfig, [str(run / "config.yaml")])
    assert again == tiny.config(folder)


def test_the_newest_checkpoints_and_the_best_are_kept(run):
    state = json.loads((run / "last" / "state.json").read_text())["train_state"]
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert state["best_step"] == 4  # far enough back not to be among the newest anyway
    assert kept == {"step-000004", "step-000015", "step-000018"}
    assert (run / "best").resolve().name == "step-000004"
    assert (run / "last").resolve().name == "step-000018"
    assert not (run / "best").readlink().is_absolute()  # so that a run can be moved


def test_the_record_holds_every_step_and_every_evaluation(run, folder):
    cfg = tiny.config(folder)
    train_records, val_records = tiny.records(run, "train"), tiny.records(run, "val")
    assert [r["step"] for r in train_records] == list(range(1, 19))
    assert [r["step"] for r in val_records] == [0, 4, 8, 12, 16, 18]
    for r in train_records + val_records:
        assert r["tokens"] == r["step"] * cfg.batch_size * cfg.model.block_size
        n_sheets = 2 * cfg.model.n_layer
        assert r["loss"] == pytest.approx(
            r["cross_entropy"] + cfg.topo.weight * n_sheets * r["spatial_loss"], rel=1e-6
        )
    assert train_records[0]["cross_entropy"] == pytest.approx(math.log(tiny.VOCAB), rel=0.02)
    assert [r["lr"] for r in train_records[:5]] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert all(-1 <= r["moran"] <= 1 for r in val_records)
    assert set(val_records[0]["moran_by_sheet"]) == {"layer.0.attn", "layer.0.mlp"}
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["split"] == "train" and first["tokens_per_s"] > 0 and first["eta_s"] > 0
    assert "mfu" not in first  # the peak of a CPU is not known


def test_the_maps_of_an_evaluation_are_kept(run):
    arrays = runfolder.read_maps(run, 16)
    assert {sheet: grids.shape for sheet, grids in arrays.items()} == {
        "layer.0.attn": (16, 4, 4),
        "layer.0.mlp": (16, 4, 4),
    }
    by_sheet = tiny.records(run, "val")[-2]["moran_by_sheet"]
    for sheet, grids in arrays.items():
        assert topo.morans_i(grids).mean() == pytest.approx(by_sheet[sheet], abs=1e-5)


def test_a_checkpoint_loads_with_the_cross_entropy_it_was_saved_for(run, folder):
    """Recomputed from the weights on disk, the plain way."""
    loaded = load_run(run, "best")
    raw = np.fromfile(folder / "val" / "one.bin", dtype="<u2", offset=1024)
    tokens = torch.from_numpy(raw.astype("int64"))
    x, y = (tokens[i : i + 592].view(37, 16) for i in (0, 1))
    with torch.no_grad():
        loss = loaded.model(x, y).loss
    assert loss.item() == pytest.approx(loaded.state["train_state"]["best_cross_entropy"], rel=1e-5)
    for sheet, position in loaded.positions.items():
        assert (position == topo.positions("permuted", 16, 0, sheet)).all()


def test_overwrite_starts_afresh(run, folder):
    shutil.copytree(run, run.with_name("old"), symlinks=True)
    train(tiny.config(folder, "old", overwrite=True, max_steps=2))
    old = run.with_name("old")
    assert [r["step"] for r in tiny.records(old)] == [0, 1, 2, 2]
    assert (old / "last").resolve().name == "step-000002"
    assert parse(TrainConfig, [str(old / "config.yaml")]).overwrite is False


def test_overwrite_deletes_nothing_that_is_not_a_run(folder):
    thesis = folder / "out" / "thesis" / "chapter.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("ten years of work")
    with pytest.raises(UserError, match="thesis"):
        train(tiny.config(folder, "thesis", overwrite=True, max_steps=1))
    assert thesis.read_text() == "ten years of work"


# ---- what is computed --------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_run(run, folder):
    cfg = tiny.config(folder, "same")
    train(cfg)
    assert tiny.records(tiny.folder_of(cfg)) == tiny.records(run)
    other = tiny.config(folder, "other", seed=1, max_steps=1)
    train(other)
    assert tiny.records(tiny.folder_of(other))[0]["cross_entropy"] != tiny.records(run)[0]["cross_entropy"]


def test_micro_steps_add_up_to_one_large_batch(folder):
    weights = []
    for size in (8, 2):
        cfg = tiny.config(
            folder,
            f"micro_{size}",
            max_steps=3,
            per_device_batch_size=size,
            model={"dropout": 0.0},
            topo={"loss": "none"},
        )
        train(cfg)
        weights.append(
            (tiny.records(tiny.folder_of(cfg)), load_run(tiny.folder_of(cfg), "last").model.state_dict())
        )
    (large, a), (small, b) = weights
    for ours, theirs in zip(small, large, strict=True):
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)
        assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-4)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_spatial_loss_makes_maps_and_the_control_does_not(folder):
    last = {}
    for loss in ("topolm", "none"):
        cfg = tiny.config(folder, f"objective_{loss}", max_steps=40, eval_every=40, topo={"loss": loss})
        train(cfg)
        first, last[loss] = tiny.records(tiny.folder_of(cfg), "val")
        assert 0.3 < first["spatial_loss"] < 0.7  # the control's is measured, too
        assert ("spatial_loss" in tiny.records(tiny.folder_of(cfg), "train")[0]) == (loss == "topolm")
    assert last["topolm"]["spatial_loss"] < 0.2 < last["none"]["spatial_loss"]
    assert last["topolm"]["moran"] > last["none"]["moran"] + 0.15
    assert last["none"]["loss"] == last["none"]["cross_entropy"]


def test_a_language_with_structure_is_learnt(tmp_path):
    counting = torch.arange(4000).numpy() % tiny.VOCAB
    for split in ("train", "val"):
        tiny.write_shard(tmp_path / split / "one.bin", counting)
    cfg = tiny.config(
        tmp_path, max_steps=60, eval_every=60, log_every=20, optim={"decay_steps": None, "lr": 0.03}
    )
    train(cfg)
    first, last = tiny.records(tiny.folder_of(cfg), "val")
    assert first["cross_entropy"] > 4 and last["cross_entropy"] < 2


def test_evaluation_leaves_training_as_it_is(run, folder):
    """Dropout is on in training and off in evaluation, and the order of the data does not know of it."""
    cfg = tiny.config(folder, "rarely_evaluated", eval_every=100)
    train(cfg)
    assert tiny.records(tiny.folder_of(cfg), "train") == tiny.records(run, "train")
    values = tiny.records(tiny.folder_of(cfg), "val")
    assert values[-1] == tiny.records(run, "val")[-1]


def test_bfloat16_trains_too(folder, run):
    cfg = tiny.config(folder, "bfloat16", dtype="bfloat16", max_steps=4)
    train(cfg)
    ours, theirs = tiny.records(tiny.folder_of(cfg), "val")[-1], tiny.records(run, "val")[1]
    assert ours["cross_entropy"] != theirs["cross_entropy"]
    assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=0.01)


# ---- early stopping ----------------------------------------------------------------------------------------


def test_training_stops_after_as_many_increases_as_patience_says(folder, capsys):
    cfg = tiny.config(
        folder, "stormy", max_steps=60, eval_every=2, patience=3, optim={"lr": 0.1, "min_lr": 0.1}
    )
    state = train(cfg)
    values = [r["cross_entropy"] for r in tiny.records(tiny.folder_of(cfg), "val")]
    rises = [b > a for a, b in zip(values, values[1:], strict=False)]
    assert rises[-3:] == [True] * 3 and state.increases == 3
    assert not any(all(rises[i : i + 3]) for i in range(len(rises) - 3))  # and not later than it should
    assert state.step == 2 * len(rises) < cfg.max_steps
    assert f"stopped early at step {state.step}" in capsys.readouterr().out
    assert (tiny.folder_of(cfg) / "last").resolve().name == f"step-{state.step:06d}"
    assert (tiny.folder_of(cfg) / "best").resolve().name == f"step-{state.best_step:06d}"

    patient = replace(cfg, run_name="patient", patience=0, max_steps=state.step + 2)
    assert train(patient).step == state.step + 2


# ---- gradients that are not finite -------------------------------------------------------------------------


def break_gradients(monkeypatch, *broken: int) -> None:
    """The training steps with these numbers, from 0, have a cross-entropy of NaN."""
    forward, micro_steps = Objective.forward, [0]

    def wrapped(self, tokens, targets, chosen):
        ce, spatial = forward(self, tokens, targets, chosen)
        if self.training:
            step = micro_steps[0] // 4
            micro_steps[0] += 1
            ce = ce * torch.nan if step in broken else ce
        return ce, spatial

    monkeypatch.setattr(Objective, "forward", wrapped)


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    tensors = load_file(folder / "model.safetensors")
    for i, state in torch.load(folder / "optimizer.pt", weights_only=True)["state"].items():
        tensors |= {f"{i}.{name}": t for name, t in state.items()}
    return tensors


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    folder, monkeypatch, capsys
):
    break_gradients(monkeypatch, 2, 3)
    cfg = tiny.config(folder, "hiccup", max_steps=6, save_every=1, keep_last=10)
    train(cfg)
    run = tiny.folder_of(cfg)
    before, after, later = saved(run, 2), saved(run, 4), saved(run, 5)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert not torch.equal(after["transformer.wte.weight"], later["transformer.wte.weight"])
    assert [r["skipped_in_a_row"] for r in tiny.records(run, "train")] == [0, 0, 1, 2, 0, 0]
    assert all(t.isfinite().all() for t in saved(run, 6).values())
    output = capsys.readouterr().out
    assert "step 3: the gradient is not finite" in output and "step 5: the gradient" not in output


def test_training_gives_up_after_max_skipped_steps_and_keeps_the_last_good_weights(folder, monkeypatch):
    break_gradients(monkeypatch, *range(2, 100))
    cfg = tiny.config(folder, "broken", max_skipped=4, save_every=3, eval_every=100)
    with pytest.raises(UserError, match="max_skipped = 4 .*--optim.lr.*--resume"):
        train(cfg)
    run = tiny.folder_of(cfg)
    assert tiny.records(run, "train")[-1]["step"] == 6
    last = saved(run, 3)
    assert (run / "last").resolve().name == "step-000003"
    assert all(t.isfinite().all() for t in last.values())
    assert {last[name].item() for name in last if name.endswith(".step")} == {2}

    monkeypatch.undo()  # whatever broke is mended: the run goes on from there
    monkeypatch.setattr(maps, "draw", lambda *args, **kwargs: None)
    assert train(replace(cfg, resume=True)).step == cfg.max_steps
    assert tiny.records(run, "train")[-1]["skipped_in_a_row"] == 0


def test_skipped_steps_count_between_logged_ones(folder, monkeypatch, capsys):
    break_gradients(monkeypatch, 2, 3, 4, 5)
    cfg = tiny.config(folder, "unlogged", max_skipped=5, log_every=9, eval_every=100)
    train(cfg)
    assert "step 9: the gradient was not finite; up to 4 steps in a row" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(maps, "draw", lambda *args, **kwargs: None)
    break_gradients(monkeypatch, 2, 3, 4, 5)
    with pytest.raises(UserError, match="max_skipped = 4 "):
        train(replace(cfg, run_name="unlogged_too", max_skipped=4))
    assert [r["step"] for r in tiny.records(folder / "out" / "unlogged_too", "train")] == [9]


def test_steps_skipped_in_a_row_are_counted_across_a_resumption(folder, monkeypatch):
    break_gradients(monkeypatch, *range(100))
    cfg = tiny.config(folder, "broken_twice", max_skipped=4, max_steps=2, eval_every=100)
    train(cfg)
    with pytest.raises(UserError, match="max_skipped"):
        train(replace(cfg, max_steps=18, resume=True))
    assert tiny.records(tiny.folder_of(cfg), "train")[-1]["step"] == 4


def test_a_learning_rate_of_madness_ends_with_finite_weights(folder):
    cfg = tiny.config(folder, "mad", optim={"lr": 1e15, "warmup_steps": 0, "min_lr": 0.0}, max_skipped=3)
    with pytest.raises(UserError, match="max_skipped"):
        train(cfg)
    weights = load_run(tiny.folder_of(cfg), "best").model.state_dict()
    assert all(t.isfinite().all() for t in weights.values())


# ---- checkpoints that are not what they should be ----------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, folder, name, how, capsys):
    damaged = run.with_name(f"damaged_{how}_{name}")
    shutil.copytree(run, damaged, symlinks=True)
    file = damaged / "checkpoints" / "step-000018" / name
    file.unlink() if how == "gone" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    given = tiny.config(folder, damaged.name, resume=True, max_steps=16)
    with pytest.raises(UserError, match=rf"step-000018 is \w+: {name}.*use another checkpoint") as error:
        train(replace(given, checkpoint="step-18"))
    assert "\n" not in str(error.value)
    assert train(given).step == 16
    said = capsys.readouterr().out
    assert f"WARNING: checkpoint {file.parent} is " in said and "resuming at step 15" in said
    assert (damaged / "checkpoints" / "step-000018.damaged").is_dir()
    assert (damaged / "last").resolve().name == "step-000016"


def test_checkpoints_are_found_by_name(run):
    assert load_run(run).folder.name == "step-000004"
    assert load_run(run, "last").folder.name == "step-000018"
    assert load_run(run, "step-15").folder.name == "step-000015"
    with pytest.raises(
        UserError, match="no checkpoint step-7; it has: step-000004, step-000015, step-000018"
    ):
        load_run(run, "step-7")
    with pytest.raises(UserError, match="newest is not best, last or step-N"):
        load_run(run, "newest")
    with pytest.raises(UserError, match="does not exist"):
        load_run(run.with_name("nowhere"))


def test_a_checkpoint_holds_no_code(run):
    assert checkpoint.load_tensors(run / "last")[0].keys() == {
        name for name in load_run(run).model.state_dict() if name != "lm_head.weight"
    }
    torch.load(run / "last" / "optimizer.pt", weights_only=True)
    assert (
        dataclasses.asdict(TrainState()).keys()
        == json.loads((run / "last" / "state.json").read_text())["train_state"].keys()
    )


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_harms_no_other(folder, monkeypatch):
    write, written = torch.save, []

    def full_disk(content, path):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(content, path)

    monkeypatch.setattr(torch, "save", full_disk)
    cfg = tiny.config(folder, "full-disk")
    with pytest.raises(UserError, match="step-00000[45] cannot be written: .*No space left.*--resume"):
        train(cfg)
    monkeypatch.undo()
    assert train(replace(cfg, resume=True)).step == cfg.max_steps


def test_validation_on_training_data_is_said(folder, capsys):
    train(tiny.config(folder, "overlap", val_data_dir=(str(folder / "train"),), max_steps=1))
    assert "note: 2 of the validation shards are training data, too" in capsys.readouterr().out
