"""Sheets and maps, where a reader looks for them; they are defined in topogpt/topo.py."""

from topogpt.topo import (
    Topography,
    grid_shape,
    load_topography,
    morans_i,
    on_grid,
    positions,
    save_topography,
)

__all__ = ["Topography", "grid_shape", "load_topography", "morans_i", "on_grid", "positions"]
__all__ += ["save_topography"]
