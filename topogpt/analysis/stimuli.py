"""Stimuli: items with conditions from CSV files, and the published sets that the analyses know.

Any CSV with the columns `item` and `condition` will do. The published sets keep their own columns and lie in
--stimuli_dir (`python -m evals.fetch` fetches them).
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from topogpt.errors import UserError
from topogpt.files import sha256, similar

DEFAULT_DIR = "data/stimuli"
OWN = "topogpt's own stimuli"  # the source of those in own_stimuli.py
OWN_NOTE = (
    "These are topogpt's own stimuli (topogpt/analysis/own_stimuli.py), written for this project and shown "
    "to nobody: they stand in for the published sets, which `python -m evals.fetch` fetches."
)
REMEDY = "`python -m evals.fetch` fetches the public stimuli; give their folder as --stimuli_dir"
FETCHED = ("moseley2014.csv", "elli_hauptman2024.csv", "fedorenko_profiles.csv")
LOCALIZER_WORDS = [f"stim{i}" for i in range(2, 14)]  # the twelve words of an item of the localiser


class Stimuli(NamedTuple):
    source: str  # file or folder
    items: list[str]
    conditions: list[str]  # of each item
    sha256: str  # of the file; of a folder: of its files' names and hashes
    pairs: list[str] | None = None  # of each item: which belong together, so that labels are shuffled within

    def where(self, condition: str | Callable[[str], bool]) -> np.ndarray:
        """Which items belong to a condition, or to those that a function picks, (n_items,) bool."""
        picks = condition if callable(condition) else condition.__eq__
        return np.array([picks(c) for c in self.conditions])


def read(
    path: Path,
    item: Sequence[str] = ("item",),
    condition: Sequence[str] = ("condition",),
    pair: str | None = None,
) -> Stimuli:
    """Items of a CSV file; several columns of an item are joined by a space, of a condition by `_`.

    pair: a column that says which items belong together, if there is one.
    """
    rows = read_rows(path, [*item, *condition, *([pair] if pair else [])])
    items = [" ".join(row[key].strip() for key in item).strip() for _, row in rows]
    for (line, _), text in zip(rows, items, strict=True):
        if not text:
            raise UserError(
                f"{path}, line {line}: the item is empty, so it has no tokens; fill it or delete it"
            )
    conditions = ["_".join(row[key].strip() for key in condition) for _, row in rows]
    pairs = [row[pair].strip() for _, row in rows] if pair else None
    return Stimuli(str(path), items, conditions, sha256(path), pairs)


def read_rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line (the last one, where a quoted text goes over several) and fields by column; no empty lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            there = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        fetched = path.name in FETCHED
        remedy = "give a CSV file with the columns item and condition"
        raise UserError(f"{path} does not exist; {REMEDY if fetched else similar(path, remedy)}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}; save it as UTF-8 CSV") from None
    for column in columns:
        if column not in there:
            raise UserError(
                f"{path} has no column {column}; its columns are: {', '.join(map(str, there)) or 'none'}"
            )
    if not rows:
        raise UserError(f"{path} has no items below its line of column names")
    for line, row in rows:
        if any(row[column] is None for column in columns):
            raise UserError(f"{path}, line {line} has fewer fields than the line of column names")
        if None in row:  # where DictReader puts what is left over
            raise UserError(f"{path}, line {line} has more fields than columns; quote a text that has commas")
    return rows


def is_own(data: Mapping[str, str]) -> bool:
    """Whether results are of our own stimuli, by their record of data (file -> SHA-256)."""
    return any(name.startswith(OWN) for name in data)


def named(text: str, data: Mapping[str, str]) -> str:
    """A name for what was found with stimuli, which says whether they were our own."""
    return f"{text} (own stimuli)" if is_own(data) else text


def check_groups(stimuli: Stimuli, a: np.ndarray, b: np.ndarray, what: str) -> None:
    """A t-test needs two items on either side."""
    for name, chosen in zip(what.split(" - ", 1), (a, b), strict=True):
        if chosen.sum() < 2:
            raise UserError(
                f"{stimuli.source}: {chosen.sum()} item(s) of {name}; the contrast {what} needs two or more "
                f"on either side (there are: {counted(stimuli)})"
            )


def counted(stimuli: Stimuli) -> str:
    return ", ".join(f"{n} of {name}" for name, n in sorted(Counter(stimuli.conditions).items()))


# ---- published sets ------------------------------------------------------------------------------


def localizer(folder: Path) -> Stimuli:
    """The language localiser of Fedorenko et al. (2010): sentences (S) and nonword strings (N), lower-cased.

    folder holds the CSV files of its runs: stim2 to stim13 are an item's twelve words, stim14 is S or N.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise UserError(f"{folder} holds no CSV files; {REMEDY}")
    parts = [read(path, LOCALIZER_WORDS, ["stim14"]) for path in paths]
    lines = "".join(f"{p.name} {s.sha256}\n" for p, s in zip(paths, parts, strict=True))
    items = [item.lower() for part in parts for item in part.items]
    conditions = [condition for part in parts for condition in part.conditions]
    return Stimuli(str(folder), items, conditions, hashlib.sha256(lines.encode()).hexdigest())


def profiles(path: Path) -> Stimuli:
    """Sentences (S), word lists (W), jabberwocky (J), nonword lists (N): other items than the localiser's."""
    return read(path, ["sentence"], ["condition"])


def moseley(path: Path) -> Stimuli:
    """Single words of Moseley & Pulvermueller (2014), of conditions like abstract_noun."""
    return read(path, ["word"], ["category", "class"])


def hauptman(path: Path) -> Stimuli:
    """Pairs like "the garage the rink" and "to slurp to lick" (Hauptman et al. 2024): noun and verb."""
    return read(path, ["pair"], ["class"])


def content_words(found: Stimuli) -> Stimuli:
    """The same items without "the" and "to", which tell Hauptman's pairs apart by themselves."""
    items = [" ".join(word for word in item.split() if word not in ("the", "to")) for item in found.items]
    return found._replace(source=f"{found.source}, content words", items=items)
