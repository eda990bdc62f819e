"""What blocks are made of, and how one is saved with what its forward passes have left behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hamdist.dynamics.state.finite import Guard, Scale
from hamdist.dynamics.state.remember import Remembers, taken
from hamdist.dynamics.updates.accumulate import GradientSum
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autograd import LocalFunction
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient

SUM = "gradients"  # its name in a snapshot, beside STATE


@dataclass(slots=True)
class BlockParts:
    """What all kinds of blocks are made of.

    Attributes:
        wanted: By parent, whether it gets messages.
        scale: Of beta, by sample.
        microbatches: Into how many a batch is cut.
    """

    cell: LocalFunction
    weights: Weights
    wanted: Sequence[bool]
    dynamics: Dynamics
    scale: Scale
    guard: Guard
    microbatches: int = 1


class Block(Remembers):
    """A block or an output net: its cell, its weights, and what decides their steps.

    With micro-batches a pass has the number of a pulse (schedule/microbatches.py), and the weights
    move once an item, by the sum of what its pulses have brought.
    """

    def __init__(self, parts: BlockParts) -> None:
        self.cell = parts.cell
        self.weights = parts.weights
        self._wanted = list(parts.wanted)
        self._dynamics = parts.dynamics
        self._c = parts.dynamics.c
        self._scale = parts.scale
        self._guard = parts.guard
        self._parts = parts.microbatches
        self._sum = GradientSum() if self._parts > 1 else None

    def snapshot(self) -> dict[str, Any]:
        """The state, in tensors that may go on changing: `packed` copies them."""
        state = super().snapshot()
        return state if self._sum is None else {**state, SUM: self._sum.snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises SnapshotError where it is another class's."""
        if self._sum is not None:
            found, state = taken(state, SUM)
            self._sum.restore(found)
        super().restore(state)

    def at_once(self, sample: int, tau: float) -> AtOnce | None:
        """Returns what the cell may do with the gradients of a pass before `learn_from` gets them
        (`Weights.at_once`)."""
        if self._sum is not None:
            return None
        return self.weights.at_once(self._scale(sample), tau)

    def learn_from(self, sample: int, g: Sequence[Gradient] | None, tau: float) -> None:
        """Takes the gradients of one pass (None: no message came), and moves the weights by what
        the passes of the item have brought, where this is the last."""
        if self._sum is not None:
            if g is not None:
                self._sum.add(g)
            sample, part = divmod(sample, self._parts)
            if part < self._parts - 1:
                return
            g = self._sum.take()
        if g is None:
            self.weights.rest()
        else:
            self.weights.move(g, self._scale(sample), tau)


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
