"""The plots of a study: accuracy against each axis with several values, and against seconds.

Colours and dashes as in the plots of a comparison; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hamdist.study.report.plots import (
    BASELINE_COLOUR,
    BASELINE_WIDTH,
    COLOURS,
    CURVE_WIDTH,
    DASHES,
    Dashes,
    legend,
    new_figure,
    pictures,
)
from hamdist.study.sweep.points import SweepCell
from hamdist.study.sweep.run import StudyOutcome
from hamdist.study.sweep.settings import Axis, StudySettings, Trains
from hamdist.study.sweep.summary import SummaryLine, summary
from hamdist.study.sweep.tables import TITLES, WORDS, varied

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_COLUMNS = 3  # labels say more than a level's name
LOGARITHMIC = (Axis.BATCH, Axis.SMOOTHNESS)


def study_plots(study: StudySettings, outcomes: Sequence[StudyOutcome]) -> dict[str, bytes]:
    """Return PNG and SVG by file name.

    They are `accuracy-AXIS` for each axis with several values (loss if there is no accuracy),
    and `accuracy-seconds`, prequential.
    """
    lines = summary(outcomes)
    real_valued = all(line.accuracy is None for line in lines)
    word = "loss" if real_valued else "accuracy"
    plots = {
        f"{word}-{axis.value}": _along(study, axis, lines, real_valued) for axis in varied(study)
    }
    plots[f"{word}-seconds"] = _against_seconds(study, outcomes, real_valued)
    return pictures(plots)


def _names(study: StudySettings, axis: Axis | None, line: SummaryLine | SweepCell) -> str:
    """Return a curve's label: the side, and its place on the other axes."""
    others = [a for a in varied(study) if a is not axis]
    at = dict(line.point)
    return ", ".join([_side(line), *(f"{WORDS[a]} {at[a]}" for a in others)])


def _side(line: SummaryLine | SweepCell) -> str:
    return line.side if isinstance(line, SummaryLine) else line.name


def _styles(curves: Mapping[str, SummaryLine | SweepCell]) -> dict[str, tuple[str, Dashes, float]]:
    """Return colour, dashes and width by label. Baselines are broad and grey; of the others each
    side has a colour, and its curves differ in their dashes."""
    baselines = [name for name, one in curves.items() if one.trains is Trains.CENTRALISED]
    sides: dict[str, list[str]] = {}
    for name, one in curves.items():
        if name not in baselines:
            sides.setdefault(_side(one), []).append(name)
    solid: tuple[Dashes, ...] = ("-", *DASHES)
    styles: dict[str, tuple[str, Dashes, float]] = {
        name: (BASELINE_COLOUR, solid[i % len(solid)], BASELINE_WIDTH)
        for i, name in enumerate(baselines)
    }
    for i, own in enumerate(sides.values()):
        for k, name in enumerate(own):
            dashes = DASHES[(i + k) % len(DASHES)]
            styles[name] = COLOURS[i % len(COLOURS)], dashes, CURVE_WIDTH
    return styles


def _along(
    study: StudySettings, axis: Axis, lines: Sequence[SummaryLine], real_valued: bool
) -> Figure:
    figure, axes = new_figure()
    curves: dict[str, list[SummaryLine]] = {}
    for line in lines:
        curves.setdefault(_names(study, axis, line), []).append(line)
    styles = _styles({name: own[0] for name, own in curves.items()})
    values = list(study.axes.of(axis))
    numbers = [v for v in values if isinstance(v, int)]
    places = values if len(numbers) == len(values) else list(range(len(values)))
    for name, own in curves.items():
        colour, dashes, width = styles[name]
        shown = [(line.loss, line.loss_spread) if real_valued else _percent(line) for line in own]
        points = [
            (place, y, spread or 0.0)
            for place, (y, spread) in zip(places, shown, strict=True)
            if y is not None
        ]
        if not points:
            continue
        axes.errorbar(
            [point[0] for point in points],
            [point[1] for point in points],
            yerr=[point[2] for point in points],
            label=name,
            color=colour,
            linestyle=dashes,
            linewidth=width,
            marker="o",
            markersize=4,
            capsize=3,
            elinewidth=1.0,
        )
    if axis in LOGARITHMIC:
        axes.set_xscale("log")
    axes.set_xticks(places, [str(value) for value in values], minor=False)
    axes.minorticks_off()
    axes.set_xlabel(TITLES[axis].removeprefix("against ").removeprefix("the "))
    axes.set_ylabel("held-out loss" if real_valued else "held-out accuracy, %")
    legend(figure, axes, columns=LEGEND_COLUMNS)
    return figure


def _percent(line: SummaryLine) -> tuple[float | None, float | None]:
    if line.accuracy is None:
        return None, None
    return 100 * line.accuracy, None if line.spread is None else 100 * line.spread


def _against_seconds(
    study: StudySettings, outcomes: Sequence[StudyOutcome], real_valued: bool
) -> Figure:
    """Draw the first seed's prequential windows."""
    figure, axes = new_figure()
    labels = [_names(study, None, o.cell) for o in outcomes]
    styles = _styles({n: o.cell for n, o in zip(labels, outcomes, strict=True)})
    for label, outcome in zip(labels, outcomes, strict=True):
        curve = outcome.records[0].curve
        column, factor = (3, 1.0) if real_valued else (2, 100.0)
        points = [
            (x, factor * y)
            for row in curve
            if (x := row[1]) is not None and (y := row[column]) is not None
        ]
        if not points:
            continue
        colour, dashes, width = styles[label]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=label,
            color=colour,
            linestyle=dashes,
            linewidth=width,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds, one thread")
    axes.set_ylabel("loss in a window" if real_valued else "prequential accuracy in a window, %")
    legend(figure, axes, columns=LEGEND_COLUMNS)
    return figure
