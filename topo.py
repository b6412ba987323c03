"""Sheets and maps, where a reader looks for them; they are defined in topogpt/topo.py."""

from topogpt.topo import grid_shape, morans_i, on_grid, positions
from topogpt.topography import Topography, load_topography, save_topography

__all__ = ["Topography", "grid_shape", "load_topography", "morans_i", "on_grid", "positions"]
__all__ += ["save_topography"]
