"""Snapshots of a run in one process: when they are due, and what makes them whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf

from hamdist.runtime.nodes.mailbox import Mailroom
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.sent_log import Ledger
from hamdist.runtime.snapshots.catalogue import Failures, Shelf
from hamdist.runtime.snapshots.writer import Keeper, Rememberer, Taken


class KeptRun:
    """As a context it waits for the last files in the end. on: the run goes on from a snapshot."""

    def __init__(
        self, plan: Plan, nodes: Sequence[Rememberer], mail: Mailroom, ledger: Ledger
    ) -> None:
        if plan.keeping is None:
            raise ValueError("the run keeps nothing")
        self._nodes = nodes
        self._keeping = plan.keeping
        self._shelf = Shelf(plan)
        self._failures = Failures()
        self.keeper = Keeper(plan, nodes, mail, ledger, self._written)
        self.on = plan.keeping.snapshot is not None
        self._seconds = plan.keeping.seconds or inf
        self._due = time.monotonic() + self._seconds

    def restore(self) -> None:
        """Goes on from the snapshot that was asked for."""
        if self._keeping.snapshot is not None:
            self.keeper.restore(self._keeping.snapshot)

    def look(self) -> None:
        """Between two events: asks for a snapshot when it is time."""
        self._look_for_failures()
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds
            self.keeper.ask(self._soon())

    def _look_for_failures(self) -> None:
        failure = self.keeper.failure()
        if failure is not None:
            self._failures.add(failure)
            self._shelf.forget_tries(self.keeper.reached)

    def _soon(self) -> int:
        """The next tick that nobody has begun."""
        return min((n.tick for n in self._nodes if n.tick is not None), default=0) + 1

    def stopping(self, stop: Callable[[], None]) -> Callable[[], None]:
        """`stop`, behind a last snapshot."""

        def ask() -> None:
            if not self.keeper.ask(self._soon(), stop):
                stop()

        return ask

    def _written(self, taken: Taken) -> None:
        self._shelf.put(taken)

    @property
    def snapshots(self) -> list[str]:
        return self._shelf.snapshots

    @property
    def warnings(self) -> list[str]:
        self._look_for_failures()
        return self._failures.texts()

    def __enter__(self) -> KeptRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.close()
