"""Golden values: what no machine and no reshaping of the code may change. pytest tests/test_golden.py

Where one of these is meant to change, old shards, runs and maps no longer compare with new ones: say so in
docs/LOG.md, and copy the value of now from the message of the failed test (-vv shows all of it). Losses are
to a tolerance; whether every bit is the same, on one machine, is what compare_commits.py answers.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import texts
import tiny
import torch

from topogpt import rng, topo
from topogpt.config import parse
from topogpt.model.gpt import GPT
from topogpt.settings import GPTConfig, TopoConfig, TrainConfig
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.text.loader import Corpus, TokenLoader, open_corpus
from train import train

SHARDS = {  # of a text that is pinned, too
    "documents.jsonl": "eb933f9c37c52e8cc4f8b908e466f932eecb20a07c47b58ac2ba60c21b77288e",
    "notes.txt": "558bd110166cb2c893c0185d727aeb5c3cdb16be88a4ae18f323be00ee2e1f33",
    "train/corpus_train_000000.bin": "2ad36e2e66ac5777a4eab344a42af9ae567e0c177c5fcd1386fe295911af6d33",
    "train/corpus_train_000001.bin": "0b0b4546676d69dd20d3885be69dcd80a6af28819e6a11dba9ba3468dd3a3a65",
    "train/corpus_train_000002.bin": "d6a1ead78b1eefede4d43d995d49318a4defc08cbc1fc851b9ce9cceebde32ae",
    "train/corpus_train_000003.bin": "aed25a41a6cadd9f8967d41a3adc124824c3720bc76e6c342e84043e6d271a40",
    "train/corpus_train_000004.bin": "ddc497c27cce6b2fbc34813901295039b6ecf351b44b3456ef151d1832cadff7",
    "val/corpus_val_000000.bin": "f80c9bb3f28168f326cc96ed72e73c3e6fd7f7880e65477cf2ee67cec27e1660",
}
DOCUMENTS = {"train": 107, "val": 14, "skipped": {"null": 0, "empty": 0, "not_text": 0}}
FINGERPRINT = "908db251df2bad40e78eb43b1e4c6597af665d1779fa9a47a8899acadfcd27e1"
WINDOWS = {  # seed -> step -> windows of its eight sequences; an epoch is 31.25 steps
    1337: {
        0: [57, 34, 236, 116, 234, 169, 246, 219],
        1: [216, 121, 200, 115, 205, 124, 62, 213],
        31: [83, 103, 116, 56, 24, 63, 228, 158],
        62: [244, 246, 160, 120, 45, 200, 189, 105],
        1000: [167, 229, 197, 87, 216, 182, 118, 59],
    },
    0: {
        0: [61, 37, 29, 136, 16, 23, 182, 177],
        1: [208, 193, 236, 154, 141, 172, 189, 140],
        31: [6, 213, 221, 183, 125, 53, 177, 146],
        62: [83, 17, 171, 96, 212, 117, 215, 231],
        1000: [213, 202, 16, 163, 112, 69, 122, 55],
    },
}
EPOCHS = {1337: "6b44c6c6ccd0bc8d", 0: "a2e752ab2d39aab0"}  # seed -> order of three
MICRO_BATCHES = [  # of seed 1337, step 31: index, tokens, targets
    (0, "87643d523a138a86", "80eb265e8487ccc1"),
    (1, "2c657f2b33eee0d7", "bc1fcece7e8ffa53"),
    (2, "e01ba4c6cc81f71e", "abd9324c8872aec9"),
    (3, "6601a25132e4a50b", "18b4a5fdbad1d903"),
]
POSITIONS = {  # kind, units, seed, sheet -> all of them, the first four
    ("permuted", 784, 0, "layer.0.attn"): ("e256da4359579f0b", [[1, 11], [17, 9], [7, 5], [7, 11]]),
    ("permuted", 784, 0, "layer.11.mlp"): ("6ec0c8a0560e646b", [[8, 0], [22, 3], [7, 3], [11, 9]]),
    ("permuted", 784, 7, "layer.0.attn"): ("677eaa3dff6caec8", [[18, 5], [17, 7], [24, 14], [22, 15]]),
    ("permuted", 768, 0, "layer.3.mlp"): ("8e7ec4778b572fc8", [[16, 24], [5, 5], [23, 23], [0, 25]]),
    ("permuted", 144, 0, "layer.3.mlp"): ("44c7261a86fe91a9", [[2, 1], [1, 7], [0, 6], [10, 4]]),
    ("identity", 784, 0, "layer.0.attn"): ("dd54feeba5078600", [[0, 0], [0, 1], [0, 2], [0, 3]]),
    ("identity", 768, 7, "layer.3.mlp"): ("e278fc376adfb7cf", [[0, 0], [0, 1], [0, 2], [0, 3]]),
}
NEIGHBOURHOODS = {  # seed, step (-1: validation), micro-batch -> all sheets, the first, the last
    (1337, 0, 0): ("0d48fb520742e154", [97, 281, 39, 66, 378], [293, 182, 52, 180, 222]),
    (1337, 0, 1): ("db77b82bc773b49f", [129, 378, 192, 24, 263], [266, 304, 148, 314, 106]),
    (1337, 599_999, 19): ("5b9e56c850af5c70", [31, 302, 46, 307, 243], [194, 9, 391, 90, 29]),
    (1337, -1, 0): ("607eddc4914e10ee", [163, 334, 66, 390, 198], [61, 355, 188, 75, 155]),
    (0, 0, 0): ("f602947cd4254f10", [220, 165, 86, 149, 89], [249, 139, 70, 206, 144]),
}
SEEDS = {  # of torch, by their key
    (1337, "initialisation"): 6594907597869233292,
    (1337, "dropout", 0, 0): 171230620343203370,
    (1337, "dropout", 599_999, 19): 7987772348712945616,
}
PARAMETERS = {
    "connectome.yaml": 162_201_600,
    "connectome_debug.yaml": 15_482_880,
    "connectome_inner.yaml": 162_201_600,
    "connectome_inner_debug.yaml": 15_482_880,
    "control.yaml": 128_771_216,
    "debug.yaml": 8_258_832,
    "demo.yaml": 8_258_832,
    "no_connectome.yaml": 162_201_600,
    "no_connectome_debug.yaml": 15_482_880,
    "random_connectome.yaml": 162_201_600,
    "random_connectome_debug.yaml": 15_482_880,
    "topolm.yaml": 128_771_216,
    "toponets.yaml": 124_373_760,
    "toponets_control.yaml": 124_373_760,
    "topolm_10b.yaml": 128_771_216,
}
LOSSES = {  # split, step -> cross-entropy, spatial loss; Moran's I
    ("train", 1): [4.152501, 0.4987061],
    ("train", 10): [3.773844, 0.1103515],
    ("train", 24): [3.423477, 0.08859392],
    ("val", 0): [4.150132, 0.4833362, -0.02580292],
    ("val", 24): [4.147426, 0.1177080, 0.4095443],
}
TOLERANCE = 1e-4  # relative; with AVX2 and without, on one thread and on two, they differ by up to 2e-6


def sha256(integers: np.ndarray | torch.Tensor) -> str:
    """Of their little-endian int64, the first 16 digits."""
    return hashlib.sha256(np.ascontiguousarray(integers, dtype="<i8").tobytes()).hexdigest()[:16]


def test_shards(tmp_path, monkeypatch):
    texts.small_units(monkeypatch)
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    texts.write_jsonl(corpus / "documents.jsonl", texts.make_documents(120))
    notes = "It's 3.14\u00a0\u6f22\u5b57 <|endoftext|>\r\n\n\n   caf\u00e9"
    (corpus / "notes.txt").write_bytes(notes.encode())
    manifest = texts.run(out, "--source", corpus)
    (out / "manifest.json").unlink()
    assert texts.bytes_of(corpus) | texts.bytes_of(out) == SHARDS
    assert manifest["documents"] == DOCUMENTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """4001 tokens in two shards, which are 250 windows of 16, no two of them alike."""
    folder, tokens = tmp_path_factory.mktemp("golden"), np.arange(4001) * 7919 % 50257
    tiny.write_shard(folder / "one.bin", tokens[:3000])
    tiny.write_shard(folder / "two.bin", tokens[3000:])
    return open_corpus([str(folder)], key="train_data_dir", vocab_size=50304)


def loader_of(corpus: Corpus, seed: int) -> TokenLoader:
    return TokenLoader(corpus, block_size=16, batch_size=8, per_device_batch_size=2, seed=seed)


@pytest.mark.parametrize("seed", WINDOWS)
def test_the_order_of_the_data(corpus, seed):
    with loader_of(corpus, seed) as loader:
        assert {step: loader.sequences(step).tolist() for step in WINDOWS[seed]} == WINDOWS[seed]
        assert sha256(np.concatenate([loader.order(epoch) for epoch in range(3)])) == EPOCHS[seed]


def test_micro_batches(corpus):
    assert corpus.fingerprint == FINGERPRINT
    with loader_of(corpus, 1337) as loader:
        found = [(batch.index, sha256(batch.tokens), sha256(batch.targets)) for batch in loader.step(31)]
    assert found == MICRO_BATCHES


def test_positions():
    found = {key: topo.positions(*key) for key in POSITIONS}
    assert {key: (sha256(p), p[:4].tolist()) for key, p in found.items()} == POSITIONS


def test_neighbourhoods():
    cfg = TopoConfig()
    loss = TopoLMLoss(cfg, sheet_positions(cfg, GPTConfig()))
    found = {key: loss.choose(*key) for key in NEIGHBOURHOODS}
    assert {key: (sha256(c), c[0].tolist(), c[-1].tolist()) for key, c in found.items()} == NEIGHBOURHOODS


def test_seeds():
    assert {key: rng.seed(*key) for key in SEEDS} == SEEDS


def test_numbers_of_parameters():
    assert {path.name: n_parameters(path) for path in (tiny.ROOT / "configs").glob("*.yaml")} == PARAMETERS


def n_parameters(config: Path) -> int:
    with torch.device("meta"):
        return GPT(parse(TrainConfig, [str(config), "--run_name", "a"]).model).n_parameters()


def test_losses(tmp_path):
    for split, period in (("train", 61), ("val", 59)):
        tiny.write_shard(tmp_path / split / "squares.bin", np.arange(4001) ** 2 % period)
    cfg = tiny.config(tmp_path, max_steps=24, eval_every=24, model={"dropout": 0.0})
    train(cfg)
    lines = {(line["split"], line["step"]): line for line in tiny.records(tiny.folder_of(cfg))}
    names = ("cross_entropy", "spatial_loss", "moran")
    found = {key: [lines[key][name] for name in names[: len(LOSSES[key])]] for key in LOSSES}
    assert found == {key: pytest.approx(values, rel=TOLERANCE) for key, values in LOSSES.items()}
