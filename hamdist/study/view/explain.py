"""Where the time of a run went, in words, and what to change: from its events alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hamdist.runtime.results.events import (
    ActorReplaced,
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    NetworkPlaced,
    RunBegun,
    RunEvent,
    RunFinished,
    RunProgressed,
    SnapshotComplete,
)

Seconds = Mapping[str, float]
MUCH = 0.25  # of the time of a process
PLENTY = 0.6
SHORT = 1e-3  # seconds of a run of which nothing is said


@dataclass
class _RunTimes:
    """The latest event of each kind of one run."""

    level: str
    seed: int | None
    network: NetworkPlaced | None = None
    blocks: BlocksMeasured | None = None
    actors: ActorsMeasured | None = None
    edges: EdgesMeasured | None = None
    progress: RunProgressed | None = None
    finished: RunFinished | None = None
    replaced: list[ActorReplaced] = field(default_factory=list)
    snapshots: int = 0

    def take(self, event: RunEvent) -> None:
        if isinstance(event, RunBegun):
            self.replaced, self.snapshots = [], 0
        elif isinstance(event, ActorReplaced):
            self.replaced.append(event)
        elif isinstance(event, SnapshotComplete):
            self.snapshots += 1
        else:
            kinds = {
                NetworkPlaced: "network",
                BlocksMeasured: "blocks",
                ActorsMeasured: "actors",
                EdgesMeasured: "edges",
                RunProgressed: "progress",
                RunFinished: "finished",
            }
            name = kinds.get(type(event))
            if name is not None:
                setattr(self, name, event)

    @property
    def times(self) -> dict[str, Seconds]:
        """Return the seconds by process: of the whole run, or as far as it is."""
        if self.finished is not None and self.finished.time_use:
            return dict(self.finished.time_use)
        return {} if self.actors is None else dict(self.actors.seconds)


def explain(
    events: Iterable[RunEvent], level: str | None = None, seed: int | None = None
) -> dict[str, list[str]]:
    """Return sentences by run ('trace, seed 0'): the slowest first, each with its remedy.

    Args:
        events: of a folder.
        level: of the only run to explain; None: all.
        seed: of that run.
    """
    runs: dict[str, _RunTimes] = {}
    for event in events:
        if event.level is None or (
            level is not None and (event.level, event.seed) != (level, seed)
        ):
            continue
        name = event.level if event.seed is None else f"{event.level}, seed {event.seed}"
        runs.setdefault(name, _RunTimes(event.level, event.seed)).take(event)
    return {name: list(_sentences(run)) for name, run in runs.items()}


def _sentences(run: _RunTimes) -> Iterable[str]:
    times = {name: s for name, s in run.times.items() if s.get("total", 0.0) > SHORT}
    if not times:
        yield "no measurements yet: they come once a second, after the first tick"
        return
    yield from _start(run)
    if len(times) == 1:
        yield from _one_process(run, *times.items())
    else:
        yield from _processes(run, times)
    yield from _stream(times)
    if run.replaced:
        seconds = sum(r.seconds for r in run.replaced if r.lost)
        yield f"{len(run.replaced)} actors were lost or set back, which took {seconds:.1f} s"


def _start(run: _RunTimes) -> Iterable[str]:
    end = run.finished
    total = 0.0 if end is None else sum(end.startup.values())
    if end is not None and total > max(1.0, end.seconds):
        phase = max(end.startup, key=lambda name: end.startup[name])
        yield (
            f"the start took {total:.1f} s, longer than the run's {end.seconds:.1f} s (most of it: "
            f"{phase}, {end.startup[phase]:.1f} s): in one session (hamdist.session, or compare) "
            "runs share it"
        )


def _one_process(run: _RunTimes, only: tuple[str, Seconds]) -> Iterable[str]:
    name, seconds = only
    busy = seconds.get("step", 0.0) / seconds["total"]
    yield f"one process ({name}): {_percent(busy)} of its time in the steps of its blocks"
    block, share = _heaviest(run, None)
    if block is not None:
        yield f"{block} takes {_percent(share)} of all steps" + (
            ": on several cores, cut it into more blocks or slices and give them actors "
            "(engine.kind 'ray')"
            if share > 0.5
            else ""
        )
    if busy < 0.5:
        yield (
            "the rest is Python around the steps (schedules, queues, metrics): larger batches, or "
            "fewer blocks (partition.blocks), make it smaller"
        )


def _processes(run: _RunTimes, times: Mapping[str, Seconds]) -> Iterable[str]:
    steps = {n: s.get("step", 0.0) / s["total"] for n, s in times.items()}
    waits = {n: s.get("waiting", 0.0) / s["total"] for n, s in times.items()}
    packs = {n: s.get("packing", 0.0) / s["total"] for n, s in times.items()}
    busiest = max(steps, key=lambda name: steps[name])
    idlest = max(waits, key=lambda name: waits[name])
    block, share = _heaviest(run, busiest)
    if waits[idlest] > MUCH:
        edge, waited = _longest_wait(run)
        behind = f", most of it for edge {edge} ({waited:.1f} s in all)" if edge is not None else ""
        yield f"{idlest} waits {_percent(waits[idlest])} of its time{behind}"
    if steps[busiest] > MUCH and waits[busiest] < waits[idlest] - 0.1:
        where = f", {_percent(share)} of them in block {block}" if block else ""
        yield (
            f"{busiest} sets the pace: {_percent(steps[busiest])} of its time in steps{where}: cut "
            f"{block or 'it'} earlier (partition.cuts), slice it (partition.slices), or give it an "
            "actor alone (engine.placement)"
        )
    elif min(waits.values()) > MUCH and max(steps.values()) < PLENTY:
        yield (
            "every process waits: the signals themselves take long, or one sample at a time is in "
            "the network (level 'backprop'); larger batches, fewer actors, level 'pipeline' or "
            "'trace', or delays that hide the links (partition.delays: auto) help"
        )
    worst = max(packs, key=lambda name: packs[name])
    if packs[worst] > MUCH:
        yield (
            f"{worst} packs signals {_percent(packs[worst])} of its time: compression of wide "
            "edges (engine.compression), or a cut where the state is narrower, make them smaller"
        )


def _stream(times: Mapping[str, Seconds]) -> Iterable[str]:
    for name, seconds in times.items():
        share = seconds.get("stream", 0.0) / seconds["total"]
        if share > MUCH:
            yield (
                f"drawing samples takes {_percent(share)} of the time of {name}: a DataLoader with "
                "workers, or data that is prepared once, make it shorter"
            )


def _heaviest(run: _RunTimes, actor: str | None) -> tuple[str | None, float]:
    """Return the block with the longest steps, of an actor or of all, and its share of theirs."""
    if run.blocks is None or run.network is None:
        return None, 0.0
    those = {b for a in run.network.actors if actor in (None, a.name) for b in a.blocks}
    seconds = {b: s for b, s in run.blocks.seconds.items() if b in those}
    whole = sum(seconds.values())
    if not whole:
        return None, 0.0
    block = max(seconds, key=lambda name: seconds[name])
    return block, seconds[block] / whole


def _longest_wait(run: _RunTimes) -> tuple[str | None, float]:
    edges = {} if run.edges is None else run.edges.edges
    edge = max(edges, key=lambda name: edges[name].waited, default=None)
    return edge, 0.0 if edge is None else edges[edge].waited


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
