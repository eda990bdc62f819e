"""The mailbox of a process: delivers signals between nodes.

A mailbox serves the nodes of one process: signals between two of them wait in a queue, all others
cross a transport. Taking a signal checks its stamp against the one that the schedule names.

Where an edge's delay allows it, signals wait here until a bundle of them leaves as one message
(`Bundle` in dynamics/schedule). A bundle that is not full leaves at one of three times: when the
tick is over in which its last signal would have come (its sender has ended); with a signal that
says that the stream has ended; and when all nodes have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf
from typing import Any, Protocol

from torch import Tensor

from hamdist.dynamics.saved_state.stateful import check_names
from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import SnapshotError, StampError
from hamdist.runtime.results.digests import Digests
from hamdist.runtime.signals.codec import Decoder, Encoder
from hamdist.runtime.signals.edge_codecs import DIRECTIONS, CompressionMap
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.signals.signal import Channel, Signal, ready


class Transport(Protocol):
    """Moves signals between processes.

    Both calls block as long as they must, and raise `Aborted` when the run is called off meanwhile.
    """

    def send(self, channel: Channel, *signals: Signal) -> None: ...

    def receive(self, channel: Channel, stamp: Stamp) -> Signal: ...


class Mailbox:
    """The channels of one process.

    Args:
        inside: names of the nodes of this process.
        transport: carries signals to and from other processes; None if there are none.
        sent_log: counts the signals that cross, where snapshots are taken.
        digests: of the signals posted and taken, where the settings ask for them.
    """

    def __init__(
        self,
        inside: set[str],
        transport: Transport | None = None,
        sent_log: SentLog | None = None,
        digests: Digests | None = None,
    ) -> None:
        self.digests = digests
        self._inside = inside
        self._sent_log = sent_log
        self._resume: dict[int, int] = {}  # by channel: the first signal that has to be sent
        self._transport = transport
        self._queues: dict[int, deque[Signal]] = {}
        self._bundles: dict[int, tuple[Channel, list[Signal]]] = {}
        self._due = inf  # the first tick at whose end a bundle has to leave
        self._sent: dict[int, int] = {}
        self._posted: dict[int, int] = {}  # signals by channel, where no log counts them
        self._received: dict[int, int] = {}
        self._edges: dict[int, str] = {}
        self._encoders: dict[int, tuple[Channel, Encoder]] = {}
        self._decoders: dict[int, Decoder] = {}

    @property
    def payload_bytes(self) -> dict[str, int]:
        """Return the bytes of payload posted so far, by edge."""
        by_edge: dict[str, int] = {}
        for number, nbytes in self._sent.items():
            edge = self._edges[number]
            by_edge[edge] = by_edge.get(edge, 0) + nbytes
        return by_edge

    @property
    def counts(self) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Return how many signals were posted and taken here, by number of the channel."""
        log = self._sent_log
        return (self._posted, self._received) if log is None else (log.posted, log.received)

    @property
    def compression(self) -> CompressionMap:
        """Return how the signals that were posted here were compressed, by edge and direction."""
        done: CompressionMap = {}
        for channel, encoder in self._encoders.values():
            done.setdefault(channel.edge, {})[DIRECTIONS[channel.kind]] = encoder.result()
        return done

    def post(self, channel: Channel, signal: Signal) -> None:
        """Send a signal, whose payload is the receiver's from now on and never written again."""
        if channel.codec is not None:
            signal = self._encoded(channel, signal)
        if self.digests is not None:
            self.digests.post(channel, signal)
        if signal.payload is not None:
            if channel.number not in self._sent:
                self._sent[channel.number] = 0
                self._edges[channel.number] = channel.edge
            self._sent[channel.number] += signal.payload.nbytes
        if self._sent_log is None:
            number = self._posted[channel.number] = self._posted.get(channel.number, 0) + 1
        else:
            number = self._sent_log.post(channel, signal)
        if channel.receiver in self._inside:
            self._queues.setdefault(channel.number, deque()).append(signal)
        elif not self._resume or number >= self._resume.get(channel.number, 0):
            self._send(channel, signal)

    def take(self, channel: Channel, stamp: Stamp, tick: int) -> Signal:
        """Return the next signal of `channel`, which the schedule stamps so, at the receiver's
        `tick`. Raises StampError if another one comes first."""
        if channel.sender in self._inside:
            queue = self._queues.get(channel.number)
            signal = queue.popleft() if queue else None
        else:
            if tick > self._due:
                self.flush(tick)
            signal = self._remote(channel).receive(channel, stamp)
        if signal is None or signal.stamp != stamp:
            received = "nothing" if signal is None else _words(signal.stamp)
            raise StampError(
                channel.receiver,
                tick,
                f"on {channel} the schedule names {_words(stamp)}, but {received} was there",
            )
        if self._sent_log is None:
            self._received[channel.number] = self._received.get(channel.number, 0) + 1
        else:
            self._sent_log.take(channel)
        if self.digests is not None:
            self.digests.take(channel, signal)
        if channel.codec is not None and signal.payload is not None:
            if channel.number not in self._decoders:
                self._decoders[channel.number] = Decoder(channel.codec)
            return replace(signal, payload=ready(self._decoders[channel.number](signal.payload)))
        return signal

    def _encoded(self, channel: Channel, signal: Signal) -> Signal:
        """Return the signal as it travels. Signals between two blocks of one process are encoded as
        well, so that the results of a run do not depend on where its blocks live."""
        if channel.codec is None or signal.payload is None:
            return signal
        if channel.number not in self._encoders:
            self._encoders[channel.number] = channel, Encoder(channel.codec)
        _, encoder = self._encoders[channel.number]
        return replace(signal, payload=ready(encoder(signal.payload)))

    def _send(self, channel: Channel, signal: Signal) -> None:
        if signal.stamp.tick > self._due:
            self.flush(signal.stamp.tick)
        if channel.bundle == 1:
            self._remote(channel).send(channel, signal)
            return
        _, bundle = self._bundles.setdefault(channel.number, (channel, []))
        bundle.append(signal)
        if len(bundle) >= channel.bundle or signal.end:
            del self._bundles[channel.number]
            self._remote(channel).send(channel, *bundle)
        elif len(bundle) == 1:
            self._due = min(self._due, signal.stamp.tick + channel.span)

    def flush(self, tick: float = inf) -> None:
        """Send the bundles whose last signal was due before `tick`, the earliest due first.

        The order rules out deadlock. Sending one may wait for room; the bundles still held here are
        then due no earlier, so no process in an earlier tick waits for one of them. Every wait
        leads to a strictly earlier tick, and some process can go on.
        """
        waiting = sorted(self._bundles.values(), key=_due)
        for channel, bundle in waiting:
            if tick > _due((channel, bundle)):
                # While an earlier send waited, `resume_at` may have dropped this bundle: the log
                # has its signals, and replays them to the new receiving end.
                if self._bundles.pop(channel.number, None) is None:
                    continue
                self._remote(channel).send(channel, *bundle)
        self._due = min((_due(bundle) for bundle in self._bundles.values()), default=inf)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, channel: Channel) -> dict[str, Any]:
        """Return how many signals were posted on `channel`, and the latest: all under way."""
        number = channel.number
        queue = self._queues.get(number, ())
        log = None if self._sent_log is None else self._sent_log.logs.get(number)
        posted = 0 if self._sent_log is None else self._sent_log.posted.get(number, 0)
        encoder = self._encoders.get(number)
        return {
            "posted": posted,
            "latest": list(queue) if log is None else log.behind(posted - channel.capacity),
            "bytes": self._sent.get(number, 0),
            "encoder": None if encoder is None else encoder[1].state_dict(),
        }

    def received_count(self, channel: Channel) -> int:
        """Return how many signals of `channel` were taken here."""
        return 0 if self._sent_log is None else self._sent_log.received.get(channel.number, 0)

    def received(self, channels: Collection[Channel]) -> dict[str, Tensor]:
        """Return what delta coding adds to, at the receiving ends of `channels`."""
        ends = ((channel, self._decoders.get(channel.number)) for channel in channels)
        pairs = ((channel.key, None if end is None else end.received) for channel, end in ends)
        return {key: received for key, received in pairs if received is not None}

    def load_state_dict(
        self,
        channel: Channel,
        state: Mapping[str, Any] | None,
        count: int | None,
        received: Tensor | None = None,
    ) -> None:
        """Continue `channel` from a snapshot. Raises SnapshotError if its ends' states do not fit.

        Args:
            state: of the sending end; None if the sender is in another process.
            count: signals that the receiver had taken; None if it is in another process.
            received: what delta coding adds to, at the receiving end.
        """
        sent_log, number = self._sent_log, channel.number
        if sent_log is None:
            raise ValueError("a mailbox without a log of sent signals cannot go on")
        if count is not None:
            sent_log.received[number] = count
        if received is not None and channel.codec is not None:
            self._decoders[number] = Decoder(channel.codec, received)
        if state is None:
            return
        check_names("channel", state, ("posted", "latest", "bytes", "encoder"))
        posted, latest = state["posted"], state["latest"]
        sent_log.posted[number] = posted
        if state["bytes"]:
            self._sent[number], self._edges[number] = state["bytes"], channel.edge
        if state["encoder"] is not None and channel.codec is not None:
            encoder = Encoder(channel.codec)
            encoder.load_state_dict(state["encoder"])
            self._encoders[number] = channel, encoder
        if count is None:
            sent_log.log(channel).begin(posted, latest)
            return
        if not posted - len(latest) <= count <= posted:
            raise SnapshotError(
                f"{channel}: {posted} signals were sent and {count} taken, but the snapshot holds "
                f"{len(latest)}: its parts do not belong together"
            )
        self._queues[number] = deque(latest[len(latest) - (posted - count) :])

    def resume_at(self, channel: Channel, number: int) -> None:
        """Send only signals from `number` on: the receiver has the others, or gets them from the
        log.
        """
        self._resume[channel.number] = number
        self._bundles.pop(channel.number, None)

    def _remote(self, channel: Channel) -> Transport:
        if self._transport is None:
            raise StampError(channel.receiver, 0, f"{channel} leads out of the only process")
        return self._transport


def _due(waiting: tuple[Channel, list[Signal]]) -> int:
    """Return the tick in which the last signal of a bundle comes, unless its sender has ended."""
    channel, bundle = waiting
    return bundle[0].stamp.tick + channel.span


def _words(stamp: Stamp) -> str:
    return f"tick {stamp.tick}, sample {stamp.sample}, version {stamp.version}"
