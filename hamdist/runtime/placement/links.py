"""Links between hosts: how long they take, and the delays that hide it (`partition.delays: auto`).

A block sends at tick k what its neighbour needs at tick k + d. The least d are taken with which the
timing model (runtime/timing) finds no cycle of signals slower than the actors and the bandwidth of
the links themselves, with links MARGIN times as slow as they are. Between hosts they are measured
by signals as large and frequent as the run's, beside a thread that computes, so that jitter,
retransmissions, what waits behind them, and what waits for a processor count. Every tick more on an
edge lets a cycle through it span more samples,

    period = seconds on the cycle / samples that it spans,

so the ticks that a cycle lacks follow from its seconds. A bundle waits at its sender until it is
full, which uses the delay up; so without a number for `engine.bundle` signals go alone.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.plan.derived import with_delays
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.timing.cluster_model import ClusterModel, HostModel, Link
from hamdist.runtime.timing.timed_graph import Period, TimingModel
from hamdist.runtime.transport.transport import TCP, Endpoints

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

# Ticks differ from each other: what just covers the mean tick still waits now and then (2 cores, 25
# ms, ticks of 1.9 ms: waits of 0.30 s at 16 ticks, 0.29 at 20, 0.16 at 28, 0.19 at 40), and actors
# that no longer wait for each other make more of them than was predicted. At a round trip of 100 ms
# with 20 % jitter, of the rate without a link: 84 % with 1.25, 93 % with 1.5, 103 % with this.
MARGIN = 1.75
WORSE = 0.005  # a period longer by this share is as good
ROUNDS = 5  # small signals, there and back one after the other
LARGE = 2**16  # bytes of a signal that measures the rate where the run's own are not known
MOST = 2**28  # bytes of any signal
IN_FLIGHT = 1024  # signals, between hosts
FIRST_BYTES = 2**20  # of signals that are sent before any is answered
# A link is filled, and then measured, for so many round trips: TCP doubles what it has under way in
# each, up to bandwidth times round trip (2.5 MB at 100 Mbit/s and 200 ms: eight of them), and a
# round trip of a link that is full, or loses packets, is up to thrice that of one small signal.
ROUND_TRIPS = 40
SHORTEST, LONGEST = 0.2, 4.0  # seconds of that
SPARE = 0.9  # of the rate, at which signals of the run's size do not queue
COMPUTED = 2**20  # bytes at once beside the signals
IN_TIME = 0.98  # of the signals come within the latency that is measured at the run's pace
NOW = Stamp(0, 0, 0)


class Probe:
    """An end of links under measurement, in an actor's process.

    `link_delay`, `keys` and `ports` are those of the run.
    """

    def __init__(
        self, run: int, link_delay: float, keys: Keys | None = None, ports: range | None = None
    ) -> None:
        self._endpoints = Endpoints(run, threading.Event(), link_delay, keys, ports=ports)
        self._mine: list[int] = []
        self._room: dict[int, int] = {}  # signals that may be under way, by link

    @staticmethod
    def channels(number: int) -> tuple[Channel, Channel]:
        """Return the channels of link `number`, there and back, which differ in the last bit."""
        name = f"link {number}"
        there = Channel(2 * number, Kind.STATE, "measuring", "answering", name, 4)
        return there, Channel(2 * number + 1, Kind.MESSAGE, "answering", "measuring", name, 4)

    def open(self, ways: Mapping[int, str]) -> dict[int, str]:
        """Open the receiving ends of channels, given by number, and return their addresses."""
        self._mine = list(ways)
        return {
            n: self._endpoints.bind(self._channel(n, way), way, MOST) for n, way in ways.items()
        }

    def join(self, addresses: Mapping[int, str]) -> None:
        """Open the sending ends of the same links."""
        for n in self._mine:
            address = addresses[n ^ 1]
            self._room[n // 2] = self._channel(n, address).capacity
            self._endpoints.connect(self._channel(n ^ 1, address), address, MOST)

    def _channel(self, n: int, way: str) -> Channel:
        channel = self.channels(n // 2)[n % 2]
        return channel._replace(capacity=IN_FLIGHT) if way.startswith(TCP) else channel

    def answer(self, number: int, nbytes: int = 0) -> None:
        """Send back when each signal of the other end has come, by this process's clock.

        Args:
            number: of the link.
            nbytes: as of `measure`.
        """
        there, back = self.channels(number)
        end = False
        with _computing(nbytes > 0):
            while not end:
                end = self._endpoints.receive(there, NOW).end
                arrival = torch.tensor(time.perf_counter(), dtype=torch.float64)
                self._endpoints.send(back, Signal(NOW, arrival))

    def measure(self, number: int, nbytes: int = 0, every: float = 0.0) -> Link:
        """Return the latency of a link, one way, and its rate once TCP has opened up, or that of
        the run if it is less.

        Args:
            number: of the link.
            nbytes: of a signal of the run. MARGIN times the latency is then, at least, one within
                which nearly all of them come, behind what is late of those before; else it is the
                median of small signals.
            every: seconds between two signals of the run.
        """
        with _computing(nbytes > 0):
            return self._measured(number, nbytes, every)

    def _measured(self, number: int, nbytes: int, every: float) -> Link:
        sent, _, answered = self._series(number, 1, ROUNDS)
        trips = [b - a for a, b in zip(sent[1:], answered[1:], strict=True)]
        trip = statistics.median(trips)  # (the first one opens what the others use again)
        seconds = min(max(ROUND_TRIPS * trip, SHORTEST), LONGEST)
        size = min(nbytes or LARGE, MOST // 2)
        sent, arrivals, _ = self._series(number, size, 2 * ROUNDS, seconds, every, trip)
        half = len(arrivals) // 2
        took = arrivals[-1] - arrivals[half - 1]
        rate = size * (len(arrivals) - half) / took if took > 0 else math.inf
        way = trip / 2
        if nbytes:
            sent, arrivals, _ = self._series(number, size, ROUNDS)  # (one at a time)
            soonest = min(b - a for a, b in zip(sent, arrivals, strict=True))
            pace = max(every, size / (SPARE * rate))
            seconds = max(seconds, min(3 * ROUNDS * pace, LONGEST))
            sent, arrivals, _ = self._series(number, size, ROUNDS, seconds, pace, trip)
            way = max(way, (min(trips) / 2 + _lateness(sent, arrivals, soonest)) / MARGIN)
        self._series(number, 1, 1, end=True)
        return Link(way, rate)

    def _series(
        self,
        number: int,
        nbytes: int,
        least: int,
        seconds: float = 0.0,
        every: float = 0.0,
        trip: float = 0.0,
        *,
        end: bool = False,
    ) -> tuple[list[float], list[float], list[float]]:
        """Send signals, and return when each left, came (by the other clock) and was answered.

        No more are under way than either channel has room for, so that neither end ever waits for
        room while the other one does.

        Args:
            least, seconds: so many signals, and for so long.
            every: seconds between two in the mean, if not as fast as possible.
            trip: seconds of a round trip. Twice as many signals may be under way as were answered
                in the latest two, so that a slow link holds no long queue; 0: one signal.
            end: the answering end is done with this.
        """
        there, back = self.channels(number)
        payload = torch.zeros(nbytes, dtype=torch.uint8)
        first = min(3 * ROUNDS, max(1, FIRST_BYTES // nbytes))
        sent: list[float] = []
        arrivals: list[float] = []
        answered: list[float] = []

        def take() -> None:
            payload = self._endpoints.receive(back, NOW).payload
            if payload is None:
                raise WireError(f"{back}: an answer without a time")
            arrivals.append(float(payload))
            answered.append(time.perf_counter())

        while len(sent) < least or sent[-1] - sent[0] < seconds:
            now = time.perf_counter()
            latest = len(answered) - bisect_left(answered, now - 2 * trip)
            room = min(self._room[number], first + 2 * latest) if trip else 1
            if len(sent) - len(answered) >= room:
                take()
                continue
            if every and sent:  # (after a wait it catches up, as a run does)
                time.sleep(max(0.0, sent[0] + len(sent) * every - now))
            sent.append(time.perf_counter())
            self._endpoints.send(there, Signal(NOW, payload, end=end))
        while len(answered) < len(sent):
            take()
        return sent, arrivals, answered

    def close(self) -> None:
        """Close both ends."""
        self._endpoints.close()


@contextmanager
def _computing(wanted: bool) -> Iterator[None]:
    """Compute in a thread, as an actor does while its signals come and go."""
    data, done = bytes(COMPUTED), threading.Event()

    def compute() -> None:
        while not done.is_set():
            hashlib.sha256(data)  # (other threads of Python run meanwhile)

    thread = threading.Thread(target=compute, name="hamdist computing", daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if wanted:
            thread.join()


def _lateness(sent: Sequence[float], came: Sequence[float], soonest: float) -> float:
    """Return by how many seconds the share IN_TIME of the signals is later than the quickest one.

    soonest: seconds from sending to arrival, by the clocks of both ends (which differ), of the
    quickest signal that had no other before it: one of many waits for those that jitter holds up.
    (The first third meets what TCP has not opened up yet.)
    """
    late = [b - a for a, b in zip(sent, came, strict=True)]
    steady = sorted(late[len(late) // 3 :])
    return steady[math.ceil(IN_TIME * len(steady)) - 1] - min(soonest, *late)


def signals_of(
    model: TimingModel, placement: Sequence[Sequence[str]]
) -> tuple[Mapping[tuple[int, int], int], float]:
    """Return the bytes of a sample's signals by actors, and the seconds of a sample, with links
    that take no time."""
    ones = {e.name: 1 for e in model.plan.graph.edges if not e.from_input}
    alone = replace(model, plan=with_delays(model.plan, ones))
    timed = alone.timed(placement, range(len(placement)), cluster_of(placement, {}))
    nbytes = {pair: -(-n // timed.samples) for pair, n in timed.nbytes.items()}
    return nbytes, timed.period().seconds / timed.samples


def as_measured(
    model: TimingModel,
    placement: Sequence[Sequence[str]],
    hosts: Sequence[int],
    cluster: ClusterModel,
) -> ClusterModel:
    """Return a cluster with links as a run would measure them (`Probe.measure`): MARGIN times the
    latency is one within which nearly all signals come. Arguments as in `least_delays`."""
    nbytes, every = signals_of(model, placement)
    largest: dict[tuple[int, int], int] = {}
    for (a, b), size in nbytes.items():
        way = hosts[a], hosts[b]
        largest[way] = max(size, largest.get(way, 0))
    links = {}
    for way, link in cluster.links.items():
        late = link.within(IN_TIME, largest.get(way, 0), every) / MARGIN
        links[way] = Link(max(link.seconds, late), link.bytes_per_second)
    return replace(cluster, links=links)


def pairs(plan: Plan, placement: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """Return the actors (first, second) that exchange signals."""
    host = {name: i for i, blocks in enumerate(placement) for name in blocks}
    crossing = {(host[e.parent], host[e.child]) for e in plan.graph.edges if not e.from_input}
    return {(min(a, b), max(a, b)) for a, b in crossing if a != b}


def least_delays(
    model: TimingModel,
    placement: Sequence[Sequence[str]],
    hosts: Sequence[int],
    cluster: ClusterModel,
) -> dict[str, int]:
    """Return the fewest ticks that keep every actor busy, by edge between blocks.

    placement: the blocks of each actor; hosts: its place in `cluster`.
    """
    return _Delays(model, placement, hosts, cluster).least()


def cluster_of(
    placement: Sequence[Sequence[str]], links: Mapping[tuple[int, int], Link]
) -> ClusterModel:
    """Return a host for each actor, with links both ways."""
    ways = {pair: link for (a, b), link in links.items() for pair in ((a, b), (b, a))}
    hosts = [HostModel(f"actor {i}") for i in range(len(placement) + 1)]
    return ClusterModel(hosts, ways)


class _Delays:
    def __init__(
        self,
        model: TimingModel,
        placement: Sequence[Sequence[str]],
        hosts: Sequence[int],
        cluster: ClusterModel,
    ) -> None:
        self._model, self._placement, self._hosts = model, placement, hosts
        self._edges = [e.name for e in model.plan.graph.edges if not e.from_input]
        ones = dict.fromkeys(self._edges, 1)
        # (Bytes on their way are hidden by ticks as latency is. What the links cannot carry at all
        # is left in the period when no cycle through a signal is the slowest any more.)
        self._cluster = cluster.without_links()
        self._aim = self._period(ones).seconds * (1 + WORSE)
        self._cluster = cluster.slowed(MARGIN)

    def _period(self, delays: Mapping[str, int]) -> Period:
        model = replace(self._model, plan=with_delays(self._model.plan, delays))
        return model.timed(self._placement, self._hosts, self._cluster).period()

    def least(self) -> dict[str, int]:
        delays = dict.fromkeys(self._edges, 1)
        period = self._period(delays)
        slow, longer = period.seconds, set[str]()  # edges with more ticks at this period
        # Of several links that are equally slow, only the last one that gets longer shortens the
        # period. Where the same cycle is left, one sample at a time gains nothing by delays.
        while period.seconds > self._aim and not period.signals.keys() <= longer:
            longer |= period.signals.keys()
            delays = self._longer(delays, period)
            period = self._period(delays)
            if period.seconds < (1 - WORSE) * slow:
                slow, longer = period.seconds, set()
        aim = max(self._aim, period.seconds)
        for name in sorted(name for name, d in delays.items() if d > 1):
            delays[name] = self._fewest(delays, name, aim)
        return delays

    def _longer(self, delays: Mapping[str, int], period: Period) -> dict[str, int]:
        """Return `delays` with the ticks that the critical cycle lacks, shared out over its edges.

        Its seconds over its samples make the period; they have to make the aim.
        """
        signals = {name: n for name, n in period.signals.items() if name in delays}
        seconds = sum(period.parts.values())
        lacks = seconds / self._aim - seconds / period.seconds
        ticks = lacks * self._model.steps.ticks / max(1, sum(signals.values()))
        return {n: d + (max(1, math.ceil(ticks)) if n in signals else 0) for n, d in delays.items()}

    def _fewest(self, delays: Mapping[str, int], name: str, aim: float) -> int:
        """Return the least ticks of one edge with which the others reach the aim."""
        low, high = 1, delays[name]  # high reaches it
        middle = high - 1  # (most edges have none to spare)
        while low < high:
            if self._period({**delays, name: middle}).seconds <= aim:
                high = middle
            else:
                low = middle + 1
            middle = (low + high) // 2
        return high
