"""Parameter groups, the schedule, and steps that are skipped. Run: pytest tests/training/test_optim.py"""

import math
from dataclasses import replace

import pytest
import torch

from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig, OptimConfig
from topogpt.training.optim import build_optimizer, lr_at, set_lr

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64)


def test_only_matrices_decay_and_every_parameter_is_there_once():
    model = GPT(SMALL)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sorted(decayed + kept) == sorted(names.values())
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept} == {"ln_1", "ln_2", "ln_f"}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(decayed)


def test_the_tied_head_is_optimised_once():
    model = GPT(SMALL)
    assert model.lm_head.weight is model.transformer.wte.weight
    given = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert sum(p is model.lm_head.weight for p in given) == 1
    assert sum(p.numel() for p in given) == model.n_parameters()


def test_frozen_parameters_are_left_out():
    model = GPT(SMALL)
    model.transformer.wpe.weight.requires_grad_(False)
    given = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert not any(p is model.transformer.wpe.weight for p in given)


def test_betas_and_rate_are_those_of_the_settings():
    group = build_optimizer(GPT(SMALL), OptimConfig(lr=0.5, beta1=0.7, beta2=0.8)).param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.7, 0.8))


def test_one_step_is_adamw_as_published():
    model = GPT(SMALL)
    cfg = OptimConfig(lr=0.01, min_lr=0.0, weight_decay=0.1)
    optimizer = build_optimizer(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    for name, p in model.named_parameters():  # the first step moves by lr * sign(g), besides the decay
        decay = 0.1 if p.dim() >= 2 else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


# ---- muon ------------------------------------------------------------------------------------------------

MUON = OptimConfig(name="muon", lr=0.01, min_lr=0.0, weight_decay=0.1)


def with_gradients(model: GPT, seed: int = 0) -> GPT:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_blocks_matrices_and_adamw_the_rest(tied):
    model = GPT(replace(SMALL, tied=tied))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = build_optimizer(model, replace(MUON, weight_decay=0.3)).parts
    of_muon, of_adamw = (
        [names[id(p)] for group in part.param_groups for p in group["params"]] for part in (muon, adamw)
    )
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    assert {name.split(".", 3)[3] for name in of_muon} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"} | (
        {"lm_head.weight"} - {tied and "lm_head.weight"}
    )
    assert embeddings <= set(of_adamw) and all("ln_" in name for name in set(of_adamw) - embeddings)
    assert [group["weight_decay"] for group in (*muon.param_groups, *adamw.param_groups)] == [0.3, 0.3, 0.0]
    # without parameters in norms and biases AdamW has one group
    assert len(build_optimizer(GPT(replace(SMALL, norm="rmsnorm")), MUON).parts[1].param_groups) == 1


def test_one_step_of_muon_turns_every_direction_by_as_much():
    """The first step moves by lr * 0.2 sqrt(larger side) * U V^T of the gradient's U S V^T, besides decay."""
    model = with_gradients(GPT(SMALL))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, MUON)
    set_lr(optimizer, 0.005)
    optimizer.step()
    for name, p in model.named_parameters():
        if ".h." in name and p.dim() == 2:
            u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
            moved = (before[name] * (1 - 0.005 * 0.1) - p.detach()) / (0.005 * 0.2 * max(p.shape) ** 0.5)
            strengths = (u.T @ moved @ vt.T).diagonal()  # Newton-Schulz brings them near 1: 0.7 to 1.2
            assert 0.6 < strengths.min() and strengths.max() < 1.3, name
            assert (moved - u @ strengths.diag() @ vt).norm() < 0.1 * moved.norm(), name
        else:
            decay = 0.1 if p.dim() == 2 else 0.0
            expected = before[name] * (1 - 0.005 * decay) - 0.005 * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_muon_may_have_a_rate_of_its_own():
    optimizer = build_optimizer(with_gradients(GPT(SMALL)), replace(MUON, muon_lr=0.04))
    set_lr(optimizer, 0.005)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005, 0.005]


def test_a_step_of_muon_that_is_skipped_leaves_everything_bit_for_bit():
    model, other = GPT(SMALL), GPT(SMALL)
    other.load_state_dict(model.state_dict())
    both = [build_optimizer(m, MUON) for m in (model, other)]
    for optimizer in both:
        optimizer.found_inf = torch.tensor(0.0)
    for step in range(3):
        for m, optimizer in zip((model, other), both, strict=True):
            with_gradients(m, step)
            optimizer.step()
        with_gradients(model)
        for p in model.parameters():
            p.grad.fill_(float("nan"))
        both[0].found_inf = torch.tensor(1.0)
        both[0].step()
        both[0].found_inf = torch.tensor(0.0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    states = [optimizer.parts[0].state_dict()["state"] for optimizer in both]
    assert all(
        torch.equal(states[0][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in states[1].items()
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ({"muon_lr": 0.1}, "no effect without --optim.name muon"),
        ({"name": "muon", "muon_lr": -1.0}, "muon_lr = -1.0 must be above 0"),
        ({"name": "muon", "muon_lr": 1.0, "lr": 0.0, "min_lr": 0.0}, "no schedule"),
        ({"name": "muon", "muon_momentum": 1.0}, "muon_momentum = 1.0"),
        ({"schedule": "trapezoid"}, "give --optim.schedule trapezoid and --optim.warmdown_steps"),
        ({"warmdown_steps": 5}, "give --optim.schedule trapezoid"),
        ({"schedule": "trapezoid", "warmdown_steps": 999_000}, "warmdown_steps = 999000"),
    ],
)
def test_settings_that_cannot_be_are_one_line(given, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(**given)


# ---- schedule ----------------------------------------------------------------------------------------------


def test_rates_at_the_corners_of_the_schedule():
    cfg = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=10, decay_steps=110)
    known = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 111: 0.2, 10_000: 0.2}
    known[35] = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert {step: lr_at(cfg, step, 50) for step in known} == pytest.approx(known)


def test_the_decay_ends_with_the_run_where_nothing_else_is_said():
    cfg = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0, decay_steps=None)
    assert [lr_at(cfg, step, 4) for step in range(6)] == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0]
    )


def test_without_warm_up_the_first_rate_is_the_peak():
    assert lr_at(OptimConfig(lr=1.0, warmup_steps=0), 0, 10) == 1.0


def test_a_decay_that_ends_before_the_warm_up_does_leaves_the_least_rate():
    cfg = OptimConfig(lr=1.0, min_lr=0.25, warmup_steps=8, decay_steps=8)
    assert lr_at(cfg, 7, 100) == 1.0
    assert lr_at(cfg, 9, 100) == 0.25


# ---- skipped steps -----------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, seed: int) -> None:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel()))


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": t.clone() for name, t in state.items()}
    return tensors


def test_a_skipped_step_leaves_weights_moments_and_counts_as_they_are():
    """The loop sets found_inf if the gradient is not finite; the fused kernel must obey, also on the CPU."""
    model = GPT(SMALL)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    gradients(model, 0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = everything(model, optimizer)
    assert any(name.endswith(".exp_avg_sq") for name in before) and before["0.step"] == 1
    gradients(model, 1)
    next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = everything(model, optimizer)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    gradients(model, 1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(
        everything(model, optimizer)["transformer.wte.weight"], before["transformer.wte.weight"]
    )


def test_a_run_whose_first_step_is_skipped_starts_with_the_second():
    one, two = GPT(SMALL), GPT(SMALL)
    two.load_state_dict(one.state_dict())
    for model, skipped in ((one, False), (two, True)):
        optimizer = build_optimizer(model, OptimConfig(lr=0.1))
        if skipped:
            gradients(model, 0)
            next(model.parameters()).grad.fill_(torch.inf)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
        gradients(model, 1)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_trapezoid_holds_and_goes_down_to_the_end():
    shape = {"schedule": "trapezoid", "decay_steps": None}
    cfg = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, warmdown_steps=10, **shape)
    known = {0: 0.25, 3: 1.0, 4: 1.0, 40: 1.0, 45: 0.6, 50: 0.2, 60: 0.2}
    assert {step: lr_at(cfg, step, 50) for step in known} == pytest.approx(known)
    paper = OptimConfig(lr=0.0018, min_lr=0.0, warmup_steps=250, warmdown_steps=1800, **shape)
    assert lr_at(paper, 5200, 7001) == 0.0018 and lr_at(paper, 6101, 7001) == pytest.approx(0.0009)
