"""hamdist: distributed local learning over time.

A network is a graph of blocks that exchange only neighbour signals: the state h forward, a
vector-Jacobian product of the costate z backward, at a finite speed. One setting, the level, moves
a run from fully local to exactly backpropagation.

The public names are loaded when they are first used: `hamdist --help` need not wait for torch.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hamdist import streams as streams
    from hamdist.api import replay as replay
    from hamdist.api import start as start
    from hamdist.api import train as train
    from hamdist.attached import attach as attach
    from hamdist.config import Level as Level
    from hamdist.config import Settings as Settings
    from hamdist.dynamics.graph.graph import BlockSpec as BlockSpec
    from hamdist.dynamics.graph.graph import Combine as Combine
    from hamdist.dynamics.graph.graph import Graph as Graph
    from hamdist.dynamics.modules.pairs import MeanHalf as MeanHalf
    from hamdist.dynamics.modules.pairs import SecondHalf as SecondHalf
    from hamdist.dynamics.modules.pairs import ToPair as ToPair
    from hamdist.dynamics.modules.prenorm import Normed as Normed
    from hamdist.dynamics.modules.prenorm import PreNorm as PreNorm
    from hamdist.dynamics.modules.prenorm import stabilised as stabilised
    from hamdist.dynamics.modules.recurrent import DiagonalCell as DiagonalCell
    from hamdist.dynamics.modules.recurrent import LeakyCell as LeakyCell
    from hamdist.dynamics.modules.recurrent import Reads as Reads
    from hamdist.dynamics.modules.recurrent import RecurrentCell as RecurrentCell
    from hamdist.dynamics.modules.reversible import Coupling as Coupling
    from hamdist.dynamics.modules.reversible import Midpoint as Midpoint
    from hamdist.dynamics.modules.reversible import MidpointStart as MidpointStart
    from hamdist.dynamics.modules.reversible import Squeeze as Squeeze
    from hamdist.dynamics.modules.subspace import Subspace as Subspace
    from hamdist.dynamics.partition.cuts import CutPlace as CutPlace
    from hamdist.dynamics.partition.split import traced as traced
    from hamdist.dynamics.rules.rule import BlockView as BlockView
    from hamdist.dynamics.rules.rule import Rule as Rule
    from hamdist.dynamics.rules.rule import Signals as Signals
    from hamdist.dynamics.schedule.rounds import OwnLevel as OwnLevel
    from hamdist.errors import HamdistError as HamdistError
    from hamdist.errors import Stop as Stop
    from hamdist.errors import TakeSnapshot as TakeSnapshot
    from hamdist.runtime.live.callbacks import BestWeights as BestWeights
    from hamdist.runtime.live.callbacks import Callback as Callback
    from hamdist.runtime.live.callbacks import EarlyStopping as EarlyStopping
    from hamdist.runtime.live.callbacks import Evaluation as Evaluation
    from hamdist.runtime.ray_engine.session import session as session
    from hamdist.runtime.results.result import RunResult as RunResult
    from hamdist.study.interface.compare import compare as compare
    from hamdist.study.interface.study import study as study
    from hamdist.study.interface.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {  # the names of `__all__` by module; above, for type checkers, once more
    "hamdist.api": "replay start train",
    "hamdist.attached": "attach",
    "hamdist.config": "Level Settings",
    "hamdist.dynamics.partition.cuts": "CutPlace",
    "hamdist.dynamics.partition.split": "traced",
    "hamdist.dynamics.graph.graph": "BlockSpec Combine Graph",
    "hamdist.dynamics.modules.recurrent": "DiagonalCell LeakyCell Reads RecurrentCell",
    "hamdist.dynamics.modules.pairs": "MeanHalf SecondHalf ToPair",
    "hamdist.dynamics.modules.reversible": "Coupling Midpoint MidpointStart Squeeze",
    "hamdist.dynamics.modules.prenorm": "Normed PreNorm stabilised",
    "hamdist.dynamics.modules.subspace": "Subspace",
    "hamdist.dynamics.rules.rule": "BlockView Rule Signals",
    "hamdist.dynamics.schedule.rounds": "OwnLevel",
    "hamdist.errors": "HamdistError Stop TakeSnapshot",
    "hamdist.runtime.live.callbacks": "BestWeights Callback EarlyStopping Evaluation",
    "hamdist.runtime.ray_engine.session": "session",
    "hamdist.runtime.results.result": "RunResult",
    "hamdist.study.interface.compare": "compare",
    "hamdist.study.interface.study": "study",
    "hamdist.study.interface.verify": "verify",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted([*_HOME, "streams"])


def __getattr__(name: str) -> Any:
    if name == "streams":
        return import_module("hamdist.streams")
    if name not in _HOME:
        raise AttributeError(f"module 'hamdist' has no attribute {name!r}")
    before = random.getstate()
    home = import_module(_HOME[name])
    random.setstate(before)  # (packages draw numbers when they are imported: rich does)
    return globals().get(name) or getattr(home, name)  # (`study`: the package, which can be called)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
