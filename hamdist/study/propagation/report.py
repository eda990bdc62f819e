"""The results of a study of speed: exponents, tables, files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.display.table import MISSING, Table, csv_text, markdown_page
from hamdist.study.propagation.settling import CountRow
from hamdist.study.propagation.streams import PERIOD, SWITCHED_ON, StreamKind
from hamdist.study.propagation.study import SpeedResult, SpeedRow
from hamdist.study.report.files import to_json, versions
from hamdist.study.shared.result_folder import write_file
from hamdist.study.view.page import FIGURES, data_script, page

FITTED_SPAN = 10.0  # exponents are those of the speeds within this factor of the fastest,
FITTED_LEAST = 3  # and of so many at least
ROUND_OFF = 1e-12


def fit(speeds: Sequence[float], values: Sequence[float]) -> SlopeFit | None:
    """Return the slope over the fastest of `speeds`; None below two values, or if one is zero."""
    fastest = sorted(zip(speeds, values, strict=True), reverse=True)
    span = [p for p in fastest if p[0] * FITTED_SPAN >= fastest[0][0] * (1 - 1e-9)]
    points = span if len(span) >= FITTED_LEAST else fastest[:FITTED_LEAST]
    if len(points) < 2 or not all(0 < value < math.inf for _, value in points):
        return None
    from scipy.stats import linregress  # (half a second to import)

    line = linregress(*np.log(np.array(points)).T)
    spread = float(line.stderr) if len(points) > 2 else None
    return SlopeFit(float(line.slope), spread, math.exp(line.intercept))


def curves(rows: Sequence[SpeedRow]) -> list[Curve]:
    """Return one curve per stream and c tau, over the seeds.

    It has the root mean square of the error, and the mean of 1 - cos.
    """
    groups: dict[tuple[str, float], dict[float, list[SpeedRow]]] = {}
    for row in rows:
        groups.setdefault((row.stream, row.c_tau), {}).setdefault(row.c, []).append(row)
    return [
        Curve(
            stream,
            c_tau,
            sorted(by_c),
            [math.sqrt(fmean(r.error**2 for r in by_c[c])) for c in sorted(by_c)],
            [fmean(r.one_minus_cos for r in by_c[c]) for c in sorted(by_c)],
        )
        for (stream, c_tau), by_c in groups.items()
    ]


def fits(curves: Sequence[Curve]) -> list[Fit]:
    """Return the exponents of the smooth streams' curves that have some."""
    by_step = []
    for curve in curves:
        if curve.stream == StreamKind.SMOOTH.value:
            error = fit(curve.speeds, curve.error)
            angle = fit(curve.speeds, curve.one_minus_cos)
            if error is not None and angle is not None:
                by_step.append(Fit(curve.c_tau, error, angle))
    return by_step


# -- tables ----------------------------------------------------------------------------------------


def speed_tables(result: SpeedResult) -> dict[str, Table]:
    """Return tables by title: error against c, 1 - cos against c, the ticks of static inputs."""
    drawn = curves(result.rows)
    tables = {
        "Relative error of local gradients, by c in hops per second": _against_c(
            drawn, "error", _facts(drawn)
        ),
        "1 - cos between local gradients and backpropagation's": _against_c(
            drawn, "one_minus_cos", []
        ),
    }
    if result.counts:
        tables["Ticks until a static input's values are backpropagation's"] = _tick_table(
            result.counts
        )
    return tables


def _against_c(curves: Sequence[Curve], name: str, notes: Sequence[str]) -> Table:
    speeds = curves[0].speeds if curves else []
    titles = ["stream", "c τ", *(f"c = {c:g}" for c in speeds), "exponent"]
    slopes: dict[float, SlopeFit] = {f.c_tau: getattr(f, name) for f in fits(curves)}
    rows = []
    for curve in curves:
        slope = slopes.get(curve.c_tau) if curve.stream == StreamKind.SMOOTH.value else None
        cells = [_short(value) for value in getattr(curve, name)]
        rows.append([curve.stream, f"{curve.c_tau:g}", *cells, _exponent(slope)])
    return Table(titles, rows, notes)


def _short(value: float) -> str:
    return "0" if value < ROUND_OFF else f"{value:.2g}" if value >= 0.001 else f"{value:.1e}"


def _exponent(slope: SlopeFit | None) -> str:
    if slope is None:
        return MISSING
    spread = "" if slope.spread is None else f" ± {slope.spread:.4f}"
    return f"{slope.exponent:.4f}{spread}"


def _facts(curves: Sequence[Curve]) -> list[str]:
    """Return the conclusions from the numbers, in sentences."""
    facts = [
        f"smooth (0.5 to 1.5 rad/s), c τ = {f.c_tau:g}: error {_law(f.error)}, "
        f"1 - cos {_law(f.one_minus_cos)}"
        for f in fits(curves)[:1]
    ]
    for curve in curves:
        if curve.stream == StreamKind.RANDOM.value and curve.speeds:
            errors = ", ".join(
                f"{_short(e)} at {c * PERIOD:g}"
                for c, e in zip(curve.speeds, curve.error, strict=True)
            )
            facts.append(
                f"random: a new sample every {PERIOD:g} s, so the error falls only when c is large "
                f"against {1 / PERIOD:g}/s; at c τ = {curve.c_tau:g}, by hops per sample: {errors}"
            )
            break
    if any(c.stream == StreamKind.STATIC.value for c in curves):
        facts.append(f"static: {SWITCHED_ON:g} s after it was switched on; 0 stands for round-off")
    return facts


def _law(slope: SlopeFit) -> str:
    return f"{slope.factor:.2g} c^{slope.exponent:.3f}"


def _tick_table(counts: Sequence[CountRow]) -> Table:
    """Return a row per order, c tau, quantity and layer; the counts of all seeds."""
    groups: dict[tuple[str, float, str, int, float, int], list[int | None]] = {}
    for row in counts:
        key = (row.order, row.c_tau, row.quantity, row.layer, row.error, row.expected)
        groups.setdefault(key, []).append(row.ticks)
    rows = []
    for (order, c_tau, quantity, layer, error, expected), ticks in groups.items():
        name = f"{quantity} of layer {layer}" if layer else "gradient, all layers"
        to = f"{error:g}" if error else "exact"
        counted = ", ".join(dict.fromkeys(MISSING if t is None else str(t) for t in ticks))
        rows.append([order, name, f"{c_tau:g}", to, counted, str(expected), _off(ticks, expected)])
    titles = ["order", "what", "c τ", "to", "ticks", "expected", "off by"]
    return Table(titles, rows, ["below c τ = 1 the expected count holds within 12 %"])


def _off(ticks: Sequence[int | None], expected: int) -> str:
    if any(t is None for t in ticks):
        return "never reached"
    worst = max((t for t in ticks if t is not None), key=lambda t: abs(t - expected))
    return "0" if worst == expected else f"{100 * (worst / expected - 1):+.1f} %"


# -- files -----------------------------------------------------------------------------------------


def save_speed(folder: Path, result: SpeedResult) -> None:
    """Write speed.csv, speed.json, speed.md and speed.html.

    Raises SettingsError if a file cannot be written.
    """
    drawn = curves(result.rows)
    write_file(folder / "speed.csv", csv_text([dataclasses.asdict(row) for row in result.rows]))
    record = {
        "command": result.command,
        "versions": versions(),
        "network": result.network,
        "study": result.study,
        "rows": result.rows,
        "fits": fits(drawn),
        "ticks": result.counts,
        "facts": _facts(drawn),
    }
    write_file(folder / "speed.json", to_json(record, indent=2))
    steepest = max(fits(drawn), key=lambda f: f.c_tau, default=None)
    figures = speed_figures(drawn, steepest)
    title = escape(f"hamdist study speed: {result.network}")
    parts = [f"<h1>{title}</h1>", FIGURES]
    write_file(folder / "speed.html", page(title, parts, [data_script(figures=figures)]))
    text = markdown_page(result.network, result.command, speed_tables(result))
    write_file(folder / "speed.md", text)


# -- figures ---------------------------------------------------------------------------------------
# Error and 1 - cos against c: colours tell the streams apart, dashes c tau.

COLOUR_OF = {StreamKind.SMOOTH.value: 0, StreamKind.RANDOM.value: 1, StreamKind.STATIC.value: 2}
# Below these a static input's error is on its way to round-off; it would flatten all else.
ERROR_FLOOR, ANGLE_FLOOR = 1e-4, 1e-8


@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of a stream at one c tau: error and 1 - cos at each of `speeds` (ascending,
    hops/s).
    """

    stream: str
    c_tau: float
    speeds: Sequence[float]
    error: Sequence[float]
    one_minus_cos: Sequence[float]


@dataclass(frozen=True, slots=True)
class SlopeFit:
    """factor c^exponent, by least squares of the logarithms. spread: the exponent's standard error,
    None where two points leave it open."""

    exponent: float
    spread: float | None
    factor: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The exponents of a smooth stream's error and of 1 - cos, by c, at one c tau."""

    c_tau: float
    error: SlopeFit
    one_minus_cos: SlopeFit


def speed_figures(curves: Sequence[Curve], fitted: Fit | None) -> list[PageFigure]:
    """Return the figures; the slopes of `fitted` are drawn, too."""
    steps = sorted({c.c_tau for c in curves}, reverse=True)
    figures = []
    for title, name, floor in (
        ("Relative error of the gradient", "error", ERROR_FLOOR),
        ("1 − cos to backpropagation's gradient", "one_minus_cos", ANGLE_FLOOR),
    ):
        drawn = []
        for curve in curves:
            y = [v if v > floor else None for v in getattr(curve, name)]
            style = COLOUR_OF[curve.stream], steps.index(curve.c_tau)
            label = f"{curve.stream}, c τ = {curve.c_tau:g}"
            drawn.append(FigureCurve(label, curve.speeds, y, (), style, points=True))
        if fitted is not None and curves:
            line: SlopeFit = getattr(fitted, name)
            speeds = sorted({c for curve in curves for c in curve.speeds})
            label = f"{line.factor:.2g} c^{line.exponent:.2f}"
            y = [line.factor * c**line.exponent for c in speeds]
            drawn.append(FigureCurve(label, speeds, y, (), None))
        x_label = "c, hops per second"
        figures.append(PageFigure(title, x_label, title, drawn, log_x=True, log_y=True))
    return figures
