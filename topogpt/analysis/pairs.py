"""Minimal pairs, as of BLiMP: a good sentence beside a bad one, and which of them a model finds likelier.

    found = pairs.read(Path("blimp.parquet"), first=20)
    lists = pairs.token_lists(subject, found)             # each after an end-of-text token
    pairs.right(pairs.log_probabilities(subject.model, lists)).mean()

A pair is right where its good sentence has the higher log-probability, summed over its tokens (Warstadt et
al. 2020); chance is 50 %.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from topogpt.analysis.activations import batches
from topogpt.errors import UserError
from topogpt.files import sha256

if TYPE_CHECKING:
    from topogpt.analysis.subject import Subject
    from topogpt.model.gpt import GPT

PHENOMENON = ("linguistics_term", "phenomenon", "field")  # columns that may name it, the first that is there
TOKENS_PER_BATCH = 1024  # padding counted in; their logits take 200 MB


class Pairs(NamedTuple):
    source: str
    good: list[str]
    bad: list[str]
    phenomena: list[str]  # of each pair
    sha256: str  # of the file


def read(path: Path, first: int | None = None) -> Pairs:
    """Pairs of a .parquet or .jsonl file: sentence_good, sentence_bad and a column of PHENOMENON.

    Args:
        first: of each phenomenon so many pairs, its paradigms (column UID) in turn; None: all.
    """
    rows = read_parquet(path) if path.suffix == ".parquet" else read_lines(path)
    if not rows:
        raise UserError(f"{path} holds no pairs")
    there = list(dict.fromkeys(key for row in rows for key in row))
    by = next((name for name in PHENOMENON if name in there), PHENOMENON[0])
    for column in ("sentence_good", "sentence_bad", by):
        for n, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str) or not row[column].strip():
                what = f"pair {n} has no text in" if column in there else "there is no column"
                raise UserError(f"{path}: {what} {column}; the columns are {', '.join(there)}")
    rank: Counter[tuple[str, str]] = Counter()
    turns = []
    for row in rows:
        paradigm = (row[by], str(row.get("UID")))
        turns.append(rank[paradigm])
        rank[paradigm] += 1
    seen: Counter[str] = Counter()
    chosen = []
    for i in np.argsort(turns, kind="stable").tolist():
        seen[rows[i][by]] += 1
        if first is None or seen[rows[i][by]] <= first:
            chosen.append(i)
    good, bad, phenomena = (
        [rows[i][key] for i in sorted(chosen)] for key in ("sentence_good", "sentence_bad", by)
    )
    return Pairs(str(path), good, bad, phenomena, sha256(path))


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = "it is not there" if not path.exists() else str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read as parquet: {reason}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a .parquet or .jsonl file of pairs") from None
    rows = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {n} is no JSON object; give a .parquet or .jsonl file of pairs")
        rows.append(row)
    return rows


def token_lists(subject: "Subject", found: Pairs, vocab_dir: str | None = None) -> list[np.ndarray]:
    """Tokens of all good sentences, then of all bad ones, each after an end-of-text token."""
    from topogpt.text import tokenizer

    words, cfg = tokenizer.load(vocab_dir), subject.model.cfg
    if cfg.vocab_size < words.n_vocab:
        raise UserError(
            f"{subject.label} knows {cfg.vocab_size} tokens, fewer than GPT-2's {words.n_vocab}; "
            "pairs cannot be read to it"
        )
    sentences = found.good + found.bad
    lists = [words.encode_document(sentence).astype(np.int64) for sentence in sentences]
    for sentence, tokens in zip(sentences, lists, strict=True):
        if len(tokens) - 1 > cfg.block_size:
            raise UserError(
                f"{found.source}: the sentence {sentence[:40]!r} has {len(tokens)} tokens; the "
                f"model reads at most {cfg.block_size + 1}"
            )
    return lists


def log_probabilities(model: "GPT", lists: Sequence[np.ndarray]) -> np.ndarray:
    """Summed log-probability of each list's tokens after its first, in nats, (n_lists,) float64."""
    import torch
    import torch.nn.functional as F

    from topogpt.distributed import widest

    found = np.zeros(len(lists))
    with torch.inference_mode():
        for batch in batches([len(tokens) - 1 for tokens in lists], TOKENS_PER_BATCH):
            longest = max(len(lists[i]) for i in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
            counted = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
            for line, i in enumerate(batch):
                tokens[line, : len(lists[i])] = torch.from_numpy(lists[i].astype(np.int64))
                counted[line, : len(lists[i]) - 1] = True
            tokens, counted = tokens.to(model.device), counted.to(model.device)
            logits = model(tokens[:, :-1]).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            found[batch] = -(loss.view(counted.shape).to(widest(loss.device)) * counted).sum(1).cpu().numpy()
    return found


def right(scores: np.ndarray) -> np.ndarray:
    """Which pairs are right, (n_pairs,) bool, of the scores of all good sentences, then of all bad ones."""
    good, bad = np.split(scores, 2)
    return good > bad
