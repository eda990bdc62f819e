"""Where a node takes its signals from and posts them to.

A mailroom serves the nodes of one process: signals between two of them wait in a queue, all others
cross a transport. Taking a signal checks its stamp against the one that the schedule names.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from hamdist.dynamics.schedule import Stamp
from hamdist.errors import StampError
from hamdist.runtime.signal import Channel, Signal


class Transport(Protocol):
    """Moves signals between processes. Both calls block while they must, and raise `Aborted`
    when the run is called off meanwhile."""

    def send(self, channel: Channel, signal: Signal) -> None: ...

    def receive(self, channel: Channel, stamp: Stamp) -> Signal: ...


class Mailroom:
    """The channels of one process. `inside`: nodes of this process; `payload_bytes`: what was
    posted so far, by edge."""

    def __init__(self, inside: set[str], transport: Transport | None = None) -> None:
        self._inside = inside
        self._transport = transport
        self._queues: dict[int, deque[Signal]] = {}
        self.payload_bytes: dict[str, int] = {}

    def post(self, channel: Channel, signal: Signal) -> None:
        if signal.payload is not None:
            sent = self.payload_bytes.get(channel.edge, 0)
            self.payload_bytes[channel.edge] = sent + signal.payload.nbytes
        if channel.receiver in self._inside:
            self._queues.setdefault(channel.number, deque()).append(signal)
        else:
            self._remote(channel).send(channel, signal)

    def take(self, channel: Channel, stamp: Stamp, tick: int) -> Signal:
        """The signal with this stamp. tick: the receiver's own, for the error.

        Raises StampError if another signal comes first.
        """
        if channel.sender in self._inside:
            queue = self._queues.get(channel.number)
            signal = queue.popleft() if queue else None
        else:
            signal = self._remote(channel).receive(channel, stamp)
        if signal is None or signal.stamp != stamp:
            found = "nothing" if signal is None else _words(signal.stamp)
            raise StampError(
                channel.receiver,
                tick,
                f"on {channel} the schedule names {_words(stamp)}, but {found} was there",
            )
        return signal

    def _remote(self, channel: Channel) -> Transport:
        if self._transport is None:
            raise StampError(channel.receiver, 0, f"{channel} leads out of the only process")
        return self._transport


def _words(stamp: Stamp) -> str:
    return f"tick {stamp.tick}, sample {stamp.sample}, version {stamp.version}"
