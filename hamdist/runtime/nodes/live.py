"""What a block of a live run hears of each emission of the stream, and what it has for the driver.

The stream tells every block on its clock channel (ports.py) whether an emission is idle, a sample,
or an earlier one once more, and the factor of the step size from then on. Idle emissions move
nothing, and are not counted: samples have the numbers that they would have without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hamdist.dynamics.finite import Scale
from hamdist.dynamics.saved_state.remember import Remembers
from hamdist.dynamics.schedule.events import Event
from hamdist.runtime.signals.signal import Signal
from hamdist.streams.sample import Emission, Emits


class Answered(NamedTuple):
    """The prediction (B, ...) of a sample, from a readout of this weight version, in `event`."""

    readout: str
    number: int
    prediction: Tensor
    version: int
    event: Event


class HandedOver(NamedTuple):
    """The state of a block (`BlockState`) at the emission of a cut, by its number."""

    cut: int
    block: str
    state: Any


class LiveBlock(Remembers):
    """The emissions that a block still works on; without patience, of a run that is not live.

    Args:
        name: of the block.
        patience: unlabelled samples whose predictions a readout keeps, to score them later.
        parts: of an emission, which pass as separate pulses (micro-batches).

    Attributes:
        send: takes what is for the driver.
    """

    STATE = ("_heard", "_latest", "_rates", "_asked")

    def __init__(self, name: str, patience: int, parts: int = 1) -> None:
        self.send: Callable[[Answered | HandedOver], object] = lambda _: None
        self._name, self.patience, self._parts = name, patience, parts
        self._heard: dict[int, Sequence[float]] = {}  # emissions by their number, as numbers
        self._latest: Sequence[int] = (-1, -1)  # its number, with and without idle ones
        self._rates: list[tuple[int, float]] = [(0, 1.0)]  # by the number from which each holds
        self._asked: dict[int, Tensor] = {}  # predictions of unlabelled samples

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from `state`; None in files of earlier formats."""
        if state is not None:
            super().restore(state)

    def hear(
        self, pulse: int, clock: Callable[[], Signal | None], state: Callable[[], object]
    ) -> Emission | None:
        """Note what the stream says of the emission that passes; None if it says nothing.

        state: of the block, for a cut.
        """
        slot, part = divmod(pulse, self._parts)
        signal = None if part or not self.patience else clock()
        if signal is None or signal.payload is None:
            return self.of(pulse)
        self._heard[slot] = signal.payload.tolist()
        told = emission_of(self._heard[slot])
        self._latest = (slot, told.shown - (told.kind is Emits.IDLE))
        if told.rate != self._rates[-1][1]:
            self._rates.append((told.shown, told.rate))
        if told.cut:
            self.send(HandedOver(told.cut, self._name, state()))
        return told

    def of(self, pulse: int) -> Emission | None:
        """Return what was heard of an emission, as long as it is not forgotten."""
        numbers = self._heard.get(pulse // self._parts)
        return None if numbers is None else emission_of(numbers)

    def idle(self, pulse: int) -> bool:
        """Return True if the emission is idle."""
        told = self.of(pulse)
        return told is not None and told.kind is Emits.IDLE

    def number(self, pulse: int) -> int:
        """Return the number of a pulse without idle ones; an idle one has that of the latest."""
        if not self.patience:
            return pulse
        (slot, part), told = divmod(pulse, self._parts), self.of(pulse)
        shown = self._latest[1] + slot - self._latest[0]  # (behind the end of the stream)
        if told is not None:
            shown = told.shown - (told.kind is Emits.IDLE)
        return max(0, shown) * self._parts + part

    def forget(self, pulse: int) -> None:
        """Let go of the emissions whose last pulse was not after this one."""
        if self.patience:
            last = (pulse + 1) // self._parts - 1
            self._heard = {slot: one for slot, one in self._heard.items() if slot > last}
            first = min((one[1] for one in self._heard.values()), default=self._latest[1])
            while len(self._rates) > 1 and self._rates[1][0] <= first:
                self._rates.pop(0)

    def scaled(self, scale: Scale) -> Scale:
        """Return `scale` (of beta, by number) times the factor that was set."""

        def factor(number: int) -> float:
            rate = next(r for first, r in reversed(self._rates) if first <= number)
            return scale(number) * rate

        return factor if self.patience else scale

    def answer(self, told: Emission, prediction: Tensor, version: int, event: Event) -> None:
        """Send the prediction of a sample that has come."""
        self.send(Answered(self._name, told.number, prediction, version, event))

    def ask(self, told: Emission, prediction: Tensor) -> None:
        """Keep the prediction of an unlabelled sample."""
        self._asked[told.number] = prediction
        if len(self._asked) > self.patience:
            del self._asked[min(self._asked)]

    def asked(self, told: Emission) -> Tensor | None:
        """Return the prediction of then of a sample whose label has come."""
        return self._asked.pop(told.number, None)


def emission_of(numbers: Sequence[float]) -> Emission:
    """Return an emission from its fields as numbers."""
    kind, shown, number, rate, cut = numbers
    return Emission(Emits(int(kind)), int(shown), int(number), rate, int(cut))
