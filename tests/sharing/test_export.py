"""An exported run is a stock GPT-2 that computes what ours does, and comes back as the same model.

pytest tests/sharing/test_export.py
"""

import dataclasses
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

import export as export_script
from topogpt import topo, topography
from topogpt.errors import UserError
from topogpt.model.gpt import GPT, sheet_names
from topogpt.runs import checkpoint
from topogpt.settings import GPTConfig
from topogpt.sharing import card as modelcard
from topogpt.sharing import export, gpt2, proof
from topogpt.sharing import load as hf_import
from topogpt.text import tokenizer

transformers = pytest.importorskip("transformers", reason="exported folders are proved with transformers")

FULL = GPTConfig().vocab_size
TORTURE = [
    "The cortex",
    " leading and trailing ",
    "I'm you're we'll they'd it's 've 'S 'LL",
    "tabs\tand\r\nlines\n\n\n   indented\n        more",
    " " * 3000 + "x" + "\n" * 500,
    "1234567890 3.14159 0x1F 1e-9 \u00bd \u2168 \u0663",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "na\u00efve caf\u00e9 cafe\u0301 \u00df \u0130 \u0131 \u01c5",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0420\u0443\u0441",
    "\u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928 \u0e44\u0e17\u0e22",
    "\u00a0\u2003\u3000\u200b\ufeff\u00ad zero \x00 and \x1c\x1d\x7f control",
    "a" * 2000,
    "!?.,;:(){}[]<>/\\|@#$%^&*~`'\"-_=+" * 3,
    "<|endoftext", "|>", "< |endoftext|>", "<|ENDOFTEXT|>",
    "\ufffd \U0010ffff \ue000 \U000e0001",
    "def f(x):\n    return x ** 2  # comment\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tiny.random_run(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return export.export(run)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run whose tokens are not GPT-2's."""
    return tiny.random_run(tmp_path_factory.mktemp("small"), vocab_size=tiny.VOCAB)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The exported folder, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()


def some_tokens(n_vocab: int = 50257, shape=(2, 48)) -> torch.Tensor:
    return torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(1))


# ---- what stock transformers makes of it -----------------------------------------------------------


@pytest.mark.parametrize("model", [{"bias": True}, {"gelu": "tanh"}, {"bias": True, "gelu": "tanh"}])
def test_every_flavour_passes_the_proof_and_comes_back_the_same(tmp_path, model):
    run = tiny.random_run(tmp_path, **model)
    lines = []
    folder = export.export(run, say=lines.append)
    assert "the logits of" in lines[0]
    cfg, weights, _ = hf_import.load_folder(folder)
    assert cfg == checkpoint.load_run(run).model.cfg
    ours = dict(checkpoint.load_run(run).model.named_parameters())
    assert weights.keys() == ours.keys() and all(torch.equal(weights[n], ours[n]) for n in ours)


def test_logits_and_sheets_are_ours(run, folder):
    ours, stock, tokens = checkpoint.load_run(run).model, theirs(folder), some_tokens()
    shown = {}
    modules = json.loads((folder / "topography.json").read_text())["shown_by"]
    assert list(modules) == sheet_names(2)
    for sheet, where in modules.items():
        module = stock.get_submodule(where.split()[0])
        module.register_forward_hook(lambda _, inputs, out, sheet=sheet: shown.update({sheet: out}))
    with torch.no_grad():
        out = ours(tokens, activations=True)
        logits = stock(tokens).logits
    assert type(stock).__name__ == "GPT2LMHeadModel" and logits.shape[-1] == 50257
    assert logits.abs().max() > 1 and (logits - out.logits[..., :50257]).abs().max() < 1e-4
    for sheet, theirs_shown in shown.items():
        theirs_shown = theirs_shown[0] if isinstance(theirs_shown, tuple) else theirs_shown
        assert (theirs_shown - out.activations[sheet]).abs().max() < 1e-4, sheet


@pytest.mark.parametrize("layout", ["c_fc", "one_sheet"])
def test_other_sheets_are_exported_and_come_back(tmp_path, layout):
    run = tiny.random_run(tmp_path, vocab_size=64, topo={"layout": layout, "radius": 2})
    folder, tokens = export.export(run), some_tokens(64)
    loaded, back = checkpoint.load_run(run), hf_import.load_folder(folder)
    assert list(back.positions) == list(loaded.positions) == sheet_names(2, layout)
    assert all(np.array_equal(back.positions[name], p) for name, p in loaded.positions.items())
    said = json.loads((folder / "topography.json").read_text())
    grid = {"c_fc": [8, 8], "one_sheet": [8, 8]}[layout]
    assert said["grid"] == grid == json.loads((folder / "config.json").read_text())["topography"]["grid"]
    assert list(said["shown_by"]) == sheet_names(2, layout)
    if layout == "c_fc":
        stock, shown = theirs(folder), []
        module = stock.get_submodule(said["shown_by"]["layer.1.fc"].split()[0])
        module.register_forward_hook(lambda _, inputs, out: shown.append(out))
        with torch.no_grad():
            stock(tokens)
            ours = loaded.model(tokens, activations=["layer.1.fc"]).activations["layer.1.fc"]
        assert (shown[0] - ours).abs().max() < 1e-4


def test_a_post_residual_model_says_where_its_sheets_are(tmp_path):
    run = tiny.random_run(tmp_path, post_residual=True, vocab_size=64)
    folder, tokens, shown = export.export(run), some_tokens(64), {}
    stock = theirs(folder)
    modules = json.loads((folder / "topography.json").read_text())["shown_by"]
    for sheet, where in modules.items():
        name, part = where.split()
        module = stock.get_submodule(name)
        if part == "(input)":
            module.register_forward_pre_hook(lambda _, inputs, sheet=sheet: shown.update({sheet: inputs}))
        else:
            module.register_forward_hook(lambda _, inputs, out, sheet=sheet: shown.update({sheet: out}))
    with torch.no_grad():
        stock(tokens)
        ours = checkpoint.load_run(run).model(tokens, activations=True).activations
    for sheet, found in shown.items():
        found = found[0] if isinstance(found, tuple) else found
        assert (found - ours[sheet]).abs().max() < 1e-4, sheet
    assert hf_import.load_folder(folder).cfg.post_residual


def test_what_lies_in_the_folder(run, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["activation_function"] == "gelu" and config["vocab_size"] == 50257
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.1
    assert config["topography"]["grid"] == [4, 4] and config["topography"]["step"] == 8
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors and tensors["transformer.wte.weight"].shape == (50257, 16)
    assert all(not t.count_nonzero() for name, t in tensors.items() if name.endswith(".bias"))
    settings = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert settings["model"]["vocab_size"] == FULL and settings["optim"]["lr"] == 1e-2
    assert (folder / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever reads one file reads all
    leftovers = [path.name for path in folder.parent.iterdir() if path.name.startswith(".hf")]
    assert leftovers == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_stored_in_half_the_space(small, tmp_path, dtype):
    said = []
    folder = export.export(small, "last", tmp_path / dtype, dtype, say=said.append)
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert "checked with transformers" in said[0]
    assert not (folder / "vocab.json").exists() and not (folder / "padding.safetensors").exists()


def test_exporting_opens_no_socket(small, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert export.export(small, out=tmp_path / "hf").is_dir()


def test_without_transformers_it_says_that_nothing_was_checked(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = []
    assert export.export(small, out=tmp_path / "hf", say=said.append).is_dir()
    assert said[0].startswith("not checked against transformers, which is not installed")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what peft still calls
def test_a_lora_step_with_peft(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    losses = tiny.losses_of_steps(model, some_tokens())
    assert losses[-1] < losses[0]


# ---- the proof ------------------------------------------------------------------------------------


def spoil_config(key, value):
    whole = export.write_config

    def spoilt(folder, *args):
        whole(folder, *args)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return "write_config", spoilt


def spoil_weights(name, change):
    whole = export.write_weights

    def spoilt(folder, *args):
        whole(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors.get(name)).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return "write_weights", spoilt


ATTN = "transformer.h.1.attn.c_proj.weight"  # square: a forgotten transpose has the right shape


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda: spoil_config("activation_function", "gelu_new"),
        lambda: spoil_config("layer_norm_epsilon", 1e-3),
        lambda: spoil_config("n_head", 4),
        lambda: spoil_weights(ATTN, lambda t: t.T),
        lambda: spoil_weights("transformer.h.0.mlp.c_fc.bias", lambda t: t + 0.01),
        lambda: spoil_weights("transformer.wpe.weight", lambda t: t.roll(1, 0)),
        lambda: spoil_weights("transformer.h.0.attn.c_attn.weight", lambda t: t.T),
        lambda: spoil_weights("transformer.h.7.mlp.c_fc.bias", lambda none: torch.zeros(64)),
    ],
)
def test_a_difference_aborts_and_leaves_the_older_export(small, tmp_path, monkeypatch, spoilt):
    target = export.export(small, out=tmp_path / "hf")
    before = (target / "model.safetensors").read_bytes()
    name, function = spoilt()
    monkeypatch.setattr(export, name, function)
    with pytest.raises(UserError, match="the exported model is not ours|cannot load the exported model"):
        export.export(small, out=target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_tokenizer_is_compared(folder, copy):
    words = tokenizer.load()
    proof.check_tokenizer(copy, words)
    whole = json.loads((copy / "tokenizer.json").read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:2000]
    (copy / "tokenizer.json").write_text(json.dumps(whole))
    merges = (copy / "merges.txt").read_text().split("\n")
    (copy / "merges.txt").write_text("\n".join(merges[:2000]))
    with pytest.raises(UserError, match="the exported tokenizer gives other tokens"):
        proof.check_tokenizer(copy, words)


# ---- tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoTokenizer", "GPT2TokenizerFast", "GPT2Tokenizer", "vocab and merges"])
def test_the_tokenizer_equals_tiktoken(folder, tmp_path, kind):
    place = folder
    if kind == "vocab and merges":  # what readers without tokenizer.json have
        kind, place = "GPT2TokenizerFast", tmp_path
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(folder / name, place)
    stock = getattr(transformers, kind).from_pretrained(place, local_files_only=True)
    gpt2 = tokenizer.load().encoding
    for text in TORTURE:
        assert stock(text)["input_ids"] == gpt2.encode_ordinary(text), text[:40]
        assert stock.decode(stock(text)["input_ids"]) == text
    both = "one<|endoftext|>two <|endoftext|>"
    assert stock(both)["input_ids"] == gpt2.encode(both, allowed_special="all")
    assert stock.eos_token_id == stock.bos_token_id == 50256 and len(stock) == 50257
    assert stock.decode([464, 50256, 20223], skip_special_tokens=True) == "The cortex"


def test_the_end_of_text_can_be_read_as_plain_text(folder):
    stock = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    text = "one<|endoftext|>two"
    assert stock(text)["input_ids"] == tokenizer.load().encode(text).tolist()


# ---- and back -------------------------------------------------------------------------------------


def test_a_round_trip_changes_nothing(run, folder):
    before, back = checkpoint.load_run(run), hf_import.load_model(folder)
    assert back.model.cfg == before.model.cfg and not back.model.training
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, back.model.state_dict()[name]), name
    tokens, targets = some_tokens(), some_tokens().roll(-1, 1)
    with torch.no_grad():
        assert before.model(tokens, targets).loss.item() == back.model(tokens, targets).loss.item()
    assert list(back.positions) == list(before.positions)
    assert all(np.array_equal(back.positions[s], before.positions[s]) for s in before.positions)
    from_run = hf_import.load_model(run, "step-8")
    assert torch.equal(from_run.model.lm_head.weight, before.model.lm_head.weight)


def test_a_run_starts_from_an_export(run, folder):
    """--init_from: the model's sizes are those of the settings, which may shorten the context."""
    before = checkpoint.load_run(run)
    for source in (folder, run):
        cfg = dataclasses.replace(before.model.cfg, block_size=40, dropout=0.3)
        weights, positions = hf_import.initial(cfg, source)[1:]
        model = GPT(cfg)
        checkpoint.load_weights(model, weights)
        with torch.no_grad():
            tokens = some_tokens(shape=(2, 40))
            assert torch.equal(model.eval()(tokens).logits, before.model(tokens).logits)
        assert np.array_equal(positions["layer.1.mlp"], before.positions["layer.1.mlp"])
    for key, value in {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 64, "block_size": 64}.items():
        cfg = dataclasses.replace(before.model.cfg, **{key: value})
        with pytest.raises(UserError, match=f"init_from = .* has {key} .*, but model.{key} = {value}; give"):
            hf_import.initial(cfg, folder)


def stock_model(folder: Path, bias: bool = False, **settings) -> "transformers.GPT2LMHeadModel":
    defaults = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "activation_function": "gelu"}
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(defaults | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
            elif bias:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("bias, gelu", [(False, "gelu"), (True, "gelu"), (True, "gelu_new")])
def test_a_stock_gpt2_loads_and_computes_the_same(tmp_path, bias, gelu):
    stock, tokens = stock_model(tmp_path, bias=bias, activation_function=gelu), some_tokens(shape=(2, 32))
    cfg, weights, positions = hf_import.load_folder(tmp_path)
    assert (cfg.bias, cfg.gelu) == (bias, "exact" if gelu == "gelu" else "tanh")
    assert (cfg.vocab_size, cfg.block_size, cfg.dropout, positions) == (FULL, 32, 0.1, None)
    ours = hf_import.load_model(tmp_path).model
    with torch.no_grad():
        logits, theirs = ours(tokens).logits, stock(tokens).logits
        assert (logits[..., :50257] - theirs).abs().max() < 1e-4
        # The padding takes almost nothing from the real tokens.
        assert (logits.logsumexp(-1) - theirs.logsumexp(-1)).max() < 1e-3
    # The form of old files: without the first part of the names, with the masks of attention.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    assert hf_import.load_folder(tmp_path).weights.keys() == weights.keys()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation_function": "relu"}, "activation_function = relu, but our GPT has only gelu, gelu_new"),
        ({"vocab_size": 50300}, r"another vocabulary \(50300 tokens\) than GPT-2's 50257"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(tmp_path, settings, message):
    stock_model(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        hf_import.load_folder(tmp_path)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_word(folder: Path) -> None:
    words = json.loads((folder / "vocab.json").read_text())
    words.popitem()
    (folder / "vocab.json").write_text(json.dumps(words))


def swap_words(folder: Path) -> None:
    words = json.loads((folder / "vocab.json").read_text())
    words["!"], words['"'] = words['"'], words["!"]
    (folder / "vocab.json").write_text(json.dumps(words))


SPOIL = {
    "transformer.h.1.mlp.c_fc.bias is missing": lambda f: edit_weights(
        f, lambda t: [t["transformer.h.0.mlp.c_fc.bias"].add_(1), t.pop("transformer.h.1.mlp.c_fc.bias")]
    ),
    "transformer.wpe.weight is missing": lambda f: edit_weights(f, lambda t: t.pop("transformer.wpe.weight")),
    "lm_head.weight is not transformer.wte.weight": lambda f: edit_weights(
        f, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})
    ),
    "damaged or missing": lambda f: (f / "model.safetensors").write_bytes(b"half"),
    "config.json cannot be read": lambda f: (f / "config.json").write_text("{"),
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "50256 tokens in its tokenizer but vocab_size = 50257": drop_word,
    "another vocabulary": swap_words,
    "the sheets layer.0.attn are not those of a model of 2 layers": lambda f: topography.save_topography(
        f, {"layer.0.attn": topo.positions("identity", 16, 0, "x")}, kind="identity", seed=0
    ),
    "does not hold sheets of 8x8 units": lambda f: topography.save_topography(
        f,
        {f"layer.{i}.fc": topo.positions("identity", 16, 0, "x") for i in range(2)},
        kind="identity",
        seed=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOIL)
def test_a_spoilt_folder_is_refused_in_one_line(copy, message):
    SPOIL[message](copy)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        hf_import.load_folder(copy)
    assert "\n" not in str(error.value)


# ---- topography -----------------------------------------------------------------------------------


def test_whoever_may_read_a_new_file_may_read_the_weights(run, folder):
    for place in (run / "best", folder):
        modes = {path.name: oct(path.stat().st_mode) for path in place.iterdir()}
        assert len(set(modes.values())) == 1, modes


def test_the_topography_is_read_from_a_run_and_from_an_export(run, folder):
    expected = {s: topo.positions("permuted", 16, 0, s) for s in sheet_names(2)}
    for place in (run, run / "last", folder, str(folder)):
        found = topography.load_topography(place)
        assert (found.grid, found.unit_distance_mm, found.kind, found.seed) == ((4, 4), 1.0, "permuted", 0)
        assert list(found.positions) == list(expected)
        for sheet, position in expected.items():
            assert found.positions[sheet].dtype == np.int64 and np.array_equal(
                found.positions[sheet], position
            )


def test_the_topography_needs_no_torch(folder, run, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    code = "import sys, topo; print([len(topo.load_topography(f).positions) for f in sys.argv[1:]])"
    env = {"PYTHONPATH": f"{tmp_path}:{tiny.ROOT}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(run)], env=env, capture_output=True, text=True
    )
    assert done.stdout == "[4, 4]\n", done.stderr


def test_what_is_no_topography_is_refused(tmp_path, copy):
    with pytest.raises(ValueError, match="holds no topography"):
        topography.load_topography(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor the name of a repository"):
        topography.load_topography("no/such/folder")
    (copy / "topography.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read as a topography"):
        topography.load_topography(copy)


def test_layers_are_in_order():
    names = [f"layer.{i}.attn" for i in range(12)]
    assert sorted(sorted(names), key=topo.sheet_order) == names


# ---- the card -------------------------------------------------------------------------------------


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_code_in_the_cards_runs(folder, small, tmp_path):
    """As it stands, in the folder; one process for both kinds of card, as imports take long."""
    places = [folder, export.export(small, out=tmp_path / "hf")]
    for i, (layout, more) in enumerate(
        [("c_fc", {}), ("one_sheet", {}), ("one_sheet", {"post_residual": True})]
    ):
        topo = {"layout": layout, "radius": 2}
        run = tiny.random_run(tmp_path, f"{layout}{i}", vocab_size=tiny.VOCAB, topo=topo, **more)
        places.append(export.export(run))
    for i, place in enumerate(places):
        code = re.search(r"```python\n(.*?)```", card(place), re.DOTALL)[1]
        assert len([line for line in code.splitlines() if line and "import" not in line]) <= 13
        (tmp_path / f"card{i}.py").write_text(code)
    each = "for i in range(1, 11, 2): os.chdir(sys.argv[i]); runpy.run_path(sys.argv[i + 1])"
    command = [sys.executable, "-c", f"import os, runpy, sys\n{each}"]
    arguments = [str(path) for i, place in enumerate(places) for path in (place, tmp_path / f"card{i}.py")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor([[") == 5 and done.stdout.count("The cortex") == 1


def test_the_card_is_made_from_the_run(folder):
    from huggingface_hub import ModelCard

    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license, data.pipeline_tag) == (
        "transformers",
        "unknown",
        "text-generation",
    )
    assert {r.metric_type: r.metric_value for r in data.eval_results}["cross_entropy"] == 3.5
    text = card(folder)
    for part in (
        "2 layers",
        "sheet of 4x4 units",
        "3,072",
        "0.500 | white noise on this 4x4 grid",
        "2410.11516",
    ):
        assert part in text, part
    assert "Data: unknown" in text and str(folder) not in text


def test_the_card_names_the_data_of_the_manifest(tmp_path):
    shards = [{"path": "train/a.bin", "split": "train", "tokens": 5, "sha256": "ab"}]
    source = {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": "87f0"}
    (tmp_path / "manifest.json").write_text(json.dumps({"source": source, "shards": shards}))
    cfg = {"train_data_dir": [str(tmp_path / "train")]}
    fingerprint = hashlib.sha256(b"5 ab\n").hexdigest()
    found = modelcard.data_of(cfg, {"train_data_dir": fingerprint})
    assert (found.repo, found.licence) == ("HuggingFaceFW/fineweb-edu", "ODC-By 1.0")
    assert "sample-10BT, revision 87f0" in found.words
    assert modelcard.data_of(cfg, {"train_data_dir": "other tokens"}).repo is None


def test_the_card_shows_evaluations_and_the_picture(tmp_path):
    run = tiny.random_run(tmp_path, vocab_size=64)
    (run / "evals").mkdir()
    (run / "evals" / "topography.json").write_text(json.dumps({"moran": {"mean": 0.625}, "maps": [1, 2]}))
    (run / "maps").mkdir()
    (run / "maps" / "step-000008.png").write_bytes(b"a picture")
    folder = export.export(run, repo_id="alice/maps")
    assert "| topography | moran.mean | 0.625 |" in card(
        folder
    ) and "\n\n![one token on every sheet](sheets.png)\n\n" in card(folder)
    assert (folder / "sheets.png").read_bytes() == b"a picture"
    assert 'snapshot_download("alice/maps")' in card(folder)


def test_the_card_puts_numbers_beside_their_nulls_and_says_what_is_untrained(tmp_path):
    run = tiny.random_run(tmp_path, vocab_size=64, step=0)
    (run / "evals").mkdir()
    said = {"Moran's I of a - b": {"value": 0.78, "item labels shuffled": 0.778, "p": 0.43}, "x": 2.0}
    (run / "evals" / "contrasts.json").write_text(json.dumps({"summary": said, "results": {"y": 1}}))
    text = card(export.export(run))
    assert "| contrasts | Moran's I of a - b | 0.78 (item labels shuffled 0.778, p 0.43) |" in text
    assert "| contrasts | x | 2 |" in text and "shuffled\nlabels" in text
    assert "**It is untrained:** these are the weights of step 0." in text
    floor, sd = modelcard.noise_floor(4, 4)
    assert f"white noise on this 4x4 grid: {floor:.3f} +- {sd / (4 * 48) ** 0.5:.3f}" in text  # 4 sheets


def test_the_noise_floor_is_about_zero():
    mean, spread = modelcard.noise_floor(28, 28)
    assert abs(mean) < 0.01 and 0.01 < spread < 0.03


# ---- bad input ------------------------------------------------------------------------------------


def one_line(capsys, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        export_script.main([str(a) for a in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_gets_one_line(capsys, small, tmp_path):
    assert "does not exist" in one_line(capsys, tmp_path / "none")
    assert "has no checkpoint best; it has: none" in one_line(capsys, tmp_path)
    assert "has no checkpoint step-9; it has: step-000008" in one_line(
        capsys, small, "--checkpoint", "step-9"
    )
    assert "not best, last or step-N" in one_line(capsys, small, "--checkpoint", "newest")
    assert "no effect without --push_to_hf" in one_line(capsys, small, "--private")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "is no export of ours" in one_line(capsys, small, "--out", tmp_path / "mine")
    half = shutil.copytree(small, tmp_path / "half", symlinks=True)
    (half / "checkpoints" / "step-000008" / "state.json").unlink()
    assert "state.json" in one_line(capsys, half)
    (tmp_path / "file").write_text("")
    assert "nothing was exported" in one_line(capsys, small, "--out", tmp_path / "file" / "hf")


def test_a_model_of_numbers_that_are_none_is_refused(tmp_path):
    run = tiny.random_run(tmp_path, vocab_size=64)
    path = run / "checkpoints" / "step-000008" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.ln_1.weight"][3] = torch.nan
    save_file(tensors, path)
    tiny.seal(path.parent)
    with pytest.raises(UserError, match="transformer.h.0.ln_1.weight is not finite"):
        export.export(run)
    assert not (run / "hf").exists()


def test_an_architecture_that_gpt2_lacks_is_refused(small, monkeypatch):
    monkeypatch.setattr(gpt2, "EXPRESSIBLE", gpt2.EXPRESSIBLE - {"block_size"})
    with pytest.raises(UserError, match="model.block_size = 48 cannot be exported"):
        export.export(small)
    assert not (small / "hf").exists()


def test_push_to_hf_may_stand_alone(tmp_path):
    assert export_script.optional_value(["run", "--push_to_hf"]) == ["run", "--push_to_hf="]
    assert export_script.optional_value(["run", "--push_to_hf", "--private"]) == [
        "run",
        "--push_to_hf=",
        "--private",
    ]
    assert export_script.optional_value(["run", "--push_to_hf", "me/it"]) == ["run", "--push_to_hf", "me/it"]
    assert export_script.optional_value(["--push-to-hf", str(tmp_path)]) == ["--push-to-hf=", str(tmp_path)]
