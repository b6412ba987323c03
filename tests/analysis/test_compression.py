"""compress.py: its table and record, the narrower folder, and bad input.

pytest tests/analysis/test_compression.py
"""

import dataclasses
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import compress as compress_script
from topogpt.config import parse
from topogpt.errors import UserError
from topogpt.model.cost import Cost
from topogpt.model.gpt import GPT
from topogpt.runs.checkpoint import load_run
from topogpt.settings import COMPRESSIONS, CompressConfig, GPTConfig, TrainConfig
from topogpt.sharing import load
from topogpt.text.loader import fixed_batches, open_corpus

N_HIDDEN = 64  # a sheet of 8x8


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    draw = np.random.default_rng(0)
    for split, n in (("train", 4000), ("val", 700)):
        tiny.write_shard(folder / split / "one.bin", draw.integers(0, tiny.VOCAB, n))
    return folder


@pytest.fixture(scope="module")
def run(out) -> Path:
    return tiny.random_run(out, vocab_size=tiny.VOCAB)


@pytest.fixture(scope="module")
def control(out) -> Path:
    return tiny.random_run(out, "control", seed=5, vocab_size=tiny.VOCAB)


def files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*"))


def main(*argv: object) -> None:
    compress_script.main([str(a) for a in argv])


def test_the_table_and_its_record(run, control, capsys):
    main(run, "--control", control, "--n_tokens", "480")
    said, record = capsys.readouterr().out, json.loads((run / "compress.json").read_text())
    lines = said.splitlines()
    assert lines[0].split("  ")[0] == "method" and "control: loss" in lines[0]
    assert sum(line.startswith(COMPRESSIONS) for line in lines) == 12
    assert [line.split()[0] for line in lines[1:14:12]] == ["as", "l1"]
    assert "a blind guess" in said and f"{math.log(64):.3f}" in said
    assert (record["protocol"]["n_tokens"], len(record["code"]["git_sha"])) == (480, 40)
    assert all(len(digest) == 64 for digest in record["data_sha256"].values())
    first, second = record["models"]
    assert (first["label"], second["label"]) == ("run", "control") and len(first["rows"]) == 13
    corpus = open_corpus([str(run.parent / "val")], key="val", vocab_size=64, log=str)
    batches = list(fixed_batches(corpus, n_tokens=480, block_size=48, per_device_batch_size=10))
    model = load_run(run).model
    with torch.no_grad():
        expected = model(batches[0].tokens, batches[0].targets).loss.item()
    whole, *others = first["rows"]
    assert len(batches) == 1 and whole["loss"] == pytest.approx(expected, abs=1e-5)
    assert whole["n_bytes"] == 4 * model.n_parameters()
    for row in others:
        assert (row["tokens_per_s"] is not None) == (row["method"] == "units")
        assert row["increase"] == pytest.approx(row["loss"] - whole["loss"])
        bits = 2 * N_HIDDEN * 16 if row["method"] == "l1" else 0
        assert row["n_bytes"] == 4 * row["n_parameters"] + bits // 8
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert (run / "compress.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("vocab_size", [tiny.VOCAB, GPTConfig().vocab_size])
@pytest.mark.parametrize("bias, layout", [(False, "per_branch"), (True, "per_branch"), (False, "c_fc")])
def test_the_narrower_folder_is_a_stock_gpt2_and_ours(out, vocab_size, bias, layout, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    name = f"wide-{vocab_size}-{bias}-{layout}"
    run = tiny.random_run(out, name, vocab_size=vocab_size, bias=bias, topo={"layout": layout})
    target = tmp_path / "narrow"
    main(run, "--method", "units", "--keep", "0.3", "--n_tokens", "96", "--out", target)
    assert "checked with transformers" in capsys.readouterr().out
    stock = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    assert type(stock).__name__ == "GPT2LMHeadModel" and stock.config.n_inner == 19
    back = load.load_model(target)
    assert back.model.cfg.n_inner == 19 and len(back.positions) == 4
    assert back.model.n_parameters() < load_run(run).model.n_parameters()
    tokens = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = back.model(tokens).logits[..., : stock.config.vocab_size]
        assert (ours - stock(tokens).logits).abs().max() < 1e-4
    card = (target / "README.md").read_text()
    assert "19 hidden units of 64" in card and "before it was made smaller" in card
    assert not (target / "metrics.jsonl").exists()
    row = json.loads((run / "compress.json").read_text())["models"][0]["rows"][1]
    assert f"{row['loss']:.4f}" in card and row["n_parameters"] == back.model.n_parameters()
    # and a run of that shape starts from it; one of another does not
    assert load.initial(back.model.cfg, target).cfg.n_inner == 19
    wide = dataclasses.replace(back.model.cfg, n_inner=None)
    with pytest.raises(UserError, match="has n_inner 19, but model.n_inner = 64; give --model.n_inner 19"):
        load.initial(wide, target)


@pytest.mark.parametrize("n_inner", [None, 64, 1, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_the_cost_of_a_narrower_model(n_inner, bias):
    cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, bias=bias, n_inner=n_inner)
    cost, model = Cost(TrainConfig(run_name="x", model=cfg, topo=tiny.config(Path("x")).topo)), GPT(cfg)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == cost.shapes
    assert cost.n_parameters == model.n_parameters() == sum(part.parameters for part in cost.parts)
    mlp = next(part for part in cost.parts if part.name == "MLP")
    assert mlp.flops == 2 * 2 * 2 * 16 * (n_inner or 64)
    assert cost.palm_flops == model.flops_per_token()


def test_a_width_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="model.n_inner = 0 must be a finite number of at least 1"):
        GPTConfig(n_inner=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "0"], "keep = 0.0 must be above 0 and at most 1"),
        (["--keep", "0.5", "1.5"], "keep = 1.5 must be above 0 and at most 1"),
        (["--keep", "nan"], "keep = nan must be above 0"),
        (["--keep", "0.5", "0.5"], "keep = .0.5, 0.5. must be one or more, each once"),
        (["--keep", "0.01"], "keep = 0.01 leaves nothing of a sheet of 8x8 units"),
        (["--method", "l1", "--out", "x"], "out = x has no effect without --method units"),
        (["--n_tokens", "0"], "n_tokens = 0 must be"),
        (["--checkpoint", "step-9"], "has no checkpoint step-9; it has: step-000008"),
        (["--val_data_dir", "nowhere"], "val_data_dir: .*nowhere"),
        (["--control", "nowhere"], "run nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(out, arguments, message):
    run = tiny.random_run(out, "spared", vocab_size=tiny.VOCAB)
    before = files_in(out)
    with pytest.raises(UserError, match=message) as error:
        main(run, *arguments)
    assert "\n" not in str(error.value) and files_in(out) == before


def test_other_models_that_cannot_be_compressed(out, run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(UserError, match="is no export of ours"):
        main(run, "--out", tmp_path / "thesis")
    other = tiny.random_run(out, "other", vocab_size=tiny.VOCAB, n_layer=1)
    with pytest.raises(UserError, match="has n_layer 1, but .* has 2; give a control of the same shape"):
        main(run, "--control", other)
    path = other / "checkpoints" / "step-000008" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.mlp.c_fc.weight"].zero_()
    save_file(tensors, path)
    tiny.seal(path.parent)
    with pytest.raises(UserError, match="l1 has no weights to choose from"):
        main(other, "--method", "l1")
    tensors["transformer.h.0.ln_1.weight"][3] = torch.nan
    save_file(tensors, path)
    tiny.seal(path.parent)
    with pytest.raises(UserError, match="the loss of other is nan before it is compressed"):
        main(other)
    assert not (other / "compress.json").exists()


def test_the_script_ends_with_2_and_helps_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "compress.py", "nowhere"], cwd=tiny.ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import compress; compress.main(['--help'])"
    t0 = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"--keep" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - t0 < 1.5  # of the CPU, however busy it is


def test_the_defaults_are_all_methods():
    cfg = parse(CompressConfig, ["out/x"])
    assert (cfg.keep, cfg.method) == ((0.8, 0.5, 0.2), COMPRESSIONS)
