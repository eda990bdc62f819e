"""From runs to the rows of a comparison: means over seeds, gaps paired by seed.

A spread is the sample standard deviation over seeds (n - 1); None where there are fewer than two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.runtime.signals.codec import Compressed
from hamdist.study.report.paired_test import PairedTest, paired_test
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.run import Run

GOAL = 0.95  # of the baseline's accuracy
KIB = 2**10
EDGES_SHOWN = 6

Compression = Mapping[str, Mapping[str, Compressed]]


@dataclass(frozen=True, slots=True)
class AggregateRow:
    """One line of the comparison: a level, or the baseline ('centralised').

    seeds: how many runs it summarises. Accuracies are shares in [0, 1], None for real-valued
    targets. gap_to_backprop: the level's held-out accuracy minus the centralised one; loss_gap: the
    same of the losses; gap_test, loss_gap_test: of both. wall_seconds: first to last tick,
    startup_seconds what came before. rows_per_second counts rows: samples times batch.
    peak_memory_bytes: of the largest process; all processes in peak_memory_by_process; each the
    largest over the seeds. bytes_per_edge: payload bytes per edge and sample, both directions, mean
    over the edges between blocks (inputs and targets on their way in are not counted) and over
    seeds. staleness: in samples, the largest over the seeds. goal: a prequential accuracy that the
    baseline reached (GOAL of that in its last window, in whole per cent); rows_to_goal,
    seconds_to_goal: at the end of the first window that reached it, means over the seeds; None
    where a run did not reach it. cpu_seconds, joules: of a run (`Run`), means over the seeds; None
    where nothing counts them.
    """

    level: str
    engine: str
    seeds: int
    held_out_accuracy: float | None
    held_out_spread: float | None
    prequential_accuracy: float | None
    gap_to_backprop: float | None
    gap_spread: float | None
    wall_seconds: float
    rows_per_second: float
    peak_memory_bytes: int
    bytes_per_edge: float
    staleness: int
    held_out_loss: float | None
    held_out_loss_spread: float | None
    prequential_loss: float | None
    loss_gap: float | None
    loss_gap_spread: float | None
    startup_seconds: float
    peak_memory_by_process: dict[str, int]
    notes: tuple[str, ...]
    gap_test: PairedTest | None = None
    loss_gap_test: PairedTest | None = None
    goal: float | None = None
    rows_to_goal: float | None = None
    seconds_to_goal: float | None = None
    cpu_seconds: float | None = None
    joules: float | None = None


def aggregate(runs: Iterable[Run]) -> list[AggregateRow]:
    """Return a row per level, in the order in which the levels first appear.

    Interrupted runs are left out. A gap is taken over the seeds for which both runs finished.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.held_out is not None or not run.interrupted:
            groups.setdefault(run.level, []).append(run)
    baseline = groups.get(CENTRALISED, [])
    goal = _goal(baseline)
    return [_row(group, baseline, goal) for group in groups.values()]


def _row(group: Sequence[Run], baseline: Sequence[Run], goal: float | None) -> AggregateRow:
    rows_to_goal, seconds_to_goal = until(goal, map(_curve, group))
    accuracies = _present(accuracy_of(run) for run in group)
    losses = _present(loss_of(run) for run in group)
    gaps = paired(group, baseline, accuracy_of)
    loss_gaps = paired(group, baseline, loss_of)
    memory = _peak_memory(group)
    totals = [merge_windows(run.windows) for run in group if run.windows]
    return AggregateRow(
        level=group[0].level,
        engine=group[0].engine,
        seeds=len(group),
        held_out_accuracy=mean_of(accuracies),
        held_out_spread=spread_of(accuracies),
        prequential_accuracy=mean_of(_present(total.accuracy for total in totals)),
        gap_to_backprop=mean_of(gaps),
        gap_spread=spread_of(gaps),
        wall_seconds=statistics.fmean(run.seconds for run in group),
        rows_per_second=statistics.fmean(run.rows_per_second for run in group),
        peak_memory_bytes=max(memory.values(), default=0),
        bytes_per_edge=statistics.fmean(_bytes_per_edge(run) for run in group),
        staleness=max(run.staleness for run in group),
        held_out_loss=mean_of(losses),
        held_out_loss_spread=spread_of(losses),
        prequential_loss=mean_of([total.mean_loss for total in totals]),
        loss_gap=mean_of(loss_gaps),
        loss_gap_spread=spread_of(loss_gaps),
        startup_seconds=statistics.fmean(run.startup_seconds for run in group),
        peak_memory_by_process=memory,
        notes=tuple(_notes(group, baseline)),
        gap_test=paired_test(gaps),
        loss_gap_test=paired_test(loss_gaps),
        goal=goal,
        rows_to_goal=rows_to_goal,
        seconds_to_goal=seconds_to_goal,
        cpu_seconds=mean_of(_present(run.cpu_seconds for run in group)),
        joules=mean_of(_present(run.joules for run in group)),
    )


def _goal(baseline: Sequence[Run]) -> float | None:
    """Return the accuracy until which rows and seconds are counted; None without class targets."""
    last = mean_of(_present(run.windows[-1].accuracy for run in baseline if run.windows))
    return None if last is None else math.floor(100 * GOAL * last) / 100


def until(
    goal: float | None, curves: Iterable[Iterable[Sequence[Any]]]
) -> tuple[float | None, float | None]:
    """Return the rows and seconds until the runs reached `goal`, means over them; None where one
    did not.

    Args:
        goal: an accuracy; None: nothing reaches it.
        curves: of each run (rows so far, seconds, accuracy, ...).
    """
    reached = []
    for curve in curves:
        for rows, seconds, accuracy, *_ in curve:
            if None not in (goal, accuracy) and accuracy >= goal:
                reached.append((rows, seconds))
                break
        else:
            return None, None
    return mean_of([p[0] for p in reached]), mean_of([p[1] for p in reached])


def _curve(run: Run) -> Iterator[tuple[float, float, float | None]]:
    for window, seconds in zip(run.windows, run.window_seconds, strict=True):
        yield (window.last + 1) * run.batch, seconds, window.accuracy


def accuracy_of(run: Run) -> float | None:
    """Return the held-out accuracy; None without one, NaN of a run that left the finite range."""
    if run.held_out is None:
        return math.nan if run.failure is not None and any(w.rows for w in run.windows) else None
    if run.held_out.accuracy is None:
        return None
    return run.held_out.accuracy if math.isfinite(run.held_out.loss) else math.nan


def loss_of(run: Run) -> float | None:
    """Return the held-out loss; None without one, NaN of a run that left the finite range."""
    if run.held_out is None:
        return None if run.failure is None else math.nan
    return run.held_out.loss


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; NaN where a value is not finite, None without values."""
    if not values:
        return None
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def spread_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def paired(
    minuend: Iterable[Any], subtrahend: Iterable[Any], value: Callable[[Any], float | None]
) -> list[float]:
    """Return the differences of `value`, for each seed of which both have one."""
    others = {run.seed: value(run) for run in subtrahend}
    pairs = [(value(run), others.get(run.seed)) for run in minuend]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _bytes_per_edge(run: Run) -> float:
    between = [
        size
        for edge, size in run.bytes_per_edge.items()
        if not edge.startswith((f"{INPUT}->", f"{INPUT}.", f"{INPUT}=>"))
    ]
    return statistics.fmean(between) / run.samples if between and run.samples else 0.0


def _peak_memory(group: Sequence[Run]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for run in group:
        for process, peak in run.peak_memory.items():
            peaks[process] = max(peak, peaks.get(process, 0))
    return peaks


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _notes(group: Sequence[Run], baseline: Sequence[Run]) -> list[str]:
    """Return the runs' warnings, each once, and remarks on the numbers."""
    notes = list(dict.fromkeys(text for run in group for text in [*run.why, *run.warnings]))
    notes += compression_notes([run.compression for run in group])
    notes += outputs_notes(group)
    lost = [(run.seed, loss_of(run)) for run in group]
    diverged = [str(seed) for seed, loss in lost if loss is not None and not math.isfinite(loss)]
    if diverged:
        notes.append(
            f"diverged (held-out loss is not finite) with seed {', '.join(diverged)}; "
            "lower learning.lr"
        )
    seconds = {run.seed: run.seconds for run in baseline}
    ended = [run for run in group if run.seed in seconds and run.failure is None]
    both = [(run.seconds, seconds[run.seed]) for run in ended]
    level, central = sum(a for a, _ in both), sum(b for _, b in both)
    if group[0].level != CENTRALISED and 0 < central < level:
        notes.append(
            f"centralised training was {level / central:.1f} times as fast "
            f"({_seconds(central / len(both))} s against {_seconds(level / len(both))} s a run)"
        )
    return notes


# -- compression, and scores output by output, in words --------------------------------------------


def compression_fact(compression: Compression) -> str:
    """Return a line for every edge; of many edges their sum, and the largest error."""
    if not compression:
        return ""
    if len(compression) <= EDGES_SHOWN:
        lines = (f"{e} {_compression_words([*ways.values()])}" for e, ways in compression.items())
        return "\n".join(lines)
    worst = max(compression, key=lambda e: max(c.worst for c in compression[e].values()))
    return f"{_compression_words(_all(compression))} ({worst})"


def compression_notes(of_runs: Sequence[Compression]) -> list[str]:
    """Return all edges of several runs in one sentence; none if nothing was compressed."""
    parts = [c for compression in of_runs for c in _all(compression)]
    return [f"signals compressed: {_compression_words(parts)}"] if parts else []


def _all(compression: Compression) -> list[Compressed]:
    return [c for ways in compression.values() for c in ways.values()]


def _compression_words(parts: Sequence[Compressed]) -> str:
    """Return 'int8: 1,275 KiB, 73 % saved; decoded signals off by 0.56 %, at most 1.2 %'."""
    sent, saved = sum(c.sent for c in parts), sum(c.saved for c in parts)
    names = ", ".join(dict.fromkeys(c.codec for c in parts))
    signals = sum(c.signals for c in parts)
    mean = sum(c.mean * c.signals for c in parts) / signals if signals else 0.0
    worst = max(c.worst for c in parts)
    share = saved / (sent + saved) if sent + saved else 0.0
    return (
        f"{names}: {sent / KIB:,.0f} KiB, {100 * share:.0f} % saved; decoded signals off by "
        f"{100 * mean:.2g} %, at most {100 * worst:.2g} %"
    )


def outputs_fact(run: Run) -> str:
    """Return a line for every output; empty for a model with one."""
    if len(run.prequential) < 2:
        return ""
    lines = []
    for name, whole in run.prequential.items():
        line = f"{name}: prequential {_score_words(whole.mean_loss, whole.accuracy)}"
        if run.held_out is not None and name in run.held_out.outputs:
            scores = run.held_out.outputs[name]
            line += f", held-out {_score_words(scores.loss, scores.accuracy)}"
        lines.append(line)
    return "\n".join(lines)


def outputs_notes(group: Sequence[Run]) -> list[str]:
    """Return the held-out scores of every output, as means over the runs."""
    scored = [run.held_out for run in group if run.held_out is not None and run.held_out.outputs]
    if not scored or any(run.failure for run in group):
        return []
    parts = []
    for name in scored[0].outputs:
        of_output = [scores.outputs[name] for scores in scored]
        right = [score.accuracy for score in of_output if score.accuracy is not None]
        loss = statistics.fmean(score.loss for score in of_output)
        parts.append(f"{name} {_score_words(loss, statistics.fmean(right) if right else None)}")
    return [f"held-out by output: {'; '.join(parts)} (the table has {scored[0].main!r})"]


def _score_words(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4g}" + ("" if accuracy is None else f" ({100 * accuracy:.1f} %)")
