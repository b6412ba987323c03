"""Where a run came from: code, versions, machine and data, for provenance.json."""

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
    """Output of git in the folder of this code; None outside a repository or without git."""
    try:
        options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 30}
        done = subprocess.run(["git", *arguments], check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
