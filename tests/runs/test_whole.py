"""Damaged and copied runs: nothing damaged is trained on, nothing is lost. pytest tests/runs/test_whole.py"""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from topogpt.errors import UserError
from topogpt.runs import checkpoint, seal
from topogpt.runs import folder as runfolder
from topogpt.training import preflight
from topogpt.training.log import RunLog
from train import train

N = 12  # steps; checkpoints at 0, 5, 10, 12 and after every best evaluation (each 4 steps)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    cfg = tiny.config(folder, "whole", max_steps=N)
    train(cfg)
    return tiny.folder_of(cfg)


@pytest.fixture
def run(whole, request) -> Path:
    """A copy of it, of the test's own."""
    copy = whole.with_name(f"copy_{abs(hash(request.node.name))}")
    shutil.copytree(whole, copy, symlinks=True)
    yield copy
    shutil.rmtree(copy)


def resumed(run: Path, **settings):
    return tiny.config(run.parents[1], run.name, resume=True, **{"max_steps": N} | settings)


def flip(path: Path, at: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(x / "last" / "model.safetensors") for x in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def without_hashes(folder: Path) -> None:
    """As an older version wrote it."""
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state, indent=1))


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", seal.FILES)
def test_a_flipped_bit_is_found_wherever_it_is(run, name):
    path, draw = run / "last" / name, random.Random(0)
    seal.check(run / "last")
    for _ in range(20):
        at, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, at, bit)
        with pytest.raises(UserError, match=f"is damaged: {name}") as error:
            seal.check(run / "last")
        assert "\n" not in str(error.value)
        flip(path, at, bit)
    seal.check(run / "last")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_not_trained_on(run, whole, name, capsys):
    flip((run / "last").resolve() / name, 1500)
    train(resumed(run))
    said = capsys.readouterr().out
    assert said.startswith(f"WARNING: checkpoint {run}/checkpoints/step-000012 is damaged: {name}")
    assert "going on from step-000010 (kept as step-000012.damaged)" in said
    assert same_weights(run, whole) and tiny.records(run) == tiny.records(whole)
    assert (run / "last").resolve().name == "step-000012"
    seal.check(run / "last")


def test_where_no_checkpoint_is_whole_none_is_renamed_and_nothing_begun(run):
    for folder in runfolder.complete(run):
        flip(folder / "optimizer.pt", 1500)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    with pytest.raises(UserError, match="no checkpoint of .* is whole: .*step-000012"):
        train(resumed(run))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before
    assert tiny.records(run)[-1]["step"] == N


def test_a_checkpoint_is_chosen_by_hand_and_later_ones_are_kept(run, whole, capsys):
    state = train(resumed(run, checkpoint="step-10", max_steps=11))
    assert state.step == 11 and "resuming at step 10" in capsys.readouterr().out
    later = run / "checkpoints" / "step-000012.later"
    assert (later / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [r["step"] for r in tiny.records(run, "train")] == list(range(1, 12))
    assert runfolder.newest(run).name == "step-000011"


def test_a_checkpoint_chosen_by_hand_must_be_whole_and_there(run):
    flip(run / "checkpoints" / "step-000010" / "model.safetensors", 1500)
    for which, words in (("step-10", "step-000010 is damaged"), ("step-7", "no checkpoint step-7; it has: ")):
        with pytest.raises(UserError, match=words):
            train(resumed(run, checkpoint=which))
    with pytest.raises(UserError, match="checkpoint = last has no effect without --resume"):
        preflight.check(tiny.config(run.parents[1], "new", checkpoint="last"))
    assert not list((run / "checkpoints").glob("*.later"))


def test_the_best_one_is_among_those_that_are_left(run):
    """Its checkpoint gave way to a later best one, which is damaged."""
    best = runfolder.find_checkpoint(run).resolve()
    for folder in runfolder.complete(run):
        if folder.name not in (best.name, "step-000010"):
            shutil.rmtree(folder)
    best.rename(run / "checkpoints" / "step-000099")
    flip(run / "checkpoints" / "step-000099" / "model.safetensors", 1500)
    state = train(resumed(run))
    assert state.best_step in (10, N)
    assert checkpoint.load_run(run).folder.name == f"step-{state.best_step:06d}"


def test_evaluations_compare_the_weights_and_no_more(run):
    last = (run / "last").resolve()
    flip(last / "optimizer.pt", 1500)
    checkpoint.load_run(run, "last")
    flip(last / "model.safetensors", last.joinpath("model.safetensors").stat().st_size - 1)
    with pytest.raises(UserError, match=r"model.safetensors is not what was written .*--checkpoint"):
        checkpoint.load_run(run, "last")


def test_a_checkpoint_of_an_older_version_loads_without_a_word(run, whole, capsys):
    for folder in runfolder.complete(run):
        without_hashes(folder)
    checkpoint.load_run(run)
    train(resumed(run, checkpoint="step-10"))
    said = capsys.readouterr().out
    assert same_weights(run, whole) and "WARNING" not in said and "hash" not in said


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_moments(folder: Path, change) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    change(saved["state"])
    torch.save(saved, folder / "optimizer.pt")


SHEET, WEIGHT = "positions.layer.0.mlp", "transformer.h.0.mlp.c_fc.weight"
WRONG = {
    "no sheet": (edit_weights, lambda t: t.pop(SHEET), SHEET),
    "no weight": (edit_weights, lambda t: t.pop(WEIGHT), WEIGHT),
    "another weight": (edit_weights, lambda t: t.update(more=t[WEIGHT].clone()), "more"),
    "a shape": (edit_weights, lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}), WEIGHT),
    "a type": (edit_weights, lambda t: t.update({WEIGHT: t[WEIGHT].half()}), WEIGHT),
    "a moment's shape": (edit_moments, lambda s: s[0].update(exp_avg=torch.zeros(3)), "exp_avg of weight 0"),
    "a moment's type": (edit_moments, lambda s: s[1].update(exp_avg=s[1]["exp_avg"].half()), "float16"),
    "no moments": (edit_moments, lambda s: s.pop(1), "moments of"),
    "no state": (edit_moments, lambda s: s.update({0: None}), "optimizer.pt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_shapes_and_types_are_compared_where_there_are_no_hashes(run, name):
    edit, change, said = WRONG[name]
    last = (run / "last").resolve()
    without_hashes(last)
    edit(last, change)
    with pytest.raises(UserError, match=f"step-000012 is damaged: .*{said}") as error:
        train(resumed(run, checkpoint="last", max_steps=N + 2))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---- other files -------------------------------------------------------------------------------------------


def test_damaged_lines_of_the_record_are_counted_and_kept(run, whole, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True)
    broken = [lines[3][:20] + b"\n", b"\xff\xfe\n", b"null\n", b'{"step": "x"}\n']
    path.write_bytes(b"".join([*lines[:3], *broken, *lines[4:], lines[5][:9]]))
    assert len(runfolder.read_metrics(run)) == len(lines) - 1
    assert "4 of " in (said := capsys.readouterr().err) and said.count("\n") == 1
    train(resumed(run))
    assert "5 damaged lines of metrics.jsonl are now in metrics.damaged.txt" in capsys.readouterr().out
    assert path.read_bytes() == b"".join([*lines[:3], *lines[4:]])
    assert (run / "metrics.damaged.txt").read_bytes() == b"".join([*broken, lines[5][:9] + b"\n"])


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[1]", b"\xff"], ids=str)
def test_a_damaged_provenance_is_said_and_kept(run, content, capsys):
    (run / "provenance.json").write_bytes(content)
    train(resumed(run))
    assert "provenance.json is damaged" in capsys.readouterr().out
    assert len(json.loads((run / "provenance.json").read_text())) == 1
    assert [p.read_bytes() for p in run.glob("provenance.damaged-*.json")] == [content]


def test_maps_that_are_damaged_anywhere_are_said_in_one_line(run):
    path, draw = next((run / "maps").glob("*.npz")), random.Random(1)
    good, step = path.read_bytes(), int(path.stem[5:])
    for _ in range(40):
        at = draw.randrange(len(good))
        path.write_bytes(
            draw.choice([good[:at], good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :]])
        )
        try:
            runfolder.read_maps(run, step)
        except UserError as error:
            assert "are damaged" in str(error) and "\n" not in str(error)


def test_the_record_is_json_always_and_null_reads_as_nan(tmp_path):
    with RunLog(tmp_path, True, -1, 3) as log:
        values = {"step": 1, "split": "val", "loss": float("nan"), "by_sheet": {"a": float("inf"), "b": 0.5}}
        log.record(values)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["by_sheet"] == {"a": None, "b": 0.5}
    (record,) = runfolder.read_metrics(tmp_path)
    assert np.isnan([record["loss"], record["by_sheet"]["a"]]).all() and record["by_sheet"]["b"] == 0.5


def test_records_reach_the_disk_before_the_checkpoint_that_counts_on_them(folder, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename

    def synced(handle) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(Path(to).name), rename(self, to))[1])
    train(tiny.config(folder, "synced", max_steps=5))
    for name in ("step-000000", "step-000005"):
        before = done[: done.index(name)]
        files = [len(before) - 1 - before[::-1].index(f) for f in ("metrics.jsonl", *seal.FILES)]
        assert files[0] < min(files[1:]) and files[3] == max(files)
        done = done[done.index(name) :]


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "maps"])
def test_a_full_disk_stops_a_run_once_it_is_saved(folder, monkeypatch, name):
    def fill(self, *args) -> None:
        usual(self, *args)
        for part, of in (("metrics", "metrics.jsonl"), ("text", "log.txt")):
            if name == of:  # a device whose disk is full
                getattr(self, part).close()
                setattr(self, part, open("/dev/full", "a"))

    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    usual = RunLog.__init__
    monkeypatch.setattr(RunLog, "__init__", fill)
    if name == "maps":
        monkeypatch.setattr(np, "savez_compressed", full)
    cfg = tiny.config(folder, f"full_{name.split('.')[0]}", eval_every=100)
    with pytest.raises(UserError, match=rf"{name} cannot be written: No space left.*--resume") as error:
        train(cfg)
    assert "\n" not in str(error.value)
    run = tiny.folder_of(cfg)
    step = seal.check(run / "last")["train_state"]["step"]
    assert f"the checkpoint of step {step} is saved" in str(error.value) and step <= 1
    monkeypatch.undo()
    monkeypatch.setattr("topogpt.training.maps.draw", lambda *args, **kwargs: None)
    assert train(replace(cfg, resume=True, max_steps=3)).step == 3


def test_a_checkpoint_that_finds_no_room_leaves_nothing_half_written(folder, monkeypatch):
    save = torch.save

    def full(content, file) -> None:
        save(content, file)
        if "step-000005" in str(file.name):
            error = RuntimeError("unexpected pos 64 vs 0")  # as torch says it
            error.__context__ = OSError(errno.ENOSPC, "No space left on device")
            raise error

    monkeypatch.setattr(torch, "save", full)
    cfg = tiny.config(folder, "no_room")
    with pytest.raises(UserError, match="step-000005 cannot be written: .*No space left"):
        train(cfg)
    assert not list((tiny.folder_of(cfg) / "checkpoints").glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr("topogpt.training.maps.draw", lambda *args, **kwargs: None)
    assert train(replace(cfg, resume=True, max_steps=6)).step == 6


# ---- copies ------------------------------------------------------------------------------------------------


def test_a_copy_without_links_goes_on(run, whole):
    copy = run.with_name(run.name + "L")
    shutil.copytree(run, copy)  # as cp -rL does: best and last are folders
    assert not (copy / "best").is_symlink()
    assert checkpoint.load_run(copy).state == checkpoint.load_run(whole).state
    train(resumed(copy, checkpoint="step-10"))
    assert same_weights(copy, whole)
    for name in ("best", "last"):
        assert (copy / name).is_symlink()
        assert (copy / name).resolve().name == (whole / name).resolve().name


def test_what_lies_beside_the_checkpoints_is_none(run, whole):
    shutil.copytree(run / "last", run / "checkpoints" / "step-000012.bak")
    (run / "checkpoints" / "step-x").mkdir()
    (run / "checkpoints" / "step-000900").touch()
    assert [p.name for p in runfolder.complete(run)] == [p.name for p in runfolder.complete(whole)]
    train(resumed(run, max_steps=N + 1))
    assert (run / "checkpoints" / "step-000012.bak" / "optimizer.pt").is_file()


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_linked_folder_goes_on_and_is_overwritten_in_its_place(run, whole, tmp_path, part):
    link = (run / part).absolute() if part != "." else run
    shutil.move(link, tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    train(resumed(run, checkpoint="step-10"))
    assert same_weights(run, whole) and (run / "best").resolve().is_dir()
    train(replace(resumed(run), resume=False, overwrite=True, max_steps=1))
    assert run.is_symlink() == (part == ".")
    assert [p.name for p in runfolder.complete(run)] == ["step-000000", "step-000001"]
    if part == ".":
        link.unlink()
        (tmp_path / "elsewhere").rename(link)  # for the fixture to delete


# ---- what --resume says ------------------------------------------------------------------------------------


def test_resuming_says_which_settings_changed(run, capsys):
    train(resumed(run, per_device_batch_size=4, optim={"lr": 5e-3}, val_tokens=300, max_steps=N + 1))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert said == [
        "resume: per_device_batch_size = 4 (until now 2)",
        "resume: max_steps = 13 (until now 12)",
        "resume: val_tokens = 300 (until now 592)",
        "resume: optim.lr = 0.005 (until now 0.01)",
    ]
    assert "resume: val_tokens = 300" in (run / "log.txt").read_text()


def test_resuming_as_before_says_nothing_of_settings_and_sweeps_up(run, capsys):
    for left in (run / ".config.yaml.host-1.tmp", run / "maps" / ".step-000004.npz.host-1.tmp"):
        left.touch()
    train(resumed(run))
    assert not list(run.glob("**/.*.tmp"))
    assert "resume:" not in capsys.readouterr().out
