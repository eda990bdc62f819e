"""Links between hosts: how long they take, and the delays that hide it (`partition.delays: auto`).

A block sends at tick k what its neighbour needs at tick k + d. The least d are taken with which the
timing model (runtime/timing) finds no cycle of signals slower than the actors and the bandwidth of
the links themselves, with links MARGIN times as slow as they are. Every tick more on an edge lets a
cycle through it span more samples,

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

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.replan import with_delays
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.timing.cluster_model import ClusterModel, HostModel, Link
from hamdist.runtime.timing.model import TimingModel
from hamdist.runtime.timing.timed_graph import Period
from hamdist.runtime.transport.transport import Endpoints

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

# Ticks differ from each other: what just covers the mean tick still waits now and then (2 cores, 25
# ms, ticks of 1.9 ms: waits of 0.30 s at 16 ticks, 0.29 at 20, 0.16 at 28, 0.19 at 40).
MARGIN = 1.25
WORSE = 0.005  # a period longer by this share is as good
SMALL_ROUNDS = 9
LARGE_ROUNDS = 3
LARGE = 2**20  # bytes
ROUNDS = SMALL_ROUNDS + LARGE_ROUNDS


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
        there = Channel(2 * number, Kind.STATE, "measuring", "answering", name, 4)
        return there, Channel(2 * number + 1, Kind.MESSAGE, "answering", "measuring", name, 4)

    def open(self, ways: Mapping[int, str]) -> dict[int, str]:
        """Open the receiving ends of channels, given by number, and return their addresses."""
        self._mine = list(ways)
        return {
            n: self._endpoints.bind(self._channel(n), way, 2 * LARGE) for n, way in ways.items()
        }

    def join(self, addresses: Mapping[int, str]) -> None:
        """Open the sending ends of the same links."""
        for n in self._mine:
            self._endpoints.connect(self._channel(n ^ 1), addresses[n ^ 1])

    def _channel(self, n: int) -> Channel:
        return self.channels(n // 2)[n % 2]

    def answer(self, number: int) -> None:
        """Send back the signals that the other end sends."""
        there, back = self.channels(number)
        for n in range(ROUNDS):
            came = self._endpoints.receive(there, Stamp(n, n, 0))
            self._endpoints.send(back, came)

    def measure(self, number: int) -> Link:
        """Return the latency and the rate of a link, by signals there and back."""
        there, back = self.channels(number)
        small: list[float] = []
        large: list[float] = []
        for n in range(ROUNDS):
            size = 1 if n < SMALL_ROUNDS else LARGE
            payload = torch.zeros(size, dtype=torch.uint8)
            begin = time.perf_counter()
            self._endpoints.send(there, Signal(Stamp(n, n, 0), payload))
            self._endpoints.receive(back, Stamp(n, n, 0))
            (small if n < SMALL_ROUNDS else large).append(time.perf_counter() - begin)
        # (the first of each opens what the others use again)
        way, full = (statistics.median(t[1:]) / 2 for t in (small, large))
        return Link(way, LARGE / (full - way) if full > way else math.inf)

    def close(self) -> None:
        """Close both ends."""
        self._endpoints.close()


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
        self._cluster = cluster.slowed(0.0)
        self._aim = self._period(ones).seconds * (1 + WORSE)
        self._cluster = cluster.slowed(MARGIN)

    def _period(self, delays: Mapping[str, int]) -> Period:
        model = replace(self._model, plan=with_delays(self._model.plan, delays))
        return model.timed(self._placement, self._hosts, self._cluster).period()

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
