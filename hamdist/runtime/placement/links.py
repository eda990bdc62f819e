"""Links between hosts: how long they take, and the delays that hide it (`partition.delays: auto`).

A block sends at tick k what its neighbour needs at tick k + d. With T seconds a tick and a link of
L seconds no block waits if

    (d - 1) T >= L',        L' = MARGIN (latency + bytes / bandwidth),        T = P / c

P: seconds a sample of the busiest actor, or of the fullest link; c: ticks a sample. The least d are
taken: an edge of a pulse beside a longer path waits for it anyway (dynamics/schedule/pulse.py) and
gets less where that is enough. A bundle waits at its sender until it is full, which uses the delay
up; so without a number for `engine.bundle` signals go alone, and with bundles of n
(d - n) T >= L'.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hamdist.dynamics.graph.graph import Edge
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.runtime.placement.assign_blocks import Costs
from hamdist.runtime.placement.step_costs import in_flight
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.transport.transport import Endpoints

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

# Ticks differ from each other: what just covers the mean tick still waits now and then (2 cores, 25
# ms, ticks of 1.9 ms: waits of 0.30 s at 16 ticks, 0.29 at 20, 0.16 at 28, 0.19 at 40).
MARGIN = 1.25
SMALL_ROUNDS = 9
LARGE_ROUNDS = 3
LARGE = 2**20  # bytes
ROUNDS = SMALL_ROUNDS + LARGE_ROUNDS


@dataclass(frozen=True, slots=True)
class Link:
    """A direction between two hosts; `seconds` is the time of a small signal with packing."""

    seconds: float
    bytes_per_second: float = math.inf

    def of(self, nbytes: int) -> float:
        return self.seconds + nbytes / self.bytes_per_second


class Probe:
    """An end of links under measurement, in an actor's process.

    `link_delay` and `keys` are those of the run.
    """

    def __init__(self, run: int, link_delay: float, keys: Keys | None = None) -> None:
        self._endpoints = Endpoints(run, threading.Event(), link_delay, keys)
        self._mine: list[int] = []

    @staticmethod
    def channels(number: int) -> tuple[Channel, Channel]:
        """Return the channels of link `number`, there and back; their numbers differ in the last
        bit.
        """
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
        self._endpoints.close()


def pairs(plan: Plan, placement: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """Return the actors (first, second) that exchange signals."""
    host = {name: i for i, blocks in enumerate(placement) for name in blocks}
    found = {(host[e.parent], host[e.child]) for e in plan.graph.edges if not e.from_input}
    return {(min(a, b), max(a, b)) for a, b in found if a != b}


def least_delays(
    plan: Plan,
    placement: Sequence[Sequence[str]],
    costs: Costs,
    links: Mapping[tuple[int, int], Link],
) -> dict[str, int]:
    """Return the fewest ticks that keep every actor busy, by edge between blocks.

    A schedule that lets one sample into the network at a time gains nothing by delays: all are 1.

    Args:
        plan: of the run.
        placement: the blocks of each actor.
        costs: of one sample.
        links: by pair of actors.
    """
    edges = [e for e in plan.graph.edges if not e.from_input]
    if in_flight(plan) < 2:
        return {e.name: 1 for e in edges}
    host = {name: i for i, blocks in enumerate(placement) for name in blocks}
    sizes = {e.name: _bytes(plan, e) for e in edges}
    crossing: dict[str, Link] = {}
    load = dict.fromkeys(links, 0.0)
    signals = plan.schedule.c if isinstance(plan.schedule, HoldSchedule) else 1  # a sample
    for edge in edges:
        a, b = sorted((host[edge.parent], host[edge.child]))
        if a != b:
            crossing[edge.name] = links[a, b]
            load[a, b] += signals * sizes[edge.name] / links[a, b].bytes_per_second
    period = max([*_busy(plan, placement, costs), *load.values()])
    tick = period / plan.schedule.c
    alone = _bundle(plan)
    needs = {
        name: alone + math.ceil(MARGIN * link.of(sizes[name]) / tick)
        for name, link in crossing.items()
    }
    delays = {e.name: needs.get(e.name, 1) for e in edges}
    return _lessened(plan, delays, needs) if isinstance(plan.schedule, PulseSchedule) else delays


def _bundle(plan: Plan) -> int:
    bundle = plan.engine.bundle
    return bundle if isinstance(bundle, int) else 1


def _busy(plan: Plan, placement: Sequence[Sequence[str]], costs: Costs) -> list[float]:
    """Return the seconds a sample takes each actor: its blocks' work, and their signals."""
    places = {name: i for i, name in enumerate(plan.graph.blocks)}
    found = []
    for blocks in placement:
        own = {places[name] for name in blocks}
        work = sum(costs.seconds[i] for i in own)
        found.append(work + sum(s for i, j, s in costs.crossings if (i in own) != (j in own)))
    return found


def _lessened(plan: Plan, delays: dict[str, int], needs: Mapping[str, int]) -> dict[str, int]:
    """Return `delays` with 1 wherever the depths, which follow from the others, leave the time."""
    for name in sorted(delays):
        if delays[name] == 1:
            continue
        fewer = {**delays, name: 1}
        graph = delayed(plan.graph, fewer)
        depths = graph.depths
        spans = {
            e.name: depths[e.child] - depths[e.parent] for e in graph.edges if not e.from_input
        }
        if all(spans[edge] >= need for edge, need in needs.items()):
            delays = fewer
    return delays


def _bytes(plan: Plan, edge: Edge) -> int:
    shape, dtype = plan.shapes[edge.parent]
    return math.prod(shape) * dtype.itemsize
