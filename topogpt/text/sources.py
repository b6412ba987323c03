"""Documents of local files: parquet, JSON lines, text.

A source divides its text into units of work, in a fixed order that depends on the input alone:

    source = sources.Files(["corpus/"], text_column="text")
    for unit in source.units(rank=0, world=1):
        for doc_id, text in sources.documents(unit, "text"): ...  # text: str, or whatever stands there

A worker reads a unit in little memory, however large the file. hub_sources.py has the sources of the Hub.
"""

import codecs
import contextlib
import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from topogpt.errors import UserError
from topogpt.files import sha256
from topogpt.terminal import progress
from topogpt.text.encoding import Damage, encoding_of, from_utf8, open_bytes, split_suffix

# text in a unit: half a second of tokenising; longer .txt files are cut into such documents
UNIT_BYTES = 8 << 20
BATCH_BYTES = 2 << 20  # text taken from a parquet file at once
CUT_BYTES = 1 << 20  # a blank line to cut at is looked for in so much
READABLE = "*.parquet, *.jsonl, *.txt, *.jsonl.gz, *.jsonl.zst, *.txt.gz, *.txt.zst"


Stamp = tuple[int, int, int]  # size, time of the last change, inode: other ones, other content


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that one worker tokenises on its own."""

    name: str  # sorts like the documents
    origin: str  # identifies the content it is cut from
    path: str
    start: int = 0  # first row group of a parquet file, else first byte
    stop: int = -1  # one past the last; -1 = to the end
    text_bytes: int  # about
    weight: float = 0.0  # share of the source's bytes, for progress
    limit: int | None = None  # tokens; the document that reaches them is the last
    stamp: Stamp | None = None  # of the file, when it was looked at; it must stay so until the unit is read


class Files:
    """Parquet, JSON lines and text files, each divided into units."""

    download_bytes = 0

    def __init__(
        self,
        paths: Sequence[str],
        text_column: str,
        *,
        in_order: bool = True,
        n_threads: int = 1,
        key: str = "source",
        skip_broken: bool = False,
    ) -> None:
        """key: the flag that gives the paths, for messages."""
        found = find_files(paths, key)
        stamps = list(map(stamp_of, found.values()))
        with ThreadPoolExecutor(n_threads) as pool:  # hashing lets other threads run
            hashes = list(progress(pool.map(hash_source, found.values()), "files hashed", len(found)))
        sizes = [size for size, _, _ in stamps]
        columns = zip(found, sizes, hashes, strict=True)
        self.description = {
            "files": [{"name": name, "size": size, "sha256": hash_} for name, size, hash_ in columns]
        }
        self.planned: list[Unit] = []
        for index, (path, hash_, stamp) in enumerate(zip(found.values(), hashes, stamps, strict=True)):
            units = plan(index, path, hash_, text_column, skip_broken)
            self.planned += [replace(unit, stamp=stamp) for unit in units]
        self.name = slug("-".join(Path(path).name.split(".")[0] or "text" for path in paths))
        self.in_order = in_order
        self.total_weight = sum(sizes)
        self.text_bytes = sum(unit.text_bytes for unit in self.planned)

    def units(self, rank: int, world: int) -> list[Unit]:
        """This rank's units; where any order will do, the largest first: the workers end together."""
        mine = self.planned[rank::world]
        return mine if self.in_order else sorted(mine, key=lambda unit: -unit.text_bytes)

    def known_units(self) -> tuple[list[Unit], bool]:
        """The units known so far, of all ranks and in order, and whether these are all."""
        return self.planned, True

    def finished(self, unit: Unit) -> None:
        """Told of each unit of this rank that is tokenised."""


def find_files(paths: Sequence[str], key: str = "source") -> dict[str, Path]:
    """Files that paths, folders and globs name, each once: name for the manifest -> path."""
    found: dict[str, Path] = {}
    for given in paths:
        top = Path(os.path.expanduser(given))
        if top.is_dir():
            below = sorted(p.relative_to(top) for p in top.rglob("*") if p.is_file() and split_suffix(p)[0])
            below = [p for p in below if not any(part.startswith(".") for part in p.parts)]
            names = {top / p: f"{top.resolve().name}/{p.as_posix()}" for p in below}
            problem = f"holds no file of the kinds {READABLE}; give another folder"
        else:
            matches = [top] if top.exists() else map(Path, sorted(glob.glob(str(top), recursive=True)))
            names = {p: p.name for p in matches if p.is_file()}
            problem = "is no file" if top.exists() else "does not exist"
            problem += f"; give files or folders of {READABLE}, or pydoc"
        if not names:
            raise UserError(f"{key} = {given} {problem}")
        for path, name in names.items():
            if not split_suffix(path)[0]:
                raise UserError(f"{key} = {path} has none of the known endings; give {READABLE}")
            if path.resolve() in found.values():
                continue
            while name in found:  # files of the same name from different folders
                name = f"other/{name}"
            found[name] = path.resolve()
    return found


def hash_source(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"source = {path} cannot be read: {error.strerror}; correct that") from None


def stamp_of(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"source = {path} cannot be read: {error.strerror}; correct that") from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_unchanged(unit: Unit) -> None:
    """Refuse a file that is not the one whose hash was taken: its text would stand under another's hash."""
    if unit.stamp and unit.stamp != stamp_of(Path(unit.path)):
        problem = "was changed or replaced while it was read; leave it alone and run again"
        raise UserError(f"source = {unit.path} {problem}")


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[:40].strip("-").lower() or "text"


def plan(index: int, path: Path, origin: str, text_column: str, skip_broken: bool = False) -> list[Unit]:
    """Divide a file into units; refuse one that has no such column."""
    kind, compression = split_suffix(path)
    size = path.stat().st_size
    n_bytes = size * (4 if compression else 1)
    unit = Unit(name=f"{index:05d}-00000", origin=origin, path=str(path), text_bytes=n_bytes, weight=size)
    if size == 0:
        return []
    if kind == "parquet":
        spans = parquet_spans(path, text_column)
    else:
        if kind == "jsonl":
            check_first_row(unit, text_column, skip_broken)
        if compression or encoding_of(path):
            return [unit]
        ends = [*(range(0, size - UNIT_BYTES + 1, UNIT_BYTES) or [0]), size]
        spans = [(start, stop, stop - start) for start, stop in itertools.pairwise(ends)]
    total = sum(n for _, _, n in spans) or 1
    return [
        replace(unit, name=f"{index:05d}-{i:05d}", start=a, stop=b, text_bytes=n, weight=size * n / total)
        for i, (a, b, n) in enumerate(spans)
    ]


def parquet_spans(path: Path, text_column: str) -> list[tuple[int, int, int]]:
    """Groups of row groups with about UNIT_BYTES of text: (first, one past the last, bytes)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    if text_column not in schema.names:
        raise no_column(path, text_column, schema.names)
    for name in {text_column, "id"}:
        if (n := schema.names.count(name)) > 1:
            raise UserError(f"text_column = {text_column}: {path} has {n} columns called {name}; keep one")
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        columns = ", ".join(schema.names)
        raise UserError(f"text_column = {text_column} of {path} holds {kind}, not text; it has: {columns}")
    roots = [metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)]
    column = roots.index(text_column)
    spans, start, n_bytes = [], 0, 0
    for group in range(metadata.num_row_groups):
        n_bytes += metadata.row_group(group).column(column).total_uncompressed_size
        if n_bytes >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            spans.append((start, group + 1, n_bytes))
            start, n_bytes = group + 1, 0
    return spans


def check_first_row(unit: Unit, text_column: str, skip_broken: bool) -> None:
    with reading(unit):
        row = next(json_rows(unit, Damage(skip_broken=skip_broken)), None)
    if isinstance(row, dict) and text_column not in row:
        raise no_column(unit.path, text_column, list(row))


def no_column(path: Path | str, text_column: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"text_column = {text_column} is not in {path}, which has {', '.join(names) or 'no columns'}; name "
        "the one with the text by --text_column"
    )


def unreadable(path: Path | str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"source file {path} cannot be read ({reason}); download or make it again")


# ---- documents of a unit --------------------------------------------------------------------------------


def documents(unit: Unit, text_column: str, damage: Damage | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield (id or None, text) of each document; text may be None or something other than a string."""
    kind, _ = split_suffix(Path(unit.path))
    read = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}[kind]
    with reading(unit):
        yield from read(unit, text_column, damage or Damage())


@contextlib.contextmanager
def reading(unit: Unit) -> Iterator[None]:
    """Say in one line that a file cannot be read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:  # EOFError: a cut gzip file
        check_unchanged(unit)
        raise unreadable(unit.path, error) from None


def read_parquet(unit: Unit, text_column: str, damage: Damage) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    # Streamed page by page: a row group may be as large as the file.
    with pq.ParquetFile(unit.path, buffer_size=1 << 20, pre_buffer=False) as file:
        groups = range(unit.start, unit.stop)
        n_rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        with_id = "id" in file.schema_arrow.names and text_column != "id"
        n_batch = max(1, min(1024, BATCH_BYTES * n_rows // max(unit.text_bytes, 1)))
        columns = ["id"] * with_id + [text_column]
        for batch in file.iter_batches(n_batch, row_groups=groups, columns=columns, use_threads=False):
            texts = to_list(batch.column(text_column), damage)
            ids = batch.column("id").to_pylist() if with_id else [None] * len(texts)
            yield from zip(ids, texts, strict=True)


def to_list(column: Any, damage: Damage) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # written by a program that does not check
        values = column.cast("large_binary").to_pylist()
        return [value if value is None else from_utf8(value, damage) for value in values]


def read_jsonl(unit: Unit, text_column: str, damage: Damage) -> Iterator[tuple[Any, Any]]:
    for row in json_rows(unit, damage):
        yield (row.get("id"), row.get(text_column)) if isinstance(row, dict) else (None, ...)


def json_rows(unit: Unit, damage: Damage) -> Iterator[Any]:
    """Rows whose first byte lies in the unit's range."""
    with open_bytes(Path(unit.path)) as file:
        at = 0
        if unit.start:
            file.seek(unit.start - 1)
            at = unit.start - 1 + len(file.readline())  # the unit before has this row
        while unit.stop < 0 or at < unit.stop:
            line = file.readline()
            if not line:
                return
            if line.strip():
                try:
                    yield json.loads(from_utf8(line.removeprefix(codecs.BOM_UTF8), damage))
                except (ValueError, RecursionError) as error:
                    if not damage.skip_broken:
                        raise no_json(unit, at, error) from None
                    damage.broken += 1
            at += len(line)


def no_json(unit: Unit, at: int, error: Exception) -> UserError:
    """Of the line that starts at this byte; what comes before is read again to know its number."""
    number = 1
    with open_bytes(Path(unit.path)) as file:
        while chunk := file.read(min(at, 1 << 20)):
            number, at = number + chunk.count(b"\n"), at - len(chunk)
    reason = f"{getattr(error, 'msg', error)!s:.80}"
    remedy = "correct or remove it, or let prepare_fineweb.py --skip_broken count such lines and go on"
    return UserError(f"source file {unit.path}: line {number} is not JSON ({reason}); {remedy}")


def read_txt(unit: Unit, text_column: str, damage: Damage) -> Iterator[tuple[Any, Any]]:
    """The whole file as one document; a large one in documents of about UNIT_BYTES, cut at blank lines."""
    with open_bytes(Path(unit.path)) as file:
        if unit.stop >= 0:  # not compressed, and UTF-8
            start = cut_after(file, unit.start) if unit.start else 0
            last = unit.stop == os.fstat(file.fileno()).st_size
            stop = unit.stop if last else cut_after(file, unit.stop)
            file.seek(start)
            yield None, decode(file.read(stop - start), damage)
            return
        rest = file.read(2 * UNIT_BYTES)
        while len(rest) == 2 * UNIT_BYTES:
            cut = UNIT_BYTES + cut_in(rest[UNIT_BYTES : UNIT_BYTES + CUT_BYTES])
            yield None, decode(rest[:cut], damage)
            rest = rest[cut:] + file.read(cut)
        yield None, decode(rest, damage)


def decode(data: bytes, damage: Damage) -> str:
    return from_utf8(data, damage).removeprefix("\ufeff").replace("\r\n", "\n")


def cut_after(file: BinaryIO, at: int) -> int:
    file.seek(at)
    return at + cut_in(file.read(CUT_BYTES))


def cut_in(window: bytes) -> int:
    """Where to cut: after a blank line, else a line, else between two characters."""
    cut = re.search(rb"\n[ \t\r]*\n", window) or re.search(rb"\n", window)
    return cut.end() if cut else re.search(rb"[^\x80-\xbf]|\Z", window).start()
