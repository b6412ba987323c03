"""Text to token shards: FineWeb-Edu's 10B-token sample, files of your own, or any dataset of the Hub.

    python prepare_fineweb.py                                          # -> data/fineweb-edu-10B/{train,val}
    python prepare_fineweb.py --source corpus/ --out_dir data/corpus   # parquet, jsonl, txt
    python prepare_fineweb.py --source pydoc --out_dir data/pydoc
    python prepare_fineweb.py --dataset wikimedia/wikipedia --config 20231101.en --out_dir data/wikipedia
    srun --ntasks=10 python prepare_fineweb.py                         # ten machines, one shared folder

A source divides its text into units; workers tokenise them into part files, and these are cut into shards
(topogpt/text/parts.py). What a killed run has finished, the next one keeps.
"""

import errno
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.files import read_json, write_json
from topogpt.ranks import Place, read_place
from topogpt.settings import PrepareConfig, TrainConfig
from topogpt.terminal import say
from topogpt.text import hub_sources, prepared, vocabulary
from topogpt.text.parts import (
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
from topogpt.text.python_docs import PythonDocs
from topogpt.text.sources import Files, Unit

MANY_TOKENS = 10**9  # from here on a model of full size has something to learn
MAX_EPOCHS = 10  # of a small text


def main(argv: list[str]) -> None:
    cfg = parse(PrepareConfig, argv, prog="prepare_fineweb.py")
    if prepare(cfg):
        say(next_command(Path(cfg.out_dir)))


def next_command(out: Path) -> str:
    """What to type next: a config whose size fits the text, for no more than MAX_EPOCHS of it."""
    n_tokens = read_json(out / "manifest.json")["tokens"]["train"]
    name = "topolm_10b.yaml" if n_tokens >= MANY_TOKENS else "debug.yaml"
    run = parse(TrainConfig, [str(Path(__file__).parent / "configs" / name), "--run_name", "NAME"])
    per_step = run.batch_size * run.model.block_size
    n_steps = max(1, min(run.max_steps, MAX_EPOCHS * n_tokens // per_step))
    limit = f" --max_steps {n_steps}" if n_steps < run.max_steps else ""
    data = " ".join(f"--{split}_data_dir {shlex.quote(str(out / split))}" for split in ("train", "val"))
    epochs = f"{n_steps:,} steps: {n_steps * per_step / max(n_tokens, 1):.1f} epochs of this text"
    return f"next: python train.py configs/{name} --run_name NAME {data}{limit}   # {epochs}"


def prepare(cfg: PrepareConfig) -> bool:
    """Make the shards, where they are not there; whether this rank has, or found them made."""
    try:
        return make(cfg)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        place = error.filename or cfg.out_dir
        raise UserError(f"{place}: {error.strerror}; run again once it is free") from None


def make(cfg: PrepareConfig) -> bool:
    ranks, out = read_place(), Path(cfg.out_dir)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_workers = cfg.num_proc or max(1, n_cores // ranks.local_world)
    default = (0.05 if cfg.source == ("pydoc",) else 0.01) if cfg.source else 0.0005
    val_fraction = default if cfg.val_fraction is None else cfg.val_fraction
    settings = Settings(cfg.text_column, val_fraction, prepared.VOCABULARY, cfg.skip_broken)
    parts = Parts(out / ".parts", settings)
    with prepared.locked(out, ranks.rank):
        vocab_dir = str(vocabulary.find(cfg.vocab_dir))
        if (out / "manifest.json").exists():
            source = open_source(cfg, parts, ranks, n_workers)
            prepared.check_prepared(out, prepared.describe(cfg, source, val_fraction))
            say(f"{out / 'manifest.json'} is there and its settings are these: nothing to do")
        else:
            with worker_pool(n_workers, vocab_dir, parts) as pool:
                source = open_source(cfg, parts, ranks, n_workers)
                prepared.check_disk(cfg, source)
                if ranks.rank == 0:
                    prepared.check_no_strangers(out)
                make_parts(cfg, source, parts, pool, n_workers, ranks)
                if ranks.rank:
                    say(f"rank {ranks.rank} of {ranks.world} is done; rank 0 makes the shards")
                    return False
                manifest = prepared.describe(cfg, source, val_fraction)
                manifest |= make_shards(cfg, source, parts, pool, ranks)
            write_json(out / "manifest.json", manifest)
        if cfg.delete_source:
            shutil.rmtree(out / "source", ignore_errors=True)
        shutil.rmtree(parts.folder, ignore_errors=True)
        prepared.report(out)
    return True


def open_source(cfg: PrepareConfig, parts: Parts, ranks: Place, n_threads: int) -> Any:
    if cfg.source == ("pydoc",):
        return PythonDocs(parts.folder / f"rank-{ranks.rank}")
    if cfg.source:
        how = {"in_order": bool(cfg.max_tokens), "n_threads": n_threads, "skip_broken": cfg.skip_broken}
        return Files(cfg.source, cfg.text_column, **how)
    return (hub_sources.Stream if cfg.dataset else hub_sources.FineWeb)(cfg, parts.read)


def make_parts(
    cfg: PrepareConfig, source: Any, parts: Parts, pool: Executor, n_workers: int, ranks: Place
) -> None:
    """Tokenise this rank's units; with max_tokens, no more than the first ones that hold so many."""
    progress = prepared.Progress(source.total_weight / ranks.world, cfg.max_tokens)

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
        found = prepared.skipped_words(total.skipped | {"broken lines": total.damage["broken"]})
        raise UserError(f"no document with text was found: {found}; check the text and --text_column")
    shards = assemble(pool, units, parts, source.name, cfg.shard_size)
    damage = {key: n for key, n in total.damage.items() if n}  # mostly none
    broken = {"broken": damage.pop("broken")} if "broken" in damage else {}
    documents = total.documents | {"skipped": total.skipped | broken} | damage
    return {"shards": shards, "documents": documents, "tokens": total.tokens}


if __name__ == "__main__":
    run_main(main)
