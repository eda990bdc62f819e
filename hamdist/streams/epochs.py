"""A source of items gone through several times, each time told which epoch begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

from hamdist.errors import StreamError

AGAIN = "an iterable that can be read again (a list, a DataLoader, a class with __iter__)"


class Epochs:
    """`source` again and again; epochs: how often, None for no end."""

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
            for item in self._source:
                empty = False
                yield item
            if empty:
                return  # what is empty now would be so without end


def epoch_setters(source: Any) -> list[Callable[[int], object]]:
    """Finds `set_epoch` of a loader, its data set, sampler and batch sampler: each once."""
    batches = getattr(source, "batch_sampler", None)
    samplers = (getattr(source, "sampler", None), batches, getattr(batches, "sampler", None))
    parts = {id(part): part for part in (source, getattr(source, "dataset", None), *samplers)}
    setters = [getattr(part, "set_epoch", None) for part in parts.values()]
    return [setter for setter in setters if callable(setter)]
