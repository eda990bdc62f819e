"""What an engine hands back, before it becomes a `RunResult`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hamdist.dynamics.energy import Records
from hamdist.dynamics.metrics import Window
from hamdist.runtime.result import BlockState, RunFacts


@dataclass(slots=True, kw_only=True)
class Outcome(RunFacts):
    """blocks: final states by name (without those that were lost, after an interruption).
    startup: seconds by phase, as far as the engine knows them. delays: those that were chosen,
    where that was asked for. error: what `on_progress` has raised, which ended the run. The rest is
    as in RunResult."""

    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    records: dict[str, Records] = field(default_factory=dict)
    error: Exception | None = None
