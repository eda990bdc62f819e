"""What a process of a distributed run tells of itself: while it runs, and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.objective.prequential import Window
from hamdist.dynamics.saved_state.block_memory import BlockMemory
from hamdist.errors import HamdistError, StreamError
from hamdist.runtime.engines.sampler import Sampler
from hamdist.runtime.nodes.factory import ticks_of
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.process.usage import own_bytes, peak_bytes
from hamdist.runtime.results.digests import DigestMap, joined
from hamdist.runtime.results.measured import ProcessSample, TraceSpan
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.edge_codecs import CompressionMap
from hamdist.runtime.snapshots.process_snapshots import WrittenFiles
from hamdist.runtime.transport.gpu_ring import Refusal


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
            self.samples, self.stream = source.samples, source.counts
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
        "windows": {name: those for r in every for name, those in r.windows.items()},
        "records": {name: rs for r in every for name, rs in r.records.items()},
        "samples": max((r.samples for r in every), default=0),
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
        "time_use": {name: dict(r.sample.seconds) for name, r in reports.items()},
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

    `forgot` says that signals were dropped: no process can restart from the latest snapshot.
    """

    written: list[WrittenFiles]
    failure: str | None
    nbytes: int
    forgot: bool = False


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
