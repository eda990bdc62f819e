"""The rows of the targets, from what the contests found: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness import explain
from harness.contest import (
    ALONE,
    ARITHMETIC,
    BACKPROP,
    CENTRALISED,
    EAGER,
    EXCHANGE,
    LOCAL,
    PIPELINE,
    PIPELINING,
    TRACE,
    Contest,
)
from harness.figures import Row, Target, faster, missing, worst
from harness.footprint import Footprint

Contests = Mapping[tuple[int, int], Contest]  # of MLPs, by width and batch
Exact = Mapping[str, Contest]  # of level `pipeline`, by work

TRACE_TARGETS = {
    (256, 1): 4.5,
    (1024, 1): 4.0,
    (256, 8): 3.0,
    (1024, 8): 3.0,
    (256, 32): 2.3,
    (1024, 32): 2.2,
}
PIPELINING_TARGETS = {(1024, 1): 6.0, (1024, 32): 3.0}
PIPELINE_TARGETS = {
    CENTRALISED: ("one process with one thread", Target(1.7)),
    PIPELINING: ("torch.distributed.pipelining", Target(1.3)),
}
ACTIVATIONS_TARGET = Target(1.01, at_least=False)
LOCAL_TARGET = Target(0.9)
EXCHANGE_TARGET = Target(3.0, at_least=False)
BACKPROP_WORKS = (256, 1), (1024, 1)
BACKPROP_TARGET = Target(1.8)
MEMORY_TARGET = Target(1.1, at_least=False)
EQUAL = 1e-10  # difference of weights in float64, after CHECKED_STEPS
CHECKED_STEPS = 20


def rows(contests: Contests) -> list[Row]:
    """Those that compare throughputs, in the order of the issue's table."""
    found = [
        _against(contests, key, CENTRALISED, "the best centralised configuration", Target(bound))
        for key, bound in TRACE_TARGETS.items()
    ]
    found += [
        _against(contests, key, PIPELINING, "torch.distributed.pipelining", Target(bound))
        for key, bound in PIPELINING_TARGETS.items()
    ]
    local = [_local(contests, key) for key in TRACE_TARGETS]
    return [*found, *local, worst("local against trace, all of them", local, LOCAL_TARGET)]


def pipeline_rows(contests: Exact) -> list[Row]:
    """Level `pipeline` against both others, on every work."""
    return [
        faster(
            f"pipeline, 2 actors, {work}, against {words}",
            contest.turns[PIPELINE],
            contest.turns[side],
            target,
            configuration={one: contest.configurations[one] for one in (PIPELINE, side)},
            profile=explain.sentence(contest.median(PIPELINE), contest.parts[PIPELINE]),
        )
        for work, contest in contests.items()
        for side, (words, target) in PIPELINE_TARGETS.items()
    ]


def activation_rows(contests: Exact) -> list[Row]:
    """The activations that an actor keeps at level `pipeline`, of what 1F1B promises: the worst
    actor's."""
    return [
        Row(
            f"pipeline, 2 actors, {work}: activations kept, against 1F1B",
            max(kept / promised for kept, promised in contest.activations if promised),
            ACTIVATIONS_TARGET,
            configuration={
                PIPELINE: contest.configurations[PIPELINE],
                "kept, promised": contest.activations,
            },
            profile=f"kept, promised (bytes, by actor): {contest.activations}",
            unit="bytes",
        )
        for work, contest in contests.items()
    ]


def _label(key: tuple[int, int]) -> str:
    return f"W={key[0]} batch {key[1]}"


def _against(
    contests: Contests, key: tuple[int, int], side: str, words: str, target: Target
) -> Row:
    name = f"trace, 2 actors, {_label(key)}, against {words}"
    contest = contests.get(key)
    if contest is None or side not in contest.turns:
        return missing(name, target, "this work was left out")
    return faster(
        name,
        contest.turns[TRACE],
        contest.turns[side],
        target,
        configuration={
            "ours": contest.configurations[TRACE],
            side: contest.configurations[side],
            **eager(contest, TRACE, side),
        },
        profile=profile(contest, TRACE, side),
    )


def eager(contest: Contest, level: str, against: str) -> dict[str, float | str]:
    """The ratio to the best centralised configuration that is not compiled, where it is another."""
    if against != CENTRALISED or EAGER not in contest.turns:
        return {}
    ratio = contest.median(EAGER) / contest.median(level)
    return {EAGER: contest.configurations[EAGER], "ratio to eager": ratio}


def profile(contest: Contest, level: str, against: str) -> str:
    """Where the time of a tick goes, and what the arithmetic alone would allow."""
    said = explain.sentence(contest.median(level), contest.parts[level])
    for ratio in eager(contest, level, against).values():
        if isinstance(ratio, float):
            said += f"; against the best eager configuration {ratio:.2f}"
    floor = contest.turns.get(ALONE if level == BACKPROP else ARITHMETIC)
    if floor is None:
        return said
    bound = contest.median(against) / floor.median
    return f"{said}; the arithmetic alone would make {bound:.2f} of the ratio"


def _local(contests: Contests, key: tuple[int, int]) -> Row:
    name = f"local against trace, {_label(key)}"
    contest = contests.get(key)
    if contest is None:
        return missing(name, LOCAL_TARGET, "this work was left out")
    told = explain.sentence(contest.median(LOCAL), contest.parts[LOCAL])
    than = explain.sentence(contest.median(TRACE), contest.parts[TRACE])
    return faster(
        name,
        contest.turns[LOCAL],
        contest.turns[TRACE],
        LOCAL_TARGET,
        configuration={side: contest.configurations[side] for side in (LOCAL, TRACE)},
        profile=f"local: {told}; trace: {than}",
    )


def exchange_row(contest: Contest, size: int) -> Row:
    """(tick - arithmetic) / raw exchange, of signals of `size` bytes. Where the blocks' own steps
    took less than the arithmetic by hand, they are the arithmetic."""
    tick, floor, raw = (contest.turns[side] for side in (TRACE, ARITHMETIC, EXCHANGE))
    more = contest.parts[TRACE].get(explain.PYTHON, 0.0)
    if more < 0:
        floor = floor.scaled(1 + more / floor.median)
    return Row(
        f"tick minus arithmetic, 2 actors, {size // 1024} KiB signals, against the raw ZeroMQ "
        "exchange",
        (tick.median - floor.median) / raw.median,
        EXCHANGE_TARGET,
        {"tick": tick, "arithmetic": floor, "raw exchange": raw},
        {"work": contest.work.name, **contest.configurations},
        explain.sentence(tick.median, contest.parts[TRACE]),
    )


def backprop_rows(
    contests: Contests, differences: Mapping[tuple[int, int], Mapping[str, float]]
) -> list[Row]:
    """In-process against centralised; reached only where the weights are equal, too."""
    found = []
    for key in BACKPROP_WORKS:
        name = f"backprop in one block, in-process, {_label(key)}, against centralised"
        contest = contests.get(key)
        if contest is None or BACKPROP not in contest.turns:
            found.append(missing(name, BACKPROP_TARGET, "this work was left out"))
            continue
        apart = differences[key]
        row = faster(
            name,
            contest.turns[BACKPROP],
            contest.turns[CENTRALISED],
            BACKPROP_TARGET,
            configuration={side: contest.configurations[side] for side in (BACKPROP, CENTRALISED)}
            | {"steps": CHECKED_STEPS, **apart, **eager(contest, BACKPROP, CENTRALISED)},
            profile=profile(contest, BACKPROP, CENTRALISED),
        )
        equal = apart["difference"] <= EQUAL < apart["moved"]
        found.append(row if equal else _unequal(row, apart))
    return [*found, worst("backprop, both of them", found, BACKPROP_TARGET)]


def _unequal(row: Row, apart: Mapping[str, float]) -> Row:
    reason = (
        f"weights differ by {apart['difference']:.1e} from torch's SGD in float64 after "
        f"{CHECKED_STEPS} steps (they moved by {apart['moved']:.1e})"
    )
    return Row(row.name, None, row.target, row.medians, row.configuration, reason)


def equality(differences: Mapping[tuple[int, int], Mapping[str, float]]) -> str:
    parts = [
        f"{_label(key)}: {apart['difference']:.1e} (weights moved by {apart['moved']:.1e})"
        for key, apart in differences.items()
    ]
    return (
        f"Largest difference of a weight from torch.optim.SGD, float64, {CHECKED_STEPS} steps: "
        + "; ".join(parts)
    )


def memory_row(work: str, footprints: Sequence[Footprint]) -> Row:
    """The worst actor's."""
    ratio = max(found.ratio for found in footprints)
    said = "; ".join(found.sentence() for found in footprints)
    return Row(
        "memory of a block in trace over its base, against weights + costates + trace",
        ratio,
        MEMORY_TARGET,
        configuration={"work": work, "actors": [found.sentence() for found in footprints]},
        profile=said,
    )
