"""Stimuli written for this project, where no published ones were fetched: words and frames, and their rule.

    python -m topogpt.analysis.own_stimuli FOLDER        # write the items as CSV files, to look at them

Nobody has shown them to people: they say whether an analysis works, and are no substitute for published sets.
All items are a pure function of this file.

`sentences` fills the slots of FRAMES, twelve words each, so that every word is used about equally often. Of a
sentence (S), `shuffled` (W) has the same words in another order, `jabberwocky` (J) its function words and
endings with nonwords between them, `nonwords` (N) none of its words. A nonword has as many letters as its
word, four at least, a consonant and a vowel in turn. `words` puts nouns and verbs, of things that can be
touched and of others, into the same frames: "they liked the garden", "they liked to wander".
"""

import hashlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from topogpt import rng
from topogpt.analysis.stimuli import DEFAULT_DIR, OWN, Stimuli

N_LOCALIZER, N_PROFILES = 96, 80  # sentences of each set
SLOTS = {
    "person": """farmer teacher sailor doctor baker sister lawyer painter singer pilot nurse student
        captain waiter tailor driver dancer guard hunter brother""",
    "thing": """letter basket window bicycle lamp table blanket ladder piano camera carpet kettle
        mirror drum clock bottle chair picture map box""",
    "place": """garden station kitchen harbor market library church village forest bridge school
        theater office castle factory museum tower bakery hospital stable""",
    "kind": """quiet small large strange famous lovely dirty pretty beautiful tiny plain simple
        modern tall noisy gloomy""",
    "did": """carried painted opened repaired noticed wanted borrowed cleaned returned dropped
        covered counted delivered moved watched needed ordered pushed received
        washed""",
    "acted": "waited laughed rested listened smiled stayed shouted worked arrived danced paused appeared",
    "how": "slowly quietly suddenly quickly gladly carefully softly calmly",
    "when": "yesterday again today alone early later",
}
FRAMES = """
the +kind +person who +did the +thing +acted beside the +place +when
after the +person +did a +kind +thing the other +person +acted +how
my +person +did the +thing because nobody near the +place +did it
when the +thing was +did the +person near the +place +acted +how
the +person and her +person +did every +thing that the +person +did
we +acted while a +kind +person +did the +thing behind our +place
by the +kind +place an old +person +how +did the +thing +when
she told the +person that the +thing from the +place was +did
""".strip().splitlines()
ENDINGS = ("ed", "ly")  # that jabberwocky keeps
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aiou"
# names and words that the rule would make
REAL = """baka batu biro dani daro daron davi dina dinar dodo doma dula dupi fofi fomo fuzi gaba gama gigi
    gini gita kita koki kudu kumi lilo loli luna mako mali malo mana mara marik miki mina miro
    moga mono mora nara nata nima nova paba polo poma popo radi rami ravi razi riba robo rosa
    sabi saki sati sofa soma sori suri tara taro tata tuba tula tutu vasa vita zama zapu zina""".split()

CARRIERS = ("they liked", "we preferred", "he loved", "she hated", "you wanted")
WORDS = {
    "concrete_noun": """garden kitchen river apple candle pencil basket mountain chicken forest jacket
        kettle lemon piano rabbit spider ticket tiger tomato tractor trumpet tunnel
        umbrella valley violin wallet bicycle castle island engine coffee diamond
        elephant village potato guitar cottage lizard ladder oven""",
    "abstract_noun": """idea truth freedom justice wisdom courage theory method patience beauty mercy luck
        moment mood notion opinion origin peace pride quality religion rumor safety
        science secret skill soul spirit success talent tension tradition virtue
        wealth youth loyalty history humor illusion logic""",
    "concrete_verb": """eat sing swim write bake chew crawl dig carve sew knit weave pour grab kneel sit
        bend breathe bring build carry gather hang hear melt scrub sneeze sweep
        swallow throw wander weep blow speak read stand feed grow drink wash""",
    "abstract_verb": """think know believe agree admit decide forgive forget remember understand suppose
        assume consider deny deserve expect explain forbid imagine improve infer
        intend learn obey persuade pretend prove realize refuse rely solve suggest
        choose accept apologize approve argue compare conclude confess""",
}


def stand_in(folder: str | Path) -> bool:
    """Whether these take the place of published sets: none were fetched into the usual folder."""
    return Path(folder) == Path(DEFAULT_DIR) and not Path(folder).exists()


def localizer() -> Stimuli:
    """Sentences (S) and lists of nonwords (N) of as many letters."""
    real = sentences("localizer", N_LOCALIZER)
    return stimuli("localizer", {"S": real, "N": [nonwords(s, i) for i, s in enumerate(real)]})


def profiles() -> Stimuli:
    """Sentences (S), the same words shuffled (W), jabberwocky (J) and nonwords (N): other sentences."""
    real = sentences("profiles", N_PROFILES)
    made = {"W": shuffled, "J": jabberwocky, "N": nonwords}
    return stimuli(
        "profiles", {"S": real} | {c: [f(s, i) for i, s in enumerate(real)] for c, f in made.items()}
    )


def words() -> Stimuli:
    """Nouns and verbs, concrete and abstract, each word in one of CARRIERS; conditions like abstract_noun."""
    found = {}
    for condition, text in WORDS.items():
        link = "to" if condition.endswith("verb") else "the"
        found[condition] = [
            f"{CARRIERS[i % len(CARRIERS)]} {link} {word}" for i, word in enumerate(text.split())
        ]
    return stimuli("words", found)


def stimuli(name: str, by_condition: dict[str, list[str]]) -> Stimuli:
    pairs = [(item, condition) for condition, items in by_condition.items() for item in items]
    digest = hashlib.sha256("".join(f"{item},{condition}\n" for item, condition in pairs).encode())
    items, conditions = zip(*pairs, strict=True)
    return Stimuli(f"{OWN}: {name}", list(items), list(conditions), digest.hexdigest())


# ---- the rule --------------------------------------------------------------------------------------------


def sentences(name: str, n: int) -> list[str]:
    """n different sentences, the frames in turn."""
    fillers = {slot: endless(name, slot) for slot in SLOTS}
    found = []
    for i in range(n):
        sentence: list[str] = []
        for part in FRAMES[i % len(FRAMES)].split():
            word = part
            while part.startswith("+") and (word.startswith("+") or word in sentence):
                word = next(fillers[part[1:]])
            sentence.append(word)
        found.append(" ".join(sentence))
    return found


def endless(name: str, slot: str) -> Iterator[str]:
    """All words of a slot in a random order, again and again."""
    there = SLOTS[slot].split()
    for turn in count():
        yield from (there[k] for k in rng.permutation(len(there), name, slot, turn))


def shuffled(sentence: str, i: int) -> str:
    """The same words with no word in its place."""
    there = sentence.split()
    for turn in count():
        order = rng.permutation(len(there), "shuffled", i, turn)
        if all(k != place for place, k in enumerate(order)):
            return " ".join(there[k] for k in order)
    raise AssertionError


def jabberwocky(sentence: str, i: int) -> str:
    """Content words become nonwords that keep their endings."""
    content = set(" ".join(SLOTS.values()).split())
    found = []
    for k, word in enumerate(sentence.split()):
        ending = word[-2:] if word.endswith(ENDINGS) else ""
        stem = word.removesuffix(ending)
        found.append(nonword(len(stem), "jabberwocky", i, k) + ending if word in content else word)
    return " ".join(found)


def nonwords(sentence: str, i: int) -> str:
    """A nonword for every word."""
    return " ".join(nonword(len(word), "nonwords", i, k) for k, word in enumerate(sentence.split()))


def nonword(n_letters: int, *key: rng.Key) -> str:
    for turn in count():
        draws = rng.raw(max(4, n_letters), *key, turn).tolist()
        made = "".join(
            (VOWELS if k % 2 else CONSONANTS)[r % (4 if k % 2 else 14)] for k, r in enumerate(draws)
        )
        if made not in REAL:
            return made
    raise AssertionError


def main(folder: Path) -> None:
    import csv

    for made in (localizer(), profiles(), words()):
        path = folder / f"{made.source.rpartition(' ')[2]}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = zip(made.items, made.conditions, strict=True)
            csv.writer(file).writerows([("item", "condition"), *rows])
        print(path)


if __name__ == "__main__":
    import sys

    main(Path(*sys.argv[1:]))
