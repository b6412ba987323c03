"""The tokenizer equals tiktoken, and survives hostile text."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

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
