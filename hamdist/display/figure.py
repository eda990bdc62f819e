"""Curves on common axes, as data and as an SVG picture that needs no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe, Ito
DASHES = ("", "8 4", "2 3", "8 3 2 3", "14 4")
GREY = "#9aa0a6"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 350, 64, 30, 16, 296
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
        """Write the picture into a file, and return its path.

        Args:
            path: of the file, .svg.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(self.svg, "utf-8")
        return Path(path)


class AxisScale:
    """Places of values between the pixels `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.03 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, rounded to tenths."""
        share = (value - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Return round numbers inside the scale: 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [n * step for n in range(first, last + 1)]


def draw_figure(figure: PageFigure, ax: Any = None) -> Any:
    """Return the lines of a figure as an `SvgPicture`, or on `ax`, axes of matplotlib's."""
    if ax is None:
        return figure_svg(figure)
    for curve in figure.curves:
        ax.plot(curve.x, [math.nan if y is None else y for y in curve.y], label=curve.label)
    ax.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    ax.legend()
    return ax


def figure_svg(figure: PageFigure) -> SvgPicture:
    """Return the picture of a figure's lines on linear axes, with a legend."""
    curves = [
        (c, [(x, y) for x, y in zip(c.x, c.y, strict=True) if y is not None and math.isfinite(y)])
        for c in figure.curves
    ]
    curves = [(curve, points) for curve, points in curves if points]
    height = HEIGHT + LEGEND_LINE * -(-len(curves) // IN_A_LINE)
    parts = [_text(LEFT, 18, figure.title, "start")]
    if curves:
        x = AxisScale([x for _, points in curves for x, _ in points], LEFT, WIDTH - RIGHT)
        y = AxisScale([y for _, points in curves for _, y in points], BOTTOM, TOP)
        parts += _axes(figure, x, y)
        for number, (curve, points) in enumerate(curves):
            parts += _curve(curve, " ".join(f"{x(a)},{y(b)}" for a, b in points), number)
    else:
        parts.append(_text(WIDTH / 2, HEIGHT / 2, "nothing was measured yet", "middle"))
    return SvgPicture(svg_of(WIDTH, height, figure.title or figure.y_label, parts))


def svg_of(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a whole SVG text on a white ground, which shrinks where there is less room."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'style="max-width:100%;height:auto" font-family="sans-serif" font-size="12" role="img">'
        f'<title>{escape(title)}</title><rect width="{width}" height="{height}" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#1c1c1c"{more}>{escape(words)}</text>'
    )


def _axes(figure: PageFigure, x: AxisScale, y: AxisScale) -> Iterator[str]:
    grid = 'stroke="#ddd" fill="none"/>'
    for value in y.ticks():
        yield f'<path d="M{LEFT},{y(value)}H{WIDTH - RIGHT}" {grid}'
        yield _text(LEFT - 6, y(value) + 4, f"{value:.5g}", "end")
    for value in x.ticks():
        yield f'<path d="M{x(value)},{TOP}V{BOTTOM}" {grid}'
        yield _text(x(value), BOTTOM + 16, f"{value:,.6g}", "middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, BOTTOM + 36, figure.x_label, "middle")
    middle = (TOP + BOTTOM) / 2
    yield _text(14, middle, figure.y_label, "middle", f' transform="rotate(-90 14 {middle})"')


def _curve(curve: FigureCurve, points: str, number: int) -> Iterator[str]:
    colour, dash, wide = GREY, "", 4
    if curve.style is not None:
        colour, wide = COLOURS[curve.style[0] % len(COLOURS)], 2
        dash = DASHES[curve.style[1] % len(DASHES)]
    look = f'stroke="{colour}" stroke-width="{wide}" stroke-dasharray="{dash}" fill="none"'
    cap = "" if " " in points else ' stroke-linecap="round"'  # (a single point is seen, too)
    yield f'<path d="M{points}{"" if not cap else "h0.1"}" {look}{cap}/>'
    left = LEFT + number % IN_A_LINE * (WIDTH - LEFT - RIGHT) // IN_A_LINE
    down = HEIGHT + number // IN_A_LINE * LEGEND_LINE
    yield f'<path d="M{left},{down - 4}h28" {look}/>' + _text(left + 34, down, curve.label, "start")
