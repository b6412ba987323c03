"""GPT-2's byte-pair encoding through tiktoken, exact on every text, however long or strange.

    tokenizer = tokenizer.load()
    tokenizer.encode("The cortex")            # uint16 array; text is always plain text, `<|endoftext|>` too
    tokenizer.encode_document("The cortex")   # the same after EOT, as documents lie in the shards

Its vocabulary is found or fetched by vocabulary.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from topogpt.settings import N_VOCAB
from topogpt.text import vocabulary

EOT = N_VOCAB - 1  # 50256, before every document

# GPT-2's pattern in the form that does not backtrack
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What \s means in that pattern: Unicode's White_Space. Python's own \s also takes \x1c-\x1f.
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_TEXT = 500_000  # characters; below, no run of blanks is long enough to overflow tiktoken's stack
CHUNK = 1_000_000  # characters; a longer text is encoded in pieces, so that memory stays small
RUN_START = re.compile(f"(?<!{SPACE}){SPACE}")
LONG_RUN = re.compile(rf"(?<!{SPACE}){SPACE}{{512,}}+(?!\Z)")


def load(vocab_dir: str | Path | None = None) -> "Tokenizer":
    """The tokenizer of the vocabulary in vocab_dir, else of the one that is found or fetched."""
    return Tokenizer(vocabulary.find(vocab_dir))


class Tokenizer:
    """Text to GPT-2 tokens and back."""

    eot = EOT
    n_vocab = N_VOCAB

    def __init__(self, folder: Path) -> None:
        import tiktoken

        self.folder = folder  # holds the two vocabulary files
        ranks = mergeable_ranks(json.loads((folder / "encoder.json").read_bytes()))
        special = {"special_tokens": {"<|endoftext|>": EOT}, "explicit_n_vocab": N_VOCAB}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, **special)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of plain text, uint16; the same as tiktoken's `encode_ordinary`."""
        return self.encode_pieces(text, [])

    def encode_document(self, text: str) -> np.ndarray:
        """EOT, then the tokens of the text, uint16."""
        return self.encode_pieces(text, [np.array([EOT], dtype=np.uint16)])

    def encode_pieces(self, text: str, found: list[np.ndarray]) -> np.ndarray:
        """Concatenate what is found already with the tokens of the text."""
        try:
            pieces = [text] if len(text) < LONG_TEXT else split_exactly(text)
            # disallowed_special: a special token's name inside a text is plain text
            found = found + [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        except UnicodeEncodeError:  # surrogates: pairs become one character, lone ones U+FFFD, as in tiktoken
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode_pieces(repaired, found)
        return np.concatenate(found, dtype=np.uint16, casting="unsafe")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens; ids beyond the vocabulary (the padding of a model's last layer) are left out."""
        return self.encoding.decode([int(i) for i in ids if 0 <= i < N_VOCAB], errors="replace")

    def vocab_files(self) -> tuple[Path, Path]:
        """Paths of vocab.bpe and encoder.json."""
        return self.folder / "vocab.bpe", self.folder / "encoder.json"


def mergeable_ranks(encoder: dict[str, int]) -> dict[bytes, int]:
    """Bytes of each token -> its rank. encoder.json writes bytes that do not print as U+0100 and on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    to_latin1 = {256 + i: b for i, b in enumerate(others)}
    return {
        token.translate(to_latin1).encode("latin-1"): rank for token, rank in encoder.items() if rank != EOT
    }


def split_exactly(text: str) -> Iterator[str]:
    """Cut a long text where GPT-2's pattern cuts it too, so that the pieces have the tokens of the whole.

    No match of the pattern goes from a character into the blanks after it: a cut before a run of blanks is
    exact. A run before a character is matched without its last blank, by stepping back, which overflows the
    stack at a million blanks: so a long run is encoded by itself, without its last blank.
    """
    start = 0
    while start < len(text):
        run = RUN_START.search(text, start + CHUNK)
        stop = run.start() if run else len(text)
        yield from split_long_runs(text[start:stop])
        start = stop


def split_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.start()]
        yield text[run.start() : run.end() - 1]
        start = run.end() - 1
    yield text[start:]
