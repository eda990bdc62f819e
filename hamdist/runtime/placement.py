"""Which process hosts which blocks. It changes no number, only time and memory.

Neighbours in the order of the graph share an actor. What a sample costs:

    busy(a, b)  = seconds of blocks a ... b-1, + those of every exchange that leaves them
    latency     = sum of busy over all actors: one sample's way through the network and back
    T           = max(max over actors of busy, latency / in flight)        seconds a sample

The first term says that no actor is faster than its work; the second is Little's law: with k
samples in the network at once, no more than k leave it in the time that one of them takes. At
level `backprop` k = 1, so nothing is gained by a second actor.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hamdist.config import EngineSettings
from hamdist.dynamics.balance import balanced
from hamdist.dynamics.graph import Graph
from hamdist.errors import SettingsError
from hamdist.runtime.demands import apart, demand, wishes

# `auto` takes a further actor, which costs 170 MiB, where it saves at least this part of T; and a
# cut that is better by less is as good.
WORTH = 0.05


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one sample. seconds: the work of each block, in the graph's order. crossings: (i, j, s):
    each of the two actors that host the blocks i < j spends s seconds on the signals between them.
    in_flight: samples that the schedule has in the network at once. apart: pairs of blocks that
    cannot share an actor."""

    seconds: tuple[float, ...]
    crossings: tuple[tuple[int, int, float], ...] = ()
    in_flight: float = math.inf
    apart: tuple[tuple[int, int], ...] = ()

    def busy(self, first: int, end: int) -> float:
        """Seconds a sample takes the actor with the blocks first ... end - 1."""
        inside = range(first, end)
        if any(i in inside and j in inside for i, j in self.apart):
            return math.inf
        return sum(self.seconds[first:end]) + sum(
            s for i, j, s in self.crossings if (i in inside) != (j in inside)
        )

    def of(self, starts: Sequence[int]) -> float:
        """T with actors whose first blocks are `starts`."""
        ends = [*starts[1:], len(self.seconds)]
        busy = [self.busy(a, b) for a, b in zip(starts, ends, strict=True)]
        return max(max(busy), sum(busy) / self.in_flight)


def split(costs: Costs, parts: int) -> list[int]:
    """The first blocks of `parts` actors with the least T.

    For a bound on the busiest actor the least latency follows by dynamic programming over the last
    cut; it falls as the bound rises, so the best bound is where both terms of T meet.
    """
    n = len(costs.seconds)
    busy = [[costs.busy(a, b) if a < b else 0.0 for b in range(n + 1)] for a in range(n)]

    def within(bound: float) -> list[int] | None:
        best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for part in range(1, parts + 1):
            row = {}
            for end in range(part, n - (parts - part) + 1):
                ways = [
                    (so_far + busy[start][end], start)
                    for start, (so_far, _) in best[-1].items()
                    if start < end and busy[start][end] <= bound
                ]
                if ways:
                    row[end] = min(ways)
            best.append(row)
        if n not in best[-1]:
            return None
        starts, end = [], n
        for part in range(parts, 0, -1):
            end = best[part][end][1]
            starts.append(end)
        return starts[::-1]

    times = {busy[a][b] for a in range(n) for b in range(a + 1, n + 1)}
    bounds = sorted(time for time in times if math.isfinite(time))

    def latency(bound: float) -> float:
        starts = within(bound)
        if starts is None:
            return math.inf
        return sum(busy[a][b] for a, b in zip(starts, [*starts[1:], n], strict=True))

    # The first bound at which the busiest actor, and no more the latency, decides: T is least there
    # or one bound before, where a less busy actor may come with the same latency.
    meet = bisect_left(bounds, True, key=lambda bound: latency(bound) / costs.in_flight <= bound)
    near = bounds[max(0, meet - 1) : meet + 1]
    least = latency(near[0])
    near[0] = bounds[bisect_left(bounds, True, key=lambda bound: latency(bound) <= least)]
    found = [starts for bound in near for starts in [within(bound)] if starts is not None]
    return min(found, key=costs.of)


def choose(costs: Costs, most: int) -> list[int]:
    """The first blocks of 1 to `most` actors with the least T; a further actor has to be `WORTH`
    it."""
    best = [0]
    blocks = len(costs.seconds)
    for parts in range(max(2, len(_segments(blocks, costs.apart))), min(most, blocks) + 1):
        starts = split(costs, parts)
        if costs.of(starts) < (1 - WORTH) * costs.of(best):
            best = starts
    return best


def place(
    graph: Graph, engine: EngineSettings, cpus: int, costs: Costs | None = None
) -> list[list[str]]:
    """The blocks of each actor: as `engine.placement` says, or runs of neighbouring blocks with
    the least time a sample by `costs`; without them, and where that is as good, with about equally
    many parameters, which no noise of a measurement moves from run to run. `auto` chooses the
    number of actors, at most as many as processors have room for their threads.

    Raises SettingsError for more actors than blocks, and for a placement that leaves a block out,
    names an unknown one, or one twice; for blocks of one actor that ask for different things.
    """
    names = list(graph.blocks)
    asked = wishes(graph, engine)
    if engine.placement is not None:
        groups = _explicit(names, engine.placement)
        for group in groups:
            demand(group, asked, engine)
        return groups
    pairs = apart(asked)
    least = _segments(len(names), pairs)
    most = max(len(least), min(len(names), max(1, cpus // engine.threads)))
    actors = most if engine.actors == "auto" else engine.actors
    if actors > len(names):
        raise SettingsError(
            f"engine.actors: {actors} actors for {len(names)} blocks ({', '.join(names)}); use at "
            f"most {len(names)}, or cut the model into more blocks (partition.blocks)"
        )
    if actors < len(least):
        demand(names[least[actors - 1] : least[actors] + 1], asked, engine)  # says who contradict
    if pairs:
        costs = replace(costs or Costs(tuple(by_parameters(graph))), apart=pairs)
    if costs is None:
        starts = balanced(by_parameters(graph), actors)
    else:
        starts = choose(costs, most) if engine.actors == "auto" else split(costs, actors)
        steady = balanced(by_parameters(graph), len(starts))
        if costs.of(steady) <= (1 + WORTH) * costs.of(starts):
            starts = steady
    ends = [*starts[1:], len(names)]
    return [names[a:b] for a, b in zip(starts, ends, strict=True)]


def _segments(blocks: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The first blocks of as few actors as keep the blocks of all `pairs` apart: each goes on as
    long as it can."""
    starts = [0]
    for j in range(blocks):
        if any(i >= starts[-1] and last == j for i, last in pairs):
            starts.append(j)
    return starts


def by_parameters(graph: Graph) -> list[float]:
    """What stands for the work of a block where it was not measured."""
    return [
        1.0 + sum(p.numel() for p in block.module.parameters()) for block in graph.blocks.values()
    ]


def _explicit(names: list[str], placement: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    placed = [name for group in placement for name in group]
    for name in placed:
        if name not in names:
            raise SettingsError(
                f"engine.placement: unknown block {name!r}; the blocks are {', '.join(names)}"
            )
        if placed.count(name) > 1:
            raise SettingsError(f"engine.placement: block {name!r} stands there twice")
    missing = [name for name in names if name not in placed]
    if missing:
        raise SettingsError(
            f"engine.placement: no actor for {', '.join(missing)}; place every block"
        )
    if not all(placement):
        raise SettingsError("engine.placement: an actor without blocks; remove it")
    return [[name for name in names if name in group] for group in placement]
