"""Counts of the signals that crossed the channels of a process, and copies for replay.

Signals of a channel are numbered from 1 in the order of their posting. At a cut (all nodes at one
tick) the sender has posted p of them and the receiver has taken t: those from t + 1 to p are under
way, and at most as many as the channel has room for. So a sender that keeps its last `capacity`
signals knows, for any receiver, which signals are under way.

Where lost processes are to be replaced a sender keeps more: all signals since the latest snapshot
of the whole run, for a neighbour may have to restart there. A posted payload is never written again
(mailbox.py), so keeping it is a reference, not a copy. Signals on a GPU are kept there (up to
`snapshots.memory`), by their own sender. If that sender dies, its successor computes them again
from the snapshot, which is in files, so that no other process depends on the lost memory.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from hamdist.errors import SnapshotError
from hamdist.runtime.signals.signal import Channel, Signal

# What a signal takes in memory beside its payload's numbers: the objects of Python and torch
# around them (measured: 77 without a payload, 694 with one of 8 numbers). For signals of a few
# numbers that is ten times more than those.
OBJECT_BYTES = 700
WEIGHED = 16  # signals, by channel on average, between two looks at what all of them take


class ChannelLog:
    """The latest signals of one channel.

    Attributes:
        first: number of the oldest signal.
        nbytes: bytes of memory that the signals take.
    """

    __slots__ = ("_logged", "capacity", "nbytes")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._logged: tuple[int, list[Signal]] = (1, [])

    @property
    def first(self) -> int:
        """Return the number of the oldest signal that is kept."""
        return self._logged[0]

    @property
    def posted(self) -> int:
        """Return the number of the latest signal."""
        first, signals = self._logged
        return first + len(signals) - 1

    def add(self, signal: Signal) -> None:
        """Keep a signal that was posted."""
        self._logged[1].append(signal)
        self.nbytes += _nbytes(signal)

    def at(self, number: int) -> Signal:
        """Return a signal by its number, to any thread. Raises SnapshotError if it was dropped."""
        first, signals = self._logged
        if not first <= number < first + len(signals):
            raise SnapshotError(
                f"signal {number} of a channel that keeps {first} to {first + len(signals) - 1}"
            )
        return signals[number - first]

    def behind(self, number: int) -> list[Signal]:
        """Return the signals after `number`."""
        first, signals = self._logged
        return signals[max(0, number + 1 - first) :]

    def let_go(self, before: int) -> None:
        """Drop the signals with smaller numbers."""
        first, signals = self._logged
        dropped = min(max(0, before - first), len(signals))
        if dropped:
            self._logged = (first + dropped, signals[dropped:])
            self.nbytes -= sum(map(_nbytes, signals[:dropped]))

    def begin(self, posted: int, signals: list[Signal]) -> None:
        """Start from the latest `signals` of a snapshot, the last one numbered `posted`."""
        self._logged = (posted - len(signals) + 1, list(signals))
        self.nbytes = sum(map(_nbytes, signals))


def _nbytes(signal: Signal) -> int:
    return OBJECT_BYTES + (0 if signal.payload is None else signal.payload.nbytes)


class SentLog:
    """Log of all channels of a process.

    Args:
        inside: names of the nodes of this process.
        replays: True if signals are kept since the latest snapshot.
        limit: bytes that they may take. With more they are dropped, and no process can restart from
            the latest snapshot (`dropped`) until a later one is complete.
    """

    def __init__(self, inside: Collection[str], *, replays: bool, limit: float = inf) -> None:
        self._inside = inside
        self._replays = replays
        self._keeps = replays
        self._limit = limit
        self._unweighed = 0  # signals since the last look at what all of them take
        self.dropped = False
        self.posted: dict[int, int] = {}
        self.received: dict[int, int] = {}
        self.logs: dict[int, ChannelLog] = {}
        self._marks: dict[int, dict[int, int]] = {}  # by tick of a snapshot: `posted` of that time

    def post(self, channel: Channel, signal: Signal) -> int:
        """Note a signal, and return its number."""
        number = channel.number
        count = self.posted.get(number, 0) + 1
        self.posted[number] = count
        if channel.receiver not in self._inside:
            log = self.log(channel)
            log.add(signal)
            if not self._keeps and count % (4 * channel.capacity) == 0:
                log.let_go(count - channel.capacity + 1)
            self._unweighed += 1
            if self._keeps and self._unweighed >= WEIGHED * len(self.logs):
                self._unweighed = 0
                if self.nbytes > self._limit:
                    self._forget()
        return count

    def take(self, channel: Channel) -> None:
        """Count a signal that was taken from a channel."""
        self.received[channel.number] = self.received.get(channel.number, 0) + 1

    def log(self, channel: Channel) -> ChannelLog:
        """Return the log of a channel, made when it is first asked for."""
        log = self.logs.get(channel.number)
        if log is None:
            log = self.logs[channel.number] = ChannelLog(channel.capacity)
        return log

    def mark(self, tick: int) -> None:
        """Note that a snapshot is taken at `tick`, now."""
        self._marks[tick] = dict(self.posted)
        self._keeps = self._replays

    def _forget(self) -> None:
        """Drop all signals but those under way."""
        self.dropped, self._keeps = True, False
        self._marks.clear()
        for log in self.logs.values():
            log.let_go(log.posted - log.capacity + 1)

    def complete(self, tick: int) -> None:
        """Note that the snapshot of that tick is complete: no process will restart before it."""
        posted = self._marks.get(tick)
        self._marks = {t: m for t, m in self._marks.items() if t > tick}
        if posted is not None:
            self.dropped = False
            for number, log in self.logs.items():
                log.let_go(posted.get(number, 0) - log.capacity + 1)

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the kept signals take."""
        return sum(log.nbytes for log in list(self.logs.values()))
