"""One process of a distributed run: some blocks, perhaps the stream, and their sockets.

A plain object: a Ray actor wraps it (ray_engine/worker_actor.py); for a stream that cannot leave
the driver's process the driver runs one in a thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from hamdist.config import DeviceSignals, Pin
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Kind
from hamdist.errors import HamdistError
from hamdist.runtime.engines.worker_report import (
    BlockedChannel,
    Sampler,
    SnapshotNews,
    WorkerReport,
    WorkerStatus,
)
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import order_of, run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.derived import message_bytes, slot_bytes
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.switches import set_switches
from hamdist.runtime.process.threads import pinned, processors_of_actor
from hamdist.runtime.process.usage import keep_freed_memory, reset_peak
from hamdist.runtime.results.digests import Digests
from hamdist.runtime.signals.cast import CastBorder
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.signals.signal import Aborted, Channel
from hamdist.runtime.snapshots.process_snapshots import ProcessSnapshots
from hamdist.runtime.transport.endpoint import ThreadCalls
from hamdist.runtime.transport.gpu_ring import GpuMemory, GpuRingSender, Refusal, cuda_memory
from hamdist.runtime.transport.shared_memory import GPU_SCHEME, MAX_CAPACITY, takes
from hamdist.runtime.transport.transport import IPC, Endpoints
from hamdist.streams.sample import Stream

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

ANSWER_SECONDS = 60.0  # a block's step may take long
LATEST = 128  # windows of a further readout in a status


class ReceivingEnd(NamedTuple):
    """The receiving end of a channel; `next` is the number of the signal that it waits for."""

    address: str
    next: int


ReceivingEnds: TypeAlias = dict[int, ReceivingEnd]


class Worker:
    """The blocks, channels and snapshots of one process; `stream` is given if it is drawn here."""

    def __init__(
        self, plan: Plan, blocks: Sequence[str], stream: Stream | None, keys: Keys | None = None
    ) -> None:
        self._plan = plan
        torch.set_num_threads(plan.engine.threads)  # (restored states are computed, too)
        self.number = plan.run
        self._abort = threading.Event()
        self._requests = ThreadCalls()
        delay = plan.engine.link_delay
        self._transport = Endpoints(
            plan.run, self._abort, delay, keys, self._requests, plan.engine.port_range
        )
        inside = {*blocks, INPUT} if stream is not None else set(blocks)
        snapshot_policy = plan.snapshot_policy
        self._sent_log: SentLog | None = None
        if snapshot_policy is not None:
            self._sent_log = SentLog(
                inside,
                replays=snapshot_policy.section.recover,
                limit=snapshot_policy.section.memory << 20,
            )
        self._digests = Digests(int(plan.engine.digests)) if plan.engine.digests else None
        self._mailbox = Mailbox(inside, self._transport, self._sent_log, self._digests)
        self._inside = inside
        self._nodes = [make_node(plan, name, self._mailbox) for name in blocks]
        self._source = None if stream is None else SourceNode(plan, stream, self._mailbox)
        self._news: SimpleQueue[Any] = SimpleQueue()  # what blocks of a live run have to say
        for node in self._nodes:
            node.live.send = self._news.put
        if self._source is not None:
            self._source.waits_with(self._look_up)
        self._channels = {c.number: c for c in plan.channels.all()}
        self._gpu_senders: dict[int, GpuRingSender] = {}
        self._snapshot_writer: ProcessSnapshots | None = None
        if snapshot_policy is not None and self._sent_log is not None:
            self._snapshot_writer = ProcessSnapshots(
                plan, self._all_nodes(), self._mailbox, self._sent_log
            )
            if snapshot_policy.snapshot is not None:
                self._snapshot_writer.restore(snapshot_policy.snapshot)

        self._sampler = Sampler(
            plan, self._all_nodes(), self._mailbox, self._transport, self._snapshot_writer
        )

    def _all_nodes(self) -> list[Any]:
        return [*([self._source] if self._source is not None else []), *self._nodes]

    def bind(self, ways: Mapping[int, str]) -> ReceivingEnds:
        """Open the receiving ends of the given channels, by index, each on its transport.

        An open end is closed first: signals that it has not handed out yet come again.
        """
        opened: ReceivingEnds = {}
        for i, way in ways.items():
            channel = self._channels[i]
            limit = message_bytes(self._plan, channel)
            memory = self._memory(channel, channel.receiver)
            address = self._transport.bind(channel, way, limit, memory)
            opened[i] = ReceivingEnd(address, self._mailbox.received_count(channel) + 1)
        return opened

    def connect(self, ends: ReceivingEnds) -> int:
        """Open our sending ends among `ends`; return how many signals are sent again."""
        again = 0
        for i, end in ends.items():
            channel = self._channels[i]
            if channel.sender not in self._inside or channel.receiver in self._inside:
                continue
            log = None if self._sent_log is None else self._sent_log.log(channel)
            behind = 0 if log is None else log.posted + 1 - end.next
            limit = message_bytes(self._plan, channel)
            gpu_sender = self._gpu_sender(channel, end.address)
            if log is None or behind <= 0:
                self._transport.connect(channel, end.address, limit, gpu_sender=gpu_sender)
            else:
                self._transport.connect(channel, end.address, limit, log, end.next, gpu_sender)
                again += behind
            if log is not None:
                self._mailbox.resume_at(channel, end.next)
        return again

    def _memory(self, channel: Channel, block: str) -> GpuMemory | None:
        """Return the memory of the GPU on which `block` computes, if its signals may stay there."""
        engine = self._plan.engine
        meant = engine.device_signals is not DeviceSignals.HOST and not engine.link_delay
        if not meant or channel.kind not in (Kind.STATE, Kind.MESSAGE) or channel.sender == INPUT:
            return None
        memory_of = self._plan.memory_of or cuda_memory
        memory: GpuMemory | None = memory_of(CastBorder(self._plan.cast_plans.get(block)).device)
        return memory

    def _gpu_sender(self, channel: Channel, address: str) -> GpuRingSender | None:
        self._gpu_senders.pop(channel.number, None)
        memory = self._memory(channel, channel.sender)
        is_gpu = address.startswith(GPU_SCHEME)
        cast_plan = self._plan.cast_plans.get(channel.receiver)
        to_gpu = cast_plan is not None and cast_plan.device.startswith("cuda")
        too_long = to_gpu and address.startswith(IPC) and not takes(channel)
        if memory is None or not (is_gpu or too_long):
            return None
        gpu_sender = GpuRingSender(memory, channel, self._plan.run, slot_bytes(self._plan, channel))
        if too_long:
            gpu_sender.refusal = (
                f"its queue has room for {channel.capacity} signals, more than the {MAX_CAPACITY} "
                "of shared memory"
            )
        self._gpu_senders[channel.number] = gpu_sender
        return gpu_sender

    def answer_offers(self) -> None:
        """Test whether offered GPU memory can be reached, before the first tick."""
        self._transport.answer_offers()

    def read_answers(self) -> tuple[int, list[Refusal]]:
        """Return how many channels offered memory, and the refusals."""
        self._transport.read_answers()
        return len(self._gpu_senders), self._refusals()

    def _refusals(self) -> list[Refusal]:
        return [
            Refusal(str(self._channels[number]), gpu_sender.refusal)
            for number, gpu_sender in self._gpu_senders.items()
            if gpu_sender.refusal is not None
        ]

    # While the nodes run, their thread does these (in its own time).

    def bind_anew(self, ways: Mapping[int, str]) -> ReceivingEnds:
        """Open receiving ends (`bind`) for a neighbour that restarts."""
        return self._requests.ask(lambda: self.bind(ways), ANSWER_SECONDS)

    def connect_anew(self, ends: ReceivingEnds) -> int:
        """Open sending ends (`connect`) to a neighbour that restarts."""
        return self._requests.ask(lambda: self.connect(ends), ANSWER_SECONDS)

    def complete(self, tick: int) -> None:
        """Note that the snapshot of that tick is complete: drop the signals before it."""
        if self._sent_log is not None:
            sent_log = self._sent_log
            self._requests.ask(lambda: sent_log.complete(tick), ANSWER_SECONDS)

    def keep(self, tick: int) -> bool:
        """Request a snapshot at `tick`; returns True if the tick is still to come."""
        return self._snapshot_writer is not None and self._snapshot_writer.ask(tick)

    def withdraw(self, key: str) -> None:
        """Forget the key of a process that has gone."""
        self._transport.withdraw(key)

    def run(self, index: int = 0, actors: int = 0) -> WorkerReport:
        """Step the nodes to the end, and report errors instead of raising them.

        This process is number `index` of the `actors` on its host, each of which gets a processor
        of its own (0: none does).
        """
        set_switches(self._plan.switches)
        torch.set_num_threads(self._plan.engine.threads)
        reset_peak(collect=True)
        keep_freed_memory()
        report = WorkerReport()
        started = time.perf_counter()
        nodes = self._all_nodes()
        snapshot_policy = self._plan.snapshot_policy
        goes_on = snapshot_policy is not None and snapshot_policy.snapshot is not None
        self._sampler.begin()
        self._requests.begin()
        try:
            with pinned(self._processors(index, actors)):
                run_loop(
                    nodes,
                    self._look_up,
                    self._snapshot_writer,
                    started=goes_on,
                    after_step=None if self._digests is None else self._digests.after_step,
                    order=order_of(self._plan, [node.name for node in self._nodes]),
                )
                self._mailbox.flush()
        except Aborted:
            report.aborted = True
        except HamdistError as error:
            report.error = error
        self._requests.end()
        if self._snapshot_writer is not None:
            self._snapshot_writer.close()
            report.snapshot_news = self._snapshot_news()
        report.seconds = time.perf_counter() - started
        report.take(self._nodes, self._source, self._mailbox, self._sampler)
        report.refusals = self._refusals()
        return report

    def _processors(self, index: int, actors: int) -> set[int] | None:
        engine = self._plan.engine
        return None if engine.pin is Pin.OFF else processors_of_actor(index, actors, engine.threads)

    def _look_up(self) -> None:
        if self._abort.is_set():
            raise Aborted
        if self._requests.waiting:
            self._requests.serve()
        self._sampler.poll()

    def status(self, seen: int, joined: int | None) -> WorkerStatus:
        """Return the status, in another thread; `seen`: windows the caller has, joined so often."""
        measured = {n.name: n.metrics for n in self._nodes if n.metrics is not None}
        metrics = measured.pop(next(iter(measured), ""), None)
        others = {name: other.windows[-LATEST:] for name, other in measured.items()}
        now = None if metrics is None else metrics.joined  # before the windows, which it may join
        windows = [] if metrics is None else metrics.windows
        first = seen if joined == now else 0
        return WorkerStatus(
            ticks={n.name: n.event.tick for n in self._nodes},
            updates={n.name: n.block.weights.updates for n in self._nodes},
            samples=0 if self._source is None else self._source.samples,
            rows=0 if self._source is None else self._source.rows,
            windows=windows[first:],
            first=first,
            joined=now,
            others=others,
            sample=self._sampler.sample(),
            wait=self._wait(),
            snapshot_news=self._snapshot_news(),
        )

    def _snapshot_news(self) -> SnapshotNews | None:
        if self._snapshot_writer is None or self._sent_log is None:
            return None
        written, failure = self._snapshot_writer.collected()
        return SnapshotNews(written, failure, self._sent_log.nbytes, self._sent_log.dropped)

    def _wait(self) -> BlockedChannel | None:
        waiting = self._transport.waiting
        if waiting is None:
            return None
        channel: Channel = waiting.channel
        stamp = f"tick {waiting.stamp.tick}, sample {waiting.stamp.sample}"
        if waiting.sending:
            waiter, awaited = channel.sender, channel.receiver
            reason = f"room for the {channel}, {stamp}"
        else:
            waiter, awaited = channel.receiver, channel.sender
            reason = f"the {channel}, {stamp}"
        return BlockedChannel(waiter, awaited, reason, time.monotonic() - waiting.since)

    def news(self, seconds: float) -> list[Any]:
        """Return what the blocks have for the driver; waits so long for something."""
        addresses = []
        with contextlib.suppress(Empty):
            addresses.append(self._news.get(timeout=seconds))
            while True:
                addresses.append(self._news.get_nowait())
        return addresses

    def stop_stream(self) -> None:
        """End the stream at its next sample; samples under way are finished."""
        if self._source is not None:
            self._source.stop.set()

    def abort(self) -> None:
        """Make `run` end at its next blocked call."""
        self._abort.set()

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
