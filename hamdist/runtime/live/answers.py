"""What a live run gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from hamdist.dynamics.objective.prequential import Window
from hamdist.dynamics.schedule.events import Event, Schedule
from hamdist.runtime.results.result import Replaced


@dataclass(frozen=True, slots=True)
class Answer:
    """The prediction of one sample.

    Attributes:
        number: of the sample, counted from 0.
        prediction: (B, ...), as the readout gives it; of several readouts a dict by name.
    """

    number: int
    prediction: Tensor | dict[str, Tensor]
    _event: Event = field(repr=False)
    _schedule: Schedule = field(repr=False)

    @property
    def versions(self) -> dict[str, int]:
        """Return how many updates the weights of each block had had when the sample passed it.

        Counted as in the stamps of signals: an emission at which nothing moved counts, too.
        """
        return self._schedule.versions(self._event)


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """Status of a live run.

    Attributes:
        fed: samples that were accepted; answered: of which the prediction is there.
        waiting: samples and labels that wait for the network.
        seconds: since the first tick, windows: prequential ones so far, as of the latest look at
            the engine (four times a second).
        replaced: actors that were lost.
    """

    fed: int
    answered: int
    waiting: int
    paused: bool
    seconds: float
    windows: list[Window]
    replaced: list[Replaced]


class Predictions:
    """The predictions of a run, for `for` and `async for`."""

    def __init__(self, following: Callable[[int], tuple[int, Answer] | None]) -> None:
        self._following, self._number = following, 0

    def __iter__(self) -> Iterator[tuple[int, Answer]]:
        return self

    def __next__(self) -> tuple[int, Answer]:
        found = self._following(self._number)
        if found is None:
            raise StopIteration
        self._number = found[0] + 1
        return found

    def __aiter__(self) -> AsyncIterator[tuple[int, Answer]]:
        return self

    async def __anext__(self) -> tuple[int, Answer]:
        found = await asyncio.to_thread(lambda: next(iter(self), None))
        if found is None:
            raise StopAsyncIteration
        return found
