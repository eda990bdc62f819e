"""Measurements of a process of a run, between two steps of its nodes, and its reports: while it
runs, and at its end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.prequential import Window
from hamdist.dynamics.saved_state.block_memory import BlockMemory
from hamdist.errors import HamdistError, StreamError
from hamdist.runtime.engines.update_probe import UpdateProbe, update_norms, update_probes
from hamdist.runtime.nodes.factory import ticks_of
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.usage import own_bytes, peak_bytes, resident_bytes, return_freed_memory
from hamdist.runtime.results.digests import DigestMap, joined
from hamdist.runtime.results.measured import EdgeCounts, Histogram, Norms, ProcessSample, TraceSpan
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.edge_codecs import CompressionMap
from hamdist.runtime.snapshots.process_snapshots import WrittenFiles
from hamdist.runtime.transport.gpu_ring import Refusal
from hamdist.runtime.transport.transport import Endpoints

# What blocks do, by method; `move` is of their weights.
PHASES = {
    **{name: name for name in ("forward", "backward", "tick")},
    "read": "forward, loss and backward",
    "learn": "local readout",
    "complete": "costate",
    "end": "update",
}
PAUSE_SECONDS = 1.0  # between two samples of the norms
SHARE = 0.001  # of the time that they may take
KEPT = 4  # probes that wait to be fetched


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
        self.measure()
        self._watched = self._watched or update_norms(self._moving, self._updates)
        after = perf_counter()
        self._due = after + max(PAUSE_SECONDS, (self._spent + after - now) / SHARE)
        self._spent = 0.0

    def measure(self) -> None:
        """Take the norms of all blocks (and their histograms) now."""
        self._norms = {node.name: node.contents().norms() for node in self._nodes}
        if self._draws:
            self._histograms = {node.name: node.contents().histograms() for node in self._nodes}

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


@dataclass(slots=True)
class WorkerReport:
    """Final report of a process; the fields are those of RunFacts, except for these.

    `sample`: its measurements at the end; `refusals`: channels between GPUs whose signals went
    through host memory; `error`: ended the process; `failure`: of the stream; `aborted`: it was
    called off.
    """

    blocks: dict[str, BlockState] = field(default_factory=dict)
    windows: dict[str, list[Window]] = field(default_factory=dict)
    samples: int = 0
    rows: int = 0
    ticks: int = 0
    seconds: float = 0.0
    bytes_per_edge: dict[str, int] = field(default_factory=dict)
    compression: CompressionMap = field(default_factory=dict)
    peak_memory: int = 0
    own_memory: int = 0
    block_memory: dict[str, BlockMemory] = field(default_factory=dict)
    smoothness: float | None = None
    stream: dict[str, int] = field(default_factory=dict)
    records: dict[str, Records] = field(default_factory=dict)
    sample: ProcessSample = field(default_factory=ProcessSample)
    trace: list[TraceSpan] = field(default_factory=list)
    digests: Mapping[str, DigestMap] = field(default_factory=dict)
    snapshot_news: SnapshotNews | None = None
    refusals: list[Refusal] = field(default_factory=list)
    error: HamdistError | None = None
    failure: StreamError | None = None
    aborted: bool = False

    def take(
        self, nodes: Sequence[Any], source: SourceNode | None, mailbox: Mailbox, sampler: Sampler
    ) -> None:
        """Take what the blocks (`nodes`), the stream and the counts of a process have come to."""
        self.ticks = ticks_of(nodes)
        sampler.measure()
        self.sample, self.trace = sampler.sample(), sampler.trace()
        self.peak_memory = peak_bytes()  # before the states are copied
        self.own_memory = own_bytes()
        for node in nodes:
            modules = [function.module for _, function, _ in node.contents().parts]
            self.block_memory[node.name] = node.block.memory(modules)
        self.blocks = {node.name: node.state() for node in nodes}
        self.records = {n.name: r for n in nodes for r in [n.records()] if r is not None}
        for node in nodes:
            if node.metrics is not None:
                node.metrics.flush()
                self.windows[node.name] = node.metrics.windows
        if source is not None:
            self.samples, self.rows, self.stream = source.samples, source.rows, source.counts
            self.failure = source.failure
            self.smoothness = source.smoothness.frames
        if mailbox.digests is not None:
            self.digests = mailbox.digests.result(self.blocks)
        self.bytes_per_edge = dict(mailbox.payload_bytes)
        self.compression = mailbox.compression


def merged(
    reports: Mapping[str, WorkerReport], stream: WorkerReport | None = None
) -> dict[str, Any]:
    """Return the fields of a run's `Outcome` that the reports of its processes, by name, make.

    stream: of a stream in the driver's process, which is none of those.
    """
    timed = dict(reports) if stream is None else {"driver": stream, **reports}
    every = [*reports.values(), *([] if stream is None else [stream])]
    sent: dict[str, int] = {}
    compression: CompressionMap = {}
    for report in every:
        for edge, number in report.bytes_per_edge.items():
            sent[edge] = sent.get(edge, 0) + number
        for edge, done in report.compression.items():
            compression.setdefault(edge, {}).update(done)
    return {
        "blocks": {name: state for r in every for name, state in r.blocks.items()},
        "windows": {name: windows for r in every for name, windows in r.windows.items()},
        "records": {name: rs for r in every for name, rs in r.records.items()},
        "samples": max((r.samples for r in every), default=0),
        "rows": max((r.rows for r in every), default=0),
        "ticks": max((r.ticks for r in every), default=0),
        "smoothness": next((r.smoothness for r in every if r.smoothness is not None), None),
        "error": next((r.failure for r in every if r.failure is not None), None),
        "stream": next((r.stream for r in every if r.stream), {}),
        "bytes_per_edge": sent,
        "compression": compression,
        "digests": joined(report.digests for report in every),
        "peak_memory": {name: r.peak_memory for name, r in reports.items()},
        "block_memory": {name: part for r in every for name, part in r.block_memory.items()},
        "own_memory": {name: r.own_memory for name, r in reports.items()},
        "time_use": {name: dict(r.sample.seconds) for name, r in timed.items()},
        "trace": {name: r.trace for name, r in reports.items()},
    }


@dataclass(frozen=True, slots=True)
class BlockedChannel:
    """A blocked channel, for the watchdog; `seconds` is how long it has been blocked."""

    waiter: str
    awaited: str
    waits_for: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SnapshotNews:
    """Files written since the last status, the failure of one, and the bytes of kept signals.

    `dropped` says that signals were dropped: no process can restart from the latest snapshot.
    """

    written: list[WrittenFiles]
    failure: str | None
    nbytes: int
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Status of a running process; ticks and updates are by block.

    The windows are those of its first readout from number `first` on, `joined` so often
    (None: no readout here); others: the latest ones of its other readouts.
    """

    ticks: dict[str, int]
    updates: dict[str, int]
    samples: int
    windows: list[Window]
    first: int
    joined: int | None
    others: Mapping[str, list[Window]]
    sample: ProcessSample
    wait: BlockedChannel | None
    snapshot_news: SnapshotNews | None = None
    rows: int = 0
