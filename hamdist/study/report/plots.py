"""What the page of a comparison draws beside the curves: the gap by level."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.study.report.aggregate import accuracy_of, loss_of, paired
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.run import Run


def gap_figures(runs: Sequence[Run]) -> list[PageFigure]:
    """Return the gap to centralised training by level: mean over seeds and standard deviation."""
    scored = [run for run in runs if run.held_out is not None]
    real_valued = all(accuracy_of(run) is None for run in scored)
    baseline = [run for run in scored if run.level == CENTRALISED]
    levels = list(dict.fromkeys(run.level for run in scored if run.level != CENTRALISED))
    curves = []
    for place, level in enumerate(levels):
        group = [run for run in scored if run.level == level]
        gaps = paired(group, baseline, loss_of if real_valued else accuracy_of)
        gaps = [gap if real_valued else 100 * gap for gap in gaps if math.isfinite(gap)]
        if gaps:
            spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
            mean = statistics.fmean(gaps)
            curves.append(
                FigureCurve(level, [place], [mean], [spread], style=(place, place), points=True)
            )
    worse = "above" if real_valued else "below"
    title = f"Gap to centralised backpropagation ({worse} 0: worse than it)"
    y_label = "held-out loss above centralised" if real_valued else "points of accuracy"
    return [PageFigure(title, "level", y_label, curves, ticks=levels)] if curves else []
