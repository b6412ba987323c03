"""Sheets: where the units of a layer lie, which are neighbours, and how map-like a pattern on them is.

By default each branch of each block is a sheet of its own ("layer.3.attn", "layer.3.mlp"): n_embd units on an
h x w grid; `Layout` says which other sheets there are. Positions in files are in topography.py, the losses on
sheets in spatial/; this needs numpy alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from topogpt import rng

N_MAPS = 64  # single tokens whose maps an evaluation in training averages Moran's I over
N_NOISE = 500  # white-noise maps whose Moran's I is the floor

# Which sheets a model has: the outputs of each branch ("layer.3.attn", "layer.3.mlp"); of each c_fc, before
# the GELU ("layer.3.fc"), on which the losses on weights act; or of all branches together ("all").
Layout = Literal["per_branch", "c_fc", "one_sheet"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
ONE_SHEET = "all"


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


def grid_of(position: np.ndarray) -> tuple[int, int]:
    """Height and width of the grid that positions, (n_units, 2), fill; of ours it is `grid_shape`'s."""
    h, w = position.max(axis=0) + 1
    return int(h), int(w)


def unit_square(position: np.ndarray) -> np.ndarray:
    """Positions (n_units, 2) with the sides of their grid from 0 to 1: any two grids lie on each other."""
    return (position + 0.5) / grid_of(position)


def units_by_cell(position: np.ndarray) -> np.ndarray:
    """Which unit lies in each cell of the grid, row by row: the inverse of positions, (n_units,) int64.

    Raises ValueError unless the (n_units, 2) positions put exactly one unit in every cell of a rectangle.
    """
    h, w = grid_of(position)
    cells = position[:, 0] * w + position[:, 1]
    units = np.argsort(cells, kind="stable")
    if h * w != len(position) or position.min() < 0 or not np.array_equal(cells[units], np.arange(h * w)):
        raise ValueError("positions must put exactly one unit in every cell of the grid")
    return units


def on_grid(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Lay values of units, (..., n_units), on their grid, (..., h, w).

    Args:
        values: one number a unit, after any number of other axes.
        position: (n_units, 2), row and column of each unit; ValueError if they do not fill a rectangle.
    """
    return values[..., units_by_cell(position)].reshape(*values.shape[:-1], *grid_of(position))


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


def mean_morans_i(maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Moran's I (queen, row-standardised) of each sheet, averaged over its maps; constant maps: 0."""
    return {sheet: float(np.nan_to_num(morans_i(grids)).mean()) for sheet, grids in maps.items()}


def noise_morans(
    h: int,
    w: int,
    n: int,
    seed: int | Sequence[int] = 0,
    contiguity: Literal["queen", "rook"] = "queen",
    readout: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Moran's I of n maps of white noise, (n,), smoothed by readout: what a map is compared with."""
    grids = np.random.default_rng(seed).standard_normal((n, h, w))
    return morans_i(readout(grids) if readout else grids, contiguity)


def noise_floor(h: int, w: int) -> tuple[float, float]:
    """Mean and standard deviation of Moran's I over N_NOISE maps of white noise on a grid, unsmoothed."""
    found = noise_morans(h, w, N_NOISE)
    return float(np.nanmean(found)), float(np.nanstd(found))


def sheet_names(n_layer: int, layout: Layout = "per_branch") -> list[str]:
    """Names of a model's sheets, and of its activations, in forward order."""
    if layout == "one_sheet":
        return [ONE_SHEET]
    parts = ("fc",) if layout == "c_fc" else ("attn", "mlp")
    return [f"layer.{i}.{part}" for i in range(n_layer) for part in parts]


def layout_of(sheets: Iterable[str], n_layer: int) -> Layout:
    """The layout whose sheets these are; ValueError where there is none."""
    there = set(sheets)
    for layout in LAYOUTS:
        if there == set(sheet_names(n_layer, layout)):
            return layout
    expected = ", ".join(sheet_names(n_layer))
    given = ", ".join(sheets)
    raise ValueError(f"the sheets {given} are not those of a model of {n_layer} layers: {expected}")


def sheet_shape(layout: Layout, n_layer: int, n_embd: int, n_hidden: int) -> tuple[int, int]:
    """Height and width of a sheet of a model with n_hidden hidden units an MLP.

    The one sheet gives each branch rows of its own, n_embd units in order of depth, and is as nearly square
    as that allows: TopoLM's 24 branches of 784 lie on 168x112, seven rows each.
    """
    if layout != "one_sheet":
        return grid_shape(n_hidden if layout == "c_fc" else n_embd)
    n = 2 * n_layer * n_embd
    widths = (w for w in range(1, n_embd + 1) if n_embd % w == 0)
    w = min(widths, key=lambda w: abs(np.log(n / w / w)))
    return n // w, w


def sheet_order(sheet: str) -> list[tuple[int, str]]:
    """A key that puts layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in sheet.split(".")]
