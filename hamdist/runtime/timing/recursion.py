"""A run on a cluster, period by period, where every resource has its order of work (max-plus).

    x_i(p) = w_i(p) + max( x_before(i)(p),  max over arcs j -> i of  arrival_ji(p) )
    arrival_ji(p) = max( x_j(p - periods) + seconds_ji(p),  arrival_ji(p - 1) )

with drawn seconds: signals of one channel never overtake each other (TCP). Within a period, the
activities fall into layers, in which none waits for another but for those before it on its own
resource; a layer is computed at once, its chains side by side, place by place, or where they are
long each by a running maximum of arrival minus work done before. No queue of events is needed.
Where links are shared or processors are too few, the order is not known beforehand: `events.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from hamdist.runtime.timing.cycle_ratio import Reals
from hamdist.runtime.timing.disturbances import Disturbances
from hamdist.runtime.timing.timed_graph import TimedArc, TimedGraph

ROWS = 256  # periods whose times are drawn, and kept, at once
SHORT = 8  # chains up to this length are done place by place


class _Layer:
    """Activities of one layer, and the arcs into them.

    Args:
        chains: runs of activities of one resource each, the longest first.
        place: of each activity in a row of times.
        work: seconds of each activity.
        into: the arcs into each activity, at least one.
        most: periods that a window holds before the present one.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[int]],
        place: Mapping[int, int],
        work: Sequence[float],
        into: Mapping[int, Sequence[TimedArc]],
        most: int,
    ) -> None:
        self.short = len(chains[0]) <= SHORT
        order = layer_order(chains)
        self.begin = place[order[0]]
        self.end = self.begin + len(order)
        self.work = np.array([work[i] for i in order])
        # The first arc into each activity, then the second of those that have one, ...
        slots = [
            [i for i in order if len(into[i]) > k] for k in range(max(map(len, into.values())))
        ]
        self.arcs = [into[i][k] for k, slot in enumerate(slots) for i in slot]
        n = len(place)
        self.source = np.array(
            [(most - a.periods) * n + place[a.source] for a in self.arcs], np.intp
        )
        self.seconds = np.array([a.seconds for a in self.arcs])
        self.slots = [np.array([place[i] - self.begin for i in slot]) for slot in slots[1:]]
        self.heads = np.array([place[chain[0]] - self.begin for chain in chains])
        self.counts = [sum(len(c) > k for c in chains) for k in range(len(chains[0]))]
        if not self.short:
            lengths = [len(chain) for chain in chains]
            done = np.cumsum(self.work)
            self.before = done - self.work - np.repeat((done - self.work)[self.heads], lengths)
            self.after = self.before + self.work
            self.chain = np.repeat(np.arange(len(chains)), lengths)

    def ends(self, window: Reals, seconds: Reals, floor: Reals | None, lost: Reals | None) -> Reals:
        """Return the end times.

        Args:
            window: of the activities in the periods before and this one, flat.
            seconds: of the arcs.
            floor: arrivals that these may not overtake, if any vary; receives the arrivals.
            lost: seconds that each chain loses before its first activity.
        """
        arrivals = window[self.source]
        arrivals += seconds
        if floor is not None:
            arrivals = np.maximum(arrivals, floor, out=floor)
        end = len(self.work)
        ready = arrivals[:end] if floor is None else arrivals[:end].copy()
        for slot in self.slots:
            begin, end = end, end + len(slot)
            ready[slot] = np.maximum(ready[slot], arrivals[begin:end])
        np.maximum(ready, 0.0, out=ready)
        if lost is not None:
            ready[self.heads] += lost
        return self._short(ready) if self.short else self._long(ready)

    def _short(self, ready: Reals) -> Reals:
        ready[: self.counts[0]] += self.work[: self.counts[0]]
        before = begin = 0
        for most, count in zip(self.counts, self.counts[1:], strict=False):
            before, begin = begin, begin + most
            own = ready[begin : begin + count]
            np.maximum(own, ready[before : before + count], out=own)
            own += self.work[begin : begin + count]
        return ready

    def _long(self, ready: Reals) -> Reals:
        """A running maximum for all chains: a later one's values are lifted above an earlier's."""
        ready -= self.before
        low = ready.min()
        lift = self.chain * (ready.max() - low + 1.0) - low
        ready += lift
        np.maximum.accumulate(ready, out=ready)
        ready -= lift
        ready += self.after
        return ready


def layer_order(chains: Sequence[Sequence[int]]) -> list[int]:
    """Return the activities of a layer in order: place by place, or chain by chain if long."""
    if len(chains[0]) > SHORT:
        return [i for chain in chains for i in chain]
    return [c[k] for k in range(len(chains[0])) for c in chains if len(c) > k]


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
        layers = [sorted(runs[depth], key=len, reverse=True) for depth in sorted(runs)]
        order = [i for chains in layers for i in layer_order(chains)]
        place = {i: k for k, i in enumerate(order)}
        self._n = len(order)
        self._layers = [
            _Layer(c, place, timed.work, {i: into[i] for own in c for i in own}, self._most)
            for c in layers
        ]
        self._owners = [np.array([timed.owner[c[0]] for c in chains]) for chains in layers]
        self._lasts = np.array([place[chain[-1]] for chain in timed.chains])

    def run(self, periods: int) -> Reals:
        """Return when each resource has done its part of each period, (periods, resources)."""
        n, most, disturbances = self._n, self._most, self._disturbances
        flat = np.full((most + ROWS) * n, -np.inf)  # (nothing is awaited before the start)
        ends = np.empty((periods, len(self._lasts)))
        drawn = [disturbances.delays(layer.arcs) for layer in self._layers]
        floors = [
            None if draw is None else np.full(len(layer.arcs), -np.inf)
            for layer, draw in zip(self._layers, drawn, strict=True)
        ]
        for begin in range(0, periods, ROWS):
            rows = min(ROWS, periods - begin)
            seconds = [
                np.broadcast_to(layer.seconds, (rows, len(layer.arcs)))
                if draw is None
                else draw(rows)
                for layer, draw in zip(self._layers, drawn, strict=True)
            ]
            for row in range(rows):
                window = flat[row * n : (row + most + 1) * n]
                now = window[most * n :]
                period = begin + row
                lost = disturbances.lost(period, ends[period - 1] if period else None)
                for layer, floor, own, owners in zip(
                    self._layers, floors, seconds, self._owners, strict=True
                ):
                    gone = None if lost is None else lost[owners]
                    now[layer.begin : layer.end] = layer.ends(window, own[row], floor, gone)
                    if lost is not None:
                        lost[owners] = 0.0  # (once a period)
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
