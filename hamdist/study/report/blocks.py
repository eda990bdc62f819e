"""What the events of a comparison say of each block: staleness, alignment, norms, dead units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hamdist.display.table import MISSING, Table, number, percent
from hamdist.runtime.results.events import BlocksMeasured, RunEvent, UpdatesAligned
from hamdist.runtime.results.measured import Norms
from hamdist.study.report.aggregate import mean_of

TITLES = [
    *("level", "block", "updates late, median", "95 %", "most"),
    *("alignment, first quarter", "last quarter", "|theta|", "|update|", "dead units, %"),
]


@dataclass
class _BlockEvents:
    late: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    norms: list[Norms] = field(default_factory=list)


def block_table(events: Iterable[RunEvent], levels: Iterable[str]) -> Table | None:
    """Return a row for each block of each level, over all seeds; None without measurements.

    Of the norms and dead units the latest of each run count; of the staleness all samples, of the
    alignment (`metrics.alignment`) the means over the first and the last quarter of its probes.
    """
    by_run: dict[tuple[str, int | None], list[RunEvent]] = {}
    for event in events:
        if event.level is not None and isinstance(event, (BlocksMeasured, UpdatesAligned)):
            by_run.setdefault((event.level, event.seed), []).append(event)
    rows = []
    for level in dict.fromkeys(levels):
        blocks: dict[str, _BlockEvents] = {}
        for (of, _), run in by_run.items():
            if of == level:
                _add(blocks, run)
        rows += [[level, name, *_cells(facts)] for name, facts in blocks.items()]
    return Table(TITLES, rows, []) if rows else None


def _add(blocks: dict[str, _BlockEvents], run: Sequence[RunEvent]) -> None:
    measured = [e for e in run if isinstance(e, BlocksMeasured)]
    probes = [e.cosines for e in run if isinstance(e, UpdatesAligned)]
    quarter = -(-len(probes) // 4)
    for name in measured[-1].updates if measured else ():
        events = blocks.setdefault(name, _BlockEvents())
        events.late.update(measured[-1].staleness.get(name, {}))
        events.norms += [e.norms[name] for e in measured[-1:] if name in e.norms]
        events.first += [p[name] for p in probes[:quarter] if name in p]
        events.last += [p[name] for p in probes[len(probes) - quarter :] if name in p]


def _cells(events: _BlockEvents) -> list[str]:
    late = sorted(events.late.elements())
    count = len(late)
    places = (count // 2, (95 * count - 1) // 100, -1) if count else ()
    return [
        *([str(late[i]) for i in places] or [MISSING] * 3),
        *(number(mean_of(cosines)) for cosines in (events.first, events.last)),
        number(mean_of([n.theta for n in events.norms])),
        number(mean_of([n.update for n in events.norms if n.update is not None])),
        percent(mean_of([n.dead for n in events.norms if n.dead is not None])),
    ]
