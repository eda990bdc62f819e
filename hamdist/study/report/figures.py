"""The figures of reports: the gap by level; target, output, energies and weights of a run.

K: recorded ticks, O: outputs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch

from hamdist.config import Loss, Settings
from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.dynamics.blocks.energy import Records, hamiltonian, lagrangian, robust_hamiltonian
from hamdist.runtime.results.events import RunEvent, UpdatesAligned
from hamdist.study.report.aggregate import accuracy_of, loss_of, paired
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.run import Run
from hamdist.study.run.tracking import Trajectory, last_signals, rms, seconds

BINS = 200
MOST_BLOCKS = 5
MOST_POINTS = 4000  # of a curve


def record_figures(records: Mapping[str, Records], settings: Settings) -> list[PageFigure]:
    """Return the figures of energies, of weights and, of a run with mse and trajectories, of the
    target and the output; none if nothing was recorded.
    """
    if not records or not all(len(r.tick) > 1 for r in records.values()):
        return []
    ticks, total = lagrangian(records)
    times, label = _time(ticks.double().numpy(), settings)
    energies = [
        _curve("robust Hamiltonian H'", times, robust_hamiltonian(records)[1].numpy(), None),
        _curve("Lagrangian", times, total.numpy(), (0, 0)),
        _curve("Hamiltonian H", times, hamiltonian(records)[1].numpy(), (1, 1)),
    ]
    figures = [PageFigure("Energy of all blocks", label, "energy", energies)]
    squares = torch.zeros(len(ticks), dtype=torch.float64)
    for of_block in records.values():
        squares += of_block.theta_norm[torch.isin(of_block.tick, ticks)].square()
    norms = [_curve("all blocks", times, squares.sqrt().numpy(), None)]
    for i, (name, of_block) in enumerate(records.items() if len(records) <= MOST_BLOCKS else ()):
        own_times, _ = _time(of_block.tick.double().numpy(), settings)
        norms.append(_curve(name, own_times, of_block.theta_norm.double().numpy(), (i, i)))
    figures.append(PageFigure("Norm of the weights", label, "norm", norms))
    signals = last_signals(records) if settings.loss is Loss.MSE else None
    return figures if signals is None else figures + _tracking(*signals, settings)


def _tracking(
    ticks: Trajectory, y: Trajectory, target: Trajectory, settings: Settings
) -> list[PageFigure]:
    """Return the first output with its target, and the error in BINS parts of the run."""
    times, label = _time(ticks, settings)
    curves = [_curve("target", times, target[:, 0], None), _curve("output", times, y[:, 0], (0, 0))]
    value = "value" if y.shape[1] == 1 else "value of the first output"
    parts = np.array_split(np.arange(len(times)), min(BINS, len(times)))
    size, error = rms(target), y - target
    shares = np.array([100 * rms(error[part]) / size if size else 0.0 for part in parts])
    middles = np.array([times[part].mean() for part in parts])
    title = f"Error, rms in {len(parts)} parts of the run"
    whole = [_curve("error", middles, shares, (1, 0))]
    return [
        PageFigure("Target and output", label, value, curves),
        PageFigure(title, label, "% of the target's rms", whole, log_y=True),
    ]


def _curve(
    name: str, times: Trajectory, values: Trajectory, style: tuple[int, int] | None
) -> FigureCurve:
    step = -(-len(times) // MOST_POINTS)
    return FigureCurve(name, times[::step].tolist(), values[::step].tolist(), style=style)


def _time(ticks: Trajectory, settings: Settings) -> tuple[Trajectory, str]:
    """Return the horizontal axis and its label."""
    times = seconds(ticks, settings)
    return (ticks, "tick") if times is None else (times, "time, s")


def alignment_figures(
    events: Iterable[RunEvent], runs: Collection[tuple[str | None, int | None]]
) -> list[PageFigure]:
    """Return the alignments of updates, and of feedback matrices, over time: by block, of the first
    seed of each level or rule. runs: the levels and seeds that are shown.
    """
    groups: dict[str | None, list[UpdatesAligned]] = {}
    for event in events:
        if isinstance(event, UpdatesAligned) and (event.level, event.seed) in runs:
            of_level = groups.setdefault(event.level, [])
            if not of_level or event.seed == of_level[0].seed:
                of_level.append(event)
    figures = []
    for level, group in groups.items():
        for title, part in (
            ("Updates and gradients of backpropagation", "cosines"),
            ("Feedback matrices and weights", "feedback"),
        ):
            cosines = [getattr(event, part) for event in group]
            blocks = dict.fromkeys(name for by_block in cosines for name in by_block)
            curves = [
                FigureCurve(
                    name,
                    [event.sample for event in group],
                    [by_block.get(name) for by_block in cosines],
                    style=(place, place),
                )
                for place, name in enumerate(blocks)
            ]
            if len(group) > 1 and curves:
                figures.append(PageFigure(f"{title}: {level}", "sample", "cosine", curves))
    return figures


# -- comparisons -----------------------------------------------------------------------------------


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
