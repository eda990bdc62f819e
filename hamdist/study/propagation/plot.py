"""The figures of a study of speed: error and 1 - cos against c, and the decay of a static error.

Colours tell the streams apart, dashes c tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.study.propagation.settling import DecayFit
from hamdist.study.propagation.streams import StreamKind

COLOUR_OF = {StreamKind.SMOOTH.value: 0, StreamKind.RANDOM.value: 1, StreamKind.STATIC.value: 2}
# Below these a static input's error is on its way to round-off; it would flatten all else.
ERROR_FLOOR, ANGLE_FLOOR, DECAY_FLOOR = 1e-4, 1e-8, 1e-9


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


def speed_figures(
    curves: Sequence[Curve], fitted: Fit | None, decays: Sequence[DecayFit]
) -> list[PageFigure]:
    """Return the figures; the slopes of `fitted` are drawn, too."""
    steps = sorted({c.c_tau for c in curves} | {d.c_tau for d in decays}, reverse=True)
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
    return figures + _decay_figures(decays, steps)


def _decay_figures(decays: Sequence[DecayFit], steps: Sequence[float]) -> list[PageFigure]:
    """Return a curve per c tau (of the first seed), against the hops made so far, k c tau."""
    drawn: list[FigureCurve] = []
    first = {decay.c_tau: decay for decay in reversed(decays)}
    for c_tau, decay in sorted(first.items(), reverse=True):
        hops = [k * c_tau for k in range(len(decay.differences))]
        style = COLOUR_OF[StreamKind.STATIC.value], steps.index(c_tau)
        for label, values, curve_style in (
            (f"P[Bin(k, c τ) ≤ 2ν − 1], c τ = {c_tau:g}", decay.expected, None),
            (f"c τ = {c_tau:g}", decay.differences, style),
        ):
            y = [v if v > DECAY_FLOOR else None for v in values]
            drawn.append(FigureCurve(label, hops, y, (), curve_style))
    title, x_label = "Static input: error by hops", "hops, k · c τ after k ticks"
    return [PageFigure(title, x_label, "error", drawn, log_y=True)] if drawn else []
