"""What type checkers and editors know of `import topogpt`; HOME in __init__.py says the same to Python."""

from topogpt.analysis.measures import smooth as smooth
from topogpt.analysis.notebook import Run as Run
from topogpt.analysis.notebook import activations as activations
from topogpt.analysis.notebook import draw as draw
from topogpt.analysis.notebook import lesion as lesion
from topogpt.analysis.notebook import load as load
from topogpt.analysis.notebook import morans_i_floor as morans_i_floor
from topogpt.errors import UserError as UserError
from topogpt.model.gpt import GPT as GPT
from topogpt.settings import GPTConfig as GPTConfig
from topogpt.spatial.standalone import SpatialLoss as SpatialLoss
from topogpt.spatial.topoloss import ChainedTauScheduler as ChainedTauScheduler
from topogpt.spatial.topoloss import LaplacianPyramid as LaplacianPyramid
from topogpt.spatial.topoloss import LaplacianPyramidOnBias as LaplacianPyramidOnBias
from topogpt.spatial.topoloss import LaplacianPyramidOnInput as LaplacianPyramidOnInput
from topogpt.spatial.topoloss import TauScheduler as TauScheduler
from topogpt.spatial.topoloss import TopoLoss as TopoLoss
from topogpt.topo import grid_shape as grid_shape
from topogpt.topo import morans_i as morans_i
from topogpt.topo import on_grid as on_grid
from topogpt.topo import positions as positions
from topogpt.topography import Topography as Topography
from topogpt.topography import load_topography as load_topography

__version__: str
