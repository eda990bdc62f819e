"""The Ray engine: places the blocks in actors, wires them, watches them, tears them down.

Everything here runs in the driver. It is never on the way of a signal; only a stream that cannot
leave the driver's process sends its samples from a thread here.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from hamdist.config import TransportKind
from hamdist.dynamics.graph import INPUT
from hamdist.dynamics.metrics import Window
from hamdist.errors import ClusterError, StallError
from hamdist.runtime.cluster import Session, ray_session
from hamdist.runtime.host import Host, HostReport, HostStatus
from hamdist.runtime.memory import peak_bytes, reset_peak
from hamdist.runtime.outcome import Outcome, ending_on_interrupt
from hamdist.runtime.placement import place
from hamdist.runtime.plan import Plan
from hamdist.runtime.result import BlockProgress, Progress
from hamdist.runtime.signal import Channel
from hamdist.runtime.transport import socket_folder
from hamdist.runtime.watchdog import Watchdog, explain
from hamdist.streams.sample import Stream

POLL_SECONDS = 0.25
ANSWER_SECONDS = 5.0
START_SECONDS = 120.0
END_SECONDS = 10.0
OBEY_SECONDS = 2.0


@dataclass(slots=True)
class _Actor:
    """One actor as the driver knows it."""

    name: str
    blocks: list[str]
    handle: Any
    node: str = ""
    address: str = ""
    pid: int = 0
    running: Any = None  # the call of run()
    report: HostReport | None = None
    status: HostStatus | None = None
    asked: Any = None  # a status call under way
    asked_at: float = 0.0
    windows: list[Window] = field(default_factory=list)
    every: int | None = None

    def __str__(self) -> str:
        return f"{self.name} (blocks {', '.join(self.blocks)}; process {self.pid})"


class RayEngine:
    """Each block in an actor, neighbours together where there are fewer actors than blocks."""

    def run(
        self, plan: Plan, stream: Stream, on_progress: Callable[[Progress], None] | None = None
    ) -> Outcome:
        created = time.perf_counter()
        with ray_session(plan.engine) as session, _Run(plan, stream, session) as run:
            run.wire()
            started = time.perf_counter()
            outcome = run.watch(on_progress, started)
            outcome.startup_seconds = started - created
            return outcome


class _Run:
    """One run on a Ray that is up. As a context it ends its actors, sockets and thread."""

    def __init__(self, plan: Plan, stream: Stream, session: Session) -> None:
        self._plan = plan
        self._session = session
        self._stream = stream
        self._actors: list[_Actor] = []
        self._local: Host | None = None
        self._thread: threading.Thread | None = None
        self._local_report: HostReport | None = None
        self._watchdog = Watchdog(plan.engine.stall_warning, plan.engine.stall_limit)
        self._warnings: list[str] = []
        self._note: str | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._tear_down()

    # -- starting -----------------------------------------------------------------------------

    def wire(self) -> None:
        """Starts the actors, gives them their blocks, opens and joins the sockets."""
        plan = self._plan
        cpus = int(ray.cluster_resources().get("CPU", 0))
        groups = place(plan.graph, plan.engine, max(1, cpus))
        if len(groups) > cpus:
            raise ClusterError(
                f"{len(groups)} actors need as many CPUs, the Ray cluster has {cpus}; set "
                "engine.actors to at most that, or 'auto'"
            )
        self._actors = [
            _Actor(f"actor {i}", blocks, self._session.actor()) for i, blocks in enumerate(groups)
        ]
        for actor, where in zip(self._actors, self._all("where", lambda _: ()), strict=True):
            actor.node, actor.address, actor.pid = where
        inside = [set(actor.blocks) for actor in self._actors]
        portable = self._stream.portable
        if portable:
            inside[self._source_actor()].add(INPUT)
        binds = [self._binds(i, inside) for i in range(len(inside))]

        def arguments(i: int) -> tuple[Any, ...]:
            own = self._stream if INPUT in inside[i] else None
            return plan.only(self._actors[i].blocks), self._actors[i].blocks, own, binds[i]

        addresses: dict[int, str] = {}
        for opened in self._all("prepare", arguments):
            addresses |= opened
        self._all("connect", lambda _: (addresses,))
        if not portable:
            self._local = Host(plan.only([]), [], self._stream)
            self._local.connect(addresses)

    def _source_actor(self) -> int:
        """The stream lives with the first block that reads it."""
        readers = {e.child for e in self._plan.graph.out_of[INPUT]} or set(
            self._plan.graph.readouts
        )
        return next(i for i, actor in enumerate(self._actors) if readers & set(actor.blocks))

    def _binds(self, i: int, inside: Sequence[set[str]]) -> dict[int, str | None]:
        """What actor i receives from other processes: on tcp at its address, or on ipc (None)."""
        me = self._actors[i]
        return {
            channel.number: me.address if self._tcp(channel, me, inside) else None
            for channel in self._plan.channels.all()
            if channel.receiver in inside[i] and channel.sender not in inside[i]
        }

    def _tcp(self, channel: Channel, receiver: _Actor, inside: Sequence[set[str]]) -> bool:
        wanted = self._plan.engine.transport
        sender = next(
            (a for a, s in zip(self._actors, inside, strict=True) if channel.sender in s), None
        )
        node = sender.node if sender is not None else ray.get_runtime_context().get_node_id()
        if wanted is TransportKind.IPC and node != receiver.node:
            raise ClusterError(
                f"engine.transport 'ipc': {channel} crosses hosts; use 'auto' or 'tcp'"
            )
        return wanted is TransportKind.TCP or node != receiver.node

    def _all(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Calls `method` of every actor at once and waits for all."""
        calls = [
            getattr(actor.handle, method).remote(*arguments(i))
            for i, actor in enumerate(self._actors)
        ]
        try:
            return list(ray.get(calls, timeout=START_SECONDS))
        except GetTimeoutError:
            raise ClusterError(
                f"the actors did not start within {START_SECONDS:.0f} s; the cluster may lack "
                f"free CPUs for {len(self._actors)} actors (ray status shows them)"
            ) from None
        except RayError as error:
            raise ClusterError(f"an actor failed while it started: {_last_line(error)}") from error

    # -- running ------------------------------------------------------------------------------

    def watch(self, on_progress: Callable[[Progress], None] | None, started: float) -> Outcome:
        """Runs the actors to their end, or to the first error, which it raises."""
        reset_peak()
        for actor in self._actors:
            actor.running = actor.handle.run.remote()
        calls = {actor.running: actor for actor in self._actors}
        if self._local is not None:
            self._thread = threading.Thread(target=self._run_local, daemon=True)
            self._thread.start()
        stop = threading.Event()
        with ending_on_interrupt(stop.set) as interrupted:
            try:
                self._until_done(calls, stop, on_progress, started)
            except KeyboardInterrupt:  # the second Ctrl-C: end at once
                self._call_off(calls)
        self._report_progress(on_progress, started)
        return self._outcome(started, interrupted())

    def _until_done(
        self,
        calls: dict[Any, _Actor],
        stop: threading.Event,
        on_progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        end_by: float | None = None
        while calls or (self._local is not None and self._local_report is None):
            done, _ = ray.wait(list(calls) or [ray.put(None)], timeout=POLL_SECONDS)
            for call in done:
                if call in calls:
                    self._collect(calls.pop(call), call)
            if self._local_report is not None and self._local_report.error is not None:
                raise self._local_report.error
            if stop.is_set() and end_by is None:
                end_by = time.monotonic() + END_SECONDS
                self._stop_stream()
            if end_by is not None and time.monotonic() > end_by:
                self._call_off(calls)
                return
            self._look()
            self._report_progress(on_progress, started)

    def _collect(self, actor: _Actor, call: Any) -> None:
        """The report of an actor that has finished. Raises what ended it."""
        try:
            actor.report = ray.get(call)
        except RayActorError as error:
            raise ClusterError(
                f"{actor} died: {_last_line(error)}; was it killed, or out of memory?"
            ) from error
        except RayError as error:
            raise ClusterError(f"{actor} failed: {_last_line(error)}") from error
        if actor.report is not None and actor.report.error is not None:
            raise actor.report.error

    def _call_off(self, calls: dict[Any, _Actor]) -> None:
        """Takes the reports of the actors as they are now; those that do not answer give none."""
        for actor in calls.values():
            actor.handle.abort.remote()
        if self._local is not None:
            self._local.abort()
        if calls:
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_SECONDS)
            for call in done:
                self._collect(calls.pop(call), call)

    def _run_local(self) -> None:
        if self._local is not None:
            self._local_report = self._local.run()

    def _stop_stream(self) -> None:
        if self._local is not None:
            self._local.stop_stream()
        else:
            self._actors[self._source_actor()].handle.stop_stream.remote()

    def _look(self) -> None:
        """Asks every running actor how far it is, and lets the watchdog judge."""
        now = time.monotonic()
        for actor in self._actors:
            if actor.report is None and actor.asked is None:
                actor.asked = actor.handle.status.remote(len(actor.windows), actor.every)
                actor.asked_at = now
        asked = {actor.asked: actor for actor in self._actors if actor.asked is not None}
        if asked:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)
            for call in answered:
                actor = asked[call]
                actor.asked = None
                # An actor that died is found by its run call.
                with contextlib.suppress(RayError):
                    self._note_status(actor, ray.get(call))
        position = {b: k for a in self._actors if a.status for b, k in a.status.ticks.items()}
        position |= {a.name: a.report is not None for a in self._actors}
        still, speak = self._watchdog.look(position, now)
        if speak or self._watchdog.over(still):
            text = self._explain(still, now)
            if self._watchdog.over(still):
                raise StallError(text)
            self._warnings.append(text)
            self._note = text
        elif still == 0:
            self._note = None

    @staticmethod
    def _note_status(actor: _Actor, status: HostStatus) -> None:
        actor.status = status
        actor.windows = [*actor.windows[: status.first], *status.windows]
        actor.every = status.every

    def _explain(self, still: float, now: float) -> str:
        waits = [a.status.wait for a in self._actors if a.status and a.status.wait]
        ticks = {b: k for a in self._actors if a.status for b, k in a.status.ticks.items()}
        silent = [
            str(a)
            for a in self._actors
            if a.asked is not None and now - a.asked_at > ANSWER_SECONDS
        ]
        return explain(waits, ticks, silent, still)

    def _report_progress(
        self, on_progress: Callable[[Progress], None] | None, started: float
    ) -> None:
        if on_progress is None:
            return
        blocks = []
        for actor in self._actors:
            for block in actor.blocks:
                status = actor.status
                wait = status.wait if status is not None else None
                blocks.append(
                    BlockProgress(
                        block=block,
                        tick=status.ticks.get(block, 0) if status is not None else 0,
                        updates=status.updates.get(block, 0) if status is not None else 0,
                        waiting=wait.what if wait is not None and wait.waiter == block else None,
                    )
                )
        on_progress(
            Progress(
                seconds=time.perf_counter() - started,
                samples=self._samples(),
                steps=self._plan.steps,
                windows=next((a.windows for a in self._actors if a.every is not None), []),
                blocks=blocks,
                note=self._note,
            )
        )

    def _samples(self) -> int:
        if self._local is not None:
            return self._local.status(0, None).samples
        done = [a.report.samples for a in self._actors if a.report is not None]
        return max(
            [*done, *(a.status.samples for a in self._actors if a.status is not None)], default=0
        )

    def _outcome(self, started: float, interrupted: bool) -> Outcome:
        reports = [a.report for a in self._actors if a.report is not None]
        every = [*reports, *([self._local_report] if self._local_report is not None else [])]
        memory = {a.name: a.report.peak_memory for a in self._actors if a.report is not None}
        sent: dict[str, int] = {}
        for report in every:
            for edge, number in report.payload_bytes.items():
                sent[edge] = sent.get(edge, 0) + number
        windows: dict[str, list[Window]] = {}
        for actor in self._actors:
            if actor.report is not None:
                windows |= actor.report.windows
            elif actor.every is not None:
                windows |= dict.fromkeys(self._plan.graph.readouts[:1], actor.windows)
        smooth = [r.smoothness for r in every if r.smoothness is not None]
        seconds = max((r.seconds for r in reports), default=time.perf_counter() - started)
        return Outcome(
            blocks={name: state for r in reports for name, state in r.blocks.items()},
            windows=windows,
            samples=max([self._samples(), *(r.samples for r in every)]),
            ticks=max((r.ticks for r in reports), default=0),
            seconds=seconds,
            startup_seconds=0.0,
            payload_bytes=sent,
            peak_memory={"driver": peak_bytes(), **memory},
            smoothness=smooth[0] if smooth else None,
            interrupted=interrupted,
            warnings=self._warnings,
        )

    # -- ending -------------------------------------------------------------------------------

    def _tear_down(self) -> None:
        """Ends what `wire` and `watch` started, in whatever state it is."""
        if self._local is not None:
            self._local.abort()
            if self._thread is not None:
                self._thread.join(END_SECONDS)
            self._local.close()
        self._end_calls()
        for actor in self._actors:
            if actor.handle not in self._session.idle:
                ray.kill(actor.handle)
        self._outlast([a for a in self._actors if a.handle not in self._session.idle])
        shutil.rmtree(socket_folder(self._plan.run), ignore_errors=True)

    def _end_calls(self) -> None:
        """Calls off what still runs, and lets the actors that obey take another run."""
        for actor in self._actors:
            if actor.running is not None and actor.report is None:
                actor.handle.abort.remote()
        runs = [a.running for a in self._actors if a.running is not None]
        ended = ray.wait(runs, num_returns=len(runs), timeout=OBEY_SECONDS)[0] if runs else []
        closed = {a.handle.close.remote(): a for a in self._actors if a.running in ended}
        done = (
            ray.wait(list(closed), num_returns=len(closed), timeout=OBEY_SECONDS)[0]
            if closed
            else []
        )
        for call in done:
            with contextlib.suppress(RayError):  # it died: it is not among the idle ones
                ray.get(call)
                self._session.idle.append(closed[call].handle)

    def _outlast(self, killed: Sequence[_Actor]) -> None:
        """Waits until the processes of killed actors on this host are gone."""
        here = ray.get_runtime_context().get_node_id() if killed else ""
        processes = []
        for actor in killed:
            if actor.node == here:
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes.append(psutil.Process(actor.pid))
        psutil.wait_procs(processes, timeout=END_SECONDS)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
