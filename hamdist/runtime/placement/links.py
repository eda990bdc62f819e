"""Links between hosts: how long they take, and the delays that hide it (`partition.delays: auto`).

A block sends at tick k what its neighbour needs at tick k + d. The least d are taken with which the
timing model (runtime/timing) finds no cycle of signals slower than the actors and the bandwidth of
the links themselves, with links as slow as they are for all but a few signals (`Link.covering`), or
MARGIN times as slow as in the mean, if that is more. Every tick more on an edge lets a cycle
through it span more samples,

    period = seconds on the cycle / samples that it spans,

so the ticks that a cycle lacks follow from its seconds. A bundle waits at its sender until it is
full, which uses the delay up; so without a number for `engine.bundle` signals go alone.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.replan import with_delays
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.timing.cluster_model import ClusterModel, HostModel, Link
from hamdist.runtime.timing.model import TimingModel
from hamdist.runtime.timing.timed_graph import Period, TimedGraph
from hamdist.runtime.transport.transport import Endpoints

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

# Ticks differ from each other: what just covers the mean tick still waits now and then (2 cores, 25
# ms, ticks of 1.9 ms: waits of 0.30 s at 16 ticks, 0.29 at 20, 0.16 at 28, 0.19 at 40).
MARGIN = 1.25
WORSE = 0.005  # a period longer by this share is as good
ROUNDS = 9
LARGE = 2**17  # bytes of a signal that measures the rate
MOST_LARGE = 2**28  # bytes of all of them
IN_FLIGHT = 64  # signals
# A link is filled, and then measured, for so many round trips: TCP doubles what it has under way in
# each, up to bandwidth times round trip (2.5 MB at 100 Mbit/s and 200 ms: eight of them).
ROUND_TRIPS = 12
SHORTEST, LONGEST = 0.2, 4.0  # seconds of that
SPARE = 0.9  # of the rate, at which paced signals do not queue


class Probe:
    """An end of links under measurement, in an actor's process.

    `link_delay`, `keys` and `ports` are those of the run.
    """

    def __init__(
        self, run: int, link_delay: float, keys: Keys | None = None, ports: range | None = None
    ) -> None:
        self._endpoints = Endpoints(run, threading.Event(), link_delay, keys, ports=ports)
        self._mine: list[int] = []

    @staticmethod
    def channels(number: int) -> tuple[Channel, Channel]:
        """Return the channels of link `number`, there and back, which differ in the last bit."""
        name = f"link {number}"
        ends = ("measuring", "answering")
        there = Channel(2 * number, Kind.STATE, *ends, name, IN_FLIGHT)
        return there, Channel(2 * number + 1, Kind.MESSAGE, *ends[::-1], name, IN_FLIGHT)

    def open(self, ways: Mapping[int, str]) -> dict[int, str]:
        """Open the receiving ends of channels, given by number, and return their addresses."""
        self._mine = list(ways)
        return {
            n: self._endpoints.bind(self._channel(n), way, MOST_LARGE) for n, way in ways.items()
        }

    def join(self, addresses: Mapping[int, str]) -> None:
        """Open the sending ends of the same links."""
        for n in self._mine:
            self._endpoints.connect(self._channel(n ^ 1), addresses[n ^ 1])

    def _channel(self, n: int) -> Channel:
        return self.channels(n // 2)[n % 2]

    def answer(self, number: int) -> None:
        """Send back the time at which each signal of a first series came, one by one; then those
        of a second series, at once."""
        there, back = self.channels(number)
        came: list[float] = []
        for series in range(2):
            end, came = False, []
            while not end:
                n = len(came)
                end = self._endpoints.receive(there, Stamp(n, n, 0)).end
                came.append(time.perf_counter())
                if not series:
                    self._endpoints.send(back, _times(came[-1:]))
        self._endpoints.send(back, _times(came))

    def measure(self, number: int, nbytes: int, every: float, far: bool = False) -> Link:
        """Return the latency, the rate and the lateness of a link.

        nbytes, every: of the signals of the run, and seconds between two of them; far: between
        hosts (within one, a signal is late when its actor has no processor, which is no property
        of the link).
        """
        small = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            self._send(number, 1)
            self._came(number)
            small.append(time.perf_counter() - begin)
        # (the first one opens what the others use again)
        way = statistics.median(small[1:]) / 2
        seconds = min(max(ROUND_TRIPS * 2 * way, SHORTEST), LONGEST)
        rate = self._rate(number, seconds)
        pace = max(every, nbytes / (SPARE * rate))
        sent: list[float] = []
        while not sent or sent[-1] - sent[0] < max(seconds, 3 * pace):
            time.sleep(max(0.0, sent[-1] + pace - time.perf_counter()) if sent else 0.0)
            sent.append(time.perf_counter())
            self._send(number, nbytes)
        self._send(number, nbytes, end=True)
        taken = self._came(number)[:-1] - torch.tensor(sent, dtype=torch.float64)
        if not far:
            return Link(way, rate)
        late = taken - taken.min() + min(small[1:]) / 2  # (clocks differ)
        late = late[len(late) // 3 :]  # (TCP has opened up)
        mean = float(late.mean())
        return Link(mean, rate, lateness=tuple((late - mean).tolist()))

    def _rate(self, number: int, seconds: float) -> float:
        """Return the bytes a second of the second half of a series of large signals.

        One more is under way with each that has come: as many as the link takes, but no more than
        it has carried so far, which is what it has to carry on.
        """
        came: list[float] = []
        sent, first, begin = 0, 4, time.perf_counter()
        while time.perf_counter() - begin < seconds and sent * LARGE < MOST_LARGE:
            if sent - len(came) < first + len(came):
                self._send(number, LARGE)
                sent += 1
            else:
                came += self._came(number).tolist()
        self._send(number, LARGE, end=True)
        while len(came) < sent + 1:
            came += self._came(number).tolist()
        half = len(came) // 2
        took = came[-1] - came[half - 1]
        return LARGE * (len(came) - half) / took if took > 0 else math.inf

    def _send(self, number: int, nbytes: int, *, end: bool = False) -> None:
        payload = torch.zeros(max(1, nbytes), dtype=torch.uint8)
        self._endpoints.send(self.channels(number)[0], Signal(Stamp(0, 0, 0), payload, end=end))

    def _came(self, number: int) -> Tensor:
        """Return the next times that the other end sends. Raises WireError if it sends none."""
        times = self._endpoints.receive(self.channels(number)[1], Stamp(0, 0, 0)).payload
        if times is None:
            raise WireError(f"link {number}: an answer without times")
        return times

    def close(self) -> None:
        """Close both ends."""
        self._endpoints.close()


def _times(came: Sequence[float]) -> Signal:
    return Signal(Stamp(0, 0, 0), torch.tensor(came, dtype=torch.float64))


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
        self._cluster = cluster.with_latencies(lambda *_: 0.0)
        timed = self._timed(ones)
        self._aim = timed.period().seconds * (1 + WORSE)
        every = self._aim / timed.samples

        def latest(ends: tuple[int, int], link: Link) -> float:
            nbytes = timed.nbytes.get(ends, 0) // timed.samples
            return max(MARGIN * link.seconds, link.covering(nbytes, every))

        self._cluster = cluster.with_latencies(latest)

    def _timed(self, delays: Mapping[str, int]) -> TimedGraph:
        model = replace(self._model, plan=with_delays(self._model.plan, delays))
        return model.timed(self._placement, self._hosts, self._cluster)

    def _period(self, delays: Mapping[str, int]) -> Period:
        return self._timed(delays).period()

    def least(self) -> dict[str, int]:
        delays = dict.fromkeys(self._edges, 1)
        period = self._period(delays)
        while period.seconds > self._aim:
            longer = self._longer(delays, period)
            better = self._period(longer)
            if better.seconds >= (1 - WORSE) * period.seconds:
                break  # one sample at a time gains nothing by delays
            delays, period = longer, better
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
