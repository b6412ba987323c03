"""A finished model goes on with other text, all of it or adapters. pytest tests/training/test_finetune.py"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import texts
import tiny
import torch
from safetensors.torch import load_file

import finetune
from evals import finetuned
from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.model import lora
from topogpt.model.gpt import GPT
from topogpt.runs.checkpoint import BASE_FILE, load_run, load_weights
from topogpt.settings import FinetuneConfig, GPTConfig
from topogpt.sharing.export import export
from topogpt.topography import load_topography
from topogpt.training import preflight, setup
from topogpt.training.step import optimizer_step
from train import train

RANK = 2
ALONE = Ranks(0, 1, torch.device("cpu"))
TOPO = {"loss": "toponets", "tau": 3.0, "factor_h": 4.0, "factor_w": 4.0, "weight_schedule": "cosine"}


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """A run on random tokens, with TopoNets' loss; beside it new/{train,val}, whose tokens follow a rule."""
    cfg = tiny.config(folder, "source", topo=TOPO, model={"n_layer": 2, "dropout": 0.0})
    train(cfg)
    for split, n in (("train", 4000), ("val", 600)):
        tiny.write_shard(folder / "new" / split / "one.bin", np.arange(n) % 4)
    return tiny.folder_of(cfg)


def settings(source: Path, run_name: str = "", **changes) -> FinetuneConfig:
    """Of a run of 18 steps beside the source's, on the new tokens."""
    given = {"per_device_batch_size": 2, "batch_size": 8, "max_steps": 18, "eval_every": 6, "val_tokens": 592}
    given |= {"log_every": 1, "save_every": 5, "keep_last": 9, "device": "cpu", "warmup_steps": 2, "lr": 1e-2}
    folder = source.parents[1]
    given |= {"out_dir": str(folder / "out"), "data": (str(folder / "new"),)}
    return FinetuneConfig(run=str(source), run_name=run_name, **given | changes)


def built(source: Path, **changes) -> setup.Training:
    """A fresh finetuning of the source, with adapters that are no longer 0."""
    t = setup.build(finetune.settings_of(settings(source, lora_rank=RANK, **changes)), ALONE)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in t.model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    return t


def weights_of(run: Path, which: str = "best") -> dict[str, torch.Tensor]:
    return load_file(run / which / "model.safetensors")


@pytest.fixture(scope="module")
def adapted(source) -> Path:
    """A run of adapters with the source's own loss."""
    cfg = finetune.settings_of(settings(source, lora_rank=RANK, keep_topography=True))
    assert (cfg.run_name, cfg.topo.loss, cfg.topo.tau) == ("source-lora2", "toponets", 3.0)
    assert train(cfg).step == 18
    return tiny.folder_of(cfg)


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, RANK])
def test_the_loss_on_the_new_text_falls(source, rank):
    cfg = finetune.settings_of(settings(source, f"falls-{rank}", lora_rank=rank))
    train(cfg)
    before, *_, after = [r["cross_entropy"] for r in tiny.records(tiny.folder_of(cfg), "val")]
    assert after < before - 0.1
    assert "toponets" not in tiny.records(tiny.folder_of(cfg), "train")[0]  # no topography unless asked for


def test_the_first_evaluation_is_of_the_source(source, adapted):
    first, last = weights_of(adapted, "checkpoints/step-000000"), weights_of(source)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)  # the positions, too


def test_adapters_leave_everything_else_bit_for_bit(source, adapted):
    base, before, after = load_file(adapted / BASE_FILE), weights_of(source), weights_of(adapted, "last")
    assert base.keys() == {name for name in before if not name.startswith("positions.")}
    assert all(torch.equal(base[name], before[name]) for name in base)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in lora.linear_layers(load_run(source).model.cfg)}


def test_only_adapters_have_gradients_and_moments(source):
    t = built(source)
    optimizer_step(t, 0, setup.token_loader(t, preflight.check(replace(t.cfg, run_name="x"))).step(0))
    names = {name for name, p in t.model.named_parameters() if p.requires_grad}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    n_trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    c = t.cfg.model.n_embd  # c_attn, c_proj, c_fc, c_proj
    assert n_trained == 2 * RANK * ((c + 3 * c) + (c + c) + (c + 4 * c) + (4 * c + c))
    assert n_trained == lora.n_adapter_parameters(t.cfg.model, t.cfg.lora_modules, RANK)
    assert len(t.optimizer.state) == len(names) == 2 * 2 * 4
    assert t.model.n_parameters() == load_run(source).model.n_parameters()


def test_patterns_choose_the_layers(source):
    t = built(source, lora_modules=("*.1.mlp.c_fc", "*.0.attn.c_proj"))
    found = {n.partition(".lora_")[0] for n, p in t.model.named_parameters() if p.requires_grad}
    assert found == {"transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_proj"}


@pytest.mark.parametrize("n_inner", [None, 24])
def test_the_layers_that_can_be_adapted_are_those_of_the_model(n_inner):
    cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_inner=n_inner)
    linear = {n: m for n, m in GPT(cfg).named_modules() if isinstance(m, torch.nn.Linear)}
    del linear["lm_head"]
    assert lora.linear_layers(cfg) == {name: tuple(m.weight.shape) for name, m in linear.items()}


# ---- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [32.0, 1.0])
def test_merged_weights_compute_what_the_adapted_model_does(source, alpha):
    t = built(source, lora_alpha=alpha)
    base, adapters = lora.split_weights(t.model)
    merged = lora.merge(t.model, base, adapters)
    name = "transformer.h.1.mlp.c_proj"
    by_hand = base[f"{name}.weight"].clone()
    for i in range(RANK):  # sum of outer products
        a, b = (adapters[f"{name}.lora_{x}.weight"] for x in "AB")
        by_hand += alpha / RANK * torch.outer(b[:, i], a[i])
    torch.testing.assert_close(merged[f"{name}.weight"], by_hand)
    plain = GPT(t.cfg.model)
    load_weights(plain, merged)
    tokens = torch.arange(32).view(2, 16)
    ours, theirs, before = (m.eval()(tokens).logits for m in (t.model, plain, load_run(source).model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 0.01


def test_the_checkpoint_is_read_and_exported_like_any_other(source, adapted, tmp_path):
    loaded, before = load_run(adapted), load_run(source)
    assert not lora.is_adapted(loaded.model)
    for sheet, positions in before.positions.items():
        assert np.array_equal(loaded.positions[sheet], positions)
    said = []
    after, plain = (export(run, out=tmp_path / run.name, say=said.append) for run in (adapted, source))
    maps = [load_topography(path) for path in (after, plain)]
    assert maps[0].positions.keys() == maps[1].positions.keys()
    assert all(np.array_equal(p, maps[1].positions[s]) for s, p in maps[0].positions.items())
    cfg = replace(settings(source, lora_rank=1, keep_topography=True), run=str(after))
    again = finetune.settings_of(cfg)
    assert (again.topo.loss, again.topo.tau) == ("toponets", 3.0)  # an export says what it was trained with
    assert again.model == loaded.model.cfg


# ---- resuming ------------------------------------------------------------------------------------


def test_a_run_goes_on_without_the_model_it_started_from(source, tmp_path):
    moved = shutil.copytree(source, tmp_path / "moved", symlinks=True)
    cfg = replace(settings(source, "orphan", lora_rank=RANK, max_steps=2), run=str(moved))
    train(finetune.settings_of(cfg))
    shutil.rmtree(moved)
    assert train(finetune.settings_of(replace(cfg, resume=True, max_steps=3))).step == 3
    with pytest.raises(UserError, match="run = .*source, but .*orphan was started from .*moved; give"):
        finetune.settings_of(replace(cfg, resume=True, run=str(source)))


def copy_up_to(run: Path, step: int, name: str) -> Path:
    """The run as a kill after this step's checkpoint leaves it."""
    copy = shutil.copytree(run, run.with_name(name), symlinks=True)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return copy


def test_resuming_is_exact(source, adapted):
    copy = copy_up_to(adapted, 10, "killed")
    cfg = finetune.settings_of(settings(source, "killed", lora_rank=RANK, resume=True))
    assert train(cfg).step == 18
    assert tiny.records(copy) == tiny.records(adapted)
    for name in ("model", "adapter"):
        ours, theirs = (load_file(run / "last" / f"{name}.safetensors") for run in (copy, adapted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (
        torch.load(run / "last/optimizer.pt", weights_only=True)["state"] for run in (copy, adapted)
    )
    assert all(torch.equal(t, theirs[i][key]) for i, each in ours.items() for key, t in each.items())
    cfg = finetune.settings_of(settings(source, "killed", lora_rank=RANK, resume=True))
    assert train(cfg).step == 18  # nothing is left to do, and nothing is done
    assert tiny.records(copy) == tiny.records(adapted)


@pytest.mark.parametrize("damage", ["adapter", "base", "missing"])
def test_a_damaged_checkpoint_is_not_trained_on(source, adapted, damage, capsys):
    copy = copy_up_to(adapted, 10, f"damaged-{damage}")
    path = copy / BASE_FILE if damage == "base" else copy / "checkpoints/step-000010/adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x55  # of a float's exponent or mantissa
    data[-1] ^= 0x40
    path.write_bytes(data) if damage != "missing" else path.unlink()
    cfg = finetune.settings_of(settings(source, copy.name, lora_rank=RANK, resume=True))
    said = "checkpoint .*step-000010 is damaged: adapter.safetensors"
    if damage == "base":  # no checkpoint of the run is worth anything without it
        with pytest.raises(UserError, match=said):
            train(cfg)
    else:
        assert train(cfg).step == 18
        assert re.search(f"WARNING: {said}.*; going on from step-000006", capsys.readouterr().out)


# ---- topography ----------------------------------------------------------------------------------


def test_losses_on_weights_see_the_sum_and_move_the_adapters(source):
    """Against the merged weights and the chain rule: dL/dA = s B' G and dL/dB = s G A', G = dL/dW."""
    t = built(source, keep_topography=True)
    loss = t.objective.loss_of_weights("toponets")
    loss.backward()
    plain = GPT(t.cfg.model)
    load_weights(plain, lora.merge(t.model, *lora.split_weights(t.model)))
    by_hand = t.objective.of_weights["toponets"](plain).mean()
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand)
    assert abs(loss - t.objective.of_weights["toponets"](load_run(source).model).mean()) > 0.01
    scale = t.cfg.lora_alpha / RANK
    for i in range(2):
        name = f"transformer.h.{i}.mlp.c_fc"
        a, b = (t.model.get_parameter(f"{name}.lora_{x}.default.weight") for x in "AB")
        gradient = plain.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(a.grad, scale * b.detach().T @ gradient)
        torch.testing.assert_close(b.grad, scale * gradient @ a.detach().T)
        assert a.grad.abs().max() > 0 and b.grad.abs().max() > 0


def test_a_kept_topography_is_smoother_than_one_that_is_not(source, adapted):
    other = finetune.settings_of(settings(source, "not-kept", lora_rank=RANK))
    train(other)
    loss = built(source, keep_topography=True).objective.of_weights["toponets"]
    kept, lost = (loss(load_run(run, "last").model).mean() for run in (adapted, tiny.folder_of(other)))
    assert kept < lost


@pytest.mark.parametrize("loss", ["topolm", "neighbour", "wiring", "topolm+toponets"])
def test_any_loss_goes_with_adapters(source, loss):
    cfg = finetune.settings_of(settings(source, f"with-{loss}", lora_rank=RANK, max_steps=2), ())
    cfg = replace(cfg, topo=replace(cfg.topo, loss=loss, radius=2))
    train(cfg)
    assert all(np.isfinite(r["loss"]) for r in tiny.records(tiny.folder_of(cfg)))


def test_what_is_given_wins_over_the_source(source):
    topo = replace(FinetuneConfig(run="", data=("x",)).topo, loss="wiring", tau=9.0, radius=2)
    cfg = finetune.settings_of(settings(source, topo=topo), {"loss", "radius"})
    assert (cfg.topo.loss, cfg.topo.tau, cfg.topo.factor_h) == ("wiring", 3.0, 4.0)
    kept = finetune.settings_of(settings(source, keep_topography=True)).topo
    assert (kept.loss, kept.weight_schedule) == ("toponets", "constant")  # at its full weight
    assert finetune.settings_of(settings(source)).topo.loss == "none"


# ---- ranks, dtypes -------------------------------------------------------------------------------


def finetune_in_child(cfg: FinetuneConfig) -> None:
    tiny.no_pictures()
    train(finetune.settings_of(cfg))


def test_two_ranks_train_what_one_does(source, adapted, tmp_path):
    cfg = settings(source, "two-ranks", lora_rank=RANK, keep_topography=True)
    codes = tiny.run_in_child(finetune_in_child, cfg, world=2, output=tmp_path / "output")
    assert codes == [0, 0], (tmp_path / "output").read_text()
    ours, theirs = (weights_of(run, "last") for run in (adapted.with_name("two-ranks"), adapted))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert [r["step"] for r in tiny.records(adapted.with_name("two-ranks"), "train")] == [*range(1, 19)]


def test_bfloat16_and_dropout(source):
    cfg = finetune.settings_of(settings(source, "bfloat16", lora_rank=RANK, dtype="bfloat16", max_steps=3))
    train(replace(cfg, model=replace(cfg.model, dropout=0.2)))
    assert weights_of(tiny.folder_of(cfg))["transformer.h.0.mlp.c_fc.weight"].dtype == torch.float32


def test_adapters_are_traced_in_one_graph(source):
    """torch.compile without its code generator, which takes minutes."""
    t = built(source)
    tokens = torch.arange(32).view(2, 16)
    compiled = torch.compile(t.model, backend="aot_eager", fullgraph=True, dynamic=False)
    for model in (t.model, compiled):
        model(tokens, tokens, keep_logits=False).loss.backward()
    gradients = [p.grad for p in t.model.parameters() if p.requires_grad]
    t.optimizer.zero_grad()
    t.model(tokens, tokens, keep_logits=False).loss.backward()
    for twice, p in zip(gradients, (p for p in t.model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(twice, 2 * p.grad)


# ---- text ----------------------------------------------------------------------------------------


def test_text_is_prepared_once_and_anew_when_it_changes(tmp_path, monkeypatch, capsys):
    texts.small_units(monkeypatch)
    run = tiny.random_run(tmp_path / "out")
    path = texts.write_jsonl(tmp_path / "mine.jsonl", texts.make_documents(60))
    cfg = settings(run, data=(str(path),), data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "out"))
    first = finetune.settings_of(cfg)
    finetune.check_enough(first)
    assert "tokens of 60 documents" in capsys.readouterr().out
    assert finetune.settings_of(replace(cfg, lora_rank=2)).train_data_dir == first.train_data_dir
    assert capsys.readouterr().out == ""  # it was there
    texts.write_jsonl(path, texts.make_documents(61))
    assert finetune.settings_of(cfg).train_data_dir != first.train_data_dir
    assert finetune.settings_of(replace(cfg, val_fraction=0.5)).train_data_dir != first.train_data_dir
    both = finetune.settings_of(replace(cfg, data=(str(path), str(Path(first.train_data_dir[0]).parent))))
    assert first.train_data_dir[0] in both.train_data_dir and len(both.val_data_dir) == 2


# ---- mistakes ------------------------------------------------------------------------------------

OLD = "--run_name source-lora2 --resume --lora_rank"
MISTAKES = {  # name: (arguments, what the line must hold)
    "no_data": ("", ["data is missing", "--data"]),
    "negative_rank": ("--lora_rank -1", ["lora_rank = -1", "at least 0"]),
    "rank_too_large": ("--lora_rank 17", ["lora_rank = 17", "transformer.h.0.attn.c_attn, 48x16", "16"]),
    "no_such_layer": ("--lora_rank 2 --lora_modules *.fc", ["lora_modules = *.fc matches no", "near it"]),
    "the_tied_head": ("--lora_rank 2 --lora_modules lm_head", ["lora_modules = lm_head matches no"]),
    "no_layers": ("--lora_rank 2 --lora_modules", ["lora_modules"]),
    "zero_alpha": ("--lora_alpha 0", ["lora_alpha = 0", "above 0"]),
    "text_for_another_vocabulary": ("--data mine.txt", ["vocabulary of 64", "50257", "mine.txt"]),
    "tokens_of_another_vocabulary": ("--data foreign", ["foreign/train/one.bin", "token 999"]),
    "too_few_tokens": ("--data short", ["data: 40 tokens in short/train", "8 are needed", "--batch_size"]),
    "nothing_to_validate_on": ("--data blind", ["data: 9 tokens in blind/val", "--val_fraction"]),
    "no_context": ("--block_size 0", ["model.block_size = 0", "at least 1"]),
    "longer_context": ("--block_size 17", ["block_size = 17", "give 16 or less"]),
    "run_exists": ("--run_name source", ["run_name = source", "--overwrite"]),
    "its_own_source": ("--run_name source --overwrite", ["overwrite", "holds the weights of init_from"]),
    "unknown_loss": ("--topo.loss topoloss", ["topo.loss = topoloss", "toponets"]),
    "another_rank": (f"{OLD} 3", ["lora_rank = 3", "started with 2"]),
    "another_alpha": (f"{OLD} 2 --lora_alpha 8", ["lora_alpha = 8.0", "started with 32.0"]),
    "no_rank": (f"{OLD} 0", ["lora_rank = 0", "started with 2"]),
    "another_loss": (f"{OLD} 2 --topo.tau 5", ["topo.tau = 5.0", "started with 3.0"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_without_torch(source, adapted, name):
    folder = source.parents[1]
    for split in ("train", "val"):
        tiny.write_shard(folder / "foreign" / split / "one.bin", np.arange(999, 600, -1))
        tiny.write_shard(folder / "short" / split / "one.bin", np.arange(40))
        tiny.write_shard(folder / "blind" / split / "one.bin", np.arange(300 if split == "train" else 9) % 60)
    (folder / "mine.txt").write_text("The cortex is a sheet.")
    no_torch = folder / "no_torch"
    no_torch.mkdir(exist_ok=True)
    (no_torch / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    given, words = MISTAKES[name]
    usual = "--batch_size 8 --per_device_batch_size 2"
    usual += "" if "--data" in given or name == "no_data" else " --data new"
    done = subprocess.run(
        [sys.executable, str(tiny.ROOT / "finetune.py"), "out/source", *usual.split(), *given.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(no_torch)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_too_little_text_is_one_line(tmp_path, monkeypatch):
    texts.small_units(monkeypatch)
    run = tiny.random_run(tmp_path / "out")
    (tmp_path / "one.txt").write_text("The cortex is a sheet.\n\n" * 50)
    cfg = settings(run, data=(str(tmp_path / "one.txt"),), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match="data = .*one.txt: none of its 1 documents fell into (val|train) at"):
        finetune.settings_of(cfg)
    with pytest.raises(UserError, match="data = nowhere does not exist"):
        finetune.settings_of(replace(cfg, data=("nowhere",)))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no document with text was found: .*; check the text and"):
        finetune.settings_of(replace(cfg, data=(str(tmp_path / "empty.jsonl"),)))


def test_adapters_without_peft(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    cfg = finetune.settings_of(settings(source, "without", lora_rank=RANK))
    with pytest.raises(UserError, match="lora_rank = 2 needs the package peft: pip install peft"):
        train(cfg)
    assert preflight.check(replace(cfg, lora_rank=0))


def test_a_loss_whose_layers_have_no_adapters(source):
    cfg = settings(source, "apart", lora_rank=RANK, lora_modules=("*.attn.*",), keep_topography=True)
    with pytest.raises(UserError, match=r"topo.loss = toponets acts on .*\*.mlp.c_fc, of which lora_modules"):
        train(finetune.settings_of(cfg))


def test_adapters_need_weights_to_adapt(source):
    with pytest.raises(UserError, match="lora_rank = 2 has no weights to adapt; add --init_from"):
        tiny.config(source.parents[1], lora_rank=2)


def test_the_saved_settings_train_the_same_again(adapted):
    """train.py out/RUN/config.yaml is the same finetuning."""
    from topogpt.config import parse
    from topogpt.settings import TrainConfig

    cfg = parse(TrainConfig, [str(adapted / "config.yaml")])
    saved = json.loads((adapted / "last/state.json").read_text())["config"]
    assert json.loads(json.dumps(asdict(cfg))) == saved


# ---- several runs --------------------------------------------------------------------------------


def test_a_table_of_runs(source, adapted, capsys):
    full = finetune.settings_of(settings(source, "all-of-it", max_steps=6))
    train(full)
    capsys.readouterr()
    finetuned.main([str(tiny.folder_of(full)), str(adapted)])
    head, lora_row, full_row, *notes = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["after", "change", "step"]
    before, *_, after = [r["cross_entropy"] for r in tiny.records(adapted, "val")]
    assert lora_row.split()[-7:-1] == [
        "yes",
        "2",
        "1,024",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{after - before:+.3f}",
    ]
    assert " no  " in full_row and "every one" in full_row and "toponets, tau 3.0" in full_row
    assert "blind guess: 4.159" in notes[0] and len(notes) == 2  # log 64; the same tokens
    for wrong in (source, source.with_name("nowhere")):
        with pytest.raises(UserError, match="give folders of runs that finetune.py made"):
            finetuned.main([str(wrong)])


def test_the_recipe_trains_every_model_at_every_rank_and_nothing_twice(tmp_path):
    """With a python that notes what it is asked for, and makes the run's folder."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\necho "${@:1}" >> asked\nwhile [ $# -gt 1 ]; do\n'
                    '[ "$1" != --run_name ] || mkdir -p "out/$2"; shift; done\n')  # fmt: skip
    fake.chmod(0o755)

    def recipe(*given: str, **env: str) -> list[list[str]]:
        (tmp_path / "asked").unlink(missing_ok=True)
        command = ["bash", str(tiny.ROOT / "recipes/lora.sh"), *given]
        env = os.environ | {"PYTHON": str(fake)} | env
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
        return [line.split() for line in (tmp_path / "asked").read_text().splitlines()]

    *asked, table = recipe("mine.jsonl", "out/a/", "USER/b/hf", RANKS="0 4", FLAGS="--max_steps 3")
    assert [a[1:6] for a in asked] == [
        [run, "--data", "mine.jsonl", "--lora_rank", rank] for run in ("out/a", "USER/b/hf") for rank in "04"
    ]
    assert all(a[-2:] == ["--max_steps", "3"] and "--resume" not in a for a in asked)
    assert table == "-m evals.finetuned out/a-full out/a-lora4 out/b-full out/b-lora4".split()
    *again, _ = recipe("mine.jsonl", "out/a", RANKS="2 4")
    assert ["--resume" in a for a in again] == [False, True]
    assert len(recipe("mine.jsonl", "out/a")) == 4  # 2, 4, 8, and the table
