"""The targets of learning: which study shows each, and the rows from what the studies found: pure.

A gap is the side's accuracy minus centralised backpropagation's, in points, the mean over seeds
paired by seed; an accuracy is in per cent. Each condition of a target is a row of its own. Gaps of
CLOSE points and less are judged by MANY seeds; the 95 % interval says whether they are proved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hamdist.study.grid.settings import StudySettings, Trains, trains_of
from hamdist.study.grid.summary import SummaryLine
from hamdist.study.grid.tables import gap, held_out, values_text
from hamdist.study.report.table import interval
from harness.figures import Row, Target, missing
from harness.output import table

POINTS, PERCENT = "points", "%"
CLOSE, MANY = 0.3, 5


@dataclass(frozen=True)
class Wanted:
    """A target. study: the shipped one that shows it. side: of that study, named before the test
    part was looked at. gap: in points, accuracy: in per cent; both from below. quick: --quick has
    it."""

    name: str
    study: str
    side: str
    gap: float
    accuracy: float | None = None
    quick: bool = True


WANTED = (
    Wanted("Fashion-MNIST, L = 5, batch 32, trace", "fashion-5", "trace", -0.2, 87.4),
    Wanted("same, L = 20", "fashion-20", "trace, whitened", -0.5, 87.5),
    Wanted("batch 1, L = 5, trace, averaged weights", "fashion-1", "trace", -0.2, 86.4),
    Wanted("fading, S = 20, local", "fading-20", "local", -0.3),
    Wanted(
        "fading, S = 10, memory-less without label channel",
        "fading-10",
        "local, retrospective",
        -2.0,
    ),
    Wanted("random order, heads", "fashion-5", "heads", -0.3),
    Wanted("fading, S = 20, heads", "fading-20", "heads", -0.3),
    Wanted("fading, S = 10, heads", "fading-10", "heads", -0.3),
    Wanted("convnet, trace", "convnet", "trace", -0.5, quick=False),
    Wanted("transformer, trace", "transformer", "trace, whitened", -1.5, quick=False),
)
# In the order of the targets: what --full has when it is ended early is the most.
STUDIES = tuple(dict.fromkeys(wanted.study for wanted in WANTED))
QUICK = tuple(dict.fromkeys(wanted.study for wanted in WANTED if wanted.quick))


def quick(name: str, study: StudySettings) -> StudySettings:
    """Of a study the sides that --quick shows: those of its targets, and what they are measured
    by."""
    shown = {wanted.side for wanted in WANTED if wanted.study == name and wanted.quick}
    kept = {
        side: own
        for side, own in study.sides.items()
        if side in shown or trains_of(side, own)[0] is not Trains.LEVEL
    }
    return study.model_copy(update={"sides": kept})


def rows(found: Mapping[str, Sequence[SummaryLine]]) -> list[Row]:
    """One or two rows for each target, in their order. found: lines by study."""
    made = []
    for wanted in WANTED:
        made.append(_gap(wanted, found.get(wanted.study)))
        if wanted.accuracy is not None:
            made.append(_accuracy(wanted, found.get(wanted.study)))
    return made


def _gap(wanted: Wanted, lines: Sequence[SummaryLine] | None) -> Row:
    name, target = f"{wanted.name}: against backpropagation", Target(wanted.gap)
    own = _of_side(wanted, lines)
    if own is None:
        return missing(name, target, _not_run(wanted))
    value = None if own.gap is None else round(100 * own.gap, 6)
    told = _told(wanted, own, lines)
    if own.gap_test is not None:
        told["95 % interval"] = [100 * own.gap_test.low, 100 * own.gap_test.high]
    return Row(name, value, target, {}, told, _profile(own), POINTS)


def _accuracy(wanted: Wanted, lines: Sequence[SummaryLine] | None) -> Row:
    name, target = f"{wanted.name}: accuracy", Target(wanted.accuracy or 0.0)
    own = _of_side(wanted, lines)
    if own is None:
        return missing(name, target, _not_run(wanted))
    value = None if own.accuracy is None else round(100 * own.accuracy, 6)
    return Row(name, value, target, {}, _told(wanted, own, lines), _profile(own), PERCENT)


def _not_run(wanted: Wanted) -> str:
    return f"side {wanted.side!r} of study {wanted.study} has not run"


def _of_side(wanted: Wanted, lines: Sequence[SummaryLine] | None) -> SummaryLine | None:
    """The line of its side."""
    return next((line for line in lines or () if line.side == wanted.side), None)


def _told(
    wanted: Wanted, best: SummaryLine, lines: Sequence[SummaryLine] | None
) -> dict[str, object]:
    """What stands beside a figure in the JSON file."""
    beside = [line for line in lines or () if line.point == best.point]
    return {
        "study": wanted.study,
        "settings": f"hamdist/recipes/studies/{wanted.study}.yaml",
        "side": best.side,
        "chosen": best.chosen,
        "seeds": best.seeds,
        "spread of the gap": best.gap_spread,
        "accuracies": {line.side: line.accuracy for line in beside},
        "spreads": {line.side: line.spread for line in beside},
    }


def _profile(best: SummaryLine) -> str:
    return "; ".join(best.notes) or f"{best.side} with {values_text(best.chosen)}"


def targets(made: Sequence[Row]) -> str:
    """The table of the targets, Markdown."""
    lines = []
    for row in made:
        value = "–" if row.ratio is None else f"{row.ratio:+.2f}"
        if row.unit == PERCENT and row.ratio is not None:
            value = f"{row.ratio:.2f} %"
        verdict = f"**{row.verdict}**" if row.reached is False else row.verdict
        unit = " %" if row.unit == PERCENT else ""
        ends = row.configuration.get("95 % interval")
        between = "" if ends is None else "{:+.2f} to {:+.2f}".format(*ends)
        verdict += _unproved(row, ends)
        lines.append([row.name, value, between, f"{row.target}{unit}", verdict])
    return table(["what", "found", "95 %", "target", ""], lines)


def _unproved(row: Row, ends: Sequence[float] | None) -> str:
    """What a verdict lacks where the interval reaches over the target."""
    if ends is None or row.target is None or not ends[0] < row.target.bound <= ends[1]:
        return ""
    return ", not proved" if row.reached else ", within the noise"


def side_table(lines: Sequence[SummaryLine]) -> str:
    """All sides of a study with one point, Markdown."""
    cells = [
        [
            line.side,
            held_out(line, False),
            gap(line, False),
            interval(None if line.trains is Trains.CENTRALISED else line.gap_test, 100),
            values_text(line.chosen),
        ]
        for line in lines
    ]
    return table(["side", "held-out, %", "gap, points", "95 %", "step"], cells)


def frozen_is_there(lines: Sequence[SummaryLine]) -> bool:
    """Whether the baseline of frozen hidden blocks stands beside every memory-less side."""
    frozen = {line.point for line in lines if line.trains is Trains.FROZEN}
    return all(line.point in frozen for line in lines if line.memoryless)
