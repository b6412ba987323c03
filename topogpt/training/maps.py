"""What a sheet shows: maps of single tokens, their Moran's I, and pictures of all sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from topogpt import topo
from topogpt.model.gpt import GPT


@torch.no_grad()
def token_maps(
    model: GPT, tokens: Tensor, positions: Mapping[str, np.ndarray], n_maps: int
) -> dict[str, np.ndarray]:
    """Activations of n_maps tokens of one text, evenly spaced over it, on the grid: sheet -> (n_maps, h, w).

    Args:
        tokens: (T,) int64.
        positions: sheet -> (n_units, 2).
    """
    training = model.training
    model.eval()
    named = model(tokens[None].to(model.device), activations=True, last_only=True).activations
    model.train(training)
    chosen = np.linspace(0, len(tokens) - 1, min(n_maps, len(tokens))).round().astype(int)
    return {
        sheet: topo.on_grid(named[sheet][0, chosen].float().cpu().numpy(), p)
        for sheet, p in positions.items()
    }


def mean_morans_i(maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Moran's I (queen, row-standardised) of each sheet, averaged over its maps; constant maps: 0."""
    return {sheet: float(np.nan_to_num(topo.morans_i(grids)).mean()) for sheet, grids in maps.items()}


def save_arrays(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Keep maps, so that a picture can be redrawn; runs.folder.read_maps reads them."""
    np.savez_compressed(path, **{sheet: grids.astype(np.float32) for sheet, grids in maps.items()})


def draw(
    path: Path, columns: Sequence[tuple[str, Mapping[str, np.ndarray]]], title: str, map_index: int = -1
) -> None:
    """Draw one map of every sheet; several columns ("before", "after") stand side by side.

    Each map is standardised, and all share one colour scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_sheets = len(columns[0][1])
    across = 2 if n_sheets <= 8 else 6  # attn and mlp of one layer in a row, or of three
    rows, gap = -(-n_sheets // across), 0.25
    widths = (([1.0] * across + [gap]) * len(columns))[:-1]
    figure = Figure(figsize=(1.25 * sum(widths) + 1.0, 1.4 * rows + 0.9), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for c, (label, maps) in enumerate(columns):
        first = c * (across + 1)
        for i, (sheet, grids) in enumerate(maps.items()):
            grid = grids[map_index]
            z = (grid - grid.mean()) / (grid.std() or 1.0)
            axis = axes[i // across, first + i % across]
            image = axis.imshow(z, cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
            axis.set_title(sheet, fontsize=7, pad=2)
        moran = np.mean(list(mean_morans_i(maps).values()))
        heading = axes[0, first].annotate(
            f"{label}mean Moran's I {round(moran, 2) + 0.0:.2f}",
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(0, 14),
            textcoords="offset points",
            fontsize=8,
        )
        heading.set_in_layout(False)  # it may reach over the next sheet
    figure.suptitle(f"{title}\n", fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    bar.set_label("activation (standard deviations)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight")
