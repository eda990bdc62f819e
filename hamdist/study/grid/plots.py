"""The figures of a study: the held-out score against each axis with several values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.study.grid.points import GridCell
from hamdist.study.grid.run import StudyOutcome
from hamdist.study.grid.settings import Axis, StudySettings, Trains
from hamdist.study.grid.summary import SummaryLine, summary
from hamdist.study.grid.tables import TITLES, WORDS, varied

LOGARITHMIC = (Axis.BATCH, Axis.SMOOTHNESS)


def study_figures(study: StudySettings, outcomes: Sequence[StudyOutcome]) -> list[PageFigure]:
    """Return a figure for each axis with several values: accuracy, or loss if there is none."""
    lines = summary(outcomes)
    real_valued = all(line.accuracy is None for line in lines)
    return [_along(study, axis, lines, real_valued) for axis in varied(study)]


def curve_name(study: StudySettings, axis: Axis | None, line: SummaryLine | GridCell) -> str:
    """Return a curve's label: the side, and its place on the other axes."""
    others = [a for a in varied(study) if a is not axis]
    at = dict(line.point)
    return ", ".join([_side(line), *(f"{WORDS[a]} {at[a]}" for a in others)])


def _side(line: SummaryLine | GridCell) -> str:
    return line.side if isinstance(line, SummaryLine) else line.name


def _styles(
    curves: Mapping[str, SummaryLine | GridCell],
) -> dict[str, tuple[int, int] | None]:
    """Return the style by label. Baselines have none; of the others each side has a colour, and
    its curves differ in their dashes."""
    sides: dict[str, list[str]] = {}
    for name, one in curves.items():
        if one.trains is not Trains.CENTRALISED:
            sides.setdefault(_side(one), []).append(name)
    styles: dict[str, tuple[int, int] | None] = dict.fromkeys(curves)
    for i, names in enumerate(sides.values()):
        styles |= {name: (i, i + k) for k, name in enumerate(names)}
    return styles


def _along(
    study: StudySettings, axis: Axis, lines: Sequence[SummaryLine], real_valued: bool
) -> PageFigure:
    curves: dict[str, list[SummaryLine]] = {}
    for line in lines:
        curves.setdefault(curve_name(study, axis, line), []).append(line)
    styles = _styles({name: of_curve[0] for name, of_curve in curves.items()})
    values = list(study.axes.of(axis))
    numbers = [float(v) for v in values if isinstance(v, int)]
    named = len(numbers) < len(values)
    places = [float(i) for i in range(len(values))] if named else numbers
    drawn = []
    for name, of_curve in curves.items():
        shown = [
            (line.loss, line.loss_spread) if real_valued else _percent(line) for line in of_curve
        ]
        y, spread = zip(*shown, strict=True)
        drawn.append(FigureCurve(name, places, y, spread, styles[name], points=True))
    x_label = TITLES[axis].removeprefix("against ").removeprefix("the ")
    y_label = "held-out loss" if real_valued else "held-out accuracy, %"
    title = f"{y_label.removesuffix(', %').capitalize()} against {x_label}"
    ticks = [str(value) for value in values] if named else []
    return PageFigure(title, x_label, y_label, drawn, log_x=axis in LOGARITHMIC, ticks=ticks)


def _percent(line: SummaryLine) -> tuple[float | None, float | None]:
    if line.accuracy is None:
        return None, None
    return 100 * line.accuracy, None if line.spread is None else 100 * line.spread
