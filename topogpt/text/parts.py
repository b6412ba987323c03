"""Units of text -> part files, by worker processes -> shards.

A worker tokenises a unit into OUT_DIR/.parts/UNIT.train.bin and UNIT.val.bin, and writes the sidecar
UNIT.json last: a unit with a sidecar of the same key is not done again. Then the parts, laid end to end in
the order of the units, are cut into shards: neither the number of workers or ranks nor a kill changes a byte.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from topogpt.errors import UserError
from topogpt.files import read_json, whole, write_json
from topogpt.ranks import Place
from topogpt.terminal import progress, say
from topogpt.text import sources, tokenizer
from topogpt.text.shards import header
from topogpt.text.sources import Unit

FORMAT = "topogpt-1: llm.c shards (256 int32 header, uint16 tokens), EOT before every document"
SPLITS = ("train", "val")
REASONS = ("null", "empty", "not_text")  # to skip a document
DAMAGE = ("repaired", "broken")  # as in sources.Damage
COPY_BYTES = 1 << 20
WAIT_SECONDS = 1800  # rank 0 gives up when the others finish nothing for so long
LOG_SECONDS = 10


class Counts(NamedTuple):
    """What tokenising a unit found."""

    tokens: dict[str, int]
    documents: dict[str, int]
    skipped: dict[str, int]
    damage: dict[str, int]  # repaired documents, and broken lines, which were skipped

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def n_documents(self) -> int:
        return sum(self.documents.values())

    @property
    def n_rows(self) -> int:
        return self.n_documents + sum(self.skipped.values()) + self.damage["broken"]


def no_counts() -> Counts:
    return Counts(*(dict.fromkeys(names, 0) for names in (SPLITS, SPLITS, REASONS, DAMAGE)))


def read_counts(found: dict[str, Any]) -> Counts | None:
    """What a sidecar says, where it says all of it."""
    empty = no_counts()
    fields = [found.get(name, {}) for name in Counts._fields[:-1]] + [found.get("damage", empty.damage)]
    for field, wanted in zip(fields, empty, strict=True):
        if not isinstance(field, dict) or field.keys() != wanted.keys():
            return None
        if not all(type(n) is int and n >= 0 for n in field.values()):
            return None
    return Counts(*fields)


def add_counts(several: list[Counts]) -> Counts:
    columns = zip(no_counts(), *several, strict=True)
    return Counts(*({key: sum(c[key] for c in column) for key in column[0]} for column in columns))


class Settings(NamedTuple):
    """What the bytes of a part depend on, besides its unit; and what to do about a broken line."""

    text_column: str
    val_fraction: float
    tokenizer_sha256: str
    skip_broken: bool = False  # no part of the key: a unit without such lines is the same either way

    def key(self, unit: Unit) -> str:
        name = Path(unit.path).name
        content = [FORMAT, self[:3], unit.name, unit.origin, name, unit.start, unit.stop, unit.limit]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Parts:
    """The folder of part files and sidecars."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.cache: dict[str, Counts] = {}  # by the key of a finished unit

    def path(self, unit: Unit, split: str) -> Path:
        return self.folder / f"{unit.name}.{split}.bin"

    def sidecar(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.json"

    def read(self, unit: Unit) -> Counts | None:
        """Counts of a unit that is finished with these settings."""
        key = self.settings.key(unit)
        if key not in self.cache:
            found = read_json(self.sidecar(unit))
            if found.get("key") != key:
                return None
            counts = read_counts(found)
            if counts is None or (counts.damage["broken"] and not self.settings.skip_broken):
                return None
            for split, n in counts.tokens.items():
                path = self.path(unit, split)
                if n and not (path.exists() and path.stat().st_size == 2 * n):
                    return None
            self.cache[key] = counts
        return self.cache[key]


# ---- workers --------------------------------------------------------------------------------------------


class Worker(NamedTuple):
    tokenizer: tokenizer.Tokenizer
    parts: Parts


worker: Worker | None = None  # of this process


class ThisProcess(Executor):
    """Does at once what it is given: a pool of one worker needs no other process."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def worker_pool(n_workers: int, vocab_dir: str, parts: Parts) -> Iterator[Executor]:
    """Processes that each hold a tokenizer; spawned, since forking a process with threads is unsafe."""
    start = (vocab_dir, parts.folder, parts.settings)
    if n_workers == 1:
        hold(*start)
        yield ThisProcess()
        return
    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), start_worker, start)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: it is this process that ends the pool
    for _ in range(n_workers):
        pool.submit(int)  # start them now, while the input is looked through
    signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; run the same command again to continue, with "
            f"a smaller --num_proc than {n_workers}"
        ) from None
    finally:
        if sys.exc_info()[0]:
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker(vocab_dir: str, folder: Path, settings: Settings) -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    hold(vocab_dir, folder, settings)


def hold(vocab_dir: str, folder: Path, settings: Settings) -> None:
    global worker
    worker = Worker(tokenizer.load(vocab_dir), Parts(folder, settings))


def die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(unit: Unit) -> Counts:
    """Tokenise a unit into its part files."""
    try:
        return tokenise_unit(worker, unit)
    except (UserError, KeyboardInterrupt):
        raise
    except OSError as error:
        place = error.filename or worker.parts.folder
        raise UserError(f"{place}: {error.strerror}; free or correct it and run again") from None
    except BaseException as error:  # tiktoken's PanicException is no Exception, and cannot be sent
        what = f"tokenising {unit.path} from {unit.start}"
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error


def tokenise_unit(w: Worker, unit: Unit) -> Counts:
    parts, counts = w.parts, no_counts()
    threshold = parts.settings.val_fraction * 2.0**64
    damage = sources.Damage(skip_broken=parts.settings.skip_broken)
    with contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            part = stack.enter_context(whole(parts.path(unit, split)))
            files[split] = stack.enter_context(open(part, "wb", 1 << 20))
        for doc_id, text in sources.documents(unit, parts.settings.text_column, damage):
            if not isinstance(text, str) or not text or text.isspace():
                reason = "null" if text is None else "empty" if isinstance(text, str) else "not_text"
                counts.skipped[reason] += 1
                continue
            split = "val" if hash_of(text if doc_id is None else str(doc_id)) < threshold else "train"
            ids = w.tokenizer.encode_document(text)
            files[split].write(ids.astype("<u2", copy=False).data)
            counts.tokens[split] += len(ids)
            counts.documents[split] += 1
            if unit.limit is not None and counts.n_tokens >= unit.limit:
                break
        sources.check_unchanged(unit)
    counts.damage.update({name: getattr(damage, name) for name in DAMAGE})
    write_json(parts.sidecar(unit), {"key": parts.settings.key(unit)} | counts._asdict(), indent=None)
    return counts


def hash_of(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


# ---- units -> parts -------------------------------------------------------------------------------------


def tokenise(
    pool: Executor, units: Iterable[Unit], n_ahead: int, show: Callable[[], None]
) -> Iterator[tuple[Unit, Counts]]:
    """Give units to the workers, a few ahead; yield each that is finished, and call `show` once a second."""
    running: dict[Future, Unit] = {}
    for unit in itertools.chain(units, [None]):
        if unit:
            running[pool.submit(work, unit)] = unit
        while len(running) > (n_ahead if unit else 0):
            for future in wait(running, timeout=1, return_when="FIRST_COMPLETED").done:
                yield running.pop(future), future.result()
            show()


def enough(source: Any, parts: Parts, max_tokens: int | None) -> list[Unit] | None:
    """The first units, all finished, that together reach max_tokens; None where there are none such yet."""
    n_tokens, units = 0, source.known_units()[0] if max_tokens else []
    for i, unit in enumerate(units):
        counts = parts.read(unit)
        if counts is None:
            return None
        n_tokens += counts.n_tokens
        if n_tokens >= max_tokens:
            return units[: i + 1]
    return None


def wait_for_units(source: Any, parts: Parts, max_tokens: int | None, ranks: Place) -> list[Unit]:
    """Every unit the shards are made of, in order, once the other ranks have finished theirs."""
    t_said = t_progress = time.monotonic()
    n_before = None
    while True:
        if first := enough(source, parts, max_tokens):
            return first
        units, complete = source.known_units()
        left = [unit.name for unit in units if parts.read(unit) is None]
        if complete and not left:
            return units
        assert ranks.world > 1, left
        now = time.monotonic()
        if n_before != (len(units), len(left)):
            n_before, t_progress = (len(units), len(left)), now
        if now - t_progress > WAIT_SECONDS:
            raise UserError(
                f"the other ranks finished nothing for {WAIT_SECONDS} s, and {len(left)} units are missing "
                f"(first: {left[:1]}); run the same command again, or as one process to do all that is left"
            )
        if now - t_said > LOG_SECONDS:
            t_said = now
            known = f"{len(left)} of {len(units)} known units are left"
            say(f"rank 0 waits for {ranks.world - 1} others: {known}")
        time.sleep(0.5)


# ---- parts -> shards ------------------------------------------------------------------------------------


class Piece(NamedTuple):
    path: Path
    start: int  # tokens
    n_tokens: int


def assemble(pool: Executor, units: list[Unit], parts: Parts, name: str, shard_size: int) -> list[dict]:
    """Cut the parts, laid end to end, into shards; the shards as the manifest lists them."""
    out = parts.folder.parent
    tasks = []
    for split in SPLITS:
        sizes = [parts.read(unit).tokens[split] for unit in units]
        ends = list(itertools.accumulate(sizes))
        n_tokens = sum(sizes)
        for index, first in enumerate(range(0, n_tokens, shard_size)):
            last = min(first + shard_size, n_tokens)
            pieces = []
            for unit, n, end in zip(units, sizes, ends, strict=True):
                start, stop = max(first, end - n), min(last, end)
                if start < stop:
                    pieces.append(Piece(parts.path(unit, split), start - (end - n), stop - start))
            tasks.append((f"{split}/{name}_{split}_{index:06d}.bin", split, pieces))
    write_json(parts.folder / "assembly.json", {"shards": [path for path, _, _ in tasks]})
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    # a pool of one makes each as it is given it, another one while the results are asked for
    made = [pool.submit(make_shard, out / path, pieces) for path, _, pieces in progress(tasks, "shards")]
    hashes = [future.result() for future in progress(made, "shards")]
    return [
        {"path": path, "split": split, "tokens": sum(p.n_tokens for p in pieces), "sha256": sha256}
        for (path, split, pieces), sha256 in zip(tasks, hashes, strict=True)
    ]


def read_pieces(pieces: list[Piece]) -> Iterator[memoryview]:
    """Bytes of the pieces; of the chunks that it yields, the last two are valid."""
    buffers = itertools.cycle([memoryview(bytearray(COPY_BYTES)) for _ in range(2)])
    for piece in pieces:
        with open(piece.path, "rb", buffering=0) as part:
            part.seek(2 * piece.start)
            left = 2 * piece.n_tokens
            while left:
                buffer = next(buffers)
                chunk = buffer[: part.readinto(buffer[:left])]
                assert chunk, f"{piece.path} is shorter than its sidecar says"
                yield chunk
                left -= len(chunk)


def make_shard(target: Path, pieces: list[Piece]) -> str:
    """Copy the pieces into one shard, and hash it in a second thread; its SHA-256."""
    start = header(sum(piece.n_tokens for piece in pieces))
    sha256 = hashlib.sha256(start)
    with whole(target) as part, open(part, "wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(start)
        hashed = None
        for chunk in read_pieces(pieces):
            file.write(chunk)
            if hashed:
                hashed.result()  # so the chunk before is free to be read into
            hashed = hasher.submit(sha256.update, chunk)
    return sha256.hexdigest()
