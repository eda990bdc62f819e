"""Worker actors of a run: their hosts, their arithmetic, and the links between them."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from hamdist.config import Bits, Encryption, Spread, TransportKind
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import ClusterError, HamdistError, HamdistWarning
from hamdist.runtime.advice.advice import thread_warnings
from hamdist.runtime.engines.worker import Worker
from hamdist.runtime.engines.worker_report import SnapshotNews, WorkerReport, WorkerStatus
from hamdist.runtime.placement.assign_blocks import Costs, options_of_groups
from hamdist.runtime.placement.assign_hosts import ActorOptions
from hamdist.runtime.placement.links import Probe, cluster_of, pairs, signals_of
from hamdist.runtime.placement.step_costs import source_host
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.arithmetic import Arithmetic
from hamdist.runtime.process.module_path import module_folders
from hamdist.runtime.process.portable import other_bits, portable_environment
from hamdist.runtime.process.switches import Switches
from hamdist.runtime.process.threads import cores
from hamdist.runtime.ray_engine.cluster_hosts import host_seconds, hosts, last_line
from hamdist.runtime.ray_engine.session import Session
from hamdist.runtime.signals.signal import Channel
from hamdist.runtime.timing.cluster_model import ClusterModel, HostModel, Link
from hamdist.runtime.timing.cycle_ratio import NoPeriodError
from hamdist.runtime.timing.timed_graph import TimingModel
from hamdist.runtime.transport.encryption import Keys
from hamdist.runtime.transport.shared_memory import MAX_CAPACITY
from hamdist.runtime.transport.transport import IPC, SHM, TCP, local_way
from hamdist.streams.live import live_of
from hamdist.streams.replay import replays
from hamdist.streams.sample import Stream

START_SECONDS = 120.0
END_SECONDS = 10.0
GATHER_SECONDS = 15.0  # until actors that came up make room for a run that lacks fewer
LOOPBACK = "127.0.0.1"
Group = TypeVar("Group", bound="PlacedWorkers")
random_numbers = random.SystemRandom()  # (the user's generators stay as they are)


class PlacedWorkers:
    """Starts worker actors and collects their properties; a base of `WorkerGroup`."""

    def __init__(self, plan: Plan, stream: Stream, session: Session) -> None:
        self.plan = plan  # that the actors run
        self._stream = stream
        self.session = session
        # What cannot be drawn again a second time stays here, where its log keeps what it gave.
        keeps = plan.snapshot_policy is not None and plan.snapshot_policy.section.recover
        self._portable = stream.portable and (replays(stream) or not keeps)
        self.live = live_of(stream)
        self._local: Worker | None = None
        self._keys: Keys | None = None  # this process's, where tcp sockets ask for one
        self._thread: threading.Thread | None = None
        self.local_report: WorkerReport | None = None
        self._local_news: list[SnapshotNews] = []  # of its snapshots
        self.actors: list[WorkerHandle] = []
        # Calls of the latest keep() that have not been answered.
        self._keep_calls: list[Any] = []
        self._too_late = False
        self._called_off = False
        self.arithmetic = [plan.arithmetic]  # of all kinds of processes that the run has had
        self.notes: list[str] = []  # what there is to say of the actors before the first tick
        self.local_dropped = False  # as WorkerHandle.dropped, of a stream in this process
        self.gpu_channels = 0  # channels between GPUs of one host, at the start
        self.links: dict[tuple[int, int], Link] = {}  # by pair of actors, if they were measured
        # Told of an actor that died, or ended with an error; answers whether it is replaced.
        self.on_lost: Callable[[WorkerHandle, HamdistError | None, HamdistError], bool] | None = (
            None
        )

    def __enter__(self: Group) -> Group:
        return self

    @property
    def placement(self) -> list[list[str]]:
        """Return the blocks of each actor."""
        return [actor.blocks for actor in self.actors]

    def crowded(self) -> list[str]:
        """Return warnings for other hosts with more threads than processors.

        For this host the warning came before the start.
        """
        here = ray.get_runtime_context().get_node_id()
        notes = []
        for node in ray.nodes():
            actors = sum(actor.node == node["NodeID"] for actor in self.actors)
            processors = int(node["Resources"].get("CPU", 0))
            if actors and node["NodeID"] != here:
                name = node["NodeManagerAddress"]
                notes += thread_warnings(actors, self.plan.engine.threads, processors, name)
        return notes

    def predicted(self, model: TimingModel) -> float:
        """Return the samples a second by the model; 0 where nothing is known of the links."""
        names = list(dict.fromkeys(actor.node for actor in self.actors))
        if len(names) > 1 and not self.links:
            return 0.0
        groups = range(len(self.actors))
        if self.links:
            timed = model.timed(self.placement, groups, cluster_of(self.placement, self.links))
        else:
            late = {(0, 0): Link(self.plan.engine.link_delay)}
            here = ClusterModel([HostModel(cores=cores())], late)
            timed = model.timed(self.placement, [0 for _ in groups], here)
        try:
            return timed.samples / timed.period().seconds
        except NoPeriodError:  # (bundles of micro-batches, which ends of samples cut short)
            return 0.0

    def inside(self) -> list[set[str]]:
        """Return the nodes of each actor."""
        inside = [set(actor.blocks) for actor in self.actors]
        if self._portable:
            inside[self._source_actor()].add(INPUT)
        return inside

    def stream_of(self, i: int) -> Stream | None:
        """Return the stream if actor i draws it, else None."""
        return self._stream if self._portable and i == self._source_actor() else None

    def _make_keys(self) -> None:
        """Make each process's key pair for this run, if signals travel by tcp."""
        engine = self.plan.engine
        here = ray.get_runtime_context().get_node_id()
        snapshot_policy = self.plan.snapshot_policy
        moves = (
            snapshot_policy is not None
            and snapshot_policy.section.recover
            and engine.address is not None
        )
        spread = moves or len({here, *(actor.node for actor in self.actors)}) > 1
        by_tcp = engine.transport is TransportKind.TCP or (
            engine.transport is TransportKind.AUTO and spread
        )
        if engine.encryption is Encryption.OFF or not by_tcp:
            return
        from hamdist.runtime.transport.encryption import new_keys

        self._keys = new_keys()
        for actor, key in zip(self.actors, self._all("new_key", lambda _: ()), strict=True):
            actor.key = key

    def _options_of_actors(
        self, groups: Sequence[Sequence[str]], costs: Costs | None
    ) -> list[ActorOptions]:
        """Return each actor's options. Raises ClusterError if the cluster lacks any."""
        plan, listed = self.plan, hosts()
        spread = plan.engine.spread if len(listed) > 1 else Spread.AUTO
        speeds = host_seconds(listed) if spread is Spread.PROFILE else None
        work = None if costs is None else costs.seconds
        options = options_of_groups(plan.graph, plan.engine, groups, listed, spread, work, speeds)
        if plan.engine.bits is not Bits.PORTABLE:
            return options
        return [actor_options.pinned(portable_environment()) for actor_options in options]

    def way_to_compute(self) -> tuple[Switches, int, bool, list[str]]:
        """Return the arguments of `WorkerActor.compute_as`, called before an actor's blocks."""
        engine = self.plan.engine
        return self.plan.switches, engine.threads, self.plan.native, module_folders()

    def unlike(self, answers: Mapping[WorkerHandle, tuple[Arithmetic, list[str]]]) -> list[str]:
        """Return a warning, already issued, for each actor that computes other bits than we do.

        answers: of `WorkerActor.compute_as`. Raises ClusterError if `engine.bits` asks for equal.
        """
        here = self.plan.arithmetic
        actors: dict[str, list[str]] = {}
        for actor, (there, refused) in answers.items():
            if there not in self.arithmetic:
                self.arithmetic.append(there)
            reasons = [*there.unlike(here), *refused]
            if reasons:
                text = f"on {there}, not as this process on {here}: {', '.join(reasons)}"
                actors.setdefault(text, []).append(f"{actor.name} ({actor.address})")
        texts = [f"{', '.join(names)} would compute {text}" for text, names in actors.items()]
        notes = [other_bits(text, self.plan.engine.bits, ClusterError) for text in texts]
        for note in notes:
            warnings.warn(note, HamdistWarning, stacklevel=2)  # (before they compute)
        return notes

    def _links(self, model: TimingModel | None) -> dict[tuple[int, int], Link]:
        """Measure the links by pair of actors that exchange signals. Between two hosts, or inside
        one, one pair stands for all; between hosts signals are as large and frequent as `model`
        says. (In one, a signal is late when its actor has no processor.)"""
        nbytes, every = ({}, 0.0) if model is None else signals_of(model, self.placement)
        by_pair: dict[frozenset[str], list[tuple[int, int]]] = {}
        for a, b in sorted(pairs(self.plan, self.placement)):
            hosts = frozenset([self.actors[a].node, self.actors[b].node])
            by_pair.setdefault(hosts, []).append((a, b))
        firsts = [group[0] for group in by_pair.values()]
        binds: list[dict[int, str]] = [{} for _ in self.actors]
        for number, (a, b) in enumerate(firsts):
            there, back = Probe.channels(number)
            first, second = self.actors[a], self.actors[b]
            binds[b][there.number] = self._way_between(there, first.node, first.key, second)
            binds[a][back.number] = self._way_between(back, second.node, second.key, first)
        run, late, ports = (
            self.plan.run,
            self.plan.engine.link_delay,
            self.plan.engine.port_range,
        )
        addresses: dict[int, str] = {}
        for opened in self._all("probe", lambda i: (run, late, ports, binds[i])):
            addresses |= opened
        self._all("call", lambda _: ("join", addresses))
        links: dict[tuple[int, int], Link] = {}
        for number, (group, (a, b)) in enumerate(zip(by_pair.values(), firsts, strict=True)):
            first, second = self.actors[a], self.actors[b]
            inside = first.node == second.node
            size = 0 if inside else max(nbytes.get(way, 0) for way in ((a, b), (b, a)))
            link = self._measured(number, first, second, size, every)
            if inside:  # (bytes take the time of processors there, which the model counts)
                link = Link(link.seconds)
            links |= dict.fromkeys(group, link)
        self._all("close", lambda _: ())
        return links

    def _measured(
        self, number: int, first: WorkerHandle, second: WorkerHandle, nbytes: int, every: float
    ) -> Link:
        answered = second.ask("answer", number, nbytes)
        measured = first.ask("measure", number, nbytes, every)
        try:
            link, _ = ray.get([measured, answered], timeout=START_SECONDS)
        except GetTimeoutError:
            raise ClusterError(
                f"the link between {first} and {second} could not be measured within "
                f"{START_SECONDS:.0f} s; give partition.delays as numbers"
            ) from None
        except RayError as error:
            raise ClusterError(
                f"the link between {first} and {second} could not be measured: {last_line(error)}"
            ) from error
        return link  # type: ignore[no-any-return]

    def _source_actor(self) -> int:
        """Return the actor that draws the stream: the one of the first block that reads it."""
        host = source_host(self.plan)
        return next(i for i, actor in enumerate(self.actors) if host in actor.blocks)

    def _way_between(
        self, channel: Channel, node: str, key: str | None, receiver: WorkerHandle
    ) -> str:
        """Return the transport of a channel from a sender on `node`, whose `key` is checked."""
        kind = self.plan.engine.transport
        if kind is TransportKind.TCP or (kind is TransportKind.AUTO and node != receiver.node):
            host = LOOPBACK if node == receiver.node else receiver.address
            return TCP + host if key is None else f"{TCP}{host} {key}"
        if node != receiver.node:
            raise ClusterError(
                f"engine.transport {kind.value!r}: {channel} crosses hosts; use 'auto' or 'tcp'"
            )
        best = local_way(channel)
        if kind is TransportKind.SHM and best != SHM:
            raise ClusterError(
                f"engine.transport 'shm': {channel} has room for {channel.capacity} signals, more "
                f"than the {MAX_CAPACITY} that shared memory takes, or this platform has no such "
                "memory; use 'auto' or 'ipc'"
            )
        return IPC if kind is TransportKind.IPC else best

    def _all(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Call `method` of all actors at once and wait for all results."""
        calls = [
            getattr(actor.handle, method).remote(*arguments(i))
            for i, actor in enumerate(self.actors)
        ]
        try:
            return list(ray.get(calls, timeout=START_SECONDS))
        except GetTimeoutError:
            raise ClusterError(
                f"the actors did not start within {START_SECONDS:.0f} s; the cluster may lack "
                f"free CPUs for {len(self.actors)} actors (ray status shows them)"
            ) from None
        except RayError as error:
            raise ClusterError(f"an actor failed while it started: {last_line(error)}") from error


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """State of an actor as the driver sees it."""

    name: str
    blocks: list[str]
    handle: Any
    actor_options: ActorOptions
    node: str = ""
    address: str = ""
    pid: int = 0
    key: str | None = None  # its public key in this run, where tcp sockets ask for one
    running: Any = None  # the call of run()
    report: WorkerReport | None = None
    status: WorkerStatus | None = None
    call: Any = None  # a status call under way
    called_at: float = 0.0
    windows: list[Window] = field(default_factory=list)
    joined: int | None = None

    snapshot_news: list[SnapshotNews] = field(default_factory=list)
    kept_bytes: int = 0
    dropped: bool = False  # it has let signals go that a successor of a neighbour would need

    def ask(self, method: str, *arguments: Any, run: int | None = None) -> Any:
        """Call a method of the actor's worker (`WorkerActor.call`); return Ray's reference."""
        return self.handle.call.remote(method, *arguments, run=run)

    def renew(self, actor_options: ActorOptions, handle: Any, place: tuple[str, str, int]) -> None:
        """Replace the actor's process."""
        self.actor_options, self.handle = actor_options, handle
        self.node, self.address, self.pid = place
        self.begin_again()

    def begin_again(self) -> None:
        """Discard what is recorded of the actor's run."""
        self.running = self.report = self.status = self.call = None
        self.windows = []
        self.joined = None

    @property
    def tick(self) -> int | None:
        """Return the tick of its hindmost block in the latest status, if there is one."""
        return None if self.status is None else min(self.status.ticks.values(), default=None)

    def note(self, status: WorkerStatus) -> None:
        """Keep what a worker reports of itself."""
        self.status = status
        if status.snapshot_news is not None:
            self.snapshot_news.append(status.snapshot_news)
            self.kept_bytes, self.dropped = (
                status.snapshot_news.nbytes,
                status.snapshot_news.dropped,
            )
        self.windows = [*self.windows[: status.first], *status.windows]
        self.joined = status.joined

    def __str__(self) -> str:
        return f"{self.name} (blocks {', '.join(self.blocks)}; process {self.pid})"


def _processors(cpus: int) -> int:
    """Return the processors behind the hosts' `cpus` in Ray: here more may be declared."""
    here = ray.get_runtime_context().get_node_id()
    mine = next((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["NodeID"] == here), 0)
    return cpus - max(0, int(mine) - cores())
