"""Word swapping and its windows. pytest tests/evals/test_timescales.py"""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from evals import timescales
from evals.timescales import FIRST, TimescalesConfig, measures_of, windows
from topogpt import topo
from topogpt.analysis import swaps
from topogpt.analysis.results import read
from topogpt.analysis.section import Table
from topogpt.analysis.subject import Subject
from topogpt.analysis.swaps import Swappable, differences
from topogpt.errors import UserError
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import GPTConfig

WORDS = "the folded sheet of cells in the neocortex knows what it saw before and says so to its neighbours"
TEXT = ". ".join([f"{WORDS.capitalize()}, again"] * 3)


def some_subject(block_size: int = 64) -> Subject:
    torch.manual_seed(0)
    cfg = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=50304)
    positions = {s: topo.positions("permuted", 16, 0, s) for s in sheet_names(2)}
    return Subject("random", GPT(cfg).eval(), positions, Path(), Path(), None, "")


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def found(text) -> swaps.Sequences:
    return swaps.read(some_subject(), text, 3, 12, None)


# ---- words and substitutes -----------------------------------------------------------------------


def test_sequences_are_plain_words_of_one_document(found, gpt2, tmp_path):
    words = TEXT.lower().replace(",", "").replace(".", "").split()
    assert found.words == [words[i : i + 12] for i in (0, 12, 24)]
    flat = [t for word in found.tokens[1] for t in word]
    assert flat == gpt2.encode(" " + " ".join(found.words[1])).tolist()
    stream = np.concatenate(
        [gpt2.encode_document(t) for t in ("One two three.", "It\u2019s 4 x_y A-b", "no")]
    )
    assert list(swaps.blocks(stream, gpt2, 2)) == [["one", "two"], ["it's", "x"], ["y", "a"]]
    with pytest.raises(UserError, match="no document of 90 words that fit 64 tokens; give fewer --n_words"):
        swaps.read(some_subject(), found.source, 1, 90, None)


def test_own_substitutes_are_likely_words_of_as_many_tokens_and_never_the_same(found, gpt2):
    model = some_subject().model
    made = swaps.of_model(model, found, FIRST, 3, None, seed=0)
    assert made == swaps.of_model(model, found, FIRST, 3, None, seed=0)
    assert made != swaps.of_model(model, found, FIRST, 3, None, seed=1)
    begins, goes_on = swaps.kinds_of_tokens(None)
    for sequence, tokens in zip(made, found.tokens, strict=True):
        assert list(sequence.substitutes) == list(range(FIRST, 12)) and sequence.words == tokens
        for k, substitute in sequence.substitutes.items():
            assert len(substitute) == len(tokens[k]) and substitute[0] != tokens[k][0]
            assert begins[substitute[0]] and goes_on[substitute[1:]].all()
            before = [50256, *(t for word in tokens[:k] for t in word)]
            with torch.no_grad():
                logits = model(torch.tensor([before]), last_only=True).logits[0, 0, : len(begins)].numpy()
            ranked = np.argsort(-np.where(begins, logits, -np.inf))[:4]
            assert substitute[0] in ranked
    assert any(len(s) > 1 for sequence in made for s in sequence.substitutes.values())


def test_substitutes_of_a_file_are_for_its_words_alone(found, gpt2, tmp_path):
    path = tmp_path / "fills.csv"
    path.write_text(
        "word,substitute\nsheet,leaf\nsheet,blanket\ncells,cells\ncells,neurons\n", encoding="utf-8"
    )
    made, digest = swaps.from_file(str(path), found, FIRST, None, seed=0)
    assert len(digest) == 64
    assert list(made[0].substitutes) == [2, 4]
    assert gpt2.decode(made[0].substitutes[4]) == " neurons"
    assert gpt2.decode(made[0].substitutes[2]) in (" leaf", " blanket")


# ---- what a swap changes -------------------------------------------------------------------------


def test_differences_are_those_of_whole_sequences_read_one_by_one(found):
    subject = some_subject()
    made = swaps.of_model(subject.model, found, FIRST, 3, None, seed=0)
    made[0].substitutes[5] = made[0].substitutes[5] + [262]  # a longer one
    seen = differences(subject, made, lags=3)
    assert seen.before < 1e-6  # a causal model
    assert seen.n_swaps[:, FIRST:].tolist() == [[2] * 10, [1] * 10] and seen.n_swaps[:, :FIRST].sum() == 0

    def words(sequence: list[list[int]], sheet: str) -> np.ndarray:
        tokens = torch.tensor([[50256, *(t for word in sequence for t in word)]])
        with torch.no_grad():
            x = subject.model(tokens, activations=True).activations[sheet][0].numpy()
        ends = np.cumsum([1, *map(len, sequence)])
        return np.stack([x[a:b].mean(0) for a, b in zip(ends, ends[1:], strict=False)])

    expected = np.zeros_like(seen.lagged)
    for i, sequence in enumerate(made):
        for s, sheet in enumerate(subject.sheets):
            original = words(sequence.words, sheet)
            for k, substitute in sequence.substitutes.items():
                other = words([*sequence.words[:k], substitute, *sequence.words[k + 1 :]], sheet)
                for t in range(k, min(k + 4, 12)):
                    expected[i % 2, s, k, t - k] += np.abs(original[t] - other[t])
    np.testing.assert_allclose(seen.lagged, expected, atol=1e-5)


def test_a_model_whose_units_see_only_the_current_token_has_a_window_of_one_word(found):
    subject = some_subject()
    made = swaps.of_model(subject.model, found, FIRST, 3, None, seed=0)
    with torch.no_grad():
        for block in subject.model.transformer.h:
            block.attn.c_proj.weight.zero_()  # nothing comes from other tokens
    seen = differences(subject, made, lags=4)
    curves = windows(seen.lagged.sum(0), seen.n_swaps.sum(0))
    measured = measures_of(curves)
    np.testing.assert_allclose(measured["window"], 1, atol=1e-4)
    assert curves.silent[[0, 2]].all() and not curves.silent[[1, 3]].any()  # attention says nothing
    fitted = measured["c"] * 2 ** -measured["a"] + (1 - measured["c"]) * np.exp(-measured["b"])
    assert fitted.max() < 2e-3


def test_windows_are_the_medians_of_the_ratios_over_the_times_that_count():
    draw = np.random.default_rng(0)
    lagged, n_swaps = draw.uniform(0.5, 2, (2, 12, 4, 3)).astype(np.float32), draw.integers(1, 4, 12)
    n_swaps[6] = 0
    found = windows(lagged, n_swaps)
    assert found.times.tolist() == [5, 10, 11]  # t - delta > 1, and word 6 was never swapped
    d = lagged / np.maximum(n_swaps, 1)[:, None, None]
    for unit in range(3):
        for delta in range(4):
            ratios = [d[1, t - delta, delta, unit] / d[1, t, 0, unit] for t in found.times]
            assert found.theta[1, unit, delta] == pytest.approx(np.median(ratios), rel=1e-5)
    n_swaps[[4, 8]] = 0
    with pytest.raises(UserError, match="no 4 words in a row were all swapped"):
        windows(lagged, n_swaps)


# ---- the whole way -------------------------------------------------------------------------------


def test_the_whole_way(tmp_path, text, capsys):
    runs = [tiny.random_run(tmp_path / "out", name, seed=i) for i, name in enumerate(("a", "b"))]
    given = [runs[0], "--control", runs[1], "--text", text, "--n_words", 10, "--lags", 4]
    given += ["--n_sequences", 4, "--permutations", 19]
    timescales.ANALYSIS.main(list(map(str, given)))
    said = capsys.readouterr().out
    found = [read(run / "evals", "timescales") for run in runs]
    for result in found:
        values = result.results
        assert values["n_swaps"] == 4 * 8 and values["times"] == [6, 9] and values["before"] < 1e-3
        assert -1 <= values["reliability"] <= 1
        assert set(result.arrays) == {"window", "c", "a", "b"} and result.arrays["c"].shape == (4, 4, 4)
        for kind in ("layer.*.attn", "layer.*.mlp"):
            for who in ("model", "untrained"):
                assert f"{values[who]['kinds'][kind]['window']:.3f}" in said
        assert f"{values['moran']['c']['0.0']['mean']:.3f}" in said
        assert result.content["summary"]["its floor, c"] == values["moran"]["c"]["0.0"]["floor"]
    assert "change by up to" not in said
    assert len(list((runs[0] / "evals").glob("timescales-*.png"))) == 5
    section = timescales.section(found)
    table = next(part for part in section.parts if isinstance(part, Table))
    assert len(table.explanations) == len(table.rows)

    timescales.ANALYSIS.main([*map(str, given[:1] + given[3:]), "--no_untrained", "--no_figures"])
    found = read(runs[0] / "evals", "timescales")
    assert found.results["untrained"] is None
    assert timescales.section([found]).cards[0].beside == {"the word alone": 1.0}


def test_mistakes_are_said(text):
    with pytest.raises(UserError, match="n_words = 20 must be at least lags . 3 = 23"):
        TimescalesConfig(run="-", n_words=20)
    subject = some_subject()
    small = subject._replace(model=GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=64)))
    with pytest.raises(UserError, match="knows 64 tokens, fewer than GPT-2's 50257"):
        swaps.read(small, text, 1, 10, None)
    long = [Swappable([[464]] * 10, {4: [262] * 60})]
    with pytest.raises(UserError, match="substitutes: a sequence has .* the model reads 64"):
        differences(subject, long, 4)
