"""A file's text as UTF-8: what compresses it, what its first bytes say it is written in, what is damaged."""

import codecs
import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".txt": "txt"}
ENCODINGS = {  # by a file's first bytes; of UTF-8's own mark `decode` knows
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
codecs.register_error("topogpt.mark", lambda error: ("\ud800", error.end))  # which no UTF-8 may hold


@dataclass(kw_only=True)
class Damage:
    """What was found wrong in a unit's text, and what is done about it."""

    repaired: int = 0  # documents (rows) with bytes that are no UTF-8, each of which became U+FFFD
    broken: int = 0  # lines that are no JSON, left out
    skip_broken: bool = False  # leave them out; else the first raises UserError


def split_suffix(path: Path) -> tuple[str | None, str | None]:
    """Kind and compression by the name's ending; None for a kind not known."""
    stem, ending = os.path.splitext(path.name.lower())
    compression = {".gz": "gzip", ".zst": "zstd"}.get(ending)
    kind = KINDS.get(os.path.splitext(stem)[1] if compression else ending)
    return (None, None) if kind == "parquet" and compression else (kind, compression)


def open_bytes(path: Path) -> BinaryIO:
    """A file's text as UTF-8, whatever compresses it, and whatever its first bytes say it is written in."""
    compression = split_suffix(path)[1]
    if compression == "gzip":
        file = gzip.open(path, "rb")
    elif compression == "zstd":
        import pyarrow as pa

        file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    else:
        file = open(path, "rb")
    encoding = encoding_by(file.peek(4))
    return io.BufferedReader(AsUtf8(file, encoding), 1 << 20) if encoding else file


def encoding_of(path: Path) -> str | None:
    with open(path, "rb") as file:
        return encoding_by(file.read(4))


def encoding_by(start: bytes) -> str | None:
    return next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), None)


class AsUtf8(io.RawIOBase):
    """A file of another encoding, read as UTF-8; what is wrong in it is wrong in UTF-8, too."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.text = io.TextIOWrapper(file, encoding, errors="topogpt.mark", newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # a character is 4 bytes at most
        piece = self.text.read(len(buffer) // 4).encode("utf-8", "surrogatepass")
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.text.close()
        super().close()


def from_utf8(data: bytes, damage: Damage) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        damage.repaired += 1
        return data.decode("utf-8", "replace")
