"""Sources that change, lie or are damaged: refused in one line, or repaired and counted.

pytest tests/text/test_damaged_sources.py
"""

import codecs
import gzip
import json
import os
import re
import threading
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from texts import make_documents, run, tokens_of, write_jsonl, write_parquet

import prepare_fineweb
from topogpt import files
from topogpt.errors import UserError
from topogpt.text import hub_sources, parts, prepared, sources


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    texts.small_units(monkeypatch)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", make_documents(100))


# ---- sources that are replaced while they are read --------------------------------------------------------


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"cortex", b"CORTEX"))
    os.utime(path, ns=(0, 0))


def replace_by_another(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"cortex", b"CORTEX"))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time: the inode tells
    other.replace(path)


def append(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b'{"text": "more"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, replace_by_another, append, Path.unlink])
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, corpus, monkeypatch, change):
    tokenise_unit, done = parts.tokenise_unit, []

    def changed_after_two(worker, unit):
        if len(done) == 2:
            change(corpus)
        done.append(unit)
        return tokenise_unit(worker, unit)

    monkeypatch.setattr(parts, "tokenise_unit", changed_after_two)
    with pytest.raises(UserError, match=r"c\.jsonl (was changed or replaced while|cannot be read)"):
        run(tmp_path / "out", "--source", corpus)
    assert len(done) == 3 and not (tmp_path / "out" / "manifest.json").exists()


def test_what_was_prepared_of_the_old_file_is_not_mixed_with_the_new(tmp_path, corpus, monkeypatch):
    test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, corpus, monkeypatch, rewrite)
    monkeypatch.undo()
    texts.small_units(monkeypatch)
    manifest = run(tmp_path / "out", "--source", corpus)
    assert manifest == run(tmp_path / "fresh", "--source", corpus)
    assert texts.bytes_of(tmp_path / "out") == texts.bytes_of(tmp_path / "fresh")


# ---- text that is no UTF-8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz", "c.jsonl"])
def test_byte_order_marks_are_honoured(tmp_path, gpt2, encoding, name):
    text = "caf\u00e9 \u6f22\u5b57 \U0001f600\r\n" * 2000  # of several units
    marks = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-16-le": codecs.BOM_UTF16_LE}
    row = json.dumps({"text": text}, ensure_ascii=False)
    content = f"{row}\n{row}" if "json" in name else text
    data = marks.get(encoding, b"") + content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    manifest = run(tmp_path / "out", "--source", tmp_path / name, "--val_fraction", 0)
    text = text * 2 if "json" in name else text.replace("\r\n", "\n")
    found = gpt2.decode(tokens_of(tmp_path / "out", manifest, "train")).replace("<|endoftext|>", "")
    assert found == text and "repaired" not in manifest["documents"]


BAD_TEXT = {
    "latin1.txt": "caf\u00e9 ".encode("latin-1"),
    "binary.txt": bytes(range(256)) * 4,
    "cut16.txt": "ab".encode("utf-16")[:-1],
    "alone16.txt": codecs.BOM_UTF16_LE + b"a\0\x00\xd8b\0",
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_text_that_is_no_utf8_is_repaired_counted_and_said(tmp_path, gpt2, capsys, name):
    (tmp_path / name).write_bytes(BAD_TEXT[name])
    manifest = run(tmp_path / "out", "--source", tmp_path / name, "--val_fraction", 0)
    assert manifest["documents"]["repaired"] == 1
    assert "\ufffd" in gpt2.decode(tokens_of(tmp_path / "out", manifest, "train"))
    assert "warning: 1 of 1 documents hold bytes that are no UTF-8" in capsys.readouterr().out


def test_few_repaired_documents_are_said_without_a_warning(tmp_path, capsys):
    rows = [json.dumps({"text": f"row {i}"}).encode() for i in range(2000)] + [b'{"text": "caf\xe9"}']
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(rows))
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl", num_proc=1)
    said = capsys.readouterr().out
    assert manifest["documents"]["repaired"] == 1
    assert "1 of 2,001 documents hold bytes" in said and "warning: 1" not in said


def test_repaired_documents_of_parquet_are_counted(tmp_path):
    broken = pa.array([b"three\xff", b"four"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "c.parquet")
    assert run(tmp_path / "out", "--source", tmp_path / "c.parquet")["documents"]["repaired"] == 1


# ---- lines that are no JSON --------------------------------------------------------------------------------


@pytest.fixture
def with_broken_lines(tmp_path) -> Path:
    lines = write_jsonl(tmp_path / "good.jsonl", make_documents(100)).read_text().splitlines()
    lines[69:69] = ['{"text": "half', "", "[" * 100_000]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    return tmp_path / "broken.jsonl"


@pytest.mark.parametrize("compress", [False, True])
def test_a_broken_line_stops_with_its_number(tmp_path, with_broken_lines, compress):
    path = with_broken_lines
    if compress:
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "b.jsonl.gz"
    with pytest.raises(UserError, match=r"line 70 is not JSON .*--skip_broken"):
        run(tmp_path / "out", "--source", path)


def test_broken_lines_are_skipped_and_counted_where_that_is_asked(
    tmp_path, with_broken_lines, capsys, monkeypatch
):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="line 70"):
        run(out, "--source", with_broken_lines)
    kept = len(list(out.glob(".parts/*.json")))
    assert kept > 1
    before = {path: path.stat().st_mtime_ns for path in out.glob(".parts/*-*.json")}
    monkeypatch.setattr(prepare_fineweb.shutil, "rmtree", lambda *args, **options: None)  # of the parts
    manifest = run(out, "--source", with_broken_lines, "--skip_broken")
    assert before.items() <= {p: p.stat().st_mtime_ns for p in before}.items(), "what was finished is kept"
    assert manifest["documents"]["skipped"] == {"null": 0, "empty": 0, "not_text": 0, "broken": 2}
    assert "2 broken" in capsys.readouterr().out
    good = run(tmp_path / "good", "--source", tmp_path / "good.jsonl")
    for split in ("train", "val"):
        assert tokens_of(out, manifest, split) == tokens_of(tmp_path / "good", good, split)
    (out / "manifest.json").unlink()
    for shard in [*out.glob("*/*.bin")]:
        shard.unlink()
    with pytest.raises(UserError, match="line 70"):  # the parts that left lines out are no whole ones
        run(out, "--source", with_broken_lines)


def test_a_file_that_starts_with_a_broken_line_is_skipped_into(tmp_path):
    (tmp_path / "c.jsonl").write_text('nonsense\n{"text": "a"}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        run(tmp_path / "out", "--source", tmp_path / "c.jsonl")
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl", "--skip_broken")
    assert manifest["documents"]["skipped"]["broken"] == 1


# ---- files that cannot be read -----------------------------------------------------------------------------


def doubled(names: list[str], path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names), path)


UNREADABLE = {
    "none.jsonl.gz": (lambda p: p.write_text('{"text": "a"}\n'), "cannot be read"),
    "none.txt.gz": (lambda p: p.write_text("text"), "cannot be read"),
    "none.jsonl.zst": (lambda p: p.write_text('{"text": "a"}\n'), "cannot be read"),
    "bits.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b"x")[:12] + b"\xff" * 40), "cannot be read"),
    "pipe.txt": (os.mkfifo, "is no file"),
    "twice.parquet": (lambda p: doubled(["text", "text"], p), "2 columns called text"),
    "ids.parquet": (lambda p: doubled(["text", "id", "id"], p), "2 columns called id"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    make, words = UNREADABLE[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{re.escape(name)}.*{words}"):
        run(tmp_path / "out", "--source", tmp_path / name)


def test_documents_of_blanks_alone_are_empty(tmp_path):
    texts_ = ["  ", "\n\n", "\t\u00a0\u3000", "a"]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts_))
    manifest = run(tmp_path / "out", "--source", tmp_path / "c.jsonl")
    assert manifest["documents"]["skipped"] == {"null": 0, "empty": 3, "not_text": 0}


# ---- what the Hub sends ------------------------------------------------------------------------------------


class Hub:
    """One parquet file, whose SHA-256 the Hub says; `sent` is what comes, in turn."""

    def __init__(self, folder: Path) -> None:
        self.good = write_parquet(folder / "g.parquet", make_documents(50)).read_bytes()
        self.name = "sample/10BT/000_00000.parquet"
        self.sha256 = files.sha256(folder / "g.parquet")
        self.sent: list[bytes] = []

    def dataset_info(self, repo, *, revision):
        return types.SimpleNamespace(sha="a" * 40)

    def list_repo_tree(self, repo, folder, **options):
        lfs = types.SimpleNamespace(sha256=self.sha256)
        yield types.SimpleNamespace(path=self.name, size=len(self.good), lfs=lfs)

    def download(self, repo, name, *, repo_type, revision, local_dir):
        target = Path(local_dir, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.sent.pop(0) if self.sent else self.good)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr("topogpt.retry.time.sleep", lambda seconds: None)
    return hub


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def test_a_download_with_another_hash_is_loaded_again(tmp_path, hub):
    hub.sent = [flipped(hub.good)]
    manifest = run(tmp_path / "out")
    (there,) = (tmp_path / "out" / "source").rglob("*.parquet")
    assert there.read_bytes() == hub.good and manifest["source"]["files"][0]["sha256"] == hub.sha256


def test_a_download_that_stays_wrong_is_one_line(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub_sources, "TRIES", 2)
    hub.sent = [flipped(hub.good)] * 2
    with pytest.raises(UserError, match="SHA-256"):
        run(tmp_path / "out")


def test_a_file_that_lay_there_is_checked_as_well(tmp_path, hub):
    there = tmp_path / "out" / "source" / hub.name
    there.parent.mkdir(parents=True)
    there.write_bytes(flipped(hub.good))
    run(tmp_path / "out")
    assert there.read_bytes() == hub.good


@pytest.mark.parametrize("name", ["../../x.parquet", "/x.parquet", "sample/../../x.parquet"])
def test_a_name_of_the_hub_that_leads_elsewhere_is_refused(tmp_path, hub, name):
    hub.name = name
    with pytest.raises(UserError, match="is no file below"):
        run(tmp_path / "out")
    assert not list(tmp_path.rglob("x.parquet"))


def test_a_plan_that_leads_elsewhere_deletes_nothing(tmp_path, hub, monkeypatch):
    victim = tmp_path / "victim.parquet"
    victim.write_bytes(hub.good)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(parts, "work", lambda unit: {}["stop"])
        run(out, "--delete_source")
    plan = out / ".parts" / "00000.units.json"
    content = json.loads(plan.read_text())
    for unit in content["units"]:
        unit["path"] = str(victim)
    plan.write_text(json.dumps(content))
    run(out, "--delete_source")
    assert victim.exists() and not list((out / "source").rglob("*.parquet"))


# ---- what lies in the folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../victim.txt", "/etc/victim.txt", "victim.txt", "train/../victim.txt", "train/x.txt", 3]
)
def test_an_assembly_deletes_shards_alone(tmp_path, corpus, name):
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    victims = [tmp_path / "victim.txt", out / "victim.txt"]
    for victim in victims:
        victim.write_text("mine")
    (out / ".parts" / "assembly.json").write_text(json.dumps({"shards": [name]}))
    with pytest.raises(UserError, match=r"assembly\.json is not as we write it"):
        run(out, "--source", corpus)
    assert all(victim.exists() for victim in victims)


SPOILT = [{"path": "../x.bin"}, {"path": 3}, {"tokens": "9"}, {"tokens": [9]}]


@pytest.mark.parametrize("change", SPOILT)
def test_a_spoilt_manifest_is_one_line(tmp_path, corpus, change):
    run(tmp_path / "out", "--source", corpus)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a manifest of ours"):
        run(tmp_path / "out", "--source", corpus)
    with pytest.raises(UserError, match=r"manifest\.json is broken" if "path" in change else "manifest"):
        texts.open_quietly(tmp_path / "out" / "train")


@pytest.mark.parametrize("missing", ["documents", "tokens"])
def test_a_manifest_that_lacks_its_counts_is_one_line(tmp_path, corpus, missing):
    run(tmp_path / "out", "--source", corpus)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[missing]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a manifest of ours"):
        run(tmp_path / "out", "--source", corpus)


def test_the_remedy_for_a_damaged_shard_works_as_it_is_written(tmp_path, corpus):
    out = tmp_path / "out"
    run(out, "--source", corpus)
    before = texts.bytes_of(out)
    shard = min(out.glob("train/*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="missing or damaged") as error:
        run(out, "--source", corpus)
    for name in re.search(r"delete (.*?), (.*?) and (.*?), and run", str(error.value)).groups():
        prepare_fineweb.shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    run(out, "--source", corpus)
    assert texts.bytes_of(out) == before


@pytest.mark.parametrize("counts", [{"tokens": 3}, {"tokens": {"train": "3", "val": 0}}, {"damage": []}])
def test_a_spoilt_sidecar_is_made_again(tmp_path, corpus, counts):
    out = tmp_path / "out"
    (unit, *_) = sources.Files([str(corpus)], "text").planned
    settings = parts.Settings("text", texts.VAL, prepared.VOCABULARY)
    there = parts.Parts(out / ".parts", settings)
    there.folder.mkdir(parents=True)
    fresh = parts.no_counts()._asdict() | counts
    files.write_json(there.sidecar(unit), {"key": settings.key(unit)} | fresh)
    assert there.read(unit) is None
    assert run(out, "--source", corpus)["documents"]["train"] > 50


# ---- what is said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_tokens, config, words",
    [
        (9_950_000_000, "topolm_10b.yaml", "10,120 steps: 1.0 epochs"),
        (11_000_000, "debug.yaml", "500 steps: 0.1 epochs"),
        (20_480, "debug.yaml", "--max_steps 100 "),
        (0, "debug.yaml", "--max_steps 1 "),
    ],
)
def test_the_next_command_fits_the_text(tmp_path, n_tokens, config, words):
    (tmp_path / "manifest.json").write_text(json.dumps({"tokens": {"train": n_tokens}}))
    said = prepare_fineweb.next_command(tmp_path)
    assert f"train.py configs/{config} --run_name NAME" in said and words in said


def test_hashing_and_making_shards_show_progress(tmp_path, corpus, monkeypatch):
    shown = []
    for module in (sources, parts):
        monkeypatch.setattr(module, "progress", lambda items, what, *n: shown.append(what) or items)
    run(tmp_path / "out", "--source", corpus)
    assert set(shown) == {"files hashed", "shards"}


def test_a_long_download_is_said_now_and_then(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub_sources, "LOG_SECONDS", 0.01)
    download, sleep = hub.download, threading.Event()

    def slowly(*args, **options):
        sleep.wait(0.2)
        return download(*args, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", slowly)
    run(tmp_path / "out")
    assert "GB are there of what is under way" in capsys.readouterr().out
