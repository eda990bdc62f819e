"""Two simulations of a run on a cluster.

`Recursion`: period by period, where every resource has its order of work (max-plus).

    x_i(p) = w_i(p) + max( x_before(i)(p),  max over arcs j -> i of  x_j(p - k_ji) + s_ji(p) )

with periods k and drawn seconds s. (A signal that would overtake another of its channel, which TCP
forbids, gains nothing: its receiver takes them in order.) Within a period, the activities fall into
layers, in which none waits for another but for those before it on its own resource; a layer is
computed at once, all its chains by one running maximum of arrival minus work done before. No queue
of events is needed.

`EventSimulation`: event by event, where links are shared or processors are too few, so that the
order is not known beforehand. Jobs that run share what they need by max-min fairness (Bertsekas and
Gallager 1992, section 6.5.2): actors the processors of their host, at most one each, as the
system's scheduler does; transfers the bandwidth of a link and of a host's way up and down, as TCP
does roughly. Everything else is as in `Recursion`, which is much faster, and gives the same times
where nothing is shared.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from hamdist.runtime.timing.cycle_ratio import Reals
from hamdist.runtime.timing.disturbances import Disturbances
from hamdist.runtime.timing.timed_graph import TimedArc, TimedGraph

ROWS = 256  # periods whose times are drawn, and kept, at once


class _Layer:
    """Runs of activities of one resource each, and the arcs into them (each activity has one)."""

    def __init__(
        self,
        chains: Sequence[Sequence[int]],
        timed: TimedGraph,
        place: Mapping[int, int],
        into: Mapping[int, Sequence[TimedArc]],
        most: int,
        disturbances: Disturbances,
    ) -> None:
        order = [i for chain in chains for i in chain]
        self.owners = [timed.owner[chain[0]] for chain in chains]
        self.begin, self.end = place[order[0]], place[order[-1]] + 1
        # The first arc into each activity, then the second of those that have one, ...
        most_arcs = max(len(into[i]) for i in order)
        slots = [[i for i in order if len(into[i]) > k] for k in range(most_arcs)]
        self.arcs = [into[i][k] for k, slot in enumerate(slots) for i in slot]
        self.outages = disturbances.outages(self.arcs)
        n = len(place)
        self.source = np.array([(most - a.periods) * n + place[a.source] for a in self.arcs])
        self.seconds = np.array([a.seconds for a in self.arcs])
        self.slots = [np.array([place[i] - self.begin for i in slot]) for slot in slots[1:]]
        self.heads = np.array([place[chain[0]] - self.begin for chain in chains])
        lengths = [len(chain) for chain in chains]
        work = np.array([timed.work[i] for i in order])
        done = np.cumsum(work)
        self.before = done - work - np.repeat((done - work)[self.heads], lengths)
        self.after = self.before + work
        self.chain = np.repeat(np.arange(len(chains)), lengths)

    def ends(self, window: Reals, seconds: Reals, lost: Reals | None) -> Reals:
        """Return the end times of `window`, the activities of the periods before and this one.

        seconds: of the arcs; lost: by each resource before its first activity.
        """
        arrivals: Reals = window[self.source]
        for places, outages in self.outages:
            arrivals[places] = outages.left(arrivals[places])
        arrivals += seconds
        end = len(self.chain)
        ready: Reals = np.maximum(arrivals[:end], 0.0)
        for slot in self.slots:
            begin, end = end, end + len(slot)
            ready[slot] = np.maximum(ready[slot], arrivals[begin:end])
        if lost is not None:
            ready[self.heads] += lost[self.owners]
        ready -= self.before  # a later chain's values are lifted above those of an earlier one
        low = ready.min()
        lift = self.chain * (ready.max() - low + 1.0) - low
        ready += lift
        np.maximum.accumulate(ready, out=ready)
        ready -= lift
        ready += self.after
        return ready


class Recursion:
    """Simulates a `TimedGraph` whose resources are not shared."""

    def __init__(self, timed: TimedGraph, disturbances: Disturbances) -> None:
        self._disturbances = disturbances
        arcs = list(timed.arcs)
        for chain in timed.chains:  # each follows the one before, the first one the period before
            arcs.append(TimedArc(chain[-1], chain[0], 1))
            arcs += [TimedArc(a, b, 0) for a, b in pairwise(chain)]
        self._most = max(1, *(arc.periods for arc in arcs))
        level = _levels(timed, arcs)
        into: dict[int, list[TimedArc]] = {i: [] for i in level}
        for arc in arcs:
            if arc.periods or level[arc.source] != level[arc.target]:
                into[arc.target].append(arc)
        runs: dict[int, list[list[int]]] = defaultdict(list)
        for chain in timed.chains:
            for depth in sorted({level[i] for i in chain}):
                runs[depth].append([i for i in chain if level[i] == depth])
            for i in chain:  # (an arc that is implied, where there is no other)
                into[i] = into[i] or [TimedArc(chain[-1], i, 1)]
        layers = [runs[depth] for depth in sorted(runs)]
        place = {
            i: k for k, i in enumerate(i for layer in layers for chain in layer for i in chain)
        }
        self._n = len(place)
        self._layers = [
            _Layer(layer, timed, place, into, self._most, disturbances) for layer in layers
        ]
        self._lasts = np.array([place[chain[-1]] for chain in timed.chains])

    def run(self, periods: int) -> Reals:
        """Return when each resource has done its part of each period, (periods, resources)."""
        n, most, disturbances = self._n, self._most, self._disturbances
        flat = np.full((most + ROWS) * n, -np.inf)  # (nothing is awaited before the start)
        ends = np.empty((periods, len(self._lasts)))
        drawn = [disturbances.delays(layer.arcs) for layer in self._layers]
        for begin in range(0, periods, ROWS):
            rows = min(ROWS, periods - begin)
            seconds = [None if draw is None else draw(rows) for draw in drawn]
            for row in range(rows):
                window = flat[row * n : (row + most + 1) * n]
                now, period = window[most * n :], begin + row
                lost = disturbances.lost(period, ends[period - 1] if period else None)
                for layer, measured in zip(self._layers, seconds, strict=True):
                    spent = layer.seconds if measured is None else measured[row]
                    now[layer.begin : layer.end] = layer.ends(window, spent, lost)
                    if lost is not None:
                        lost[layer.owners] = 0.0  # (once a period)
                ends[period] = now[self._lasts]
            flat[: most * n] = flat[rows * n : (rows + most) * n].copy()
        return ends


def _levels(timed: TimedGraph, arcs: Sequence[TimedArc]) -> dict[int, int]:
    """Return the layer of each activity: one behind those of its own period that it waits for, but
    for those on its own resource."""
    behind: dict[int, list[int]] = defaultdict(list)
    waits = dict.fromkeys(range(len(timed.owner)), 0)
    for arc in arcs:
        if not arc.periods:
            behind[arc.source].append(arc.target)
            waits[arc.target] += 1
    level = dict.fromkeys(waits, 0)
    ready = [i for i, number in waits.items() if not number]
    for i in ready:
        for other in behind[i]:
            level[other] = max(level[other], level[i] + (timed.owner[i] != timed.owner[other]))
            waits[other] -= 1
            if not waits[other]:
                ready.append(other)
    return level


# -- event by event --------------------------------------------------------------------------------


BLOCK = 64  # periods whose delays are drawn at once
_Job = tuple[int, int]  # activity, period
_Part = tuple[str, int, int]  # of what is shared: kind and host, or two hosts


class _Shares:
    """Jobs that run at fair rates on shared parts of the cluster."""

    def __init__(self, timed: TimedGraph) -> None:
        self._timed = timed
        self._left: dict[_Job, float] = {}  # seconds of a processor, or bytes
        self._rates: dict[_Job, float] = {}
        self._now = 0.0

    def advance(self, now: float) -> None:
        for job, rate in self._rates.items():
            self._left[job] -= rate * (now - self._now)
        self._now = now

    def start(self, job: _Job, amount: float) -> None:
        self._left[job] = amount
        self._share()

    def finish(self) -> _Job:
        job = min(self._rates, key=lambda job: self._left[job] / self._rates[job])
        del self._left[job]
        self._share()
        return job

    def next(self) -> float:
        """Return when the first job ends if none begins before."""
        left = (self._left[job] / rate for job, rate in self._rates.items())
        return self._now + max(0.0, min(left, default=math.inf))

    def _parts(self, job: _Job) -> list[tuple[_Part, float]]:
        """Return what a job needs, with the capacity of each."""
        way, cluster = self._timed.transfers.get(job[0]), self._timed.cluster
        if way is None:
            host = self._timed.resources[self._timed.owner[job[0]]].host
            return [(("core", *job), 1.0), (("cores", host, 0), cluster.hosts[host].cores)]
        pair = (way.sender, way.receiver)
        return [
            (("link", *pair), cluster.link(*pair).bytes_per_second),
            (("up", way.sender, 0), cluster.hosts[way.sender].up),
            (("down", way.receiver, 0), cluster.hosts[way.receiver].down),
        ]

    def _share(self) -> None:
        """Raise the rates of all jobs equally until a part is full, then those of the others."""
        users: dict[_Part, set[_Job]] = defaultdict(set)
        room: dict[_Part, float] = {}
        for job in self._left:
            for part, capacity in self._parts(job):
                users[part].add(job)
                room[part] = capacity
        self._rates = {}
        while len(self._rates) < len(self._left):
            fair = {part: room[part] / len(jobs) for part, jobs in users.items() if jobs}
            full = min(fair, key=fair.__getitem__)
            for job in list(users[full]):
                self._rates[job] = fair[full]
                for part, _ in self._parts(job):
                    users[part].discard(job)
                    room[part] -= fair[full]


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
        self._outages = {
            int(k): outages for at, outages in disturbances.outages(self._arcs) for k in at
        }
        hosts = timed.cluster.hosts
        self._crowded = {h for h, actors in timed.actors_of.items() if len(actors) > hosts[h].cores}
        self._shares = _Shares(timed)
        self._heap: list[tuple[float, int, int, int]] = []  # time, 0: done or 1: arrived, job
        self._missing: dict[_Job, int] = {}
        self._next = [(0, 0)] * len(timed.chains)  # of each resource: place in its chain, period
        self._ends = np.zeros((0, len(timed.chains)))

    def run(self, periods: int) -> Reals:
        """Return when each resource has done its part of each period, (periods, resources)."""
        timed, shares = self._timed, self._shares
        self._ends = np.zeros((periods, len(timed.chains)))
        for resource in range(len(timed.chains)):
            self._begin(resource, 0.0)
        for i, owner in enumerate(timed.owner):
            if owner < 0 and not self._waits(i, 0):
                shares.start((i, 0), timed.transfers[i].nbytes)
        while True:
            first = shares.next()
            now = min(first, self._heap[0][0] if self._heap else math.inf)
            if now == math.inf:
                return self._ends
            shares.advance(now)
            if now == first:
                self._done(*shares.finish(), now)
                continue
            _, arrived, i, period = heapq.heappop(self._heap)
            (self._arrived if arrived else self._done)(i, period, now)

    def _waits(self, i: int, period: int) -> int:
        if (i, period) not in self._missing:
            waits = sum(self._arcs[k].periods <= period for k in self._into[i])
            self._missing[i, period] = waits
        return self._missing[i, period]

    def _begin(self, resource: int, now: float) -> None:
        """Begin the resource's next activity, if what it waits for has come."""
        place, period = self._next[resource]
        i = self._timed.chains[resource][place]
        if period == len(self._ends) or self._waits(i, period):
            return
        del self._missing[i, period]
        host = self._timed.resources[resource].host
        lost = self._disturbances.lost_by(resource, period, now) if host >= 0 and not place else 0.0
        if host in self._crowded:
            self._shares.start((i, period), self._timed.work[i] + lost)
        else:
            heapq.heappush(self._heap, (now + self._timed.work[i] + lost, 0, i, period))

    def _done(self, i: int, period: int, now: float) -> None:
        for k in self._out[i]:
            arc = self._arcs[k]
            left = self._outages[k].left(np.array([now]))[0] if k in self._outages else now
            when = float(left) + self._seconds(k, period + arc.periods)
            heapq.heappush(self._heap, (when, 1, arc.target, period + arc.periods))
        resource = self._timed.owner[i]
        if resource < 0:
            return
        place, _ = self._next[resource]
        last = place == len(self._timed.chains[resource]) - 1
        if last:
            self._ends[period, resource] = now
        self._next[resource] = (0, period + 1) if last else (place + 1, period)
        self._begin(resource, now)

    def _arrived(self, i: int, period: int, now: float) -> None:
        self._missing[i, period] = self._waits(i, period) - 1
        resource = self._timed.owner[i]
        if resource >= 0:
            place, at = self._next[resource]
            if (self._timed.chains[resource][place], at) == (i, period):
                self._begin(resource, now)
        elif not self._missing[i, period]:
            del self._missing[i, period]
            self._shares.start((i, period), self._timed.transfers[i].nbytes)

    def _seconds(self, k: int, period: int) -> float:
        if self._draw is None:
            return self._arcs[k].seconds
        block, row = divmod(period, BLOCK)
        if block not in self._drawn:
            self._drawn[block] = self._draw(BLOCK)
            self._drawn.pop(block - 8, None)
        return float(self._drawn[block][row, k])
