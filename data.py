"""Tokens from disk to device: shards and their checks, one stream over them, and the order of its windows.

    corpus = open_corpus(["data/fineweb-edu-10B/train"], key="train_data_dir", vocab_size=50304)
    with TokenLoader(corpus, block_size=1024, batch_size=512, per_device_batch_size=16, seed=0) as loader:
        for micro_batches in loader.steps(start_step=0): ...

A shard is llm.c's: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens. nanoGPT's files
without a header are read too. The sequences of optimiser step s are a pure function of (shards, seed, s): no
iterator state needs saving, and neither the number of ranks nor resumption changes the order.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import rng
from config import UserError

if (
    TYPE_CHECKING
):  # torch takes seconds to import: what needs it imports it, so mistakes in the data answer at once
    import torch
    from torch import Tensor

HEADER_BYTES = 1024  # 256 little-endian int32: magic, version, number of tokens, zeros
MAGIC = 20240520
VERSION = 1
LLAMA_MAGIC = 20240801  # llm.c's uint32 shards for Llama 3

STEPS_AHEAD = 2  # optimiser steps read before they are asked for
CHUNK_BYTES = 1 << 23  # of the first, whole reading of a shard; even, so that no token is cut
LARGE_BYTES = 10**9  # a first reading of more than this is announced
MAKE = "make shards with `python prepare_fineweb.py`"
REMAKE = "delete it, then copy it or make it again (`python prepare_fineweb.py`)"


class MicroBatch(NamedTuple):
    """Sequences of one forward pass; targets are the tokens one later."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    index: int  # in the global batch, whatever the number of ranks


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    path: Path
    tokens: int
    offset_bytes: int  # of the first token: HEADER_BYTES, or 0 without a header
    sha256: str  # of the whole file; "" where it is not known


class Corpus:
    """An ordered set of shards, read as one stream of tokens through memory maps."""

    def __init__(self, shards: Sequence[Shard], *, key: str = "data") -> None:
        self.shards = tuple(shards)
        self.key = key  # the flag that named the shards, for messages
        self.ends = np.cumsum([shard.tokens for shard in shards])
        self.n_tokens = int(self.ends[-1])
        self.maps = [  # opened once; as plain arrays, whose slices are cheaper than a memmap's
            np.asarray(np.memmap(s.path, dtype="<u2", mode="r", offset=s.offset_bytes, shape=(s.tokens,)))
            for s in shards
        ]
        lines = "".join(f"{shard.tokens} {shard.sha256}\n" for shard in shards)
        known = all(shard.sha256 for shard in shards)
        self.fingerprint = hashlib.sha256(lines.encode()).hexdigest() if known else ""

    def window(self, start: int, n: int) -> np.ndarray:
        """`n` tokens from `start` of the stream, uint16; they may straddle shards."""
        assert 0 <= start and 0 < n <= self.n_tokens - start, (start, n, self.n_tokens)
        parts = []
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.maps)):
            at = start - int(self.ends[i]) + self.shards[i].tokens
            parts.append(self.maps[i][at : at + n])
            start, n = start + len(parts[-1]), n - len(parts[-1])
            if n == 0:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def n_windows(self, block_size: int) -> int:
        """How many windows of block_size tokens, and one more for the last target, start block_size apart."""
        n_windows = (self.n_tokens - 1) // block_size
        if n_windows == 0:
            raise UserError(
                f"{self.key}: {self.n_tokens} tokens in {len(self.shards)} shard(s) are fewer than one "
                f"window: block_size + 1 = {block_size + 1}; add data, or use a smaller --model.block_size"
            )
        return n_windows


class TokenLoader:
    """This rank's micro-batches of each optimiser step, read ahead in a thread."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        block_size: int,
        batch_size: int,
        per_device_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        assert batch_size % (per_device_batch_size * world) == 0, (batch_size, per_device_batch_size, world)
        assert 0 <= rank < world, (rank, world)
        self.corpus, self.block_size, self.batch_size, self.seed = corpus, block_size, batch_size, seed
        self.per_device_batch_size, self.device = per_device_batch_size, device
        self.rank, self.world = rank, world
        self.n_windows = corpus.n_windows(block_size)
        assert self.n_windows < 2**32, self.n_windows
        self.orders: dict[int, np.ndarray] = {}  # epoch -> order of its windows, for two epochs
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="data")

    def sequences(self, step: int) -> np.ndarray:
        """Indices of the windows of optimiser step `step`, over all ranks; (batch_size,) int64."""
        position = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epoch, at = np.divmod(position, self.n_windows)
        return np.concatenate([self.order(int(e))[at[epoch == e]] for e in np.unique(epoch)]).astype(np.int64)

    def order(self, epoch: int) -> np.ndarray:
        order = self.orders.get(epoch)
        if order is None:
            order = rng.permutation(self.n_windows, self.seed, "epoch", epoch).astype(np.uint32)
            latest = dict(list(self.orders.items())[-1:])
            self.orders = latest | {epoch: order}  # replaced whole, because threads share it
        return order

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one optimiser step, read now."""
        return [to_device(batch, self.device) for batch in self.read(step)]

    def steps(self, start_step: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each optimiser step from `start_step` on, for ever; starts reading."""
        ahead = deque(self.reader.submit(self.read, start_step + i) for i in range(STEPS_AHEAD))

        def follow() -> Iterator[list[MicroBatch]]:
            for step in itertools.count(start_step + STEPS_AHEAD):
                batches = ahead.popleft().result()  # raises what the thread raised
                ahead.append(self.reader.submit(self.read, step))
                yield [to_device(batch, self.device) for batch in batches]

        return follow()

    def read(self, step: int) -> list[MicroBatch]:
        sequences, size = self.sequences(step), self.per_device_batch_size
        return [
            read_batch(self.corpus, sequences[m * size : (m + 1) * size], self.block_size, m, self.device)
            for m in range(self.rank, self.batch_size // size, self.world)
        ]

    def close(self) -> None:
        """End the reading thread."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fixed_batches(
    corpus: Corpus,
    *,
    n_tokens: int,
    block_size: int,
    per_device_batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device = "cpu",
) -> Iterator[MicroBatch]:
    """This rank's share of the first `n_tokens` tokens in stream order, the same for any number of ranks."""
    n_windows = min(max(n_tokens // block_size, 1), corpus.n_windows(block_size))
    size = per_device_batch_size

    def batch(m: int) -> MicroBatch:
        windows = range(m * size, min((m + 1) * size, n_windows))
        return to_device(read_batch(corpus, windows, block_size, m, device), device)

    return map(batch, range(rank, -(-n_windows // size), world))


def read_batch(
    corpus: Corpus,
    windows: Sequence[int] | np.ndarray,
    block_size: int,
    index: int,
    device: str | torch.device,
) -> MicroBatch:
    """Copy windows into host memory, pinned where the device is CUDA."""
    import torch

    rows = np.empty((len(windows), block_size + 1), dtype=np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[:] = corpus.window(int(window) * block_size, block_size + 1)
    tokens, targets = (torch.from_numpy(np.ascontiguousarray(x)) for x in (rows[:, :-1], rows[:, 1:]))
    if is_cuda(device):
        tokens, targets = tokens.pin_memory(), targets.pin_memory()
    return MicroBatch(tokens, targets, index)


def to_device(batch: MicroBatch, device: str | torch.device) -> MicroBatch:
    """Move a batch; on CUDA the copy is only enqueued, on the caller's stream."""
    tokens, targets = (x.to(device, non_blocking=is_cuda(device)) for x in (batch.tokens, batch.targets))
    return MicroBatch(tokens, targets, batch.index)


def is_cuda(device: str | torch.device) -> bool:
    return str(device).startswith("cuda")


# ---- finding and checking shards ------------------------------------------------------------------


def header(n_tokens: int) -> bytes:
    """The first HEADER_BYTES of a shard of `n_tokens` tokens."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, n_tokens
    return words.tobytes()


def open_corpus(
    patterns: Sequence[str],
    *,
    key: str,
    vocab_size: int,
    verify: bool = True,
    log: Callable[[str], object] = print,
) -> Corpus:
    """Check the shards that globs, folders or paths name, and open them as one stream.

    Args:
        key: the flag that the patterns come from, for messages.
        verify: read shards not seen before in full (SHA-256, largest token). Without it, as on all ranks but
            one, only what the cache and the manifest know is compared, and `fingerprint` may be "".
    """
    assert not isinstance(patterns, str), patterns
    try:
        shards = check_shards(patterns, vocab_size, verify, lambda line: log(f"{key}: {line}"))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return Corpus(shards, key=key)


def check_shards(patterns: Sequence[str], vocab_size: int, verify: bool, log: Callable) -> list[Shard]:
    files, folders = find_files(patterns)
    listed = read_manifests({path.parent for path in files.values()} | folders)
    for path, (manifest, _) in listed.items():
        if path.parent in folders and not path.exists():
            raise UserError(f"{manifest} lists {path}, which is missing; copy it there, or {MAKE}")
    check_one_split(files.values(), listed)
    shards = {real: read_header(path) for real, path in files.items()}
    bare = [shard.path for shard in shards.values() if not shard.offset_bytes]
    if bare and verify:
        log(
            f"{len(bare)} of {len(files)} files without a header, read as nanoGPT's uint16 (first: {bare[0]})"
        )
    cache, fresh = read_cache(), {}
    seen = {real: recall(cache, real) for real in files}
    n_bytes = sum(real.stat().st_size for real in files if not seen[real])
    if verify and n_bytes > LARGE_BYTES:
        log(f"reading {n_bytes / 1e9:.1f} GB once to check SHA-256 and token ids; later runs skip this")
    try:
        for real, shard in shards.items():
            manifest, entry = listed.get(shard.path, (None, {"tokens": shard.tokens, "sha256": ""}))
            check_same(shard.path, "tokens", shard.tokens, entry["tokens"], manifest)
            if verify and not seen[real]:
                before = stamp(real)
                seen[real] = digest(shard)
                fresh[str(real)] = [*before, *seen[real]]
            sha256, largest = seen[real] or (entry["sha256"], 0)
            check_same(shard.path, "SHA-256", sha256, entry["sha256"] or sha256, manifest)
            if largest >= vocab_size:
                raise beyond_vocabulary(shard, largest, vocab_size)
            shards[real] = replace(shard, sha256=sha256)
    finally:  # an interrupted first reading keeps what it has done
        write_cache(fresh)
    return list(shards.values())


def check_same(path: Path, name: str, here: object, there: object, manifest: Path | None) -> None:
    if here != there:
        raise UserError(f"{path} has {name} {here}, but {manifest} says {there}; {REMAKE}")


def find_files(patterns: Sequence[str]) -> tuple[dict[Path, Path], set[Path]]:
    """The files named, sorted, by resolved path, so each once; and the folders named whole."""
    patterns = [p for p in patterns if Path(p).name != "manifest.json"]  # caught by a shell's `folder/*`
    if not patterns:
        raise UserError(f"nothing given; give a folder, a glob or paths of .bin shards, or {MAKE}")
    found, folders = [], set()
    for pattern in patterns:
        n_before, name = len(found), os.path.expanduser(pattern)
        for match in [name] if os.path.exists(name) else glob.glob(name, recursive=True):
            path = Path(os.path.abspath(match))
            if path.is_dir():
                folders.add(path)
                found += bins_in(path)
            elif path.name != "manifest.json":
                found.append(path)
        if len(found) == n_before:
            splits = " or ".join(f"{Path(name, s)}" for s in ("train", "val") if bins_in(Path(name, s)))
            what = "holds no .bin file" if os.path.isdir(name) else "matches no shard"
            raise UserError(f"{pattern} {what}; {f'did you mean {splits}?' if splits else MAKE}")
    files: dict[Path, Path] = {}
    for path in sorted(found):
        files.setdefault(path.resolve(), path)
    return files, folders


def bins_in(folder: Path) -> list[Path]:
    return [Path(name) for name in glob.glob(os.path.join(glob.escape(str(folder)), "*.bin"))]


def read_manifests(folders: set[Path]) -> dict[Path, tuple[Path, dict]]:
    """Shard -> (manifest.json listing it, its entry), from folders and their parents; the nearer one wins."""
    listed = {}
    for folder in sorted(folders | {folder.parent for folder in folders}):
        manifest = folder / "manifest.json"
        try:
            for entry in json.loads(manifest.read_bytes()).get("shards", []):  # none: not our manifest
                if not isinstance(entry["tokens"], int) or not isinstance(entry["sha256"], str):
                    raise ValueError(f"entry {entry}")
                listed[Path(os.path.normpath(folder / entry["path"]))] = manifest, entry
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{manifest} is broken ({type(error).__name__}: {error}); {REMAKE}") from None
    return listed


def check_one_split(paths: Iterable[Path], listed: dict[Path, tuple[Path, dict]]) -> None:
    """Refuse train and val together, as llm.c and nanoGPT lay them: it would train on validation data."""
    example: dict[str, Path] = {}
    for path in paths:
        words = set(re.split("[^a-z]+", path.stem.lower())) & {"train", "val"}
        named = words.pop() if len(words) == 1 else None
        split = listed[path][1].get("split") if path in listed else named
        if split:
            example.setdefault(split, path)
    if len(example) > 1:
        both = " and ".join(f"{split} ({path})" for split, path in example.items())
        raise UserError(f"mixes {both}; name one of them, e.g. by a folder or the glob '*train*.bin'")


def read_header(path: Path) -> Shard:
    """Tell shards from files without a header; refuse a wrong magic, version or length."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path or its mode") from None
    words = np.frombuffer(
        start.ljust(HEADER_BYTES, b"\xff"), dtype="<i4"
    )  # a short file is not a bare header
    magic, version, tokens = words[:3].tolist()
    if size == 0:
        raise UserError(f"{path} is empty; {REMAKE}")
    if magic != MAGIC and words[3:].any():
        if size % 2:
            raise UserError(f"{path} is truncated, or not tokens: no header, and {size} bytes; {REMAKE}")
        if size >= 32 and re.fullmatch(rb"[\t\n\r -~]+", start):
            raise UserError(f"{path} is text, not tokens; {MAKE}")
        return Shard(path, size // 2, 0, "")
    if size < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size} bytes, and a header alone is {HEADER_BYTES}; {REMAKE}")
    if (magic, version) != (MAGIC, VERSION):
        wrong = "version" if magic == MAGIC else "magic"
        llama = " (llm.c's uint32 shards for Llama 3)" if magic == LLAMA_MAGIC else ""
        raise UserError(
            f"{path} has the wrong {wrong}: magic {magic}, version {version}{llama}; "
            f"uint16 shards of magic {MAGIC}, version {VERSION} are read: {MAKE}"
        )
    if tokens <= 0:
        raise UserError(f"{path} holds {tokens} tokens by its header; {REMAKE}")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        wrong = "truncated" if size < expected else "too long"
        raise UserError(f"{path} is {wrong}: {size} bytes, not {expected} for its {tokens} tokens; {REMAKE}")
    return Shard(path, tokens, HEADER_BYTES, "")


def beyond_vocabulary(shard: Shard, largest: int, vocab_size: int) -> UserError:
    tokens = np.memmap(shard.path, dtype="<u2", mode="r", offset=shard.offset_bytes)
    at = next(
        start + int(np.argmax(beyond))
        for start in range(0, shard.tokens, CHUNK_BYTES)
        if (beyond := tokens[start : start + CHUNK_BYTES] >= vocab_size).any()
    )
    doubt = "" if shard.offset_bytes else " (it has no header, so it may not be a token file at all)"
    return UserError(
        f"{shard.path} holds token {tokens[at]} at offset {at}, beyond vocab_size = {vocab_size}{doubt}; "
        f"give shards of this vocabulary, or --model.vocab_size {largest + 1} or more"
    )


# ---- what the first reading of a file found, remembered between runs ------------------------------


def digest(shard: Shard) -> tuple[str, int]:
    """SHA-256 of a file and its largest token, in one pass."""
    sha, largest = hashlib.sha256(), 0
    with open(shard.path, "rb") as file:
        sha.update(file.read(shard.offset_bytes))
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype="<u2").max()))
    return sha.hexdigest(), largest


def stamp(real: Path) -> tuple[int, int]:
    stat = real.stat()
    return stat.st_size, stat.st_mtime_ns


def recall(cache: dict, real: Path) -> tuple[str, int] | None:
    """SHA-256 and largest token, where the file is as it was when they were computed."""
    match cache.get(str(real)):
        case [int(size), int(mtime_ns), str(sha256), int(largest)] if (size, mtime_ns) == stamp(real):
            return sha256, largest
    return None


def cache_path() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "topogpt", "shards.json")


def read_cache() -> dict:
    try:
        cache = json.loads(cache_path().read_text())
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def write_cache(fresh: dict) -> None:
    """Add to the cache; what another process adds in the same instant may be lost, and is computed again."""
    if not fresh:
        return
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w") as file:
            json.dump(read_cache() | fresh, file)
        os.replace(temporary, path)
    except OSError:
        pass  # without a cache the next run reads the shards again
