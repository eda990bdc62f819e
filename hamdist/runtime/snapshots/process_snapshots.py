"""Takes snapshots of one process, and restores them.

At a cut all nodes of a process stand before the same tick. Their states are copied there and then,
which takes as long as copying the weights; a thread writes the files while learning goes on.
Cuts at one tick in all processes make one snapshot: signals that a node sent before its tick K, and
that its receiver had not taken before tick K of its own, are written with the sender
(signals/sent_log.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.saved_state.stateful import Packing, check_names
from hamdist.errors import SnapshotError
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.signals.signal import Channel
from hamdist.runtime.storage.snapshot_files import (
    Snapshot,
    SnapshotFile,
    file_of,
    folder_of,
    make_room,
    to_bytes,
    write_part,
)
from hamdist.runtime.storage.store import storage


class StatefulNode(Protocol):
    """Anything with a state to save: a node, or the stream."""

    name: str
    tick: int | None

    @property
    def device(self) -> torch.device:
        """Return the device of the state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """The files of one process at one tick.

    Attributes:
        tick: of the cut.
        parts: files by node.
        samples, passed: samples the stream had given, and passed over, if it is in this process.
    """

    tick: int
    parts: dict[str, SnapshotFile]
    samples: int = 0
    passed: int = 0


@dataclass(slots=True)
class _Done:
    written: list[WrittenFiles] = field(default_factory=list)
    failure: str | None = None


class ProcessSnapshots:
    """The snapshots of the `nodes` of one process.

    As a `Cut` (loop.py) it takes one at every multiple of `every` ticks, at requested ticks, and
    the last one before the stream has reached its number of steps, so that a run of more steps can
    resume from it. `written` is called from the writing thread for each snapshot on the disk;
    without it, `collected` returns them.
    """

    def __init__(
        self,
        plan: Plan,
        nodes: Sequence[StatefulNode],
        mailbox: Mailbox,
        sent_log: SentLog,
        written: Callable[[WrittenFiles], None] | None = None,
    ) -> None:
        if plan.snapshot_policy is None:
            raise ValueError("a plan without snapshots has no snapshot writer")
        self._policy = plan.snapshot_policy
        self._run = plan.run
        self._nodes = list(nodes)
        self._mailbox = mailbox
        self._sent_log = sent_log
        self._blocks = list(plan.graph.blocks)
        self._store = storage(self._policy.path)
        self._out: dict[str, list[Channel]] = {node.name: [] for node in nodes}
        self._in: dict[str, list[Channel]] = {node.name: [] for node in nodes}
        for channel in plan.channels.all():
            if channel.sender in self._out:
                self._out[channel.sender].append(channel)
            if channel.receiver in self._in:
                self._in[channel.receiver].append(channel)
        self._every = self._policy.section.every
        self._requested: float = inf
        self._then: Callable[[], None] | None = None
        self._lock = threading.RLock()  # (a signal may come while this thread has it)
        self._pool = ThreadPoolExecutor(1, "hamdist-snapshot")
        self._writing: Future[None] | None = None
        self._written = written
        self._done = _Done()
        self.reached = 0  # the tick of the latest cut
        self._end = plan.last_tick
        self._next = self._following(0)
        self.due: float = self._next

    # -- taking ---------------------------------------------------------------------------------

    def ask(self, tick: int, then: Callable[[], None] | None = None) -> bool:
        """Request a snapshot at `tick`, too; may be called from any thread.

        Returns True if the tick is still to come. `then` is called when the snapshot was taken.
        """
        with self._lock:
            before = self._requested, self._then
            self._requested, self._then = tick, then
            self.due = min(self._next, tick)
            # The loop looks at `due` before each event. So if no node has come to `tick` now, with
            # `due` set, none will pass it before `reach` is called, which waits for the lock.
            if tick <= self.reached or tick <= self._now() or tick > self._end:
                self._requested, self._then = before
                self.due = min(self._next, self._requested)
                return False
            return True

    def _following(self, tick: int) -> float:
        """Return the tick after `tick` at which the next regular snapshot is due."""
        then = inf if self._every is None else (tick // self._every + 1) * self._every
        if then > self._end:
            return self._end if self._policy.last and tick < self._end else inf
        return then

    def _now(self) -> float:
        """Return the tick before whose events all nodes stand; infinite when they have ended."""
        return min((node.tick for node in self._nodes if node.tick is not None), default=inf)

    def reach(self, tick: int) -> None:
        """Take the snapshots that are due.

        All nodes stand before `tick`, and nothing has happened between a due tick and `tick`: this
        is the cut at every tick in between.
        """
        while self.due <= tick:
            then = None
            with self._lock:
                if self.due > tick:
                    return  # what was asked for came too late
                due = int(self.due)
                self.reached = due
                if self._requested == due:
                    self._requested, then, self._then = inf, self._then, None
                if self._next == due:
                    self._next = self._following(due)
                self.due = min(self._next, self._requested)
            self._take(due)
            if then is not None:
                then()

    def _take(self, tick: int) -> None:
        if self._writing is not None:
            self._writing.result()  # the disk is slower than the interval: learning waits for it
        self._sent_log.mark(tick)
        files = []
        samples = passed = 0
        for node in self._nodes:
            packing = Packing()
            try:
                files.append((node.name, packing.packed(self._state(node)), packing.tensors))
            except SnapshotError as error:  # (of a user's objects)
                with self._lock:
                    self._done.failure = f"{node.name!r}: {error}"
                return
            if node.name == INPUT:
                samples = int(getattr(node, "samples", 0))
                passed = int(getattr(node, "passed", 0))
        self._writing = self._pool.submit(self._write, tick, files, samples, passed)

    def _state(self, node: StatefulNode) -> dict[str, Any]:
        out, into, digests = self._out[node.name], self._in[node.name], self._mailbox.digests
        received = self._mailbox.received(into)
        return {
            "node": node.state_dict(),
            "out": {c.key: self._mailbox.state_dict(c) for c in out},
            "in": {c.key: self._mailbox.received_count(c) for c in into},
            **({"received": received} if received else {}),
            **({} if digests is None else {"digests": digests.state_dict(node.name, out, into)}),
        }

    def _write(
        self, tick: int, files: Sequence[tuple[str, Any, list[Tensor]]], samples: int, passed: int
    ) -> None:
        parts: dict[str, SnapshotFile] = {}
        try:
            for name, data, tensors in files:
                file = file_of(name, self._blocks, self._run, self._policy.epoch)
                written = to_bytes(data, tensors)
                try:
                    parts[name] = write_part(self._store, tick, file, written)
                except SnapshotError as error:
                    if not (error.full and make_room(self._store)):
                        raise
                    parts[name] = write_part(self._store, tick, file, written)
            parts_written = WrittenFiles(tick, parts, samples, passed)
            if self._written is not None:
                self._written(parts_written)
                return
        except SnapshotError as error:
            for part in parts.values():
                self._store.delete(f"{folder_of(tick)}/{part.file}")
            with self._lock:
                self._done.failure = str(error)
            return
        with self._lock:
            self._done.written.append(parts_written)

    def collected(self) -> tuple[list[WrittenFiles], str | None]:
        """Return the files written since the last call, and the failure since then, if any."""
        with self._lock:
            done, self._done = self._done, _Done()
        return done.written, done.failure

    def failure(self) -> str | None:
        """Return the failure since the last call, if any."""
        if self._done.failure is None:  # (asked between any two events)
            return None
        with self._lock:
            failure, self._done.failure = self._done.failure, None
        return failure

    def close(self) -> None:
        """Wait for the files that are being written."""
        self._pool.shutdown(wait=True)

    # -- going on -------------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot) -> None:
        """Restore every node from its file. Raises SnapshotError naming one that does not fit."""
        states: dict[str, dict[str, Any]] = {}
        received: dict[str, Tensor] = {}
        for node in self._nodes:
            state = dict(snapshot.state(node.name, node.device))
            digests = state.pop("digests", None)
            received |= state.pop("received", {})
            if self._mailbox.digests is not None:
                self._mailbox.digests.load_state_dict(digests)
            check_names(f"node {node.name!r}", state, ("node", "out", "in"))
            states[node.name] = state
        for node in self._nodes:
            state = states[node.name]
            mine = (("out", self._out[node.name]), ("in", self._in[node.name]))
            for way, channels in mine:
                check_names(f"node {node.name!r}", state[way], [c.key for c in channels])
            try:
                node.load_state_dict(state["node"])
            except SnapshotError as error:
                raise SnapshotError(f"{snapshot}: block {node.name!r}: {error}") from None
        for node in self._nodes:
            for channel in self._out[node.name]:
                there = states.get(channel.receiver)
                arrived = None if there is None else there["in"][channel.key]
                sent, base = states[node.name]["out"][channel.key], received.get(channel.key)
                self._mailbox.load_state_dict(channel, sent, arrived, base)
            for channel in self._in[node.name]:
                if channel.sender not in states:
                    arrived, base = states[node.name]["in"][channel.key], received.get(channel.key)
                    self._mailbox.load_state_dict(channel, None, arrived, base)
        tick = snapshot.tick
        with self._lock:
            self.reached = tick
            self._next = self._following(tick)
            self.due = min(self._next, self._requested)
        self._sent_log.mark(tick)
