"""What a process of a distributed run tells of itself: while it runs, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import HamdistError
from hamdist.runtime.results.digests import DigestMap
from hamdist.runtime.results.measured import ProcessSample
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.results.trace import TraceSpan
from hamdist.runtime.signals.edge_codecs import CompressionMap
from hamdist.runtime.snapshots.process_snapshots import WrittenFiles
from hamdist.runtime.transport.gpu_ring import Refusal


@dataclass(slots=True)
class WorkerReport:
    """Final report of a process; the fields are those of RunFacts, except for these.

    `sample`: its measurements at the end; `refusals`: channels between GPUs whose signals went
    through host memory; `error`: ended the process; `aborted`: it was called off.
    """

    blocks: dict[str, BlockState] = field(default_factory=dict)
    windows: dict[str, list[Window]] = field(default_factory=dict)
    samples: int = 0
    ticks: int = 0
    seconds: float = 0.0
    payload_bytes: dict[str, int] = field(default_factory=dict)
    compression: CompressionMap = field(default_factory=dict)
    peak_memory: int = 0
    own_memory: int = 0
    smoothness: float | None = None
    stream: dict[str, int] = field(default_factory=dict)
    records: dict[str, Records] = field(default_factory=dict)
    sample: ProcessSample = field(default_factory=ProcessSample)
    trace: list[TraceSpan] = field(default_factory=list)
    digests: Mapping[str, DigestMap] = field(default_factory=dict)
    kept: SnapshotNews | None = None
    refusals: list[Refusal] = field(default_factory=list)
    error: HamdistError | None = None
    aborted: bool = False


@dataclass(frozen=True, slots=True)
class BlockedChannel:
    """A blocked channel, for the watchdog; `seconds` is how long it has been blocked."""

    waiter: str
    awaited: str
    what: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SnapshotNews:
    """Files written since the last status, the failure of one, and the bytes of kept signals.

    `forgot` says that signals were dropped: no process can restart from the latest snapshot.
    """

    taken: list[WrittenFiles]
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
    kept: SnapshotNews | None = None
