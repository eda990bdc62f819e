"""Measures the nodes of one process while they run, between two of their steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter, process_time
from typing import Any

from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.engines.update_probe import UpdateProbe, update_norms, update_probes
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.usage import resident_bytes, return_freed_memory
from hamdist.runtime.results.measured import EdgeCounts, Histogram, Norms, ProcessSample, TraceSpan
from hamdist.runtime.transport.transport import Endpoints

# What blocks do, by method; `move` is of their weights.
PHASES = {
    **{name: name for name in ("forward", "backward", "tick")},
    "read": "forward, loss and backward",
    "learn": "local readout",
    "complete": "costate",
    "end": "update",
}


class Tracer:
    """Keeps the spans of the last `ticks` ticks in `spans`.

    Args:
        ticks: that are kept.
        nodes: of the process.
        mailbox: of the process.
        writer: of snapshots, if there is one.
    """

    def __init__(self, ticks: int, nodes: Sequence[Any], mailbox: Mailbox, writer: Any) -> None:
        self.spans: deque[TraceSpan] = deque()
        self._ticks = ticks
        self._offset = time.time() - time.perf_counter()
        self._wrap(mailbox, "post", lambda channel, signal: (
            channel.sender, f"send {channel}", signal.stamp.tick, f">{_id(channel, signal.stamp)}"
        ))  # fmt: skip
        self._wrap(mailbox, "take", lambda channel, stamp, tick: (
            channel.receiver, f"wait for {channel}", tick, f"<{_id(channel, stamp)}"
        ))  # fmt: skip
        for node in nodes:
            if node.name == INPUT:
                self._wrap(node, "_draw", lambda n, node=node: (INPUT, "draw", node.tick or n))
                continue
            owners = [(node.block, method, name) for method, name in PHASES.items()]
            for owner, method, name in [*owners, (node.block.weights, "move", "update")]:
                if callable(getattr(owner, method, None)):
                    label = lambda *_, n=node, name=name, **__: (n.name, name, n.event.tick)  # noqa: E731
                    self._wrap(owner, method, label)
        if writer is not None:
            self._wrap(writer, "reach", lambda tick: ("snapshots", "snapshot", tick))

    def _wrap(self, owner: Any, method: str, described: Callable[..., tuple[Any, ...]]) -> None:
        act = getattr(owner, method)

        def timed(*arguments: Any, **more: Any) -> Any:
            track, name, tick, *flow = described(*arguments, **more)
            begin = time.perf_counter()
            try:
                return act(*arguments, **more)
            finally:
                spent = time.perf_counter() - begin
                span = TraceSpan(track, name, begin + self._offset, spent, tick, *flow)
                self.spans.append(span)
                while self.spans[0].tick < tick - self._ticks:
                    self.spans.popleft()

        setattr(owner, method, timed)


def _id(channel: Any, stamp: Any) -> str:
    return f"{channel.number}.{stamp.tick}.{stamp.sample}"


PAUSE_SECONDS = 1.0  # between two samples of the norms
SHARE = 0.001  # of the time that they may take
KEPT = 4  # probes that wait to be fetched


class Sampler:
    """The measurements of one process.

    Norms are taken in the thread of the nodes (`look`), where no step is under way, at most once
    in PAUSE_SECONDS and for no more than SHARE of the time; all else is counted anyway.

    Args:
        plan: of the run.
        nodes: of the process, with the stream if it is drawn here; as restored.
        mailbox: of the process.
        transport: to other processes; None if there are none.
        writer: of snapshots, for a trace (`metrics.trace`).
    """

    def __init__(
        self,
        plan: Plan,
        nodes: Sequence[Any],
        mailbox: Mailbox,
        transport: Endpoints | None = None,
        writer: object = None,
    ) -> None:
        self._nodes = [node for node in nodes if node.name != INPUT]
        self._source = next((node for node in nodes if node.name == INPUT), None)
        self._mailbox = mailbox
        self._transport = transport
        self._edges = {c.number: c.edge for c in plan.channels.all()}
        self._before = {n.name: n.seconds for n in self._nodes}  # of the run that this one resumes
        self._norms: dict[str, Norms] = {}
        moving = [node for node in self._nodes if node.name not in plan.silent]
        self._moving = [node for node in moving if node.block.weights.theta]
        self._updates: dict[str, float] = {}  # norms
        self._probes: deque[UpdateProbe] = deque(maxlen=KEPT)
        self._probing = None
        if plan.metrics.alignment is not None:
            self._probing = update_probes(plan, self._nodes, self._source, self._probes)
        self._watched: Iterator[None] | None = None
        self._spent = 0.0  # in measuring, since the norms were due
        self._draws = plan.metrics.histograms
        self._histograms: dict[str, dict[str, Histogram]] = {}
        ticks = plan.metrics.trace
        self._tracer = None if ticks is None else Tracer(ticks, nodes, mailbox, writer)
        self.begin()

    def begin(self) -> None:
        """Start the clock: the first tick comes."""
        self._due = self._began = perf_counter()
        self._cpu = process_time()

    def poll(self) -> None:
        """Take the norms of all blocks, if they are due, and look at updates that are watched."""
        now = perf_counter()
        if self._probing is not None:
            next(self._probing)
        if self._watched is not None:
            if next(self._watched, self) is self:
                self._watched = None
                return_freed_memory()  # (that of the copies of weights)
            self._spent += perf_counter() - now
        if now < self._due:
            return
        self._norms = {node.name: node.contents().norms() for node in self._nodes}
        if self._draws:
            self._histograms = {node.name: node.contents().histograms() for node in self._nodes}
        self._watched = self._watched or update_norms(self._moving, self._updates)
        after = perf_counter()
        self._due = after + max(PAUSE_SECONDS, (self._spent + after - now) / SHARE)
        self._spent = 0.0

    @property
    def _steps(self) -> dict[str, float]:
        return {node.name: node.seconds - self._before[node.name] for node in self._nodes}

    @property
    def seconds(self) -> dict[str, float]:
        """Return how the process has spent its time, as `RunFacts.time_use` says."""
        total = perf_counter() - self._began
        spent = {"total": total, "cpu": process_time() - self._cpu}
        spent["step"] = sum(self._steps.values())
        if self._source is not None:
            spent["stream"] = self._source.seconds
        return spent if self._transport is None else {**spent, **self._transport.seconds}

    def trace(self) -> list[TraceSpan]:
        """Return the trace of the last ticks; none without `metrics.trace`."""
        return [] if self._tracer is None else list(self._tracer.spans)

    def sample(self) -> ProcessSample:
        """Return all measurements; in any thread."""
        posted, received = (dict(counts) for counts in self._mailbox.counts)
        waits: Mapping[int, float] = {} if self._transport is None else dict(self._transport.waits)
        edges: dict[str, EdgeCounts] = {}
        for number in {*posted, *received}:
            queued = posted.get(number, 0) - received.get(number, 0)
            edge = self._edges[number]
            more = EdgeCounts(0, queued, waits.get(number, 0.0))
            edges[edge] = edges.get(edge, EdgeCounts()) + more
        for edge, nbytes in dict(self._mailbox.payload_bytes).items():
            edges[edge] = edges.get(edge, EdgeCounts()) + EdgeCounts(nbytes)
        stream = {} if self._source is None else dict(self._source.counts)
        spent, memory = self.seconds, resident_bytes()
        steps = dict(self._updates)
        norms = {n: norm._replace(update=steps.get(n)) for n, norm in self._norms.items()}
        late = {n.name: dict(n.staleness) for n in self._nodes if getattr(n, "staleness", None)}
        measured = norms, self._steps, edges, stream, self._histograms, late
        return ProcessSample(spent, memory, *measured, self._fetched())

    def _fetched(self) -> Sequence[UpdateProbe]:
        """Return the probes to fetch; those of blocks are returned once, for they are large."""
        probes = self._probes
        return [probes.popleft() for _ in range(len(probes))] if self._nodes else list(probes)
