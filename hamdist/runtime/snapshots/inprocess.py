"""Snapshots of a run in one process: when they are due, and when they are complete."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from math import inf

from hamdist.errors import SnapshotError
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue, SnapshotFailures
from hamdist.runtime.snapshots.process_snapshots import ProcessSnapshots, StatefulNode, WrittenFiles
from hamdist.streams.live import LiveStream


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
        self._seconds = plan.snapshot_policy.seconds or inf
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
