"""Preparation equals a naive loop over tiktoken, whatever kills it, divides it or feeds it."""

import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_fineweb
import sources
import tokenizer
from config import UserError

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SMALL_UNITS = (
    "import sources, sys; sources.UNIT_BYTES = 20_000; import prepare_fineweb as p; p.run_main(p.main)"
)
VAL = 0.1

Document = namedtuple("Document", "id text")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Many units of little text, and no ranks from the environment."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load()


def make_documents(n: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    words = [
        "The",
        "cortex",
        " is",
        "\u6f22\u5b57",
        "caf\u00e9",
        "<|endoftext|>",
        "3.14",
        "\n\n",
        "    ",
        "it's",
    ]
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
    shards = [
        np.fromfile(out / s["path"], dtype="<u2", offset=1024)
        for s in manifest["shards"]
        if s["split"] == split
    ]
    return np.concatenate(shards).tolist() if shards else []


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


# ---- what is written ------------------------------------------------------------------------------------


def test_parquet_gives_the_tokens_of_a_naive_loop_and_the_format_of_llm_c(tmp_path, gpt2):
    documents = make_documents(700)
    write_parquet(tmp_path / "corpus" / "b.parquet", documents[400:])
    write_parquet(tmp_path / "corpus" / "a.parquet", documents[:400])
    out = tmp_path / "out"
    manifest = run(out, "--source", tmp_path / "corpus")
    check_against_naive(out, manifest, documents, gpt2)
    assert manifest["documents"]["skipped"] == {"null": 0, "empty": 0, "not_text": 0}
    assert manifest["tokenizer_sha256"] in tokenizer.SHA256.values()
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
    monkeypatch.setattr(sources, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(sources, "CUT_BYTES", 3_000)
    text = joint.join("caf\u00e9 \u6f22\u5b57"[: i % 9 + 1] for i in range(30_000))
    path = tmp_path / ("c.txt.gz" if compress else "c.txt")
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    file = sources.SourceFile("c.txt", path, path.stat().st_size, "")
    units = sources.plan(0, file, text_column="text")
    pieces = [piece for unit in units for _, piece in sources.documents(unit, "text")]
    assert "".join(pieces) == text
    assert len(pieces) > 3 and max(len(piece.encode()) for piece in pieces) <= 43_000
    if joint == "\n\n":
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_documents_that_are_null_empty_or_no_text_are_skipped_and_counted(tmp_path, gpt2, capsys):
    texts = ["one", None, "", "two", 5, None, ["x"], "   ", {"a": 1}]
    rows = [json.dumps({"text": text, "id": None}) for text in texts] + ["", "[1]", '{"no": 1}', '"word"']
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl")
    assert manifest["documents"]["skipped"] == {"null": 3, "empty": 1, "not_text": 5}
    assert manifest["documents"]["train"] + manifest["documents"]["val"] == 3
    assert "3 null, 1 empty, 5 not text" in capsys.readouterr().out


def test_hostile_documents_are_tokenised(tmp_path, gpt2):
    rows = [r'{"text": "lone \ud800 surrogate", "id": "\udc00"}', '{"text": "' + " " * 1_100_000 + 'x"}']
    data = "\n".join(rows).encode() + b'\n{"text": "broken \xff utf-8"}\n\xef\xbb\xbf{"text": "mark"}'
    (tmp_path / "c.jsonl").write_bytes(data)
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl", "--val_fraction", 0)
    text = gpt2.decode(tokens_of(tmp_path / "out", manifest, "train"))
    expected = ["lone \ufffd surrogate", " " * 1_100_000 + "x", "broken \ufffd utf-8", "mark"]
    assert text == "".join("<|endoftext|>" + part for part in expected)


def test_parquet_of_every_text_type_and_with_broken_utf8_is_read(tmp_path):
    texts = ["one", None, "", "two"]
    types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for i, kind in enumerate(types):
        pq.write_table(pa.table({"body": pa.array(texts, pa.string()).cast(kind)}), tmp_path / f"{i}.parquet")
    broken = pa.array([b"three\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": broken}), tmp_path / "3.parquet")
    read = []
    for i, (name, path) in enumerate(sources.find_files([str(tmp_path)]).items()):
        file = sources.SourceFile(name, path, path.stat().st_size, "")
        for unit in sources.plan(i, file, text_column="body"):
            read += [text for _, text in sources.documents(unit, "body")]
    assert read == texts * 3 + ["three\ufffd"]


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


def test_python_documentation_is_in_order_and_runs_no_module():
    documents = list(sources.python_documents())
    assert {"antigravity", "this", "turtledemo.clock", "idlelib.idle"}.isdisjoint(sys.modules)
    names = [name for name, _ in documents]
    modules = [name for name in names if name.startswith("module/")]
    assert len(set(names)) == len(names) and modules == sorted(modules)
    assert {"topic/lambda", "module/json/decoder.py", "module/argparse.py"} <= set(names)
    assert not [name for name in names if "/test/" in name or "site-packages" in name]
    text = dict(documents)["module/json/decoder.py"]
    assert "function JSONDecoder.decode" in text
    assert sum(len(text) for _, text in documents) > 1_500_000


# ---- the same bytes, whatever happens -------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    write_parquet(folder / "a.parquet", make_documents(600, seed=1))
    write_jsonl(folder / "b.jsonl", make_documents(300, seed=2))
    write_jsonl(folder / "c.jsonl.zst", make_documents(100, seed=3))
    return folder


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, str]:
    """What one worker makes of the corpus, undisturbed."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 20_000)
        run(out, "--source", corpus, num_proc=1)
    return bytes_of(out)


def test_one_worker_and_three_write_the_same_bytes(tmp_path, corpus, expected):
    run(tmp_path / "other name", "--source", corpus, num_proc=3)
    assert bytes_of(tmp_path / "other name") == expected


def test_a_finished_folder_is_left_as_it_is(tmp_path, corpus, expected, capsys):
    for _ in range(2):
        run(tmp_path / "out", "--source", corpus)
    assert "nothing to do" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == expected


@pytest.fixture
def submitted(monkeypatch) -> list[str]:
    """Names of the units that are given to workers."""
    names: list[str] = []

    class Recorder(prepare_fineweb.ProcessPoolExecutor):
        def submit(self, function, *args):
            names.append(args[1])
            return super().submit(function, *args)

    monkeypatch.setattr(prepare_fineweb, "ProcessPoolExecutor", Recorder)
    return names


@pytest.mark.parametrize("n_sidecars", [1, 12])
def test_a_killed_run_continues_to_the_same_bytes_without_redoing_units(
    tmp_path, corpus, expected, submitted, n_sidecars
):
    out = tmp_path / "out"
    process = kill_when(out, corpus, lambda: len(list(out.glob(".parts/*-*.json"))) >= n_sidecars)
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    finished = {path.name.removesuffix(".json") for path in out.glob(".parts/*-*.json")}
    run(out, "--source", corpus)
    assert finished.isdisjoint(submitted) and submitted
    assert bytes_of(out) == expected


def test_a_run_killed_while_it_makes_shards_continues_to_the_same_bytes(
    tmp_path, corpus, expected, submitted
):
    out = tmp_path / "out"
    kill_when(out, corpus, lambda: list(out.glob("train/*.bin*")))
    run(out, "--source", corpus)
    assert not [name for name in submitted if not name.startswith(("train/", "val/"))]
    assert bytes_of(out) == expected


def kill_when(out: Path, corpus: Path, condition) -> subprocess.Popen:
    """Start a preparation and SIGKILL it; its workers must end, too."""
    command = [sys.executable, "-c", SMALL_UNITS, *arguments(out, "--source", corpus)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    t0 = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - t0 < 60:
        time.sleep(0.001)
    process.kill()
    process.wait()
    while still := workers_below(out):
        assert time.monotonic() - t0 < 70, still
        time.sleep(0.05)
    return process


def workers_below(out: Path) -> list[str]:
    """Processes that have a file of the folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(str(out)):
                found.append(str(link))
        except OSError:
            pass
    return found


def test_parts_of_other_settings_are_not_used(tmp_path, corpus, expected):
    out = tmp_path / "out"
    kill_when(out, corpus, lambda: len(list(out.glob(".parts/*-*.json"))) >= 5)
    manifest = run(out, "--source", corpus, "--val_fraction", 0.5)
    assert manifest["documents"]["val"] > 350
    fresh = run(tmp_path / "fresh", "--source", corpus, "--val_fraction", 0.5)
    assert manifest == fresh and bytes_of(out) == bytes_of(tmp_path / "fresh")


def test_a_damaged_part_is_made_again(tmp_path, corpus, expected):
    out = tmp_path / "out"
    kill_when(out, corpus, lambda: len(list(out.glob(".parts/*-*.json"))) >= 5)
    part = min(out.glob(".parts/*.train.bin"))
    part.write_bytes(part.read_bytes()[:-2])
    run(out, "--source", corpus)
    assert bytes_of(out) == expected


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_divide_the_units_and_rank_0_makes_the_shards(
    tmp_path, corpus, expected, submitted, monkeypatch, names
):
    out, of_rank = tmp_path / "out", {}
    for rank in (2, 1, 0):
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], "3")
        submitted.clear()
        prepare_fineweb.main(arguments(out, "--source", corpus, num_proc=1))
        of_rank[rank] = {name for name in submitted if "/" not in name}
        assert (out / "manifest.json").exists() == (rank == 0)
    sizes = [len(names) for names in of_rank.values()]
    assert max(sizes) - min(sizes) <= 1 and len(set.union(*of_rank.values())) == sum(sizes)
    assert bytes_of(out) == expected


def test_one_process_finishes_what_some_ranks_left(tmp_path, corpus, expected, submitted, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepare_fineweb.main(arguments(tmp_path / "out", "--source", corpus))
    before = set(submitted)
    monkeypatch.delenv("RANK")
    submitted.clear()
    run(tmp_path / "out", "--source", corpus)
    assert before and before.isdisjoint(submitted)
    assert bytes_of(tmp_path / "out") == expected


def test_rank_0_says_what_is_missing_when_the_others_do_nothing(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(prepare_fineweb, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(prepare_fineweb, "LOG_SECONDS", 0.2)
    with pytest.raises(UserError, match="the other ranks finished nothing.*units are missing"):
        run(tmp_path / "out", "--source", corpus)
    assert "rank 0 waits for 1 others" in capsys.readouterr().out


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert prepare_fineweb.read_ranks() == (0, 1, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert prepare_fineweb.read_ranks()[:2] == (0, 4)


@pytest.mark.parametrize("num_proc", [1, 3])
def test_max_tokens_keeps_the_first_documents_that_reach_it(tmp_path, corpus, gpt2, submitted, num_proc):
    documents = make_documents(600, seed=1) + make_documents(300, seed=2)
    limit, n_tokens, kept = 31_234, 0, []
    while n_tokens < limit:
        kept.append(documents[len(kept)])
        n_tokens += 1 + len(gpt2.encode(kept[-1].text))
    out = tmp_path / "out"
    manifest = run(out, "--source", corpus, "--max_tokens", limit, num_proc=num_proc)
    check_against_naive(out, manifest, kept, gpt2)
    assert sum(manifest["tokens"].values()) == n_tokens
    n_units = len({name[:11] for name in submitted if "/" not in name})
    assert n_units < 14  # of more than 40: the rest is not tokenised


# ---- mistakes -------------------------------------------------------------------------------------------


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
        ["x.jsonl: the line at byte 14 is not JSON"],
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


def test_too_little_disk_is_said_before_the_work(tmp_path, corpus, monkeypatch, submitted):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1e9, 1e9, 1000))
    with pytest.raises(UserError, match=r"out_dir = .* GB free, and about .* GB are needed"):
        run(tmp_path / "out", "--source", corpus)
    assert not submitted


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, corpus):
    with prepare_fineweb.locked(tmp_path / "out", tmp_path / "out" / ".parts", 0):
        with pytest.raises(UserError, match="being prepared by another process"):
            run(tmp_path / "out", "--source", corpus)
    run(tmp_path / "out", "--source", corpus)


def test_a_folder_with_other_shards_is_refused_and_kept(tmp_path, corpus):
    run(tmp_path / "out", "--source", corpus)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(UserError, match="holds shards prepared with another val_fraction: 0.1"):
        run(tmp_path / "out", "--source", corpus, "--val_fraction", 0.2)
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="x.bin, which is in no manifest"):
        run(tmp_path / "foreign", "--source", corpus)
    after = {name: sha256 for name, sha256 in bytes_of(tmp_path / "out").items() if ".parts" not in name}
    assert after == before and (tmp_path / "foreign" / "train" / "x.bin").exists()


def die(unit, name):
    os._exit(1)


def test_a_worker_that_dies_is_one_clear_line(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "work", die)
    with pytest.raises(UserError, match="a worker process died.*smaller --num_proc"):
        run(tmp_path / "out", "--source", corpus)


def test_an_interrupt_ends_with_one_line_and_leaves_nothing_running(tmp_path, corpus):
    command = [sys.executable, "-c", SMALL_UNITS, *arguments(tmp_path / "out", "--source", corpus)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "out").glob(".parts/*-*.json")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; the same command continues from here"
    assert not workers_below(tmp_path / "out")


# ---- memory ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak memory as Linux counts it")
def test_one_enormous_row_group_is_read_in_little_memory(tmp_path):
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefgh ", k=50_000))
    schema = pa.schema({"text": pa.string()})
    texts = pa.array([text[i:] for i in range(1000)] * 8)  # 400 MB in one row group
    pq.write_table(pa.table({"text": texts}, schema), tmp_path / "c.parquet", use_dictionary=False)
    code = (
        "import sources, pathlib, sys; path = pathlib.Path(sys.argv[1])\n"
        "file = sources.SourceFile('c', path, path.stat().st_size, '')\n"
        "(unit,) = sources.plan(0, file, text_column='text')\n"
        "print(sum(len(text) for _, text in sources.documents(unit, 'text')))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.parquet")]
    n_characters, peak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert int(n_characters) == 8 * sum(50_000 - i for i in range(1000))
    assert (
        int(peak) < 300_000
    )  # KB; a whole row group would be 400 MB more, and tokenising adds less than 100


# ---- the Hub --------------------------------------------------------------------------------------------


class Refusal(OSError):
    """As huggingface_hub raises them."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"{status} from the Hub")
        self.response = types.SimpleNamespace(status_code=status, headers=headers)


class Hub:
    """Three parquet files under two commits, and a list of what goes wrong next."""

    def __init__(self, folder: Path) -> None:
        self.documents = make_documents(600)
        self.paths = {}
        for i in range(3):
            path = write_parquet(folder / f"{i}.parquet", self.documents[200 * i : 200 * i + 200])
            self.paths[f"sample/10BT/{i:03d}_00000.parquet"] = path
        self.commit = "a" * 40
        self.troubles: list[Exception | str] = []
        self.downloads: list[tuple[str, str]] = []

    def dataset_info(self, repo, *, revision):
        if self.troubles:
            raise self.troubles.pop(0)
        return types.SimpleNamespace(sha=self.commit)

    def list_repo_tree(self, repo, folder, **options):
        entry = types.SimpleNamespace
        yield entry(path=f"{folder}/README.md", size=3, lfs=None)
        for name, path in reversed(self.paths.items()):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            yield entry(path=name, size=path.stat().st_size, lfs=entry(sha256=sha256))

    def download(self, repo, name, *, repo_type, revision, local_dir):
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, Exception):
            raise trouble
        data = self.paths[name].read_bytes()
        target = Path(local_dir, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data[:-10] if trouble == "cut" else data)
        self.downloads.append((revision, name))
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    hub.slept = []
    monkeypatch.setattr(sources.time, "sleep", hub.slept.append)
    return hub


def test_fineweb_is_downloaded_and_tokenised_with_its_commit_recorded(tmp_path, hub, gpt2):
    manifest = run(tmp_path / "out")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert manifest["source"]["dataset"] == "HuggingFaceFW/fineweb-edu"
    assert manifest["source"]["config"] == "sample-10BT"
    assert manifest["source"]["revision"] == "a" * 40
    assert {revision for revision, _ in hub.downloads} == {"a" * 40} and len(hub.downloads) == 3
    assert len(list((tmp_path / "out" / "source").rglob("*.parquet"))) == 3


def test_delete_source_deletes_each_downloaded_file(tmp_path, hub, gpt2):
    manifest = run(tmp_path / "out", "--delete_source")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_trouble_with_the_hub_is_waited_out_as_the_server_asks(tmp_path, hub, gpt2):
    hub.troubles = [Refusal(429, **{"Retry-After": "17"}), ConnectionError("reset")]
    hub_list = hub.list_repo_tree
    hub.list_repo_tree = lambda *args, **options: (
        hub.troubles.extend([Refusal(503), "cut"]) or hub_list(*args, **options)
    )
    manifest = run(tmp_path / "out")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert hub.slept[:2] == [17, 4] and len(hub.slept) == 4


def test_a_hub_that_refuses_or_is_not_there_is_one_line_with_remedies(tmp_path, hub):
    hub.troubles = [Refusal(401)]
    with pytest.raises(UserError, match="cannot be had from the Hub.*401.*--source PATH.*HF_ENDPOINT"):
        run(tmp_path / "out")
    assert not hub.slept
    hub.troubles = [ConnectionError("no route\nto host")] * 3
    with pytest.raises(UserError, match="after 3 tries .ConnectionError: no route to host"):
        run(tmp_path / "out")


def test_a_restart_keeps_the_commit_and_the_finished_files(tmp_path, hub, gpt2, monkeypatch):
    assert run(tmp_path / "undisturbed")["source"]["revision"] == "a" * 40
    good = hub.paths["sample/10BT/002_00000.parquet"]
    monkeypatch.setattr(sources, "TRIES", 1)
    download, hub.downloads = hub.download, []

    def fail_at_the_third(repo, name, **options):
        if name.endswith("002_00000.parquet"):
            raise Refusal(404)
        return download(repo, name, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail_at_the_third)
    with pytest.raises(UserError, match=r"file 3 of 3, sample/10BT/002_00000.parquet .* 404"):
        run(tmp_path / "out", "--delete_source")
    assert good.exists() and len(hub.downloads) == 2
    hub.commit = "b" * 40
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    run(tmp_path / "out", "--delete_source")
    names = [name[-17:] for _, name in hub.downloads]
    assert names.count("002_00000.parquet") == 1 and names.count("000_00000.parquet") == 1
    assert {revision for revision, _ in hub.downloads} == {"a" * 40}
    expected = {
        name: h for name, h in bytes_of(tmp_path / "undisturbed").items() if not name.startswith("source")
    }
    assert {
        name: h for name, h in bytes_of(tmp_path / "out").items() if not name.startswith("source")
    } == expected


def test_max_tokens_downloads_no_more_files_than_it_needs(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sources, "TOKENS_PER_BYTE", 10)  # as in this text
    manifest = run(tmp_path / "out", "--max_tokens", 1000, "--delete_source", num_proc=1)
    assert 1000 <= sum(manifest["tokens"].values()) < 1400
    assert [name for _, name in hub.downloads] == ["sample/10BT/000_00000.parquet"]
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_ranks_download_each_file_once(tmp_path, hub, gpt2, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        prepare_fineweb.main(arguments(tmp_path / "out"))
    assert sorted(name for _, name in hub.downloads) == sorted(hub.paths)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)


class Dataset:
    """As `datasets` streams them."""

    def __init__(self, rows: list[dict], n_good: int | None = None) -> None:
        self.rows, self.n_good, self.n_read = rows, n_good, 0

    def skip(self, n: int):
        for i, row in enumerate(self.rows[n:], start=n):
            if i == self.n_good:
                raise ConnectionError("connection lost")
            self.n_read += 1
            yield row


@pytest.fixture
def dataset(monkeypatch, hub):
    def install(data: Dataset) -> Dataset:
        load = lambda *args, **options: data  # noqa: E731
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        return data

    return install


def test_any_dataset_is_streamed_and_continues_where_it_was_cut_off(tmp_path, dataset, gpt2):
    documents = make_documents(500)
    rows = [{"id": d.id, "text": d.text, "more": [1]} for d in documents]
    flags = ["--dataset", "some/Thing", "--config", "en", "--split", "test"]
    dataset(Dataset(rows))
    manifest = run(tmp_path / "undisturbed", *flags)
    check_against_naive(tmp_path / "undisturbed", manifest, documents, gpt2)
    assert manifest["source"] == {
        "dataset": "some/Thing",
        "config": "en",
        "split": "test",
        "revision": "a" * 40,
    }
    dataset(Dataset(rows, n_good=300))
    with pytest.raises(UserError, match="dataset = some/Thing: ConnectionError: connection lost"):
        run(tmp_path / "out", *flags)
    rest = dataset(Dataset(rows))
    run(tmp_path / "out", *flags)
    assert rest.n_read < 450
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_a_streamed_dataset_is_divided_among_ranks_and_cut_at_max_tokens(
    tmp_path, dataset, gpt2, monkeypatch
):
    documents = make_documents(500)
    dataset(Dataset([{"text": d.text, "id": d.id} for d in documents]))
    run(tmp_path / "one", "--dataset", "thing")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        prepare_fineweb.main(arguments(tmp_path / "two", "--dataset", "thing"))
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    monkeypatch.delenv("RANK")
    manifest = run(tmp_path / "few", "--dataset", "thing", "--max_tokens", 9000)
    assert 9000 <= sum(manifest["tokens"].values()) < 9400


def test_mistakes_with_a_dataset_are_one_line(tmp_path, dataset, monkeypatch):
    dataset(Dataset([{"body": "x"}]))
    with pytest.raises(UserError, match="text_column = text is not in the dataset thing, which has body"):
        run(tmp_path / "out", "--dataset", "thing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package `datasets`; run `pip install"):
        run(tmp_path / "out", "--dataset", "thing")


class Server(http.server.BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download takes; the first answer is 429, the first file is cut."""

    files: dict[str, bytes]
    asked: list[str]
    commit = "c" * 40
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.headers.get('Range', '')}".strip())
        if len(self.asked) == 1:
            return self.answer(b"", 429, {"Retry-After": "0"})
        if "/revision/" in self.path:
            return self.answer(json.dumps({"id": sources.FINEWEB, "sha": self.commit}).encode())
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in self.files.items()
            ]
            return self.answer(json.dumps(entries).encode())
        data = self.files[self.path.partition(f"/resolve/{self.commit}/")[2]]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.asked[-1] == "GET" and self.asked.count("GET") == 4  # after the 429 and two questions
        self.answer(data[start:], 206 if start else 200, headers | {"Accept-Ranges": "bytes"}, cut=cut)

    def answer(self, data: bytes, status: int = 200, headers: dict | None = None, cut: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


def test_a_mirror_of_the_hub_is_used_and_a_cut_download_goes_on(tmp_path, gpt2):
    documents = make_documents(400)
    path = tmp_path / "x.parquet"
    columns = {"id": [d.id for d in documents], "text": [d.text for d in documents]}
    bulk = [
        random.Random(i).randbytes(60_000) for i in range(400)
    ]  # a client keeps what comes in 10 MB pieces
    pq.write_table(pa.table(columns | {"bulk": bulk}), path)
    Server.files, Server.asked = {"sample/10BT/000_00000.parquet": path.read_bytes()}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "prepare_fineweb.py", *arguments(tmp_path / "out")]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == Server.commit
    check_against_naive(tmp_path / "out", manifest, documents, gpt2)
    assert "GET bytes=10485760-" in Server.asked
