"""Several passes over a source of samples, with the number of the epoch set before each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from hamdist.errors import StreamError
from hamdist.streams.sample import Sample

AGAIN = "an iterable that can be read again (a list, a DataLoader, a class with __iter__)"


class Epochs:
    """Repeats `source`; epochs: number of passes, None for no end."""

    def __init__(self, source: Iterable[Any], epochs: int | None) -> None:
        if isinstance(source, Iterator):
            raise StreamError(
                f"epochs={epochs}: an iterator ({type(source).__name__}) can be read once: give "
                f"{AGAIN}"
            )
        self._source = source
        self._epochs = epochs

    def __iter__(self) -> Iterator[Any]:
        for epoch in count() if self._epochs is None else range(self._epochs):
            for set_epoch in epoch_setters(self._source):
                set_epoch(epoch)
            empty = True
            for sample in self._source:
                empty = False
                yield sample
            if empty:
                return  # what is empty now would be so without end


def epoch_setters(source: Any) -> list[Callable[[int], object]]:
    """Return `set_epoch` of a loader, its data set, sampler and batch sampler, each once."""
    batches = getattr(source, "batch_sampler", None)
    samplers = (getattr(source, "sampler", None), batches, getattr(batches, "sampler", None))
    parts = {id(part): part for part in (source, getattr(source, "dataset", None), *samplers)}
    setters = [getattr(part, "set_epoch", None) for part in parts.values()]
    return [setter for setter in setters if callable(setter)]


def is_ragged(source: Any) -> bool:
    """Return True if the samples of a source may have lengths of their own.

    The samples of a list are compared; a loader that collates in its own way may pad each batch to
    its longest row.
    """
    if isinstance(source, (list, tuple)):
        shapes = iter(source)
        first = _shapes(next(shapes, None))
        return any(_shapes(sample) != first for sample in shapes)
    collate = getattr(source, "collate_fn", default_collate)
    return collate not in (default_collate, default_convert)


def _shapes(sample: Any) -> list[tuple[int, ...]]:
    """Return the shapes behind the batch of the tensors in a sample, missing ones left out."""
    if isinstance(sample, (Tensor, np.ndarray)):
        return [] if getattr(sample, "is_nested", False) else [tuple(sample.shape[1:])]
    if isinstance(sample, Sample):
        sample = (sample.u if sample.inputs is None else sample.inputs,)
    if isinstance(sample, Mapping):
        sample = list(sample.values())
    if isinstance(sample, (tuple, list)):
        return [shape for part in sample[:1] for shape in _shapes(part)]
    return []
