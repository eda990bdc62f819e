"""Replaces lost actors of a worker group, while the others wait.

    lost        restarted elsewhere, from its part of the latest snapshot (or from the start)
    neighbours  open new ends for its signals, and name the signal they wait for; they send it
                again the signals that it has not had, out of their logs (signals/sent_log.py)
    all others  are not affected

No other block rolls back, so none of their numbers can change: a replaced block computes again a
function of its state and of the signals that are replayed to it. Only if files are damaged that a
lost actor needs do all restart from the snapshot before (or from the start). An old process that is
not dead (on a host that was cut off) has no open end any more: its signals are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from hamdist.errors import (
    BlockError,
    ClusterError,
    DivergedError,
    HamdistError,
    HamdistWarning,
    SnapshotError,
    WireError,
)
from hamdist.runtime.engines.worker import ANSWER_SECONDS, ReceivingEnds
from hamdist.runtime.engines.worker_report import WorkerReport
from hamdist.runtime.placement.assign_hosts import replacement_options
from hamdist.runtime.plan.plan import SnapshotPolicy
from hamdist.runtime.ray_engine.cluster_hosts import answered, reachable_hosts
from hamdist.runtime.ray_engine.placed_workers import END_SECONDS, START_SECONDS, WorkerHandle
from hamdist.runtime.ray_engine.worker_actor import WorkerActor
from hamdist.runtime.ray_engine.worker_group import WorkerGroup
from hamdist.runtime.results.measured import Replaced
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue

ACTOR = f"ray::{WorkerActor.__name__}"  # what Ray calls an actor's process
PAUSE_SECONDS = 1.0  # before the next try
MOST_TRIES = 5  # of one recovery: others may be lost meanwhile


@dataclass(frozen=True)
class ActorLoss:
    """Loss of an actor that is to be replaced.

    Attributes:
        tick: of the block that failed, if it is known.
        error: ends the run if the actor is lost again without progress.
        report: of an actor whose block failed.
    """

    actor: WorkerHandle
    tick: int | None
    error: HamdistError
    report: WorkerReport | None = None


class Replacement:
    """Replaces lost actors; `replaced` lists the losses so far."""

    def __init__(
        self,
        worker_group: WorkerGroup,
        snapshot_policy: SnapshotPolicy,
        catalogue: SnapshotCatalogue,
    ) -> None:
        self._worker_group = worker_group
        self._policy = snapshot_policy
        self._catalogue = catalogue
        self._epoch = snapshot_policy.epoch
        self._attempts = Attempts()
        self._fresh: set[str] = set()  # started already in the present recovery
        self._fault = ""  # of a snapshot, for which all go back in the present recovery
        self._present: set[str] = set()  # actors that were there, and only go back with the others
        self.replaced: list[Replaced] = []
        self.unlike: list[str] = []  # what there is to say of replacements on other processors

    def is_retryable(self, error: HamdistError) -> bool:
        """Return True if a retry may succeed: not after wrong numbers or data."""
        if isinstance(error, DivergedError):
            return False
        return isinstance(error, (BlockError, WireError))

    def replace(self, losses: Sequence[ActorLoss]) -> None:
        """Replace the lost actors.

        Raises:
            HamdistError: the error of an actor that was lost too often without progress.
            ClusterError: the cluster has no room for a replacement.
            SnapshotError: a snapshot is damaged, and there is none to return to.
        """
        began = time.monotonic()
        for loss in losses:
            self._count(loss)
        lost = {loss.actor.name: loss.actor for loss in losses}
        ticks = {actor.name: actor.tick for actor in self._worker_group.actors}
        ticks |= {loss.actor.name: loss.tick for loss in losses}
        again = self._try_often(lost, losses[0].error)
        seconds = time.monotonic() - began
        for i, actor in enumerate(lost.values()):
            self.replaced.append(
                Replaced(
                    actor=actor.name,
                    blocks=list(actor.blocks),
                    tick=ticks.get(actor.name),
                    since=0 if self._catalogue.latest is None else self._catalogue.latest.tick,
                    seconds=seconds,
                    replayed=again if i == 0 else 0,
                    fault=self._fault,
                    lost=actor.name not in self._present,
                )
            )
        self._worker_group.keep_spares()

    def _try_often(self, lost: dict[str, WorkerHandle], error: HamdistError) -> int:
        """Return how many signals were replayed; adds actors that are lost meanwhile to `lost`."""
        self._fresh.clear()
        self._present.clear()
        self._fault = ""
        unread: SnapshotError | None = None
        for _ in range(MOST_TRIES):
            self._go_back(lost, unread)
            unread = None
            try:
                again = self._try(list(lost.values()))
            except SnapshotError as caught:
                unread = caught
                continue
            if isinstance(again, int):
                return again
            lost |= {actor.name: actor for actor in again}
            self._fresh -= {actor.name for actor in again}
            self._present -= {actor.name for actor in again}
            time.sleep(PAUSE_SECONDS)
        raise unread or ClusterError(
            f"{', '.join(map(str, lost.values()))} could not be replaced in {MOST_TRIES} "
            "tries; is the cluster still there (ray status)? The run can go on from its "
            "latest snapshot (--resume)"
        ) from error

    def _go_back(self, lost: dict[str, WorkerHandle], unread: SnapshotError | None) -> None:
        """Take all actors back to an earlier snapshot if files are damaged that lost actors need.

        No process has the signals between the two snapshots any more: `lost` gets all actors then.
        Raises SnapshotError if there is none, or the files are undamaged and yet `unread`.
        """
        worker_group = self._worker_group
        inside = zip(worker_group.actors, worker_group.inside(), strict=True)
        faults = self._catalogue.go_back(
            {node for actor, nodes in inside if actor.name in lost for node in nodes}
        )
        if not faults:
            if unread is not None:
                raise unread
            return
        there = self._catalogue.latest
        place = "the beginning" if there is None else str(there)
        fault = "; ".join(faults)
        if not worker_group.goes_back:
            way = "start again" if there is None else f"go on from there (--resume {there.where})"
            raise SnapshotError(
                f"{fault}; the run cannot go back to {place} by itself, for its stream "
                f"cannot be drawn a second time: {way}"
            )
        self._fault = f"{fault}; all actors go back to {place}"
        warnings.warn(self._fault, HamdistWarning, stacklevel=2)
        present = [actor for actor in worker_group.actors if actor.name not in lost]
        self._present |= {actor.name for actor in present}
        lost |= {actor.name: actor for actor in present}
        self._call_off(present)

    def _call_off(self, actors: Sequence[WorkerHandle]) -> None:
        """End the runs of healthy actors, whose processes restart (the others are killed)."""
        for actor in actors:
            actor.ask("abort", run=self._worker_group.plan.run)
        ended = answered([actor.running for actor in actors], END_SECONDS)
        for actor in actors:
            if actor.running in ended:
                actor.begin_again()
                self._fresh.add(actor.name)

    def _count(self, loss: ActorLoss) -> None:
        saved = 0 if self._catalogue.latest is None else self._catalogue.latest.tick
        times = self._attempts.lost(loss.actor.name, loss.tick, saved)
        if times < self._policy.section.attempts:
            return
        loss.actor.report = loss.report
        if isinstance(loss.error, ClusterError):
            raise ClusterError(
                f"{loss.error} It was lost {times} times without getting any further "
                "(snapshots.attempts)"
            ) from loss.error
        raise loss.error

    def _try(self, lost: list[WorkerHandle]) -> int | list[WorkerHandle]:
        """Return how many signals were replayed, or the actors that were lost meanwhile."""
        worker_group = self._worker_group
        self._epoch += 1
        fresh = [actor for actor in lost if actor.name in self._fresh]
        _, dead = _all({actor.handle.close.remote(): actor for actor in fresh})
        self._present -= {actor.name for actor in dead}
        if again := self._start([actor for actor in lost if actor not in fresh or actor in dead]):
            return again
        others = [actor for actor in worker_group.actors if actor not in lost]
        inside = worker_group.inside()
        numbers = [worker_group.actors.index(actor) for actor in lost]
        snapshot_policy = dataclasses.replace(
            self._policy, snapshot=self._catalogue.latest, epoch=self._epoch
        )
        plan = dataclasses.replace(worker_group.plan, snapshot_policy=snapshot_policy)
        ends: ReceivingEnds = {}
        calls: dict[Any, WorkerHandle] = {}
        if self._fault:
            worker_group.renew_local(plan)
        for i in numbers:
            actor = worker_group.actors[i]
            arguments = (plan.only(actor.blocks), actor.blocks, worker_group.stream_of(i))
            call = actor.handle.prepare.remote(*arguments, worker_group.binds(i, inside))
            calls[call] = actor
        for actor in others:
            ways = worker_group.binds(worker_group.actors.index(actor), inside, only=lost)
            if ways:
                calls[actor.ask("bind_anew", ways)] = actor
        opened, again = _all(calls)
        if again:
            return again
        for addresses in opened:
            ends |= addresses
        calls = {actor.ask("connect", ends): actor for actor in lost}
        calls |= {actor.ask("connect_anew", ends): actor for actor in others}
        replayed, again = _all(calls)
        if again:
            return again
        worker_group.start_again(lost)
        return int(sum(replayed)) + worker_group.connect_local(ends)

    def _start(self, lost: Sequence[WorkerHandle]) -> list[WorkerHandle]:
        """Start new processes, on the old hosts if they are still there. Returns those that did not
        start. Raises ClusterError if there is no room for one."""
        worker_group = self._worker_group
        here = ray.get_runtime_context().get_node_id()
        for actor in lost:
            _kill(actor, here)
        if not lost:
            return []
        there = reachable_hosts()
        others = [(a.node, a.actor_options) for a in worker_group.actors if a not in lost]
        options_of_actors = []
        for actor in lost:
            actor_options = replacement_options(actor.actor_options, actor.node, there, others)
            others.append((actor_options.node or actor.node, actor_options))
            options_of_actors.append(actor_options)
        losses = dict(
            zip(
                worker_group.session.actors(options_of_actors),
                zip(lost, options_of_actors, strict=True),
                strict=True,
            )
        )
        calls = {handle.where.remote(): handle for handle in losses}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=START_SECONDS)
        if late:
            for handle in losses:
                ray.kill(handle)
            raise ClusterError(
                f"no actor could be started instead of {', '.join(map(str, lost))} "
                f"within {START_SECONDS:.0f} s; the cluster may lack free CPUs (ray status shows "
                "them). The run can go on from its latest snapshot (--resume)"
            )
        dead = []
        for call in done:
            handle = calls[call]
            actor, actor_options = losses[handle]
            try:
                actor.renew(actor_options, handle, ray.get(call))
                if actor.key is not None:
                    worker_group.withdraw(actor.key)
                    actor.key = ray.get(handle.new_key.remote(), timeout=ANSWER_SECONDS)
                computing = handle.compute_as.remote(*worker_group.way_to_compute())
                self.unlike += worker_group.unlike(
                    {actor: ray.get(computing, timeout=ANSWER_SECONDS)}
                )
            except (RayError, TimeoutError):  # its host has gone, as Ray has just noticed
                dead.append(actor)
            else:
                self._fresh.add(actor.name)
        return dead


def _kill(actor: WorkerHandle, here: str) -> None:
    """Kill an actor, even one that hangs, which Ray gives 5 s (measured) before it is ended."""
    with contextlib.suppress(RayError):
        ray.kill(actor.handle)
    if actor.node == here:
        with contextlib.suppress(psutil.Error):  # it is gone
            process = psutil.Process(actor.pid)
            if ACTOR in " ".join(process.cmdline()):  # and not one that has got its number
                process.kill()


def _all(calls: dict[Any, WorkerHandle]) -> tuple[list[Any], list[WorkerHandle]]:
    """Return the results of the calls, and the actors that died instead of answering. Raises the
    SnapshotError of an actor that could not read its files."""
    done = answered(calls, ANSWER_SECONDS)
    answers, dead = [], [actor for call, actor in calls.items() if call not in done]
    for call in done:
        try:
            answers.append(ray.get(call))
        except (RayError, TimeoutError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, SnapshotError):
                raise SnapshotError(f"{calls[call]}: {cause}") from None
            dead.append(calls[call])
    return answers, dead


class Attempts:
    """Counts how often each actor of a run was lost without progress.

    The tick in which a block fails is known where it raises. A process that dies (out of memory, a
    crash in native code) sent its last status up to a second before, or never: its tick differs
    from one loss to the next although the cause is the same. So losses are counted as long as
    neither the actor nor a snapshot of the run has advanced.
    """

    def __init__(self) -> None:
        self._progress: dict[str, tuple[int, int]] = {}  # by actor: how far it came, losses since

    def lost(self, actor: str, tick: int | None, saved: int) -> int:
        """Return how often in a row `actor`, now at `tick`, was lost without progress.

        saved: the tick of the latest snapshot.
        """
        furthest, times = self._progress.get(actor, (-1, 0))
        reached = max(saved, -1 if tick is None else tick)
        times = 1 if reached > furthest else times + 1
        self._progress[actor] = max(reached, furthest), times
        return times
