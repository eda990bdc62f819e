"""What the page of a comparison draws beside the curves: the gap by level."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.run import Run


def gap_figures(runs: Sequence[Run]) -> list[PageFigure]:
    """Return the gap to centralised training by level: mean over seeds and standard deviation."""
    scored = [run for run in runs if run.held_out is not None]
    real_valued = all(run.held_out.accuracy is None for run in scored if run.held_out is not None)
    baseline = [run for run in scored if run.level == CENTRALISED]
    levels = list(dict.fromkeys(run.level for run in scored if run.level != CENTRALISED))
    curves = []
    for place, level in enumerate(levels):
        gaps = _paired_gaps(baseline, [r for r in scored if r.level == level], real_valued)
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
