"""A user's own level: what has to hold of its schedule, and of runs at it, as of a rule."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Updates
from hamdist.runtime.train.prepare import level_fields, make_level
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.topics.rule import VerifiedRule

SKIPS = {"a": {"u": 1}, "b": {"a": 3}, "c": {"a": 1, "b": 1}, "d": {"c": 1, "u": 1}}


class PlainMessages(Rule):
    """Backpropagation, as a rule that a check can interrupt."""

    on_readout = True

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        return block.vjp(kept, message)


class VerifiedLevel(VerifiedRule):
    """The checks of the level that FILE.py:NAME names. Raises SettingsError."""

    def __init__(self, name: str) -> None:
        self.own_level = make_level("--level", name)
        heads = self.own_level.base == "heads"
        super().__init__("mono-forward" if heads else f"{__name__}:{PlainMessages.__name__}")
        self._level = level_fields("--level", name)

    def checks(self) -> Generator[Check, None, None]:
        """Yield the checks; some start Ray."""
        for blocks, drawn in self.own_level.tables.items():
            table = partial(self.table, blocks, drawn)
            yield Check(f"its table of {blocks} block(s)", "the one drawn by hand", 0.0, table)
        what = "every signal comes before it is used, over skips and delays, too"
        yield Check(what, "its events", 0.0, lambda: float(not self._own_table(SKIPS, 1)))
        yield from super().checks()

    def table(self, blocks: int, drawn: str) -> Difference:
        """Return 1 and the first row that is another one than in a chain's table drawn by hand."""
        by_hand = [_cells(line) for line in drawn.splitlines() if line.strip()]
        chain = {f"block{i}": {f"block{i - 1}" if i else "u": 1} for i in range(blocks)}
        rows = [_cells(line) for line in self._own_table(chain, len(by_hand) - 1).splitlines()]
        for row, expected in zip(rows[1:], by_hand[1:], strict=True):
            if row != expected:
                return Difference(1.0, f"{' | '.join(row)}, by hand {' | '.join(expected)}")
        return Difference(0.0, "")

    def _own_table(self, parents: Mapping[str, Mapping[str, int]], ticks: int) -> str:
        """Return the level's table of a graph: delays by parent of each block."""
        losses = {[*parents][-1]: cross_entropy}
        blocks = [
            BlockSpec(name, nn.Identity(), tuple(into), delays=into, loss=losses.get(name))
            for name, into in parents.items()
        ]
        return self.own_level.table(Graph(blocks), ticks)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
