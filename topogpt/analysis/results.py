"""What an analysis leaves: NAME.json (numbers, protocol, hashes of data and weights) and NAME.safetensors.

    save("topography", subject, outcome)
    read(folder, "topography").results["moran"]       # of the JSON; .arrays reads the other file

Tables, figures and the report are made from these two files alone.
"""

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt.analysis.subject import Subject
from topogpt.errors import UserError
from topogpt.files import write_bytes, write_json

FORMAT = "topogpt-eval-2"


class Outcome(NamedTuple):
    """What an analysis found in one model."""

    protocol: dict[str, Any]  # what the numbers depend on besides weights and data
    data: dict[str, str]  # file or corpus -> SHA-256
    results: dict[str, Any]  # numbers
    arrays: dict[str, np.ndarray]  # what figures need besides
    summary: dict[str, Any] = {}  # the few numbers that a model card shows; or {"value": x, null: its value}


@dataclass(frozen=True)
class Result:
    """What an analysis left of one model."""

    content: dict[str, Any]  # of the JSON
    folder: Path

    @property
    def label(self) -> str:
        return self.content["model"]["label"]

    @property
    def sheets(self) -> list[str]:
        return self.content["model"]["sheets"]

    @property
    def results(self) -> dict[str, Any]:
        return self.content["results"]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        name = self.content["analysis"]
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {remedy(name)}") from None


def save(name: str, subject: Subject, outcome: Outcome) -> None:
    """Write NAME.safetensors and NAME.json, each whole or not at all; the JSON last, as it speaks of both."""
    from safetensors.numpy import save as as_bytes

    from topogpt.runs import provenance

    arrays = {key: np.ascontiguousarray(a) for key, a in outcome.arrays.items()}
    write_bytes(subject.results / f"{name}.safetensors", as_bytes(arrays, metadata={"format": FORMAT}))
    loss = subject.settings["topo"]["loss"] if subject.settings else None
    model = {"label": subject.label, "checkpoint": subject.checkpoint.name}
    model |= {"weights_sha256": subject.weights_sha256, "spatial_loss": loss}
    model |= {"sheets": subject.sheets, "grid": list(subject.grid)}
    content = {
        "format": FORMAT,
        "analysis": name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": model,
        "protocol": outcome.protocol,
        "data_sha256": outcome.data,
        "code": provenance.code(),
        "summary": outcome.summary,
        "results": outcome.results,
    }
    write_json(subject.results / f"{name}.json", plain(content))


def read(folder: Path, name: str) -> Result:
    """What an analysis wrote."""
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            return Result(content, folder)
        reason = f"it is no {FORMAT}"
    except FileNotFoundError:
        reason = "it is not there"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read ({reason}); {remedy(name)}")


def kind_of(name: str) -> str:
    """contrasts for contrasts-mine, which are those of mine.csv."""
    return name.partition("-")[0]


def remedy(name: str) -> str:
    return f"make it with `python -m evals.{kind_of(name)}`"


def plain(value: Any) -> Any:
    """numpy to JSON: scalars, arrays as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
