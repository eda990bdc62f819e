"""Replaces lost actors of a crew, while the others wait.

    lost        started again elsewhere, from its part of the latest snapshot (or from the start)
    neighbours  open new ends for what they get from it, and tell which signal they wait for;
                send it again what it has not had, out of their logs (ledger.py)
    all others  notice nothing

Nobody rolls back, so nobody's numbers can change: what a replaced block computes again is a
function of its state and of the signals that it is given again. Only where the files are damaged
that a lost one needs do all begin again from the snapshot before (or from the start). An old
process that is not dead (a host that was cut off) has no open end any more: nobody reads what it
sends.
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
from hamdist.runtime.engines.worker import ANSWER_SECONDS, Opened
from hamdist.runtime.placement.assign_hosts import reseated
from hamdist.runtime.plan.plan import Keeping
from hamdist.runtime.ray_engine.attempts import Attempts
from hamdist.runtime.ray_engine.session import reachable_hosts
from hamdist.runtime.ray_engine.worker_group import END_SECONDS, START_SECONDS, Actor, Crew
from hamdist.runtime.results.result import Replaced
from hamdist.runtime.snapshots.catalogue import Shelf

ACTOR = "ray::HostActor"  # what Ray calls an actor's process
PAUSE_SECONDS = 1.0  # before the next try
MOST_TRIES = 5  # of one recovery: others may be lost meanwhile


@dataclass(frozen=True)
class Loss:
    """One actor that is to be replaced. tick: of the block that failed, as far as it is known.
    error: what ends the run if it comes again."""

    actor: Actor
    tick: int | None
    error: HamdistError


class Recovery:
    """replaced: what was lost so far."""

    def __init__(self, crew: Crew, keeping: Keeping, shelf: Shelf) -> None:
        self._crew = crew
        self._keeping = keeping
        self._shelf = shelf
        self._epoch = keeping.epoch
        self._attempts = Attempts()
        self._fresh: set[str] = set()  # started already in the present recovery
        self._fault = ""  # of a snapshot, for which all go back in the present recovery
        self._present: set[str] = set()  # actors that were there, and only go back with the others
        self.replaced: list[Replaced] = []
        self.unlike: list[str] = []  # what there is to say of replacements on other processors

    def heals(self, error: HamdistError) -> bool:
        """Whether another try may end in another way: not where numbers or data are wrong."""
        if isinstance(error, DivergedError):
            return False
        return isinstance(error, (BlockError, WireError))

    def replace(self, losses: Sequence[Loss]) -> None:
        """Raises the error of an actor that was lost too often without getting any further,
        ClusterError where the cluster cannot take a replacement, and SnapshotError where a snapshot
        is damaged and there is nothing to go back to."""
        began = time.monotonic()
        for loss in losses:
            self._count(loss)
        lost = {loss.actor.name: loss.actor for loss in losses}
        ticks = {actor.name: actor.tick for actor in self._crew.actors}
        ticks |= {loss.actor.name: loss.tick for loss in losses}
        again = self._try_often(lost, losses[0].error)
        seconds = time.monotonic() - began
        for i, actor in enumerate(lost.values()):
            self.replaced.append(
                Replaced(
                    actor=actor.name,
                    blocks=list(actor.blocks),
                    tick=ticks.get(actor.name),
                    since=0 if self._shelf.latest is None else self._shelf.latest.tick,
                    seconds=seconds,
                    replayed=again if i == 0 else 0,
                    fault=self._fault,
                    lost=actor.name not in self._present,
                )
            )

    def _try_often(self, lost: dict[str, Actor], error: HamdistError) -> int:
        """How many signals were sent again. `lost` gets those that are lost meanwhile, too."""
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

    def _go_back(self, lost: dict[str, Actor], unread: SnapshotError | None) -> None:
        """Take all actors back to an earlier snapshot where the files are damaged that lost ones
        need: nobody has what lies between the two any more.

        Args:
            lost: gets all actors then.
            unread: what an actor has said of its files.

        Raises:
            SnapshotError: there is nothing to go back to, or the files are as they were written
                and yet an actor cannot read them.
        """
        crew = self._crew
        inside = zip(crew.actors, crew.inside(), strict=True)
        faults = self._shelf.go_back(
            {node for actor, nodes in inside if actor.name in lost for node in nodes}
        )
        if not faults:
            if unread is not None:
                raise unread
            return
        there = self._shelf.latest
        place = "the beginning" if there is None else str(there)
        fault = "; ".join(faults)
        if not crew.goes_back:
            way = "start again" if there is None else f"go on from there (--resume {there.where})"
            raise SnapshotError(
                f"{fault}; the run cannot go back to {place} by itself, for its stream "
                f"cannot be drawn a second time: {way}"
            )
        self._fault = f"{fault}; all actors go back to {place}"
        warnings.warn(self._fault, HamdistWarning, stacklevel=2)
        present = [actor for actor in crew.actors if actor.name not in lost]
        self._present |= {actor.name for actor in present}
        lost |= {actor.name: actor for actor in present}
        self._call_off(present)

    def _call_off(self, actors: Sequence[Actor]) -> None:
        """End the runs of actors that are well, whose processes begin again (others are killed)."""
        for actor in actors:
            actor.handle.abort.remote(self._crew.plan.run)
        runs = [actor.running for actor in actors]
        ended = ray.wait(runs, num_returns=len(runs), timeout=END_SECONDS)[0] if runs else []
        for actor in actors:
            if actor.running in ended:
                actor.begin_again()
                self._fresh.add(actor.name)

    def _count(self, loss: Loss) -> None:
        saved = 0 if self._shelf.latest is None else self._shelf.latest.tick
        times = self._attempts.lost(loss.actor.name, loss.tick, saved)
        if times < self._keeping.attempts:
            return
        if isinstance(loss.error, ClusterError):
            raise ClusterError(
                f"{loss.error} It was lost {times} times without getting any further "
                "(snapshots.attempts)"
            ) from loss.error
        raise loss.error

    def _try(self, lost: list[Actor]) -> int | list[Actor]:
        """How many signals were sent again; or the actors that were lost meanwhile."""
        crew = self._crew
        self._epoch += 1
        fresh = [actor for actor in lost if actor.name in self._fresh]
        _, dead = _all({actor.handle.close.remote(): actor for actor in fresh})
        self._present -= {actor.name for actor in dead}
        gone = self._start([actor for actor in lost if actor not in fresh or actor in dead])
        if gone:
            return gone
        others = [actor for actor in crew.actors if actor not in lost]
        inside = crew.inside()
        numbers = [crew.actors.index(actor) for actor in lost]
        keeping = dataclasses.replace(self._keeping, snapshot=self._shelf.latest, epoch=self._epoch)
        plan = dataclasses.replace(crew.plan, keeping=keeping)
        ends: Opened = {}
        calls: dict[Any, Actor] = {}
        if self._fault:
            crew.renew_local(plan)
        for i in numbers:
            actor = crew.actors[i]
            given = (plan.only(actor.blocks), actor.blocks, crew.stream_of(i))
            call = actor.handle.prepare.remote(*given, crew.binds(i, inside))
            calls[call] = actor
        for actor in others:
            ways = crew.binds(crew.actors.index(actor), inside, only=lost)
            if ways:
                calls[actor.handle.bind_anew.remote(ways)] = actor
        opened, gone = _all(calls)
        if gone:
            return gone
        for found in opened:
            ends |= found
        calls = {actor.handle.connect.remote(ends): actor for actor in lost}
        calls |= {actor.handle.connect_anew.remote(ends): actor for actor in others}
        again, gone = _all(calls)
        if gone:
            return gone
        crew.start_again(lost)
        return int(sum(again)) + crew.connect_local(ends)

    def _start(self, lost: Sequence[Actor]) -> list[Actor]:
        """New processes: where the old ones were, if that host is still there. Those that did not
        come up. Raises ClusterError where there is no room for one."""
        crew = self._crew
        here = ray.get_runtime_context().get_node_id()
        for actor in lost:
            _kill(actor, here)
        if not lost:
            return []
        there = reachable_hosts()
        taken = [(a.node, a.seat) for a in crew.actors if a not in lost]
        seats = []
        for actor in lost:
            seat = reseated(actor.seat, actor.node, there, taken)
            taken.append((seat.node or actor.node, seat))
            seats.append(seat)
        begun = dict(zip(crew.session.actors(seats), zip(lost, seats, strict=True), strict=True))
        calls = {handle.where.remote(): handle for handle in begun}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=START_SECONDS)
        if late:
            for handle in begun:
                ray.kill(handle)
            raise ClusterError(
                f"no actor could be started instead of {', '.join(map(str, lost))} "
                f"within {START_SECONDS:.0f} s; the cluster may lack free CPUs (ray status shows "
                "them). The run can go on from its latest snapshot (--resume)"
            )
        gone = []
        for call in done:
            handle = calls[call]
            actor, seat = begun[handle]
            try:
                actor.renew(seat, handle, ray.get(call))
                if actor.key is not None:
                    crew.withdraw(actor.key)
                    actor.key = ray.get(handle.new_key.remote(), timeout=ANSWER_SECONDS)
                asked = handle.compute_as.remote(*crew.way_to_compute())
                self.unlike += crew.unlike({actor: ray.get(asked, timeout=ANSWER_SECONDS)})
            except (RayError, TimeoutError):  # its host has gone, as Ray has just noticed
                gone.append(actor)
            else:
                self._fresh.add(actor.name)
        return gone


def _kill(actor: Actor, here: str) -> None:
    """Also one that is hung, which Ray gives 5 s (measured) before it is ended."""
    with contextlib.suppress(RayError):
        ray.kill(actor.handle)
    if actor.node == here:
        with contextlib.suppress(psutil.Error):  # it is gone
            process = psutil.Process(actor.pid)
            if ACTOR in " ".join(process.cmdline()):  # and not one that has got its number
                process.kill()


def _all(calls: dict[Any, Actor]) -> tuple[list[Any], list[Actor]]:
    """What the calls give, and the actors that have died instead of an answer. Raises the
    SnapshotError of one that could not read its files."""
    waiting = list(calls)
    done, late = ray.wait(waiting, num_returns=len(waiting), timeout=ANSWER_SECONDS)
    found, gone = [], [calls[call] for call in late]
    for call in done:
        try:
            found.append(ray.get(call))
        except (RayError, TimeoutError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, SnapshotError):
                raise SnapshotError(f"{calls[call]}: {cause}") from None
            gone.append(calls[call])
    return found, gone
