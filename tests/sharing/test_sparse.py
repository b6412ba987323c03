"""Pruned weights as masks and values, and connectomes on the Hub. Run: pytest tests/sharing/test_sparse.py"""

import json
from pathlib import Path

import fake_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file

import export as export_script
from topogpt.errors import UserError
from topogpt.model import connectome
from topogpt.runs.checkpoint import load_run
from topogpt.settings import GPTConfig
from topogpt.sharing import sparse, wirings
from topogpt.sharing.export import export

# The client uploads in a way that its own HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
hub_server = pytest.fixture(fake_hub.serve)
ARCEE = {"norm": "rmsnorm", "position": "rope", "tied": False, "scale_attention": True}


def pruned(out: Path, name: str, **model) -> Path:
    """A run whose weights are 0 where there is no connection, head and embedding too."""
    grown = []

    def prune(net) -> None:
        weights = {n: p.detach() for n, p in net.named_parameters()}
        masks = connectome.prune(weights, None, 0.7, exempt=["*.0.mlp.c_fc.weight"])
        about = {"generation": 3, "fraction": 0.7}
        grown.append((connectome.Connectome(connectome.signs(weights, masks), about), net.cfg))
        connectome.Masks(net, grown[0][0]).of_weights()

    run = tiny.random_run(out, name, change=prune, **model)
    connectome.write(run, *grown[0])
    return run


@pytest.mark.parametrize("model", [{}, ARCEE], ids=["gpt2", "arcee"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_and_values_are_the_dense_weights(tmp_path, model, dtype):
    run = pruned(tmp_path, "run", vocab_size=tiny.VOCAB, **model)
    said = []
    folder = export(run, dtype=dtype, sparse=True, say=said.append)
    dense, back = load_file(folder / "model.safetensors"), sparse.load(folder / sparse.FILE)
    assert dense.keys() == back.keys()
    for name, tensor in dense.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    there = sum(int(t.count_nonzero()) for t in dense.values())
    masks = sparse.masks_of(run, load_run(run).model.cfg)
    mask_bytes = sum(-(-mask.numel() // 8) for mask in masks.values())
    content = (folder / sparse.FILE).read_bytes()
    payload = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert payload == there * (2 if dtype == "bfloat16" else 4) + mask_bytes
    card = (folder / "README.md").read_text()
    assert "**It was trained under a connectome:** 3" in card and "Optimiser: AdamW" in card
    assert f"{there:,} of " in said[0] and "MB; dense" in said[0]


def test_the_padding_of_the_vocabulary_is_cut_from_masks_too(tmp_path):
    run = pruned(tmp_path, "run", **ARCEE)  # 50304 rows, of which the folder has 50257
    cfg = load_run(run).model.cfg
    masks = sparse.masks_of(run, cfg)
    assert masks["lm_head.weight"].shape == (50257, 16)
    assert "model.layers.0.mlp.up_proj.weight" not in masks and "model.layers.1.mlp.up_proj.weight" in masks
    folder = export(run, sparse=True, say=lambda line: None)
    assert all(
        torch.equal(t, load_file(folder / "model.safetensors")[n])
        for n, t in sparse.load(folder / sparse.FILE).items()
    )


def test_a_run_with_all_weights_is_refused(tmp_path):
    run = tiny.random_run(tmp_path, vocab_size=tiny.VOCAB)
    with pytest.raises(UserError, match="sparse = True: .* was trained under no connectome"):
        export(run, sparse=True)
    assert not (run / "hf").exists()


@pytest.fixture
def grown(tmp_path) -> Path:
    """What train_itp.py leaves, without its generations."""
    run = pruned(tmp_path, "run", vocab_size=tiny.VOCAB, **ARCEE)
    folder = tmp_path / "itp"
    folder.mkdir()
    for name in (connectome.FILE, connectome.RECORD):
        (folder / name).write_bytes((run / name).read_bytes())
    losses = {"before": 3.0, "pruned": 3.1, "inherited": 3.5, "random": 4.1}
    rows = [{"generation": 3, "kept": 0.3, "trained_under": 0.4, "cross_entropy": losses}]
    (folder / "itp.json").write_text(json.dumps({"generations": rows}))
    return folder


def test_a_connectome_goes_to_the_hub_and_comes_back(hub_server, grown, tmp_path, capsys):
    export_script.main([str(grown), "--push_to_hf", "alice/itp"])
    repo = hub_server.repos["alice/itp"]
    assert repo.tags.keys() == {"generation-3"}
    for name in (connectome.FILE, connectome.RECORD, "itp.json"):
        assert repo.files[name] == (grown / name).read_bytes()
    card = repo.files["README.md"].decode()
    assert "--connectome alice/itp" in card and "| 3 | 70.0 | 3.000 | 3.100 | 3.500 | 4.100 |" in card
    shape = GPTConfig(**json.loads((grown / connectome.RECORD).read_text())["model"])
    back, here = (connectome.read(name, shape).wiring for name in ("alice/itp", grown))
    assert back.keys() == here.keys() and all(torch.equal(back[n], here[n]) for n in here)
    export_script.main([str(grown / "hf"), "--push_to_hf", "alice/itp"])  # again, from the folder
    assert "pushed" in capsys.readouterr().out


def test_what_is_damaged_or_has_no_effect_is_one_line(grown, tmp_path):
    with pytest.raises(UserError, match="dtype = bfloat16 has no effect on a connectome"):
        export_script.main([str(grown), "--dtype", "bfloat16"])
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(UserError, match="holds no connectome; choose another --out"):
        wirings.export(grown, taken)
    data = bytearray((grown / connectome.FILE).read_bytes())
    data[-1] ^= 1
    (grown / connectome.FILE).write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        export_script.main([str(grown)])
    assert not (grown / "hf").exists()


def test_a_name_that_is_nowhere_is_one_line(hub_server):
    with pytest.raises(UserError, match="no folder here and could not be fetched from the Hub") as error:
        connectome.check("alice/nothing", GPTConfig())
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="tests/nothing does not exist"):  # no network for what looks local
        connectome.check("tests/nothing", GPTConfig())
