"""The Ray engine: one run from its start to its outcome.

Everything here runs in the driver, which is never on the way of a signal.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import BlockError, ClusterError, HamdistError, SnapshotError, StallError
from hamdist.runtime.advice.advice import gpu_signal_notes, placement_notes, unmeasured_notes
from hamdist.runtime.engines.update_probe import Alignments
from hamdist.runtime.engines.worker_report import BlockedChannel, merged
from hamdist.runtime.placement.assign_blocks import Costs, place
from hamdist.runtime.placement.step_costs import (
    PREDICTION_SECONDS,
    Unmeasured,
    measured_costs,
    predicts,
    unmeasured_costs,
    wants_costs,
)
from hamdist.runtime.plan.derived import network_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.interrupts import OnProgress, RunInterrupts
from hamdist.runtime.process.startup import Startup, phases_to
from hamdist.runtime.process.threads import cores, torch_threads
from hamdist.runtime.process.usage import peak_bytes, reset_peak
from hamdist.runtime.ray_engine.auth_token import token_notes
from hamdist.runtime.ray_engine.cluster_hosts import HEAD_SECONDS, HeadWatch, answers
from hamdist.runtime.ray_engine.placed_workers import END_SECONDS
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.ray_engine.supervision import SnapshotSupervision
from hamdist.runtime.ray_engine.worker_group import Entered, WorkerGroup
from hamdist.runtime.results.result import BlockProgress, Outcome, Progress
from hamdist.streams.sample import Stream

POLL_SECONDS = 0.25


class RayEngine:
    """Runs each block in an actor; with fewer actors than blocks, neighbours share one."""

    def run(self, plan: Plan, stream: Stream, on_progress: OnProgress | None = None) -> Outcome:
        startup = Startup(phases_to(on_progress, plan.steps))
        place(plan.graph, plan.engine, cores())  # refuses what cannot be placed before Ray starts
        notes: list[str] = []
        costs = unmeasured_costs(plan)
        measured: Costs | None = None
        places = wants_costs(plan)
        needed = places or plan.replan is not None
        if needed or predicts(plan):
            limit = None if needed else PREDICTION_SECONDS
            with startup.phase("measure"):
                try:
                    measured = measured_costs(plan, portable=stream.portable, limit=limit)
                    costs = measured if places else costs
                except Unmeasured as reason:
                    notes += unmeasured_notes(str(reason), places, plan.replan is not None)
        with torch_threads(plan.engine.threads), ExitStack() as stack:  # (of a stream drawn here)
            with startup.phase("ray"):
                session = stack.enter_context(ray_session(plan.engine))
            worker_group = stack.enter_context(WorkerGroup(plan, stream, session))
            auto = plan.replan is not None
            plan = worker_group.wire(startup, costs, measured)
            worker_group.keep_spares()
            notes += worker_group.notes
            notes += placement_notes(plan, worker_group.placement, costs)
            notes += worker_group.crowded() if plan.engine.address is not None else []
            notes += token_notes(plan.engine)
            outcome = _Watch(plan, worker_group, on_progress).to_the_end()
            refusals = [refusal for report in worker_group.reports() for refusal in report.refusals]
            notes += gpu_signal_notes(plan.engine, worker_group.gpu_channels, refusals)
            outcome.startup = startup.seconds
            if measured is not None and measured.model is not None and predicts(plan):
                outcome.predicted = worker_group.predicted(replace(measured.model, plan=plan))
            if auto:
                outcome.delays = {e.name: e.delay for e in plan.graph.edges if not e.from_input}
            outcome.warnings[:0] = notes
            return outcome


class _Watch:
    """Follows a worker group from its start to its end."""

    def __init__(
        self, plan: Plan, worker_group: WorkerGroup, on_progress: OnProgress | None
    ) -> None:
        self._plan = plan
        self._worker_group = worker_group
        self._stop = threading.Event()
        self._watchdog = Watchdog(plan.engine.stall_warning, plan.engine.stall_limit)
        self._warnings: list[str] = []
        self._note: str | None = None
        self._entered = Entered(plan.resumed)
        self._windows: dict[str, list[Window]] = {}
        self._network: PlacedNetwork | None = None
        self._alignments = Alignments(plan)
        self._head = HeadWatch()
        self._supervision = (
            None
            if plan.snapshot_policy is None
            else SnapshotSupervision(plan, worker_group, plan.snapshot_policy)
        )
        keep = None if self._supervision is None else self._supervision.request
        self._ending = RunInterrupts(self._stop.set, on_progress, keep)
        self.started, self._seconds = time.perf_counter(), 0.0

    def to_the_end(self) -> Outcome:
        """Follow the run until its stream ends, the user stops it, or an error ends it."""
        failure: HamdistError | None = None
        reset_peak()
        self._worker_group.start()
        with self._ending, self._worker_group.news_fetched():
            try:
                self._follow(self._stop)
            except KeyboardInterrupt:  # the second Ctrl-C: end at once, whatever state it is in
                self._ending.interrupted = True
                with contextlib.suppress(HamdistError):
                    self._worker_group.call_off()
            except HamdistError as error:
                failure = self._first(error)
        self._seconds = time.perf_counter() - self.started
        self._report_progress(over=True)
        return self._outcome(failure)

    def _first(self, error: HamdistError) -> HamdistError:
        """Call the run off, and return the first failure, where several blocks have failed. The
        first one is that of the least tick, then of the first block in the graph's order."""
        with contextlib.suppress(HamdistError):
            self._worker_group.call_off()
        if not isinstance(error, BlockError):
            return error
        order = list(self._plan.graph.blocks)
        errors = [r.error for r in self._worker_group.reports() if isinstance(r.error, BlockError)]
        return min([error, *errors], key=lambda e: (e.tick, order.index(e.block)))

    def _follow(self, stop: threading.Event) -> None:
        end_by: float | None = None
        supervision = self._supervision
        while not self._worker_group.done:
            self._worker_group.wait(POLL_SECONDS)
            now = time.monotonic()
            # (a snapshot first)
            if stop.is_set() and end_by is None and (supervision is None or supervision.last(now)):
                end_by = now + END_SECONDS
                self._worker_group.stop_stream()
            if end_by is not None and (now > end_by or self._lost_while_ending()):
                self._worker_group.call_off()
                return
            self._poll()
            if end_by is None and self._head_is_lost(now):
                stop.set()  # the actors are there: what they have learned is fetched
                continue
            if supervision is not None and supervision.lost and not self._head_answers():
                continue  # nothing can be replaced before it does
            if supervision is not None and end_by is None and not self._mended(stop):
                self._worker_group.call_off()
                return
            self._report_progress()

    def _head_answers(self) -> bool:
        address = self._plan.engine.address
        return address is None or answers(address)

    def _head_is_lost(self, now: float) -> bool:
        """Return True if the head of a joined cluster, or of a local Ray, is gone for good. Nothing
        can be replaced then, and Ray would end this process after a minute. The run ends with an
        error that names the cause."""
        if self._ending.error is not None:
            return False
        text = self._worker_group.session.lost
        address = self._plan.engine.address
        if address is not None and self._head.lost(address, now):
            text = (
                f"the head of the Ray cluster at {address} has not answered for "
                f"{HEAD_SECONDS:.0f} s; start it again"
            )
        if text:
            policy = self._plan.snapshot_policy
            self._ending.error = ClusterError(
                f"{text}, and go on "
                + (
                    "from the beginning: no snapshots were taken (snapshots.path)"
                    if policy is None
                    else f"from the latest snapshot: --resume {policy.path}"
                )
            )
        return bool(text)

    def _lost_while_ending(self) -> bool:
        """Return True if an actor was lost while the run ends. A replacement would start behind the
        signals its neighbours wait for, and could not finish."""
        lost = [] if self._supervision is None else self._supervision.lost
        self._warnings += [f"{actor} while the run was ending" for actor in lost]
        return bool(lost)

    def _mended(self, stop: threading.Event) -> bool:
        """Take snapshots and replace lost actors. Returns False if that fails in a run that is to
        end anyway; otherwise raises the failure."""
        try:
            if self._supervision is not None:
                self._supervision.poll(time.monotonic())
        except (ClusterError, SnapshotError) as error:
            if not stop.is_set():
                raise
            self._warnings.append(f"{error} (while the run was ending)")
            return False
        return True

    def _poll(self) -> None:
        """Query the progress of all actors, and pass it to the watchdog. Raises StallError."""
        now = time.monotonic()
        actors = self._worker_group.actors
        self._worker_group.ask(now, POLL_SECONDS)
        ticks = {b: k for a in actors if a.status for b, k in a.status.ticks.items()}
        finished = {a.name: a.report is not None for a in actors}
        live = self._worker_group.live
        rests = {"stream": now} if live is not None and live.rests else {}
        still, speak = self._watchdog.poll({**ticks, **finished, **rests}, now)
        over = self._watchdog.over(still)
        if speak or over:
            waits = [a.status.wait for a in actors if a.status and a.status.wait]
            silent = [str(actor) for actor in self._worker_group.silent(now)]
            text = explain(waits, ticks, silent, still)
            if over:
                raise StallError(
                    text + ("" if self._supervision is None else self._supervision.resume_hint)
                )
            self._warnings.append(text)
            self._note = text
        elif still == 0:
            self._note = None

    def _report_progress(self, *, over: bool = False) -> None:
        if not self._ending.reports:
            return
        blocks = []
        for actor in self._worker_group.actors:
            for block in actor.blocks:
                status = actor.status
                wait = status.wait if status is not None else None
                blocks.append(
                    BlockProgress(
                        block=block,
                        tick=status.ticks.get(block, 0) if status is not None else 0,
                        updates=status.updates.get(block, 0) if status is not None else 0,
                        waiting=wait.waits_for
                        if wait is not None and wait.waiter == block
                        else None,
                    )
                )
        # An actor that is replaced begins behind where it was: what was reached stays reached.
        self._entered = max(self._entered, self._worker_group.entered())
        for name, windows in self._worker_group.windows().items():
            shown = self._windows.get(name)
            if windows and (not shown or windows[-1].last >= shown[-1].last):
                self._windows[name] = windows
        readout = self._plan.graph.readouts[0]
        actors = self._worker_group.samples_of_processes()
        hosts = [NetworkActor(a.name, a.address, a.blocks) for a in self._worker_group.actors]
        if self._network is None or self._network.actors != hosts:
            self._network = network_of(self._plan, hosts)
        self._ending.report(
            Progress(
                seconds=time.perf_counter() - self.started,
                samples=self._entered.samples,
                rows=self._entered.rows,
                steps=self._plan.steps,
                resumed=self._plan.resumed,
                windows=self._windows.get(readout, []),
                readout=readout,
                others={n: w for n, w in self._windows.items() if n != readout},
                blocks=blocks,
                actors=actors,
                alignment=self._alignments.of(actors),
                network=self._network,
                snapshots=[] if self._supervision is None else self._supervision.snapshots,
                warnings=self._all_warnings(),
                note=self._note,
                replaced=() if self._supervision is None else tuple(self._supervision.replaced),
                over=over,
            )
        )

    def _all_warnings(self) -> list[str]:
        return self._warnings + ([] if self._supervision is None else self._supervision.warnings)

    def _outcome(self, failure: HamdistError | None) -> Outcome:
        group = self._worker_group
        replaced = [] if self._supervision is None else self._supervision.replaced
        seconds = max((r.seconds for r in group.reports()), default=0.0)
        if replaced or not seconds:  # (those count from their new start)
            seconds = max(seconds, self._seconds)
        reports = {a.name: a.report for a in group.actors if a.report is not None}
        outcome = Outcome(
            **merged(reports, group.local_report),
            seconds=seconds,
            placement=group.placement,
            snapshots=[] if self._supervision is None else self._supervision.snapshots,
            replaced=replaced,
            warnings=self._all_warnings(),
        )
        outcome.windows = group.windows()
        entered = max(Entered(outcome.samples, outcome.rows), group.entered())
        outcome.samples, outcome.rows = entered
        outcome.peak_memory = {"driver": peak_bytes(), **outcome.peak_memory}
        return self._ending.note(outcome, failure)


# -- watchdog --------------------------------------------------------------------------------------


class Watchdog:
    """Measures the seconds without progress: warns after `warning`, gives up after `limit`."""

    def __init__(self, warning: float, limit: float) -> None:
        self._warning = warning
        self._limit = limit
        self._last: Mapping[str, object] = {}
        self._since = time.monotonic()
        self._spoken = False

    def poll(self, position: Mapping[str, object], now: float) -> tuple[float, bool]:
        """Note the position of all blocks.

        Returns the seconds without progress, and True if a warning is due (once per standstill).
        """
        if position != self._last:
            self._last = dict(position)
            self._since = now
            self._spoken = False
        still = now - self._since
        speak = still >= self._warning and not self._spoken
        self._spoken = self._spoken or speak
        return still, speak

    def over(self, still: float) -> bool:
        """Return True if nothing has moved for the whole limit."""
        return still >= self._limit


def explain(
    waits: Sequence[BlockedChannel], ticks: Mapping[str, int], silent: Sequence[str], seconds: float
) -> str:
    """Return why nothing moves: the edge that all others wait for, since when, for which signal.

    ticks: of the blocks; silent: processes that do not answer, with their blocks.
    """
    head = f"no block has moved for {seconds:.0f} s"
    waiting = {w.waiter for w in waits}
    roots = [w for w in waits if w.awaited not in waiting] or list(waits)
    parts = [
        f"the stream has not yielded the next sample for {w.seconds:.0f} s (block {w.waiter!r} "
        f"waits for {w.waits_for}); a stream that pauses longer needs a larger engine.stall_limit"
        if w.awaited == INPUT
        else f"block {w.waiter!r} has waited {w.seconds:.0f} s for {w.waits_for}; {w.awaited!r} "
        f"is at tick {ticks.get(w.awaited, 'unknown')}"
        for w in roots
    ]
    parts += [f"{name} does not answer" for name in silent]
    if not parts:
        parts = [
            "every block is computing: " + ", ".join(f"{b} tick {k}" for b, k in ticks.items())
        ]
    return f"{head}: " + "; ".join(parts)
