"""Emissions of the stream as a block receives them, in a live run and where labels come late, and
what it sends to the driver.

The stream tells every block on its clock channel (node.py) whether an emission is idle, a sample,
or an earlier one whose label has come, and the factor of the step size from then on. Idle emissions
move nothing, and are not counted: samples have the numbers that they would have without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hamdist.dynamics.finite import StepFactor
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.schedule.events import Event
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Signal
from hamdist.streams.sample import Emission, Emits


class Answered(NamedTuple):
    """The prediction (B, ...) of a sample, from a readout of this weight version, in `event`."""

    readout: str
    number: int
    prediction: Tensor
    version: int
    event: Event

    def versions(self, plan: Plan) -> dict[str, int]:
        """Return by block the version of the weights that the sample has met on its way."""
        edges = [edge for edge in plan.graph.edges if not edge.from_input]
        sent = {edge.parent: plan.schedule.state(edge, self.event) for edge in edges}
        others = {name: stamp.version for name, stamp in sent.items() if stamp is not None}
        return {**others, self.readout: self.version}


class HandedOver(NamedTuple):
    """The state of a block (`BlockState`) at the emission of a snapshot, by its number."""

    snapshot: int
    block: str
    state: Any


class LiveBlock(Stateful):
    """The emissions that a block still works on; without patience a stream tells nothing of them.

    Args:
        name: of the block.
        patience: unlabelled samples whose predictions a readout keeps, to score them later (and,
            where traces are kept, whose records every block keeps).
        parts: of an emission, which pass as separate pulses (micro-batches).

    Attributes:
        send: takes what is for the driver.
    """

    STATE = ("_heard", "_latest", "_rates", "_asked", "_fed")
    ADDED: ClassVar[Mapping[str, Any]] = {"_fed": 0}

    def __init__(self, name: str, patience: int, parts: int = 1) -> None:
        self.send: Callable[[Answered | HandedOver], object] = lambda _: None
        self._name, self.patience, self._parts = name, patience, parts
        self._heard: dict[int, Sequence[float]] = {}  # emissions by their number, as numbers
        self._latest: Sequence[int] = (-1, -1)  # its number, with and without idle ones
        # By the number from which both hold: the factor, and how many emissions were of no sample.
        self._rates: list[tuple[int, float, int]] = [(0, 1.0, 0)]
        self._asked: dict[int, Tensor | None] = {}  # predictions of unlabelled samples
        self._fed = 0  # samples

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from `state`; None in files of earlier formats."""
        if state is not None:
            super().load_state_dict(state)
            self._rates = [(r[0], r[1], r[2] if len(r) > 2 else 0) for r in self._rates]

    def receive(
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
        emission = emission_of(self._heard[slot])
        self._latest = (slot, emission.shown - (emission.kind is Emits.IDLE))
        _, rate, apart = self._rates[-1]
        if emission.kind is not Emits.IDLE:
            self._fed = emission.number if emission.kind is Emits.SAMPLE else self._fed
            apart = emission.shown - self._fed
            self._fed += emission.kind is Emits.SAMPLE
        if (emission.rate, apart) != (rate, self._rates[-1][2]):
            self._rates.append((emission.shown, emission.rate, apart))
        if emission.snapshot:
            self.send(HandedOver(emission.snapshot, self._name, state()))
        return emission

    def of(self, pulse: int) -> Emission | None:
        """Return what was heard of an emission, as long as it is not forgotten."""
        numbers = self._heard.get(pulse // self._parts)
        return None if numbers is None else emission_of(numbers)

    def idle(self, pulse: int) -> bool:
        """Return True if the emission is idle."""
        emission = self.of(pulse)
        return emission is not None and emission.kind is Emits.IDLE

    def number(self, pulse: int) -> int:
        """Return the number of a pulse without idle ones; an idle one has that of the latest."""
        if not self.patience:
            return pulse
        (slot, part), emission = divmod(pulse, self._parts), self.of(pulse)
        shown = self._latest[1] + slot - self._latest[0]  # (behind the end of the stream)
        if emission is not None:
            shown = emission.shown - (emission.kind is Emits.IDLE)
        return max(0, shown) * self._parts + part

    def forget(self, pulse: int) -> None:
        """Let go of the emissions whose last pulse was not after this one."""
        if self.patience:
            last = (pulse + 1) // self._parts - 1
            self._heard = {slot: entry for slot, entry in self._heard.items() if slot > last}
            first = min((entry[1] for entry in self._heard.values()), default=self._latest[1])
            while len(self._rates) > 1 and self._rates[1][0] <= first:
                self._rates.pop(0)

    def scaled(self, by_sample: StepFactor) -> StepFactor:
        """Return the factor of beta by sample: `by_sample`, times the rate that was set for it."""

        def factor(number: int) -> float:
            rates = (r for r in reversed(self._rates) if r[0] <= number)
            _, rate, apart = next(rates, self._rates[0])
            return by_sample(number - apart) * rate

        return factor if self.patience else by_sample

    def answer(self, emission: Emission, prediction: Tensor, version: int, event: Event) -> None:
        """Send the prediction of a sample that has come."""
        self.send(Answered(self._name, emission.number, prediction, version, event))

    def ask(self, emission: Emission, prediction: Tensor | None) -> int | None:
        """Keep the prediction of an unlabelled sample; return the sample that is let go for it."""
        self._asked[emission.number] = prediction
        if len(self._asked) <= self.patience:
            return None
        oldest = min(self._asked)
        del self._asked[oldest]
        return oldest

    def earlier_prediction(self, emission: Emission) -> Tensor | None:
        """Return the prediction that was made when a sample came whose label has come now."""
        return self._asked.pop(emission.number, None)


def emission_of(numbers: Sequence[float]) -> Emission:
    """Return an emission from its fields as numbers."""
    kind, shown, number, rate, snap, *waits = numbers  # (earlier formats say no `waits`)
    return Emission(Emits(int(kind)), int(shown), int(number), rate, int(snap), *map(bool, waits))
