"""The language of schedules: events of a block in their order, stamps of signals, the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, IntEnum
from itertools import count
from typing import NamedTuple, Protocol

from hamdist.dynamics.graph.graph import Edge
from hamdist.dynamics.saved_state.stateful import registered


@registered("Phase")
class Phase(Enum):
    """Kinds of events."""

    EMIT = "E"  # the stream sends a sample
    FORWARD = "F"  # pulse, sequence: a sample passes a block
    BACKWARD = "B"  # pulse, sequence: the message about a sample passes a block
    READ = "FB"  # pulse: an output net predicts, takes the loss, moves its weights
    STEP = "S"  # pulse: the weights move, as far as the norm of the whole network's gradient allows
    TICK = "T"  # hold: one step of Hamilton's equations


class Kind(IntEnum):
    """Contents of a signal. The value is part of the wire format."""

    STATE = 0
    MESSAGE = 1
    TARGET = 2
    CLOCK = 3
    GRADIENT = 4
    WEIGHT = 5
    NORM = 6


@registered("Span")
class Span(NamedTuple):
    """One sequence on its way (schedule/sequence.py).

    start: tick in which its first token, sample `first`, meets depth 0. before: the same for the
    token before it. length: None as long as it is not known.
    """

    number: int
    start: int
    first: int
    before: int
    length: int | None = None


@registered("Event")
class Event(NamedTuple):
    """A step of a block. span: the sequence of the sample, in presentation 'sequence'."""

    tick: int
    phase: Phase
    sample: int
    span: Span | None = None


@registered("Stamp")
class Stamp(NamedTuple):
    """Identity of a signal on its edge.

    tick: of the sender; sample: the one that the signal is about (pulse) or that was shown at that
    tick (hold); the last field is the number of updates that the sender's weights had had.
    """

    tick: int
    sample: int
    version: int


class Bundle(NamedTuple):
    """Number of signals of one edge that may wait at their sender, to leave as one message.

    spacing: ticks between two of them. A signal of tick k is needed at tick k + d, and the last of
    its bundle is sent no later than at tick k + (size - 1) spacing. With size = max(1, d //
    spacing) that is at most k + d - 1: a receiver that waits for a signal waits for a strictly
    earlier tick, as without bundles, so by induction over the ticks no wait is endless.
    """

    size: int
    spacing: int


class Schedule(Protocol):
    """The common interface of all presentations. `c`: ticks between two samples (on average).

    A block and its edges are given by name and `Edge`; a method that names the signal of an edge
    for an event returns None where that event reads nothing from the edge.
    """

    c: int

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        """Return the stamp of the parent's state that the child reads in `event`."""

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        """Return the stamp of the child's message that the parent reads in `event`."""

    def target(self, readout: str, event: Event) -> Stamp | None:
        """Return the stamp of the target that the readout takes from the stream in `event`."""

    def delay(self, block: str) -> int:
        """Return the updates or ticks by which a block's messages lag (for delay-scaled steps)."""

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        """Return the most signals of `kind` that the schedule itself keeps waiting on an edge."""

    def target_in_flight(self, readout: str) -> int:
        """Return the most targets that the schedule itself keeps waiting for a readout."""

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:
        """Return the most signals of `kind` that may leave together on an edge."""

    @property
    def idle(self) -> int:
        """Return the idle emissions after which nothing of the sample before is under way."""

    @property
    def staleness(self) -> int:
        """Return the most samples by which a message is older than the state that it meets."""


def source_events(c: int, first: int = 0) -> Iterator[Event]:
    """Yield the events of the stream from sample `first` on: sample n leaves at tick n c - 1."""
    return (Event(n * c - 1, Phase.EMIT, n) for n in count(first))


def emitted(sample: int, c: int) -> Stamp:
    """Return the stamp of sample n, as the stream sends it."""
    return Stamp(sample * c - 1, sample, 0)


ALONE = Bundle(1, 1)
