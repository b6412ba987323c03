"""Stimulus files like the published ones, with a few items of ours."""

import csv
from pathlib import Path


def write_csv(path: Path, columns: str, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    return path


def write_stimuli(folder: Path) -> Path:
    """The published sets' names and columns, with a few items of ours."""
    verbs, nouns = ["run", "sing", "think", "hold"], ["tree", "idea", "stone", "hope"]
    words = [
        [w, c, k]
        for k, ws in (("noun", nouns), ("verb", verbs))
        for c in ("abstract", "concrete")
        for w in ws
    ]
    write_csv(folder / "moseley2014.csv", "word,category,class", words)
    pairs = [[f"the {w} the sea", "noun"] for w in nouns] + [[f"to {w} to go", "verb"] for w in verbs]
    write_csv(folder / "elli_hauptman2024.csv", "pair,class", pairs)
    columns = ",".join(f"stim{i}" for i in range(1, 15))
    sentence, nonword = "THE DOG THAT WE SAW RAN OVER THE HILL TO US NOW".split(), ["BLIF", "ORP"] * 6
    items = [[str(i), *sentence[i:], *sentence[:i], "S"] for i in range(8)]
    items += [[str(i), *nonword[: 11 - i], *["EP"] * (i + 1), "N"] for i in range(8)]
    write_csv(folder / "fedorenko2010_localizer" / "run1.csv", columns, items)
    others = [[f"{c.lower()} {w} and so on", c] for c in "SWJN" for w in nouns]
    write_csv(folder / "fedorenko_profiles.csv", "sentence,condition", others)
    return folder
