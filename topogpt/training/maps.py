"""What a sheet shows: maps of single tokens, their Moran's I, and pictures of all sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from topogpt import drawing, topo
from topogpt.files import whole
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
    named = model(tokens[None].to(model.device), activations=list(positions), last_only=True).activations
    model.train(training)
    chosen = np.linspace(0, len(tokens) - 1, min(n_maps, len(tokens))).round().astype(int)
    return {
        sheet: topo.on_grid(named[sheet][0, chosen].float().cpu().numpy(), p)
        for sheet, p in positions.items()
    }


def save_arrays(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Keep maps, so that a picture can be redrawn; runs.folder.read_maps reads them."""
    with whole(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **{sheet: grids.astype(np.float32) for sheet, grids in maps.items()})


def draw(
    path: Path, steps: Sequence[tuple[str, Mapping[str, np.ndarray]]], title: str, map_index: int = -1
) -> None:
    """Draw one map of every sheet, standardised; several steps ("before", "after") stand above each other.

    Args:
        steps: name of each, and its maps, sheet -> (n_maps, h, w); Moran's I is the mean over all of them.
    """
    groups = []
    for label, maps in steps:
        shown = {sheet: drawing.standardised(grids[map_index]) for sheet, grids in maps.items()}
        moran = float(np.mean(list(topo.mean_morans_i(maps).values())))
        groups.append(drawing.Maps(label, shown, moran=moran))
    drawing.save(drawing.draw_sheets(groups, title, "activation (sd of its sheet)", drawing.LIMIT), path)
