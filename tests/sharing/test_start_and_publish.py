"""How a run starts from other weights, and how it is published when it ends.

pytest tests/sharing/test_start_and_publish.py
"""

import json

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


def test_a_run_without_a_token_ends_well_and_says_how_to_push_later(folder, monkeypatch, capsys):
    monkeypatch.setattr(hub, "has_token", lambda: False)
    cfg = tiny.config(folder, "no-token", **FULL, push_to_hf=True)
    assert train(cfg).step == 2
    said = capsys.readouterr().out
    assert "not pushed: push_to_hf = no-token has no user" in said
    assert f"later: python export.py {tiny.folder_of(cfg)} --push_to_hf" in said
    assert (tiny.folder_of(cfg) / "hf" / "config.json").is_file()


def test_the_best_checkpoint_is_pushed_at_the_end_and_every_so_many_evaluations(folder, monkeypatch):
    pushed = []

    def push(exported, repo_id, say):
        weights = load_file(exported / "model.safetensors")
        step = json.loads((exported / "config.json").read_text())["topography"]["step"]
        pushed.append((repo_id, step, weights["transformer.wte.weight"]))
        return "address"

    monkeypatch.setattr(hub, "full_name", lambda name, say: f"me/{name}")
    monkeypatch.setattr(hub, "push", push)
    settings = {**FULL, "max_steps": 8, "push_to_hf": True, "push_every": 2}
    cfg = tiny.config(folder, "pushed", **settings)
    state = train(cfg)
    best = checkpoint.load_run(tiny.folder_of(cfg))
    assert [name for name, *_ in pushed] == ["me/pushed"] * 2  # after steps 4 and 8
    assert pushed[1][1] == state.best_step
    assert torch.equal(pushed[1][2], best.model.transformer.wte.weight[:50257])


def test_a_run_stopped_by_a_signal_is_not_published(folder, monkeypatch):
    monkeypatch.setattr(train_module, "publish", lambda *_: pytest.fail("published"))
    monkeypatch.setattr(train_module.StopSignals, "__enter__", lambda self: self)
    monkeypatch.setattr(train_module.StopSignals, "__exit__", lambda self, *error: None)
    monkeypatch.setattr(train_module.StopSignals, "received", True, raising=False)
    assert train(tiny.config(folder, "stopped", push_to_hf=True)).step == 0
