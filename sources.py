"""Where documents come from: local files, Python's own documentation, or the Hugging Face Hub.

A source divides its text into units of work, in a fixed order, and says which of them are this rank's:

    source = sources.Files(["corpus/"], text_column="text")
    for unit in source.units(rank=0, world=1, done=lambda unit: False):
        for doc_id, text in sources.documents(unit, "text"): ...  # text: str, or whatever stands there

Units depend on the input alone, never on the number of workers or ranks, and a worker reads
one in little memory.
"""

import ast
import contextlib
import errno
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import sysconfig
import threading
import time
import tokenize
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError

UNIT_BYTES = 8 << 20  # text in a unit of work: half a second of tokenising
BATCH_BYTES = 2 << 20  # text taken from a parquet file at once
TEXT_BYTES = 8 << 20  # a longer .txt file is cut into documents of about this size
CUT_BYTES = 1 << 20  # a blank line to cut at is looked for in so much
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READABLE = "*.parquet, *.jsonl, *.txt, *.jsonl.gz, *.jsonl.zst, *.txt.gz, *.txt.zst"
FINEWEB = "HuggingFaceFW/fineweb-edu"
TOKENS_PER_BYTE = 0.3  # of FineWeb-Edu's parquet files, at least
TRIES = 8  # of each call to the Hub
OTHER_SOURCES = "prepare files of your own with --source PATH, or set HF_ENDPOINT to a mirror of the Hub"

Done = Callable[["Unit"], Any]  # its counts, where it is finished
Log = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that one worker tokenises on its own."""

    name: str  # sorts like the documents
    origin: str  # hash of the content it belongs to
    path: str
    kind: str  # parquet, jsonl or txt
    compression: str | None
    start: int  # first row group of a parquet file, else first byte
    stop: int  # one past the last; -1 = to the end
    text_bytes: int  # about
    weight: float  # share of the source's bytes, for progress


@dataclass(frozen=True)
class SourceFile:
    name: str  # as the manifest shows it
    path: Path
    size: int
    sha256: str


# ---- local files ----------------------------------------------------------------------------------------


class Files:
    """Parquet, JSON lines and text files."""

    val_fraction = 0.01
    can_delete = False

    def __init__(self, paths: Sequence[str], *, text_column: str, n_threads: int = 1) -> None:
        found = find_files(paths)
        with ThreadPoolExecutor(n_threads) as pool:  # hashing lets other threads run
            hashes = pool.map(file_sha256, found.values())
            self.files = [
                SourceFile(name, path, path.stat().st_size, sha256)
                for (name, path), sha256 in zip(found.items(), hashes, strict=True)
            ]
        self.planned = [
            unit for i, file in enumerate(self.files) for unit in plan(i, file, text_column=text_column)
        ]
        self.name = slug("-".join(Path(path).name.split(".")[0] or "text" for path in paths))
        self.total_weight = sum(file.size for file in self.files)
        self.text_bytes = sum(unit.text_bytes for unit in self.planned)
        self.download_bytes = 0

    def description(self) -> dict:
        return {"files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files]}

    def units(self, rank: int, world: int, done: Done) -> Iterator[Unit]:
        yield from self.planned[rank::world]

    def known_units(self) -> list[Unit]:
        return self.planned

    def complete(self) -> bool:
        """Whether known_units() are all there are."""
        return True

    def finished(self, unit: Unit) -> None:
        """Told of each unit of this rank that is tokenised."""

    def close(self) -> None:
        """Told when the shards are made."""


class PythonDocs(Files):
    """The documentation inside Python itself: real English on every machine."""

    val_fraction = 0.05

    def __init__(self, folder: Path) -> None:
        path = folder / f"pydoc-{os.getpid()}.jsonl"
        try:
            with open(path, "w", encoding="utf-8") as file:
                for name, text in python_documents():
                    file.write(json.dumps({"id": name, "text": text}) + "\n")
            path = path.replace(folder / "pydoc.jsonl")
        finally:
            (folder / f"pydoc-{os.getpid()}.jsonl").unlink(missing_ok=True)
        super().__init__([str(path)], text_column="text")

    def description(self) -> dict:
        return {"python_documentation": sys.version.split()[0]} | super().description()


def find_files(paths: Sequence[str]) -> dict[str, Path]:
    """Files that paths, folders and globs name, each once: name for the manifest -> path."""
    found: dict[str, Path] = {}
    for given in paths:
        top = Path(os.path.expanduser(given))
        if top.is_dir():
            below = sorted(p for p in top.rglob("*") if p.is_file() and split_suffix(p)[0])
            below = [p for p in below if not any(part.startswith(".") for part in p.relative_to(top).parts)]
            names = {p: f"{top.resolve().name}/{p.relative_to(top).as_posix()}" for p in below}
            if not names:
                raise UserError(
                    f"source = {given} holds no file of the kinds {READABLE}; give another folder"
                )
        else:
            matches = (
                [top] if top.exists() else [Path(p) for p in sorted(glob.glob(str(top), recursive=True))]
            )
            names = {p: p.name for p in matches if p.is_file()}
            if not names:
                raise UserError(
                    f"source = {given} does not exist; give files or folders of {READABLE}, or pydoc"
                )
        for path, name in names.items():
            if not split_suffix(path)[0]:
                raise UserError(f"source = {path} has none of the known endings; give {READABLE}")
            if path.resolve() in found.values():
                continue
            while name in found:  # files of the same name from different folders
                name = f"other/{name}"
            found[name] = path.resolve()
    return found


def split_suffix(path: Path) -> tuple[str | None, str | None]:
    """Kind and compression by the name's ending; None for a kind not known."""
    name, compression = path.name.lower(), None
    for ending, of in COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), of
    kind = KINDS.get(os.path.splitext(name)[1])
    return (None, None) if kind == "parquet" and compression else (kind, compression)


def file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"source = {path} cannot be read: {error.strerror}; correct its permissions"
        ) from None


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[:40].strip("-").lower() or "text"


def plan(index: int, file: SourceFile, *, text_column: str) -> list[Unit]:
    """Divide a file into units; refuse one that has no such column."""
    kind, compression = split_suffix(file.path)
    assert kind is not None, file.path
    unit = Unit(
        name=f"{index:05d}-00000",
        origin=file.sha256,
        path=str(file.path),
        kind=kind,
        compression=compression,
        start=0,
        stop=-1,
        text_bytes=file.size * (4 if compression else 1),
        weight=file.size,
    )
    if file.size == 0:
        return []
    if kind == "parquet":
        spans = parquet_spans(file.path, text_column)
    else:
        if kind == "jsonl":
            check_first_row(unit, text_column)
        if compression:
            return [unit]
        n = max(1, file.size // UNIT_BYTES)
        ends = [i * UNIT_BYTES for i in range(n)] + [file.size]
        spans = [(a, b, b - a) for a, b in zip(ends, ends[1:], strict=False)]
    total = sum(span[2] for span in spans) or 1
    return [
        replace(
            unit,
            name=f"{index:05d}-{i:05d}",
            start=start,
            stop=stop,
            text_bytes=n_bytes,
            weight=file.size * n_bytes / total,
        )
        for i, (start, stop, n_bytes) in enumerate(spans)
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
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in is_text):
        raise UserError(
            f"text_column = {text_column} of {path} holds {kind}, not text; it has: {', '.join(schema.names)}"
        )
    column = next(
        i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == text_column
    )
    spans, start, n_bytes = [], 0, 0
    for group in range(metadata.num_row_groups):
        n_bytes += metadata.row_group(group).column(column).total_uncompressed_size
        if n_bytes >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            spans.append((start, group + 1, n_bytes))
            start, n_bytes = group + 1, 0
    return spans


def check_first_row(unit: Unit, text_column: str) -> None:
    with open_bytes(unit) as file:
        row = next((parse_row(line, unit, 0) for line in file if line.strip()), None)
    if isinstance(row, dict) and text_column not in row:
        raise no_column(Path(unit.path), text_column, list(row))


def no_column(path: Path | str, text_column: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"text_column = {text_column} is not in {path}, which has {', '.join(names) or 'no columns'}; name "
        "the one with the text by --text_column"
    )


def unreadable(path: Path | str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"source file {path} cannot be read ({reason}); download or make it again")


# ---- documents of a unit --------------------------------------------------------------------------------


def documents(unit: Unit, text_column: str) -> Iterator[tuple[Any, Any]]:
    """Yield (id or None, text) of each document; text may be None or something other than a string."""
    import pyarrow as pa

    read = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}[unit.kind]
    try:
        yield from read(unit, text_column)
    except (pa.ArrowException, OSError, EOFError) as error:  # EOFError: a gzip file that is cut off
        raise unreadable(unit.path, error) from None


def read_parquet(unit: Unit, text_column: str) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    # Streamed page by page: a row group may be as large as the file.
    with pq.ParquetFile(unit.path, buffer_size=1 << 20, pre_buffer=False) as file:
        groups = range(unit.start, unit.stop)
        n_rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        with_id = "id" in file.schema_arrow.names and text_column != "id"
        n_batch = max(1, min(1024, BATCH_BYTES * n_rows // max(unit.text_bytes, 1)))
        batches = file.iter_batches(
            n_batch, row_groups=groups, columns=["id"] * with_id + [text_column], use_threads=False
        )
        for batch in batches:
            texts = to_list(batch.column(text_column))
            ids = batch.column("id").to_pylist() if with_id else [None] * len(texts)
            yield from zip(ids, texts, strict=True)


def to_list(column: Any) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # written by a program that does not check
        values = column.cast("large_binary").to_pylist()
        return [value if value is None else value.decode("utf-8", "replace") for value in values]


def open_bytes(unit: Unit) -> BinaryIO:
    try:
        if unit.compression == "gzip":
            return gzip.open(unit.path, "rb")
        if unit.compression == "zstd":
            import pyarrow as pa

            return io.BufferedReader(pa.input_stream(unit.path, compression="zstd"), 1 << 20)
        return open(unit.path, "rb")
    except OSError as error:
        raise unreadable(unit.path, error) from None


def read_jsonl(unit: Unit, text_column: str) -> Iterator[tuple[Any, Any]]:
    """Rows whose first byte lies in the unit's range."""
    with open_bytes(unit) as file:
        at = 0
        if unit.start:
            file.seek(unit.start - 1)
            at = unit.start - 1 + len(file.readline())  # the unit before has this row
        while unit.stop < 0 or at < unit.stop:
            line = file.readline()
            if not line:
                return
            if line.strip():
                row = parse_row(line, unit, at)
                yield (row.get("id"), row.get(text_column)) if isinstance(row, dict) else (None, ...)
            at += len(line)


def parse_row(line: bytes, unit: Unit, at: int) -> Any:
    """A JSON object; text that is no valid UTF-8 is repaired."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"source file {unit.path}: the line at byte {at} is not JSON ({error}); correct or remove it"
        ) from None


def read_txt(unit: Unit, text_column: str) -> Iterator[tuple[Any, Any]]:
    """The whole file as one document; a large one in documents of about TEXT_BYTES, cut at blank lines."""
    with open_bytes(unit) as file:
        if unit.compression is None:
            start = cut_after(file, unit.start) if unit.start else 0
            last = unit.stop == os.fstat(file.fileno()).st_size
            stop = unit.stop if last else cut_after(file, unit.stop)
            file.seek(start)
            yield None, decode(file.read(stop - start))
            return
        rest = file.read(2 * TEXT_BYTES)
        while len(rest) == 2 * TEXT_BYTES:
            cut = TEXT_BYTES + cut_in(rest[TEXT_BYTES : TEXT_BYTES + CUT_BYTES])
            yield None, decode(rest[:cut])
            rest = rest[cut:] + file.read(cut)
        yield None, decode(rest)


def decode(data: bytes) -> str:
    return data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n")


def cut_after(file: BinaryIO, at: int) -> int:
    file.seek(at)
    return at + cut_in(file.read(CUT_BYTES))


def cut_in(window: bytes) -> int:
    """Where to cut: after a blank line, else a line, else between two characters."""
    cut = re.search(rb"\n[ \t\r]*\n", window) or re.search(rb"\n", window)
    return cut.end() if cut else re.search(rb"[^\x80-\xbf]|\Z", window).start()


# ---- Python's documentation -----------------------------------------------------------------------------


def python_documents() -> Iterator[tuple[str, str]]:
    """The language reference's topics, and the docstrings of each standard module (parsed, not run)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic/{name}", topics[name].strip()
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        relative = path.relative_to(stdlib)
        if skipped.isdisjoint(relative.parts):
            text = "\n\n\n".join(docstrings(path))
            if len(text) >= 100:
                yield f"module/{relative.as_posix()}", f"{'.'.join(relative.with_suffix('').parts)}\n\n{text}"


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, under their names, in order."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # of backslashes in strings
            tree = ast.parse(file.read())
    except (SyntaxError, ValueError, OSError):  # templates, and files in Python 2
        return
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, named):
                doc = ast.get_docstring(child)
                if doc and len(doc) >= 40:
                    what = "class" if isinstance(child, ast.ClassDef) else "function"
                    yield f"{what} {prefix}{child.name}\n\n{inspect.cleandoc(doc)}"
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, prefix)

    if doc := ast.get_docstring(tree):
        yield doc
    yield from walk(tree, "")


# ---- the Hugging Face Hub -------------------------------------------------------------------------------


class FineWeb:
    """A sample of FineWeb-Edu: its parquet files, downloaded in threads while those before are tokenised."""

    val_fraction = 0.0005

    def __init__(
        self,
        config: str | None,
        revision: str,
        *,
        max_tokens: int | None,
        out: Path,
        delete: bool,
        log: Log,
    ) -> None:
        config = config or "sample-10BT"
        if not re.fullmatch(r"sample-\d+BT", config):
            raise UserError(
                f"config = {config} is no sample of {FINEWEB}: sample-10BT, sample-100BT, sample-350BT"
            )
        self.parts, self.folder, self.delete, self.log = out / ".parts", out / "source", delete, log
        self.can_delete = not delete
        self.name, self.max_tokens = "fineweb-edu", max_tokens
        asked = {"dataset": FINEWEB, "config": config}
        self.state = recorded(out, asked, revision, lambda: asked | list_fineweb(config, revision, log))
        self.files = self.state["files"]
        self.total_weight = sum(file["size"] for file in self.files)
        self.text_bytes = int(2.6 * self.total_weight)
        ends = list(itertools.accumulate(file["size"] for file in self.files))
        enough = (max_tokens or math.inf) / TOKENS_PER_BYTE
        self.n_wanted = 1 + sum(end < enough for end in ends[:-1])  # files, most likely
        sizes = [file["size"] for file in self.files[: self.n_wanted]]
        self.download_bytes = sum(sorted(sizes)[-3:] if delete and max_tokens is None else sizes)
        self.plans: dict[int, list[Unit]] = {}
        self.left: dict[str, int] = {}  # units that are not yet tokenised, of each file

    def description(self) -> dict:
        return self.state

    def complete(self) -> bool:
        return all(self.read_plan(i) is not None for i in range(len(self.files)))

    def plan_path(self, index: int) -> Path:
        return self.parts / f"{index:05d}.units.json"

    def read_plan(self, index: int) -> list[Unit] | None:
        if index not in self.plans:
            try:
                units = [Unit(**unit) for unit in json.loads(self.plan_path(index).read_text())]
            except (OSError, ValueError, TypeError):
                return None
            if any(unit.origin != self.origin(index) for unit in units):
                return None
            self.plans[index] = units
        return self.plans[index]

    def origin(self, index: int) -> str:
        file = self.files[index]
        return f"{self.state['revision']} {file['path']} {file['size']} {file['sha256']}"

    def known_units(self) -> list[Unit]:
        """Units of the first files, as far as these have been downloaded by some rank."""
        units = []
        for i in range(len(self.files)):
            planned = self.read_plan(i)
            if planned is None:
                break
            units += planned
        return units

    def units(self, rank: int, world: int, done: Done) -> Iterator[Unit]:
        """Units of this rank's files: every world-th, so that each is downloaded once."""
        mine = deque(range(rank, len(self.files), world))
        ahead: deque = deque()
        while mine or ahead:
            while mine and (not ahead or len(ahead) < 2 and mine[0] < self.n_wanted):
                index = mine.popleft()
                planned = self.read_plan(index)
                ready = planned is not None and all(done(unit) for unit in planned)
                ahead.append((index, planned if ready else in_thread(self.fetch, index)))
            index, units = ahead.popleft()
            if isinstance(units, Future):
                units = self.plan(index, units.result())
            for unit in units:
                self.left[unit.path] = self.left.get(unit.path, 0) + 1
            yield from units

    def fetch(self, index: int) -> Path:
        """Download one file, continuing what is there of it, and check its size."""
        file = self.files[index]
        path = self.folder / file["path"]
        if path.is_file() and path.stat().st_size == file["size"]:
            return path
        from huggingface_hub import hf_hub_download

        what = f"file {index + 1} of {len(self.files)}, {file['path']} ({file['size'] / 1e9:.2f} GB)"
        self.log(f"downloading {what}")

        def download() -> Path:
            got = hf_hub_download(
                FINEWEB,
                file["path"],
                repo_type="dataset",
                revision=self.state["revision"],
                local_dir=self.folder,
            )
            size = Path(got).stat().st_size
            if size != file["size"]:
                Path(got).unlink()
                raise OSError(f"{got} has {size} bytes, not {file['size']}")
            return Path(got)

        return with_retries(what, download, self.log)

    def plan(self, index: int, path: Path) -> list[Unit]:
        file = self.files[index]
        source_file = SourceFile(file["path"], path, file["size"], self.origin(index))
        units = plan(index, source_file, text_column="text")
        write_json(self.plan_path(index), [asdict(unit) for unit in units])
        return units

    def finished(self, unit: Unit) -> None:
        if unit.path in self.left:
            self.left[unit.path] -= 1
            if self.delete and not self.left[unit.path] and self.max_tokens is None:
                Path(unit.path).unlink(missing_ok=True)

    def close(self) -> None:
        if self.delete:
            shutil.rmtree(self.folder, ignore_errors=True)


def in_thread(function: Callable[..., Any], *args: Any) -> Future:
    """Start a call in a thread that does not keep an interrupted process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Stream:
    """Any dataset of the Hub through the package `datasets`, streamed into files of a unit each."""

    val_fraction = 0.0005
    can_delete = False
    download_bytes = 0
    total_weight = 0.0  # not known
    text_bytes = 0

    def __init__(
        self,
        dataset: str,
        config: str | None,
        split: str,
        revision: str,
        *,
        text_column: str,
        max_tokens: int | None,
        out: Path,
        log: Log,
    ) -> None:
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise UserError(
                f'dataset = {dataset} needs the package `datasets`; run `pip install ".[data]"`, or '
                "download its files and give them as --source"
            ) from None
        self.parts, self.text_column, self.log = out / ".parts", text_column, log
        self.name = slug(dataset.rstrip("/").split("/")[-1])
        self.dataset, self.max_tokens = dataset, max_tokens
        self.n_seen = 0  # sidecars
        asked = {"dataset": dataset, "config": config, "split": split}
        self.state = recorded(out, asked, revision, lambda: asked | {"revision": self.commit(revision)})

    def commit(self, revision: str) -> str | None:
        if Path(self.dataset).exists():
            return None  # a folder, not of the Hub
        from huggingface_hub import HfApi

        what = f"revision {revision} of the dataset {self.dataset}"
        return with_retries(
            what, lambda: HfApi().dataset_info(self.dataset, revision=revision), self.log, 3
        ).sha

    def description(self) -> dict:
        return self.state

    def unit(self, index: int) -> Unit:
        return Unit(
            name=f"{index:08d}",
            origin=json.dumps(self.state, sort_keys=True),
            path=str(self.parts / f"{index:08d}.jsonl"),
            kind="jsonl",
            compression=None,
            start=0,
            stop=-1,
            text_bytes=UNIT_BYTES,
            weight=0,
        )

    def n_units(self) -> int | None:
        try:
            end = json.loads((self.parts / "stream-end.json").read_text())
        except (OSError, ValueError):
            return None
        return end["n_units"] if end["state"] == self.state else None

    def complete(self) -> bool:
        return self.n_units() is not None

    def known_units(self) -> list[Unit]:
        """All units, where the end is known, else up to the first without a sidecar."""
        n_units = self.n_units()
        if n_units is None:
            while (self.parts / f"{self.n_seen:08d}.json").exists():
                self.n_seen += 1
            n_units = self.n_seen + 1
        return [self.unit(i) for i in range(n_units)]

    def units(self, rank: int, world: int, done: Done) -> Iterator[Unit]:
        """Every world-th unit; the stream starts behind the first units that are finished."""
        index = n_rows = 0
        while counts := done(self.unit(index)):
            if index % world == rank:
                yield self.unit(index)
            index, n_rows = index + 1, n_rows + counts.n_rows
        if index == self.n_units():
            return
        lines: list[str] = []
        n_bytes = 0
        rows = self.rows(n_rows)
        while True:
            row = next(rows, None)
            if lines and (row is None or n_bytes >= UNIT_BYTES):
                unit = self.unit(index)
                if index % world == rank:
                    if not done(unit):
                        write_text(Path(unit.path), "".join(lines))
                    yield unit
                lines, n_bytes, index = [], 0, index + 1
            if row is None:
                break
            lines.append(row)
            n_bytes += len(row)
        write_json(self.parts / "stream-end.json", {"state": self.state, "n_units": index})

    def rows(self, n_skip: int) -> Iterator[str]:
        """Rows as JSON lines with id and text alone."""
        import datasets

        first = True
        try:
            stream = datasets.load_dataset(
                self.dataset,
                self.state["config"],
                split=self.state["split"],
                revision=self.state["revision"],
                streaming=True,
            )
            for row in stream.skip(n_skip):
                if first and self.text_column not in row:
                    raise no_column(f"the dataset {self.dataset}", self.text_column, list(row))
                first = False
                kept = {key: row[key] for key in ("id", self.text_column) if key in row}
                yield json.dumps(kept, default=lambda value: [str(type(value))]) + "\n"
        except UserError:
            raise
        except Exception as error:  # of many libraries, depending on the dataset
            raise UserError(
                f"dataset = {self.dataset}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                "correct --dataset, --config, --split; what is tokenised so far is kept"
            ) from None

    def finished(self, unit: Unit) -> None:
        if self.max_tokens is None:  # else it may be read again, to be cut
            Path(unit.path).unlink(missing_ok=True)

    def close(self) -> None: ...


def recorded(out: Path, asked: dict, revision: str, find: Callable[[], dict]) -> dict:
    """What a finished or interrupted run found on the Hub for the same request, else what is found now."""
    path = out / ".parts" / "source.json"
    stale = False
    for place, read in ((out / "manifest.json", lambda x: x["source"]), (path, lambda x: x)):
        try:
            state = read(json.loads(place.read_text()))
            same = all(state.get(key) == value for key, value in asked.items())
            if same and revision in ("main", state["revision"]):
                return state
            stale = place == path
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    found = find()
    if stale:
        path.unlink(missing_ok=True)
    write_json(path, found, keep=True)  # the first of several ranks decides
    return json.loads(path.read_text())


def list_fineweb(config: str, revision: str, log: Log) -> dict:
    """Commit, and name, size and SHA-256 of each parquet file."""
    from huggingface_hub import HfApi

    api, folder = HfApi(), config.replace("-", "/")
    what = f"revision {revision} of {FINEWEB}"
    commit = with_retries(what, lambda: api.dataset_info(FINEWEB, revision=revision), log, 3).sha
    what = f"list of the files of {FINEWEB}, {folder}"
    tree = with_retries(
        what,
        lambda: list(
            api.list_repo_tree(FINEWEB, folder, repo_type="dataset", revision=commit, recursive=True)
        ),
        log,
    )
    files = [
        {"path": entry.path, "size": entry.size, "sha256": entry.lfs.sha256 if entry.lfs else None}
        for entry in sorted(tree, key=lambda entry: entry.path)
        if entry.path.endswith(".parquet")
    ]
    if not files:
        raise UserError(
            f"{FINEWEB} at revision {commit} has no parquet file in {folder}; choose another --revision"
        )
    return {"revision": commit, "files": files}


def with_retries(what: str, call: Callable[[], Any], log: Log, tries: int = TRIES) -> Any:
    """Call until it works; wait longer each time, or as long as the server asks; refusals are final."""
    for attempt in range(1, tries + 1):
        try:
            return call()
        except Exception as error:  # of huggingface_hub, its HTTP library or the file system
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(
                    f"{what}: no space left on the disk; free some and run again to continue"
                ) from None
            final = type(error).__name__ == "OfflineModeIsEnabled"
            if final or (status is not None and 400 <= status < 500 and status not in (408, 429)):
                raise UserError(f"{what} cannot be had from the Hub ({reason}); {OTHER_SOURCES}") from None
            if attempt == tries:
                raise UserError(
                    f"{what} cannot be had from the Hub after {tries} tries ({reason}); check the network "
                    f"and run the same command again to continue, {OTHER_SOURCES}"
                ) from None
            asked = getattr(response, "headers", {}).get("Retry-After", "")
            delay = min(float(asked), 600) if asked.isdigit() else min(2**attempt, 60)
            log(f"{what}: {reason[:160]}; try {attempt + 1} of {tries} in {delay:.0f} s")
            time.sleep(delay)


def write_json(path: Path, content: Any, *, keep: bool = False) -> None:
    write_text(path, json.dumps(content), keep=keep)


def write_text(path: Path, text: str, *, keep: bool = False) -> None:
    """Write a file whole or not at all; with keep, only where there is none yet."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if keep:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
    else:
        os.replace(temporary, path)
