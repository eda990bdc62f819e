"""Assigns actors to hosts, with their resource requests. Pure functions: others call Ray.

auto     Ray decides, but for actors that name a host
packed   actors in their order fill one host after the other
spread   as many actors to each host as to the next, neighbours together
profile  the busiest actor to the fastest host, and so on: with times b_1 >= b_2 ... of actors
         and s_1 <= s_2 ... of hosts, pairing them in this order has the least max b_i s_i
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hamdist.config import Spread
from hamdist.errors import ClusterError
from hamdist.runtime.placement.requirements import ActorRequirements

ALIKE = 0.1  # hosts whose speeds differ by less count as equally fast
MOST_SHARES = 10_000  # of a GPU: Ray counts in these parts


@dataclass(frozen=True)
class HostInfo:
    """A host as Ray describes it: id, address, name and resources."""

    id: str
    address: str
    name: str
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_called(self, word: str) -> bool:
        """Return True if `engine.blocks.NAME.host` names this host.

        A host is named by its address, name or id, or by one of its custom resources or label
        values.
        """
        names = {self.id, self.address, self.name, *self.resources, *self.labels.values()}
        return word in names

    def __str__(self) -> str:
        return self.address if self.name in ("", self.address) else f"{self.name} ({self.address})"


def described(
    node: str, address: str, name: str, resources: Mapping[str, float], labels: Mapping[str, str]
) -> HostInfo:
    """Make a HostInfo of Ray's description, without Ray's internal resources and labels."""
    ray_own = ("node:", "memory", "object_store_memory", "accelerator_type:")
    named = {n: v for n, v in resources.items() if n not in ("CPU", "GPU")}
    return HostInfo(
        id=node,
        address=address,
        name=name,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        resources={n: v for n, v in named.items() if not n.startswith(ray_own)},
        labels={k: v for k, v in labels.items() if not k.startswith("ray.io/")},
    )


@dataclass(frozen=True)
class ActorOptions:
    """Options with which one actor is started; actors with equal options can share processes in
    turn.

    Attributes:
        cpus, gpus, resources: the resource request.
        node: Ray's id of its host; None where Ray decides.
        environment: variables of its process, beside those of its host.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    node: str | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def pinned(self, environment: Mapping[str, str]) -> ActorOptions:
        """Return the same options with these variables, whatever the host's are."""
        return replace(self, environment=tuple({**dict(self.environment), **environment}.items()))

    def on(self, node: str | None) -> ActorOptions:
        """Return the same options on another host; None: on any."""
        return replace(self, node=node)


def options_of_actors(
    requests: Sequence[ActorRequirements],
    hosts: Sequence[HostInfo],
    spread: Spread,
    busy: Sequence[float],
    speeds: Mapping[str, float] | None = None,
) -> list[ActorOptions]:
    """Return the options of each actor.

    Args:
        requests: of each actor.
        hosts: of the cluster, the driver's first.
        spread: the rule.
        busy: by actor, its work.
        speeds: by host, seconds for a fixed calculation ('profile').

    Raises:
        ClusterError: the cluster cannot satisfy a request, whatever else runs on it.
    """
    shares = _shares(requests, hosts)
    room = [_Capacity(host) for host in hosts]
    for requirements, gpus in zip(requests, shares, strict=True):
        _check(requirements, gpus, room)
    _check_sums(requests, shares, hosts)
    rooms: dict[int, _Capacity] = {}
    bound = [i for i, d in enumerate(requests) if d.host is not None]
    free = [i for i, d in enumerate(requests) if d.host is None]
    for i in bound:
        fit = [r for r in room if r.host.is_called(requests[i].host or "")]
        rooms[i] = _room_for(requests[i], shares[i], fit, room)
    if spread is Spread.PROFILE and speeds is not None:
        ranks = _ranks(speeds)
        for i in sorted(free, key=lambda i: -busy[i]):
            ordered = sorted(room, key=lambda r: ranks[r.host.id])
            rooms[i] = _room_for(requests[i], shares[i], ordered, room)
    elif spread is Spread.SPREAD:
        for n, i in enumerate(free):
            first = n * len(room) // len(free)
            others = sorted((r for r in room if r is not room[first]), key=lambda r: r.actors)
            rooms[i] = _room_for(requests[i], shares[i], [room[first], *others], room)
    elif spread is not Spread.AUTO:
        last = 0
        for i in free:
            rooms[i] = _room_for(requests[i], shares[i], [*room[last:], *room[:last]], room)
            last = room.index(rooms[i])
    return [
        ActorOptions(
            cpus=requirements.cpus,
            gpus=gpus,
            resources=tuple(sorted(requirements.resources.items())),
            node=rooms[i].host.id if i in rooms else None,
        )
        for i, (requirements, gpus) in enumerate(zip(requests, shares, strict=True))
    ]


def replacement_options(
    actor_options: ActorOptions,
    was: str,
    hosts: Sequence[HostInfo],
    reserved: Sequence[tuple[str, ActorOptions]],
) -> ActorOptions:
    """Return the options of the replacement of a lost actor.

    It goes to host `was` if that is there, or else to one that has room for it beside the others of
    the run, the emptiest first.

    Args:
        actor_options: of the lost actor.
        was: its host.
        hosts: that are there now.
        reserved: the others' hosts and options.
    """
    if was in {host.id for host in hosts}:
        return actor_options
    room = {host.id: _Capacity(host) for host in hosts}
    for node, other in reserved:
        if node in room and room[node].has(_as_requirements(other), other.gpus):
            room[node].take(_as_requirements(other), other.gpus)
    mine = _as_requirements(actor_options)
    fit = [r for r in room.values() if r.has(mine, actor_options.gpus)]
    least = min(fit, key=lambda r: r.actors, default=None)
    return actor_options.on(None if least is None else least.host.id)


def _as_requirements(actor_options: ActorOptions) -> ActorRequirements:
    return ActorRequirements(
        cpus=actor_options.cpus, gpus=actor_options.gpus, resources=dict(actor_options.resources)
    )


class _Capacity:
    """Free capacity of a host."""

    def __init__(self, host: HostInfo) -> None:
        self.host = host
        self.actors = 0
        self.cpus = host.cpus
        self.resources = dict(host.resources)
        self.gpus = [1.0] * int(host.gpus)  # a share never spans two of them

    def has(self, requirements: ActorRequirements, gpus: float) -> bool:
        enough = all(self.resources.get(n, 0) >= v for n, v in requirements.resources.items())
        return enough and self.cpus >= requirements.cpus and self._gpus(gpus) is not None

    def _gpus(self, wanted: float) -> list[int] | None:
        """Return which GPUs are taken; None if the free ones do not suffice."""
        least = min(wanted, 1.0)
        fit = [i for i, left in enumerate(self.gpus) if left >= least - 1e-9]
        number = math.ceil(wanted)
        return fit[:number] if len(fit) >= number else None

    def take(self, requirements: ActorRequirements, gpus: float) -> None:
        self.actors += 1
        self.cpus -= requirements.cpus
        for name, value in requirements.resources.items():
            self.resources[name] -= value
        for i in self._gpus(gpus) or ():
            self.gpus[i] -= min(gpus, 1.0)


def _room_for(
    requirements: ActorRequirements,
    gpus: float,
    order: Sequence[_Capacity],
    everywhere: Sequence[_Capacity],
) -> _Capacity:
    """Take room on the first host in `order` that has enough, and return it."""
    for room in order:
        if room.has(requirements, gpus):
            room.take(requirements, gpus)
            return room
    full = ", ".join(str(r.host) for r in order)
    others = sum(r.actors for r in everywhere)
    raise ClusterError(
        f"no room for {_who(requirements)}, which asks for {_request(requirements, gpus)}: {full} "
        f"{'is' if len(order) == 1 else 'are'} full with the other {others} actor(s); ask for "
        "less, use fewer actors, or add hosts"
    )


def _shares(requests: Sequence[ActorRequirements], hosts: Sequence[HostInfo]) -> list[float]:
    """Return the GPU share of each actor. Actors that only need to see a GPU get equal parts of
    what the cluster's GPUs have left, none of them cut across two."""
    shares = [d.gpus for d in requests]
    wanting = sum(g == 0 for g in shares)
    left = int(sum(h.gpus for h in hosts)) - math.ceil(sum(g for g in shares if g))
    if wanting and left < 1:
        who = next(d for d in requests if d.gpus == 0)
        raise ClusterError(
            f"{_who(who)} has the device 'cuda', but the cluster has "
            f"{_gpus_of(hosts)} left for it; use 'auto', which takes the processor where there is "
            "no GPU"
        )
    equal = 1 / math.ceil(wanting / left) if wanting else 0.0
    equal = math.floor(equal * MOST_SHARES) / MOST_SHARES
    return [0.0 if g is None else equal if g == 0 else g for g in shares]


def _gpus_of(hosts: Sequence[HostInfo]) -> str:
    total = sum(h.gpus for h in hosts)
    return f"none of its {total:g} GPU(s)" if total else "no GPU"


def _check(requirements: ActorRequirements, gpus: float, room: Sequence[_Capacity]) -> None:
    """Raise ClusterError if no single host could take the actor, were it alone."""
    called = [r for r in room if requirements.host is None or r.host.is_called(requirements.host)]
    if not called:
        raise ClusterError(
            f"{_who(requirements)}: host {requirements.host!r} is unknown; the cluster has "
            f"{', '.join(str(r.host) for r in room)}, with the resources {_resources(room)} (a "
            "host is named by its address, name or id, or by a custom resource or a label of its "
            "own)"
        )
    for name in requirements.resources:
        if not any(name in r.host.resources for r in room):
            raise ClusterError(
                f"{_who(requirements)}: no host has the resource {name!r}; known: "
                f"{_resources(room)} (ray start --resources=...)"
            )
    if not any(r.has(requirements, gpus) for r in called):
        where = f"host {requirements.host!r}" if requirements.host is not None else "any host"
        largest = "; ".join(_offer(r.host) for r in called)
        raise ClusterError(
            f"{_who(requirements)} asks for {_request(requirements, gpus)}, more than {where} has "
            f"({largest}); ask for less"
        )


def _resources(room: Sequence[_Capacity]) -> str:
    return ", ".join(sorted({name for r in room for name in r.host.resources})) or "none"


def _check_sums(
    requests: Sequence[ActorRequirements], shares: Sequence[float], hosts: Sequence[HostInfo]
) -> None:
    """Raise ClusterError if all actors together request more than there is."""
    cpus, total = sum(d.cpus for d in requests), sum(h.cpus for h in hosts)
    if cpus > total:
        raise ClusterError(
            f"{len(requests)} actors ask for {cpus:g} CPUs, the Ray cluster has {total:g}; set "
            "engine.actors to fewer, or 'auto', or ask for less in engine.blocks"
        )
    gpus, there = sum(shares), sum(h.gpus for h in hosts)
    if gpus > there + 1e-9:
        raise ClusterError(
            f"{len(requests)} actors ask for {gpus:g} GPUs, the Ray cluster has {there:g}; ask for "
            "smaller shares (engine.blocks.NAME.gpus), or use fewer actors"
        )
    for name in sorted({n for d in requests for n in d.resources}):
        wanted = sum(d.resources.get(name, 0) for d in requests)
        held = sum(h.resources.get(name, 0) for h in hosts)
        if wanted > held:
            raise ClusterError(
                f"{len(requests)} actors ask for {wanted:g} of the resource {name!r}, the Ray "
                f"cluster has {held:g}; ask for less"
            )


def _who(requirements: ActorRequirements) -> str:
    noun = "block" if len(requirements.blocks) == 1 else "blocks"
    return f"the actor of {noun} {', '.join(requirements.blocks)}"


def _request(requirements: ActorRequirements, gpus: float) -> str:
    parts = [f"{requirements.cpus:g} CPU(s)"]
    parts += [f"{gpus:g} GPU(s)"] if gpus else []
    parts += [f"{value:g} {name}" for name, value in requirements.resources.items()]
    return ", ".join(parts)


def _offer(host: HostInfo) -> str:
    parts = [f"{host.cpus:g} CPU(s)", f"{host.gpus:g} GPU(s)"]
    parts += [f"{value:g} {name}" for name, value in host.resources.items()]
    return f"{host}: {', '.join(parts)}"


def _ranks(speeds: Mapping[str, float]) -> dict[str, int]:
    """Return the speed class of each host, the fastest first. A host begins a class if it is
    clearly slower than the fastest of the class before."""
    ranks: dict[str, int] = {}
    rank, first = 0, None
    for host, seconds in sorted(speeds.items(), key=lambda pair: pair[1]):
        if first is not None and seconds > (1 + ALIKE) * first:
            rank, first = rank + 1, seconds
        first = seconds if first is None else first
        ranks[host] = rank
    return ranks
