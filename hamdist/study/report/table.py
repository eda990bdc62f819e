"""A comparison as a table of texts, for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from hamdist.display.table import MISSING, Table, number, percent
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.runtime.process.startup import startup_line
from hamdist.study.report.aggregate import AggregateRow, compression_fact, outputs_fact
from hamdist.study.report.paired_test import PairedTest, in_words
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.measures import SETTLING, Tracking, drift_fact
from hamdist.study.run.run import Run

MIB = 2**20
KIB = 2**10
PROCESSES_SHOWN = 6
EDGES_SHOWN = 12
STARTUP_WORTH_SAYING = 1.0
_COUNTS = {  # what streams count
    "dropped": "{:,} dropped while the network was busy",
    "waiting_most": "at most {:,} waiting for the network",
    "awaiting_most": "at most {:,} waiting for their targets",
    "let_go": "{:,} let go without a target",
    "too_late": "{:,} targets too late",
}


def comparison_table(rows: Sequence[AggregateRow]) -> Table:
    """Return accuracies in %, gaps in points, spreads behind a ±; or else losses."""
    real_valued = all(row.held_out_accuracy is None for row in rows)
    columns = _score_columns(real_valued) | COSTS
    if all(row.gap_test is None and row.loss_gap_test is None for row in rows):
        del columns["95 %"]
    notes = [f"{row.level}: {note}" for row in rows for note in row.notes]
    for row in rows:
        test = row.loss_gap_test if real_valued else row.gap_test
        if test is not None and row.level != CENTRALISED:
            notes.append(f"{row.level}: {in_words(test, row.seeds)}")
    notes += _until_goal(rows) + _effort(rows)
    slow = [row for row in rows if row.startup_seconds >= STARTUP_WORTH_SAYING]
    if slow:
        starts = ", ".join(f"{row.level} {row.startup_seconds:.1f} s" for row in slow)
        notes.append(f"wall and rows/s do not count start-up: {starts}")
    if any(row.seeds == 1 for row in rows):
        notes.append("one seed: no spread, so small differences mean nothing (--seeds 3 or more)")
    return Table(
        titles=list(columns),
        rows=[[cell(row) for cell in columns.values()] for row in rows],
        notes=notes,
    )


def _until_goal(rows: Sequence[AggregateRow]) -> list[str]:
    """Return how soon each level predicted as well as the goal says, as one note."""
    goal = next((row.goal for row in rows), None)
    if not goal:
        return []
    soon = [
        f"{row.level} not at all"
        if row.rows_to_goal is None or row.seconds_to_goal is None
        else f"{row.level} {row.rows_to_goal:,.0f} ({row.seconds_to_goal:.2g} s)"
        for row in rows
    ]
    return [f"rows (and seconds) to a window of {percent(goal, digits=0)} %: {', '.join(soon)}"]


def _effort(rows: Sequence[AggregateRow]) -> list[str]:
    """Return the processors' seconds of a run by level, and the joules where they are counted."""
    spent = [
        f"{row.level} {row.cpu_seconds:.3g}"
        + ("" if row.joules is None else f" ({row.joules:.3g} J of the whole machine)")
        for row in rows
        if row.cpu_seconds is not None
    ]
    return [f"CPU seconds a run, all threads: {', '.join(spent)}"] if spent else []


def _score_columns(real_valued: bool) -> dict[str, Callable[[AggregateRow], str]]:
    columns: dict[str, Callable[[AggregateRow], str]] = {
        "level": lambda row: row.level,
        "engine": lambda row: row.engine,
        "seeds": lambda row: str(row.seeds),
    }
    if real_valued:
        return columns | {
            "held-out loss": lambda row: number(row.held_out_loss, row.held_out_loss_spread),
            "prequential loss": lambda row: number(row.prequential_loss),
            "loss gap": lambda row: number(row.loss_gap, row.loss_gap_spread),
            "95 %": lambda row: interval(row.loss_gap_test if row.level != CENTRALISED else None),
        }
    return columns | {
        "held-out, %": lambda row: percent(row.held_out_accuracy, row.held_out_spread),
        "prequential, %": lambda row: percent(row.prequential_accuracy),
        "gap, points": lambda row: points(row.gap_to_backprop, row.gap_spread),
        "95 %": lambda row: interval(row.gap_test if row.level != CENTRALISED else None, 100),
    }


COSTS: dict[str, Callable[[AggregateRow], str]] = {
    "wall, s": lambda row: f"{row.wall_seconds:.1f}",
    "rows/s": lambda row: f"{row.rows_per_second:,.0f}",
    "KiB per edge, sample": lambda row: f"{row.bytes_per_edge / KIB:.1f}",
    "peak, MiB": lambda row: processes(row.peak_memory_by_process),
    "staleness": lambda row: str(row.staleness),
}


def run_title(run: Run, name: str) -> str:
    """Return the title above a run's facts; `name` is that of its settings."""
    return f"{name}: {run.level} on {run.engine}, seed {run.seed}"


def run_facts(run: Run) -> dict[str, str]:
    """Return the results of a single run, by name."""
    facts = {
        "samples": f"{run.samples:,} of {run.batch:.4g} rows, {run.ticks:,} ticks",
        "gone on from": f"sample {run.resumed:,}" if run.resumed else "",
        "chosen": "; ".join(run.why),
        "time": f"{run.seconds:.1f} s",
        "start-up": startup_line(run.startup_seconds, run.startup),
        "speed": f"{run.rows_per_second:,.0f} rows/s",
        "samples/s": _predicted(run),
        **_scores(run),
        "drifts": drift_fact(run.drifts),
        "staleness": f"{run.staleness} samples",
        "delays, ticks": ", ".join(f"{edge} {n}" for edge, n in run.delays.items() if n != 1),
        "stream": ", ".join(_counts(run.stream)),
        "tokens stored at once": ", ".join(f"{name} {n}" for name, n in run.stored.items()),
        "peak memory, MiB": ", ".join(processes(run.peak_memory).splitlines()),
    }
    if run.samples:
        facts["KiB per edge and sample"] = _edges(run)
    if run.replaced:
        seconds = max(r.seconds for r in run.replaced)
        facts["replaced"] = f"{len(run.replaced)} actors, in at most {seconds:.1f} s"
    facts["latest snapshot"] = run.snapshots[-1] if run.snapshots else ""
    facts["compression"] = compression_fact(run.compression)
    facts["autocast bf16"] = ", ".join(
        f"{name} off by {100 * r.mean:.2g} % (at most {100 * r.worst:.2g} %)"
        for name, r in run.rounding.items()
    )
    return {name: fact for name, fact in facts.items() if fact}


def _predicted(run: Run) -> str:
    """Return the samples a second by the timing model beside those of the run."""
    if not run.predicted or not run.seconds:
        return ""
    return f"predicted {run.predicted:,.0f}, measured {run.new_samples / run.seconds:,.0f}"


def _counts(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield the counts of a stream without zeros, except that nothing was dropped."""
    for name, count in counts.items():
        if count or name == "dropped":
            yield _COUNTS.get(name, f"{name} {{:,}}").format(count)


def _edges(run: Run) -> str:
    """Return the KiB per sample of each edge; of many edges their sum, and the busiest one."""
    sizes = {edge: size / run.samples / KIB for edge, size in run.bytes_per_edge.items()}
    if len(sizes) <= EDGES_SHOWN:
        return ", ".join(f"{edge} {size:.1f}" for edge, size in sizes.items())
    busiest = max(sizes, key=sizes.__getitem__)
    total = sum(sizes.values())
    return f"{total:.1f} on {len(sizes)} edges, at most {sizes[busiest]:.1f} ({busiest})"


def _scores(run: Run) -> dict[str, str]:
    scores = {}
    if run.windows:
        last, whole = run.windows[-1], merge_windows(run.windows)
        scores["prequential loss"] = (
            f"{number(whole.mean_loss)} (last window {number(last.mean_loss)})"
        )
        if whole.accuracy is not None:
            scores["prequential accuracy"] = (
                f"{percent(whole.accuracy)} % (last window {percent(last.accuracy)} %)"
            )
    if run.tracking is not None:
        scores |= _tracking(run.tracking)
    if run.held_out is not None:
        scores["held-out loss"] = number(run.held_out.loss)
        if run.held_out.accuracy is not None:
            scores["held-out accuracy"] = f"{percent(run.held_out.accuracy)} %"
            if run.held_out_plain is not None:
                plain = percent(run.held_out_plain.accuracy)
                scores["held-out accuracy"] += f" (averaged weights; the last ones {plain} %)"
    scores["outputs"] = outputs_fact(run)
    return scores


def _tracking(tracking: Tracking) -> dict[str, str]:
    parts = f"first tenth {percent(tracking.first)} %, last tenth {percent(tracking.last)} %"
    facts = {"error, rms": f"{percent(tracking.share)} % of the target's rms ({parts})"}
    if tracking.settled is not None:
        times = "jump" if tracking.jumps == 1 else "jumps"
        facts["outside jumps"] = (
            f"{percent(tracking.settled)} % (without {SETTLING:g} s after the start and after "
            f"{tracking.jumps} {times} of the target)"
        )
    return facts


def finished_line(run: Run) -> str:
    """Return a finished run on one line."""
    head = f"seed {run.seed}, {run.level}: {run.seconds:.1f} s, {run.rows_per_second:,.0f} rows/s"
    if run.held_out is None:
        if run.failure is not None:
            return f"{head}, {run.failure}"
        return f"{head}, interrupted after {run.samples} samples" if run.interrupted else head
    if run.held_out.accuracy is None or not math.isfinite(run.held_out.loss):
        return f"{head}, held-out loss {number(run.held_out.loss)}"
    return f"{head}, held-out {percent(run.held_out.accuracy)} %"


def points(gap: float | None, spread: float | None = None) -> str:
    """Return a difference of shares in points, with its sign: 0.0012 as '+0.12'."""
    shown = percent(gap, spread, digits=2)
    return f"+{shown}" if gap is not None and gap >= 5e-5 else shown


def interval(test: PairedTest | None, unit: float = 1.0) -> str:
    """Return the ends of a 95 % interval, times `unit` (100: in points)."""
    if test is None:
        return MISSING
    return " to ".join(
        f"{unit * end:+.{2 if unit > 1 else 4}{'f' if unit > 1 else 'g'}}"
        for end in (test.low, test.high)
    )


def processes(peaks: Mapping[str, int]) -> str:
    """Return a line per process; beyond a few, the driver and the largest of the others."""
    if not peaks:
        return MISSING
    sizes = {name: f"{size / MIB:,.0f}" for name, size in peaks.items()}
    if len(peaks) <= PROCESSES_SHOWN:
        return "\n".join(f"{name} {size}" for name, size in sizes.items())
    first, *others = peaks
    largest = max(others, key=peaks.__getitem__)
    return f"{first} {sizes[first]}\n{len(others)} others: at most {sizes[largest]}"
