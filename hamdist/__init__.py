"""hamdist: distributed local learning over time.

A network is a graph of blocks that exchange only neighbour signals: the state h forward, a
vector-Jacobian product of the costate z backward, at a finite speed. One setting, the level, moves
a run from fully local to exactly backpropagation.

The public names are loaded when they are first used: `hamdist --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hamdist import streams
    from hamdist.api import train
    from hamdist.config import Level, Settings
    from hamdist.dynamics.cuts import CutPlace
    from hamdist.dynamics.graph import BlockSpec, Combine, Graph
    from hamdist.dynamics.recurrent import Reads, RecurrentCell
    from hamdist.dynamics.reversible import (
        Coupling,
        MeanHalf,
        Midpoint,
        MidpointStart,
        SecondHalf,
        Squeeze,
        ToPair,
    )
    from hamdist.dynamics.stabilise import Normed, PreNorm, stabilised
    from hamdist.errors import HamdistError, Stop
    from hamdist.runtime.cluster import session
    from hamdist.runtime.result import RunResult

__all__ = [
    "BlockSpec",
    "Combine",
    "Coupling",
    "CutPlace",
    "Graph",
    "HamdistError",
    "Level",
    "MeanHalf",
    "Midpoint",
    "MidpointStart",
    "Normed",
    "PreNorm",
    "Reads",
    "RecurrentCell",
    "RunResult",
    "SecondHalf",
    "Settings",
    "Squeeze",
    "Stop",
    "ToPair",
    "session",
    "stabilised",
    "streams",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "BlockSpec": "hamdist.dynamics.graph",
    "Combine": "hamdist.dynamics.graph",
    "Coupling": "hamdist.dynamics.reversible",
    "CutPlace": "hamdist.dynamics.cuts",
    "Graph": "hamdist.dynamics.graph",
    "HamdistError": "hamdist.errors",
    "Level": "hamdist.config",
    "MeanHalf": "hamdist.dynamics.reversible",
    "Midpoint": "hamdist.dynamics.reversible",
    "MidpointStart": "hamdist.dynamics.reversible",
    "Normed": "hamdist.dynamics.stabilise",
    "PreNorm": "hamdist.dynamics.stabilise",
    "Reads": "hamdist.dynamics.recurrent",
    "RecurrentCell": "hamdist.dynamics.recurrent",
    "RunResult": "hamdist.runtime.result",
    "SecondHalf": "hamdist.dynamics.reversible",
    "Settings": "hamdist.config",
    "Squeeze": "hamdist.dynamics.reversible",
    "Stop": "hamdist.errors",
    "ToPair": "hamdist.dynamics.reversible",
    "session": "hamdist.runtime.cluster",
    "stabilised": "hamdist.dynamics.stabilise",
    "train": "hamdist.api",
}


def __getattr__(name: str) -> Any:
    if name == "streams":
        return import_module("hamdist.streams")
    if name not in _HOMES:
        raise AttributeError(f"module 'hamdist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
