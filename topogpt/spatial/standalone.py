"""TopoLM's spatial loss for anybody's model: positions in, activations in, a scalar out.

    spatial = topogpt.SpatialLoss({"mlp": topogpt.positions("permuted", 784, seed=0, sheet="mlp")})
    loss = cross_entropy + 2.5 * spatial({"mlp": activations})         # (..., 784) of any float dtype

It checks what it is given and counts its own calls; the numbers are TopoLMLoss's (topolm.py).
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from topogpt import topo
from topogpt.errors import UserError
from topogpt.settings import TopoConfig
from topogpt.spatial.topolm import TopoLMLoss

Positions = np.ndarray | Tensor  # (n_units, 2): row and column of each unit
ONLY = "sheet"  # name of the sheet whose positions came without one
Distance = Literal["l2", "l1", "linf"]


class SpatialLoss(nn.Module):
    """Pull units that lie close together on a sheet towards firing together, in any model.

    In a neighbourhood r are the Pearson correlations between its units over all tokens of the call, and
    d = 1 / (1 + distance) over the same pairs; its loss is (1 - corr(r, d)) / 2: 0 if correlation follows
    nearness, 0.5 for independent units (Rathi et al. 2025, equations 1-2; arXiv 2410.11516). TopoLM adds 2.5
    times the sum over its sheets to the cross-entropy; the mean over sheets is returned here, as it does not
    depend on their number.

    Args:
        positions: sheet -> (n_units, 2), row and column of each unit on its grid; an array for one sheet
            alone. Grids need be neither square nor equal, but every cell must hold one unit.
        radius: a neighbourhood is the units at linf distance < radius of a centre, in cells: 5 means 9x9.
        neighbourhoods: how many random ones per sheet and call; 0 = all there are.
        seed: of the random neighbourhoods.
        distance: between units, in cells: l2, l1 or linf.

    Raises:
        ValueError: in one line, which sheet or argument is wrong.
    """

    def __init__(
        self,
        positions: Mapping[str, Positions] | Positions,
        radius: int = 5,
        neighbourhoods: int = 5,
        seed: int = 0,
        distance: Distance = "l2",
    ) -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise ValueError(f"distance = {distance!r} must be one of {', '.join(get_args(Distance))}")
        try:
            cfg = TopoConfig(radius=radius, neighbourhoods=neighbourhoods, distance=distance)
        except UserError as error:
            raise ValueError(str(error).removeprefix("topo.")) from None
        maps = positions if isinstance(positions, Mapping) else {ONLY: positions}
        if not maps:
            raise ValueError("positions are of no sheet; give sheet -> (n_units, 2)")
        grids: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        for sheet, given in maps.items():
            position = checked(sheet, given, radius)
            grids.setdefault(topo.grid_of(position), {})[sheet] = position
        self.sheets, self.seed, self.calls = list(maps), seed, 0
        self.by_grid = nn.ModuleList(TopoLMLoss(cfg, of_grid) for of_grid in grids.values())

    def forward(
        self, activations: Mapping[str, Tensor] | Tensor, *, step: int | None = None, reduce: bool = True
    ) -> Tensor:
        """Loss of a batch: a scalar of at least float32, the mean over sheets.

        Statistics are float32 or wider, under autocast too. Each call draws other neighbourhoods, a pure
        function of seed and the number of calls before it, which is part of state_dict(); on other ranks
        they are the same.

        Args:
            activations: sheet -> (..., n_units) of any float dtype, such as (B, T, n_units); sheets without
                positions are left alone. A tensor where there is one sheet. All leading axes are samples.
            step: draw the neighbourhoods of this step, whatever the number of calls, and count none.
            reduce: False: the loss of each sheet, (S,), in the order of the positions.

        Raises:
            ValueError: a sheet is missing, has another number of units, or fewer than two tokens.
        """
        if isinstance(activations, Tensor) and len(self.sheets) == 1:
            activations = {self.sheets[0]: activations}
        self.check(activations)
        device = activations[self.sheets[0]].device
        found: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            for i, loss in enumerate(self.by_grid):
                loss.to(device)
                chosen = loss.choose(self.seed, self.calls if step is None else step, i)
                found |= zip(loss.sheets, loss(activations, chosen), strict=True)
        if step is None:
            self.calls += 1
        losses = torch.stack([found[sheet] for sheet in self.sheets])
        return losses.mean() if reduce else losses

    def check(self, activations: Mapping[str, Tensor] | Tensor) -> None:
        if not isinstance(activations, Mapping):
            there = ", ".join(self.sheets)
            raise ValueError(
                f"activations are a {type(activations).__name__}; give sheet -> tensor of {there}"
            )
        for loss in self.by_grid:
            for sheet, position in loss.positions.items():
                if sheet not in activations:
                    there = ", ".join(activations) or "none"
                    raise ValueError(f"activations of sheet {sheet!r} are missing; there are: {there}")
                x, n_units = activations[sheet], len(position)
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    what = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
                    raise ValueError(f"activations of sheet {sheet!r} are {what}, not a tensor of floats")
                shape = f"activations of sheet {sheet!r} have shape {tuple(x.shape)}"
                if x.dim() < 2 or x.shape[-1] != n_units:
                    raise ValueError(f"{shape}, not (..., {n_units})")
                if x.numel() < 2 * n_units:
                    raise ValueError(f"{shape}, so one token or none; correlations need two or more")

    def get_extra_state(self) -> Tensor:
        """The number of calls, in state_dict: a tensor, as safetensors knows nothing else."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)

    def extra_repr(self) -> str:
        return f"{len(self.sheets)} sheets, seed={self.seed}, calls={self.calls}"


def checked(sheet: str, given: Positions, radius: int) -> np.ndarray:
    """Positions of a sheet as (n_units, 2) int64, if they fill a rectangle that holds a neighbourhood."""
    position = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if position.ndim != 2 or position.shape[1] != 2 or not len(position):
        raise ValueError(f"positions of sheet {sheet!r} have shape {position.shape}, not (n_units, 2)")
    whole = position.astype(np.int64)
    if not np.array_equal(whole, position):
        raise ValueError(f"positions of sheet {sheet!r} must be whole numbers, row and column of a cell")
    try:
        topo.units_by_cell(whole)
        topo.neighbourhood_cells(*topo.grid_of(whole), radius)
    except ValueError as error:
        raise ValueError(f"sheet {sheet!r}: {error}") from None
    return whole
