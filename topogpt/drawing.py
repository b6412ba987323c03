"""The one drawer of all sheets: a map of every sheet of a model, several models or steps one above the other.

Needs numpy; matplotlib only once something is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from topogpt import topo
from topogpt.terminal import PALETTE

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

FADED = 0.3  # opacity of what is not outlined, where something could be
OUTLINE = "#1a1a1a"
LIMIT = 2.5  # standard deviations at the ends of the colours, of standardised maps
DPI = 160


class Maps(NamedTuple):
    """A map of every sheet of one model, or of one step of its training."""

    label: str
    values: Mapping[str, np.ndarray]  # sheet -> (h, w)
    outlined: Mapping[str, np.ndarray] | None = None  # sheet -> (h, w) bool
    moran: float | None = None  # mean Moran's I; None: of these maps

    @property
    def heading(self) -> str:
        moran = self.moran
        if moran is None:
            moran = np.mean(list(topo.mean_morans_i(self.values).values()))
        said = f"{round(float(moran), 2) + 0.0:.2f}".replace("-", "\u2212")
        return f"{self.label}{': ' if self.label else ''}mean Moran's I {said}"


def standardised(maps: np.ndarray) -> np.ndarray:
    """Deviations of maps (..., h, w) from their means, in their standard deviations; a constant map is 0."""
    centred = maps - maps.mean(axis=(-2, -1), keepdims=True)
    sd = maps.std(axis=(-2, -1), keepdims=True)
    return np.divide(centred, sd, out=np.zeros_like(centred), where=sd > 0)


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colours() -> "Colormap":
    """PALETTE as matplotlib's."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [((at + 1) / 2, tuple(c / 255 for c in rgb)) for at, *rgb in PALETTE]
    return LinearSegmentedColormap.from_list("topogpt", stops)


def draw_sheets(
    groups: Sequence[Maps], title: str, unit: str, limit: float | None = None, least: float = 0.0
) -> "Figure":
    """Every sheet in one figure on one symmetric colour scale, a column a layer and a row a branch of it.

    Where cells can be outlined, the others are faded, so that noise is not as vivid as what was found.

    Args:
        unit: of the values, beside the scale.
        limit: where the scale ends; None: at the 99.5th percentile of all values, but not before `least`.
    """
    from matplotlib.cm import ScalarMappable

    if limit is None:
        everything = np.concatenate([grid.ravel() for maps in groups for grid in maps.values.values()])
        limit = max(float(np.quantile(np.abs(everything), 0.995)), least) or 1.0
    columns, branches = (
        list(dict.fromkeys(names)) for names in zip(*map(split, groups[0].values), strict=True)
    )
    h, w = next(iter(groups[0].values.values())).shape
    inches = (0.9 if len(columns) > 6 else 1.3 if len(columns) > 1 else 2.6) / w  # of a unit
    gap, line = max(1, round(h / 10)), 0.2 / inches  # in units: between sheets, and of text
    block = len(branches) * (h + gap) - gap + 1.8 * line  # one of groups, and the heading of the next
    width, height = len(columns) * (w + gap) - gap, len(groups) * block + 0.6 * line
    figure, palette = new_figure(max(inches * width + 1.4, 4.0), inches * height + 0.5), colours()
    axis = figure.subplots()
    axis.set_axis_off()
    for i, column in enumerate(columns):
        axis.text(i * (w + gap) + w / 2, -0.8 * line, column, ha="center", fontsize=8)
    for g, maps in enumerate(groups):
        top = g * block
        axis.text(-0.5, top - (1.8 if g == 0 else 0.9) * line, maps.heading, fontsize=8.5)
        for k, branch in enumerate(branches):
            middle = top + k * (h + gap) + h / 2
            axis.text(-0.4 * line, middle, branch, rotation=90, ha="right", va="center", fontsize=8)
        mosaic = np.full((len(branches) * (h + gap) - gap, width), np.nan)
        opacity = np.ones(mosaic.shape)
        for sheet, grid in maps.values.items():
            column, branch = split(sheet)
            left, above = columns.index(column) * (w + gap), branches.index(branch) * (h + gap)
            mosaic[above : above + h, left : left + w] = grid
            if maps.outlined is not None:
                opacity[above : above + h, left : left + w] = np.where(maps.outlined[sheet], 1, FADED)
                axis.plot(*outline(maps.outlined[sheet], top + above, left), color=OUTLINE, lw=0.5)
        place = (-0.5, width - 0.5, top + len(mosaic) - 0.5, top - 0.5)
        image = axis.imshow(
            mosaic,
            cmap=palette,
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
            extent=place,
            alpha=opacity,
        )
    axis.set(xlim=(-line, width + 0.2 * line), ylim=(height - 2 * line, -2.6 * line), aspect="equal")
    figure.suptitle(title, fontsize=9)
    scale = ScalarMappable(image.norm, palette)  # at full opacity
    bar = figure.colorbar(scale, ax=axis, shrink=min(1.0, 1.6 / (inches * height)), extend="both", pad=0.01)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def split(sheet: str) -> tuple[str, str]:
    """Column and row of a sheet in the picture: ("layer 3", "mlp") of layer.3.mlp."""
    column, _, row = sheet.rpartition(".")
    return column.replace(".", " "), row


def outline(mask: np.ndarray, top: float, left: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y of lines around the cells of a mask (h, w) whose first cell lies at row top, column left."""
    padded = np.pad(mask.astype(bool), 1)
    below = np.argwhere(padded[:-1] != padded[1:])  # a line along the lower side of each of these cells
    right = np.argwhere(padded[:, :-1] != padded[:, 1:])
    starts = np.concatenate([below + (-0.5, -1.5), right + (-1.5, -0.5)])
    ends = np.concatenate([below + (-0.5, -0.5), right + (-0.5, -0.5)])
    rows, columns = (
        np.stack([starts[:, k], ends[:, k], np.full(len(starts), np.nan)], axis=1).ravel() + offset
        for k, offset in ((0, top), (1, left))
    )
    return columns, rows


def in_words(figure: "Figure") -> str:
    """What a figure shows, for those who do not see it: its titles, axes and lines; of maps, each heading."""
    said = [figure.get_suptitle()]
    for axis in figure.axes:
        parts = [axis.get_title(), *(text.get_text() for text in axis.texts if "Moran" in text.get_text())]
        x, y = axis.get_xlabel(), axis.get_ylabel()
        parts.append(f"{y} over {x}" if x and y else x or y)
        said.append("; ".join(filter(None, parts)))
    handles = [h for axis in figure.axes for h in axis.get_legend_handles_labels()[1]]
    said += [", ".join(dict.fromkeys(handles))]
    return ". ".join(dict.fromkeys(part.strip(" .") for part in said if part)) + "."


def save(figure: "Figure", path: Path, **more: object) -> None:
    figure.savefig(path, dpi=DPI, **more)
