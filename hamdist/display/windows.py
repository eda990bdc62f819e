"""Prequential windows as columns and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.dynamics.objective.prequential import Window, merge_windows

MOST_POINTS = 400  # of a curve


def joined(windows: Sequence[Window], most: int) -> list[Window]:
    """Return at most `most` windows: neighbours merged, in equal numbers but for the last."""
    size = max(1, -(-len(windows) // most))
    return [merge_windows(windows[i : i + size]) for i in range(0, len(windows), size)]


def columns(rows: Sequence[tuple[Mapping[str, Any], Window]]) -> dict[str, list[Any]]:
    """Return windows by column, behind the fields that lead each row.

    The columns are `first` and `last` (samples), `samples` (those with a target), `loss` (their
    mean) and `accuracy` (None without class targets).
    """
    values = [
        {
            **head,
            **{name: getattr(w, name) for name in ("first", "last", "samples", "accuracy")},
            "loss": w.mean_loss,
        }
        for head, w in rows
    ]
    return {name: [row[name] for row in values] for name in (values[0] if values else ())}


def windows_figure(
    title: str, curves: Mapping[str, Sequence[Window]], *, baseline: str | None = None
) -> PageFigure:
    """Return the accuracy of windows by the samples that were seen; without classes the loss.

    curves: windows by the label of their curve; baseline: that of the broad grey one.
    """
    classes = any(
        window.accuracy is not None for shown_windows in curves.values() for window in shown_windows
    )
    shown = []
    for number, (label, windows) in enumerate(curves.items()):
        points = joined(windows, MOST_POINTS)
        values = [w.accuracy if classes else w.mean_loss for w in points]
        y = [None if v is None else v * (100 if classes else 1) for v in values]
        style = None if label == baseline else (number, number)
        shown.append(FigureCurve(label, [w.last + 1 for w in points], y, style=style))
    name = "prequential accuracy, %" if classes else "prequential loss"
    return PageFigure(title, "samples", name, shown)
