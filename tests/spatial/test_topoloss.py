"""TopoLoss in the released package's lines, against its values. Run: pytest tests/spatial/test_topoloss.py"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import make_topoloss
from torch import nn

import topogpt
from topogpt.spatial import topoloss

STORED = json.loads((Path(__file__).parent / "parity" / "topoloss.json").read_text())["values"]
CASES = make_topoloss.cases()


class Net(nn.Module):
    """A convolution and a linear layer, as anybody has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 64, 5), nn.Linear(64, 48)


def losses(model: nn.Module, scale: float | None = 1.0) -> list[topogpt.LaplacianPyramid]:
    make = topogpt.LaplacianPyramid.from_layer
    return [make(model, layer, 4.0, 3.0, scale=scale) for layer in (model.conv, model.fc)]


def test_the_stored_values_are_of_these_cases():
    assert STORED.keys() == CASES.keys() and len(STORED) > 60


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_package(name):
    kind, layer, (factor_h, factor_w), interpolation = CASES[name]
    model, stored = nn.ModuleDict({"layer": layer}), STORED[name]
    loss = getattr(topogpt, kind).from_layer(
        model=model, layer=layer, factor_h=factor_h, factor_w=factor_w, interpolation=interpolation
    )
    model.zero_grad()
    value = topogpt.TopoLoss(losses=[loss]).compute(model=model)
    assert abs(value.item() - stored["loss"]) < 1e-6
    value.backward()
    parameter = layer.bias if kind == make_topoloss.BIAS else layer.weight
    grad = parameter.grad.flatten()
    torch.testing.assert_close(
        grad[:: max(1, len(grad) // 5)], torch.tensor(stored["grad"]), atol=1e-6, rtol=1e-4
    )


def test_the_lines_of_its_readme():
    model = Net()
    topo_loss = topogpt.TopoLoss(
        losses=[
            topogpt.LaplacianPyramid.from_layer(
                model=model, layer=model.fc, factor_h=3.0, factor_w=8.0, scale=2.0
            )
        ]
    )
    loss = topo_loss.compute(model=model)
    loss.backward()
    assert loss.dim() == 0 and model.fc.weight.grad.abs().sum() > 0
    loss_dict = topo_loss.compute(model=model, reduce_mean=False)
    assert list(loss_dict) == ["fc"] and torch.equal(loss_dict["fc"], loss)
    raw = topo_loss.compute(model=model, reduce_mean=False, do_scaling=False)["fc"]
    assert torch.equal(2 * raw, loss)


def test_the_mean_is_over_layers_each_with_its_scale():
    model = Net()
    both = losses(model)
    both[0].scale = 3.0
    topo_loss = topogpt.TopoLoss(both)
    each = topo_loss.compute(model, reduce_mean=False)
    assert list(each) == ["conv", "fc"]
    assert torch.equal(topo_loss.compute(model), (each["conv"] + each["fc"]) / 2)


def test_without_a_scale_a_loss_is_logged_only():
    model = Net()
    both = losses(model)
    both[0].scale = None
    topo_loss = topogpt.TopoLoss(both)
    assert list(topo_loss.compute(model, reduce_mean=False)) == ["fc"]
    logged = topo_loss.get_wandb_logging_dict(model)
    assert list(logged) == ["conv", "fc", "mean"]
    assert logged["mean"] == pytest.approx((logged["conv"] + logged["fc"]) / 2)
    both[1].scale = None
    assert topo_loss.compute(model, reduce_mean=False) == {}
    with pytest.raises(ValueError, match="no loss has a scale"):
        topo_loss.compute(model)


def test_two_losses_on_one_layer_both_count():
    model = Net()
    weights = topogpt.LaplacianPyramid.from_layer(model, model.fc, 3.0, 3.0)
    biases = topogpt.LaplacianPyramidOnBias.from_layer(model, model.fc, 3.0, 3.0)
    topo_loss = topogpt.TopoLoss([weights, biases])
    each = topo_loss.compute(model, reduce_mean=False)
    assert list(each) == ["fc", "fc#2"] and each["fc"] != each["fc#2"]
    assert torch.equal(topo_loss.compute(model), (each["fc"] + each["fc#2"]) / 2)


def test_a_recurrent_layer_goes_by_the_name_of_its_weights():
    model = nn.ModuleDict({"rnn": nn.RNN(5, 12)})
    loss = topogpt.LaplacianPyramid.from_layer(
        model, model["rnn"], 3.0, 2.0, custom_weight_attribute_name="weight_hh_l0"
    )
    with pytest.raises(ValueError, match="layer rnn is a RNN, neither .* strict_layer_type=False allows it"):
        topogpt.TopoLoss([loss]).compute(model)
    topogpt.TopoLoss([loss], strict_layer_type=False).compute(model).backward()
    assert model["rnn"].weight_hh_l0.grad.abs().sum() > 0 and model["rnn"].weight_ih_l0.grad is None


def test_biases_of_zero_have_loss_1_and_no_gradient_that_is_nan():
    model = Net()
    nn.init.zeros_(model.fc.bias)
    loss = topogpt.TopoLoss([topogpt.LaplacianPyramidOnBias("fc", 2.0, 2.0)]).compute(model)
    loss.backward()
    assert loss == 1 and torch.equal(model.fc.bias.grad, torch.zeros(48))


def test_a_file_keeps_the_losses_and_leaves_them_alone(tmp_path):
    model = Net()
    both = [*losses(model, scale=None), topogpt.LaplacianPyramidOnBias("fc", 2.0, 2.0, scale=0.5)]
    before = [vars(loss).copy() for loss in both]
    topogpt.TopoLoss(both).save_json(tmp_path / "losses.json")
    assert [vars(loss) for loss in both] == before
    assert topogpt.TopoLoss.from_json(tmp_path / "losses.json").losses == both
    (tmp_path / "losses.json").write_text('[{"name": "print"}]')
    with pytest.raises(ValueError, match="name = print must be one of LaplacianPyramid, "):
        topogpt.TopoLoss.from_json(tmp_path / "losses.json")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: topogpt.LaplacianPyramid.from_layer(m, nn.Linear(3, 4), 2, 2), "no layer of the Net"),
        (lambda m: topogpt.LaplacianPyramid.from_layer(m, m.fc, 7, 2), "layer fc: factor_h = 7 .* 6x8 sheet"),
        (lambda m: topogpt.LaplacianPyramidOnInput.from_layer(m, m.conv, 2, 2), "layer conv: weight .*64, 1"),
        (
            lambda m: topogpt.TopoLoss([topogpt.LaplacianPyramid("fd", 2, 2)]).compute(m),
            "fd is not in the Net",
        ),
        (lambda m: topogpt.LaplacianPyramidOnBias.from_layer(m, no_bias(m), 2, 2), "bias .* is missing"),
        (lambda m: topogpt.LaplacianPyramid("fc", 2, 2, "cubic").loss(m.fc), "interpolation = 'cubic' must"),
        (lambda m: topogpt.TauScheduler([], 0, 1, 2), "topo_loss is a list and no TopoLoss"),
        (lambda m: tau(m, 0, 1, 2, "cosine"), "mode = 'cosine' must be one of linear, cosine_decay"),
        (lambda m: tau(m, 0, 1, 0), "num_steps = 0 must be at least 1"),
        (lambda m: tau(m, 0, 1, 5, "cosine_decay"), "cosine_decay falls: end_value = 1, start_value = 0"),
        (lambda m: topogpt.ChainedTauScheduler([]), "schedulers are none"),
    ],
)
def test_what_cannot_work_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(Net())


def no_bias(model: Net) -> nn.Linear:
    model.fc = nn.Linear(64, 48, bias=False)
    return model.fc


def tau(model: nn.Module, *args) -> topogpt.TauScheduler:
    return topogpt.TauScheduler(topogpt.TopoLoss(losses(model)), *args)


def scales(scheduler) -> list[float]:
    """The scale of the losses before the first step and after each of 13."""
    of = getattr(scheduler, "schedulers", [scheduler])[0].topo_loss.losses
    found = [of[0].scale]
    for _ in range(13):
        scheduler.step()
        assert of[0].scale == of[1].scale == scheduler.get_current_tau()
        found.append(of[0].scale)
    return found


def test_a_schedule_begins_at_once_and_ends_on_time_and_stays_there():
    found = scales(tau(Net(), 0.5, 1.5, 10))
    assert found == pytest.approx([0.5 + min(k, 10) / 10 for k in range(14)])
    found = scales(tau(Net(), 2.0, 0.0, 10, "cosine_decay"))
    assert found[0] == 2 and found[5] == pytest.approx(1) and found[10:] == [0.0] * 4
    assert all(a > b for a, b in zip(found[:10], found[1:11], strict=True))


def test_a_chain_takes_each_in_turn():
    topo_loss = topogpt.TopoLoss(losses(Net()))
    up = topogpt.TauScheduler(topo_loss, start_value=0.0, end_value=1.0, num_steps=4, mode="linear")
    down = topogpt.TauScheduler(topo_loss, 1.0, 0.0, 6, mode="cosine_decay", verbose=False)
    found = scales(topogpt.ChainedTauScheduler(schedulers=[up, down]))
    assert found[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and found[10:] == [0.0] * 4
    assert found[7] == pytest.approx(0.5)


def test_a_step_may_be_named_and_a_loss_that_is_logged_only_stays_so(capsys):
    model = Net()
    both = losses(model)
    both[1].scale = None
    scheduler = topogpt.TauScheduler(topogpt.TopoLoss(both), 0.0, 1.0, 10, verbose=True)
    scheduler.step(7)
    assert (both[0].scale, both[1].scale, scheduler.get_current_tau()) == (0.7, None, 0.7)
    assert capsys.readouterr().out.splitlines()[-1] == "conv: tau 0.7000 at step 7/10"


def test_files_keep_schedules(tmp_path):
    topo_loss = topogpt.TopoLoss(losses(Net()))
    one = topogpt.TauScheduler(topo_loss, 2.0, 0.5, 7, "cosine_decay")
    one.save_json(tmp_path / "one.json")
    assert topogpt.TauScheduler.from_json(tmp_path / "one.json", topo_loss).settings() == one.settings()
    topogpt.ChainedTauScheduler([one, one]).save_json(tmp_path / "two.json")
    chain = topogpt.ChainedTauScheduler.from_json(tmp_path / "two.json", topo_loss)
    assert [part.settings() for part in chain.schedulers] == [one.settings()] * 2


def test_training_with_it_makes_a_sheet_smoother():
    model = Net()
    topo_loss = topogpt.TopoLoss(losses(model))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def neighbours() -> float:
        sheet = topoloss.output_sheet(model.conv.weight)
        return F.cosine_similarity(sheet[:, 1:], sheet[:, :-1], dim=-1).mean().item()

    before = neighbours()
    for _ in range(100):
        optimizer.zero_grad()
        topo_loss.compute(model).backward()
        optimizer.step()
    assert abs(before) < 0.2 and neighbours() > 0.7
