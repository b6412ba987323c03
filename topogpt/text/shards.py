"""Token shards: their format, and the checks that a set of them passes before it is trained on.

A shard is llm.c's: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens. nanoGPT's files
without a header are read too. What the first full reading of a file finds (SHA-256, largest token) is
remembered in ~/.cache/topogpt/shards.json, so later runs read headers alone.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from topogpt.errors import UserError
from topogpt.files import cache_dir, inside, read_json, write_json

HEADER_BYTES = 1024  # 256 little-endian int32: magic, version, number of tokens, zeros
MAGIC = 20240520
VERSION = 1
LLAMA_MAGIC = 20240801  # llm.c's uint32 shards for Llama 3

CHUNK_BYTES = 1 << 23  # of the first, whole reading of a shard; even, so that no token is cut
LARGE_BYTES = 10**9  # a first reading of more than this is announced
MAKE = "make shards with `python prepare_fineweb.py`"
REMAKE = "delete it, then copy it or make it again (`python prepare_fineweb.py`)"


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    path: Path
    tokens: int
    offset_bytes: int  # of the first token: HEADER_BYTES, or 0 without a header
    sha256: str  # of the whole file; "" where it is not known


def header(n_tokens: int) -> bytes:
    """The first HEADER_BYTES of a shard of `n_tokens` tokens."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, n_tokens
    return words.tobytes()


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
        n = f"{len(bare)} of {len(files)}"
        log(f"{n} files without a header, read as nanoGPT's uint16 (first: {bare[0]})")
    cache, fresh = read_json(cache_path()), {}
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
            text = manifest.read_bytes() if manifest.is_file() or not manifest.exists() else b""
            for entry in json.loads(text).get("shards", []):  # none: not our manifest
                if not isinstance(entry["tokens"], int) or not isinstance(entry["sha256"], str):
                    raise ValueError(f"entry {entry}")
                listed[inside(folder, entry["path"])] = manifest, entry
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error!s:.150}"
            raise UserError(f"{manifest} is broken ({reason}); {REMAKE}") from None
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
    if path.exists() and not path.is_file():  # opening a pipe would wait for who writes to it
        raise UserError(f"{path} is no file but a folder, a pipe or a device; give shards, or {MAKE}")
    try:
        with open(path, "rb") as file:
            start, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path or its mode") from None
    # filled up, so that a short file is not a bare header
    words = np.frombuffer(start.ljust(HEADER_BYTES, b"\xff"), dtype="<i4")
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
    return cache_dir() / "shards.json"


def write_cache(fresh: dict) -> None:
    """Add to the cache; what another process adds in the same instant may be lost, and is computed again."""
    if not fresh:
        return
    with contextlib.suppress(OSError):  # without a cache the next run reads the shards again
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_json(cache_path(), read_json(cache_path()) | fresh, indent=None)
