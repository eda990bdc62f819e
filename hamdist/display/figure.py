"""Curves on common axes, as data and as an SVG picture that needs no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe, Ito
DASHES = ("", "8 4", "2 3", "8 3 2 3", "14 4")
GREY = "#9aa0a6"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 340, 64, 30, 16, 44
LEGEND_LINE, IN_A_LINE = 18, 3
TICKS = 5


@dataclass(frozen=True, slots=True)
class FigureCurve:
    """A curve.

    Attributes:
        x: ascending.
        y: None, or a number that is not finite, leaves a gap.
        spread: half the length of the bar at each point, if there are bars.
        style: numbers of its colour and of its dashes; None: a baseline, broad and grey.
        points: whether its points are shown.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] = ()
    style: tuple[int, int] | None = (0, 0)
    points: bool = False


@dataclass(frozen=True, slots=True)
class PageFigure:
    """Curves on common axes; `ticks`: names of the places x = 0, 1, ..., instead of numbers."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[FigureCurve]
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SvgPicture:
    """A picture as SVG text, which a notebook shows; `save` writes it into a file."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the picture to `path` (.svg), and return that. Raises OSError."""
        Path(path).write_text(self.svg, "utf-8")
        return Path(path)


class AxisScale:
    """Places of values between the pixels `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._log = log
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, low * 2) if log else (low - 0.5, high + 0.5)
        margin = 0.0 if log else 0.03 * (high - low)
        self.low, self.high = low - margin, high + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, rounded to tenths."""
        low, high, at = (math.log10(v) if self._log else v for v in (self.low, self.high, value))
        return round(self._start + (at - low) / (high - low) * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Return round numbers inside the scale: 1, 2 or 5 times a power of ten apart."""
        if self._log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
            if len(few) > 1:
                return few[:: -(-len(few) // (2 * TICKS))]
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [n * step for n in range(first, last + 1)]


def figure_svg(figure: PageFigure) -> SvgPicture:
    """Return the picture of a figure: its curves with bars and points, axes, a legend."""
    curves = [(curve, _points(figure, curve)) for curve in figure.curves]
    curves = [(curve, points) for curve, points in curves if points]
    lines = -(-len(curves) // IN_A_LINE)
    height = HEIGHT + 8 + LEGEND_LINE * lines
    parts = [_text(LEFT, 18, figure.title, "start", size=14)]
    if curves:
        ends = [v for _, points in curves for _, y, half in points for v in (y - half, y + half)]
        ends = [v for v in ends if v > 0 or not figure.log_y]
        xs = [x for _, points in curves for x, *_ in points] + [
            x + side for x in range(len(figure.ticks)) for side in (-0.4, 0.4)
        ]
        x = AxisScale(xs, LEFT, WIDTH - RIGHT, log=figure.log_x)
        y = AxisScale(ends, HEIGHT - BOTTOM, TOP, log=figure.log_y)
        parts += _axes(figure, x, y)
        for number, (curve, points) in enumerate(curves):
            parts += _curve(curve, points, x, y, number)
    else:
        parts.append(_text(WIDTH / 2, HEIGHT / 2, "nothing was measured yet", "middle"))
    return SvgPicture(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'style="max-width:100%;height:auto" font-family="sans-serif" font-size="12" role="img">'
        f"<title>{escape(figure.title)}</title>"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def drawn(figure: PageFigure, ax: Any = None) -> Any:
    """Return the figure as an `SvgPicture`, or drawn on `ax`, axes of matplotlib's."""
    if ax is None:
        return figure_svg(figure)
    for curve in figure.curves:
        y = [math.nan if value is None else value for value in curve.y]
        ax.errorbar(curve.x, y, curve.spread or None, label=curve.label)
    if figure.ticks:
        ax.set_xticks(range(len(figure.ticks)), figure.ticks)
    scales = {"xscale": "log" if figure.log_x else None, "yscale": "log" if figure.log_y else None}
    ax.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    ax.set(**{name: scale for name, scale in scales.items() if scale})
    ax.legend()
    return ax


def _points(figure: PageFigure, curve: FigureCurve) -> list[tuple[float, float, float]]:
    """Return x, y and half the bar of the points that the axes can show."""
    spread = list(curve.spread) or [None] * len(curve.x)
    known = [
        (x, y, half or 0.0)
        for x, y, half in zip(curve.x, curve.y, spread, strict=True)
        if y is not None and math.isfinite(y)
    ]
    return [p for p in known if (p[0] > 0 or not figure.log_x) and (p[1] > 0 or not figure.log_y)]


def _text(x: float, y: float, words: str, anchor: str, size: int = 12) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#1c1c1c">'
        f"{escape(words)}</text>"
    )


def _axes(figure: PageFigure, x: AxisScale, y: AxisScale) -> Iterator[str]:
    grid = 'stroke="#ddd" fill="none"/>'
    bottom = HEIGHT - BOTTOM
    for value in y.ticks():
        yield f'<path d="M{LEFT},{y(value)}H{WIDTH - RIGHT}" {grid}'
        yield _text(LEFT - 6, y(value) + 4, f"{value:.5g}", "end")
    names: dict[float, str] = {value: f"{value:,.6g}" for value in x.ticks()}
    if figure.ticks:
        names = {float(place): name for place, name in enumerate(figure.ticks)}
    for value, name in names.items():
        yield f'<path d="M{x(value)},{TOP}V{bottom}" {grid}'
        yield _text(x(value), bottom + 16, name, "middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, figure.x_label, "middle")
    middle = (TOP + bottom) / 2
    label = _text(14, middle, figure.y_label, "middle")
    yield f'<g transform="rotate(-90 14 {middle})">{label}</g>'


def _curve(
    curve: FigureCurve,
    points: Sequence[tuple[float, float, float]],
    x: AxisScale,
    y: AxisScale,
    number: int,
) -> Iterator[str]:
    colour = GREY if curve.style is None else COLOURS[curve.style[0] % len(COLOURS)]
    dash = "" if curve.style is None else DASHES[curve.style[1] % len(DASHES)]
    look = f'stroke="{colour}" stroke-width="{4 if curve.style is None else 2}" fill="none"'
    look += f' stroke-dasharray="{dash}"' if dash else ""
    path = "L".join(f"{x(at)},{y(value)}" for at, value, _ in points)
    yield f'<path d="M{path}" {look}/>'
    for at, value, half in points:
        if half:
            yield f'<path d="M{x(at)},{y(max(value - half, y.low))}V{y(value + half)}" {look}/>'
        if curve.points or len(points) == 1:
            yield f'<circle cx="{x(at)}" cy="{y(value)}" r="4" fill="{colour}"/>'
    left = LEFT + number % IN_A_LINE * (WIDTH - LEFT - RIGHT) // IN_A_LINE
    down = HEIGHT + 12 + number // IN_A_LINE * LEGEND_LINE
    yield f'<path d="M{left},{down - 4}h28" {look}/>' + _text(left + 34, down, curve.label, "start")
