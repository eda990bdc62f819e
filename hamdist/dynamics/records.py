"""Saving a block together with what its forward passes have left behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from hamdist.dynamics.cell import Cell
from hamdist.dynamics.saving import Remembers, taken


class KeepsRecords(Remembers, ABC):
    """A block that keeps records of its cell, which are saved beside its STATE (of which `cell` is
    one) under the name RECORDS."""

    RECORDS: ClassVar[str] = "trace"

    cell: Cell

    @abstractmethod
    def held(self) -> Any:
        """The records as plain data (`Cell.held`)."""

    @abstractmethod
    def rebuild(self, records: Any) -> None:
        """Takes what `held` has given (`Cell.rebuilt`); all else is restored already."""

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
