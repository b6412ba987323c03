"""What a folder's files claim is compared, and is of the right kind, before a model is built of it.

pytest tests/sharing/test_claims.py
"""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from topogpt import topography
from topogpt.errors import UserError
from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig
from topogpt.sharing import stock
from topogpt.sharing.load import load_folder

KINDS = {"gpt2": {}, "arcee": {"norm": "rmsnorm", "position": "rope", "tied": False}}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    """A tiny exported model, without its tokenizer."""
    cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, **KINDS[request.param])
    tensors, _ = stock.to_stock(GPT(cfg), "float32")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stock.to_config(cfg, "float32")))
    return tmp_path


def claim(folder: Path, changes: dict) -> str:
    """The message that the folder gets with other values of keys of config.json; null where it has no key."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | changes))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_folder(folder)
    assert time.monotonic() - start < 2 and "\n" not in str(error.value)
    return str(error.value)


def test_the_folder_is_good(folder):
    assert load_folder(folder).cfg.n_layer == 2


@pytest.mark.parametrize(
    "ours, theirs, found",
    [
        ("n_layer", ("n_layer", "num_hidden_layers"), 2),
        ("n_embd", ("n_embd", "hidden_size"), 16),
        ("vocab_size", ("vocab_size",), 64),
    ],
)
@pytest.mark.parametrize("value", [20_000, 3, 10**30])
def test_a_size_that_the_weights_do_not_have_is_told_at_once(folder, ours, theirs, found, value):
    said = claim(folder, dict.fromkeys(theirs, value))
    assert f"{value}, but the safetensors file holds {found}" in said and ours in (ours, *theirs)


@pytest.mark.parametrize("value", ["2", 2.0, True, [2], {"a": 1}, -1])
def test_a_size_of_the_wrong_kind_is_one_line(folder, value):
    assert "has no number" in claim(folder, dict.fromkeys(("n_layer", "num_hidden_layers"), value))


WRONG = [  # keys of both kinds, a value that they may not have
    (("resid_pdrop", "attention_dropout"), "x"),
    (("resid_pdrop", "attention_dropout"), True),
    (("activation_function", "hidden_act"), ["gelu"]),
    (("n_inner", "intermediate_size"), "64"),
    (("n_inner", "intermediate_size"), [64]),
    (("model_type",), ["gpt2"]),
    (("rope_scaling",), 3),
    (("rope_parameters",), "default"),
    (("tie_word_embeddings",), "yes"),
    (("attention_bias", "scale_attn_weights"), 3),
]


@pytest.mark.parametrize("keys, value", WRONG)
def test_a_value_of_the_wrong_kind_is_one_line(folder, keys, value):
    said = claim(folder, dict.fromkeys(keys, value))
    assert "config.json" in said and any(key in said for key in (*keys, "number"))


@pytest.mark.parametrize("text", ["[" * 100_000, "3", '"a"', "{", '{"n_layer": 1' + "0" * 5000 + "}"])
def test_what_is_no_object_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_folder(folder)


VOCABULARIES = ['{"a": "x", "b": 1}', "[1]", '{"a": [1]}', '{"added_tokens": [3]}', '{"model": []}']


@pytest.mark.parametrize("text", VOCABULARIES)
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_of_the_wrong_kind_is_one_line(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(UserError):
        load_folder(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3, "a/../../b", ""])
def test_an_index_names_files_of_its_folder(folder, name):
    other = folder / "other"
    other.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(other / file if file == "config.json" else folder / file)
    weights = {key: name for key in load_file(folder / "model.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_folder(other)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": [1]}'])
def test_an_index_without_files_is_one_line(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_folder(folder)


@pytest.mark.parametrize("said", [[], {"sheets": 3}, {"sheets": [["a"]]}, {"unit_distance_mm": [1]}])
def test_a_topography_of_the_wrong_kind_is_one_line(folder, said):
    import numpy as np

    positions = {"layer.0.attn": np.stack(np.divmod(np.arange(16), 4), axis=1)}
    topography.save_topography(folder, positions, kind="identity", seed=0)
    (folder / "topography.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="cannot be read as a topography"):
        topography.load_topography(folder)


def test_wrong_shapes_are_found_after_the_sizes(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")))
    tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"is \(3,\), but our model has"):
        load_folder(folder)
