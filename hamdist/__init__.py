"""hamdist: distributed local learning over time.

A network is a graph of blocks that exchange only neighbour signals: the state h forward, a
vector-Jacobian product of the costate z backward, at a finite speed. One setting, the level, moves
a run from fully local to exactly backpropagation.
"""

from hamdist import streams
from hamdist.api import train
from hamdist.config import Level, Settings
from hamdist.dynamics.graph import BlockSpec, Combine, Graph
from hamdist.errors import HamdistError
from hamdist.runtime.result import RunResult

__all__ = [
    "BlockSpec",
    "Combine",
    "Graph",
    "HamdistError",
    "Level",
    "RunResult",
    "Settings",
    "streams",
    "train",
]
__version__ = "0.1.0"
