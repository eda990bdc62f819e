"""Supervision of a worker group: when snapshots and replacements happen, and what follows.

Everything here runs in the driver, between two status queries.
"""

from __future__ import annotations

import warnings
from math import inf

from hamdist.errors import BlockError, ClusterError, HamdistError, HamdistWarning, SnapshotError
from hamdist.runtime.plan.plan import Plan, SnapshotPolicy
from hamdist.runtime.ray_engine.placed_workers import WorkerHandle
from hamdist.runtime.ray_engine.replacement import ActorLoss, Replacement
from hamdist.runtime.ray_engine.worker_group import WorkerGroup
from hamdist.runtime.results.measured import Replaced
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue, SnapshotFailures

AHEAD_SECONDS = 1.0  # how far ahead of everybody a snapshot is asked for
PATIENCE_SECONDS = 20.0  # for all files of one
LAST_SECONDS = 10.0  # for the one before the end


class SnapshotSupervision:
    """Takes snapshots of a worker group and replaces its lost actors.

    Attributes:
        warnings: failures on the way that did not end the run.
    """

    def __init__(
        self, plan: Plan, worker_group: WorkerGroup, snapshot_policy: SnapshotPolicy
    ) -> None:
        self._worker_group = worker_group
        self._live = worker_group.live
        self._policy = snapshot_policy
        self._blocks = plan.graph.blocks
        self._python_state = sorted(plan.graph.state)
        self._catalogue = SnapshotCatalogue(plan, worker_group.arithmetic)
        self._recovery = (
            Replacement(worker_group, snapshot_policy, self._catalogue)
            if snapshot_policy.section.recover
            else None
        )
        self._losses: list[ActorLoss] = []
        self._seconds = snapshot_policy.section.seconds or inf
        self._end = plan.last_tick
        self._due: float | None = None
        self._requested: tuple[int, float] | None = None  # the tick of the latest, and when
        self._for_user: int | None = None  # the tick of one that the user of a live run waits for
        self._pace: tuple[float, int] | None = None  # when, and where the first block was
        self._rate = 0.0
        self._last: int | None = None  # the tick of the one before the end
        self._last_by: float | None = None
        self._failures = SnapshotFailures()
        self._tries_failed = False
        self._dropped = False  # some actor has let signals go that a successor would need
        self._warnings: list[str] = []
        worker_group.on_lost = self._on_lost

    @property
    def warnings(self) -> list[str]:
        """Return the warnings so far."""
        return [*self._warnings, *self._failures.texts()]

    @property
    def snapshots(self) -> list[str]:
        """Return the complete snapshots of the run."""
        self._collect()
        return self._catalogue.snapshots

    @property
    def resume_hint(self) -> str:
        """Return the sentence that names the snapshot from which a stalled run can be resumed."""
        latest = self._catalogue.latest
        if latest is None:
            return "; no snapshot was complete yet: the run has to begin again"
        return f"; the run can go on from its latest snapshot: --resume {latest.where}"

    @property
    def replaced(self) -> list[Replaced]:
        """Return the actors that were lost and replaced."""
        return [] if self._recovery is None else self._recovery.replaced

    @property
    def lost(self) -> list[str]:
        """Return the actors that were lost and have not been replaced."""
        return [str(loss.error) for loss in self._losses]

    # -- losses ---------------------------------------------------------------------------------

    def _on_lost(self, actor: WorkerHandle, error: HamdistError | None, loss: HamdistError) -> bool:
        recovery = self._recovery
        if (
            recovery is None
            or self._dropped
            or (error is not None and not recovery.is_retryable(error))
        ):
            return False
        tick = error.tick if isinstance(error, BlockError) else actor.tick
        self._losses.append(ActorLoss(actor, tick, loss, actor.report))
        return True

    def poll(self, now: float) -> None:
        """Replace lost actors, and request snapshots. Raises what cannot be recovered from."""
        self._collect()
        self._look_for_dropped_signals()
        if self._requested is not None and self._worker_group.too_late():
            self._requested = self._last = self._for_user = None
            self._due = now  # again, further ahead
        self._give_up_the_silent(now)
        if self._losses and self._recovery is not None:
            losses, self._losses = self._losses, []
            before = len(self._recovery.replaced)
            self._recovery.replace(losses)
            # (not all actors have heard of the snapshot that was asked for: ask again, later)
            self._requested = self._last = self._last_by = self._pace = self._for_user = None
            if self._live is not None:
                self._live.begin_again()
            unlike, self._recovery.unlike = self._recovery.unlike, []
            same = "" if unlike else "; no number has changed"
            if self._python_state:
                same = (
                    f"; Python state of a forward ({', '.join(self._python_state)}) began anew: "
                    "the numbers are not those of an undisturbed run"
                )
            self._warnings += unlike
            new = self._recovery.replaced[before:]
            self._warnings += dict.fromkeys(r.fault for r in new if r.fault)
            self._warnings += [
                f"{r.actor} (blocks {', '.join(r.blocks)}) was lost at tick {r.tick}, and replaced "
                f"within {r.seconds:.1f} s from tick {r.since}{same}"
                for r in new
                if r.lost
            ]
        self._ask_in_time(now)

    def request(self) -> None:
        """Take a snapshot soon."""
        self._due = 0.0

    def _look_for_dropped_signals(self) -> None:
        """Warn if an actor has dropped its signals; SnapshotError if `snapshots.full` is 'end'."""
        droppers = [actor.name for actor in self._worker_group.actors if actor.dropped]
        droppers += (
            ["the driver, where the stream is drawn,"] if self._worker_group.local_dropped else []
        )
        before, self._dropped = self._dropped, bool(droppers)
        if before or not droppers:
            return
        reason = next(iter(self._failures.texts()), "no snapshot was complete in time")
        text = (
            f"{droppers[0]} would keep more than snapshots.memory ({self._policy.section.memory} "
            f"MiB) of signals: {reason}"
        )
        if self._policy.section.full == "end":
            raise SnapshotError(f"{text} (snapshots.full 'end')")
        text += "; until a snapshot is written nothing that is lost can be replaced"
        warnings.warn(text, HamdistWarning, stacklevel=2)
        self._warnings.append(text)

    def _give_up_the_silent(self, now: float) -> None:
        if self._recovery is None:
            return
        reported = {id(loss.actor) for loss in self._losses}
        for actor in self._worker_group.silent(now, self._policy.section.silence):
            if actor.report is None and id(actor) not in reported:
                error = ClusterError(
                    f"{actor} has not answered for {self._policy.section.silence:g} s"
                )
                self._losses.append(ActorLoss(actor, actor.tick, error))

    # -- snapshots ------------------------------------------------------------------------------

    def _collect(self) -> None:
        for news in self._worker_group.new_snapshot_news():
            if news.failure is not None:
                self._failures.add(news.failure)
                self._tries_failed = True
                self._give(SnapshotError(news.failure))
            for files in news.written:
                try:
                    complete = self._catalogue.put(files)
                except SnapshotError as error:
                    self._failures.add(str(error))
                    self._tries_failed = True
                    continue
                if complete is not None:
                    if self._for_user is not None and complete.tick >= self._for_user:
                        self._give(str(complete))
                    self._worker_group.complete(complete.tick)
                    self._asked_for_is_there(complete.tick)

    def _give(self, snapshot: str | SnapshotError) -> None:
        """Answer the user who waits for a snapshot."""
        if self._live is not None and self._for_user is not None:
            self._live.give("snapshot", snapshot)
            self._for_user = None

    def _asked_for_is_there(self, tick: int) -> None:
        """Drop the signals before the complete snapshot of `tick`, and allow the next one."""
        if self._requested is not None and tick >= self._requested[0]:
            self._requested = None
        for actor in self._worker_group.actors:
            actor.kept_bytes = 0  # (the next look tells how many are left)

    def _ask_in_time(self, now: float) -> None:
        front = self._front()
        if self._pace is not None and now > self._pace[0]:
            self._rate = max(0.0, (front - self._pace[1]) / (now - self._pace[0]))
        self._pace = (now, front)
        if self._due is None:
            self._due = now + self._seconds
        pending = self._requested is not None and now - self._requested[1] < PATIENCE_SECONDS
        if self._live is not None and self._live.wanted == "snapshot":
            if self._for_user is None or not pending:
                self._for_user = self._ask(now, front, wanted=True)
            return
        full = self._recovery is not None and self._full()
        if (now < self._due and not full) or front >= self._end:
            return
        if not pending and self._ask(now, front) is not None:
            self._due = now + self._seconds

    def _full(self) -> bool:
        """Return True if an actor keeps so many signals that a snapshot is due. That is half of
        what it may keep, for a snapshot takes a while."""
        return any(
            2 * actor.kept_bytes > self._policy.section.memory << 20
            for actor in self._worker_group.actors
        )

    def _front(self) -> int:
        ticks = [k for a in self._worker_group.actors if a.status for k in a.status.ticks.values()]
        return max(ticks, default=0)

    def _ask(self, now: float, front: int, *, wanted: bool = False) -> int | None:
        """Request a snapshot, and return its tick; None within a sequence of a live run."""
        live = self._live
        if live is not None and not live.free(wanted=wanted):
            return None
        between = live is not None and live.whole
        ahead = front + 1 + int(AHEAD_SECONDS * self._rate) + 2 * len(self._blocks)
        if live is not None and between:  # (no block passes this tick before the stream goes on)
            ahead = live.tick + len(self._blocks) + 2
        tick = int(min(ahead, self._end))
        if self._tries_failed:
            self._tries_failed = False
            self._catalogue.forget_tries(tick)
        self._requested = (tick, now)
        self._worker_group.keep(tick)
        if live is not None and (wanted or between):
            self._worker_group.wait_for_keep(AHEAD_SECONDS)
            live.idle_until(tick + 1)
        return tick

    def last(self, now: float) -> bool:
        """Request a snapshot before the end, and again after a loss.

        Returns True if it is there, or will not be, which is then among the warnings.
        """
        if self._last is None and not self._losses:
            self._last = self._ask(now, self._front())
            self._last_by = self._last_by or now + LAST_SECONDS
        latest = self._catalogue.latest
        if self._losses:
            return False  # what was lost is replaced first
        if latest is not None and self._last is not None and latest.tick >= self._last:
            return True
        if self._last_by is None or now <= self._last_by:
            return False
        there = (
            "there is none" if latest is None else f"the latest one is that of tick {latest.tick}"
        )
        self._warnings.append(
            f"no snapshot could be taken before the end within {LAST_SECONDS:.0f} s: {there}"
        )
        return True
