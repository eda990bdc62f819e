"""Numbers of a traced model that follow the batch or the lengths of a sample. B: batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Length:
    """A dimension of an input, which may differ from sample to sample; base: that of the
    example."""

    name: str
    axis: int
    base: int


@dataclass(frozen=True, slots=True)
class SymbolicSize:
    """per * B + more, plus (a + b * B) times a length, for each (length, a, b)."""

    per: int
    more: int = 0
    lengths: tuple[tuple[Length, int, int], ...] = ()

    @property
    def batched(self) -> bool:
        """Return True if it depends on the batch."""
        return self.per != 0 or any(b for _, _, b in self.lengths)

    @property
    def by_row(self) -> int:
        """Return the number per row of the example, or the number if no batch is in it."""
        if self.batched:
            return self.per + sum(b * one.base for one, _, b in self.lengths)
        return self.more + sum(a * one.base for one, a, _ in self.lengths)


@dataclass(frozen=True, slots=True)
class DeviceRef:
    """The device on which the module runs."""
