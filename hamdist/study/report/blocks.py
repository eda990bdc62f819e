"""Measurements of each block of a run: staleness, alignment, norms, dead units, own memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hamdist.display.table import MISSING, Table, number, percent
from hamdist.dynamics.saved_state.block_memory import BlockMemory
from hamdist.runtime.results.events import BlocksMeasured, RunEvent, UpdatesAligned
from hamdist.study.report.aggregate import mean_of
from hamdist.study.run.run import Run

TITLES = [
    *("level", "block", "updates late, median", "95 %", "most"),
    *("alignment, first quarter", "last quarter", "|theta|", "|update|", "dead units, %"),
    "own memory, KiB",
]
KIB = 2**10


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """Measurements of one block in one run, as plain values.

    Attributes:
        late: (updates, samples that came back after so many of them).
        first, last: the mean alignment over the first and the last quarter of the probes.
        theta, update, dead: as `Norms`, of the latest measurement.
        memory: bytes of its own (`BlockMemory.total`).
    """

    late: Sequence[tuple[int, int]] = ()
    first: float | None = None
    last: float | None = None
    theta: float | None = None
    update: float | None = None
    dead: float | None = None
    memory: int | None = None


def block_facts(
    events: Sequence[RunEvent], memory: Mapping[str, BlockMemory]
) -> dict[str, BlockFacts]:
    """Return what the events of one run say of its blocks, and their memory."""
    seen = [e for e in events if isinstance(e, BlocksMeasured)]
    all_late, all_norms = (seen[-1].staleness, seen[-1].norms) if seen else ({}, {})
    probes = [e.cosines for e in events if isinstance(e, UpdatesAligned)]
    quarter = -(-len(probes) // 4)
    first, last = probes[:-1][:quarter], probes[len(probes) - quarter :]  # (one is the last)
    facts = {}
    for name in dict.fromkeys([*(seen[-1].updates if seen else ()), *memory]):
        norms, bytes_kept = all_norms.get(name), memory.get(name)
        facts[name] = BlockFacts(
            late=sorted(all_late.get(name, {}).items()),
            first=mean_of([p[name] for p in first if name in p]),
            last=mean_of([p[name] for p in last if name in p]),
            theta=None if norms is None else norms.theta,
            update=None if norms is None else norms.update,
            dead=None if norms is None else norms.dead,
            memory=None if bytes_kept is None else bytes_kept.total,
        )
    return facts


def facts_of(
    runs: Sequence[Run], events: Sequence[RunEvent]
) -> dict[str, list[dict[str, BlockFacts]]]:
    """Return the facts of the blocks of each run, by level, from the events of them all."""
    facts: dict[str, list[dict[str, BlockFacts]]] = {}
    for run in runs:
        of_run = [e for e in events if (e.level, e.seed) == (run.level, run.seed)]
        facts.setdefault(run.level, []).append(block_facts(of_run, run.block_memory))
    return facts


def block_table(runs: Mapping[str, Sequence[Mapping[str, BlockFacts]]]) -> Table | None:
    """Return a row for each block of each level, over its runs (one a seed); None without facts.

    Of the staleness all samples count, of the memory the largest, of all else the mean.
    """
    rows = [
        [level, name, *_cells([run[name] for run in of_level if name in run])]
        for level, of_level in runs.items()
        for name in dict.fromkeys(name for run in of_level for name in run)
    ]
    return Table(TITLES, rows, []) if rows else None


def _cells(facts: Sequence[BlockFacts]) -> list[str]:
    counts: Counter[int] = Counter()
    for each in facts:
        counts.update(dict(each.late))
    late = sorted(counts.elements())
    places = (len(late) // 2, (95 * len(late) - 1) // 100, -1) if late else ()
    memory = [each.memory for each in facts if each.memory is not None]

    def mean(name: str) -> float | None:
        values = [getattr(each, name) for each in facts]
        return mean_of([value for value in values if value is not None])

    return [
        *([str(late[i]) for i in places] or [MISSING] * 3),
        *(number(mean(name)) for name in ("first", "last", "theta", "update")),
        percent(mean("dead")),
        f"{max(memory) / KIB:.1f}" if memory else MISSING,
    ]
