"""Where a run came from: code, versions, machine and data, for provenance.json."""

import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from topogpt.errors import masked

LONGEST = 1_000_000  # bytes of a diff that are kept
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "huggingface_hub", "transformers", "wandb")


def collect(device: torch.device, world: int, data: dict[str, str]) -> dict[str, Any]:
    """Facts about this start of a run; `data` are fingerprints of its corpora."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv,
        "git_sha": git("rev-parse", "HEAD"), "git_diff": git("diff", "HEAD"),
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda, "cpu_threads": torch.get_num_threads(), "world_size": world,
        "data_sha256": data,
    }  # fmt: skip


def code() -> dict[str, Any]:
    """Which code this is: the commit, and whether it was changed since."""
    return {"git_sha": git("rev-parse", "HEAD"), "changed": bool(git("diff", "HEAD"))}


def git(*arguments: str) -> str | None:
    """Output of git in the folder of this code; None outside a repository or without git.

    Bytes that are no UTF-8 are replaced, what looks like a secret is masked, and what is beyond LONGEST cut.
    """
    where = {"cwd": Path(__file__).parent, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        with subprocess.Popen(["git", *arguments], **where) as process:
            deadline = threading.Timer(30, process.kill)
            deadline.start()
            output = process.stdout.read(LONGEST + 1)
            if cut := len(output) > LONGEST:
                process.kill()
            status = process.wait()
            deadline.cancel()
    except OSError:
        return None
    if status and not cut:
        return None
    text = masked(output[:LONGEST].decode("utf-8", "replace")).strip()
    return f"{text}\n... cut here: more than {LONGEST:,} bytes" if cut else text


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
