"""The engine in one process: the oracle of every other one."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import inf

from hamdist.display.network import NetworkActor
from hamdist.dynamics.graph.graph import INPUT
from hamdist.errors import HamdistError, SnapshotError
from hamdist.runtime.engines.update_probe import Alignments
from hamdist.runtime.engines.worker_report import Sampler, WorkerReport, merged
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import order_of, run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.derived import network_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.interrupts import OnProgress, RunInterrupts
from hamdist.runtime.process.threads import torch_threads
from hamdist.runtime.process.usage import keep_freed_memory, reset_peak
from hamdist.runtime.results.digests import Digests
from hamdist.runtime.results.result import BlockProgress, Outcome, Progress
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue, SnapshotFailures
from hamdist.runtime.snapshots.process_snapshots import ProcessSnapshots, StatefulNode, WrittenFiles
from hamdist.streams.live import LiveStream, live_of
from hamdist.streams.sample import Stream

PROGRESS_SECONDS = 0.25
LATEST = 4  # times as long at most, where a report costs more of the processor's time than this:
REPORT_SHARE = 0.004
DRIVER = "driver"  # the only process


class InProcessEngine:
    """Steps all blocks of a graph in the calling thread; deterministic.

    watch: sees all signals and steps, as digests do, instead of those that the plan asks for.
    """

    def __init__(self, watch: Digests | None = None) -> None:
        self._watch = watch

    def run(self, plan: Plan, stream: Stream, on_progress: OnProgress | None = None) -> Outcome:
        with torch_threads(plan.engine.threads):  # (restored states are computed, too)
            return self._run(plan, stream, on_progress)

    def _run(self, plan: Plan, stream: Stream, on_progress: OnProgress | None) -> Outcome:
        created = time.perf_counter()
        inside = {INPUT, *plan.graph.blocks}
        sent_log = None if plan.snapshot_policy is None else SentLog(inside, replays=False)
        digests = self._watch
        if digests is None and plan.engine.digests:
            digests = Digests(int(plan.engine.digests))
        mailbox = Mailbox(inside, sent_log=sent_log, digests=digests)
        source = SourceNode(plan, stream, mailbox)
        nodes = [make_node(plan, name, mailbox) for name in plan.graph.blocks]
        measured = [n for n in nodes if n.metrics is not None]
        live = live_of(stream)
        supervision: InProcessSnapshots | None = None
        if sent_log is not None:
            supervision = InProcessSnapshots(plan, [source, *nodes], mailbox, sent_log, live)
            supervision.restore()
        reset_peak()
        keep_freed_memory()
        writer = None if supervision is None else supervision.snapshot_writer
        sampler = Sampler(plan, [source, *nodes], mailbox, writer=writer)
        started = time.perf_counter()
        due = latest = started
        reported = cost = 0.0  # processor seconds: at the end of the latest report, and of it
        failure: HamdistError | None = None

        actor = NetworkActor(DRIVER, socket.gethostname(), list(plan.graph.blocks))
        network = network_of(plan, [actor])

        alignments = Alignments(plan)

        def progress(*, over: bool = False) -> Progress:
            actors = {DRIVER: sampler.sample()}
            windows = {n.name: list(n.metrics.windows) for n in measured if n.metrics}
            readout = next(iter(windows), "")
            return Progress(
                seconds=time.perf_counter() - started,
                samples=source.samples,
                rows=source.rows,
                steps=plan.steps,
                resumed=plan.resumed,
                windows=windows.pop(readout, []),
                readout=readout,
                others=windows,
                blocks=[
                    BlockProgress(n.name, n.event.tick, n.block.weights.updates) for n in nodes
                ],
                actors=actors,
                alignment=alignments.of(actors),
                network=network,
                snapshots=[] if supervision is None else supervision.snapshots,
                warnings=[] if supervision is None else supervision.warnings,
                over=over,
            )

        def between() -> None:
            nonlocal due, reported, cost, latest
            if supervision is not None:
                supervision.poll()
            if not ending.reports:
                return
            sampler.poll()
            now = time.perf_counter()
            if now < due:
                return
            begin = time.process_time()
            due = now + PROGRESS_SECONDS
            if begin - reported < cost / REPORT_SHARE and now < latest:
                return
            ending.report(progress())
            reported = time.process_time()
            cost, latest = reported - begin, now + LATEST * PROGRESS_SECONDS

        stop = source.stop.set if supervision is None else supervision.stopping(source.stop.set)
        keep = None if supervision is None else supervision.request
        ending = RunInterrupts(stop, on_progress, keep)
        source.waits_with(between)
        if live is not None:
            for node in nodes:
                node.live.send = live.send
            live.read_states = lambda: {n.name: n.state() for n in nodes}

        with ending, supervision or nullcontext():
            try:
                action = None if supervision is None else supervision.snapshot_writer
                run_loop(
                    [*nodes, source],  # (a tick is over before the next sample is drawn)
                    between,
                    action,
                    started=supervision is not None and supervision.on,
                    after_step=None if digests is None else digests.after_step,
                    order=order_of(plan, plan.graph.blocks),
                )
            except HamdistError as error:
                failure = error
            except KeyboardInterrupt:  # the second Ctrl-C: end at once, in whatever state it is
                ending.interrupted = True
            for node in measured:
                if node.metrics is not None:
                    node.metrics.flush()
        if ending.reports:
            sampler.measure()
            ending.report(progress(over=True))
        report = WorkerReport(seconds=time.perf_counter() - started)
        report.take(nodes, source, mailbox, sampler)
        outcome = Outcome(
            **merged({DRIVER: report}),
            seconds=report.seconds,
            startup={"blocks": started - created},
            placement=[list(plan.graph.blocks)],
            snapshots=[] if supervision is None else supervision.snapshots,
            warnings=[] if supervision is None else supervision.warnings,
        )
        return ending.note(outcome, failure)


# -- snapshots: when they are due, and when they are complete --------------------------------------


class InProcessSnapshots:
    """Takes the snapshots of a run in one process; as a context it waits for the last files.

    `on` is true if the run resumes from a snapshot.
    """

    def __init__(
        self,
        plan: Plan,
        nodes: Sequence[StatefulNode],
        mailbox: Mailbox,
        sent_log: SentLog,
        live: LiveStream | None = None,
    ) -> None:
        if plan.snapshot_policy is None:
            raise ValueError("the run keeps nothing")
        self._nodes = nodes
        self._live = live
        self._policy = plan.snapshot_policy
        self._catalogue = SnapshotCatalogue(plan)
        self._failures = SnapshotFailures()
        self.snapshot_writer = ProcessSnapshots(plan, nodes, mailbox, sent_log, self._written)
        self.on = plan.snapshot_policy.snapshot is not None
        self._seconds = plan.snapshot_policy.section.seconds or inf
        self._due = time.monotonic() + self._seconds
        self._for_user: int | None = None  # the tick of one that a user waits for

    def restore(self) -> None:
        """Restore the state of the snapshot that the run resumes from."""
        if self._policy.snapshot is not None:
            self.snapshot_writer.restore(self._policy.snapshot)

    def poll(self) -> None:
        """Request a snapshot if one is due; called between two events."""
        self._look_for_failures()
        live, now = self._live, time.monotonic()
        wanted = live is not None and live.wanted == "snapshot" and self._for_user is None
        if (wanted or now >= self._due) and (live is None or live.free(wanted=wanted)):
            self._due = now + self._seconds
            tick = self._soon()
            if self.snapshot_writer.ask(tick) and live is not None and (wanted or live.whole):
                self._for_user = tick if wanted else self._for_user
                live.idle_until(tick)

    def request(self) -> None:
        """Take a snapshot soon."""
        self._due = 0.0

    def _look_for_failures(self) -> None:
        failure = self.snapshot_writer.failure()
        if failure is not None:
            self._failures.add(failure)
            self._give(SnapshotError(failure))
            self._catalogue.forget_tries(self.snapshot_writer.reached)

    def _soon(self) -> int:
        """Return the next tick that no node has begun."""
        return min((n.tick for n in self._nodes if n.tick is not None), default=0) + 1

    def stopping(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Return a function that takes a last snapshot and then calls `stop`."""

        def ask() -> None:
            if not self.snapshot_writer.ask(self._soon(), stop):
                stop()

        return ask

    def _written(self, files: WrittenFiles) -> None:
        complete = self._catalogue.put(files)
        if complete is not None and self._for_user is not None and complete.tick >= self._for_user:
            self._give(str(complete))

    def _give(self, snapshot: str | SnapshotError) -> None:
        if self._live is not None and self._for_user is not None:
            self._live.give("snapshot", snapshot)
            self._for_user = None

    @property
    def snapshots(self) -> list[str]:
        """Return the complete snapshots of the run."""
        return self._catalogue.snapshots

    @property
    def warnings(self) -> list[str]:
        """Return the warnings so far."""
        self._look_for_failures()
        return self._failures.texts()

    def __enter__(self) -> InProcessSnapshots:
        return self

    def __exit__(self, *_: object) -> None:
        self.snapshot_writer.close()
        if self.warnings:
            self._catalogue.forget_tries(sys.maxsize)
