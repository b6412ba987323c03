"""Files that are whole or not there, their hashes, and what is read back from them."""

import contextlib
import difflib
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """What is kept between runs of one user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "topogpt")


@contextlib.contextmanager
def whole(path: Path, *, first: bool = False) -> Iterator[Path]:
    """A name to write to, of this process alone; what is written is there whole at the end, or not at all.

    Args:
        first: a file that is there already stays: of several processes the first decides.
    """
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield part
        fsync(part)
        if first:
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        else:
            part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of what went wrong half-way; mostly it is not there
            part.unlink()
        raise


def inside(folder: Path, name: Any) -> Path:
    """The path of a file below a folder, of a name that was read from a file or comes from the Hub.

    Whatever such a name opens, replaces or deletes lies below the folder. Raises ValueError for anything that
    is no relative path downwards, as it is written: links that a person has laid are followed.
    """
    is_name = isinstance(name, str) and name.isprintable() and not set(name) & set("\\:")
    if not is_name or name.startswith("/") or set(name.split("/")) & {"", ".", ".."}:
        raise ValueError(f"{name!r:.100} is no file below {folder}")
    return folder / name


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed while they wrote this file have left."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def write_bytes(path: Path, data: bytes, *, first: bool = False) -> None:
    with whole(path, first=first) as part:
        part.write_bytes(data)


def copy(source: Path, target: Path) -> None:
    with whole(target) as part:
        shutil.copyfile(source, part)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 1, *, first: bool = False) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    # a file name that is no UTF-8 holds lone surrogates, whose backslashed form is JSON's own
    write_bytes(path, text.encode("utf-8", "backslashreplace"), first=first)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of several laid end to end; raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def similar(path: Path, otherwise: str) -> str:
    """A question after the name beside a missing path that is most like it; otherwise what is given."""
    with contextlib.suppress(OSError):
        found = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
        return f"did you mean {path.with_name(found[0])}?" if found else otherwise
    return otherwise


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
