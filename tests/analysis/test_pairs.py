"""Minimal pairs are read as they are and scored as one by one. Run: pytest tests/analysis/test_pairs.py"""

import numpy as np
import pytest
import tiny
from minimal_pairs import ROWS, plain_scores, write_pairs

from topogpt.analysis import pairs
from topogpt.analysis.subject import EvalConfig, Subject, load_subject
from topogpt.errors import UserError
from topogpt.files import sha256

SENTENCES = ["the old man walked to the harbour", "she read", "nobody knew where the key was", "a", "a key"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    run = str(tiny.random_run(tmp_path_factory.mktemp("out")))
    return load_subject(EvalConfig(run=run, device="cpu"), run)


@pytest.mark.parametrize("per_batch", [1, 40, 1024])
def test_scores_are_sums_over_each_sentence_alone(subject, gpt2, monkeypatch, per_batch):
    monkeypatch.setattr(pairs, "TOKENS_PER_BATCH", per_batch)
    sentences = [gpt2.encode_document(text).astype(np.int64) for text in SENTENCES]
    found = pairs.log_probabilities(subject.model, sentences)
    assert found == pytest.approx(plain_scores(subject.model, sentences), rel=1e-4)


def test_a_pair_is_right_where_the_good_sentence_is_likelier():
    assert pairs.right(np.array([-1.0, -5.0, -2.0, -3.0, -4.0, -2.0])).tolist() == [True, False, False]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_pairs_are_the_first_ones_of_the_paradigms_in_turn(tmp_path, suffix):
    path = write_pairs(tmp_path / f"pairs{suffix}")
    everything = pairs.read(path)
    assert everything.good == [row["sentence_good"] for row in ROWS]
    assert everything.phenomena == ["islands"] * 6 + ["binding"] * 3 and everything.sha256 == sha256(path)
    assert pairs.read(path, 3).good == ["p 0", "p 1", "q 0", "r 0", "r 1", "r 2"]
    few = [{key: row[key] for key in ("field", "sentence_good", "sentence_bad")} for row in ROWS]
    assert pairs.read(write_pairs(tmp_path / f"few{suffix}", few), 2).good == ["p 0", "p 1"]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("no.parquet", None, "no.parquet cannot be read as parquet: it is not there"),
        ("no.jsonl", None, "no.jsonl cannot be read: .*give a .parquet or .jsonl file"),
        ("a.parquet", "text", "a.parquet cannot be read as parquet"),
        ("a.jsonl", "", "a.jsonl holds no pairs"),
        ("b.jsonl", "{}\n[1]\n", "b.jsonl, line 2 is no JSON object"),
        (
            "c.jsonl",
            '{"sentence_good": "a"}',
            "there is no column sentence_bad; the columns are sentence_good",
        ),
        ("d.jsonl", '{"sentence_good": "a", "sentence_bad": "b"}', "there is no column linguistics_term"),
        ("e.jsonl", '{"sentence_good": "a", "sentence_bad": " ", "field": "f"}', "pair 1 has no text in"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as said:
        pairs.read(tmp_path / name)
    assert "\n" not in str(said.value)


def test_a_sentence_longer_than_the_context_is_refused(tmp_path, subject):
    row = ROWS[0] | {"sentence_bad": "a " * 49}
    found = pairs.read(write_pairs(tmp_path / "long.jsonl", [row]))
    with pytest.raises(UserError, match="the sentence 'a a .* has 5[01] tokens; the model reads at most 49"):
        pairs.token_lists(subject, found)
