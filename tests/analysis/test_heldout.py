"""Tokens in words. pytest tests/analysis/test_heldout.py"""

from topogpt.analysis.heldout import words_of


def test_characters_of_several_tokens_are_whole(gpt2):
    text = "\u6f22\u5b57 isn\u2019t \U0001f9e0"
    shown = words_of(gpt2.encode(text), 50304)
    assert "".join(shown) == text and "" in shown and "\ufffd" not in "".join(shown)


def test_tokens_apart_are_decoded_one_by_one(gpt2):
    tokens = gpt2.encode("\u6f22 the \u5b57 caf\u00e9 \U0001f9e0").tolist()
    assert words_of(tokens, 50304, apart=True) == [gpt2.decode([token]) for token in tokens]


def test_tokens_that_are_not_gpt2s_are_numbers():
    assert words_of([5, 63], 64) == [" 5", " 63"] and words_of([5, 63], 64, apart=True) == ["5", "63"]
    assert words_of([464, 50300], 50304) == ["The", " 50300"]
