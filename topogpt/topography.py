"""Where the units of a model lie: positions in checkpoints, in exported folders and on the Hub.

    load_topography("out/topolm").positions["layer.3.mlp"]     # (784, 2); or out/topolm/hf, or USER/topolm

It needs numpy and safetensors alone, so that anyone can read a map without torch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topogpt import topo

FORMAT = "topogpt-topography-1"
PREFIX = "positions."  # of positions among the weights of a checkpoint


class Topography(NamedTuple):
    """Where the units of every sheet of a model lie."""

    positions: dict[str, np.ndarray]  # sheet -> (n_units, 2) int64: row and column of each unit
    grid: tuple[int, int]  # height and width of a sheet
    unit_distance_mm: float  # between neighbours on the grid; a convention
    kind: str | None  # permuted or identity; None where it is not recorded
    seed: int | None  # of a permuted one


def save_topography(
    folder: Path,
    positions: Mapping[str, np.ndarray],
    *,
    kind: str,
    seed: int,
    unit_distance_mm: float = 1.0,
    **more: Any,
) -> None:
    """Write topography.safetensors (positions, a tensor per sheet) and topography.json (what they mean)."""
    from safetensors.numpy import save

    grids = {topo.grid_of(p) for p in positions.values()}
    assert len(grids) == 1, "all sheets have the same grid"
    grid = grids.pop()
    tensors = {sheet: np.ascontiguousarray(p, dtype=np.int32) for sheet, p in positions.items()}
    (folder / "topography.safetensors").write_bytes(save(tensors, metadata={"format": FORMAT}))
    facts = {
        "format": FORMAT, "grid": list(grid), "unit_distance_mm": unit_distance_mm, "positions": kind,
        "seed": seed, "sheets": list(positions),
        "tensors": "topography.safetensors: sheet -> (units, 2), row and column of each unit on the grid",
    }  # fmt: skip
    (folder / "topography.json").write_text(json.dumps(facts | more, indent=1) + "\n", encoding="utf-8")


def load_topography(source: str | Path) -> Topography:
    """Positions of every sheet from an exported folder, the folder of a run, or a repository of the Hub.

    A folder of this name is taken before a repository. Raises ValueError where nothing is found, or what is
    found cannot be read or does not put one unit in every cell.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = download_topography(str(source))
    for tensors, facts in (
        (folder / "topography.safetensors", folder / "topography.json"),  # exported
        (folder / "model.safetensors", folder / "state.json"),  # a checkpoint
        (folder / "best" / "model.safetensors", folder / "best" / "state.json"),  # a run
        (folder / "last" / "model.safetensors", folder / "last" / "state.json"),
    ):
        if tensors.is_file() and facts.is_file():
            return read_topography(tensors, facts)
    raise ValueError(
        f"{source} holds no topography; give a run (out/NAME), an exported folder or a repository of the Hub"
    )


def read_topography(tensors: Path, facts: Path) -> Topography:
    from safetensors import SafetensorError, safe_open

    prefix = PREFIX if facts.name == "state.json" else ""
    try:
        with safe_open(tensors, framework="numpy") as file:
            found = {
                name.removeprefix(prefix): file.get_tensor(name).astype(np.int64)
                for name in file.keys()
                if name.startswith(prefix)
            }
        said = json.loads(facts.read_text(encoding="utf-8"))
        said = said["config"]["topo"] if prefix else said
        if not found:
            raise ValueError("no positions")
        order = {name: i for i, name in enumerate(said.get("sheets") or sorted(found, key=topo.sheet_order))}
        distance = float(said.get("unit_distance_mm", 1.0))
        for sheet, position in found.items():
            if position.ndim != 2 or position.shape[1] != 2:
                raise ValueError(f"{sheet} has shape {position.shape}, not (units, 2)")
            topo.units_by_cell(position)  # raises where two units share a cell
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{tensors} and {facts.name} cannot be read as a topography: {error}") from None
    found = dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
    grid = topo.grid_of(next(iter(found.values())))
    return Topography(found, grid, distance, kind=said.get("positions"), seed=said.get("seed"))


def download_topography(repo: str) -> Path:
    """Folder of the two files of a repository of the Hub."""
    from huggingface_hub import hf_hub_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo} is neither a folder nor the name of a repository (USER/NAME)")
    try:
        paths = [hf_hub_download(repo, f"topography.{kind}") for kind in ("safetensors", "json")]
    except Exception as error:  # no network, no such repository, no right to read it, no such file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{repo} is no folder here, and its topography could not be read from the Hub: {reason}"
        ) from None
    return Path(paths[0]).parent
