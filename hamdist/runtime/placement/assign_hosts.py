"""Which host an actor goes to, and what it asks Ray for. Pure: Ray is asked and told elsewhere.

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
from hamdist.runtime.placement.requirements import Demand

ALIKE = 0.1  # hosts whose speeds differ by less count as equally fast
MOST_SHARES = 10_000  # of a GPU: Ray counts in these parts


@dataclass(frozen=True)
class HostInfo:
    """One host as Ray describes it: id, address, name; what it has."""

    id: str
    address: str
    name: str
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_called(self, word: str) -> bool:
        """Whether `engine.blocks.NAME.host` means this one: by address, name or id, or by a custom
        resource or a label's value that it has."""
        known = {self.id, self.address, self.name, *self.resources, *self.labels.values()}
        return word in known

    def __str__(self) -> str:
        return self.address if self.name in ("", self.address) else f"{self.name} ({self.address})"


def described(
    node: str,
    address: str,
    name: str,
    resources: Mapping[str, float],
    labels: Mapping[str, str],
) -> HostInfo:
    """A host as Ray tells of it, without what is Ray's own among its resources and labels."""
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
class Seat:
    """What one actor is started with. node: Ray's id of its host, None where Ray decides.
    environment: variables of its process, beside those of its host. Equal seats can take over each
    other's processes."""

    cpus: float = 1.0
    gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    node: str | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def pinned(self, environment: Mapping[str, str]) -> Seat:
        """The same with these variables, whatever the host's are."""
        return replace(self, environment=tuple({**dict(self.environment), **environment}.items()))

    def on(self, node: str | None) -> Seat:
        """The same on another host; None: on any."""
        return replace(self, node=node)


def seats(
    demands: Sequence[Demand],
    hosts: Sequence[HostInfo],
    spread: Spread,
    busy: Sequence[float],
    speeds: Mapping[str, float] | None = None,
) -> list[Seat]:
    """The seat of each actor. hosts: the driver's first. busy: by actor, its work. speeds: by host,
    seconds for the same work ('profile').

    Raises ClusterError for what the cluster cannot give, whatever else runs on it.
    """
    shares = _shares(demands, hosts)
    room = [_Room(host) for host in hosts]
    for demand, gpus in zip(demands, shares, strict=True):
        _check(demand, gpus, room)
    _check_sums(demands, shares, hosts)
    found: dict[int, _Room] = {}
    bound = [i for i, d in enumerate(demands) if d.host is not None]
    free = [i for i, d in enumerate(demands) if d.host is None]
    for i in bound:
        fit = [r for r in room if r.host.is_called(demands[i].host or "")]
        found[i] = _taken(demands[i], shares[i], fit, room)
    if spread is Spread.PROFILE and speeds is not None:
        ranks = _ranks(speeds)
        for i in sorted(free, key=lambda i: -busy[i]):
            ordered = sorted(room, key=lambda r: ranks[r.host.id])
            found[i] = _taken(demands[i], shares[i], ordered, room)
    elif spread is Spread.SPREAD:
        for n, i in enumerate(free):
            first = n * len(room) // len(free)
            others = sorted((r for r in room if r is not room[first]), key=lambda r: r.actors)
            found[i] = _taken(demands[i], shares[i], [room[first], *others], room)
    elif spread is not Spread.AUTO:
        last = 0
        for i in free:
            found[i] = _taken(demands[i], shares[i], [*room[last:], *room[:last]], room)
            last = room.index(found[i])
    return [
        Seat(
            cpus=demand.cpus,
            gpus=gpus,
            resources=tuple(sorted(demand.resources.items())),
            node=found[i].host.id if i in found else None,
        )
        for i, (demand, gpus) in enumerate(zip(demands, shares, strict=True))
    ]


def reseated(
    seat: Seat, was: str, hosts: Sequence[HostInfo], taken: Sequence[tuple[str, Seat]]
) -> Seat:
    """Where an actor goes that was lost: to host `was`, where it was, or else to one that has room
    for it beside the others of the run, the emptiest first. hosts: those that are there. taken: the
    others' hosts and seats."""
    if was in {host.id for host in hosts}:
        return seat
    room = {host.id: _Room(host) for host in hosts}
    for node, other in taken:
        if node in room and room[node].has(_as_demand(other), other.gpus):
            room[node].take(_as_demand(other), other.gpus)
    mine = _as_demand(seat)
    fit = [r for r in room.values() if r.has(mine, seat.gpus)]
    least = min(fit, key=lambda r: r.actors, default=None)
    return seat.on(None if least is None else least.host.id)


def _as_demand(seat: Seat) -> Demand:
    return Demand(cpus=seat.cpus, gpus=seat.gpus, resources=dict(seat.resources))


class _Room:
    """What is left of a host."""

    def __init__(self, host: HostInfo) -> None:
        self.host = host
        self.actors = 0
        self.cpus = host.cpus
        self.resources = dict(host.resources)
        self.gpus = [1.0] * int(host.gpus)  # a share never spans two of them

    def has(self, demand: Demand, gpus: float) -> bool:
        enough = all(self.resources.get(n, 0) >= v for n, v in demand.resources.items())
        return enough and self.cpus >= demand.cpus and self._gpus(gpus) is not None

    def _gpus(self, wanted: float) -> list[int] | None:
        """Which of them are taken; None where they do not suffice."""
        least = min(wanted, 1.0)
        fit = [i for i, left in enumerate(self.gpus) if left >= least - 1e-9]
        number = math.ceil(wanted)
        return fit[:number] if len(fit) >= number else None

    def take(self, demand: Demand, gpus: float) -> None:
        self.actors += 1
        self.cpus -= demand.cpus
        for name, value in demand.resources.items():
            self.resources[name] -= value
        for i in self._gpus(gpus) or ():
            self.gpus[i] -= min(gpus, 1.0)


def _taken(
    demand: Demand, gpus: float, order: Sequence[_Room], everywhere: Sequence[_Room]
) -> _Room:
    """The first host in `order` that has room, which is then taken."""
    for room in order:
        if room.has(demand, gpus):
            room.take(demand, gpus)
            return room
    full = ", ".join(str(r.host) for r in order)
    others = sum(r.actors for r in everywhere)
    raise ClusterError(
        f"no room for {_who(demand)}, which asks for {_asked(demand, gpus)}: {full} "
        f"{'is' if len(order) == 1 else 'are'} full with the other {others} actor(s); ask for "
        "less, use fewer actors, or add hosts"
    )


def _shares(demands: Sequence[Demand], hosts: Sequence[HostInfo]) -> list[float]:
    """The GPU share of each actor: as asked for; of those that only want to see one, equal parts of
    what the GPUs of the cluster have left, none of them cut across two."""
    asked = [d.gpus for d in demands]
    wanting = sum(g == 0 for g in asked)
    left = int(sum(h.gpus for h in hosts)) - math.ceil(sum(g for g in asked if g))
    if wanting and left < 1:
        who = next(d for d in demands if d.gpus == 0)
        raise ClusterError(
            f"{_who(who)} has the device 'cuda', but the cluster has "
            f"{_gpus_of(hosts)} left for it; use 'auto', which takes the processor where there is "
            "no GPU"
        )
    equal = 1 / math.ceil(wanting / left) if wanting else 0.0
    equal = math.floor(equal * MOST_SHARES) / MOST_SHARES
    return [0.0 if g is None else equal if g == 0 else g for g in asked]


def _gpus_of(hosts: Sequence[HostInfo]) -> str:
    total = sum(h.gpus for h in hosts)
    return f"none of its {total:g} GPU(s)" if total else "no GPU"


def _check(demand: Demand, gpus: float, room: Sequence[_Room]) -> None:
    """Raises ClusterError where no single host could take the actor, were it alone."""
    called = [r for r in room if demand.host is None or r.host.is_called(demand.host)]
    if not called:
        raise ClusterError(
            f"{_who(demand)}: host {demand.host!r} is unknown; the cluster has "
            f"{', '.join(str(r.host) for r in room)}, with the resources {_resources(room)} (a "
            "host is named by its address, name or id, or by a custom resource or a label of its "
            "own)"
        )
    for name in demand.resources:
        if not any(name in r.host.resources for r in room):
            raise ClusterError(
                f"{_who(demand)}: no host has the resource {name!r}; known: {_resources(room)} "
                "(ray start --resources=...)"
            )
    if not any(r.has(demand, gpus) for r in called):
        where = f"host {demand.host!r}" if demand.host is not None else "any host"
        largest = "; ".join(_offer(r.host) for r in called)
        raise ClusterError(
            f"{_who(demand)} asks for {_asked(demand, gpus)}, more than {where} has ({largest}); "
            "ask for less"
        )


def _resources(room: Sequence[_Room]) -> str:
    return ", ".join(sorted({name for r in room for name in r.host.resources})) or "none"


def _check_sums(
    demands: Sequence[Demand], shares: Sequence[float], hosts: Sequence[HostInfo]
) -> None:
    """Raises ClusterError where all actors together ask for more than there is."""
    cpus, total = sum(d.cpus for d in demands), sum(h.cpus for h in hosts)
    if cpus > total:
        raise ClusterError(
            f"{len(demands)} actors ask for {cpus:g} CPUs, the Ray cluster has {total:g}; set "
            "engine.actors to fewer, or 'auto', or ask for less in engine.blocks"
        )
    gpus, there = sum(shares), sum(h.gpus for h in hosts)
    if gpus > there + 1e-9:
        raise ClusterError(
            f"{len(demands)} actors ask for {gpus:g} GPUs, the Ray cluster has {there:g}; ask for "
            "smaller shares (engine.blocks.NAME.gpus), or use fewer actors"
        )
    for name in sorted({n for d in demands for n in d.resources}):
        wanted = sum(d.resources.get(name, 0) for d in demands)
        held = sum(h.resources.get(name, 0) for h in hosts)
        if wanted > held:
            raise ClusterError(
                f"{len(demands)} actors ask for {wanted:g} of the resource {name!r}, the Ray "
                f"cluster has {held:g}; ask for less"
            )


def _who(demand: Demand) -> str:
    noun = "block" if len(demand.blocks) == 1 else "blocks"
    return f"the actor of {noun} {', '.join(demand.blocks)}"


def _asked(demand: Demand, gpus: float) -> str:
    parts = [f"{demand.cpus:g} CPU(s)"]
    parts += [f"{gpus:g} GPU(s)"] if gpus else []
    parts += [f"{value:g} {name}" for name, value in demand.resources.items()]
    return ", ".join(parts)


def _offer(host: HostInfo) -> str:
    parts = [f"{host.cpus:g} CPU(s)", f"{host.gpus:g} GPU(s)"]
    parts += [f"{value:g} {name}" for name, value in host.resources.items()]
    return f"{host}: {', '.join(parts)}"


def _ranks(speeds: Mapping[str, float]) -> dict[str, int]:
    """Classes of hosts, the fastest first; a host begins a class where it is clearly slower than
    the fastest of the class before."""
    ranks: dict[str, int] = {}
    rank, first = 0, None
    for host, seconds in sorted(speeds.items(), key=lambda item: item[1]):
        if first is not None and seconds > (1 + ALIKE) * first:
            rank, first = rank + 1, seconds
        first = seconds if first is None else first
        ranks[host] = rank
    return ranks
