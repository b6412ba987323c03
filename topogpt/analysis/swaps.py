"""Word swapping: sequences of plain words, a probable substitute for each, and what a swap changes.

Words are runs of letters in lower case, without punctuation, each with a blank before it: so the tokens of a
sequence are those of its words one after the other.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from topogpt import rng
from topogpt.analysis import heldout, stimuli
from topogpt.analysis.activations import batches
from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.terminal import progress

if TYPE_CHECKING:
    from topogpt.model.gpt import GPT
    from topogpt.text.tokenizer import Tokenizer

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
TOKENS_PER_WORD = 8  # of the corpus to be read for a word wanted: short documents are passed over


class Swappable(NamedTuple):
    """A sequence; tokens of its words, and of their substitutes: word -> tokens."""

    words: list[list[int]]
    substitutes: dict[int, list[int]]


class Sequences(NamedTuple):
    words: list[list[str]]
    tokens: list[list[list[int]]]  # of each word of each sequence
    source: str
    sha256: str


def read(subject: Subject, text: str | None, n: int, n_words: int, vocab_dir: str | None) -> Sequences:
    """The first n sequences of n_words that lie within one document and, after EOT, in the context."""
    from topogpt.text import tokenizer

    encoding, cfg = tokenizer.load(vocab_dir), subject.model.cfg
    if cfg.vocab_size < encoding.n_vocab:
        raise UserError(
            f"{subject.label} knows {cfg.vocab_size} tokens, fewer than GPT-2's {encoding.n_vocab}; words "
            "cannot be read to it"
        )
    n_tokens = TOKENS_PER_WORD * n * n_words + 10_000
    stream, source, digest = heldout.stream_of(subject, text, n_tokens, vocab_dir)
    words, tokens = [], []
    for sequence in blocks(stream, encoding, n_words):
        pieces = [encoding.encode(f" {word}").tolist() for word in sequence]
        if 1 + sum(map(len, pieces)) <= cfg.block_size:
            words.append(sequence)
            tokens.append(pieces)
        if len(words) == n:
            break
    if not words:
        raise UserError(
            f"{source} has no document of {n_words} words that fit {cfg.block_size} tokens; give fewer "
            "--n_words or another --text"
        )
    return Sequences(words, tokens, source, digest)


def blocks(stream: np.ndarray, encoding: "Tokenizer", n_words: int) -> Iterator[list[str]]:
    """Words of documents, n_words at a time; what is left at a document's end is passed over."""
    for document in np.split(stream, np.flatnonzero(stream == encoding.eot)):
        words = WORD.findall(
            encoding.decode(document[document != encoding.eot]).replace("\u2019", "'").lower()
        )
        for i in range(0, len(words) - n_words + 1, n_words):
            yield words[i : i + n_words]


# ---- substitutes ---------------------------------------------------------------------------------


def from_file(
    path: str, found: Sequences, first: int, vocab_dir: str | None, seed: int
) -> tuple[list[Swappable], str]:
    """Substitutes of a CSV file (word,substitute; a word may have many), one at random; and its SHA-256."""
    from topogpt.text import tokenizer

    encoding, table = tokenizer.load(vocab_dir), stimuli.read(Path(path), ("substitute",), ("word",))
    known: dict[str, list[str]] = {}
    for word, substitute in zip(table.conditions, table.items, strict=True):
        if substitute != word:
            known.setdefault(word, []).append(substitute)
    made = []
    for i, (words, tokens) in enumerate(zip(found.words, found.tokens, strict=True)):
        chosen = {
            k: encoding.encode(f" {pick(known[words[k]], seed, i, k)}").tolist()
            for k in range(first, len(words))
            if words[k] in known
        }
        made.append(Swappable(tokens, chosen))
    return made, table.sha256


def pick(among: Sequence, seed: int, sequence: int, k: int) -> Any:
    return among[int(rng.raw(1, seed, "swap", sequence, k)[0] % np.uint64(len(among)))]


def of_model(
    model: "GPT", found: Sequences, first: int, top_k: int, vocab_dir: str | None, seed: int
) -> list[Swappable]:
    """One of the model's own top_k next words in the left context, never the word itself, at random.

    It has as many tokens as the word, so that all that follows stays at its positions: the first token is one
    of the likeliest that begin a word, the others are the likeliest that go on with it.
    """
    import torch

    begins, goes_on = (torch.from_numpy(m).to(model.device) for m in kinds_of_tokens(vocab_dir))

    def likeliest(logits: torch.Tensor, allowed: torch.Tensor, n: int) -> list[list[int]]:
        return logits[..., : len(allowed)].float().masked_fill(~allowed, -torch.inf).topk(n).indices.tolist()

    made = []
    with torch.inference_mode():
        for i, tokens in enumerate(progress(found.tokens, "choosing substitutes")):
            row, starts = flat(tokens)
            logits = model(torch.tensor([row], device=model.device)).logits[0]
            ranked = likeliest(logits[torch.tensor(starts) - 1], begins, top_k + 1)
            chosen = {}
            for k in range(first, len(tokens)):
                others = [token for token in ranked[k] if token != tokens[k][0]][:top_k]
                chosen[k] = [pick(others, seed, i, k)]
            complete(model, row, starts, tokens, chosen, lambda x: likeliest(x, goes_on, 1))
            made.append(Swappable(tokens, chosen))
    return made


def complete(
    model: "GPT",
    row: list[int],
    starts: list[int],
    tokens: list[list[int]],
    chosen: dict[int, list[int]],
    likeliest: Callable,
) -> None:
    """Go on with the substitutes that have fewer tokens than their words."""
    import torch

    for k in chosen:
        while len(chosen[k]) < len(tokens[k]):
            context = torch.tensor([row[: starts[k]] + chosen[k]], device=model.device)
            logits = model(context, last_only=True).logits[:, -1]
            chosen[k].append(likeliest(logits)[0][0])


def flat(tokens: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """EOT and the tokens of all words; where each word starts."""
    from topogpt.text import tokenizer

    row, starts = [tokenizer.EOT], []
    for word in tokens:
        starts.append(len(row))
        row += word
    return row, starts


def kinds_of_tokens(vocab_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that begin a word in lower case (a blank and letters), and those that go on with one: masks."""
    from topogpt.text import tokenizer

    words = tokenizer.load(vocab_dir)
    texts = [
        words.encoding.decode_single_token_bytes(t).decode("utf-8", "replace") for t in range(tokenizer.EOT)
    ]
    begins = [t[:1] == " " and t[1:].isalpha() and t.islower() for t in texts]
    goes_on = [t.isalpha() and t.islower() for t in texts]
    return np.array([*begins, False]), np.array([*goes_on, False])


# ---- what a swap changes ---------------------------------------------------------------------------


class Differences(NamedTuple):
    """Mean |difference| that a swap makes."""

    lagged: np.ndarray  # (2, S, n_words, lags + 1, n_units): sums at k and delta; of even, of odd sequences
    n_swaps: np.ndarray  # (2, n_words): sequences in which word k was swapped
    before: float  # largest difference at a word before the swapped one: 0 in a causal model


def differences(subject: Subject, sequences: Sequence[Swappable], lags: int) -> Differences:
    """Swap every word that has a substitute, one at a time; the original is read beside them."""
    import torch

    sheets, n_words = subject.sheets, len(sequences[0].words)
    shape = (2, len(sheets), n_words, lags + 1, subject.n_units)
    lagged, n_swaps, before = np.zeros(shape, np.float32), np.zeros((2, n_words), int), 0.0
    with torch.inference_mode():
        for i, sequence in enumerate(progress(sequences, f"{subject.label}: swapping words")):
            original = of_words(subject, [sequence.words])[:, 0]  # (S, W, C)
            ks = list(sequence.substitutes)
            rows = [
                [*sequence.words[:k], sequence.substitutes[k], *sequence.words[k + 1 : k + lags + 1]]
                for k in ks
            ]
            for batch in batches([1 + sum(map(len, row)) for row in rows]):
                swapped = of_words(subject, [rows[j] for j in batch])  # (S, B, W, C)
                for j, x in zip(batch, swapped.swapaxes(0, 1), strict=True):
                    k, end = ks[j], len(rows[j])
                    change = np.abs(x[:, :end] - original[:, :end])
                    lagged[i % 2, :, k, : end - k] += change[:, k:]
                    n_swaps[i % 2, k] += 1
                    before = max(before, float(change[:, :k].max()))
    return Differences(lagged, n_swaps, before)


def of_words(subject: Subject, rows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Mean over each word's tokens: rows of words -> (S, n_rows, n_words, n_units), padded with zeros."""
    import torch

    lines = [flat(row) for row in rows]
    longest, n_words = max(len(line) for line, _ in lines), max(map(len, rows))
    if longest > subject.model.cfg.block_size:
        raise UserError(
            f"substitutes: a sequence has {longest} tokens with one of them, but the model reads "
            f"{subject.model.cfg.block_size}; give fewer --n_words"
        )
    tokens, weight = (
        np.zeros((len(rows), longest), np.int64),
        np.zeros((len(rows), n_words, longest), np.float32),
    )
    for r, (line, starts) in enumerate(lines):
        tokens[r, : len(line)] = line
        for word, (start, stop) in enumerate(zip(starts, [*starts[1:], len(line)], strict=True)):
            weight[r, word, start:stop] = 1 / (stop - start)
    device = subject.model.device
    named = subject.model(
        torch.from_numpy(tokens).to(device), activations=subject.sheets, last_only=True
    ).activations
    weights = torch.from_numpy(weight).to(device)
    return np.stack([(weights @ named[sheet].float()).cpu().numpy() for sheet in subject.sheets])
