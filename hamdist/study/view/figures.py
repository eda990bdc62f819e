"""Figures of a report as data, which the page draws: interactive, and saved as SVG by a button."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
