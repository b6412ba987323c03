"""Whether a checkpoint is whole: SHA-256 of each of its files, kept in state.json, which is written last.

A checkpoint of an older version has no hashes: its optimizer.pt is compared with the checksums that the
archive has of its own. Nothing here imports torch.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from topogpt.errors import UserError
from topogpt.files import sha256

FILES = ("model.safetensors", "optimizer.pt", "state.json")
WITHOUT_HASHES = {"config", "data", "connectome", "train_state"}  # what state.json of an older version holds
WEIGHTS = ("model.safetensors",)
REMEDY = "use another checkpoint (--checkpoint last or step-N)"


def state_text(content: dict[str, Any], hashes: dict[str, str]) -> str:
    """state.json: `content`, the hashes of the other files, and that of both."""
    own = {"state.json": hash_of(content | {"sha256": hashes})}
    return json.dumps(content | {"sha256": hashes | own}, indent=1)


def hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint: config, data fingerprint, train_state."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {folder} is incomplete: {missing[0]} is missing; {REMEDY}")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state["config"]["model"], dict) or not isinstance(state["train_state"], dict):
            raise ValueError("it has no settings")
        if not state.keys() <= WITHOUT_HASHES:
            others = {name: value for name, value in state["sha256"].items() if name != "state.json"}
            if state["sha256"]["state.json"] != hash_of(state | {"sha256": others}):
                raise ValueError("it is not what was written (its SHA-256 is another)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"checkpoint {folder} is damaged: state.json: {reason}; {REMEDY}") from None
    return state


def check(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint; UserError where a file, of all or those named, is not what was written."""
    state = read_state(folder)
    hashes = state.get("sha256") or dict.fromkeys(FILES)
    for name in hashes if names is None else names:
        path, wanted = folder / name, hashes.get(name)
        if name == "state.json":
            continue  # read_state has compared it
        try:
            is_whole = sha256(path) == wanted if wanted else is_archive_whole(path)
        except OSError as error:
            raise UserError(f"checkpoint {folder} is damaged: {name}: {error.strerror}; {REMEDY}") from None
        if not is_whole:
            raise UserError(
                f"checkpoint {folder} is damaged: {name} is not what was written (its checksum is another); "
                f"{REMEDY}"
            )
    return state


def is_archive_whole(path: Path) -> bool:
    """By an archive's own checksums; another file has none to go by."""
    if path.name != "optimizer.pt":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error):
        return False
