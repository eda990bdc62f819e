"""Assigns blocks to processes. The assignment changes no number, only time and memory.

Neighbours in the order of the graph share an actor. Candidates come from two bounds of the time
that a sample takes:

    busy(a, b)  = seconds of blocks a ... b-1, + those of every exchange that leaves them
    latency     = sum of busy over all actors: one sample's way through the network and back
    T           = max(max over actors of busy, latency / in flight)        seconds a sample

The first term says that no actor is faster than its work; the second is Little's law: with k
samples in the network at once, no more than k leave it in the time that one of them takes. At
level `backprop` k = 1, so nothing is gained by a second actor; at level `pipeline` k counts the
micro-batches. Both are cycles of the timing model (runtime/timing), whose period, over all cycles,
then decides between the candidates.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hamdist.config import EngineSettings, Spread
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.partition.cuts import balanced
from hamdist.errors import SettingsError
from hamdist.runtime.placement.assign_hosts import ActorOptions, HostInfo, options_of_actors
from hamdist.runtime.placement.requirements import apart, requirements
from hamdist.runtime.plan.dtypes import block_settings
from hamdist.runtime.timing.timed_graph import TimingModel

# `auto` takes a further actor, which costs 170 MiB, where it saves at least this part of T; and a
# cut that is better by less is as good.
WORTH = 0.05
FINEST = 256  # runs of neighbours at whose ends cuts are sought, in networks of more blocks

Floats: TypeAlias = "NDArray[np.float64]"
ActorIndices: TypeAlias = "NDArray[np.intp]"


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one sample.

    Attributes:
        seconds: work of each block, in the graph's order.
        crossings: (i, j, s): each of the two actors that host the blocks i < j spends s seconds on
            the signals between them.
        in_flight: samples that the schedule has in the network at once.
        apart: pairs of blocks that cannot share an actor.
        model: of the time that a sample takes, where the steps were measured.
    """

    seconds: tuple[float, ...]
    crossings: tuple[tuple[int, int, float], ...] = ()
    in_flight: float = math.inf
    apart: tuple[tuple[int, int], ...] = ()
    model: TimingModel | None = None

    def busy(self, first: int, end: int) -> float:
        """Return the seconds that a sample takes the actor with the blocks first ... end - 1."""
        inside = range(first, end)
        if any(i in inside and j in inside for i, j in self.apart):
            return math.inf
        return sum(self.seconds[first:end]) + sum(
            s for i, j, s in self.crossings if (i in inside) != (j in inside)
        )

    def of(self, starts: Sequence[int]) -> float:
        """Return T for actors whose first blocks are `starts`."""
        ends = [*starts[1:], len(self.seconds)]
        if self.model is not None:
            names = list(self.model.plan.graph.blocks)
            groups = [names[a:b] for a, b in zip(starts, ends, strict=True)]
            if self.apart and any(
                math.isinf(self.busy(a, b)) for a, b in zip(starts, ends, strict=True)
            ):
                return math.inf
            return self.model.sample_seconds(groups)
        busy = [self.busy(a, b) for a, b in zip(starts, ends, strict=True)]
        return max(max(busy), sum(busy) / self.in_flight)

    def joined(self, firsts: Sequence[int]) -> Costs:
        """Return the costs of runs of neighbours, whose first blocks are `firsts`, as of blocks."""
        at = [bisect_right(firsts, i) - 1 for i in range(len(self.seconds))]
        seconds = np.bincount(at, self.seconds)
        pairs = [(at[i], at[j], s) for i, j, s in self.crossings if at[i] != at[j]]
        apart = tuple((at[i], at[j]) for i, j in self.apart)
        return replace(self, seconds=tuple(seconds.tolist()), crossings=tuple(pairs), apart=apart)

    def runs(self) -> list[int]:
        """Return the first blocks of FINEST runs with about equal work, at most; of all blocks
        where those are no more, or some of them cannot share an actor."""
        n = len(self.seconds)
        if n <= FINEST or self.apart:
            return [*range(n)]
        done = np.cumsum(self.seconds) - self.seconds
        steps = (done * FINEST / max(sum(self.seconds), 1e-30)).astype(int)
        return [int(first) for first in np.unique(steps, return_index=True)[1]]


class _Ways:
    """The best cuts of a row of blocks into up to `most` runs. For a bound on the busiest actor the
    least latency follows by dynamic programming over the last cut, for all numbers of runs at once.
    """

    def __init__(self, costs: Costs, most: int) -> None:
        self._costs = costs
        self._firsts = costs.runs()
        self._fewer = len(self._firsts) < len(costs.seconds)
        self._most = min(most, FINEST // 2) if self._fewer else most
        self._busy = _busy(costs.joined(self._firsts) if self._fewer else costs)
        finite = np.unique(self._busy)
        self._bounds = [float(t) for t in finite[np.isfinite(finite)]]
        self._latencies: dict[
            float, list[float]
        ] = {}  # by bound: the least latency, by number of runs

    def _rows(self, bound: float, parts: int) -> Iterator[tuple[Floats, ActorIndices]]:
        """Yield for 1 ... `parts` runs, by end, the least latency and the last run's start."""
        n = len(self._firsts)
        allowed = np.where(self._busy <= bound, self._busy, math.inf)
        latency = np.full(n + 1, math.inf)
        latency[0] = 0.0
        for _ in range(parts):
            ways = latency[:n, None] + allowed
            starts = ways.argmin(0)
            latency = ways[starts, np.arange(n + 1)]
            yield latency, starts

    def _latency(self, parts: int, bound: float) -> float:
        if bound not in self._latencies:
            rows = self._rows(bound, self._most)
            self._latencies[bound] = [float(latency[-1]) for latency, _ in rows]
        return self._latencies[bound][parts - 1]

    def _starts(self, parts: int, bound: float) -> list[int]:
        starts, end = [], len(self._firsts)
        for _, start in reversed(list(self._rows(bound, parts))):
            end = int(start[end])
            starts.append(self._firsts[end])
        return starts[::-1]

    def best(self, parts: int) -> list[int]:
        """Return the first blocks of `parts` actors with the least T. The least latency falls as
        the bound rises, so the best bound is where both terms of T meet. (Where the actors are too
        many for joined blocks, by their work alone.)"""
        if parts > self._most:
            return balanced(self._costs.seconds, parts)
        bounds, in_flight = self._bounds, self._costs.in_flight
        # The first bound at which the busiest actor, and no more the latency, decides: T is least
        # there or one bound before, where a less busy actor may come with the same latency.
        meet = bisect_left(
            bounds, True, key=lambda bound: self._latency(parts, bound) / in_flight <= bound
        )
        near = bounds[max(0, meet - 1) : meet + 1]
        least = self._latency(parts, near[0])
        near[0] = bounds[
            bisect_left(bounds, True, key=lambda bound: self._latency(parts, bound) <= least)
        ]
        starts = [self._starts(parts, b) for b in near if math.isfinite(self._latency(parts, b))]
        return min(starts, key=self._costs.of)


def _busy(costs: Costs) -> Floats:
    """Return `Costs.busy` of all runs, by first block and end; infinite for empty ones."""
    n = len(costs.seconds)
    inside: list[list[tuple[int, float]]] = [[] for _ in range(n)]  # by block: exchanges with whom
    for i, j, seconds in costs.crossings:
        inside[i].append((j, seconds))
        inside[j].append((i, seconds))
    foes: list[list[int]] = [[] for _ in range(n)]
    for i, j in costs.apart:
        foes[max(i, j)].append(min(i, j))
    busy = np.full((n, n + 1), math.inf)
    for first in range(n):
        spent = 0.0
        for block in range(first, n):
            if any(other >= first for other in foes[block]):
                break  # so do all longer ones hold both
            spent += costs.seconds[block]
            for other, seconds in inside[block]:
                spent += -seconds if first <= other < block else seconds
            busy[first, block + 1] = spent
    return busy


def split(costs: Costs, parts: int) -> list[int]:
    """Return the first blocks of `parts` actors with the least T."""
    return _Ways(costs, parts).best(parts)


def groups_of(names: Sequence[str], starts: Sequence[int], actors: int) -> list[list[str]]:
    """Return the blocks of each of so many actors, which take turns in taking runs of blocks.

    Args:
        starts: the first block of each run, as a place in `names`.
    """
    runs = [list(names[a:b]) for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    return [[name for run in runs[actor::actors] for name in run] for actor in range(actors)]


def choose(costs: Costs, most: int) -> list[int]:
    """Return the first blocks of 1 to `most` actors with the least T.

    A further actor has to reduce T by the factor `WORTH`.
    """
    best = [0]
    blocks = len(costs.seconds)
    most = min(most, blocks)
    ways = _Ways(costs, most)
    least = (1 - WORTH) * costs.of(best)
    parts = max(1, len(_segments(blocks, costs.apart)) - 1)
    while parts < most:
        parts = min(most, max(parts + 1, int(parts * (1 + WORTH))))
        if sum(costs.seconds) / parts >= least:
            continue  # even if their work could be shared out evenly
        starts = ways.best(parts)
        if costs.of(starts) < least:
            best, least = starts, (1 - WORTH) * costs.of(starts)
    return best


def place(
    graph: Graph, engine: EngineSettings, cpus: int, costs: Costs | None = None
) -> list[list[str]]:
    """Return the blocks of each actor.

    They are those of `engine.placement`, or runs of neighbouring blocks with the least time a
    sample. Without `costs`, and where that is as good, the runs have about equally many parameters,
    which no noise of a measurement moves from run to run. `auto` chooses the number of actors: at
    most as many as the `cpus` processors have room for with their threads.

    Raises:
        SettingsError: there are more actors than blocks; a placement leaves a block out, names an
            unknown one, or one twice; blocks of one actor contradict each other.
    """
    names = list(graph.blocks)
    by_block = block_settings(graph, engine)
    if engine.placement is not None:
        groups = _explicit(names, engine.placement)
        for group in groups:
            requirements(group, by_block, engine)
        return groups
    pairs = apart(by_block)
    least, runs = _segments(len(names), pairs), engine.interleave
    most = max(len(least), min(len(names) // runs, max(1, cpus // engine.threads)))
    actors = most if engine.actors == "auto" else engine.actors
    if actors * runs > len(names):
        each = f" with engine.interleave {runs}" if runs > 1 else ""
        raise SettingsError(
            f"engine.actors: {actors} actors{each} for {len(names)} blocks ({', '.join(names)}); "
            f"use at most {len(names) // runs}, or cut the model into more blocks "
            "(partition.blocks)"
        )
    if actors < len(least):
        requirements(
            names[least[actors - 1] : least[actors] + 1], by_block, engine
        )  # says who contradict
    if pairs:
        costs = replace(costs or Costs(tuple(by_parameters(graph))), apart=pairs)
    if costs is None:
        starts = balanced(by_parameters(graph), actors * runs)
    else:
        starts = choose(costs, most) if engine.actors == "auto" else split(costs, actors)
        actors = len(starts)
        starts = split(costs, actors * runs) if runs > 1 else starts
        steady = balanced(by_parameters(graph), len(starts))
        if costs.of(steady) <= (1 + WORTH) * costs.of(starts):
            starts = steady
    groups = groups_of(names, starts, actors)
    for group in groups if pairs and runs > 1 else ():
        requirements(group, by_block, engine)
    return groups


def _segments(blocks: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first blocks of as few actors as keep the blocks of all `pairs` apart. Each actor
    takes blocks as long as it can."""
    starts = [0]
    for j in range(blocks):
        if any(i >= starts[-1] and last == j for i, last in pairs):
            starts.append(j)
    return starts


def by_parameters(graph: Graph) -> list[float]:
    """Return the numbers of parameters, which stand for work that was not measured."""
    return [
        1.0 + sum(p.numel() for p in block.module.parameters()) for block in graph.blocks.values()
    ]


def options_of_groups(
    graph: Graph,
    engine: EngineSettings,
    groups: Sequence[Sequence[str]],
    hosts: Sequence[HostInfo],
    spread: Spread,
    work: Sequence[float] | None = None,
    speeds: Mapping[str, float] | None = None,
) -> list[ActorOptions]:
    """Return the options of the actor of each group of blocks, as `options_of_actors` does.

    work: seconds by block, in the graph's order; None: as many as they have parameters.
    """
    by_block = block_settings(graph, engine)
    seconds = dict(zip(graph.blocks, work or by_parameters(graph), strict=True))
    busy = [sum(seconds[name] for name in group) for group in groups]
    requests = [requirements(group, by_block, engine) for group in groups]
    return options_of_actors(requests, hosts, spread, busy, speeds)


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
