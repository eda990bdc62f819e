"""What an engine hands back, before it becomes a `RunResult`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hamdist.dynamics.energy import Records
from hamdist.dynamics.metrics import Window
from hamdist.runtime.compression import CompressionMap
from hamdist.runtime.result import BlockState, Replaced


@dataclass(slots=True)
class Outcome:
    """blocks: final states by name (without those that were lost, after an interruption).
    startup: seconds by phase, as far as the engine knows them. placement: the blocks of each
    process. own_memory, time_use, compression: see RunResult. delays: those that were chosen, where
    that was asked for. snapshots: the complete ones that are left. stopped: `on_progress` has ended
    the run; error: what it has raised, which ended the run, too."""

    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    samples: int
    ticks: int
    seconds: float
    startup: dict[str, float]
    payload_bytes: dict[str, int]
    peak_memory: dict[str, int]
    own_memory: dict[str, int]
    smoothness: float | None
    placement: list[list[str]]
    stream: dict[str, int] = field(default_factory=dict)
    records: dict[str, Records] = field(default_factory=dict)
    time_use: dict[str, dict[str, float]] = field(default_factory=dict)
    compression: CompressionMap = field(default_factory=dict)
    delays: dict[str, int] = field(default_factory=dict)
    snapshots: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    interrupted: bool = False
    stopped: bool = False
    error: Exception | None = None
    warnings: list[str] = field(default_factory=list)
