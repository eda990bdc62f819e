"""The time of a run in words, and what to change: from its events alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar

from hamdist.runtime.results.events import (
    ActorReplaced,
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    NetworkPlaced,
    RunEvent,
    RunFinished,
)

MUCH = 0.25  # of the time of a process
PLENTY = 0.6
SHORT = 1e-3  # seconds of a process of which nothing is said
_Kind = TypeVar("_Kind", bound=RunEvent)
Shares: TypeAlias = Mapping[str, Mapping[str, float]]  # of its time, by process and activity


def explain(
    events: Iterable[RunEvent], level: str | None = None, seed: int | None = None
) -> dict[str, list[str]]:
    """Return sentences by run ('trace, seed 0'), each with its remedy.

    Args:
        events: of a folder.
        level: of the only run to explain; None: all.
        seed: of that run.
    """
    runs: dict[str, list[RunEvent]] = {}
    for event in events:
        other = level is not None and (event.level, event.seed) != (level, seed)
        if event.level is None or other:
            continue
        name = event.level if event.seed is None else f"{event.level}, seed {event.seed}"
        runs.setdefault(name, []).append(event)
    return {name: list(_sentences(run_events)) for name, run_events in runs.items()}


def _latest(events: Iterable[RunEvent], kind: type[_Kind]) -> _Kind | None:
    return next((e for e in reversed(list(events)) if isinstance(e, kind)), None)


def _sentences(events: list[RunEvent]) -> Iterator[str]:
    end, measured = _latest(events, RunFinished), _latest(events, ActorsMeasured)
    times = end.time_use if end is not None else {} if measured is None else measured.seconds
    shares = {
        name: {kind: spent / seconds["total"] for kind, spent in seconds.items()}
        for name, seconds in times.items()
        if seconds.get("total", 0.0) > SHORT
    }
    if not shares:
        yield "no measurements yet: they come once a second, after the first tick"
        return
    start = 0.0 if end is None else sum(end.startup.values())
    if end is not None and start > max(1.0, end.seconds):
        phase = max(end.startup, key=lambda name: end.startup[name])
        yield (
            f"the start took {start:.1f} s, longer than the run's {end.seconds:.1f} s (most of it: "
            f"{phase}, {end.startup[phase]:.1f} s): runs in one hamdist.session share it"
        )
    yield from (_one_process if len(shares) == 1 else _processes)(events, shares)
    for name, share in _most(shares, "stream"):
        yield (
            f"drawing samples takes {share:.0%} of the time of {name}: a DataLoader with workers, "
            "or data that is prepared once, make it shorter"
        )
    lost = [e for e in events if isinstance(e, ActorReplaced) and e.lost]
    together = {(e.since, e.seconds): e.seconds for e in lost}
    if lost:
        subject = "1 actor was" if len(lost) == 1 else f"{len(lost)} actors were"
        yield f"{subject} lost and replaced, which took {sum(together.values()):.1f} s"


def _most(shares: Shares, kind: str) -> list[tuple[str, float]]:
    """Return the process that spends the most on `kind`, if that is much."""
    name = max(shares, key=lambda process: shares[process].get(kind, 0.0))
    share = shares[name].get(kind, 0.0)
    return [(name, share)] if share > MUCH else []


def _one_process(events: list[RunEvent], shares: Shares) -> Iterator[str]:
    [(name, spent)] = shares.items()
    yield f"one process ({name}): {spent['step']:.0%} of its time in the steps of its blocks"
    block, share = _heaviest(events, name)
    if block is not None:
        remedy = "; on several cores, cut or slice it, and use engine.kind 'ray'"
        yield f"{block} takes {share:.0%} of all steps{remedy if share > 0.5 else ''}"
    if spent["step"] < 0.5:
        yield (
            "the rest is Python around the steps (schedules, queues, metrics): larger batches, or "
            "fewer blocks (partition.blocks), make it smaller"
        )


def _processes(events: list[RunEvent], shares: Shares) -> Iterator[str]:
    network = _latest(events, NetworkPlaced)
    busiest = max(shares, key=lambda name: shares[name].get("step", 0.0))
    actors = [name for name in shares if _blocks_of(network, name)] or list(shares)
    idlest = max(actors, key=lambda name: shares[name].get("waiting", 0.0))
    step, waits = shares[busiest].get("step", 0.0), shares[idlest].get("waiting", 0.0)
    sets_pace = step > MUCH and shares[busiest].get("waiting", 0.0) < waits - 0.1
    if sets_pace:
        block, share = _heaviest(events, busiest)
        head = f"{busiest} sets the pace" if share < PLENTY else f"{block} slows the run down"
        where = "" if block is None else f", {share:.0%} of them in {block}"
        alone = len(_blocks_of(network, busiest)) < 2
        yield (
            f"{head}: {busiest} spends {step:.0%} of its time in steps{where}: cut {block or 'it'} "
            "earlier (partition.cuts), or slice it (partition.slices)"
            + ("" if alone else ", or give it an actor alone (engine.placement)")
        )
    if waits > MUCH:
        counts, blocks = _latest(events, EdgesMeasured), _blocks_of(network, idlest)
        ends = {e.name: {e.parent, e.child} for e in (() if network is None else network.edges)}
        edges = {} if counts is None else counts.edges
        edges = {name: counted for name, counted in edges.items() if ends.get(name, set()) & blocks}
        edge = max(edges, key=lambda name: edges[name].waited, default=None)
        most = "" if edge is None else f", most of all for {edge} ({edges[edge].waited:.1f} s)"
        yield f"{idlest} waits {waits:.0%} of its time{most}"
    if (
        not sets_pace
        and min(blocks.get("waiting", 0.0) for blocks in shares.values()) > MUCH
        and step < PLENTY
    ):
        yield (
            "every process waits: signals take long, or one sample at a time is in the network "
            "(level 'backprop'); larger batches, fewer actors, level 'pipeline' or 'trace', or "
            "delays that hide the links (partition.delays: auto) help"
        )
    for name, share in _most(shares, "packing"):
        yield (
            f"{name} packs signals {share:.0%} of its time: compression of wide edges "
            "(engine.compress), or a cut where the state is narrower, make them smaller"
        )


def _heaviest(events: list[RunEvent], actor: str) -> tuple[str | None, float]:
    """Return the actor's block with the longest steps, and its share of them."""
    blocks, network = _latest(events, BlocksMeasured), _latest(events, NetworkPlaced)
    if blocks is None or network is None:
        return None, 0.0
    names = _blocks_of(network, actor)
    seconds = {name: spent for name, spent in blocks.seconds.items() if name in names}
    whole = sum(seconds.values())
    block = max(seconds, key=lambda name: seconds[name], default=None)
    return (block, seconds[block] / whole) if block is not None and whole else (None, 0.0)


def _blocks_of(network: NetworkPlaced | None, actor: str) -> set[str]:
    actors = () if network is None else network.actors
    return {block for worker in actors if worker.name == actor for block in worker.blocks}
