"""A run with rotary positions is exported as a stock Arcee that computes what ours does, and comes back.

pytest tests/sharing/test_arcee.py
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from topogpt.errors import UserError
from topogpt.runs import checkpoint
from topogpt.settings import GPTConfig
from topogpt.sharing import arcee, export
from topogpt.sharing.load import initial, load_folder, load_model

transformers = pytest.importorskip("transformers", reason="exported folders are proved with transformers")

ROTARY = {"norm": "rmsnorm", "position": "rope", "tied": False}
C_PROJ = "transformer.h.0.attn.c_proj.weight"
UP = torch.tensor(torch.inf)


def arcee_run(out: Path, name: str = "run", **model) -> Path:
    return tiny.random_run(out, name, **({"vocab_size": tiny.VOCAB} | ROTARY | model))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """GPT-2's tokens, and a scale, 1 / sqrt(6), by which folding rounds."""
    full = GPTConfig().vocab_size
    return arcee_run(tmp_path_factory.mktemp("out"), vocab_size=full, n_layer=3, scale_attention=True)


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return export.export(run)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """An exported folder of two layers and 64 tokens."""
    return export.export(arcee_run(tmp_path_factory.mktemp("small"), scale_attention=True))


@pytest.fixture
def copy(small, tmp_path) -> Path:
    """To be spoilt."""
    return shutil.copytree(small, tmp_path / "copy")


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()


def some_tokens(n_vocab: int = tiny.VOCAB, shape=(2, 48)) -> torch.Tensor:
    return torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(1))


# ---- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"gelu": "tanh", "dropout": 0.0},
        {"scale_attention": True},
        {"scale_attention": True, "n_layer": 3, "gelu": "tanh"},
        {"tied": True, "n_inner": 24},
        {"bias": True, "scale_attention": True, "n_layer": 1},
        {"n_head": 8, "post_residual": True},
    ],
    ids=str,
)
def test_every_flavour_passes_the_proof_and_comes_back(tmp_path, model):
    run, lines = arcee_run(tmp_path, **model), []
    folder = export.export(run, say=lines.append)
    assert "the logits of" in lines[0] and type(theirs(folder)).__name__ == "ArceeForCausalLM"
    before, (cfg, weights, positions) = checkpoint.load_run(run), load_folder(folder)
    ours = dict(before.model.named_parameters())
    assert cfg == before.model.cfg and weights.keys() == ours.keys()
    for name, weight in ours.items():
        if cfg.scale_attention and cfg.n_layer != 2 and ".attn.c_proj." in name:
            last_place = (weight.nextafter(UP) - weight).abs()
            assert ((weights[name] - weight).abs() <= last_place).all()
        else:
            assert torch.equal(weights[name], weight), name
    assert all(np.array_equal(positions[s], before.positions[s]) for s in before.positions)


def test_folding_the_scale_is_undone_up_to_the_last_place():
    weight = 0.02 * torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    for n_layer, exact in ((2, True), (3, False), (8, True), (12, False), (32, True)):
        cfg = GPTConfig(n_layer=n_layer, scale_attention=True)
        folded = arcee.fold(cfg, weight)
        assert torch.allclose(folded, weight / (2 * n_layer) ** 0.5, rtol=1e-6, atol=0)
        back = arcee.unfold(cfg, folded)
        assert torch.equal(arcee.fold(cfg, back), folded)
        assert torch.equal(back, weight) == exact
        assert ((back - weight).abs() <= (weight.nextafter(UP) - weight).abs()).all()


def test_what_comes_back_computes_the_same_and_is_exported_to_the_same_bytes(run, folder, tmp_path):
    before, back, stock = checkpoint.load_run(run), load_model(folder), theirs(folder)
    beyond = some_tokens(50257, (2, 96))  # the context is 48
    with torch.no_grad():
        ours = before.model(beyond).logits
        assert ours.std() > 0.5
        assert (back.model(beyond).logits - ours).abs().max() < 1e-5 * ours.abs().max()
        assert (stock(beyond).logits - ours[..., :50257]).abs().max() < 1e-4
    again = export.write_folder(tmp_path / "again", run, before._replace(model=back.model))
    names = ["model.safetensors", "padding.safetensors", "config.json", "topography.json", "README.md"]
    assert [(again / name).read_bytes() == (folder / name).read_bytes() for name in names] == [True] * 5


def test_the_padding_rows_of_embedding_and_head_are_kept(run, folder):
    kept, ours = load_file(folder / "padding.safetensors"), checkpoint.load_run(run).model
    both = {"model.embed_tokens.weight": ours.transformer.wte, "lm_head.weight": ours.lm_head}
    assert kept.keys() == both.keys()
    for name, module in both.items():
        assert torch.equal(kept[name], module.weight[50257:]) and kept[name].shape == (47, 16)
        assert load_file(folder / "model.safetensors")[name].shape == (50257, 16)
    assert not torch.equal(*kept.values())


def test_what_lies_in_the_folder(folder):
    said = json.loads((folder / "config.json").read_text())
    assert said["hidden_act"] == "gelu" and said["intermediate_size"] == 64 and said["eos_token_id"] == 50256
    assert said["topography"]["scale_attention"] and said["topography"]["grid"] == [4, 4]
    tensors = load_file(folder / "model.safetensors")
    norms = [t for name, t in tensors.items() if "norm" in name]
    assert len(norms) == 7 and all(torch.equal(t, torch.ones(16)) for t in norms)
    words = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert words("The cortex<|endoftext|>")["input_ids"] == [464, 20223, 50256]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_space_comes_back_to_the_same_bytes(run, tmp_path, dtype):
    loaded, said = checkpoint.load_run(run), []
    first = export.write_folder(tmp_path / "hf", run, loaded, dtype, say=said.append)
    assert "checked with transformers" in said[0]
    stored = load_file(first / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    back = load_model(first)
    for name, weight in loaded.model.state_dict().items():  # rounded to what comes back
        assert torch.equal(weight, back.model.state_dict()[name]), name
    again = export.write_folder(tmp_path / "again", run, loaded._replace(model=back.model), dtype)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


# ---- sheets and card -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, post_residual", [("per_branch", False), ("per_branch", True), ("c_fc", False)]
)
def test_the_modules_named_show_our_sheets(tmp_path, layout, post_residual):
    topo = {"layout": layout, "radius": 2}
    run = arcee_run(tmp_path, topo=topo, post_residual=post_residual, scale_attention=True)
    folder, tokens, shown = export.export(run), some_tokens(), {}
    stock, loaded = theirs(folder), checkpoint.load_run(run)
    modules = json.loads((folder / "topography.json").read_text())["shown_by"]
    assert list(modules) == list(loaded.positions)
    for sheet, where in modules.items():
        name, part = where.split()
        module = stock.get_submodule(name)
        if part == "(input)":
            module.register_forward_pre_hook(lambda _, inputs, sheet=sheet: shown.update({sheet: inputs}))
        else:
            module.register_forward_hook(lambda _, inputs, out, sheet=sheet: shown.update({sheet: out}))
    with torch.no_grad():
        stock(tokens)
        ours = loaded.model(tokens, activations=list(modules)).activations
    assert shown.keys() == ours.keys()
    for sheet, found in shown.items():
        found = found[0] if isinstance(found, tuple) else found
        assert ours[sheet].std() > 0.02 and (found - ours[sheet]).abs().max() < 1e-4, sheet


def test_the_card_says_the_class_and_its_code_runs(folder, tmp_path):
    places = [folder]
    for name, layout, more in (("fc", "c_fc", {}), ("one", "one_sheet", {"post_residual": True})):
        topo = {"layout": layout, "radius": 2}
        places.append(export.export(arcee_run(tmp_path, name, topo=topo, **more)))
    cards = [(place / "README.md").read_text() for place in places]
    assert "`ArceeForCausalLM` (exact GELU, no biases, rotary positions" in cards[0]
    assert "untied head) and needs no code" in cards[0] and "- arcee" in cards[0]
    assert "beyond 48 tokens" in cards[0] and "1 / sqrt(6)" in cards[0] and "1 / sqrt" not in cards[1]
    assert "of the embedding and the head" in cards[0] and "outputs of `mlp.up_proj`" in cards[1]
    assert not re.search(r"GPT2LM|transformer\.h|c_fc", "".join(cards))
    for i, card in enumerate(cards):
        (tmp_path / f"card{i}.py").write_text(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    each = "for i in range(1, 7, 2): os.chdir(sys.argv[i]); runpy.run_path(sys.argv[i + 1])"
    arguments = [str(path) for i, place in enumerate(places) for path in (place, tmp_path / f"card{i}.py")]
    command = [sys.executable, "-c", f"import os, runpy, sys\n{each}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor([[") == 3 and done.stdout.count("The cortex") == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what peft still calls
def test_a_lora_step_with_peft(small):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model = peft.get_peft_model(theirs(small), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    losses = tiny.losses_of_steps(model, some_tokens())
    assert losses[-1] < losses[0]


# ---- runs that start from it -----------------------------------------------------------------------


def test_a_run_starts_from_an_export(small, tmp_path):
    import train

    there = load_folder(small)
    model = {"n_layer": 2, "block_size": 16, **ROTARY, "scale_attention": True}
    tiny.no_pictures()
    cfg = tiny.config(tiny.write_shards(tmp_path), model=model, init_from=str(small), max_steps=2)
    train.train(cfg)
    begun = checkpoint.load_run(tiny.folder_of(cfg), "last")
    assert np.array_equal(begun.positions["layer.1.mlp"], there.positions["layer.1.mlp"])
    moved = (begun.model.lm_head.weight - there.weights["lm_head.weight"]).abs().max()
    assert 0 < moved < 0.05 < there.weights["lm_head.weight"].std()
    with pytest.raises(UserError, match="has scale_attention True, but model.scale_attention = False"):
        initial(replace(there.cfg, scale_attention=False), small)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, position", [("layernorm", "rope"), ("rmsnorm", "learned")])
def test_what_no_stock_class_computes_is_refused(tmp_path, norm, position):
    run = arcee_run(tmp_path, norm=norm, position=position)
    with pytest.raises(UserError, match=f"model.norm = {norm} with model.position = {position}") as error:
        export.export(run)
    assert "\n" not in str(error.value) and not (run / "hf").exists()


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HEAD, YARN = "lm_head.weight", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
K, NORM = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"
SPOIL = {
    f"{K} is missing, but our model has (16, 16)": lambda f: edit_weights(f, lambda t: t.pop(K)),
    f"{K} is (8, 16), but our model": lambda f: edit_weights(f, lambda t: t.update({K: torch.ones(8, 16)})),
    "lm_head.weight is missing": lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")),
    f"{NORM} is not 1 everywhere": lambda f: edit_weights(f, lambda t: t[NORM].mul_(1.5)),
    "lm_head.weight is not model.embed_tokens.weight": lambda f: edit_config(f, tie_word_embeddings=True),
    "no such weight": lambda f: edit_weights(f, lambda t: t.update({"model.gate": torch.ones(2)})),
    "damaged or missing": lambda f: (f / "model.safetensors").write_bytes(b""),
    "config.json cannot be read": lambda f: (f / "config.json").write_text(""),
    "holds a list, not an object": lambda f: (f / "config.json").write_text("[]"),
    "model_type = llama, but our GPT computes as gpt2 or arcee": lambda f: edit_config(f, model_type="llama"),
    "no number hidden_size": lambda f: edit_config(f, hidden_size=None),
    "no number num_attention_heads": lambda f: edit_config(f, num_attention_heads=0),
    "num_key_value_heads = 1, but our GPT computes as with 2": lambda f: edit_config(
        f, num_key_value_heads=1
    ),
    "head_dim = 4, but our GPT computes as with 8": lambda f: edit_config(f, head_dim=4),
    "rope_theta = 5000": lambda f: edit_config(f, rope_parameters={"rope_theta": 5000.0}),
    "rope_theta = 6000": lambda f: edit_config(f, rope_parameters=None, rope_theta=6000.0),
    "rope_type = yarn": lambda f: edit_config(f, rope_parameters=YARN),
    "type = linear": lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
    "rms_norm_eps = 1e-05": lambda f: edit_config(f, rms_norm_eps=None),  # what leaving it out means
    "mlp_bias = True": lambda f: edit_config(f, mlp_bias=True),
    "hidden_act = relu2, but our GPT has only gelu": lambda f: edit_config(f, hidden_act=None),
}


@pytest.mark.parametrize("message", SPOIL)
def test_a_spoilt_or_foreign_folder_is_refused_in_one_line(copy, message):
    load_folder(copy)
    SPOIL[message](copy)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_folder(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [{HEAD: 47}, {HEAD: 47, "model.embed_tokens.weight": 3}])
def test_padding_that_does_not_fit_is_refused(folder, tmp_path, rows):
    place = shutil.copytree(folder, tmp_path / "copy")
    save_file({name: torch.zeros(n, 16) for name, n in rows.items()}, place / "padding.safetensors")
    with pytest.raises(UserError, match="the padding rows of .* do not fit; export it again"):
        load_folder(place)


def test_a_foreign_arcee_that_computes_as_ours_is_loaded(tmp_path):
    cfg = transformers.ArceeConfig(
        vocab_size=50257, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="gelu_new", max_position_embeddings=32, rms_norm_eps=1e-6, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    stock = transformers.ArceeForCausalLM(cfg).eval()
    stock.save_pretrained(tmp_path)
    loaded, tokens = load_model(tmp_path), some_tokens(50257, (2, 32))
    has = loaded.model.cfg
    assert (has.n_inner, has.gelu, has.tied, has.scale_attention) == (40, "tanh", False, False)
    assert has.vocab_size == GPTConfig().vocab_size and loaded.positions is None
    with torch.no_grad():
        ours, expected = loaded.model(tokens).logits, stock(tokens).logits
    assert expected.std() > 0.5 and (ours[..., :50257] - expected).abs().max() < 1e-4
    assert (ours.logsumexp(-1) - expected.logsumexp(-1)).max() < 1e-3


def swap(a: str, b: str):
    def change(tensors: dict) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return lambda f: edit_weights(f, change)


@pytest.mark.parametrize(
    "what, spoil",
    [
        ("write_weights", swap(K, K.replace("k_proj", "v_proj"))),
        ("write_weights", lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight"))),
        ("write_weights", lambda f: edit_weights(f, lambda t: t[NORM].mul_(1.1))),
        ("write_config", lambda f: edit_config(f, rope_parameters=YARN)),
        ("write_config", lambda f: edit_config(f, hidden_act="gelu_new")),
    ],
)
def test_the_proof_sees_a_difference(tmp_path, monkeypatch, what, spoil):
    run, whole = arcee_run(tmp_path, scale_attention=True), getattr(export, what)
    monkeypatch.setattr(export, what, lambda folder, *args: (whole(folder, *args), spoil(folder)))
    with pytest.raises(UserError, match="the exported model is not ours"):
        export.export(run)
    assert not (run / "hf").exists()
