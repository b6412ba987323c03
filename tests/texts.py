"""Documents, files of them, their preparation in this process, what a naive loop makes of it; and shards."""

import functools
import gzip
import hashlib
import itertools
import json
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import prepare_fineweb
from topogpt.text import loader, shards, sources, tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
VAL = 0.1

Document = namedtuple("Document", "id text")
load = functools.cache(tokenizer.load)


def small_units(monkeypatch) -> None:
    """Many units of little text, no ranks from the environment, and one tokenizer for all runs."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(tokenizer, "load", load)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def make_documents(n: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    words = "The;cortex; is;\u6f22\u5b57;caf\u00e9;<|endoftext|>;3.14;\n\n;    ;it's".split(";")
    return [Document(f"<urn:{i}>", " ".join(rng.choices(words, k=rng.randint(1, 300)))) for i in range(n)]


def write_parquet(path: Path, documents: list[Document], row_group_size: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"url": ["u"] * len(documents), "text": [d.text for d in documents], "id": [d.id for d in documents]}
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, documents: list[Document]) -> Path:
    data = "".join(json.dumps(d._asdict()) + "\n" for d in documents).encode()
    if path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(data)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)
    return path


def run(out: Path, *args: object, num_proc: int = 1, shard_size: int = 10_000) -> dict:
    """Prepare in this process; the manifest."""
    prepare_fineweb.main(arguments(out, *args, num_proc=num_proc, shard_size=shard_size))
    return json.loads((out / "manifest.json").read_text())


def arguments(out: Path, *args: object, num_proc: int = 1, shard_size: int = 10_000) -> list[str]:
    flags = ["--out_dir", out, "--val_fraction", VAL, "--num_proc", num_proc, "--shard_size", shard_size]
    return [str(arg) for arg in (*flags, *args)]


def bytes_of(out: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of everything in a folder."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file()
    }


def tokens_of(out: Path, manifest: dict, split: str) -> list[int]:
    paths = [out / shard["path"] for shard in manifest["shards"] if shard["split"] == split]
    tokens = [np.fromfile(path, dtype="<u2", offset=1024) for path in paths]
    return np.concatenate(tokens).tolist() if tokens else []


def naive(documents: list[Document], encoding, val_fraction: float = VAL) -> dict[str, list[int]]:
    """The tokens of each split, by the slowest and plainest way."""
    tokens: dict[str, list[int]] = {"train": [], "val": []}
    for document in documents:
        key = document.text if document.id is None else document.id
        share = int(hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), 16) / 2**64
        tokens["val" if share < val_fraction else "train"] += [
            50256,
            *encoding.encode_ordinary(document.text),
        ]
    return tokens


def check_against_naive(out: Path, manifest: dict, documents: list[Document], gpt2) -> None:
    expected = naive(documents, gpt2.encoding)
    for split, tokens in expected.items():
        assert tokens_of(out, manifest, split) == tokens
        assert manifest["tokens"][split] == len(tokens)
        assert manifest["documents"][split] == tokens.count(50256)
    assert len(expected["val"]) > 0


# ---- shards -------------------------------------------------------------------------------------------


def write_shard(path: Path, tokens) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.asarray(tokens, dtype="<u2")
    path.write_bytes(shards.header(len(tokens)) + tokens.tobytes())
    return path


def open_quietly(*patterns, **options) -> loader.Corpus:
    options = {"key": "train_data_dir", "vocab_size": 50304, "log": lambda line: None} | options
    return loader.open_corpus([str(pattern) for pattern in patterns], **options)


def numbered(folder: Path, *sizes: int) -> loader.Corpus:
    """A corpus whose token i is i, cut into shards of these sizes."""
    ends = list(itertools.accumulate(sizes))
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        write_shard(folder / f"{i:03}.bin", np.arange(end - size, end))
    return open_quietly(folder)
