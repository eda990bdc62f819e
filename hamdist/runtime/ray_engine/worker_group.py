"""The actors of one run, seen from the driver: started, wired, asked, called off, ended."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from hamdist.config import Bits, DeviceSignals, Encryption, Spread, TransportKind
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import ClusterError, HamdistError, HamdistWarning, StreamError
from hamdist.runtime.advice.advice import thread_warnings
from hamdist.runtime.engines.worker import (
    ReceivingEnds,
    SnapshotNews,
    Worker,
    WorkerReport,
    WorkerStatus,
)
from hamdist.runtime.placement.assign_blocks import Costs, by_parameters, place
from hamdist.runtime.placement.assign_hosts import ActorOptions, options_of_actors
from hamdist.runtime.placement.links import Link, Probe, least_delays, pairs
from hamdist.runtime.placement.requirements import requirements
from hamdist.runtime.placement.step_costs import source_host
from hamdist.runtime.plan.block_settings import block_settings
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.arithmetic import Arithmetic
from hamdist.runtime.process.interrupts import deaf_to_interrupts
from hamdist.runtime.process.portable import other_bits, portable_environment
from hamdist.runtime.process.startup import Startup
from hamdist.runtime.process.switches import Switches
from hamdist.runtime.process.threads import cores
from hamdist.runtime.ray_engine.session import Session, host_seconds, hosts
from hamdist.runtime.signals.signal import Channel
from hamdist.runtime.transport.endpoint import socket_folder
from hamdist.runtime.transport.shared_memory import GPU_SCHEME, MAX_CAPACITY
from hamdist.runtime.transport.transport import IPC, SHM, TCP, local_way
from hamdist.streams.replay import replays
from hamdist.streams.sample import Stream

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

START_SECONDS = 120.0
ANSWER_SECONDS = 5.0
OBEY_SECONDS = 2.0
END_SECONDS = 10.0
GATHER_SECONDS = 15.0  # until actors that came up make room for a run that lacks fewer
LOOPBACK = "127.0.0.1"

_random = random.SystemRandom()  # (the user's generators stay as they are)


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """One actor as the driver knows it."""

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
    asked: Any = None  # a status call under way
    asked_at: float = 0.0
    windows: list[Window] = field(default_factory=list)
    every: int | None = None

    told: list[SnapshotNews] = field(default_factory=list)
    kept_bytes: int = 0
    forgot: bool = False  # it has let signals go that a successor of a neighbour would need

    def renew(self, actor_options: ActorOptions, handle: Any, place: tuple[str, str, int]) -> None:
        """Another process takes the actor's part."""
        self.actor_options, self.handle = actor_options, handle
        self.node, self.address, self.pid = place
        self.begin_again()

    def begin_again(self) -> None:
        """What is known of its run is not so any more."""
        self.running = self.report = self.status = self.asked = None
        self.windows = []
        self.every = None

    @property
    def tick(self) -> int | None:
        """Where its hindmost block was, as far as it is known."""
        return None if self.status is None else min(self.status.ticks.values(), default=None)

    def note(self, status: WorkerStatus) -> None:
        self.status = status
        if status.kept is not None:
            self.told.append(status.kept)
            self.kept_bytes, self.forgot = status.kept.nbytes, status.kept.forgot
        self.windows = [*self.windows[: status.first], *status.windows]
        self.every = status.every

    def __str__(self) -> str:
        return f"{self.name} (blocks {', '.join(self.blocks)}; process {self.pid})"


class WorkerGroup:
    """actors: of one run, on a Ray that is up. As a context it ends them, and their sockets.

    A stream that cannot leave the driver's process is drawn in a thread here (`local_report` is
    what it leaves).
    """

    def __init__(self, plan: Plan, stream: Stream, session: Session) -> None:
        self._plan = plan
        self._stream = stream
        self.session = session
        # What cannot be drawn again a second time stays here, where its log keeps what it gave.
        keeps = plan.snapshot_policy is not None and plan.snapshot_policy.recover
        self._portable = stream.portable and (replays(stream) or not keeps)
        self._local: Worker | None = None
        self._keys: Keys | None = None  # this process's, where tcp sockets ask for one
        self._thread: threading.Thread | None = None
        self.local_report: WorkerReport | None = None
        self.actors: list[WorkerHandle] = []
        self._policy: list[Any] = []  # the calls of the latest keep() that have not been answered
        self._too_late = False
        self._called_off = False
        self.arithmetic = [plan.arithmetic]  # of all kinds of processes that the run has had
        self.notes: list[str] = []  # what there is to say of the actors before the first tick
        self.local_forgot = False  # as Actor.forgot, of a stream in this process
        self.lent = 0  # channels between GPUs of one host, at the start
        # Told of an actor that died, or ended with an error; answers whether it is replaced.
        self.on_lost: Callable[[WorkerHandle, HamdistError | None, HamdistError], bool] | None = (
            None
        )

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what was started, in whatever state it is."""
        with deaf_to_interrupts():
            self._end_local()
            self._end_actors()
            shutil.rmtree(socket_folder(self._plan.run), ignore_errors=True)

    @property
    def placement(self) -> list[list[str]]:
        """The blocks of each actor."""
        return [actor.blocks for actor in self.actors]

    def crowded(self) -> list[str]:
        """What is to be said of other hosts with more threads than processors (of this one it was
        said before the start)."""
        here = ray.get_runtime_context().get_node_id()
        told = []
        for node in ray.nodes():
            actors = sum(actor.node == node["NodeID"] for actor in self.actors)
            processors = int(node["Resources"].get("CPU", 0))
            if actors and node["NodeID"] != here:
                name = node["NodeManagerAddress"]
                told += thread_warnings(actors, self._plan.engine.threads, processors, name)
        return told

    def wire(
        self, startup: Startup, costs: Costs | None = None, measured: Costs | None = None
    ) -> Plan:
        """Starts the actors, gives them their blocks, opens and joins the sockets. Returns the plan
        that they have: with delays that hide the links, where they were to be chosen.

        costs: what the placement goes by, instead of parameters; measured: what the delays go by.
        """
        plan = self._plan
        cpus = int(ray.cluster_resources().get("CPU", 0))
        groups = place(plan.graph, plan.engine, max(1, _processors(cpus)), costs)
        with startup.phase("actors"):
            own = self._options_of_actors(groups, costs)
            handles = self._all_or_none(own)
            self.actors = [
                WorkerHandle(f"actor {i}", blocks, handle, actor_options)
                for i, (blocks, handle, actor_options) in enumerate(
                    zip(groups, handles, own, strict=True)
                )
            ]
            for actor, where in zip(self.actors, self._all("where", lambda _: ()), strict=True):
                actor.node, actor.address, actor.pid = where
            self._make_keys()
            answers = self._all("compute_as", lambda _: self.way_to_compute())
            self.notes += self.unlike(dict(zip(self.actors, answers, strict=True)))
        if plan.replan is not None and measured is not None:
            with startup.phase("links"):
                links = self._links()
                plan = plan.replan(least_delays(plan, self.placement, measured, links))
                self._plan = plan
        inside = self.inside()
        binds = [self.binds(i, inside) for i in range(len(inside))]

        def arguments(i: int) -> tuple[Any, ...]:
            blocks = self.actors[i].blocks
            return plan.only(blocks), blocks, self.stream_of(i), binds[i]

        ends: ReceivingEnds = {}
        with startup.phase("blocks"):
            for opened in self._all("prepare", arguments):
                ends |= opened
        with startup.phase("sockets"):
            self._all("connect", lambda _: (ends,))
            if not self._portable:
                self._local = Worker(plan.only([]), [], self._stream, self._keys)
                self._local.connect(ends)
            if any(end.address.startswith(GPU_SCHEME) for end in ends.values()):
                self._lend()
        return plan

    def _all_or_none(self, options_of_actors: Sequence[ActorOptions]) -> list[Any]:
        """Start an actor for each actor options, and hold none while others are missing.

        Two runs that start at once on a cluster with room for one of them could otherwise take half
        of it each and wait for each other. (Ray's placement groups reserve at once, too, but bind a
        replacement to what they reserved, and hosts by address, which raylets may share.)

        Returns:
            The actors' handles. Those of a cluster that is full are still pending.
        """
        patience = GATHER_SECONDS
        give_up = time.monotonic() + START_SECONDS
        while True:
            handles = self.session.actors(options_of_actors)
            if self._plan.engine.address is None:
                return handles
            calls = [handle.where.remote() for handle in handles]
            _, late = ray.wait(calls, num_returns=len(calls), timeout=patience)
            if not late or len(late) == len(calls) or time.monotonic() > give_up:
                return handles
            for handle in handles:
                ray.kill(handle)
            time.sleep(_random.uniform(0, patience))
            patience *= 2

    def _lend(self) -> None:
        """Lets all find out whether signals can stay on GPUs. Raises ClusterError where they have
        to."""
        self._all("answer_offers", lambda _: ())
        told = self._all("hear_answers", lambda _: ())
        self.lent = sum(offered for offered, _ in told)
        refusals = [refusal for _, those in told for refusal in those]
        if refusals and self._plan.engine.device_signals is DeviceSignals.IPC:
            channel, reason = refusals[0]
            raise ClusterError(
                f"engine.device_signals 'ipc': {channel}: {reason}; use 'auto', which goes through "
                "host memory where it has to"
            )

    @property
    def plan(self) -> Plan:
        """What the actors run."""
        return self._plan

    def inside(self) -> list[set[str]]:
        """The nodes of each actor."""
        inside = [set(actor.blocks) for actor in self.actors]
        if self._portable:
            inside[self._source_actor()].add(INPUT)
        return inside

    def stream_of(self, i: int) -> Stream | None:
        """The stream, if actor i draws it."""
        return self._stream if self._portable and i == self._source_actor() else None

    def _make_keys(self) -> None:
        """Each process gets a key pair for this run, where signals go by tcp (curve.py)."""
        engine = self._plan.engine
        here = ray.get_runtime_context().get_node_id()
        snapshot_policy = self._plan.snapshot_policy
        moves = (
            snapshot_policy is not None and snapshot_policy.recover and engine.address is not None
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
        """What each actor asks Ray for. Raises ClusterError for what the cluster does not have."""
        plan = self._plan
        asked = block_settings(plan.graph, plan.engine)
        known = hosts()
        names = list(plan.graph.blocks)
        work = by_parameters(plan.graph) if costs is None else costs.seconds
        busy = [sum(work[names.index(name)] for name in group) for group in groups]
        spread = plan.engine.spread if len(known) > 1 else Spread.AUTO
        speeds = host_seconds(known) if spread is Spread.PROFILE else None
        requests = [requirements(group, asked, plan.engine) for group in groups]
        found = options_of_actors(requests, known, spread, busy, speeds)
        if plan.engine.bits is not Bits.PORTABLE:
            return found
        return [actor_options.pinned(portable_environment()) for actor_options in found]

    def way_to_compute(self) -> tuple[Switches, int, bool]:
        """What `WorkerActor.compute_as` is told before an actor gets blocks."""
        return self._plan.switches, self._plan.engine.threads, self._plan.native

    def unlike(self, answers: Mapping[WorkerHandle, tuple[Arithmetic, list[str]]]) -> list[str]:
        """Looks whether actors compute the same bits as this process.

        Args:
            answers: of `WorkerActor.compute_as`, by actor.

        Returns:
            What is to be said of those that do not; it has been warned of.

        Raises:
            ClusterError: `engine.bits` asks for equal bits.
        """
        here = self._plan.arithmetic
        actors: dict[str, list[str]] = {}
        for actor, (there, refused) in answers.items():
            if there not in self.arithmetic:
                self.arithmetic.append(there)
            reasons = [*there.unlike(here), *refused]
            if reasons:
                text = f"on {there}, not as this process on {here}: {', '.join(reasons)}"
                actors.setdefault(text, []).append(f"{actor.name} ({actor.address})")
        told = [f"{', '.join(names)} would compute {text}" for text, names in actors.items()]
        notes = [other_bits(text, self._plan.engine.bits, ClusterError) for text in told]
        for note in notes:
            warnings.warn(note, HamdistWarning, stacklevel=2)  # (before they compute)
        return notes

    def _links(self) -> dict[tuple[int, int], Link]:
        """By pair of actors that exchange signals; between two hosts, or inside of one, one pair
        stands for all."""
        found: dict[frozenset[str], list[tuple[int, int]]] = {}
        for a, b in sorted(pairs(self._plan, self.placement)):
            hosts = frozenset([self.actors[a].node, self.actors[b].node])
            found.setdefault(hosts, []).append((a, b))
        firsts = [group[0] for group in found.values()]
        binds: list[dict[int, str]] = [{} for _ in self.actors]
        for number, (a, b) in enumerate(firsts):
            there, back = Probe.channels(number)
            first, second = self.actors[a], self.actors[b]
            binds[b][there.number] = self._way_between(there, first.node, first.key, second)
            binds[a][back.number] = self._way_between(back, second.node, second.key, first)
        run, late = self._plan.run, self._plan.engine.link_delay
        addresses: dict[int, str] = {}
        for opened in self._all("probe", lambda i: (run, late, binds[i])):
            addresses |= opened
        self._all("join_probe", lambda _: (addresses,))
        links: dict[tuple[int, int], Link] = {}
        for number, (group, (a, b)) in enumerate(zip(found.values(), firsts, strict=True)):
            link = self._measured(number, self.actors[a], self.actors[b])
            links |= dict.fromkeys(group, link)
        self._all("end_probe", lambda _: ())
        return links

    def _measured(self, number: int, first: WorkerHandle, second: WorkerHandle) -> Link:
        answered = second.handle.answer_probe.remote(number)
        try:
            link, _ = ray.get(
                [first.handle.measure_link.remote(number), answered], timeout=START_SECONDS
            )
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
        """The stream lives with the first block that reads it."""
        host = source_host(self._plan)
        return next(i for i, actor in enumerate(self.actors) if host in actor.blocks)

    def binds(
        self, i: int, inside: Sequence[set[str]], only: Sequence[WorkerHandle] | None = None
    ) -> dict[int, str]:
        """What actor i receives from other processes (`only`: from those), and the way it comes."""
        senders: set[str] | None = None
        if only is not None:
            senders = set().union(*(inside[self.actors.index(actor)] for actor in only))
        return {
            channel.number: self._way(channel, self.actors[i], inside)
            for channel in self._plan.channels.all()
            if channel.receiver in inside[i]
            and channel.sender not in inside[i]
            and (senders is None or channel.sender in senders)
        }

    def _way(self, channel: Channel, receiver: WorkerHandle, inside: Sequence[set[str]]) -> str:
        sender = next(
            (a for a, s in zip(self.actors, inside, strict=True) if channel.sender in s), None
        )
        if sender is not None:
            return self._way_between(channel, sender.node, sender.key, receiver)
        key = None if self._keys is None else self._keys.public
        here = ray.get_runtime_context().get_node_id()
        return self._way_between(channel, here, key, receiver)

    def _way_between(
        self, channel: Channel, node: str, key: str | None, receiver: WorkerHandle
    ) -> str:
        """node: the sender's host; key: its public key, if the receiver is to ask for it."""
        wanted = self._plan.engine.transport
        if wanted is TransportKind.TCP or (wanted is TransportKind.AUTO and node != receiver.node):
            host = LOOPBACK if node == receiver.node else receiver.address
            return TCP + host if key is None else f"{TCP}{host} {key}"
        if node != receiver.node:
            raise ClusterError(
                f"engine.transport {wanted.value!r}: {channel} crosses hosts; use 'auto' or 'tcp'"
            )
        best = local_way(channel)
        if wanted is TransportKind.SHM and best != SHM:
            raise ClusterError(
                f"engine.transport 'shm': {channel} has room for {channel.capacity} signals, more "
                f"than the {MAX_CAPACITY} that shared memory takes, or this platform has no such "
                "memory; use 'auto' or 'ipc'"
            )
        return IPC if wanted is TransportKind.IPC else best

    def _all(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Calls `method` of every actor at once and waits for all."""
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

    def start_again(self, actors: Sequence[WorkerHandle]) -> None:
        """These run (once more)."""
        for actor in actors:
            together = [a for a in self.actors if a.node == actor.node]
            actor.running = actor.handle.run.remote(together.index(actor), len(together))

    def connect_local(self, ends: ReceivingEnds) -> int:
        """The stream in this process sends to new ends (and runs, where it begins again)."""
        again = 0 if self._local is None else self._local.connect_anew(ends)
        self._start_local()
        return again

    @property
    def goes_back(self) -> bool:
        """Whether the stream can be drawn a second time."""
        return self._local is None or replays(self._stream)

    def renew_local(self, plan: Plan) -> None:
        """Make a stream in this process begin again, from the plan's snapshot.

        Raises:
            StreamError: it is in the midst of an item that does not come.
        """
        if self._local is None:
            return
        self._end_local()
        if self._thread is not None and self._thread.is_alive():
            raise StreamError(
                f"the stream has not yielded the next sample for {END_SECONDS:.0f} s, so it cannot "
                "be drawn again from an earlier one; go on from the latest snapshot (--resume)"
            )
        self._thread = self.local_report = None
        self._local = Worker(plan.only([]), [], self._stream, self._keys)

    def withdraw(self, key: str) -> None:
        """Nobody lets the holder of this key in any more."""
        for actor in self.actors:
            actor.handle.withdraw.remote(self._plan.run, key)

    def keep(self, tick: int) -> None:
        """All take a snapshot at `tick`."""
        self._policy = [
            actor.handle.keep.remote(self._plan.run, tick) for actor in self.running.values()
        ]
        self._too_late = self._local is not None and not self._local.keep(tick)

    def too_late(self) -> bool:
        """Whether somebody had passed the tick of the latest `keep` when it was told."""
        done, self._policy = (
            ray.wait(self._policy, num_returns=len(self._policy), timeout=0)
            if self._policy
            else ([], [])
        )
        for call in done:
            with contextlib.suppress(RayError):  # an actor that died is found by its run call
                self._too_late = self._too_late or not ray.get(call)
        return self._too_late

    def complete(self, tick: int) -> None:
        """All may forget what lies before that snapshot."""
        for actor in self.actors:
            actor.handle.complete.remote(self._plan.run, tick)
        if self._local is not None:
            self._local.complete(tick)

    def kept(self) -> list[SnapshotNews]:
        """What all have told of their snapshots since the last call."""
        found = [kept for actor in self.actors for kept in actor.told]
        for actor in self.actors:
            actor.told.clear()
        if self._local is not None:
            status = self._local.status(0, None)
            found += [] if status.kept is None else [status.kept]
            self.local_forgot = status.kept is not None and status.kept.forgot
        return found

    def start(self) -> None:
        """Everybody runs."""
        self.start_again(self.actors)
        self._start_local()

    def _start_local(self) -> None:
        if self._local is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run_local, daemon=True)
            self._thread.start()

    def _run_local(self) -> None:
        report = WorkerReport(error=StreamError("the thread of the stream ended before its time"))
        try:
            if self._local is not None:
                report = self._local.run()
        finally:  # a user's iterator may even raise SystemExit
            self.local_report = report

    @property
    def running(self) -> dict[Any, WorkerHandle]:
        """The run calls that have not been collected, with their actors."""
        return {a.running: a for a in self.actors if a.running is not None and a.report is None}

    @property
    def done(self) -> bool:
        finished = all(actor.report is not None for actor in self.actors)
        return finished and (self._local is None or self.local_report is not None)

    def wait(self, seconds: float, *, everybody: bool = False) -> None:
        """Waits for actors to finish, and collects their reports.

        Raises what ended an actor, or the stream.
        """
        calls = self.running
        if calls:
            number = len(calls) if everybody else 1
            failures = []
            for call in ray.wait(list(calls), num_returns=number, timeout=seconds)[0]:
                try:
                    self._collect(calls[call], call)
                except HamdistError as error:  # after the reports of the others
                    failures.append(error)
            if failures:
                raise failures[0]
        elif self._thread is not None:
            self._thread.join(seconds)
        if self.local_report is not None and self.local_report.error is not None:
            raise self.local_report.error

    def _collect(self, actor: WorkerHandle, call: Any) -> None:
        """The report of an actor that has finished. Raises what ended it."""
        try:
            actor.report = ray.get(call)
        except RayTaskError as error:
            raise ClusterError(f"{actor} failed: {last_line(error)}") from error
        except RayError as error:  # it, or its host with its report, or the way to it
            lost = ClusterError(
                f"{actor} died: {last_line(error)}; was it killed, or out of memory?"
            )
            if self.on_lost is not None and self.on_lost(actor, None, lost):
                actor.running = None
                return
            raise lost from error
        report = actor.report
        if report is not None and report.aborted and not self._called_off:
            report.error = ClusterError(
                f"{actor} ended before its time: it was called off by nobody"
            )
        if report is None or report.error is None:
            if report is not None and report.kept is not None:
                actor.told.append(report.kept)
            return
        if self.on_lost is not None and self.on_lost(actor, report.error, report.error):
            actor.report = actor.running = None
            return
        raise report.error

    def ask(self, now: float, seconds: float) -> None:
        """Asks every running actor how far it is, and notes the answers that come in time."""
        for actor in self.actors:
            if actor.report is None and actor.asked is None:
                actor.asked = actor.handle.status.remote(len(actor.windows), actor.every)
                actor.asked_at = now
        asked = {actor.asked: actor for actor in self.actors if actor.asked is not None}
        if not asked:
            return
        for call in ray.wait(list(asked), num_returns=len(asked), timeout=seconds)[0]:
            actor = asked[call]
            actor.asked = None
            with contextlib.suppress(RayError):  # an actor that died is found by its run call
                actor.note(ray.get(call))

    def silent(self, now: float, seconds: float = ANSWER_SECONDS) -> list[WorkerHandle]:
        """The actors that have not answered for a while."""
        return [a for a in self.actors if a.asked is not None and now - a.asked_at > seconds]

    def samples(self) -> int:
        """Samples that have entered the network."""
        if self._local is not None:
            return self._local.status(0, None).samples
        known = [a.report or a.status for a in self.actors]
        return max((k.samples for k in known if k is not None), default=0)

    def reports(self) -> list[WorkerReport]:
        """Of the actors that have finished, and of a stream in the driver."""
        reports = [a.report for a in self.actors if a.report is not None]
        return reports if self.local_report is None else [*reports, self.local_report]

    def stop_stream(self) -> None:
        """Ends the stream at its next sample; what is under way is finished."""
        if self._local is not None:
            self._local.stop_stream()
        else:
            self.actors[self._source_actor()].handle.stop_stream.remote(self._plan.run)

    def call_off(self) -> None:
        """Ends the runs as they are now; those that do not answer leave no report."""
        self._called_off = True
        for actor in self.running.values():
            actor.handle.abort.remote(self._plan.run)
        if self._local is not None:
            self._local.abort()
        self.wait(ANSWER_SECONDS, everybody=True)

    def _end_local(self) -> None:
        if self._local is None:
            return
        self._local.abort()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if self._thread is None or not self._thread.is_alive():  # a user's iterator may hang
            self._local.close()

    def _end_actors(self) -> None:
        """Lets the actors that obey take another run, and kills the others."""
        for actor in self.running.values():
            actor.handle.abort.remote(self._plan.run)
        runs = [a.running for a in self.actors if a.running is not None]
        ended = ray.wait(runs, num_returns=len(runs), timeout=OBEY_SECONDS)[0] if runs else []
        closed = {a.handle.close.remote(): a for a in self.actors if a.running in ended}
        calls = list(closed)
        done = ray.wait(calls, num_returns=len(calls), timeout=OBEY_SECONDS)[0] if calls else []
        obedient = []
        for call in done:
            with contextlib.suppress(RayError):  # it died
                ray.get(call)
                obedient.append(closed[call])
        self.session.idle.extend((actor.actor_options, actor.handle) for actor in obedient)
        killed = [actor for actor in self.actors if actor not in obedient]
        for actor in killed:
            ray.kill(actor.handle)
        self._outlast(killed)

    def _outlast(self, killed: Sequence[WorkerHandle]) -> None:
        """Waits until the processes of killed actors on this host are gone."""
        here = ray.get_runtime_context().get_node_id() if killed else ""
        processes = []
        for actor in killed:
            if actor.node == here:
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes.append(psutil.Process(actor.pid))
        psutil.wait_procs(processes, timeout=END_SECONDS)


def _processors(cpus: int) -> int:
    """Processors that the hosts of the cluster have, of the `cpus` that they have told Ray of; on
    this host Ray may have been told of more than there are."""
    here = ray.get_runtime_context().get_node_id()
    mine = next((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["NodeID"] == here), 0)
    return cpus - max(0, int(mine) - cores())


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
