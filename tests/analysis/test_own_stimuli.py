"""Stimuli of our own: their number, their rule. pytest tests/analysis/test_own_stimuli.py"""

import csv
from collections import Counter

import texts

from topogpt.analysis import own_stimuli, stimuli
from topogpt.analysis.stimuli import Stimuli

HASHES = ["35f7ffc10c22", "6f25f90d9737", "39a169478ae0"]


def items_of(found: Stimuli, condition: str) -> list[str]:
    return [item for item, c in zip(found.items, found.conditions, strict=True) if c == condition]


def test_they_are_enough_all_different_and_the_same_everywhere():
    sets = [own_stimuli.localizer(), own_stimuli.profiles(), own_stimuli.words()]
    assert [found.sha256[:12] for found in sets] == HASHES
    for found in sets:
        assert len(set(found.items)) == len(found.items)
    assert Counter(sets[0].conditions) == {"S": 96, "N": 96}
    assert Counter(sets[1].conditions) == dict.fromkeys("SWJN", 80)
    sides = Counter(part for c in sets[2].conditions for part in c.split("_"))
    assert sides == dict.fromkeys(["concrete", "abstract", "noun", "verb"], 80)
    assert not set(items_of(sets[0], "S")) & set(items_of(sets[1], "S"))


def test_conditions_follow_their_rule():
    found = own_stimuli.profiles()
    real, shuffled, jabber, non = (items_of(found, c) for c in "SWJN")
    content = set(" ".join(own_stimuli.SLOTS.values()).split())
    for s, w, j, n in zip(real, shuffled, jabber, non, strict=True):
        s, w, j, n = (text.split() for text in (s, w, j, n))
        assert (
            len(s) == 12
            and sorted(s) == sorted(w)
            and all(a != b for a, b in zip(s, w, strict=True)) | (len(set(s)) < 12)
        )
        for a, b, c in zip(s, j, n, strict=True):
            assert (b != a) == (a in content) and len(c) == max(4, len(a)) and c not in s
            assert not a.endswith(own_stimuli.ENDINGS) or a not in content or b[-2:] == a[-2:]


def test_nonwords_are_no_words_of_gpt2():
    encode = texts.load().encode
    for found in (own_stimuli.localizer(), own_stimuli.profiles()):
        for word in {word for item in items_of(found, "N") for word in item.split()}:
            assert len(encode(f" {word}")) > 1, word


def test_nouns_and_verbs_are_in_the_same_frames_and_as_long():
    found, encode = own_stimuli.words(), texts.load().encode
    lengths, frames = {}, {}
    for condition in own_stimuli.WORDS:
        items = items_of(found, condition)
        lengths[condition] = sum(len(encode(item)) for item in items) / len(items)
        frames[condition] = [" ".join(item.split()[:2]) for item in items]
    assert max(lengths.values()) - min(lengths.values()) < 0.1
    assert len({tuple(f) for f in frames.values()}) == 1


def test_they_stand_in_for_the_usual_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert own_stimuli.stand_in(stimuli.DEFAULT_DIR) and not own_stimuli.stand_in("elsewhere")
    (tmp_path / "data" / "stimuli").mkdir(parents=True)
    assert not own_stimuli.stand_in("data/stimuli")
    own_stimuli.main(tmp_path / "out")
    assert len(capsys.readouterr().out.splitlines()) == 3
    with (tmp_path / "out" / "words.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["they liked the garden", "concrete_noun"]
