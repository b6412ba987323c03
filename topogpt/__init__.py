"""TopoGPT: GPTs whose units lie on a two-dimensional sheet. In a notebook:

    run = topogpt.load("out/demo")                          # a run, an exported folder, USER/NAME
    maps = topogpt.activations(run, ["The cortex is a sheet."])          # sheet -> (tokens, height, width)
    topogpt.SpatialLoss(positions)(activations)                          # TopoLM's loss on anybody's model
    topogpt.TopoLoss([topogpt.LaplacianPyramid("fc", 8.0, 8.0)]).compute(model)                   # TopoNets'

Importing it takes neither torch nor numpy: a name's module is imported when the name is first used.
"""

import os
import signal
import sys
from importlib import import_module

__version__ = "0.1.0"

# Where each name lives; __init__.pyi says the same to type checkers.
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
__all__ = sorted(["__version__", *" ".join(HOME.values()).split()])


def end_at_once_while_importing() -> None:
    """Let Ctrl-C end a script of this folder without a traceback until errors.user_errors takes it over."""
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    root, started = (os.path.dirname(os.path.realpath(path)) for path in (os.path.dirname(__file__), script))
    ours = script and os.path.relpath(started, root).split(os.sep)[0] in (".", "evals", "bench")
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


end_at_once_while_importing()


def __getattr__(name: str) -> object:
    for module, names in HOME.items():
        if name in names.split():
            found = globals()[name] = getattr(import_module(f"topogpt.{module}"), name)
            return found
    raise AttributeError(f"module 'topogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
