"""What a stream yields, and what a stream is.

B: batch, O: outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One item (u, y) of a stream; a batch counts as one item.

    u: (B, ...) the input. y: (B,) classes or (B, O) values, or None where the target is missing.
    end: the item is the last one of its sequence. time: its time stamp in seconds, if it has one.
    """

    u: Tensor
    y: Tensor | None = None
    end: bool = False
    time: float | None = None


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Shapes and types that every item of a stream has (shapes with the batch in front).

    classes: number of classes, for targets that are class indices; None for real-valued targets.
    """

    u_shape: tuple[int, ...]
    u_dtype: torch.dtype
    y_shape: tuple[int, ...]
    y_dtype: torch.dtype
    classes: int | None = None

    @property
    def batch(self) -> int:
        return self.u_shape[0]


@runtime_checkable
class Stream(Protocol):
    """An ordered, possibly endless source of samples.

    `samples()` starts at item 0. A portable stream can be sent to another process (pickled by Ray)
    and yields the same items there, as often as it is asked; one that is not portable (a plain
    iterator, a DataLoader) stays in the driver's process and may be asked only once.
    """

    portable: bool

    @property
    def spec(self) -> SampleSpec: ...

    def samples(self) -> Iterator[Sample]: ...
