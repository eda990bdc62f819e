"""A run on a cluster, period by period, where every resource has its order of work (max-plus).

    x_i(p) = w_i(p) + max( x_before(i)(p),  max over arcs j -> i of  x_j(p - k_ji) + s_ji(p) )

with periods k and drawn seconds s. (A signal that would overtake another of its channel, which TCP
forbids, gains nothing: its receiver takes them in order.) Within a period, the activities fall into
layers, in which none waits for another but for those before it on its own resource; a layer is
computed at once, all its chains by one running maximum of arrival minus work done before. No queue
of events is needed. Where links are shared or processors are too few, the order is not known
beforehand: `events.py`.
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
