"""Pruning, inheriting and training under a connectome. Run: pytest tests/model/test_connectome.py"""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.model import connectome
from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig
from topogpt.text.loader import MicroBatch
from topogpt.training import preflight, setup
from topogpt.training.step import optimizer_step
from train import train

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": tiny.VOCAB}
MUON = {"name": "muon", "weight_decay": 0.3}
BOTH = {"loss": "topolm+toponets", "factor_h": 4.0, "factor_w": 4.0}


def matrices(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}


def grown(folder, name: str = "wires", times: int = 2, **model) -> str:
    """A connectome of an untrained model of the tiny shape."""
    cfg = tiny.config(folder, model=model).model
    torch.manual_seed(7)
    weights, masks = matrices(GPT(cfg)), None
    for _ in range(times):
        masks = connectome.prune(weights, masks, 0.2)
    found = connectome.Connectome(connectome.signs(weights, masks), {"fraction": 0.2, "generation": times})
    connectome.write(folder / name, found, cfg)
    return str(folder / name)


@pytest.mark.parametrize("per", ["matrix", "global"])
def test_each_pruning_takes_the_smallest_fifth_of_what_is_left(per):
    torch.manual_seed(0)
    weights, masks, before = {"a": torch.randn(100, 250), "b": 5 * torch.randn(50, 100)}, None, None
    for expected in (20.0, 36.0, 48.8, 59.0, 67.2, 73.8):
        masks = connectome.prune(weights, masks, 0.2, per)
        gone = sum(int((~m).sum()) for m in masks.values())
        assert round(100 * gone / 30000, 1) == expected
        if per == "matrix":
            assert [round(100 * (~m).float().mean().item(), 1) for m in masks.values()] == [expected] * 2
        for name, mask in masks.items():
            assert before is None or not (mask & ~before[name]).any()  # nested
            if per == "matrix":
                assert weights[name][mask].abs().min() > weights[name][~mask].abs().max()
        before = masks
    if per == "global":
        kept, cut = (
            torch.cat([weights[n][m ^ flip].abs() for n, m in masks.items()]) for flip in (False, True)
        )
        assert kept.min() > cut.max()
        assert masks["b"].float().mean() > 2 * masks["a"].float().mean()


def test_equal_weights_go_in_order_and_only_matrices_do():
    weights = {"m": torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, -3.0]]), "norm": torch.ones(3)}
    masks = connectome.prune(weights, None, 0.5)
    assert masks.keys() == {"m"} and masks["m"].tolist() == [[False, False, False], [True, True, True]]
    again = connectome.prune(weights, masks, 0.34)  # round(1.02) of the three that are left
    assert again["m"].tolist() == [[False, False, False], [True, False, True]]
    assert not weights["m"].eq(0).any()


def test_exempt_matrices_have_no_wiring():
    weights = matrices(GPT(GPTConfig(**SMALL, tied=False)))
    masks = connectome.prune(weights, None, 0.2, exempt=("transformer.w?e.weight", "lm_head.weight"))
    assert weights.keys() - masks.keys() == {f"transformer.{x}.weight" for x in ("wte", "wpe")} | {
        "lm_head.weight"
    }


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fractions_and_weights_are_one_line(fraction):
    with pytest.raises(UserError, match=f"prune = {fraction} must be above 0 and below 1"):
        connectome.prune({"m": torch.ones(2, 2)}, None, fraction)
    with pytest.raises(UserError, match="m holds weights that are not finite"):
        connectome.prune({"m": torch.full((2, 2), torch.nan)}, None, 0.5)
    with pytest.raises(UserError, match="exempt = x matches no matrix"):
        connectome.prune({"m": torch.ones(2, 2)}, None, 0.5, exempt=("x",))


@pytest.mark.parametrize("how", ["signs", "random", "rewind", "dense"])
def test_how_a_model_starts(folder, how):
    found = connectome.read(grown(folder), tiny.config(folder).model)
    torch.manual_seed(1)
    model = GPT(tiny.config(folder).model)
    fresh = matrices(model)
    torch.manual_seed(2)
    older = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    under = connectome.inherit(model, found, how, 5, older)
    for name, weight in matrices(model).items():
        if how == "dense":
            assert under is None and torch.equal(weight, fresh[name])
            continue
        wired = under.wiring[name]
        assert torch.equal(weight != 0, wired != 0)
        expected = torch.where(wired != 0, older[name], 0.0) if how == "rewind" else 0.02 * wired
        assert torch.equal(weight, expected)
        assert wired.count_nonzero() == found.wiring[name].count_nonzero()
        assert torch.equal(wired, found.wiring[name]) == (how != "random")
    if how == "random":
        share = torch.cat([w[w != 0].float() for w in under.wiring.values()]).mean()
        assert abs(share) < 0.1  # as many of either sign
        assert not all(
            torch.equal(w, connectome.random_wiring(found.wiring, 6)[n]) for n, w in under.wiring.items()
        )


def test_signs_are_those_of_the_weights():
    weights = {"m": torch.tensor([[1.5, -2.0, 0.0, -4.0]])}
    wiring = connectome.signs(weights, {"m": torch.tensor([[True, True, True, False]])})
    assert wiring["m"].dtype == torch.int8 and wiring["m"].tolist() == [[1, -1, 1, 0]]


def taken(cfg, n: int = 3) -> tuple[setup.Training, list]:
    """A run after n steps on random tokens."""
    t = setup.build(cfg, Ranks(0, 1, torch.device("cpu")))
    g = torch.Generator().manual_seed(0)
    done = []
    for step in range(n):
        tokens = torch.randint(0, tiny.VOCAB, (2, 17), generator=g)
        done.append(optimizer_step(t, step, [MicroBatch(tokens[:, :-1], tokens[:, 1:], 0)]))
    return t, done


@pytest.mark.parametrize("optim", [{"weight_decay": 0.3}, MUON])
@pytest.mark.parametrize("topo", [{"loss": "none"}, BOTH])
@pytest.mark.parametrize("tied", [True, False])
def test_pruned_weights_are_zero_after_every_step(folder, optim, topo, tied):
    wires = grown(folder, f"wires {tied}", tied=tied)
    cfg = tiny.config(folder, connectome=wires, optim=optim, topo=topo, model={"tied": tied})
    for n in (1, 4):
        t, _ = taken(cfg, n)
        for name, weight in matrices(t.model).items():
            wired = t.connectome.wiring[name]
            assert not weight[wired == 0].any(), name
            moved = weight[wired != 0] != 0.02 * wired[wired != 0]
            assert moved.float().mean() > 0.5, name
        assert t.model.transformer.wte.weight is t.model.lm_head.weight or not tied


def test_the_masks_are_what_keeps_muon_s_weights_at_zero(folder, monkeypatch):
    monkeypatch.setattr(connectome.Masks, "of_weights", lambda self: None)
    t, _ = taken(tiny.config(folder, connectome=grown(folder), optim=MUON))
    assert any(w[t.connectome.wiring[name] == 0].any() for name, w in matrices(t.model).items())


def test_the_norm_of_the_gradient_is_of_survivors_alone(folder, monkeypatch):
    cfg = tiny.config(folder, connectome=grown(folder), model={"dropout": 0.0})
    seen, clip = {}, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(connectome.Masks, "of_gradients", lambda self: None)

    def looked(parameters, limit):
        parameters = list(parameters)
        seen.update(enumerate(p.grad.clone() for p in parameters))
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", looked)
    t, _ = taken(cfg, 1)
    raw = dict(seen)
    monkeypatch.undo()
    _, done = taken(cfg, 1)
    wiring = t.connectome.wiring
    masked = [
        g * (wiring[n] != 0) if n in wiring else g
        for g, (n, _) in zip(raw.values(), t.model.named_parameters(), strict=True)
    ]
    norm = torch.cat([g.flatten() for g in masked]).norm()
    torch.testing.assert_close(done[0].grad_norm, norm)
    assert norm < 0.99 * torch.cat([g.flatten() for g in raw.values()]).norm()


def test_weight_decay_acts_on_survivors(folder):
    flat = {"lr": 0.01, "min_lr": 0.01, "warmup_steps": 0, "grad_clip": 0.0}
    both = [
        taken(tiny.config(folder, connectome=grown(folder), optim=flat | {"weight_decay": d}), 1)[0]
        for d in (0.0, 0.5)
    ]
    name = "transformer.h.0.mlp.c_fc.weight"
    without, decayed = (dict(t.model.named_parameters())[name] for t in both)
    torch.testing.assert_close(without - decayed, 0.01 * 0.5 * 0.02 * both[0].connectome.wiring[name])


@pytest.mark.parametrize("how", ["signs", "random"])
def test_a_resumed_run_is_the_same_bit_for_bit(folder, how):
    whole = tiny.config(folder, f"whole {how}", connectome=grown(folder), inherit=how, topo=BOTH, optim=MUON)
    train(whole)
    cut = dataclasses.replace(whole, run_name=f"cut {how}")
    train(dataclasses.replace(cut, max_steps=9))
    train(dataclasses.replace(cut, resume=True))
    runs = [tiny.folder_of(cfg) for cfg in (whole, cut)]
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    under = connectome.read(runs[0], whole.model)
    assert all(not ours[name][w == 0].any() for name, w in under.wiring.items())
    given = json.loads((folder / "wires" / connectome.RECORD).read_text())["sha256"]
    assert (under.about["sha256"] == given) == (how == "signs")
    assert json.loads((runs[0] / "last" / "state.json").read_text())["connectome"] == given


def test_two_ranks_do_as_one(folder):
    cfg = tiny.config(folder, "one", connectome=grown(folder), topo=BOTH, max_steps=6)
    train(cfg)
    two = dataclasses.replace(cfg, run_name="two")
    output = folder / "two.txt"
    assert tiny.run_in_child(tiny.train_after, tiny.nothing, two, world=2, output=output) == [0, 0], (
        output.read_text()
    )
    ours, theirs = (load_file(tiny.folder_of(c) / "last" / "model.safetensors") for c in (cfg, two))
    wiring = connectome.read(tiny.folder_of(two), cfg.model).wiring
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
        assert name not in wiring or not theirs[name][wiring[name] == 0].any()


def test_mistakes_are_one_line(folder):
    wires = grown(folder)
    cfg = tiny.config(folder, "mistaken", connectome=wires)
    train(dataclasses.replace(cfg, max_steps=4))
    torn = folder / "torn"
    torn.mkdir()
    (torn / connectome.FILE).write_bytes(b"")
    growing = folder / "growing"
    growing.mkdir()
    (growing / "itp.json").write_text("{}")
    damaged = folder / "damaged"
    grown(folder, "damaged")
    (damaged / connectome.FILE).write_bytes(b"nothing")
    resumed = {"resume": True}
    other = grown(folder, "other", times=3)
    cases = [
        ({"connectome": "nowhere"}, "connectome = nowhere does not exist"),
        ({"connectome": str(folder)}, "is no connectome; give what train_itp.py"),
        ({"connectome": str(torn)}, "torn is incomplete: it has no connectome.json"),
        ({"connectome": str(growing)}, "growing has generations still to come: go on with train_itp.py"),
        ({"connectome": str(damaged)}, "damaged is damaged"),
        ({"connectome": grown(folder, "deep", n_layer=2)}, "has n_layer 2, but model.n_layer = 1"),
        ({"connectome": grown(folder, "untied", tied=False)}, "has tied False.*give --model.no_tied"),
        ({"connectome": grown(folder, "wide", n_inner=32)}, "has n_hidden 32, but model.n_inner = 64"),
        ({"inherit": "rewind"}, "has no rewind.safetensors"),
        (resumed | {"connectome": other}, "resume: connectome = .*other.*was started with .*wires"),
        (resumed | {"connectome": None}, "resume: connectome = none, but"),
        (resumed | {"inherit": "random"}, "resume: inherit = random, but the run was started with signs"),
    ]
    for change, said in cases:
        name = "mistaken" if "resume" in change else "new"
        with pytest.raises(UserError, match=said) as error:
            preflight.check(dataclasses.replace(cfg, run_name=name, **change))
        assert "\n" not in str(error.value)
    for change, said in [
        ({"connectome": None, "inherit": "random"}, "inherit = random has nothing to inherit"),
        ({"init_from": "gpt2"}, "init_from and connectome both say"),
    ]:
        with pytest.raises(UserError, match=said):
            dataclasses.replace(cfg, **change)
