"""A user's own level: what has to hold of its schedule, and of runs at it, in float64."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from hamdist.config import EngineKind, EngineSettings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.train.prepare import level_fields, make_level
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.networks import chain
from hamdist.study.verify.topics.engines import ACTORS, IN_PROCESS, difference
from hamdist.study.verify.topics.rule import RAY, VerifiedRule

CALLS = 9  # of a layer in an actor, after which that is killed
_calls: list[int] = []  # of this process


class Dying(nn.Module):
    """Passes on its input; kills its process in call CALLS, if it is not `driver`, once."""

    def __init__(self, mark: Path, driver: int) -> None:
        super().__init__()
        self._mark, self._driver = mark, driver

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != self._driver and not self._mark.exists():
            _calls.append(1)
            if len(_calls) == CALLS:
                self._mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return x


class VerifiedLevel(VerifiedRule):
    """The checks of the level that FILE.py:NAME names. Raises SettingsError."""

    def __init__(self, name: str) -> None:
        self._own = make_level("--level", name)
        self._level, self._named = level_fields("--level", name), {}
        self._held, self._ticks, self._length, self._model = False, 1, None, chain

    def checks(self) -> Generator[Check, None, None]:
        """Yield the checks; some start Ray."""
        for blocks, table in self._own.tables.items():
            what = f"its table of {blocks} block(s)"
            yield Check(what, "the one drawn by hand", 0.0, partial(self._table, blocks, table))
        what = "every signal comes before it is used, over skips and delays, too"
        yield Check(what, "its events", 0.0, lambda: float(not self._own.table(skips(), 1)))
        with ray_session(EngineSettings(kind=EngineKind.RAY, actors=ACTORS)):
            yield Check(f"on {ACTORS} Ray actors", IN_PROCESS, 0.0, self._apart)
            yield Check("there, an actor is killed", IN_PROCESS, 0.0, self._killed)
        yield Check("a run goes on from a snapshot", IN_PROCESS, 0.0, self._resumed)
        yield Check("1 - cosine of its updates, at most 2", "backpropagation", 2.0, self._cosine)

    def _table(self, blocks: int, table: str) -> Difference:
        wrong = difference_of_tables(self._own, chain_of(blocks), table)
        return Difference(0.0 if wrong is None else 1.0, wrong or "")

    def _killed(self) -> Difference:
        with TemporaryDirectory() as folder:
            mark = Path(folder, "mark")
            self._model = lambda: _with(Dying(mark, os.getpid()))
            try:
                snapshots = {"path": f"{folder}/kept", "every": 5}
                lost = self._run(engine=RAY, snapshots=snapshots)
                apart = difference(self._run(), lost)
            finally:
                self._model = chain
        return apart if lost.replaced else Difference(float("inf"), "no process was lost")


def _with(layer: nn.Module) -> nn.Sequential:
    """Return the chain with another layer behind its first one."""
    layers = [*chain()]
    return nn.Sequential(layers[0], layer, *layers[1:])


def chain_of(blocks: int) -> Graph:
    """Return a chain of blocks `block0`, ... that compute nothing."""
    return _bare({f"block{i}": {f"block{i - 1}" if i else "u": 1} for i in range(blocks)})


def skips() -> Graph:
    """Return a graph with a skip and an edge of 3 ticks."""
    return _bare({"a": {"u": 1}, "b": {"a": 3}, "c": {"a": 1, "b": 1}, "d": {"c": 1, "u": 1}})


def _bare(parents: dict[str, dict[str, int]]) -> Graph:
    last = [*parents][-1]
    return Graph(
        BlockSpec(
            name,
            nn.Identity(),
            tuple(edges),
            delays=edges,
            loss=cross_entropy if name == last else None,
        )
        for name, edges in parents.items()
    )


def difference_of_tables(level: OwnLevel, graph: Graph, table: str) -> str | None:
    """Return the first row in which a level's table differs from one that was drawn by hand."""
    expected = [_cells(line) for line in table.splitlines() if line.strip()]
    made = [_cells(line) for line in level.table(graph, len(expected) - 1).splitlines()]
    for left, right in zip(made[1:], expected[1:], strict=True):
        if left != right:
            return f"{' | '.join(left)}, by hand {' | '.join(right)}"
    return None


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
