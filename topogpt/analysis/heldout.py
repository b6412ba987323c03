"""Held-out text: the run's own validation tokens, other shards, or a text file."""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.files import sha256
from topogpt.settings import N_VOCAB


class HeldOut(NamedTuple):
    tokens: np.ndarray  # (n_windows, length) int64: windows of the text, one after the other
    source: str
    sha256: str


def read(subject: Subject, text: str | None, n_tokens: int, vocab_dir: str | None = None) -> HeldOut:
    """The first n_tokens of the text, or fewer where it is shorter, in windows of the model's context.

    Args:
        text: a .txt file, or shards; None: the validation shards of the run.
    """
    stream, source, digest = stream_of(subject, text, n_tokens, vocab_dir)
    vocab_size = subject.model.cfg.vocab_size
    if len(stream) < 2 or stream.max() >= vocab_size:
        raise UserError(
            f"{source}: {len(stream)} tokens up to number {max(stream, default=0)} cannot be read by a model "
            f"of {vocab_size} tokens; give another --text"
        )
    return HeldOut(windows_of(stream, n_tokens, subject.model.cfg.block_size), source, digest)


def windows_of(stream: np.ndarray, n_tokens: int, block_size: int) -> np.ndarray:
    """The first n_tokens of a stream, or fewer where it is shorter, (n_windows, length) int64."""
    length = min(block_size, len(stream))
    n_windows = max(1, min(n_tokens, len(stream)) // length)
    return stream[: n_windows * length].reshape(n_windows, length).astype(np.int64)


def stream_of(
    subject: Subject, text: str | None, n_tokens: int, vocab_dir: str | None
) -> tuple[np.ndarray, str, str]:
    """Tokens of a .txt file, or the first n_tokens of shards; what they are, and their SHA-256."""
    if text is not None and Path(text).suffix in (".txt", ".md"):
        return text_file(Path(text), vocab_dir)
    return shards(subject, text, n_tokens)


def text_file(path: Path, vocab_dir: str | None) -> tuple[np.ndarray, str, str]:
    from topogpt.text import tokenizer

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text = {path} cannot be read: {error}; give a UTF-8 text file") from None
    return tokenizer.load(vocab_dir).encode_document(text), str(path), sha256(path)


def shards(subject: Subject, text: str | None, n_tokens: int) -> tuple[np.ndarray, str, str]:
    from topogpt.text.loader import open_corpus

    if text is None and subject.settings is None:
        raise UserError(
            f"{subject.label} is no run, so it has no held-out text of its own; give --text FILE.txt or "
            "shards"
        )
    patterns: Sequence[str] = [text] if text is not None else subject.settings["val_data_dir"]
    key = "text" if text is not None else "val_data_dir of the run"
    try:
        corpus = open_corpus(patterns, key=key, vocab_size=subject.model.cfg.vocab_size)
    except UserError as error:
        raise UserError(f"{error}; or give other text: --text FILE.txt") from None
    stream = corpus.window(0, min(n_tokens + 1, corpus.n_tokens))
    return stream, ", ".join(map(str, patterns)), corpus.fingerprint


def words_of(
    tokens: Iterable[int], vocab_size: int, vocab_dir: str | None = None, apart: bool = False
) -> list[str]:
    """The text of each token; a number where the model's tokens are not GPT-2's.

    A character that takes several tokens appears at the last of them. apart: they do not follow each other.
    """
    from topogpt.text import tokenizer

    encoding = tokenizer.load(vocab_dir).encoding if vocab_size >= N_VOCAB else None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [
        decoder.decode(encoding.decode_single_token_bytes(token), final=apart)
        if encoding and token < N_VOCAB
        else f"{'' if apart else ' '}{token}"
        for token in map(int, tokens)
    ]
