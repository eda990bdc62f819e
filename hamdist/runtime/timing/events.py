"""A run on a cluster event by event: where actors share processors, and transfers share links.

The processors of a host with more runnable actors than cores are shared equally among them, as the
system's scheduler does; the bandwidth of links, and of a host's way up and down, is shared by
max-min fairness (Bertsekas and Gallager 1992, section 6.5.2), as TCP does roughly. Everything else
is as in `recursion.py`, which is much faster, and gives the same times where nothing is shared.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict

import numpy as np

from hamdist.runtime.timing.cycle_ratio import Reals
from hamdist.runtime.timing.disturbances import Disturbances
from hamdist.runtime.timing.timed_graph import TimedArc, TimedGraph, Transfer

BLOCK = 64  # periods whose delays are drawn at once
_Job = tuple[int, int]  # activity, period


class _Processors:
    """The jobs of one host: each progresses at the same rate, min(1, cores / jobs)."""

    def __init__(self, cores: float) -> None:
        self._cores = cores
        self._jobs: list[tuple[float, _Job]] = []
        self._progress = self._now = 0.0

    def _rate(self) -> float:
        return min(1.0, self._cores / max(1, len(self._jobs)))

    def advance(self, now: float) -> None:
        self._progress += (now - self._now) * self._rate()
        self._now = now

    def start(self, job: _Job, seconds: float) -> None:
        heapq.heappush(self._jobs, (self._progress + seconds, job))

    def next(self) -> float:
        """Return when the first job ends if none begins before."""
        if not self._jobs:
            return math.inf
        return self._now + max(0.0, self._jobs[0][0] - self._progress) / self._rate()

    def finished(self) -> _Job:
        return heapq.heappop(self._jobs)[1]


class _Wires:
    """The transfers under way on shared links."""

    def __init__(self, timed: TimedGraph) -> None:
        self._cluster = timed.cluster
        self._left: dict[_Job, float] = {}
        self._routes: dict[_Job, list[tuple[str, int, int]]] = {}
        self._rates: dict[_Job, float] = {}
        self._now = 0.0

    def advance(self, now: float) -> None:
        for job, rate in self._rates.items():
            self._left[job] -= rate * (now - self._now)
        self._now = now

    def start(self, job: _Job, way: Transfer) -> None:
        self._left[job] = float(way.nbytes)
        pair = ("link", way.sender, way.receiver)
        self._routes[job] = [pair, ("up", way.sender, 0), ("down", way.receiver, 0)]
        self._share()

    def _capacity(self, part: tuple[str, int, int]) -> float:
        kind, first, second = part
        if kind == "link":
            return self._cluster.link(first, second).bytes_per_second
        return getattr(self._cluster.hosts[first], kind)  # type: ignore[no-any-return]

    def _share(self) -> None:
        """Give all transfers the same rate until a part of the network is full, and so on."""
        parts: dict[tuple[str, int, int], set[_Job]] = defaultdict(set)
        for job, route in self._routes.items():
            for part in route:
                parts[part].add(job)
        room = {part: self._capacity(part) for part in parts}
        self._rates = {}
        while len(self._rates) < len(self._routes):
            fair = {part: room[part] / len(jobs) for part, jobs in parts.items() if jobs}
            full = min(fair, key=fair.__getitem__)
            for job in list(parts[full]):
                self._rates[job] = fair[full]
                for part in self._routes[job]:
                    parts[part].discard(job)
                    room[part] -= fair[full]

    def next(self) -> float:
        """Return when the first transfer ends if none begins before."""
        left = (self._left[job] / rate for job, rate in self._rates.items())
        return self._now + max(0.0, min(left, default=math.inf))

    def finished(self) -> _Job:
        job = min(self._rates, key=lambda job: self._left[job] / self._rates[job])
        del self._left[job], self._routes[job]
        self._share()
        return job


class EventSimulation:
    """Simulates a `TimedGraph` with shared processors and links."""

    def __init__(self, timed: TimedGraph, disturbances: Disturbances) -> None:
        self._timed = timed
        self._disturbances = disturbances
        alone = [TimedArc(i, i, 1) for i, owner in enumerate(timed.owner) if owner < 0]
        self._arcs = [*timed.arcs, *alone]
        self._out: dict[int, list[int]] = defaultdict(list)
        self._into: dict[int, list[int]] = defaultdict(list)
        for k, arc in enumerate(self._arcs):
            self._out[arc.source].append(k)
            self._into[arc.target].append(k)
        self._draw = disturbances.delays(self._arcs)
        self._drawn: dict[int, Reals] = {}
        self._came = np.full(len(self._arcs), -np.inf)
        hosts = timed.cluster.hosts
        self._processors = {
            host: _Processors(hosts[host].cores)
            for host, actors in timed.actors_of.items()
            if len(actors) > hosts[host].cores
        }
        self._wires = _Wires(timed)
        self._heap: list[tuple[float, int, int, int]] = []  # time, 0: done, 1: arrived, job
        self._missing: dict[_Job, int] = {}
        self._next = [(0, 0)] * len(timed.chains)  # of each resource: place in its chain, period

    def run(self, periods: int) -> Reals:
        """Return when each resource has done its part of each period, (periods, resources)."""
        timed = self._timed
        ends = np.zeros((periods, len(timed.chains)))
        for resource in range(len(timed.chains)):
            self._begin(resource, 0.0, periods)
        for i, owner in enumerate(timed.owner):
            if owner < 0 and not self._waits(i, 0):
                self._wires.start((i, 0), timed.transfers[i])
        sharers: list[_Processors | _Wires] = [*self._processors.values(), self._wires]
        while True:
            times = [sharer.next() for sharer in sharers]
            first = min(times)
            now = min(first, self._heap[0][0] if self._heap else math.inf)
            if now == math.inf:
                return ends
            for sharer in sharers:
                sharer.advance(now)
            if now == first:
                i, period = sharers[times.index(first)].finished()
                self._done(i, period, now, ends)
            else:
                _, kind, i, period = heapq.heappop(self._heap)
                if kind:
                    self._arrived(i, period, now, periods)
                else:
                    self._done(i, period, now, ends)

    def _waits(self, i: int, period: int) -> int:
        job = (i, period)
        if job not in self._missing:
            self._missing[job] = sum(self._arcs[k].periods <= period for k in self._into[i])
        return self._missing[job]

    def _begin(self, resource: int, now: float, periods: int) -> None:
        """Begin the resource's next activity, if what it waits for has come."""
        place, period = self._next[resource]
        if period == periods:
            return
        i = self._timed.chains[resource][place]
        if self._waits(i, period):
            return
        del self._missing[i, period]
        host = self._timed.resources[resource].host
        lost = self._disturbances.lost_by(resource, period, now) if host >= 0 and not place else 0.0
        if host in self._processors:
            self._processors[host].start((i, period), self._timed.work[i] + lost)
        else:
            heapq.heappush(self._heap, (now + self._timed.work[i] + lost, 0, i, period))

    def _done(self, i: int, period: int, now: float, ends: Reals) -> None:
        for k in self._out[i]:
            arc = self._arcs[k]
            when = max(now + self._seconds(k, period + arc.periods), float(self._came[k]))
            self._came[k] = when
            heapq.heappush(self._heap, (when, 1, arc.target, period + arc.periods))
        resource = self._timed.owner[i]
        if resource < 0:
            return
        chain, (place, _) = self._timed.chains[resource], self._next[resource]
        last = place == len(chain) - 1
        if last:
            ends[period, resource] = now
        self._next[resource] = (0, period + 1) if last else (place + 1, period)
        self._begin(resource, now, len(ends))

    def _arrived(self, i: int, period: int, now: float, periods: int) -> None:
        self._missing[i, period] = self._waits(i, period) - 1
        resource = self._timed.owner[i]
        if resource < 0:
            if not self._missing[i, period]:
                del self._missing[i, period]
                self._wires.start((i, period), self._timed.transfers[i])
        elif self._next[resource] == (self._timed.chains[resource].index(i), period):
            self._begin(resource, now, periods)

    def _seconds(self, k: int, period: int) -> float:
        if self._draw is None:
            return self._arcs[k].seconds
        block, row = divmod(period, BLOCK)
        if block not in self._drawn:
            self._drawn[block] = self._draw(BLOCK)
            self._drawn.pop(block - 8, None)
        return float(self._drawn[block][row, k])
