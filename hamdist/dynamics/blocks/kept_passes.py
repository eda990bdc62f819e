"""The parts common to all blocks, and snapshots of blocks with records of forward passes."""

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
    """The parts of all kinds of blocks.

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
    """A block or an output net: its local function, weights, and the settings of their steps."""

    def __init__(self, parts: BlockParts) -> None:
        self.cell = parts.cell
        self.weights = parts.weights
        self._wanted = list(parts.wanted)
        self._dynamics = parts.dynamics
        self._c = parts.dynamics.c
        self._scale = parts.scale
        self._guard = parts.guard


class SavesPasses(Block, ABC):
    """A block that keeps records of forward passes, saved under RECORDS beside its STATE.

    `cell` is one of STATE.
    """

    RECORDS: ClassVar[str] = "trace"

    @abstractmethod
    def held(self) -> Any:
        """Return the records as plain data (`LocalFunction.held`)."""

    @abstractmethod
    def rebuild(self, records: Any) -> None:
        """Set the records from the data of `held`, after everything else has been restored."""

    def snapshot(self) -> dict[str, Any]:
        """Return the state, in tensors that later steps may overwrite: `packed` copies them."""
        return {**super().snapshot(), self.RECORDS: self.held()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raise SnapshotError where it is that of another class."""
        records, own = taken(state, self.RECORDS)
        super().restore(own)
        self.rebuild(records)
        # Once more: rebuilding runs the module, which moves its buffers and random numbers.
        self.cell.restore(own["cell"])
