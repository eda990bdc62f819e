"""From a study's outcomes to numbers by cell: means over seeds, spreads, gaps paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hamdist.study.grid.points import Point
from hamdist.study.grid.run import RunRecord, StudyOutcome
from hamdist.study.grid.settings import Trains
from hamdist.study.report.aggregate import mean_of, paired, spread_of, until
from hamdist.study.report.blocks import BlockFacts
from hamdist.study.report.paired_test import PairedTest, paired_test
from hamdist.study.run.measures import DriftRecovery, drift_fact


@dataclass(frozen=True, slots=True)
class SummaryLine:
    """The summary of one cell.

    Means over seeds are None where a run left the finite range.

    Attributes:
        accuracy: held out, over the seeds, as a share; loss if the targets are real values.
        spread: standard deviation over seeds.
        gap: accuracy minus that of the centralised side at the same point, by seed (below 0: behind
            it); of losses its own minus the centralised one (above 0: behind it).
        gap_test: how sure the gap is.
        seconds: of a run.
        chosen: result of the tuning; tuned: its validation accuracy.
        rows_to_goal, seconds_to_goal: until a point of the curve is at the study's goal, means over
            the seeds; None where a run never is.
        cpu_seconds, joules: of a run, means over the seeds; None where nothing counts them.
        blocks: by seed and block the measurements of a level's blocks.
        diverged: every run left the finite range, in its tuning or of the final ones.
    """

    side: str
    trains: Trains
    memoryless: bool
    point: Point
    seeds: int
    accuracy: float | None
    spread: float | None
    loss: float | None
    loss_spread: float | None
    gap: float | None
    gap_spread: float | None
    prequential: float | None
    seconds: float | None
    chosen: dict[str, Any]
    tuned: float | None
    notes: tuple[str, ...] = field(default_factory=tuple)
    gap_test: PairedTest | None = None
    rows_to_goal: float | None = None
    seconds_to_goal: float | None = None
    cpu_seconds: float | None = None
    joules: float | None = None
    blocks: tuple[dict[str, BlockFacts], ...] = ()
    diverged: bool = False


def summary(outcomes: Sequence[StudyOutcome], goal: float | None = None) -> list[SummaryLine]:
    """Return one line per outcome, in their order. goal: a prequential accuracy, as a share."""
    baselines = {o.cell.point: o for o in reversed(outcomes) if o.cell.trains is Trains.CENTRALISED}
    return [_line(outcome, baselines[outcome.cell.point], goal) for outcome in outcomes]


def _line(outcome: StudyOutcome, baseline: StudyOutcome, goal: float | None) -> SummaryLine:
    cell, records = outcome.cell, outcome.records
    losses = [math.nan if r.loss is None else r.loss for r in records]
    gaps = _gaps(records, baseline.records)
    rows_to_goal, seconds_to_goal = until(goal, (r.curve for r in records))
    return SummaryLine(
        side=cell.name,
        trains=cell.trains,
        memoryless=cell.memoryless,
        point=cell.point,
        seeds=len(records),
        accuracy=_of_all(mean_of, [r.accuracy for r in records]),
        spread=_of_all(spread_of, [r.accuracy for r in records]),
        loss=mean_of(losses),
        loss_spread=spread_of(losses),
        gap=mean_of(gaps),
        gap_spread=spread_of(gaps),
        prequential=_of_all(mean_of, [r.prequential for r in records]),
        seconds=_of_all(mean_of, [r.seconds if r.failure is None else None for r in records]),
        chosen=dict(outcome.choice.chosen),
        tuned=outcome.choice.score,
        notes=tuple(_notes(outcome)),
        gap_test=paired_test(gaps),
        rows_to_goal=rows_to_goal,
        seconds_to_goal=seconds_to_goal,
        cpu_seconds=_of_all(mean_of, [r.cpu_seconds for r in records]),
        joules=_of_all(mean_of, [r.joules for r in records]),
        blocks=tuple({n: BlockFacts(**f) for n, f in r.blocks.items()} for r in records),
        diverged=all(r.failure is not None for r in records),
    )


def _of_all(
    number: Callable[[Sequence[float]], float | None], values: Sequence[float | None]
) -> float | None:
    """Return a number of the values; None where one is missing."""
    finished = [value for value in values if value is not None]
    return number(finished) if len(finished) == len(values) else None


def _gaps(records: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> list[float]:
    """Return the gaps by seed; none unless both have finished with every seed of `records`."""
    accuracies = paired(records, baseline, lambda r: r.accuracy)
    gaps = accuracies or paired(records, baseline, lambda r: r.loss if r.failure is None else None)
    return gaps if len(gaps) == len(records) else []


def _notes(outcome: StudyOutcome) -> list[str]:
    label = outcome.cell.label
    failed = [f"seed {r.seed}: {r.failure}" for r in outcome.records if r.failure is not None]
    notes = [f"{label}: {text}" for text in failed]
    if outcome.choice.diverged:
        text = "every candidate of 'tune' left the finite range; give lower step sizes"
        notes.append(f"{label}: {text}")
    drifts = drift_fact([DriftRecovery(*drift) for r in outcome.records for drift in r.drifts])
    notes += [f"{label}: of the drifts of all seeds {drifts}"] if drifts else []
    notes += [
        f"{label}: {name} = {outcome.choice.chosen[name]} is the lowest or highest value that was "
        "tried: a wider range might be better"
        for name in outcome.choice.edge
    ]
    return notes
