"""How a run starts from other weights, and how it is published when it ends.

pytest tests/sharing/test_start_and_publish.py
"""

import datetime
import json
import threading
import time

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import train as train_module
from topogpt import topo
from topogpt.errors import UserError
from topogpt.runs import checkpoint
from topogpt.sharing import export
from topogpt.sharing import push as hub
from topogpt.training import preflight
from train import train

FULL = {"model": {"vocab_size": 50304}, "max_steps": 2, "eval_every": 2, "val_tokens": 64}


@pytest.fixture(scope="module")
def source(folder):
    """A short run with GPT-2's vocabulary, and its export."""
    cfg = tiny.config(folder, "source", **FULL, topo={"seed": 7})
    train(cfg)
    run = tiny.folder_of(cfg)
    return run, export.export(run, say=lambda line: None)


def first_validation(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("which", [0, 1], ids=["run", "exported folder"])
def test_a_run_starts_from_the_weights_and_positions_of_another(folder, source, which):
    cfg = tiny.config(folder, f"from-{which}", **FULL, init_from=str(source[which]))
    train(cfg)
    run = tiny.folder_of(cfg)
    best = checkpoint.load_run(source[0])
    started = json.loads((source[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert first_validation(run)["cross_entropy"] == pytest.approx(started["cross_entropy"], rel=1e-6)
    positions = checkpoint.load_run(run).positions
    assert all(np.array_equal(positions[sheet], best.positions[sheet]) for sheet in best.positions)
    assert not np.array_equal(positions["layer.0.attn"], topo.positions("permuted", 16, 0, "layer.0.attn"))


def test_a_model_of_another_shape_cannot_be_started_from(folder, source):
    cfg = tiny.config(folder, "other-shape", **{**FULL, "model": {"vocab_size": 50304, "n_layer": 2}})
    cfg = tiny.replace(cfg, init_from=str(source[0]))
    with pytest.raises(UserError, match="init_from = .* has n_layer 1, but model.n_layer = 2"):
        train(cfg)
    assert not tiny.folder_of(cfg).exists()


def test_what_a_run_is_copied_to_is_checked_before_it_starts(folder, monkeypatch):
    real = hub.has_token
    monkeypatch.setattr(hub, "has_token", lambda: False)
    cfg = tiny.config(folder, "unchecked", push_to_hf=True)
    with pytest.raises(UserError, match="push_to_hf = True, but no token of the Hub is here; log in with"):
        preflight.check(cfg)
    monkeypatch.setattr(hub, "has_token", lambda: True)
    preflight.check(cfg)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub is switched off here"):
        preflight.check(cfg)
    monkeypatch.setattr(hub, "has_token", real)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb = True, but wandb is not installed; pip install wandb"):
        preflight.check(tiny.config(folder, "unchecked", wandb=True))
    assert not tiny.folder_of(cfg).exists()


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setattr(hub, "check_login", lambda name: None)
    monkeypatch.setattr(hub, "full_name", lambda name, say: f"me/{name}")


def fail(*args, **kwargs):
    raise RuntimeError("a bug,\nin two lines")


@pytest.mark.parametrize("broken", ["topogpt.training.publish.export", "topogpt.sharing.push.push"])
def test_whatever_fails_in_a_push_is_one_line_and_training_goes_on(
    folder, logged_in, monkeypatch, capsys, broken
):
    monkeypatch.setattr("topogpt.training.publish.export", lambda run, *args, say: run)
    monkeypatch.setattr(broken, fail)
    cfg = tiny.config(folder, f"broken-{broken[-6:]}", max_steps=8, push_to_hf=True, push_every=1)
    assert train(cfg).step == 8
    run = tiny.folder_of(cfg)
    line = f"not pushed: RuntimeError: a bug, in two lines; later: python export.py {run} --push_to_hf"
    assert capsys.readouterr().out.count(line) == 2  # after steps 4 and 8


def test_a_push_goes_on_beside_the_steps_and_no_other_is_started_meanwhile(
    folder, logged_in, monkeypatch, capsys
):
    last, pushes = threading.Event(), []

    def push(exported, repo_id, say):
        pushes.append(exported)
        say("push: try 2 of 4")
        assert last.wait(60)
        return "address"

    def evaluated(t, *args):
        if t.state.step == 12:
            last.set()

    monkeypatch.setattr("topogpt.training.publish.export", lambda run, *args, say: run)
    monkeypatch.setattr(hub, "push", push)
    monkeypatch.setattr(train_module, "report", evaluated)
    assert train(tiny.config(folder, "beside", max_steps=12, push_to_hf=True, push_every=1)).step == 12
    said = capsys.readouterr().out
    assert len(pushes) == said.count("pushed: address") == said.count("try 2 of 4") == 2  # of steps 4 and 12
    assert said.count("not pushed: the push before is still under way") == 1  # of step 8


def slow_push_and_little_patience() -> None:
    """A push that takes longer than the ranks wait for each other."""
    from topogpt import distributed
    from topogpt.training import publish

    distributed.timedelta = lambda minutes: datetime.timedelta(seconds=3)
    hub.check_login = lambda name: None
    hub.full_name = lambda name, say: name
    hub.push = lambda *args, say: time.sleep(5) or "address"
    publish.export = lambda run, *args, say: run


def test_a_push_that_takes_longer_than_ranks_wait_ends_none_of_them(folder, tmp_path):
    cfg = tiny.config(folder, "patient", max_steps=2, push_to_hf=True)
    codes = tiny.run_in_child(
        tiny.train_after, slow_push_and_little_patience, cfg, world=2, output=tmp_path / "output"
    )
    assert codes == [0, 0], (tmp_path / "output").read_text()
    assert "pushed: address" in (tmp_path / "output").read_text()


def test_the_best_checkpoint_is_pushed_at_the_end_and_every_so_many_evaluations(
    folder, logged_in, monkeypatch
):
    pushed = []

    def push(exported, repo_id, say):
        weights = load_file(exported / "model.safetensors")
        step = json.loads((exported / "config.json").read_text())["topography"]["step"]
        pushed.append((repo_id, step, weights["transformer.wte.weight"]))
        return "address"

    monkeypatch.setattr(hub, "push", push)
    settings = {**FULL, "max_steps": 8, "push_to_hf": True, "push_every": 2}
    cfg = tiny.config(folder, "pushed", **settings)
    state = train(cfg)
    best = checkpoint.load_run(tiny.folder_of(cfg))
    assert [name for name, *_ in pushed] == ["me/pushed"] * 2  # after steps 4 and 8
    assert pushed[1][1] == state.best_step
    assert torch.equal(pushed[1][2], best.model.transformer.wte.weight[:50257])


def test_a_run_stopped_by_a_signal_is_not_published(folder, logged_in, monkeypatch):
    monkeypatch.setattr("topogpt.training.publish.export", lambda *args: pytest.fail("published"))
    monkeypatch.setattr(train_module.StopSignals, "__enter__", lambda self: self)
    monkeypatch.setattr(train_module.StopSignals, "__exit__", lambda self, *error: None)
    monkeypatch.setattr(train_module.StopSignals, "received", True, raising=False)
    assert train(tiny.config(folder, "stopped", push_to_hf=True)).step == 0
