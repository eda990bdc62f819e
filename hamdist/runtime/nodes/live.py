"""What a block of a live run hears of each emission of the stream, and what it hands to the driver.

The stream tells every block on its clock channel (ports.py) whether an emission is idle, a sample,
or an earlier one once more, and the factor of the step size from then on. Idle emissions move
nothing, and are not counted: samples have the numbers that they would have without them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from hamdist.dynamics.blocks.readout_loss import Reading
from hamdist.dynamics.finite import Scale
from hamdist.dynamics.saved_state.remember import Remembers
from hamdist.dynamics.schedule.events import Event
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.signal import Signal
from hamdist.streams.sample import Emission, Emits


class Answered(NamedTuple):
    """The prediction (B, ...) of a sample, from a readout, in `event`."""

    readout: str
    number: int
    prediction: Tensor
    event: Event


class HandedOver(NamedTuple):
    """The state of a block at the emission of a cut."""

    cut: int
    block: str
    state: BlockState


News: TypeAlias = "Answered | HandedOver"
Numbers = tuple[float, ...]


class LiveBlock(Remembers):
    """The emissions that a block still works on. Slot: number of an emission, idle ones too.

    Args:
        patience: unlabelled samples whose predictions a readout keeps, to score them later.

    Attributes:
        send: takes what is for the driver.
    """

    STATE = ("_emissions", "_latest", "_rates", "_asked")

    def __init__(self, patience: int) -> None:
        self.send: Callable[[News], None] = lambda _: None
        self._patience = patience
        self._emissions: dict[int, Numbers] = {}  # by slot
        self._latest: list[int] = [-1, -1]  # its slot and index
        self._rates: list[tuple[int, float]] = [(0, 1.0)]  # by the index from which each holds
        self._asked: dict[int, Tensor] = {}  # predictions of unlabelled samples

    def hear(self, slot: int, signal: Signal | None) -> Emission:
        """Note what the stream says of an emission, and return it."""
        if signal is None or signal.payload is None:
            raise ValueError(f"the stream has said nothing of emission {slot}")
        numbers = tuple(signal.payload.tolist())
        self._emissions[slot] = numbers
        told = emission_of(numbers)
        self._latest = [slot, told.shown - (told.kind is Emits.IDLE)]
        if told.rate != self._rates[-1][1]:
            self._rates.append((told.shown, told.rate))
        return told

    def of(self, slot: int) -> Emission | None:
        """Return what was heard of an emission; None of one that is forgotten or to come."""
        numbers = self._emissions.get(slot)
        return None if numbers is None else emission_of(numbers)

    def index(self, slot: int) -> int:
        """Return the number of an emission without the idle ones; an idle one has the latest's."""
        told = self.of(slot)
        if told is None:  # (behind the end of the stream)
            return max(0, self._latest[1] + slot - self._latest[0])
        return max(0, told.shown - (told.kind is Emits.IDLE))

    def forget(self, slot: int) -> None:
        """Let go of the emissions up to `slot`: nothing comes back of them."""
        self._emissions = {s: one for s, one in self._emissions.items() if s > slot}
        first = min((int(one[1]) for one in self._emissions.values()), default=self._latest[1])
        while len(self._rates) > 1 and self._rates[1][0] <= first:
            self._rates.pop(0)

    def scaled(self, scale: Scale) -> Scale:
        """Return `scale` (of beta, by index) times the factor that was set."""

        def factor(index: int) -> float:
            rate = next(r for first, r in reversed(self._rates) if first <= max(index, 0))
            return scale(index) * rate

        return factor

    def scores(self, told: Emission, prediction: Tensor | None, reading: Reading | None) -> Any:
        """Return the prediction of the sample when it came, if its label comes now; else None."""
        if told.kind is Emits.AGAIN:
            return self._asked.pop(told.number, None)
        if reading is None and prediction is not None:
            self._asked[told.number] = prediction
            if len(self._asked) > self._patience:
                self._asked.pop(min(self._asked))
        return None


def emission_of(numbers: Sequence[float]) -> Emission:
    kind, index, number, rate, cut = numbers
    return Emission(Emits(int(kind)), int(index), int(number), rate, int(cut))


class Outbox:
    """What the blocks of a process have for the driver, until it has fetched it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._first = 0
        self._news: deque[News] = deque()

    def put(self, news: News) -> None:
        with self._changed:
            self._news.append(news)
            self._changed.notify_all()

    def fetch(self, seen: int, seconds: float) -> tuple[int, list[News]]:
        """Return the news from number `seen` on, and the number after them; waits for some."""
        with self._changed:
            while self._first < seen and self._news:
                self._news.popleft()
                self._first += 1
            if not self._news:
                self._changed.wait(seconds)
            return self._first + len(self._news), list(self._news)
