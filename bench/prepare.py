"""Preparation of text against the encoder alone, and against the usual script on the package `datasets`.

    python -m bench.prepare --source corpus/*.parquet --num_proc 2

All three read the same documents. The encoder alone has them in memory already and writes nothing. The usual
script loads, maps with num_proc processes to lists of tokens, and copies these into a memory map. CPU-seconds
count all processes; peak memory is the sum over processes, shared pages counted once (Linux; 0 elsewhere).
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.common import ROOT, Report, environment, summary
from topogpt.config import parse
from topogpt.errors import UserError, check_at_least, run_main
from topogpt.text import sources, tokenizer

SAMPLE_SECONDS = 0.1  # between two readings of the memory
WRITE_BATCHES = 64  # of the usual script's memory map


@dataclass(frozen=True, kw_only=True)
class PrepareBenchConfig:
    """Time the preparation of text: python -m bench.prepare --source PATHS [--num_proc 2]."""

    source: tuple[str, ...] = ()  # files, folders or globs of parquet, jsonl, txt, as for prepare_fineweb.py
    num_proc: int = 2  # processes of each
    repeats: int = 3  # of each, in turns
    text_column: str = "text"  # column or JSON key of the text
    usual: bool = True  # run the usual script, too
    json: bool = False  # one JSON object a line on stdout
    usual_into: str = ""  # be the usual script: write into this folder and stop (used by this script)

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("source is missing; give files or folders of parquet, jsonl or txt with --source")
        check_at_least("num_proc", self.num_proc, 1)
        check_at_least("repeats", self.repeats, 1)


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    memory: float  # bytes
    tokens: int


def main(argv: list[str]) -> None:
    cfg = parse(PrepareBenchConfig, argv, prog="python -m bench.prepare")
    if cfg.usual_into:
        return usual_script(cfg, Path(cfg.usual_into))
    report = Report(as_json=cfg.json, device=f"CPU, {cfg.num_proc} processes of {os.cpu_count()} cores")
    documents = read_documents(cfg)
    report.say(
        f"preparation: {len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f}M characters; "
        f"{report.device}"
    )
    names = ["ours", "encoder alone", "usual script"]
    if not cfg.usual or importlib.util.find_spec("datasets") is None:
        names.remove("usual script")
        report.say("the usual script is left out" + (": no package `datasets`" if cfg.usual else ""))
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for i in range(cfg.repeats):
        for name in names if i % 2 == 0 else names[::-1]:
            costs[name].append(encode_alone(cfg, documents) if name == "encoder alone" else run(cfg, name))
    show(cfg, report, costs, start_seconds(cfg))
    report.finish()


def start_seconds(cfg: PrepareBenchConfig) -> float:
    """What our script takes for one line: imports, processes, files. A large corpus does not notice it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "line.jsonl"
        path.write_text(json.dumps({cfg.text_column: "One line of text."}) + "\n")
        return run(replace(cfg, source=(str(path),)), "ours").seconds


def show(cfg: PrepareBenchConfig, report: Report, costs: dict[str, list[Cost]], start: float) -> None:
    rows, middle = [], {}
    for name, of in costs.items():
        middle[name] = Cost(*(summary(values).median for values in zip(*of, strict=True)))
        wall, cpu, memory, tokens = middle[name]
        speeds = (tokens / wall, tokens / wall / cfg.num_proc, tokens / cpu)
        row = [name, f"{tokens:,.0f}", f"{wall:.2f}", f"{cpu:.2f}", *(f"{speed:,.0f}" for speed in speeds)]
        rows.append([*row, f"{memory / 1e9:.2f}" if memory else "-"])
    head = ["preparation", "tokens", "s", "CPU-s", "tokens/s", "tokens/s/core", "tokens/CPU-s", "peak GB"]
    report.table(head, rows)
    ours = middle["ours"]
    report.say(
        f"ours, start and end alone (one line of text): {start:.2f} s; without these "
        f"{ours.tokens / max(ours.seconds - start, 1e-9) / cfg.num_proc:,.0f} tokens/s/core"
    )
    for name, other in middle.items():
        if name == "ours":
            continue
        detail = {"ours_cost": ours._asdict(), "reference_cost": other._asdict(), "num_proc": cfg.num_proc}
        detail["start_seconds"] = start
        speed = ours.tokens / ours.seconds, other.tokens / other.seconds
        work = ours.tokens / ours.cpu_seconds, other.tokens / other.cpu_seconds
        title = f"preparation against {name}"
        wall = report.record(title, *speed, "tokens/s", more_is_better=True, **detail)
        cpu = report.record(f"{title}, CPU", *work, "tokens/CPU-s", more_is_better=True, **detail)
        report.say(
            f"ours against {name}: {wall:.2f} times the tokens/s, {cpu:.2f} times the tokens/CPU-second"
        )
        if name == "encoder alone":
            report.check("tokens of ours and of the encoder", abs(ours.tokens - other.tokens), 0)


def read_documents(cfg: PrepareBenchConfig) -> list[str]:
    units = sources.Files(cfg.source, text_column=cfg.text_column).planned
    rows = (row for unit in units for row in sources.documents(unit, cfg.text_column))
    return [text for _, text in rows if isinstance(text, str) and text]


# ---- the encoder alone ---------------------------------------------------------------------------

SHARED: dict = {}  # what the forked processes find in place


def encode_alone(cfg: PrepareBenchConfig, documents: list[str]) -> Cost:
    """Each of num_proc forked processes encodes its share of documents that are in memory already."""
    SHARED.update(documents=documents, tokenizer=tokenizer.load(), world=cfg.num_proc)
    SHARED["tokenizer"].encode("warm up")
    with multiprocessing.get_context("fork").Pool(cfg.num_proc) as pool:
        found = pool.map(encode_share, range(cfg.num_proc), chunksize=1)
    seconds, cpu, tokens = zip(*found, strict=True)
    return Cost(max(seconds), sum(cpu), 0.0, sum(tokens))


def encode_share(rank: int) -> tuple[float, float, int]:
    t0, cpu0 = time.perf_counter(), time.process_time()
    encode = SHARED["tokenizer"].encode_document
    n = sum(len(encode(text)) for text in SHARED["documents"][rank :: SHARED["world"]])
    return time.perf_counter() - t0, time.process_time() - cpu0, n


# ---- scripts -------------------------------------------------------------------------------------


def run(cfg: PrepareBenchConfig, name: str) -> Cost:
    """Run a script to its end in a new folder."""
    with tempfile.TemporaryDirectory() as out:
        common = ["--source", *cfg.source, "--num_proc", str(cfg.num_proc), "--text_column", cfg.text_column]
        command = [sys.executable, str(ROOT / "prepare_fineweb.py"), *common, "--out_dir", f"{out}/shards"]
        if name == "usual script":
            command = [sys.executable, "-m", "bench.prepare", *common, "--usual_into", out]
        env = environment() | {"HF_DATASETS_OFFLINE": "1"}
        before, t0 = os.times(), time.perf_counter()
        with open(Path(out) / "log.txt", "wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            with peak_memory(process.pid) as memory:
                code = process.wait()
        seconds, after = time.perf_counter() - t0, os.times()
        if code:
            raise RuntimeError(f"{name} failed: {(Path(out) / 'log.txt').read_text()[-2000:]}")
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        if name == "usual script":
            tokens = json.loads((Path(out) / "tokens.json").read_text())
        else:
            shards = json.loads((Path(out) / "shards" / "manifest.json").read_text())["shards"]
            tokens = sum(shard["tokens"] for shard in shards)
        return Cost(seconds, cpu, memory[0], tokens)


@contextlib.contextmanager
def peak_memory(pid: int) -> Iterator[list[float]]:
    """A list whose one number becomes the largest memory, in bytes, of a process and its descendants."""
    found, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            found[0] = max(found[0], sum(map(proportional_memory, family(pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def family(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield from family(int(child))


def proportional_memory(pid: int) -> float:
    """Bytes, each page divided by the number of processes that share it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def usual_script(cfg: PrepareBenchConfig, out: Path) -> None:
    """load, map, memory map: how most small GPT codebases prepare their data."""
    import datasets

    kinds = {"parquet": "parquet", "jsonl": "json", "txt": "text"}
    files: dict[str, list[str]] = {}
    for path in sources.find_files(cfg.source).values():
        files.setdefault(kinds[sources.split_suffix(path)[0]], []).append(str(path))
    column = cfg.text_column
    loaded = []
    for kind, names in files.items():
        options = {"sample_by": "document"} if kind == "text" else {}
        part = datasets.load_dataset(
            kind, data_files=names, split="train", cache_dir=str(out / "cache"), **options
        )
        loaded.append(part.select_columns([column]))
    both = datasets.concatenate_datasets(loaded).train_test_split(test_size=0.01, seed=1, shuffle=True)
    encoding = tokenizer.load().encoding

    def encode(example: dict) -> dict:
        ids = [*encoding.encode_ordinary(example[column]), tokenizer.EOT]
        return {"ids": ids, "len": len(ids)}

    tokenized = both.map(encode, remove_columns=[column], num_proc=cfg.num_proc)
    n_tokens = 0
    for split, rows in tokenized.items():
        length = int(np.sum(rows["len"], dtype=np.uint64))
        target = np.memmap(out / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(length,))
        n_batches, at = min(WRITE_BATCHES, len(rows)), 0
        for i in range(n_batches):
            batch = rows.shard(num_shards=n_batches, index=i, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            target[at : at + len(ids)] = ids
            at += len(ids)
        target.flush()
        n_tokens += length
    (out / "tokens.json").write_text(json.dumps(n_tokens))


if __name__ == "__main__":
    run_main(main)
