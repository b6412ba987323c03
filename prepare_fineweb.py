"""Text to token shards: FineWeb-Edu's 10B-token sample, files of your own, or any dataset of the Hub.

    python prepare_fineweb.py                                          # -> data/fineweb-edu-10B/{train,val}
    python prepare_fineweb.py --source corpus/ --out_dir data/corpus   # parquet, jsonl, txt
    python prepare_fineweb.py --source pydoc --out_dir data/pydoc
    python prepare_fineweb.py --dataset wikimedia/wikipedia --config 20231101.en --out_dir data/wikipedia
    srun --ntasks=10 python prepare_fineweb.py                         # ten machines, one shared folder

A source (sources.py, hub_sources.py) divides its text into units; workers tokenise them into part files, and
these are cut into shards (parts.py). What a killed run has finished, the next one keeps.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.files import read_json, write_text
from topogpt.ranks import Place, read_place
from topogpt.settings import PrepareConfig
from topogpt.text import hub_sources, tokenizer
from topogpt.text.parts import (
    FORMAT,
    SPLITS,
    Counts,
    Parts,
    Settings,
    add_counts,
    assemble,
    enough,
    tokenise,
    wait_for_units,
    work,
    worker_pool,
)
from topogpt.text.shards import HEADER_BYTES
from topogpt.text.sources import Files, PythonDocs, Unit

SPLIT_RULE = (
    "a document is in val where the first 8 bytes of blake2b of its id (its text, where it has none), as a "
    "big-endian number, divided by 2**64, are below val_fraction"
)
VOCABULARY = tokenizer.SHA256["encoder.json"]  # it implies vocab.bpe
LOG_SECONDS = 10


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
        place = error.filename or cfg.out_dir
        raise UserError(f"{place}: {error.strerror}; run again once it is free") from None


def prepare(cfg: PrepareConfig) -> None:
    ranks, out = read_place(), Path(cfg.out_dir)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_workers = cfg.num_proc or max(1, n_cores // ranks.local_world)
    default = (0.05 if cfg.source == ("pydoc",) else 0.01) if cfg.source else 0.0005
    val_fraction = default if cfg.val_fraction is None else cfg.val_fraction
    parts = Parts(out / ".parts", Settings(cfg.text_column, val_fraction, VOCABULARY))
    with locked(out, ranks.rank):
        vocab_dir = str(tokenizer.find(cfg.vocab_dir))
        if (out / "manifest.json").exists():
            source = open_source(cfg, parts, ranks, n_workers)
            check_prepared(out, describe(cfg, source, val_fraction))
            say(f"{out / 'manifest.json'} is there and its settings are these: nothing to do")
        else:
            with worker_pool(n_workers, vocab_dir, parts) as pool:
                source = open_source(cfg, parts, ranks, n_workers)
                check_disk(cfg, source)
                if ranks.rank:
                    make_parts(cfg, source, parts, pool, n_workers, ranks)
                    return say(f"rank {ranks.rank} of {ranks.world} is done; rank 0 makes the shards")
                check_no_strangers(out, parts)
                make_parts(cfg, source, parts, pool, n_workers, ranks)
                manifest = describe(cfg, source, val_fraction)
                manifest |= make_shards(cfg, source, parts, pool, ranks)
            write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        if cfg.delete_source:
            shutil.rmtree(out / "source", ignore_errors=True)
        shutil.rmtree(parts.folder, ignore_errors=True)
        report(out)


def make_parts(
    cfg: PrepareConfig, source: Any, parts: Parts, pool: Executor, n_workers: int, ranks: Place
) -> None:
    """Tokenise this rank's units; with max_tokens, no more than the first ones that hold so many."""
    progress = Progress(source.total_weight / ranks.world, cfg.max_tokens)

    def unfinished() -> Iterator[Unit]:
        for unit in source.units(ranks.rank, ranks.world):
            if counts := parts.read(unit):
                progress.add(unit, counts, fresh=False)
                source.finished(unit)
            elif enough(source, parts, cfg.max_tokens):
                return
            else:
                yield unit

    try:
        for unit, counts in tokenise(pool, unfinished(), 2 * n_workers - 1, progress.show):
            progress.add(unit, counts, fresh=True)
            source.finished(unit)
    except UserError:
        if not ranks.rank or not Path(cfg.out_dir, "manifest.json").exists():
            raise  # else rank 0 has the max_tokens it needs, has made the shards and removed the parts
    finally:
        progress.bar.close()


def make_shards(cfg: PrepareConfig, source: Any, parts: Parts, pool: Executor, ranks: Place) -> dict:
    """Cut the parts of all ranks into shards; what the manifest says of them."""
    units = wait_for_units(source, parts, cfg.max_tokens, ranks)
    total = add_counts([parts.read(unit) for unit in units])
    if cfg.max_tokens and total.n_tokens > cfg.max_tokens:  # the last unit goes on for too long
        limit = cfg.max_tokens - total.n_tokens + parts.read(units[-1]).n_tokens
        units[-1] = replace(units[-1], name=f"{units[-1].name}-first-{limit}", limit=limit)
        if parts.read(units[-1]) is None:
            pool.submit(work, units[-1]).result()
        total = add_counts([parts.read(unit) for unit in units])
    if not total.n_documents:
        found = skipped_words(total.skipped)
        raise UserError(f"no document with text was found: {found}; check --source and --text_column")
    shards = assemble(pool, units, parts, source.name, cfg.shard_size)
    documents = total.documents | {"skipped": total.skipped}
    return {"shards": shards, "documents": documents, "tokens": total.tokens}


def say(text: str) -> None:
    print(text, flush=True)


def skipped_words(skipped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in skipped.items())


def open_source(cfg: PrepareConfig, parts: Parts, ranks: Place, n_threads: int) -> Any:
    if cfg.source == ("pydoc",):
        return PythonDocs(parts.folder / f"rank-{ranks.rank}")
    if cfg.source:
        return Files(cfg.source, cfg.text_column, in_order=bool(cfg.max_tokens), n_threads=n_threads)
    return (hub_sources.Stream if cfg.dataset else hub_sources.FineWeb)(cfg, parts.read)


def describe(cfg: PrepareConfig, source: Any, val_fraction: float) -> dict:
    """The part of the manifest that is known before the work; runs with another one need another folder."""
    return {
        "format": FORMAT,
        "source": source.description,
        "text_column": cfg.text_column,
        "tokenizer": "gpt2",
        "tokenizer_sha256": VOCABULARY,
        "eot": tokenizer.EOT,
        "val_fraction": val_fraction,
        "split_rule": SPLIT_RULE,
        "max_tokens": cfg.max_tokens,
        "shard_size": cfg.shard_size,
    }


# ---- the folder and its disk ----------------------------------------------------------------------------


@contextlib.contextmanager
def locked(out: Path, rank: int) -> Iterator[None]:
    """Make the folder and keep a second process of this rank out of it; the lock dies with the process."""
    try:
        (out / ".parts").mkdir(parents=True, exist_ok=True)
        file = open(out / ".parts" / f"lock-{rank}", "w")
    except OSError as error:
        problem = f"cannot be written: {error.strerror}; choose another --out_dir"
        raise UserError(f"out_dir = {out} {problem}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            problem = f"is being prepared by another process of rank {rank}; wait for it, end it, or choose"
            raise UserError(f"out_dir = {out} {problem} another --out_dir") from None
        yield


def check_prepared(out: Path, wanted: dict) -> None:
    """Refuse a finished folder whose settings are others, or whose shards are not all there."""
    path, there = out / "manifest.json", read_json(out / "manifest.json")
    try:
        sizes = {out / shard["path"]: HEADER_BYTES + 2 * shard["tokens"] for shard in there["shards"]}
    except (KeyError, TypeError):
        problem = "is not a manifest of ours; move it away or choose another --out_dir"
        raise UserError(f"{path} {problem}") from None
    different = [key for key, value in wanted.items() if there.get(key) != value]
    if different:
        raise UserError(
            f"out_dir = {out} holds shards prepared with another {different[0]}: "
            f"{str(there.get(different[0])):.150}; choose another --out_dir or delete that folder"
        )
    bad = [shard for shard, size in sizes.items() if not shard.is_file() or shard.stat().st_size != size]
    if bad:
        raise UserError(f"{bad[0]} is missing or damaged; delete {path} and run this again to make it anew")


def check_no_strangers(out: Path, parts: Parts) -> None:
    """Remove shards that an interrupted preparation of ours left; refuse a folder with others."""
    for ours in read_json(parts.folder / "assembly.json").get("shards", []):
        (out / ours).unlink(missing_ok=True)
        (out / f"{ours}.tmp").unlink(missing_ok=True)
    for path in sorted(out.glob("train/*.bin")) + sorted(out.glob("val/*.bin")):
        remedy = "delete it or choose another --out_dir"
        raise UserError(f"out_dir = {out} holds {path.name}, which is in no manifest; {remedy}")


def check_disk(cfg: PrepareConfig, source: Any) -> None:
    """Say before the work that it will not fit: downloads, and 0.55 bytes of tokens per byte of text."""
    n_tokens = source.text_bytes * 0.275
    if cfg.max_tokens:
        n_tokens = min(n_tokens, cfg.max_tokens)
    there = sum(path.stat().st_size for path in Path(cfg.out_dir).rglob("*") if path.is_file())
    needed = 2 * 2 * n_tokens + source.download_bytes - there  # parts, shards
    free = shutil.disk_usage(cfg.out_dir).free
    if needed > free:
        remedy = "" if cfg.source or cfg.dataset or cfg.delete_source else ", or add --delete_source"
        raise UserError(
            f"out_dir = {cfg.out_dir} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are "
            f"needed; free some, choose another --out_dir, limit --max_tokens{remedy}"
        )


# ---- saying how it goes ---------------------------------------------------------------------------------


class Progress:
    """A bar with tokens/s and the time left where a person watches, else the same line every LOG_SECONDS."""

    def __init__(self, total_weight: float, max_tokens: int | None) -> None:
        from tqdm import tqdm

        self.total_weight, self.max_tokens = total_weight, max_tokens
        self.weight = self.n_documents = 0
        self.t_shown = time.monotonic()
        self.watched = sys.stderr.isatty()
        file = sys.stderr if self.watched else io.StringIO()
        self.bar = tqdm(total=max_tokens, unit="tok", unit_scale=True, file=file)

    def add(self, unit: Unit, counts: Counts, *, fresh: bool) -> None:
        self.weight += unit.weight
        self.n_documents += counts.n_documents
        self.bar.n += counts.n_tokens
        self.bar.initial += counts.n_tokens * (not fresh)  # not at this run's speed
        if self.weight and not self.max_tokens:
            self.bar.total = round(self.bar.n * self.total_weight / self.weight)

    def show(self) -> None:
        self.bar.set_postfix_str(f"{self.n_documents:,} documents", refresh=self.watched)
        if not self.watched and time.monotonic() - self.t_shown > LOG_SECONDS:
            self.t_shown = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)


def report(out: Path) -> None:
    manifest = read_json(out / "manifest.json")
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
    train, val = out / "train", out / "val"
    say(f"next: python train.py --run_name NAME --train_data_dir {train} --val_data_dir {val}")


if __name__ == "__main__":
    run_main(main)
