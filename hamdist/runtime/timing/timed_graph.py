"""Steps with their seconds on the actors of a cluster: what the period and every simulation follow.

An activity is a step of a node, done by its actor, or the transfer of a message, done by a link;
each resource does its activities one after the other, in the order of the schedule. With end times
x, period p and w seconds of work,

    x_i(p) = w_i + max( x_before(i)(p),  max over arcs j -> i of  x_j(p - periods) + seconds )

Sending and receiving count as work of the actor; latency lies on the arcs. Signals inside an actor
need no arc, for its order implies them. A channel has room for so many signals, so that a step also
waits for the one that makes room.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Kind, Phase
from hamdist.runtime.plan.derived import sent_bytes
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Channel
from hamdist.runtime.timing.cluster_model import (
    BYTES_PER_SECOND,
    LOCAL_SECONDS,
    REMOTE_SECONDS,
    ClusterModel,
    Link,
)
from hamdist.runtime.timing.cycle_ratio import max_cycle_ratio
from hamdist.runtime.timing.step_graph import TOKENS, StepGraph, step_graph

StepSeconds: TypeAlias = Mapping[str, Mapping[Phase, float]]  # by node and phase, for one sample


class Resource(NamedTuple):
    """An actor, a link, or the pace of the stream; `host`: of an actor, else -1."""

    name: str
    host: int = -1


class Transfer(NamedTuple):
    """The way of a message over a link: hosts and bytes."""

    sender: int
    receiver: int
    nbytes: int


class TimedArc(NamedTuple):
    """A dependence between two activities; `link`: that varies its seconds; edge: its name."""

    source: int
    target: int
    periods: int
    seconds: float = 0.0
    edge: str = ""
    link: Link | None = None
    nbytes: int = 0


@dataclass
class TimedGraph:
    """The activities of a period.

    Attributes:
        resources: actors first.
        owner, work, label: of each activity its resource (-1: a link that several actors share),
            its seconds, and what it is, in words.
        transfers: by activity.
        arcs: between activities of different resources.
        nbytes: bytes a period by hosts (sender, receiver).
        samples: that enter in a period.
    """

    cluster: ClusterModel
    samples: int
    ticks: int
    resources: list[Resource] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    arcs: list[TimedArc] = field(default_factory=list)
    nbytes: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, owner: int, work: float, label: str) -> int:
        """Add a step of `owner`, and return its index."""
        self.owner.append(owner)
        self.work.append(work)
        self.label.append(label)
        return len(self.owner) - 1

    @cached_property
    def chains(self) -> list[list[int]]:
        """Return the activities of each resource, in order."""
        chains: list[list[int]] = [[] for _ in self.resources]
        for place, owner in enumerate(self.owner):
            if owner >= 0:
                chains[owner].append(place)
        return chains

    @property
    def shared(self) -> bool:
        """Return True if links are shared, or a host has more actors than cores."""
        return -1 in self.owner or any(
            len(actors) > self.cluster.hosts[host].cores for host, actors in self.actors_of.items()
        )

    @property
    def actors_of(self) -> dict[int, list[int]]:
        """Return the actors by host."""
        by_host: dict[int, list[int]] = defaultdict(list)
        for i, resource in enumerate(self.resources):
            if resource.host >= 0:
                by_host[resource.host].append(i)
        return by_host

    @cached_property
    def busy(self) -> list[float]:
        """Return the seconds of work of each resource in a period."""
        return [math.fsum(self.work[i] for i in chain) for chain in self.chains]

    def period(self) -> Period:
        """Return the steady period, and what limits it."""
        cycles = self._critical()
        return max([cycles, *self._loads()], key=lambda period: period.seconds)

    def _critical(self) -> Period:
        order = [
            (a, b, 0 if b > a else 1, self.work[a])
            for chain in self.chains
            for a, b in zip(chain, [*chain[1:], chain[0]] if chain else [], strict=True)
        ]
        order += [(i, i, 1, self.work[i]) for i, owner in enumerate(self.owner) if owner < 0]
        arcs = [(a.source, a.target, a.periods, self.work[a.source] + a.seconds) for a in self.arcs]
        sources, targets, periods, seconds = (np.array(c) for c in zip(*order, *arcs, strict=True))
        ratio, cycle = max_cycle_ratio(sources, targets, seconds.astype(float), periods)
        parts: dict[tuple[str, str], float] = defaultdict(float)
        signals: dict[str, int] = defaultdict(int)
        for i in cycle:
            source = int(sources[i])
            kind = "wire" if source in self.transfers or self.owner[source] < 0 else "work"
            parts[self.label[source], kind] += self.work[source]
            if i >= len(order) and self.arcs[i - len(order)].edge:
                arc = self.arcs[i - len(order)]
                parts[arc.edge, "wire"] += arc.seconds
                signals[arc.edge] += 1
        most_first = sorted(((s, part) for part, s in parts.items() if s), reverse=True)
        return Period(ratio, {part: s for s, part in most_first}, signals)

    def _loads(self) -> list[Period]:
        """Return the periods that cores and links need that activities share."""
        hosts = self.cluster.hosts
        by_link = []
        for host, actors in self.actors_of.items():
            work = sum(self.busy[i] for i in actors)
            if len(actors) > hosts[host].cores and work:
                name = (
                    f"{len(actors)} actors on {hosts[host].cores:g} core(s) of {hosts[host].name}"
                )
                by_link.append(Period(work / hosts[host].cores, {(name, "work"): work}))
        loads: dict[str, float] = defaultdict(float)
        for transfer in self.transfers.values():
            a, b = hosts[transfer.sender], hosts[transfer.receiver]
            link = self.cluster.link(transfer.sender, transfer.receiver)
            loads[f"link {a.name}->{b.name}"] += transfer.nbytes / link.bytes_per_second
            if transfer.sender != transfer.receiver:
                loads[f"link up of {a.name}"] += transfer.nbytes / a.up
                loads[f"link down of {b.name}"] += transfer.nbytes / b.down
        return by_link + [Period(load, {(name, "wire"): load}) for name, load in loads.items()]


@dataclass(frozen=True, slots=True)
class Period:
    """A steady period, and the cycle that limits it.

    Attributes:
        seconds: of the period.
        parts: seconds on the cycle by (what, 'work' or 'wire'), the most first.
        signals: on the cycle that cross between actors, by edge.
    """

    seconds: float
    parts: Mapping[tuple[str, str], float]
    signals: Mapping[str, int] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Return what limits the period, with its share of wire or work."""
        total = sum(self.parts.values()) or 1.0
        wire = sum(s for (_, kind), s in self.parts.items() if kind == "wire") / total
        kind, share = ("wire", wire) if wire >= 0.5 else ("work", 1 - wire)
        of_kind = [part for part, its_kind in self.parts if its_kind == kind]
        longest = ", ".join(of_kind[:3]) + (f" and {len(of_kind) - 3} more" if of_kind[3:] else "")
        return f"limited by {longest}: {100 * share:.0f} % {kind}"


def signal_seconds(channel: Channel, nbytes: int, message: float) -> float:
    """Return the seconds that an actor spends on a signal that crosses; `message`: on a message."""
    return message / channel.bundle + nbytes / BYTES_PER_SECOND


class TimedSteps:
    """The steps of a run as actors do them on a cluster, which makes the activities (`timed`).

    Args:
        seconds: that each phase of a node takes for one sample, at speed 1.
        actors: the nodes of each ('u' is the stream's).
        hosts: of each actor, by its place in `cluster`.
    """

    def __init__(
        self,
        plan: Plan,
        graph: StepGraph,
        seconds: StepSeconds,
        actors: Sequence[Sequence[str]],
        hosts: Sequence[int],
        cluster: ClusterModel,
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._actor = {n: i for i, nodes in enumerate(actors) for n in nodes}
        self._sizes: dict[int, int] = {}
        self._plan = plan
        self.timed = TimedGraph(cluster, graph.samples, graph.ticks)
        self.timed.resources = [Resource(f"actor {i}", host) for i, host in enumerate(hosts)]
        counts: dict[tuple[str, Phase], int] = defaultdict(int)
        for step in graph.steps:
            counts[step.node, step.phase] += 1
        for step in graph.steps:
            actor = self._actor[step.node]
            share = seconds.get(step.node, {}).get(step.phase, 0.0) * graph.samples
            work = share / counts[step.node, step.phase] / self._speed(actor)
            self.timed.add(actor, work, "the stream" if step.node == INPUT else step.node)
        crossing = [
            arc
            for arc in graph.arcs
            if self._actor[arc.channel.sender] != self._actor[arc.channel.receiver]
        ]
        self._senders: dict[tuple[int, int], set[int]] = defaultdict(set)
        for arc in crossing:
            actor = self._actor[arc.channel.sender]
            self._senders[self._ends(arc.channel)].add(actor)
        self._links: dict[tuple[int, int], int] = {}
        by_channel: dict[Channel, list[tuple[int, int, int]]] = defaultdict(list)
        for arc in sorted(crossing, key=lambda a: a.source):
            self._cross(arc.source, arc.target, arc.periods, arc.channel)
            by_channel[arc.channel].append((arc.source, arc.target, arc.periods))
        ways = {(channel.edge, channel.kind) for channel in by_channel}
        for channel, signals in by_channel.items():
            back = {Kind.STATE: Kind.MESSAGE, Kind.MESSAGE: Kind.STATE}.get(channel.kind)
            reach = 2 * (1 + max(periods for *_, periods in signals)) * len(signals)
            # (where signals come back soon enough, the sender waits for those anyway)
            if (channel.edge, back) not in ways or channel.capacity < reach:
                self._room(signals, channel)
        if cluster.pace < math.inf:
            self._pace(next(i for i, s in enumerate(graph.steps) if s.node == INPUT))

    def _speed(self, actor: int) -> float:
        return self._cluster.hosts[self._hosts[actor]].speed

    def _ends(self, channel: Channel) -> tuple[int, int]:
        return (
            self._hosts[self._actor[channel.sender]],
            self._hosts[self._actor[channel.receiver]],
        )

    def _bytes(self, channel: Channel) -> int:
        if channel.number not in self._sizes:
            self._sizes[channel.number] = sent_bytes(self._plan, channel)
        return self._sizes[channel.number]

    def _cross(self, source: int, target: int, periods: int, channel: Channel) -> None:
        """Add a signal between two actors."""
        timed, nbytes = self.timed, self._bytes(channel)
        ends = self._ends(channel)
        each = LOCAL_SECONDS if ends[0] == ends[1] else REMOTE_SECONDS
        spent = signal_seconds(channel, nbytes, each)
        for place in (source, target):
            timed.work[place] += spent / self._speed(timed.owner[place])
        link = self._cluster.link(*ends)
        if ends[0] != ends[1]:
            timed.nbytes[ends] += nbytes
        rate = self._cluster.rate(*ends)
        latency = link.seconds + link.lost(nbytes) * link.again
        if rate < math.inf:
            resource = self._link(ends)
            way = timed.add(resource, nbytes / rate, channel.edge)
            timed.transfers[way] = Transfer(*ends, nbytes)
            timed.arcs.append(TimedArc(source, way, 0))
            source = way
        timed.arcs.append(TimedArc(source, target, periods, latency, channel.edge, link, nbytes))

    def _room(self, signals: Sequence[tuple[int, int, int]], channel: Channel) -> None:
        """Add the waits for room on a channel between two actors.

        Args:
            signals: of a period, in the order in which they are sent: the sending step, the taking
                step, and the periods between them.
            channel: takes signal i only when signal i - capacity has been taken; a socket has a
                queue on either side.
        """
        remote = len(set(self._ends(channel))) > 1
        room = channel.capacity * (2 if remote else 1)
        for i, (source, *_) in enumerate(signals):
            ago, earlier = divmod(i - room, len(signals))
            _, taker, periods = signals[earlier]
            if ago + periods < 0:
                self.timed.arcs.append(TimedArc(taker, source, -(ago + periods)))

    def _link(self, ends: tuple[int, int]) -> int:
        """Return the resource of a link; -1 where several actors or links share it."""
        up, down = self._cluster.hosts[ends[0]].up, self._cluster.hosts[ends[1]].down
        crowded = len(self._senders[ends]) > 1
        for (a, b), senders in self._senders.items():
            if (a, b) != ends and senders:
                crowded |= (a == ends[0] and up < math.inf) or (b == ends[1] and down < math.inf)
        if crowded:
            return -1
        if ends not in self._links:
            names = [self._cluster.hosts[host].name for host in ends]
            self._links[ends] = len(self.timed.resources)
            self.timed.resources.append(Resource(f"link {names[0]}->{names[1]}"))
        return self._links[ends]

    def _pace(self, source: int) -> None:
        """Let the stream give samples no faster than its pace."""
        self.timed.resources.append(Resource("pace"))
        seconds = self.timed.samples / self._cluster.pace
        clock = self.timed.add(len(self.timed.resources) - 1, seconds, "the stream's pace")
        self.timed.arcs.append(TimedArc(clock, source, 1))


@dataclass(frozen=True)
class TimingModel:
    """The steps of a plan with their seconds.

    Attributes:
        plan: of the run.
        seconds: by node ('u': the stream) and phase, for one sample, at speed 1.
        source: the block whose actor draws the stream; None: the driver does.
        tokens: of a sequence.
    """

    plan: Plan
    seconds: StepSeconds
    source: str | None = None
    tokens: int = TOKENS

    @cached_property
    def steps(self) -> StepGraph:
        """Return the graph of the steps of a run."""
        return step_graph(self.plan, self.tokens)

    def timed(
        self,
        placement: Sequence[Sequence[str]],
        hosts: Sequence[int] | None = None,
        cluster: ClusterModel | None = None,
    ) -> TimedGraph:
        """Return the activities of the run; without `hosts` all actors are on the first one."""
        actors = [[*((INPUT,) if self.source in blocks else ()), *blocks] for blocks in placement]
        where = [*(hosts or [0] * len(actors))]
        if self.source is None:
            actors.append([INPUT])
            where.append(0)
        cluster = cluster or ClusterModel()  # (of one host that has a core for each actor)
        return TimedSteps(self.plan, self.steps, self.seconds, actors, where, cluster).timed

    def period(self, placement: Sequence[Sequence[str]]) -> Period:
        """Return the steady period of actors on one host with a core for each."""
        return self.timed(placement).period()

    def sample_seconds(self, placement: Sequence[Sequence[str]]) -> float:
        """Return the seconds a sample of actors on one host with a core for each."""
        return self.period(placement).seconds / self.steps.samples
