"""Preparation equals a naive loop over tiktoken, whatever files feed it, and refuses what it cannot read.

pytest tests/text/test_prepare.py
"""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from texts import (
    DATA,
    ROOT,
    Document,
    bytes_of,
    check_against_naive,
    make_documents,
    run,
    tokens_of,
    write_jsonl,
    write_parquet,
)

import prepare_fineweb
from topogpt.errors import UserError
from topogpt.text import sources, vocabulary


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    texts.small_units(monkeypatch)


def test_parquet_gives_the_tokens_of_a_naive_loop_and_the_format_of_llm_c(tmp_path, gpt2):
    documents = make_documents(700)
    write_parquet(tmp_path / "corpus" / "b.parquet", documents[400:])
    write_parquet(tmp_path / "corpus" / "a.parquet", documents[:400])
    out = tmp_path / "out"
    manifest = run(out, "--source", tmp_path / "corpus")
    check_against_naive(out, manifest, documents, gpt2)
    assert manifest["documents"]["skipped"] == {"null": 0, "empty": 0, "not_text": 0}
    assert manifest["tokenizer_sha256"] in vocabulary.SHA256.values()
    assert str(tmp_path) not in json.dumps(manifest)
    assert [f["name"] for f in manifest["source"]["files"]] == ["corpus/a.parquet", "corpus/b.parquet"]
    sizes: dict[str, list[int]] = {"train": [], "val": []}
    for shard in manifest["shards"]:
        data = (out / shard["path"]).read_bytes()
        words = np.frombuffer(data[:1024], dtype="<i4")
        assert words[:3].tolist() == [20240520, 1, shard["tokens"]] and not words[3:].any()
        assert len(data) == 1024 + 2 * shard["tokens"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert (
            shard["path"] == f"{shard['split']}/corpus_{shard['split']}_{len(sizes[shard['split']]):06d}.bin"
        )
        sizes[shard["split"]].append(shard["tokens"])
    assert len(sizes["train"]) > 2
    assert all(size == 10_000 for split in sizes.values() for size in split[:-1])
    listed = {shard["path"] for shard in manifest["shards"]} | {"manifest.json"}
    assert set(bytes_of(out)) == listed  # nothing is left over


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_json_lines_give_the_tokens_of_a_naive_loop(tmp_path, gpt2, name):
    documents = make_documents(300)
    manifest = run(tmp_path / "out", "--source", write_jsonl(tmp_path / name, documents))
    check_against_naive(tmp_path / "out", manifest, documents, gpt2)


def test_each_small_text_file_is_a_document_of_its_own(tmp_path, gpt2):
    documents = [Document(None, d.text) for d in make_documents(60)]
    for i, document in enumerate(documents):
        name, data = f"{i:03d}.txt", document.text.encode()
        (tmp_path / name).write_bytes(data) if i % 2 else (tmp_path / f"{name}.gz").write_bytes(
            gzip.compress(data)
        )
    manifest = run(tmp_path / "out", "--source", tmp_path)
    check_against_naive(tmp_path / "out", manifest, documents, gpt2)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("joint", ["\n\n", "\n", " ", ""])
def test_a_large_text_file_is_cut_without_loss(tmp_path, monkeypatch, compress, joint):
    monkeypatch.setattr(sources, "CUT_BYTES", 3_000)
    text = joint.join("caf\u00e9 \u6f22\u5b57"[: i % 9 + 1] for i in range(30_000))
    path = tmp_path / ("c.txt.gz" if compress else "c.txt")
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    units = sources.plan(0, path, "", "text")
    pieces = [piece for unit in units for _, piece in sources.documents(unit, "text")]
    assert "".join(pieces) == text
    assert len(pieces) > 3 and max(len(piece.encode()) for piece in pieces) <= 43_000
    if joint == "\n\n":
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_documents_that_are_null_empty_or_no_text_are_skipped_and_counted(tmp_path, gpt2, capsys):
    values = ["one", None, "", "two", 5, None, ["x"], "   ", {"a": 1}]
    rows = [json.dumps({"text": text, "id": None}) for text in values] + ["", "[1]", '{"no": 1}', '"word"']
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl")
    assert manifest["documents"]["skipped"] == {"null": 3, "empty": 2, "not_text": 5}
    assert manifest["documents"]["train"] + manifest["documents"]["val"] == 2
    assert "3 null, 2 empty, 5 not text" in capsys.readouterr().out


def test_hostile_documents_are_tokenised(tmp_path, gpt2):
    rows = [r'{"text": "lone \ud800 surrogate", "id": "\udc00"}', '{"text": "' + " " * 1_100_000 + 'x"}']
    data = "\n".join(rows).encode() + b'\n{"text": "broken \xff utf-8"}\n\xef\xbb\xbf{"text": "mark"}'
    (tmp_path / "c.jsonl").write_bytes(data)
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl", "--val_fraction", 0)
    text = gpt2.decode(tokens_of(tmp_path / "out", manifest, "train"))
    expected = ["lone \ufffd surrogate", " " * 1_100_000 + "x", "broken \ufffd utf-8", "mark"]
    assert text == "".join("<|endoftext|>" + part for part in expected)


def test_parquet_of_every_text_type_and_with_broken_utf8_is_read(tmp_path):
    rows = ["one", None, "", "two"]
    types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for i, kind in enumerate(types):
        pq.write_table(pa.table({"body": pa.array(rows, pa.string()).cast(kind)}), tmp_path / f"{i}.parquet")
    broken = pa.array([b"three\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": broken}), tmp_path / "3.parquet")
    read = []
    for i, (name, path) in enumerate(sources.find_files([str(tmp_path)]).items()):
        for unit in sources.plan(i, path, name, "body"):
            read += [text for _, text in sources.documents(unit, "body")]
    assert read == rows * 3 + ["three\ufffd"]


def test_the_split_follows_the_id_and_not_the_order(tmp_path, gpt2):
    documents = make_documents(200)
    tokens = []
    for i, order in enumerate((documents, documents[::-1])):
        out = tmp_path / f"out{i}"
        manifest = run(out, "--source", write_jsonl(tmp_path / f"{i}.jsonl", order))
        text = gpt2.decode(tokens_of(out, manifest, "val"))
        tokens.append(sorted(text.split("<|endoftext|>")))
    assert tokens[0] == tokens[1]


def test_an_empty_validation_split_is_said_with_its_remedy(tmp_path, capsys):
    source = write_jsonl(tmp_path / "c.jsonl", make_documents(3))
    manifest = run(tmp_path / "out", "--source", source, "--val_fraction", 1e-9)
    assert manifest["documents"]["val"] == 0
    said = capsys.readouterr().out
    assert "no document fell into val at val_fraction = 1e-09" in said and "larger --val_fraction" in said


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the test data is not at {DATA}")
def test_openstax_gives_the_counts_of_a_naive_loop(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1 << 20)
    table = pq.read_table(DATA / "openstax" / "000_00000.parquet").slice(0, 1500)
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=200)
    rows = zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.parquet", shard_size=500_000)
    check_against_naive(tmp_path / "out", manifest, [Document(*row) for row in rows], gpt2)


@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak memory as Linux counts it")
def test_one_enormous_row_group_is_read_in_little_memory(tmp_path):
    text = "".join(random.Random(0).choices("abcdefgh ", k=50_000))
    table = pa.table({"text": pa.array([text[i:] for i in range(1000)])})
    table = pa.concat_tables([table] * 8)  # 400 MB in one row group
    options = {"use_dictionary": False, "write_statistics": False, "compression": "lz4"}
    pq.write_table(table, tmp_path / "c.parquet", **options)
    code = (
        "import pathlib, sys\nfrom topogpt.text import sources\n"
        "(unit,) = sources.plan(0, pathlib.Path(sys.argv[1]), '', 'text')\n"
        "print(sum(len(text) for _, text in sources.documents(unit, 'text')))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.parquet")]
    n_characters, peak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert int(n_characters) == 8 * sum(50_000 - i for i in range(1000))
    assert int(peak) < 300_000  # KB; a row group would be 400 MB more, and tokenising adds less than 100


# ---- mistakes -----------------------------------------------------------------------------------------


def write_cut_gzip(path: Path) -> None:
    write_jsonl(path, make_documents(200))
    path.write_bytes(path.read_bytes()[:-100])


MISTAKES = {
    "a source that is not there": (
        lambda d: ["--source", d / "no.parquet"],
        ["no.parquet does not exist", "pydoc"],
    ),
    "a folder without files": (lambda d: ["--source", d], ["holds no file of the kinds", "*.jsonl"]),
    "a file of an unknown kind": (
        lambda d: (d / "x.pdf").write_text("x") and ["--source", d / "x.pdf"],
        ["x.pdf has none of the known endings", "*.parquet"],
    ),
    "a parquet file without the column": (
        lambda d: ["--source", write_parquet(d / "x.parquet", make_documents(3)), "--text_column", "body"],
        ["text_column = body", "x.parquet", "url, text, id", "--text_column"],
    ),
    "a column that is no text": (
        lambda d: (
            pq.write_table(pa.table({"text": [1, 2]}), d / "x.parquet") or ["--source", d / "x.parquet"]
        ),
        ["text_column = text", "int64"],
    ),
    "json lines without the key": (
        lambda d: ["--source", write_jsonl(d / "x.jsonl", make_documents(3)), "--text_column", "body"],
        ["text_column = body", "x.jsonl", "id, text"],
    ),
    "a line that is not json": (
        lambda d: (d / "x.jsonl").write_text('{"text": "a"}\n{"text": \n') and ["--source", d / "x.jsonl"],
        ["x.jsonl: line 2 is not JSON", "--skip_broken"],
    ),
    "a parquet file that is none": (
        lambda d: (d / "x.parquet").write_text("PAR1" * 9) and ["--source", d / "x.parquet"],
        ["x.parquet cannot be read", "download or make it again"],
    ),
    "a truncated gzip file": (
        lambda d: write_cut_gzip(d / "x.jsonl.gz") or ["--source", d / "x.jsonl.gz"],
        ["x.jsonl.gz cannot be read"],
    ),
    "nothing but empty documents": (
        lambda d: (d / "x.jsonl").write_text('{"text": ""}\n') and ["--source", d / "x.jsonl"],
        ["no document with text was found", "1 empty"],
    ),
    "an output folder that is a file": (
        lambda d: (d / "f").write_text("") or ["--source", "pydoc", "--out_dir", d / "f" / "out"],
        ["out_dir = ", "cannot be written", "another --out_dir"],
    ),
    "an unknown flag": (lambda d: ["--sources", "pydoc"], ["unknown key sources", "did you mean source?"]),
    "a word where a number should be": (lambda d: ["--shard_size", "many"], ["shard_size", "many"]),
    "a shard size of zero": (lambda d: ["--shard_size", 0], ["shard_size = 0", "at least 1"]),
    "a fraction of one": (lambda d: ["--val_fraction", 1.0], ["val_fraction = 1.0", "below 1"]),
    "two sources": (
        lambda d: ["--source", "pydoc", "--dataset", "x"],
        ["source and dataset exclude each other"],
    ),
    "deleting files of one's own": (
        lambda d: ["--source", d, "--delete_source"],
        ["delete_source deletes downloaded files only"],
    ),
    "a setting without effect": (
        lambda d: ["--source", d, "--revision", "v1"],
        ["revision = v1 has no effect"],
    ),
    "a sample that is none": (lambda d: ["--config", "sample-11"], ["config = sample-11", "sample-10BT"]),
    "a vocabulary folder without one": (
        lambda d: ["--vocab_dir", d],
        ["vocab_dir = ", "vocab.bpe is missing"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_with_the_remedy(tmp_path, mistake):
    folder = tmp_path / "folder"
    folder.mkdir()
    make, words = MISTAKES[mistake]
    args = [str(arg) for arg in make(folder)]
    with pytest.raises(UserError) as raised:
        prepare_fineweb.main(["--out_dir", str(tmp_path / "out"), "--num_proc", "1", *args])
    message = str(raised.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_the_script_reports_a_mistake_without_a_traceback(tmp_path):
    command = [sys.executable, "prepare_fineweb.py", "--source", "no_such_file", "--out_dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        ended.stderr.startswith("error: source = no_such_file does not exist")
        and ended.stderr.count("\n") == 1
    )
