"""What blocks are made of, and how one is saved with what its forward passes have left behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hamdist.dynamics.state.finite import Guard, Scale
from hamdist.dynamics.state.remember import Remembers, taken
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autograd import LocalFunction


@dataclass(slots=True)
class BlockParts:
    """What all kinds of blocks are made of.

    Attributes:
        wanted: By parent, whether it gets messages.
        scale: Of beta, by sample.
    """

    cell: LocalFunction
    weights: Weights
    wanted: Sequence[bool]
    dynamics: Dynamics
    scale: Scale
    guard: Guard


class Block(Remembers):
    """A block or an output net: its cell, its weights, and what decides their steps."""

    def __init__(self, parts: BlockParts) -> None:
        self.cell = parts.cell
        self.weights = parts.weights
        self._wanted = list(parts.wanted)
        self._dynamics = parts.dynamics
        self._c = parts.dynamics.c
        self._scale = parts.scale
        self._guard = parts.guard


class SavesPasses(Block, ABC):
    """A block that keeps records of its cell, which are saved beside its STATE (of which `cell` is
    one) under the name RECORDS."""

    RECORDS: ClassVar[str] = "trace"

    @abstractmethod
    def held(self) -> Any:
        """The records as plain data (`LocalFunction.held`)."""

    @abstractmethod
    def rebuild(self, records: Any) -> None:
        """Takes what `held` has given (`LocalFunction.rebuilt`); all else is restored already."""

    def snapshot(self) -> dict[str, Any]:
        """The state, in tensors that may go on changing: `packed` copies them."""
        return {**super().snapshot(), self.RECORDS: self.held()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises SnapshotError where it is another class's."""
        records, own = taken(state, self.RECORDS)
        super().restore(own)
        self.rebuild(records)
        # Once more: rebuilding runs the module, which moves its buffers and random numbers.
        self.cell.restore(own["cell"])
