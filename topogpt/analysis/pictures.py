"""Pictures for notebooks, drawn without pyplot, so that they change no settings and open no window."""

import io
from collections.abc import Mapping

import numpy as np

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:
    raise ImportError("matplotlib is not installed; pip install 'topogpt[figures]'") from None

LIMIT = 2.5  # standard deviations at the ends of the colours
ACROSS = 6  # sheets in a row


class Picture(Figure):
    """A figure that a notebook shows."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        FigureCanvasAgg(self).print_png(png)
        return png.getvalue()


def of_sheets(maps: Mapping[str, np.ndarray], title: str = "") -> Picture:
    """One map of every sheet, sheet -> (height, width), standardised, on one scale of colours."""
    across = min(ACROSS, len(maps))
    rows = -(-len(maps) // across)
    picture = Picture(figsize=(1.7 * across + 0.8, 1.9 * rows + (0.4 if title else 0.1)), layout="compressed")
    axes = picture.subplots(rows, across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (sheet, grid) in zip(axes.flat, maps.items(), strict=False):
        z = (grid - grid.mean()) / (grid.std() or 1.0)
        image = axis.imshow(z, cmap="RdBu_r", vmin=-LIMIT, vmax=LIMIT, interpolation="nearest")
        axis.set_title(sheet, fontsize=8)
    picture.colorbar(image, ax=axes, shrink=0.7, label="standard deviations")
    if title:
        picture.suptitle(title, fontsize=10)
    return picture
