"""A person's first hour: data found, names mistyped, full disks. pytest tests/test_first_hour.py"""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tiny
from safetensors import SafetensorError

import export as export_script
import sample
from topogpt.analysis import stimuli
from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.runs.checkpoint import load_run
from topogpt.settings import TrainConfig
from topogpt.sharing.export import export
from topogpt.sharing.load import load_model
from topogpt.training import log, preflight, progress


@pytest.fixture
def run(tmp_path):
    tiny.write_shards(tmp_path)
    return tiny.random_run(tmp_path, vocab_size=tiny.VOCAB)


def test_debug_finds_the_documentation_inside_python(tmp_path, monkeypatch, capsys):
    debug = parse(TrainConfig, [str(tiny.ROOT / "configs/debug.yaml"), "--run_name", "a"])
    monkeypatch.chdir(tmp_path)
    assert preflight.find_data(debug) == debug  # none there: refused later, as ever
    tiny.write_shard(tmp_path / "data/pydoc/train/a.bin", np.zeros(200_000, int))
    found = preflight.find_data(debug)
    assert (found.train_data_dir, found.val_data_dir) == (("data/pydoc/train",), ("data/pydoc/val",))
    assert capsys.readouterr().out.count("data/pydoc") == 1
    large = dataclasses.replace(debug, max_steps=100_000)
    assert preflight.find_data(large) == large  # more than a hundred epochs of it
    asked = dataclasses.replace(debug, train_data_dir=("elsewhere",))
    assert preflight.find_data(asked) == asked
    (tmp_path / "data/fineweb-edu-10B/train").mkdir(parents=True)
    assert preflight.find_data(debug) == debug


def test_many_epochs_are_warned_of(tmp_path, capsys):
    from train import train

    tiny.write_shards(tmp_path)
    cfg = tiny.config(tmp_path, max_steps=2)
    said: list[str] = []
    fake = SimpleNamespace(say=said.append)
    train(cfg)
    assert "warning" not in capsys.readouterr().out
    corpora = preflight.check(dataclasses.replace(cfg, overwrite=True))
    t = SimpleNamespace(
        cfg=dataclasses.replace(cfg, max_steps=10**6), state=SimpleNamespace(step=0), compiled=None,
        model=SimpleNamespace(n_parameters=lambda: 1), connectome=None,
        ranks=SimpleNamespace(world=1, device_name="cpu"),
        objective=SimpleNamespace(
            positions={}, of_weights=[], with_spatial=True, describe=lambda compiled: ""
        ),
    )  # fmt: skip
    progress.introduce(t, corpora, tmp_path, fake)
    assert any(line.startswith("warning: ") and "epochs of the same text" in line for line in said)


def test_the_bar_fits_80_columns_and_has_one_eta():
    line = (
        "step 1,200/40,000  cross-entropy 6.1234  spatial 0.4321  toponets 0.1234  lr 1.0e-03  grad norm 1.23"
    )
    line += "  1,234,567 tokens/s  MFU 41%  12.3 GB  ETA 12h05m"
    short = log.short(line)
    assert short.startswith("ETA 12h05m  cross-entropy 6.1234  spatial 0.4321")
    assert short.count("ETA") == 1 and len("step 1200000/1200000, ") + len(short) <= 80


def test_the_nearest_run_is_named_at_once(run, tmp_path, monkeypatch):
    def network(*args: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", network)
    monkeypatch.chdir(run.parent)
    typo = f"{run.name}n"
    for name in (f"./{typo}", str(run.parent / typo)):
        with pytest.raises(UserError, match=f"did you mean .*{run.name}\\?"):
            load_model(name)
    os.renames(run, tmp_path / "out" / "demo")
    monkeypatch.chdir(tmp_path)
    for name in ("out/demmo", "demmo"):
        with pytest.raises(UserError, match="did you mean out/demo\\?"):
            load_model(name)
    with pytest.raises(UserError, match="did you mean out/demo\\?"):
        export_script.main(["out/demmo"])
    assert load_run("out/demo").model is not None  # a str is as good as a Path


def test_a_full_disk_while_exporting_is_one_line(run, monkeypatch):
    def full(*args: object, **more: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left on device .*; nothing was exported"):
        export(run)
    assert not (run / "hf").exists() and not list(run.glob(".hf*"))


def test_a_prompt_of_words_needs_their_vocabulary(run):
    with pytest.raises(UserError, match=f"knows {tiny.VOCAB} tokens, fewer than GPT-2's 50257"):
        sample.main([str(run), "--prompt", "The", "--device", "cpu"])


def test_a_missing_file_of_ones_own_is_not_fetched(tmp_path):
    with pytest.raises(UserError, match="mine.csv does not exist; give a CSV file"):
        stimuli.read(tmp_path / "mine.csv")
    (tmp_path / "mime.csv").touch()
    with pytest.raises(UserError, match="did you mean .*mime.csv"):
        stimuli.read(tmp_path / "mine.csv")
    with pytest.raises(UserError, match="evals.fetch"):
        stimuli.moseley(tmp_path / "moseley2014.csv")


def test_an_analysis_is_a_script_too_and_its_own_flags_come_first():
    command = [sys.executable, "evals/localize.py", "--help"]
    env = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    order = [done.stdout.index(f"--{name} ") for name in ("localizer", "smallest_cluster", "alpha", "device")]
    assert order == sorted(order) and "a run (out/NAME), an exported folder" in done.stdout


def test_the_demo_keeps_what_was_analysed(tmp_path):
    def lines(*more: str) -> str:
        command = ["make", "-n", "-f", str(tiny.ROOT / "Makefile"), "demo", f"PYTHON={sys.executable}", *more]
        made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
        script = next(line for line in made.splitlines() if "train.py configs/demo.yaml" in line)
        assert ("mv out/demo" in made) == ("FRESH=1" in more) and "200,000 tokens" in made
        echoed = subprocess.run(f"echo {script}", shell=True, capture_output=True, text=True, cwd=tmp_path)
        return echoed.stdout.strip()

    (tmp_path / "setup.py").touch()
    (tmp_path / "constraints.txt").touch()
    assert lines().endswith("--run_name demo")
    (tmp_path / "out/demo").mkdir(parents=True)
    assert lines("FRESH=1").endswith("--overwrite")  # of a run without a checkpoint
    (tmp_path / "out/demo/checkpoints/step-000200").mkdir(parents=True)
    assert lines().endswith("--resume")
