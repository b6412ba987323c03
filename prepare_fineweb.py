"""Text to token shards: FineWeb-Edu's 10B-token sample, files of your own, or any dataset of the Hub.

    python prepare_fineweb.py                                          # -> data/fineweb-edu-10B/{train,val}
    python prepare_fineweb.py --source corpus/ --out_dir data/corpus   # parquet, jsonl, txt
    python prepare_fineweb.py --source pydoc --out_dir data/pydoc
    python prepare_fineweb.py --dataset wikimedia/wikipedia --config 20231101.en --out_dir data/wikipedia
    srun --ntasks=10 python prepare_fineweb.py                         # ten machines, one shared folder

Workers tokenise units (row groups, byte ranges) into part files under OUT_DIR/.parts, each put in
place whole; then the parts, in the order of the units, are cut into shards. What a killed run has finished,
the next one keeps, and neither the number of workers nor of ranks changes a byte of the output.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sources
import tokenizer
from config import UserError, check_at_least, parse, run_main
from shards import HEADER_BYTES, header
from sources import Unit, write_json, write_text

FORMAT = "topogpt-1: llm.c shards (256 int32 header, uint16 tokens), EOT before every document"
SPLIT_RULE = (
    "a document is in val where the first 8 bytes of blake2b of its id (its text, where it has none), as a "
    "big-endian number, divided by 2**64, are below val_fraction"
)
SPLITS = ("train", "val")
REASONS = ("null", "empty", "not_text")  # to skip a document
COPY_BYTES = 4 << 20
WAIT_SECONDS = 1800  # rank 0 gives up when the others finish nothing for so long
LOG_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise text into shards that train.py reads; without --source or --dataset: FineWeb-Edu sample-10BT.

    A row of parquet or jsonl is a document; so is a .txt file, which is cut at blank lines every 8 MB. Which
    documents are in val is decided by a hash of their id (of the text, where there is none), so neither their
    order nor the number of workers or ranks matters. `--source pydoc` is Python's own documentation. Under
    torchrun or srun the ranks divide the work. A run that was interrupted continues with the same command.
    """

    out_dir: str = "data/fineweb-edu-10B"  # gets train/*.bin, val/*.bin and manifest.json
    source: tuple[
        str, ...
    ] = ()  # files, folders, globs (parquet, jsonl, txt; .gz, .zst of these two) or pydoc
    dataset: str | None = None  # a dataset of the Hub, streamed through the package `datasets`
    config: str | None = None  # its configuration; without --dataset: FineWeb-Edu's sample (sample-10BT)
    split: str = "train"  # its split
    revision: str = "main"  # of the Hub dataset; resolved to a commit, which is recorded and kept
    text_column: str = "text"  # column or JSON key of the text
    max_tokens: int | None = None  # stop after the document with which train + val reach this
    shard_size: int = 100_000_000  # tokens in a shard; the last one is shorter
    val_fraction: float | None = (
        None  # share of documents in val; default: Hub 0.0005, files 0.01, pydoc 0.05
    )
    num_proc: int | None = None  # worker processes; default: one per core
    delete_source: bool = False  # delete each downloaded file once tokenised (never the files of --source)
    vocab_dir: str | None = (
        None  # folder with GPT-2's vocab.bpe and encoder.json; default: cache, then download
    )

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_at_least("max_tokens", self.max_tokens, 1)
        check_at_least("shard_size", self.shard_size, 1)
        if self.shard_size >= 2**31:
            raise UserError(
                f"shard_size = {self.shard_size} does not fit a shard's header; it must be below 2**31"
            )
        if self.num_proc is not None:
            check_at_least("num_proc", self.num_proc, 1)
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction} must be at least 0 and below 1")
        if self.source and self.dataset:
            raise UserError("source and dataset exclude each other; give one of them")
        if "pydoc" in self.source and len(self.source) > 1:
            raise UserError("source = pydoc cannot be mixed with files; prepare them into two folders")
        if self.delete_source and (self.source or self.dataset):
            raise UserError(
                "delete_source deletes downloaded files only; leave it out with --source and --dataset"
            )
        if not self.source and not self.dataset and self.text_column != "text":
            raise UserError(
                f"text_column = {self.text_column} is not in FineWeb-Edu, whose text is in text; leave it out"
            )
        for key, default in (("config", None), ("revision", "main")):
            if self.source and getattr(self, key) != default:
                raise UserError(f"{key} = {getattr(self, key)} has no effect with --source; leave it out")
        if self.split != "train" and not self.dataset:
            raise UserError(f"split = {self.split} has no effect without --dataset; leave it out")


class Ranks(NamedTuple):
    rank: int
    world: int
    local_world: int  # ranks on this machine


class Counts(NamedTuple):
    """What tokenising a unit found; the part files' sidecar."""

    tokens: dict[str, int]
    documents: dict[str, int]
    skipped: dict[str, int]

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def n_documents(self) -> int:
        return sum(self.documents.values())

    @property
    def n_rows(self) -> int:
        return self.n_documents + sum(self.skipped.values())

    @classmethod
    def zero(cls) -> "Counts":
        return cls(dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), dict.fromkeys(REASONS, 0))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*({k: a[k] + b[k] for k in a} for a, b in zip(self, other, strict=True)))


class Settings(NamedTuple):
    """What the bytes of a part depend on, besides its unit."""

    text_column: str
    val_fraction: float
    tokenizer_sha256: str

    def key(self, unit: Unit) -> str:
        content = [FORMAT, self, unit.name, unit.origin, unit.kind, unit.compression, unit.start, unit.stop]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def main(argv: list[str]) -> None:
    cfg = parse(PrepareConfig, argv, prog="prepare_fineweb.py")
    try:
        prepare(cfg)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{error.filename or cfg.out_dir}: {error.strerror}; run again once it is free"
        ) from None


def prepare(cfg: PrepareConfig) -> None:
    ranks = read_ranks()
    out = Path(cfg.out_dir)
    n_workers = cfg.num_proc or max(1, n_cores() // ranks.local_world)
    parts = Parts(out / ".parts")
    with locked(out, parts.folder, ranks.rank):
        vocab_dir = tokenizer.find(cfg.vocab_dir)
        source = open_source(cfg, out, parts.folder, n_workers)
        val_fraction = source.val_fraction if cfg.val_fraction is None else cfg.val_fraction
        parts.settings = Settings(cfg.text_column, val_fraction, vocabulary_sha256())
        manifest = {
            "format": FORMAT,
            "source": source.description(),
            "text_column": cfg.text_column,
            "tokenizer": "gpt2",
            "tokenizer_sha256": vocabulary_sha256(),
            "eot": tokenizer.EOT,
            "val_fraction": val_fraction,
            "split_rule": SPLIT_RULE,
            "max_tokens": cfg.max_tokens,
            "shard_size": cfg.shard_size,
        }
        if is_prepared(out, manifest):
            say(f"{out / 'manifest.json'} is there and its settings are these: nothing to do")
        else:
            check_disk(cfg, source, out)
            with worker_pool(n_workers, str(vocab_dir), parts) as pool:
                plan = parts.read_plan(manifest)
                if plan is None:
                    if ranks.rank == 0:
                        check_no_strangers(out, parts)
                    tokenise(pool, n_workers, source, parts, cfg, ranks)
                    if ranks.rank:
                        return say(f"rank {ranks.rank} of {ranks.world} is done; rank 0 makes the shards")
                    units = wait_for_units(source, parts, cfg.max_tokens, ranks)
                    plan = parts.make_plan(pool, units, manifest, cfg.max_tokens)
                elif ranks.rank:
                    return say(f"rank {ranks.rank}: all is tokenised; rank 0 makes the shards")
                manifest = manifest | assemble(pool, plan, parts, source.name, out, cfg.shard_size)
            write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            source.close()
        shutil.rmtree(parts.folder, ignore_errors=True)
        report(out)


def say(text: str) -> None:
    print(text, flush=True)


def read_ranks() -> Ranks:
    """torchrun's environment, or that of a SLURM step (a batch script without srun is one process)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    else:
        return Ranks(0, 1, 1)
    try:
        rank, world, local_world = (int(env.get(name) or 1) for name in names)
    except ValueError:
        raise UserError(f"{names[0]}, {names[1]} in the environment must be numbers; unset them") from None
    if not 0 <= rank < world:
        raise UserError(f"{names[0]} = {rank} must be below {names[1]} = {world}; correct or unset them")
    return Ranks(rank, world, max(1, local_world))


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_source(cfg: PrepareConfig, out: Path, parts: Path, n_threads: int) -> Any:
    if cfg.source == ("pydoc",):
        return sources.PythonDocs(parts)
    if cfg.source:
        return sources.Files(cfg.source, text_column=cfg.text_column, n_threads=n_threads)
    if cfg.dataset:
        return sources.Stream(
            cfg.dataset,
            cfg.config,
            cfg.split,
            cfg.revision,
            text_column=cfg.text_column,
            max_tokens=cfg.max_tokens,
            out=out,
            log=say,
        )
    return sources.FineWeb(
        cfg.config, cfg.revision, max_tokens=cfg.max_tokens, out=out, delete=cfg.delete_source, log=say
    )


def vocabulary_sha256() -> str:
    return tokenizer.SHA256["encoder.json"]  # it implies vocab.bpe


# ---- before the work ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(out: Path, parts: Path, rank: int) -> Iterator[None]:
    """Make the folder and keep a second process of this rank out of it; the lock dies with the process."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
        file = open(parts / f"lock-{rank}", "w")
    except OSError as error:
        raise UserError(
            f"out_dir = {out} cannot be written: {error.strerror}; choose another --out_dir"
        ) from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            raise UserError(
                f"out_dir = {out} is being prepared by another process of rank {rank}; wait for it, end "
                "it, or choose another --out_dir"
            ) from None
        yield


def is_prepared(out: Path, wanted: dict) -> bool:
    """Whether out_dir is finished with these settings; refuse it if finished with others."""
    path = out / "manifest.json"
    try:
        there = json.loads(path.read_text())
        sizes = {shard["path"]: HEADER_BYTES + 2 * shard["tokens"] for shard in there["shards"]}
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a manifest of ours; move it away or choose another --out_dir"
        ) from None
    different = [key for key, value in wanted.items() if there.get(key) != value]
    if different:
        raise UserError(
            f"out_dir = {out} holds shards prepared with another {different[0]}: "
            f"{str(there.get(different[0])):.150}; choose another --out_dir or delete that folder"
        )
    bad = [
        name
        for name, size in sizes.items()
        if not (out / name).is_file() or (out / name).stat().st_size != size
    ]
    if bad:
        raise UserError(
            f"{out / bad[0]} is missing or damaged; delete {path} and run this again to make it anew"
        )
    return True


def check_no_strangers(out: Path, parts: "Parts") -> None:
    """Refuse a folder with shards that are not ours; remove what an abandoned preparation of ours left."""
    ours = parts.abandoned_shards()
    for path in sorted(path for split in SPLITS for path in (out / split).glob("*.bin")):
        if f"{path.parent.name}/{path.name}" not in ours:
            raise UserError(
                f"out_dir = {out} holds {path.name}, which is in no manifest; delete it or choose another "
                "--out_dir"
            )
        path.unlink()
    (parts.folder / "assembly.json").unlink(missing_ok=True)


def check_disk(cfg: PrepareConfig, source: Any, out: Path) -> None:
    """Say before the work that it will not fit: downloads, and 0.55 bytes of tokens per byte of text."""
    n_tokens = source.text_bytes * 0.275
    if cfg.max_tokens:
        n_tokens = min(n_tokens, cfg.max_tokens)
    needed = 2 * n_tokens + 4 * min(n_tokens, cfg.shard_size) + source.download_bytes
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    if needed - there > free:
        raise UserError(
            f"out_dir = {out} has {free / 1e9:.1f} GB free, and about {(needed - there) / 1e9:.1f} GB are "
            "needed; free some, choose another --out_dir, limit --max_tokens"
            + (", or add --delete_source" * source.can_delete)
        )


# ---- part files -----------------------------------------------------------------------------------------


class Parts:
    """The folder of finished units: tokens of each split, and a sidecar of counts that is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings("", 0.0, "")
        self.cache: dict[str, Counts] = {}  # by the key of a finished unit

    def path(self, unit: str, split: str) -> Path:
        return self.folder / f"{unit}.{split}.bin"

    def sidecar(self, unit: str) -> Path:
        return self.folder / f"{unit}.json"

    def read(self, unit: Unit) -> Counts | None:
        """Counts of a unit that is finished with these settings."""
        key = self.settings.key(unit)
        if key not in self.cache:
            try:
                found = json.loads(self.sidecar(unit.name).read_text())
                counts = Counts(*(found[field] for field in Counts._fields))
                sizes = [
                    self.path(unit.name, split).stat().st_size for split in SPLITS if counts.tokens[split]
                ]
                if found["key"] != key or sizes != [2 * n for n in counts.tokens.values() if n]:
                    return None
            except (OSError, ValueError, KeyError, TypeError):
                return None
            self.cache[key] = counts
        return self.cache[key]

    def make_plan(self, pool: Any, units: list[Unit], manifest: dict, max_tokens: int | None) -> dict:
        """Fix what the shards are made of, so that parts can go as shards come; cut the last unit."""
        counts = [self.read(unit) for unit in units]
        names = [unit.name for unit in units]
        total = sum(counts, Counts.zero())
        if max_tokens is not None and total.n_tokens > max_tokens:
            limit = max_tokens - (total.n_tokens - counts[-1].n_tokens)
            names[-1] = f"{units[-1].name}-first-{limit}"
            counts[-1] = pool.submit(work, units[-1], names[-1], limit).result()
            total = sum(counts, Counts.zero())
        plan = {
            "manifest": manifest,
            "units": [{"name": name, "tokens": c.tokens} for name, c in zip(names, counts, strict=True)],
            "total": total._asdict(),
        }
        write_json(self.folder / "assembly.json", plan)
        return plan

    def read_plan(self, manifest: dict) -> dict | None:
        """The plan of a preparation with this manifest that was interrupted while it made shards."""
        try:
            plan = json.loads((self.folder / "assembly.json").read_text())
        except (OSError, ValueError):
            return None
        return plan if plan["manifest"] == manifest else None

    def abandoned_shards(self) -> set[str]:
        records = (
            path.name.removesuffix(".shard").replace("@", "/", 1) for path in self.folder.glob("*.shard")
        )
        return set(records)


# ---- workers --------------------------------------------------------------------------------------------


class Worker(NamedTuple):
    tokenizer: tokenizer.Tokenizer
    parts: Parts


worker: Worker | None = None


@contextlib.contextmanager
def worker_pool(n_workers: int, vocab_dir: str, parts: Parts) -> Iterator[ProcessPoolExecutor]:
    """Processes that each hold a tokenizer; spawned, since forking a process with threads is unsafe."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_workers, context, start_worker, (vocab_dir, parts.folder, parts.settings))
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
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=die_with_parent, daemon=True).start()
    parts = Parts(folder)
    parts.settings = settings
    worker = Worker(tokenizer.load(vocab_dir), parts)


def die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(unit: Unit, name: str, limit: int | None = None) -> Counts:
    """Tokenise a unit into part files `name`, up to the document that reaches `limit` tokens."""
    try:
        return tokenise_unit(worker, unit, name, limit)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{error.filename or worker.parts.folder}: {error.strerror}; free or correct it and run again"
        ) from None
    except (
        BaseException
    ) as error:  # tiktoken's PanicException is no Exception, and cannot be sent to the parent
        raise RuntimeError(
            f"tokenising {unit.path} from {unit.start}: {type(error).__name__}: {error}"
        ) from error


def tokenise_unit(w: Worker, unit: Unit, name: str, limit: int | None) -> Counts:
    counts = Counts.zero()
    tokens, n_documents, skipped = counts
    threshold = w.parts.settings.val_fraction * 2.0**64
    ending = f".{socket.gethostname()}-{os.getpid()}.tmp"
    temporary = {split: Path(f"{w.parts.path(name, split)}{ending}") for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(path, "wb", 1 << 20)) for split, path in temporary.items()}
        for doc_id, text in sources.documents(unit, w.parts.settings.text_column):
            if not isinstance(text, str) or not text:
                skipped["null" if text is None else "empty" if text == "" else "not_text"] += 1
                continue
            split = "val" if hash_of(text if doc_id is None else str(doc_id)) < threshold else "train"
            ids = w.tokenizer.encode_document(text)
            files[split].write(ids.astype("<u2", copy=False).data)
            tokens[split] += len(ids)
            n_documents[split] += 1
            if limit is not None and counts.n_tokens >= limit:
                break
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split, path in temporary.items():
        if tokens[split]:
            os.replace(path, w.parts.path(name, split))
        else:
            path.unlink()
    key = w.parts.settings.key(unit)
    write_json(w.parts.sidecar(name), {"key": key} | counts._asdict())
    return counts


def hash_of(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


# ---- tokenising -----------------------------------------------------------------------------------------


def tokenise(
    pool: ProcessPoolExecutor, n_workers: int, source: Any, parts: Parts, cfg: PrepareConfig, ranks: Ranks
) -> None:
    """Finish this rank's units; with max_tokens, no more than the first ones that hold so many."""
    running: dict[Any, Unit] = {}
    with Progress(source.total_weight, cfg.max_tokens) as progress:

        def collect(n_left: int) -> None:
            while len(running) > n_left:
                finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    progress.add(running[future], future.result(), fresh=True)
                    source.finished(running.pop(future))
                progress.show()

        for unit in source.units(ranks.rank, ranks.world, lambda unit: parts.read(unit)):
            counts = parts.read(unit)
            if counts:
                progress.add(unit, counts, fresh=False)
                source.finished(unit)
                continue
            if cfg.max_tokens and covering(source.known_units(), parts, cfg.max_tokens):
                break
            running[pool.submit(work, unit, unit.name)] = unit
            collect(2 * n_workers - 1)
        collect(0)


def covering(units: list[Unit], parts: Parts, max_tokens: int | None) -> list[Unit] | None:
    """The first units, all finished, that together reach max_tokens; None where there are none such yet."""
    n_tokens = 0
    for i, unit in enumerate(units):
        counts = parts.read(unit)
        if counts is None:
            return None
        n_tokens += counts.n_tokens
        if max_tokens is not None and n_tokens >= max_tokens:
            return units[: i + 1]
    return None


def wait_for_units(source: Any, parts: Parts, max_tokens: int | None, ranks: Ranks) -> list[Unit]:
    """Every unit the shards are made of, in order, once the other ranks have finished theirs."""
    t_said = t_progress = time.monotonic()
    n_left = None
    while True:
        units = source.known_units()
        enough = covering(units, parts, max_tokens)
        if enough:
            return enough
        left = [unit.name for unit in units if parts.read(unit) is None]
        if source.complete() and not left:
            return units
        assert ranks.world > 1, left
        now = time.monotonic()
        if n_left != (len(units), len(left)):
            n_left, t_progress = (len(units), len(left)), now
        if now - t_progress > WAIT_SECONDS:
            raise UserError(
                f"the other ranks finished nothing for {WAIT_SECONDS} s, and {len(left)} units are missing "
                f"(first: {left[:1]}); run the same command again, or as one process to do all that is left"
            )
        if now - t_said > LOG_SECONDS:
            t_said = now
            say(
                f"rank 0 waits for {ranks.world - 1} others: {len(left)} of {len(units)} known units are left"
            )
        time.sleep(0.5)


class Progress:
    """A bar where a person watches, else a line every LOG_SECONDS: documents, tokens, tokens/s, time left."""

    def __init__(self, total_weight: float, max_tokens: int | None) -> None:
        self.total_weight, self.max_tokens = total_weight, max_tokens
        self.n_documents = self.n_tokens = 0
        self.weight = self.fresh_weight = self.fresh_tokens = 0.0
        self.t0 = self.t_shown = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            total = max_tokens or total_weight or None
            self.bar = tqdm(total=total, unit="tok" if max_tokens else "B", unit_scale=True, smoothing=0.05)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, unit: Unit, counts: Counts, *, fresh: bool) -> None:
        self.n_documents += counts.n_documents
        self.n_tokens += counts.n_tokens
        self.weight += unit.weight
        self.fresh_weight += unit.weight * fresh
        self.fresh_tokens += counts.n_tokens * fresh
        if self.bar is not None:
            step = counts.n_tokens if self.max_tokens else unit.weight
            if fresh:
                self.bar.update(step)
            else:  # not at this run's speed
                self.bar.initial += step
                self.bar.n += step

    def show(self) -> None:
        now = time.monotonic()
        rate = self.fresh_tokens / max(now - self.t0, 1e-9)
        text = (
            f"{self.n_documents:,} documents, {self.n_tokens / 1e6:,.1f}M tokens, {rate / 1e6:.2f}M tokens/s"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=True)
        elif now - self.t_shown > LOG_SECONDS:
            self.t_shown = now
            print(text + self.time_left(now), file=sys.stderr, flush=True)

    def time_left(self, now: float) -> str:
        if self.max_tokens:
            fresh, left = self.fresh_tokens, self.max_tokens - self.n_tokens
        else:
            fresh, left = self.fresh_weight, self.total_weight - self.weight
        if not fresh or not self.total_weight:
            return ""
        minutes, seconds = divmod(int((now - self.t0) * max(left, 0) / fresh), 60)
        return f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


# ---- parts -> shards ------------------------------------------------------------------------------------


def assemble(pool: Any, plan: dict, parts: Parts, name: str, out: Path, shard_size: int) -> dict:
    """Cut the parts, laid end to end, into shards; parts that are used up are deleted."""
    total = Counts(**plan["total"])
    if not total.n_documents:
        found = skipped_words(total.skipped)
        raise UserError(f"no document with text was found: {found}; check --source and --text_column")
    shards = []
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        ends = np.cumsum([unit["tokens"][split] for unit in plan["units"]]).tolist()
        tasks = []
        for index, start in enumerate(range(0, total.tokens[split], shard_size)):
            stop = min(start + shard_size, total.tokens[split])
            pieces = [
                (
                    str(parts.path(unit["name"], split)),
                    max(start, end - n) - (end - n),
                    min(stop, end) - max(start, end - n),
                )
                for unit, end in zip(plan["units"], ends, strict=True)
                if (n := unit["tokens"][split]) and end > start and end - n < stop
            ]
            path = f"{split}/{name}_{split}_{index:06d}.bin"
            tasks.append((path, stop, pool.submit(make_shard, str(out), path, pieces)))
        for path, stop, task in tasks:
            shards.append({"path": path, "split": split} | task.result())
            for unit, end in zip(plan["units"], ends, strict=True):
                if end <= stop:
                    parts.path(unit["name"], split).unlink(missing_ok=True)
    return {
        "shards": shards,
        "documents": total.documents | {"skipped": total.skipped},
        "tokens": total.tokens,
    }


def make_shard(out: str, path: str, pieces: list[tuple[str, int, int]]) -> dict:
    """Copy (part, first token, tokens) into one shard; its record says that it is whole."""
    target = Path(out, path)
    record = worker.parts.folder / f"{path.replace('/', '@')}.shard"
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(record.read_text())
        if target.stat().st_size == HEADER_BYTES + 2 * found["tokens"]:
            return found
    n_tokens = sum(n for _, _, n in pieces)
    temporary = target.with_name(f"{target.name}.tmp")
    sha256 = hashlib.sha256(header(n_tokens))
    with open(temporary, "wb") as file:
        file.write(header(n_tokens))
        for part, start, n in pieces:
            with open(part, "rb") as piece:
                piece.seek(2 * start)
                left = 2 * n
                while left:
                    chunk = piece.read(min(left, COPY_BYTES))
                    assert chunk, f"{part} is shorter than its sidecar says"
                    sha256.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
        file.flush()
        os.fsync(file.fileno())
    result = {"tokens": n_tokens, "sha256": sha256.hexdigest()}
    os.replace(temporary, target)
    write_json(record, result)
    return result


def skipped_words(skipped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in skipped.items())


def report(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    documents, tokens = manifest["documents"], manifest["tokens"]
    n_tokens, n_documents = (sum(of[split] for split in SPLITS) for of in (tokens, documents))
    say(
        f"{n_tokens:,} tokens of {n_documents:,} documents in {len(manifest['shards'])} shards of "
        f"{manifest['shard_size']:,} (the last shard is short by design); "
        f"skipped documents: {skipped_words(documents['skipped'])}"
    )
    for split in SPLITS:
        say(f"  {split}: {tokens[split]:,} tokens, {documents[split]:,} documents, {out / split}")
    for split, remedy in (("val", "larger"), ("train", "smaller")):
        if not documents[split] and manifest["val_fraction"]:
            say(
                f"warning: no document fell into {split} at val_fraction = {manifest['val_fraction']}; "
                f"delete {out} and run again with a {remedy} --val_fraction"
            )
    say(
        f"next: python train.py --run_name NAME --train_data_dir {out / 'train'} --val_data_dir {out / 'val'}"
    )


if __name__ == "__main__":
    run_main(main)
