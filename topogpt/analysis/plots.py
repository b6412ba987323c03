"""What the figures of several analyses share: their style, maps of all sheets, Moran's I beside its floor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from topogpt import drawing
from topogpt.analysis.measures import smoothing
from topogpt.analysis.results import Result
from topogpt.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, CONTROL, FLOOR = "#0072B2", "#D55E00", "0.55"  # Okabe and Ito's blue and vermilion: seen by everyone
COLOURS = (MODEL, CONTROL)
STYLE = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "topogpt",
}  # fmt: skip
LEAST_T = 4.0  # where the scale of t-maps ends at least, so that noise stays pale
MAPS = "One cell is one unit; a column is a layer, its rows are the branches of it."
OUTLINED = "What is not outlined is faded."
BAND = "The grey band is the floor, white noise smoothed in the same way, \u00b1 2 standard deviations."


def maps_of(
    result: Result, label: str, values: np.ndarray, outlined: np.ndarray | None = None
) -> drawing.Maps:
    """Maps of all sheets, (S, h, w), to be drawn."""
    named = dict(zip(result.sheets, values, strict=True))
    return drawing.Maps(
        label, named, None if outlined is None else dict(zip(result.sheets, outlined, strict=True))
    )


def draw_moran(found: Sequence[Result], title: str) -> "Figure":
    """Moran's I of every sheet, by smoothing."""
    widths = list(found[0].results["moran"])
    figure = new_figure(2.4 * len(widths) + 0.8, 2.8)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, fwhm in zip(axes, widths, strict=True):
        for r, colour, marker in zip(found, COLOURS, "os", strict=False):
            values = [m["value"] for m in r.results["moran"][fwhm]["by_sheet"].values()]
            axis.plot(np.arange(len(values)), values, marker, ms=3.5, color=colour, label=r.label)
        band(axis.axhspan, found[0].results["moran"][fwhm])
        lowest = min(m["value"] for r in found for m in r.results["moran"][fwhm]["by_sheet"].values())
        axis.set(title=smoothing(fwhm), ylim=(min(-0.15, lowest - 0.05), 1))
        sheet_axis(axis, found[0].sheets)
    axes[0].set_ylabel("Moran's I")
    legend(figure, axes)
    figure.suptitle(title, fontsize=9)
    return figure


def sheet_axis(axis: Any, sheets: Sequence[str]) -> None:
    """Name every sheet below an x axis, such as 3 mlp."""
    names = [sheet.removeprefix("layer.").replace(".", " ") for sheet in sheets]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_xlabel("sheet: layer and branch")


def band(span: Callable[..., Any], moran: dict[str, Any]) -> None:
    """The floor: what maps of white noise, smoothed in the same way, reach; +- 2 standard deviations."""
    first = next(iter(moran["by_sheet"].values()))
    low, high = (first["floor"] + k * first["floor_sd"] for k in (-2, 2))
    span(low, high, color=FLOOR, alpha=0.35, lw=0, label="no map: white noise")


def legend(figure: "Figure", axes: Sequence[Any]) -> None:
    """One legend for all axes, each label once."""
    found = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    figure.legend(found.values(), found, loc="outside right upper")
