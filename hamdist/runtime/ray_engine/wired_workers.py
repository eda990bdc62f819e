"""Worker actors of a run, connected: the transport of each channel, and its two ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pickle import PicklingError
from typing import Any

import ray

from hamdist.config import DeviceSignals
from hamdist.errors import ClusterError, SettingsError, StreamError
from hamdist.runtime.engines.worker import ReceivingEnds, Worker
from hamdist.runtime.engines.worker_report import WorkerReport
from hamdist.runtime.placement.assign_blocks import Costs, place
from hamdist.runtime.placement.assign_hosts import ActorOptions
from hamdist.runtime.placement.links import cluster_of, least_delays
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.startup import Startup
from hamdist.runtime.process.threads import run_in_background
from hamdist.runtime.ray_engine.placed_workers import (
    END_SECONDS,
    GATHER_SECONDS,
    START_SECONDS,
    PlacedWorkers,
    WorkerHandle,
    _processors,
    random_numbers,
)
from hamdist.runtime.signals.signal import Channel
from hamdist.runtime.transport.shared_memory import GPU_SCHEME
from hamdist.streams.replay import replays
from hamdist.streams.sample import Stream


class WiredWorkers(PlacedWorkers):
    """Opens and connects the channels between workers; a base of `WorkerGroup`."""

    def wire(
        self, startup: Startup, costs: Costs | None = None, measured: Costs | None = None
    ) -> Plan:
        """Start the actors, give them their blocks, and open and connect the channels.

        Args:
            startup: notes the time of each phase.
            costs: of the blocks, for the placement, instead of their parameters.
            measured: of the blocks, for the delays.

        Returns:
            The plan of the actors: with delays that hide the links, where they were to be chosen.
        """
        plan = self.plan
        cpus = int(ray.cluster_resources().get("CPU", 0))
        groups = place(plan.graph, plan.engine, max(1, _processors(cpus)), costs)
        with startup.phase("actors"):
            options = self._options_of_actors(groups, costs)
            handles = self._all_or_none(options)
            self.actors = [
                WorkerHandle(f"actor {i}", blocks, handle, actor_options)
                for i, (blocks, handle, actor_options) in enumerate(
                    zip(groups, handles, options, strict=True)
                )
            ]
            for actor, where in zip(self.actors, self._all("where", lambda _: ()), strict=True):
                actor.node, actor.address, actor.pid = where
            self._make_keys()
            answers = self._all("compute_as", lambda _: self.way_to_compute())
            self.notes += self.unlike(dict(zip(self.actors, answers, strict=True)))
        if plan.replan is not None and measured is not None:
            with startup.phase("links"):
                self.links = self._links(measured.model)
                if measured.model is not None:
                    cluster = cluster_of(groups, self.links)
                    delays = least_delays(measured.model, groups, range(len(groups)), cluster)
                    plan = self.plan = plan.replan(delays)
        inside = self.inside()
        binds = [self.binds(i, inside) for i in range(len(inside))]

        def arguments(i: int) -> tuple[Any, ...]:
            blocks = self.actors[i].blocks
            return plan.only(blocks), blocks, self.stream_of(i), binds[i]

        ends: ReceivingEnds = {}
        with startup.phase("blocks"):
            try:
                for opened in self._all("prepare", arguments):
                    ends |= opened
            except (TypeError, PicklingError):
                if text := _unsendable(plan, self._stream if self._portable else None):
                    raise SettingsError(text) from None
                raise
        with startup.phase("sockets"):
            self._all("call", lambda _: ("connect", ends))
            if not self._portable:
                self._local = Worker(plan.only([]), [], self._stream, self._keys)
                self._local.connect(ends)
            if any(end.address.startswith(GPU_SCHEME) for end in ends.values()):
                self._offer_gpu_memory()
        return plan

    def _all_or_none(self, options_of_actors: Sequence[ActorOptions]) -> list[Any]:
        """Start one actor for each of `options_of_actors`; hold none while others are missing.

        Two runs that start at once on a cluster with room for one of them could otherwise take half
        of it each and wait for each other. (Ray's placement groups reserve at once, too, but bind a
        replacement to what they reserved, and hosts by address, which raylets may share.)

        Returns:
            The actors' handles. Those of a cluster that is full are still pending.
        """
        patience = GATHER_SECONDS
        give_up = time.monotonic() + START_SECONDS
        while True:
            handles = self.session.actors(options_of_actors)
            if self.plan.engine.address is None:
                return handles
            calls = [handle.where.remote() for handle in handles]
            _, late = ray.wait(calls, num_returns=len(calls), timeout=patience)
            if not late or len(late) == len(calls) or time.monotonic() > give_up:
                return handles
            for handle in handles:
                ray.kill(handle)
            time.sleep(random_numbers.uniform(0, patience))
            patience *= 2

    def _offer_gpu_memory(self) -> None:
        """Have actors test if signals can stay on GPUs. Raises ClusterError where they must."""
        self._all("call", lambda _: ("answer_offers",))
        answers = self._all("call", lambda _: ("read_answers",))
        self.gpu_channels = sum(offered for offered, _ in answers)
        refusals = [refusal for _, refused in answers for refusal in refused]
        if refusals and self.plan.engine.device_signals is DeviceSignals.IPC:
            channel, reason = refusals[0]
            raise ClusterError(
                f"engine.device_signals 'ipc': {channel}: {reason}; use 'auto', which goes through "
                "host memory where it has to"
            )

    def binds(
        self, i: int, inside: Sequence[set[str]], only: Sequence[WorkerHandle] | None = None
    ) -> dict[int, str]:
        """Return the transport of each channel to actor i (`only`: from those actors)."""
        senders: set[str] | None = None
        if only is not None:
            senders = set().union(*(inside[self.actors.index(actor)] for actor in only))
        return {
            channel.number: self._way(channel, self.actors[i], inside)
            for channel in self.plan.channels.all()
            if channel.receiver in inside[i]
            and channel.sender not in inside[i]
            and (senders is None or channel.sender in senders)
        }

    def _way(self, channel: Channel, receiver: WorkerHandle, inside: Sequence[set[str]]) -> str:
        sender = next(
            (a for a, s in zip(self.actors, inside, strict=True) if channel.sender in s), None
        )
        if sender is not None:
            return self._way_between(channel, sender.node, sender.key, receiver)
        key = None if self._keys is None else self._keys.public
        here = ray.get_runtime_context().get_node_id()
        return self._way_between(channel, here, key, receiver)

    def start_again(self, actors: Sequence[WorkerHandle]) -> None:
        """Call `run` on restarted actors."""
        for actor in actors:
            together = [a for a in self.actors if a.node == actor.node]
            actor.running = actor.ask("run", together.index(actor), len(together))

    def connect_local(self, ends: ReceivingEnds) -> int:
        """Connect the stream in this process to new ends, and run it if it restarts."""
        again = 0 if self._local is None else self._local.connect_anew(ends)
        self._start_local()
        return again

    @property
    def goes_back(self) -> bool:
        """Return True if the stream can be drawn a second time."""
        return self._local is None or replays(self._stream)

    def renew_local(self, plan: Plan) -> None:
        """Restart a stream in this process, from the plan's snapshot. Raises StreamError if it
        waits for a sample that does not come."""
        if self._local is None:
            return
        self._end_local()
        if self._thread is not None and self._thread.is_alive():
            raise StreamError(
                f"the stream has not yielded the next sample for {END_SECONDS:.0f} s, so it cannot "
                "be drawn again from an earlier one; go on from the latest snapshot (--resume)"
            )
        self._thread, self.local_report, self._local_news = None, None, []
        self._local = Worker(plan.only([]), [], self._stream, self._keys)

    def _start_local(self) -> None:
        if self._local is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run_local, daemon=True)
            self._thread.start()

    def _run_local(self) -> None:
        report = WorkerReport(error=StreamError("the thread of the stream ended before its time"))
        if not self.plan.spec.live:  # (there somebody waits for it)
            run_in_background()
        try:
            if self._local is not None:
                report = self._local.run()
        finally:  # a user's iterator may even raise SystemExit
            self.local_report = report

    def _end_local(self) -> None:
        if self._local is None:
            return
        self._local.abort()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if self._thread is None or not self._thread.is_alive():  # a user's iterator may hang
            self._local.close()


def _unsendable(plan: Plan, stream: Stream | None) -> str:
    """Return what of the user's cannot be sent to an actor, and what to do; nothing if all can."""
    parts: dict[str, object] = {
        "the stream": stream,
        "the optimizer": plan.optimizer,
        "phi, or another function of time,": plan.dynamics,
        "the level": plan.schedule,
    }
    for name, block in plan.graph.blocks.items():
        parts |= {f"the loss of {name!r}": block.loss, f"the rule of {name!r}": block.rule}
        parts |= {f"the module of {name!r}": (block.module, block.output)}
    for what, part in parts.items():
        try:
            ray.cloudpickle.dumps(part)
        except (TypeError, PicklingError) as error:
            return (
                f"{what} cannot be sent to an actor ({error}): make what it holds or refers to (a "
                "lock, an open file) where it is used, or take engine.kind 'inprocess'"
                + ("; a stream with portable = False is drawn here" if part is stream else "")
            )
    return ""
