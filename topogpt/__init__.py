"""TopoGPT: GPTs whose units lie on a two-dimensional sheet. In a notebook:

    run = topogpt.load("out/demo")                          # a run, an exported folder, USER/NAME
    maps = topogpt.activations(run, ["The cortex is a sheet."])          # sheet -> (tokens, height, width)
    topogpt.SpatialLoss(positions)(activations)                          # TopoLM's loss on anybody's model
    topogpt.TopoLoss([topogpt.LaplacianPyramid("fc", 8.0, 8.0)]).compute(model)                   # TopoNets'

Importing it takes neither torch nor numpy: a name's module is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; HOME says the same to Python
    from topogpt.analysis.measures import smooth
    from topogpt.analysis.notebook import Run, activations, draw, lesion, load, morans_i_floor
    from topogpt.errors import UserError
    from topogpt.model.gpt import GPT
    from topogpt.settings import GPTConfig
    from topogpt.spatial.standalone import SpatialLoss
    from topogpt.spatial.topoloss import (
        ChainedTauScheduler,
        LaplacianPyramid,
        LaplacianPyramidOnBias,
        LaplacianPyramidOnInput,
        TauScheduler,
        TopoLoss,
    )
    from topogpt.topo import grid_shape, morans_i, on_grid, positions
    from topogpt.topography import Topography, load_topography

__version__ = "0.1.0"
__all__ = [
    "ChainedTauScheduler",
    "GPT",
    "GPTConfig",
    "LaplacianPyramid",
    "LaplacianPyramidOnBias",
    "LaplacianPyramidOnInput",
    "Run",
    "SpatialLoss",
    "TauScheduler",
    "TopoLoss",
    "Topography",
    "UserError",
    "__version__",
    "activations",
    "draw",
    "grid_shape",
    "lesion",
    "load",
    "load_topography",
    "morans_i",
    "morans_i_floor",
    "on_grid",
    "positions",
    "smooth",
]

HOME = {
    "analysis.measures": "smooth",
    "analysis.notebook": "Run activations draw lesion load morans_i_floor",
    "errors": "UserError",
    "model.gpt": "GPT",
    "settings": "GPTConfig",
    "spatial.standalone": "SpatialLoss",
    "spatial.topoloss": "ChainedTauScheduler LaplacianPyramid LaplacianPyramidOnBias LaplacianPyramidOnInput "
    "TauScheduler TopoLoss",
    "topo": "grid_shape morans_i on_grid positions",
    "topography": "Topography load_topography",
}


if not TYPE_CHECKING:  # or every name would be one to a type checker

    def __getattr__(name: str) -> object:
        for module, names in HOME.items():
            if name in names.split():
                found = globals()[name] = getattr(import_module(f"topogpt.{module}"), name)
                return found
        raise AttributeError(f"module 'topogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
