"""Files that are whole or not there, their hashes, and what is read back from them."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        part.write_bytes(data)
        fsync(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of what went wrong half-way; mostly it is not there
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of several laid end to end; raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def permit(path: Path) -> None:
    """Give a file the permissions of new files: safetensors makes its own readable by the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
