"""Sheets: where the units of a layer lie, which are neighbours, and how map-like a pattern on them is.

Each branch of each block is a sheet of its own ("layer.3.attn", "layer.3.mlp"): n_embd units on an h x w
grid. This file needs numpy alone, so that anyone can read a map without torch; the losses on sheets are in
spatial.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from topogpt import rng


def grid_shape(n_units: int) -> tuple[int, int]:
    """Height and width of the most nearly square grid of n_units: 784 -> (28, 28), 3072 -> (48, 64)."""
    h = next(h for h in range(int(n_units**0.5), 0, -1) if n_units % h == 0)
    return h, n_units // h


def positions(kind: Literal["permuted", "identity"], n_units: int, seed: int, sheet: str) -> np.ndarray:
    """Row and column of each unit of a sheet, (n_units, 2) int64; every cell of the grid holds one unit.

    permuted: a random permutation, fixed before training and never changed (TopoLM, section 3); a pure
    function of seed and the sheet's name. identity: unit i lies in cell i, row by row.
    """
    cells = np.arange(n_units) if kind == "identity" else rng.permutation(n_units, seed, "positions", sheet)
    return np.stack(np.divmod(cells, grid_shape(n_units)[1]), axis=1)


def units_by_cell(position: np.ndarray) -> np.ndarray:
    """Which unit lies in each cell of the grid, row by row: the inverse of positions, (n_units,) int64."""
    w = grid_shape(len(position))[1]
    units = np.argsort(position[:, 0] * w + position[:, 1], kind="stable")
    cells = position[units]
    if not np.array_equal(cells[:, 0] * w + cells[:, 1], np.arange(len(position))):
        raise ValueError("positions must put exactly one unit in every cell of the grid")
    return units


def on_grid(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Lay values of units, (..., n_units), on their grid, (..., h, w)."""
    return values[..., units_by_cell(position)].reshape(*values.shape[:-1], *grid_shape(len(position)))


def neighbourhood_cells(h: int, w: int, radius: int) -> np.ndarray:
    """Cells of every neighbourhood, (n, side * side) int64 with side = 2 * radius - 1.

    A neighbourhood is the cells at linf distance < radius of a centre whose square lies inside the grid
    (TopoLM, section 3): radius 5 on 28x28 gives 400 squares of 9x9.
    """
    side = 2 * radius - 1
    if side > min(h, w):
        raise ValueError(
            f"neighbourhoods of {side}x{side} do not fit the {h}x{w} sheet; the radius is too large"
        )
    top, left = np.divmod(np.arange((h - side + 1) * (w - side + 1)), w - side + 1)
    row, column = np.divmod(np.arange(side * side), side)
    return (top[:, None] + row) * w + left[:, None] + column


def inverse_distances(radius: int, norm: Literal["l2", "l1", "linf"] = "l2") -> np.ndarray:
    """1 / (1 + distance) between the cells of a neighbourhood, (side**2, side**2) float64.

    TopoLM's released code measures distance by l2; its paper says linf.
    """
    side = 2 * radius - 1
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1).astype(float)
    distance = np.linalg.norm(cells[:, None] - cells, ord={"l2": 2, "l1": 1, "linf": np.inf}[norm], axis=-1)
    return 1 / (1 + distance)


def morans_i(grids: np.ndarray, contiguity: Literal["queen", "rook"] = "queen") -> np.ndarray:
    """Moran's I of maps (..., h, w) with row-standardised weights: (...), NaN for a constant map.

    I = sum_i z_i * mean of z over i's neighbours / sum_i z_i**2, with z the deviations from the map's mean
    (Moran 1950). About 0 for noise, towards 1 for smooth maps, -1 for a checkerboard under rook contiguity.
    """
    z = grids.astype(float) - grids.mean(axis=(-2, -1), keepdims=True, dtype=float)
    *_, h, w = z.shape
    padding = [(0, 0)] * (z.ndim - 2) + [(1, 1), (1, 1)]
    padded, inside = np.pad(z, padding), np.pad(np.ones((h, w)), 1)
    steps = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (1, 1)]
    if contiguity == "rook":
        steps = [(i, j) for i, j in steps if 1 in (i, j)]
    lag = sum(padded[..., i : i + h, j : j + w] for i, j in steps)
    lag = lag / sum(inside[i : i + h, j : j + w] for i, j in steps)
    with np.errstate(invalid="ignore"):
        return (z * lag).sum(axis=(-2, -1)) / (z * z).sum(axis=(-2, -1))


# ---- positions in files, for any reader -----------------------------------------------------------

FORMAT = "topogpt-topography-1"
CHECKPOINT_PREFIX = "positions."  # of positions among the weights of a checkpoint


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

    n_units = {len(p) for p in positions.values()}
    assert len(n_units) == 1, "all sheets have the same number of units"
    grid = grid_shape(n_units.pop())
    tensors = {sheet: np.ascontiguousarray(p, dtype=np.int32) for sheet, p in positions.items()}
    (folder / "topography.safetensors").write_bytes(save(tensors, metadata={"format": FORMAT}))
    facts = {
        "format": FORMAT,
        "grid": list(grid),
        "unit_distance_mm": unit_distance_mm,
        "positions": kind,
        "seed": seed,
        "sheets": list(positions),
        "tensors": "topography.safetensors: sheet -> (units, 2), row and column of each unit on the grid",
    }
    (folder / "topography.json").write_text(json.dumps(facts | more, indent=1) + "\n", encoding="utf-8")


def load_topography(source: str | Path) -> Topography:
    """Positions of every sheet from an exported folder, the folder of a run, or a repository of the Hub.

    A folder of this name is taken before a repository.
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

    prefix = CHECKPOINT_PREFIX if facts.name == "state.json" else ""
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
        for sheet, position in found.items():
            if position.ndim != 2 or position.shape[1] != 2:
                raise ValueError(f"{sheet} has shape {position.shape}, not (units, 2)")
            units_by_cell(position)  # raises where two units share a cell
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{tensors} and {facts.name} cannot be read as a topography: {error}") from None
    order = {name: i for i, name in enumerate(said.get("sheets") or sorted(found, key=sheet_order))}
    found = dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
    return Topography(
        positions=found,
        grid=grid_shape(len(next(iter(found.values())))),
        unit_distance_mm=float(said.get("unit_distance_mm", 1.0)),
        kind=said.get("positions"),
        seed=said.get("seed"),
    )


def sheet_order(sheet: str) -> list[tuple[int, str]]:
    """A key that puts layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in sheet.split(".")]


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
