"""The actors of one run, as the driver controls them: started, connected, queried, ended."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import ClusterError, HamdistError
from hamdist.runtime.engines.worker_report import SnapshotNews, WorkerReport, WorkerStatus
from hamdist.runtime.process.interrupts import interrupts_ignored
from hamdist.runtime.ray_engine.cluster_hosts import answered, last_line
from hamdist.runtime.ray_engine.placed_workers import END_SECONDS, WorkerHandle
from hamdist.runtime.ray_engine.wired_workers import WiredWorkers
from hamdist.runtime.results.measured import ProcessSample
from hamdist.runtime.transport.endpoint import socket_folder

ANSWER_SECONDS = 5.0
OBEY_SECONDS = 2.0
NEWS_SECONDS = 1.0  # of a call for news, which returns as soon as there is some
PAUSE_SECONDS = 0.1  # until an actor that was lost is asked again


class Entered(NamedTuple):
    """Samples of the stream, and their rows."""

    samples: int = 0
    rows: int = 0


class WorkerGroup(WiredWorkers):
    """The actors of one run, on a running Ray; as a context it ends them and their sockets.

    A stream that cannot leave the driver's process is drawn in a thread here; `local_report` is its
    report.
    """

    def __exit__(self, *_: object) -> None:
        """End everything that was started, in whatever state it is."""
        with interrupts_ignored():
            self._end_local()
            self._end_actors()
            shutil.rmtree(socket_folder(self.plan.run), ignore_errors=True)

    def keep_spares(self) -> None:
        """Have `engine.spares` actors wait that can take the place of one of these."""
        self.session.keep_spares([a.actor_options for a in self.actors], self.plan.engine.spares)

    def withdraw(self, key: str) -> None:
        """Make all actors refuse the holder of this key from now on."""
        for actor in self.actors:
            actor.ask("withdraw", key, run=self.plan.run)

    def keep(self, tick: int) -> None:
        """Request a snapshot of all actors at `tick`."""
        run = self.plan.run
        self._keep_calls = [actor.ask("keep", tick, run=run) for actor in self.running.values()]
        self._too_late = self._local is not None and not self._local.keep(tick)

    def wait_for_keep(self, seconds: float) -> None:
        """Wait until all actors have received the latest `keep`, so long at most."""
        answered(self._keep_calls, seconds)

    def too_late(self) -> bool:
        """Return True if an actor had passed the tick of the latest `keep` when it arrived."""
        done = answered(self._keep_calls, 0)
        self._keep_calls = [call for call in self._keep_calls if call not in done]
        for call in done:
            with contextlib.suppress(RayError):  # an actor that died is found by its run call
                self._too_late = self._too_late or ray.get(call) is False
        return self._too_late

    def complete(self, tick: int) -> None:
        """Allow all actors to drop the signals before the snapshot of `tick`."""
        for actor in self.actors:
            actor.ask("complete", tick, run=self.plan.run)
        if self._local is not None:
            self._local.complete(tick)

    def new_snapshot_news(self) -> list[SnapshotNews]:
        """Return the snapshot news of all actors since the last call."""
        all_news = [news for actor in self.actors for news in actor.snapshot_news]
        for actor in self.actors:
            actor.snapshot_news.clear()
        self._local_status()
        report = self.local_report
        if report is not None and report.snapshot_news is not None:
            self._local_news.append(report.snapshot_news)
            report.snapshot_news = None
        all_news, self._local_news = [*all_news, *self._local_news], []
        return all_news

    def _local_status(self) -> WorkerStatus | None:
        """Return the status of a stream that is drawn here, None if none is.

        A status tells the news of snapshots once: they wait here for `new_snapshot_news`.
        """
        if self._local is None:
            return None
        status = self._local.status(0, None)
        if status.snapshot_news is not None:
            self._local_news.append(status.snapshot_news)
            self.local_dropped = status.snapshot_news.dropped
        return status

    def start(self) -> None:
        """Start `run` on all actors."""
        self.start_again(self.actors)
        self._start_local()

    @property
    def running(self) -> dict[Any, WorkerHandle]:
        """Return the run calls that have not been collected, with their actors."""
        return {a.running: a for a in self.actors if a.running is not None and a.report is None}

    @property
    def done(self) -> bool:
        """Return True if all workers have reported their end."""
        finished = all(actor.report is not None for actor in self.actors)
        return finished and (self._local is None or self.local_report is not None)

    def wait(self, seconds: float, *, everybody: bool = False) -> None:
        """Wait for actors to finish, and collect their reports.

        Raises the error that ended an actor, or the stream.
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
        """Take the report of an actor that has finished. Raises the error that ended it."""
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
            if report is not None and report.snapshot_news is not None:
                actor.snapshot_news.append(report.snapshot_news)
            return
        on_lost = None if self._called_off else self.on_lost
        if on_lost is not None and on_lost(actor, report.error, report.error):
            actor.report = actor.running = None
            return
        raise report.error

    def ask(self, now: float, seconds: float) -> None:
        """Query the status of all running actors, and note the answers that come in time."""
        for actor in self.actors:
            if actor.report is None and actor.call is None:
                actor.call = actor.ask("status", len(actor.windows), actor.joined)
                actor.called_at = now
        calls = {actor.call: actor for actor in self.actors if actor.call is not None}
        for call in answered(calls, seconds):
            actor = calls[call]
            actor.call = None
            with contextlib.suppress(RayError):  # an actor that died is found by its run call
                actor.note(ray.get(call))

    def silent(self, now: float, seconds: float = ANSWER_SECONDS) -> list[WorkerHandle]:
        """Return the actors that have not answered for `seconds`."""
        return [a for a in self.actors if a.call is not None and now - a.called_at > seconds]

    def entered(self) -> Entered:
        """Return how much of the stream has entered the network."""
        local = self._local_status()
        reports = [a.report or a.status for a in self.actors] if local is None else [local]
        return max(
            (Entered(k.samples, k.rows) for k in reports if k is not None), default=Entered()
        )

    def windows(self) -> dict[str, list[Window]]:
        """Return the windows of all readouts, as far as they are known here."""
        windows: dict[str, list[Window]] = {}
        for actor in self.actors:
            first = next((b for b in actor.blocks if b in self.plan.graph.readouts), None)
            if actor.report is not None:
                windows |= actor.report.windows
            elif first is not None and actor.joined is not None:
                windows[first] = actor.windows
                windows |= {} if actor.status is None else actor.status.others
        return windows

    def samples_of_processes(self) -> dict[str, ProcessSample]:
        """Return the latest measurements by process."""
        reports = {a.name: a.report or a.status for a in self.actors}
        samples = {name: report.sample for name, report in reports.items() if report is not None}
        local = self._local_status()
        if local is not None:
            samples["driver"] = local.sample
        return samples

    @contextlib.contextmanager
    def news_fetched(self) -> Iterator[None]:
        """Keep a call at every actor of a live run inside, and fetch the last news at the end.

        An actor that was replaced tells again what it told since the snapshot; the receiver knows
        it by its number.
        """
        live, over = self.live, threading.Event()

        def fetch(index: int) -> None:
            last = False
            while live is not None and not last:
                last = over.is_set()
                seconds = 0 if last else NEWS_SECONDS
                call = self.actors[index].ask("news", seconds, run=self.plan.run)
                try:
                    for message in ray.get(call) or ():
                        live.send(message)
                except RayError:  # it is replaced, or the run ends
                    over.wait(PAUSE_SECONDS)

        numbers = range(len(self.actors) if live is not None else 0)
        threads = [threading.Thread(target=fetch, args=(i,), daemon=True) for i in numbers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(10 * NEWS_SECONDS)

    def reports(self) -> list[WorkerReport]:
        """Return the reports of the actors that have finished, and of a stream in the driver."""
        reports = [a.report for a in self.actors if a.report is not None]
        return reports if self.local_report is None else [*reports, self.local_report]

    def stop_stream(self) -> None:
        """End the stream at its next sample; samples under way are finished."""
        if self._local is not None:
            self._local.stop_stream()
        else:
            self.actors[self._source_actor()].ask("stop_stream", run=self.plan.run)

    def call_off(self) -> None:
        """End the runs as they are now; actors that do not answer leave no report."""
        self._called_off = True
        for actor in self.running.values():
            actor.ask("abort", run=self.plan.run)
        if self._local is not None:
            self._local.abort()
        self.wait(ANSWER_SECONDS, everybody=True)

    def _end_actors(self) -> None:
        """Free the actors that respond for another run, and kill the others."""
        for actor in self.running.values():
            actor.ask("abort", run=self.plan.run)
        runs = [a.running for a in self.actors if a.running is not None]
        ended = answered(runs, OBEY_SECONDS)
        closed = {a.handle.close.remote(): a for a in self.actors if a.running in ended}
        obedient = []
        for call in answered(closed, OBEY_SECONDS):
            with contextlib.suppress(RayError):  # it died
                ray.get(call)
                obedient.append(closed[call])
        self.session.idle.extend((actor.actor_options, actor.handle) for actor in obedient)
        killed = [actor for actor in self.actors if actor not in obedient]
        for actor in killed:
            ray.kill(actor.handle)
        self._wait_until_gone(killed)

    def _wait_until_gone(self, killed: Sequence[WorkerHandle]) -> None:
        """Wait until the processes of killed actors on this host are gone."""
        here = ray.get_runtime_context().get_node_id() if killed else ""
        processes = []
        for actor in killed:
            if actor.node == here:
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes.append(psutil.Process(actor.pid))
        psutil.wait_procs(processes, timeout=END_SECONDS)
