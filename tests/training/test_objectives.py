"""Losses on weights in training, alone and beside TopoLM's. Run: pytest tests/training/test_objectives.py"""

import dataclasses
import itertools

import pytest
import tiny
import torch
from safetensors.torch import load_file

from topogpt.errors import UserError
from topogpt.runs.checkpoint import load_run
from topogpt.settings import GPTConfig, OptimConfig, TopoConfig
from topogpt.sharing.load import initial
from topogpt.spatial.schedule import share_at, weight_at
from topogpt.topo import sheet_names
from topogpt.training import setup
from topogpt.training.objective import Objective
from train import train

SMALL = {"factor_h": 4.0, "factor_w": 4.0}  # the tiny model's sheets of c_fc have 8x8 units
SCHEDULES = {"toponets": "chained", "neighbour": "linear", "wiring": "cosine", "topolm+wiring": "chained"}


@pytest.mark.parametrize("loss", SCHEDULES)
def test_a_loss_is_recorded_and_falls(folder, loss):
    weights = {"tau": 20.0, "neighbour_weight": 20.0, "wiring_weight": 500.0}
    cfg = tiny.config(folder, f"falls {loss}", topo={"loss": loss, **SMALL, **weights})
    train(cfg)
    name = loss.rpartition("+")[2]
    for split in ("train", "val"):
        values = [record[name] for record in tiny.records(tiny.folder_of(cfg), split)]
        assert values[-1] < 0.98 * values[0], (split, values)
    record = tiny.records(tiny.folder_of(cfg), "train")[-1]
    expected = record["cross_entropy"] + weight_at(cfg.topo, 17, 18, name) * record[name]
    if loss.startswith("topolm"):
        expected += cfg.topo.weight * 2 * record["spatial_loss"]
    assert ("spatial_loss" in record) == loss.startswith("topolm")
    assert record["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss, schedule", SCHEDULES.items())
def test_a_resumed_run_is_the_same_bit_for_bit(folder, loss, schedule):
    warmup = {} if schedule == "cosine" else {"weight_warmup_steps": 8}
    topo = {"loss": loss, "weight_schedule": schedule, **SMALL, **warmup}
    whole = tiny.config(folder, f"whole {loss}", topo=topo)
    train(whole)
    cut = tiny.config(folder, f"cut {loss}", topo=topo)
    stop = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topogpt.training.interrupt.StopSignals.__enter__", lambda self: self)
        patch.setattr("topogpt.training.interrupt.StopSignals.__exit__", lambda self, *error: None)
        received = property(lambda self: next(stop) >= 7)
        patch.setattr("topogpt.training.interrupt.StopSignals.received", received, raising=False)
        assert 0 < train(cut).step < cut.max_steps
    train(tiny.config(folder, f"cut {loss}", topo=topo, resume=True))
    runs = [tiny.folder_of(cfg) for cfg in (whole, cut)]
    assert tiny.records(runs[0]) == tiny.records(runs[1])
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout, loss", [("c_fc", "toponets"), ("c_fc", "topolm"), ("one_sheet", "topolm")])
def test_other_sheets_are_trained_and_a_resumed_run_is_the_same(folder, layout, loss):
    topo = {"layout": layout, "loss": loss, "positions": "identity", "radius": 2, "tau": 20.0, **SMALL}
    whole = tiny.config(folder, f"whole {layout} {loss}", topo=topo)
    train(whole)
    cut = dataclasses.replace(whole, run_name=f"cut {layout} {loss}")
    train(dataclasses.replace(cut, max_steps=9))
    train(dataclasses.replace(cut, resume=True))
    runs = [tiny.folder_of(cfg) for cfg in (whole, cut)]
    (first, *_, last) = (r for r in tiny.records(runs[0], "val"))
    name = "toponets" if loss == "toponets" else "spatial_loss"
    assert last[name] < first[name] and last["moran"] > first["moran"]
    assert list(last["moran_by_sheet"]) == sheet_names(1, layout)
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in runs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("loss", ["topolm", "toponets"])
def test_the_connectome_s_architecture_is_trained_and_resumed_bit_for_bit(folder, loss):
    switches = {"norm": "rmsnorm", "position": "rope", "tied": False, "scale_attention": True}
    whole = tiny.config(folder, f"whole rope {loss}", topo={"loss": loss, **SMALL}, model=switches)
    train(whole)
    cut = dataclasses.replace(whole, run_name=f"cut rope {loss}")
    train(dataclasses.replace(cut, max_steps=9))
    train(dataclasses.replace(cut, resume=True))
    ours, theirs = (load_file(tiny.folder_of(cfg) / "last" / "model.safetensors") for cfg in (whole, cut))
    assert {"lm_head.weight", "transformer.wte.weight"} <= ours.keys()
    assert not any("wpe" in name or "ln_" in name for name in ours)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run = load_run(tiny.folder_of(whole), "last")
    assert torch.equal(run.model.lm_head.weight, ours["lm_head.weight"])
    # and a run of that shape starts from it; one of another does not
    assert initial(run.model.cfg, tiny.folder_of(whole)).cfg == run.model.cfg
    for key, flag in (("tied", "no_tied"), ("norm", "norm rmsnorm"), ("position", "position rope")):
        other = dataclasses.replace(run.model.cfg, **{key: getattr(GPTConfig(), key)})
        with pytest.raises(UserError, match=f"give --model.{flag}"):
            initial(other, tiny.folder_of(whole))


def test_muon_is_resumed_bit_for_bit_and_not_exchanged(folder):
    optim = {"name": "muon", "schedule": "trapezoid", "warmdown_steps": 8, "muon_lr": 0.004}
    whole = tiny.config(folder, "whole muon", topo={"loss": "topolm+wiring"}, optim=optim)
    train(whole)
    cut = dataclasses.replace(whole, run_name="cut muon")
    train(dataclasses.replace(cut, max_steps=9))
    adamw = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=4, decay_steps=18)
    with pytest.raises(UserError, match="resume: optim.name = adamw, but the run was started with muon"):
        train(dataclasses.replace(cut, resume=True, optim=adamw))
    train(dataclasses.replace(cut, resume=True))
    ours, theirs = (load_file(tiny.folder_of(cfg) / "last" / "model.safetensors") for cfg in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [
        torch.load(tiny.folder_of(cfg) / "last" / "optimizer.pt", weights_only=True)["state"]
        for cfg in (whole, cut)
    ]
    ours, theirs = (state[0][0]["momentum_buffer"] for state in states)
    assert torch.equal(ours, theirs) and ours.any()


def test_a_loss_on_weights_is_taken_once_a_step_and_an_evaluation(folder, monkeypatch):
    calls, taken = [], Objective.loss_of_weights

    def counted(self, name):
        calls.append(name)
        return taken(self, name)

    monkeypatch.setattr(Objective, "loss_of_weights", counted)
    cfg = tiny.config(folder, "once", topo={"loss": "toponets", **SMALL}, max_steps=8)
    assert cfg.batch_size // cfg.per_device_batch_size == 4  # micro-batches of a step
    train(cfg)
    assert len(calls) == 8 + 3  # steps, and evaluations at 0, 4 and 8


def test_its_gradient_is_that_of_one_sum(folder):
    """The step adds the gradients of weight * loss to those of the cross-entropy, before clipping."""
    from topogpt.distributed import Ranks
    from topogpt.training.step import add_losses_of_weights

    cfg = tiny.config(
        folder, "sum", topo={"loss": "toponets+wiring", "tau": 3.0, "wiring_weight": 7.0, **SMALL}
    )
    t = setup.build(cfg, Ranks(0, 1, torch.device("cpu")))
    parameters = list(t.model.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    values = add_losses_of_weights(t, 0)
    toponets, wiring = (t.objective.loss_of_weights(name) for name in ("toponets", "wiring"))
    assert [v.item() for v in values] == [toponets.item(), wiring.item()]
    expected = torch.autograd.grad(3 * toponets + 7 * wiring, parameters, allow_unused=True)
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + (0 if grad is None else grad) + torch.zeros_like(p))


def test_schedules_are_pure_functions_of_the_step():
    chained = TopoConfig(weight_schedule="chained", weight_warmup_steps=10)
    assert [share_at(chained, s, 110) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert share_at(chained, 60, 110) == pytest.approx(0.5)
    assert share_at(chained, 110, 110) == share_at(chained, 500, 110) == pytest.approx(0)
    assert weight_at(TopoConfig(tau=50.0), 3, 10, "toponets") == 50.0


@pytest.mark.parametrize(
    "topo, said",
    [
        ({"loss": "toponets+toponets"}, "each once"),
        ({"loss": "toponets+nothing"}, "no spatial loss of ours"),
        ({"loss": "toponets", "tau": -1.0}, r"topo\.tau = -1\.0"),
        ({"loss": "toponets", "factor_h": 0.5}, r"topo\.factor_h = 0\.5"),
        ({"loss": "toponets", "modules": ("*.nothing",)}, "nothing"),
        ({"loss": "toponets", "modules": ("*.ln_1",)}, "ln_1"),
        ({"loss": "toponets", "factor_h": 50.0}, "50"),
    ],
)
def test_bad_input_is_one_line(folder, topo, said):
    with pytest.raises(UserError, match=said) as error:
        train(tiny.config(folder, "bad", topo=topo))
    assert "\n" not in str(error.value)
