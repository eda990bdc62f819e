"""The memory that a block has of its own, counted from its tensors."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class BlockMemory(NamedTuple):
    """Bytes that a block has of its own: of its tensors, each memory once.

    Not counted are what the allocator and Python add, buffers that steps use again, and signals
    under way.

    Attributes:
        weights: its parameters and buffers.
        state: what else lies in it at the end of the run: omega and the optimiser's moments,
            statistics, averages, a second version of the weights, h and z.
        samples: what it keeps of a sample between its two passes (its inputs, and what the
            products need; of the first sample that came), times the most samples (micro-batches,
            tokens) of which it kept that at once. None where the module is code of the user's that
            hamdist does not look into.
    """

    weights: int
    state: int
    samples: int | None

    @property
    def total(self) -> int | None:
        """Return all bytes together; None where a part is not known."""
        return None if self.samples is None else self.weights + self.state + self.samples


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, mappings and data classes."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])
    elif isinstance(value, (Mapping, list, tuple, deque)):
        for element in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(element)


def storages_of(value: Any) -> set[int]:
    """Return the addresses of the memory of all tensors in `value`."""
    return {t.untyped_storage().data_ptr() for t in tensors_in(value)}


def bytes_of(value: Any, apart: Collection[int] = ()) -> int:
    """Return the bytes of the tensors in `value`, each memory once; of a view its own part.

    apart: addresses of memory that does not count.
    """
    views: dict[int, dict[tuple[Any, ...], int]] = {}
    whole: dict[int, int] = {}
    for tensor in tensors_in(value):
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in apart:
            whole[address] = storage.nbytes()
            key = tensor.data_ptr(), tensor.shape
            views.setdefault(address, {})[key] = tensor.nbytes
    return sum(min(whole[address], sum(of.values())) for address, of in views.items())
