"""The plots of a comparison, as PNG and SVG. matplotlib is imported when one is drawn.

Colours are those of Okabe and Ito, told apart by colour-blind readers; every curve also has its own
dashes, and every bar of numbers its own place. Nothing touches matplotlib's global state.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from hamdist.dynamics.objective.prequential import Window, merge_windows
from hamdist.errors import need_package
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dashes: TypeAlias = str | tuple[float, tuple[float, ...]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Dashes, ...] = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
BASELINE_COLOUR = "#a8a8a8"
BASELINE_WIDTH, CURVE_WIDTH = 5.0, 1.9
POINTS = 60
SIZE = (7.0, 4.3)
DPI = 150


@dataclass(frozen=True, slots=True)
class _Curve:
    """The curve of one run: x and y, y in % or as a loss."""

    x: np.ndarray
    y: np.ndarray


def comparison_plots(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return PNG and SVG by file name: accuracy or loss by rows and seconds, gap by level."""
    groups = _by_level(runs)
    real_valued = all(run.held_out.accuracy is None for run in runs if run.held_out is not None)
    return pictures(
        {
            "accuracy-rows": _curves(
                groups, "rows seen (samples × batch)", _rows_seen, real_valued
            ),
            "accuracy-seconds": _curves(groups, "seconds", _seconds, real_valued),
            "gap": _gaps(groups, real_valued),
        }
    )


def _by_level(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.held_out is not None:
            groups.setdefault(run.level, []).append(run)
    return groups


def _style(groups: dict[str, list[Run]], level: str) -> tuple[str, Dashes]:
    """Return colour and dashes of a level."""
    if level == CENTRALISED:
        return BASELINE_COLOUR, "-"
    index = [name for name in groups if name != CENTRALISED].index(level)
    return COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]


def _curves(
    groups: dict[str, list[Run]],
    x_label: str,
    x_of: Callable[[Run, Sequence[Window]], list[float]],
    real_valued: bool,
) -> Figure:
    """Draw prequential windows: each seed thin, their mean on a common grid thick."""
    figure, axes = new_figure()
    for level, group in groups.items():
        curves = [_curve(run, x_of, real_valued) for run in group if run.windows]
        if not curves:
            continue
        colour, dashes = _style(groups, level)
        if len(curves) > 1:
            for curve in curves:
                axes.plot(curve.x, curve.y, color=colour, linewidth=0.7, alpha=0.35)
        mean = _mean_curve(curves)
        # The baseline is a broad grey line below the others, so that equal curves show both.
        width = BASELINE_WIDTH if level == CENTRALISED else CURVE_WIDTH
        axes.plot(mean.x, mean.y, label=level, color=colour, linestyle=dashes, linewidth=width)
    axes.set_xlabel(x_label)
    axes.set_xlim(left=0)
    axes.set_title(
        "Prequential (test-then-train) " + ("loss" if real_valued else "accuracy"), loc="left"
    )
    if real_valued:
        axes.set_ylabel("loss, mean of a window")
        axes.set_yscale("log")
    else:
        axes.set_ylabel("accuracy in a window, %")
    legend(figure, axes)
    return figure


def _curve(
    run: Run, x_of: Callable[[Run, Sequence[Window]], list[float]], real_valued: bool
) -> _Curve:
    windows = joined(run.windows, POINTS)
    values = [
        window.mean_loss if real_valued else 100 * (window.accuracy or 0.0) for window in windows
    ]
    return _Curve(np.array(x_of(run, windows)), np.array(values))


def joined(windows: Sequence[Window], most: int) -> list[Window]:
    """Return at most `most` windows: neighbours merged, in equal numbers but for the last."""
    size = max(1, -(-len(windows) // most))
    return [merge_windows(windows[i : i + size]) for i in range(0, len(windows), size)]


def _rows_seen(run: Run, windows: Sequence[Window]) -> list[float]:
    return [float((window.last + 1) * run.batch) for window in windows]


def _seconds(run: Run, windows: Sequence[Window]) -> list[float]:
    at = {
        window.last: seconds
        for window, seconds in zip(run.windows, run.window_seconds, strict=True)
    }
    return [at[window.last] for window in windows]


def _mean_curve(curves: Sequence[_Curve]) -> _Curve:
    """Return the mean over seeds, where all seeds have values."""
    grid = np.linspace(
        max(curve.x[0] for curve in curves),
        min(curve.x[-1] for curve in curves),
        max(len(curve.x) for curve in curves),
    )
    return _Curve(grid, np.mean([np.interp(grid, c.x, c.y) for c in curves], axis=0))


def _gaps(groups: dict[str, list[Run]], real_valued: bool) -> Figure:
    """Draw each seed as a small point by level, mean and standard deviation beside them."""
    figure, axes = new_figure()
    levels = [level for level in groups if level != CENTRALISED]
    for place, level in enumerate(levels):
        gaps = _paired_gaps(groups.get(CENTRALISED, []), groups[level], real_valued)
        if not gaps:
            continue
        colour, _ = _style(groups, level)
        axes.plot([place - 0.12] * len(gaps), gaps, "o", color=colour, markersize=4, alpha=0.5)
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        mean = statistics.fmean(gaps)
        axes.errorbar(
            [place], [mean], yerr=[spread], fmt="D", color=colour, capsize=6, markersize=7
        )
        label = f"{mean:.3g}" if real_valued else f"{mean:+.2f}"
        axes.annotate(label, (place, mean), xytext=(10, 6), textcoords="offset points")
    axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=1)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_xlim(-0.6, max(len(levels), 1) - 0.4)
    axes.margins(y=0.2)
    axes.set_ylabel("held-out loss above centralised" if real_valued else "points of accuracy")
    worse = "above" if real_valued else "below"
    title = f"Gap to centralised backpropagation ({worse} 0: worse than it)"
    axes.set_title(title, loc="left")
    return figure


def _paired_gaps(baseline: Sequence[Run], group: Sequence[Run], real_valued: bool) -> list[float]:
    scores = {run.seed: run.held_out for run in baseline}
    gaps = []
    for run in group:
        own, other = run.held_out, scores.get(run.seed)
        if own is None or other is None:
            continue
        if real_valued:
            gaps.append(own.loss - other.loss)
        elif own.accuracy is not None and other.accuracy is not None:
            gaps.append(100 * (own.accuracy - other.accuracy))
    return [gap for gap in gaps if math.isfinite(gap)]


def new_figure() -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, in the common style."""
    import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def import_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: a notebook's backend may not be installed."""
    need_package("matplotlib", "matplotlib", "plots")
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def legend(figure: Figure, axes: Axes, columns: int = 5) -> None:
    """Draw the legend below the axes, if any curve has a label."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, handlelength=2.8)


def pictures(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Return each figure as PNG and as SVG, by file name; `figures` are by name without ending."""
    made: dict[str, bytes] = {}
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        for name, figure in figures.items():
            out = io.BytesIO()
            figure.savefig(out, format=kind, metadata=metadata)
            made[f"{name}.{kind}"] = out.getvalue()
    return made
