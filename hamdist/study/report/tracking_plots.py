"""The plots of what a run recorded: target and output, energies and weights over time, as PNG
and SVG. matplotlib is imported when one is drawn; nothing touches its global state.

K: recorded ticks, O: outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from hamdist.config import Loss, Settings
from hamdist.dynamics.blocks.energy import Records, hamiltonian, lagrangian, robust_hamiltonian
from hamdist.study.report.plots import (
    BASELINE_COLOUR,
    COLOURS,
    DASHES,
    DPI,
    SIZE,
    dressed,
    import_matplotlib,
    legend,
    pictures,
)
from hamdist.study.run.tracking import PARTS, Trajectory, last_signals, rms, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET_WIDTH, CURVE_WIDTH = 5.0, 1.4
BINS = 200
MOST_BLOCKS = 5
DECADES = 100.0
FLAT = 20.0
TINY = 1e-6


def record_plots(records: Mapping[str, Records], settings: Settings) -> dict[str, bytes]:
    """Return PNG and SVG by file name; none if nothing was recorded.

    They are energies, weights and, of a run with mse and trajectories, tracking.
    """
    if not records or not all(len(r.tick) > 1 for r in records.values()):
        return {}
    plots = {"energies": _energies(records, settings), "weights": _weights(records, settings)}
    found = last_signals(records) if settings.loss is Loss.MSE else None
    if found is not None:
        plots["tracking"] = _tracking(*found, settings)
    return pictures(plots)


def _tracking(ticks: Trajectory, y: Trajectory, target: Trajectory, settings: Settings) -> Figure:
    """Draw the first output and its target at the start and at the end; below, the whole error."""
    times, label = _time(ticks, settings)
    figure, start, end, whole = _start_end_whole(label)
    for axes, rows in ((start, _first(times)), (end, _last(times))):
        t, goal, own = times[rows], target[rows, 0], y[rows, 0]
        axes.plot(t, goal, color=BASELINE_COLOUR, linewidth=TARGET_WIDTH, label="target")
        axes.plot(t, own, color=COLOURS[0], linewidth=CURVE_WIDTH, label="output")
    low, high = float(target[:, 0].min()), float(target[:, 0].max())
    room = FLAT * (high - low) or 1.0
    bottom, top = start.get_ylim()
    if bottom < low - room or top > high + room:  # the output would flatten the target
        start.set_ylim(max(bottom, low - room), min(top, high + room))
        start.set_title("First tenth (the output leaves the picture)", loc="left")
    start.set_ylabel("value" if y.shape[1] == 1 else "value of the first output")
    _error(whole, times, y - target, rms(target))
    legend(figure, start, MOST_BLOCKS + 1)
    return figure


def _error(axes: Axes, times: Trajectory, error: Trajectory, size: float) -> None:
    """Draw its rms in BINS parts of the run, as a share of the target's."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    parts = np.array_split(np.arange(len(times)), min(BINS, len(times)))
    shares = np.array([100 * max(rms(error[p]) / size if size else 0.0, TINY) for p in parts])
    axes.plot([float(times[p].mean()) for p in parts], shares, color=COLOURS[1], linewidth=1.2)
    finite = shares[np.isfinite(shares)]
    low, high = finite.min(initial=100.0), finite.max(initial=TINY)
    axes.set_ylim(0.8 * low, 1.25 * max(low, high))
    axes.set_yscale("log")
    few = high < DECADES * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlim(times[0], times[-1])
    axes.set_ylabel("% of the target's rms")
    axes.set_title(f"Error, rms in {len(parts)} parts of the run", loc="left")


def _energies(records: Mapping[str, Records], settings: Settings) -> Figure:
    """Draw sums over the network, at the start, at the end and over the whole run."""
    from matplotlib.ticker import FormatStrFormatter

    ticks, total = lagrangian(records)
    times, label = _time(ticks.double().numpy(), settings)
    curves = {
        "robust Hamiltonian H'": (robust_hamiltonian(records)[1].numpy(), BASELINE_COLOUR, 4.0),
        "Lagrangian": (total.numpy(), COLOURS[0], 1.2),
        "Hamiltonian H": (hamiltonian(records)[1].numpy(), COLOURS[1], 1.2),
    }
    figure, start, end, whole = _start_end_whole(label, shared=False)
    panels = (start, _first(times), 1.0), (end, _last(times), 1.0), (whole, slice(None), 0.6)
    for axes, rows, thin in panels:
        for name, (values, colour, width) in curves.items():
            width *= thin
            axes.plot(times[rows], values[rows], color=colour, linewidth=width, label=name)
    sizes = np.abs(np.concatenate([values for values, _, _ in curves.values()]))
    whole.set_title("The whole run", loc="left")
    usual = float(np.median(sizes[np.isfinite(sizes)])) or 1.0
    if sizes.max() > FLAT * usual:  # peaks would flatten the rest
        linear = 10.0 ** math.ceil(math.log10(usual))
        whole.set_yscale("symlog", linthresh=linear, linscale=1.0)
        whole.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        whole.set_title(f"The whole run, logarithmic beyond ±{linear:g}", loc="left")
    start.set_ylabel("energy, all blocks")
    whole.set_ylabel("energy, all blocks")
    legend(figure, start, MOST_BLOCKS + 1)
    return figure


def _start_end_whole(label: str, *, shared: bool = True) -> tuple[Figure, Axes, Axes, Axes]:
    """Return a figure of three panels: the first and the last tenth of a run, below it all."""
    figure = _figure(1.35)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    start = dressed(figure.add_subplot(grid[0, 0]))
    end = dressed(figure.add_subplot(grid[0, 1], sharey=start if shared else None))
    whole = dressed(figure.add_subplot(grid[1, :]))
    start.set_title("First tenth", loc="left")
    end.set_title("Last tenth", loc="left")
    end.tick_params(labelleft=not shared)
    for axes in (start, end, whole):
        axes.margins(x=0)
        axes.set_xlabel(label)
    for axes in (start, end):
        axes.locator_params(axis="x", nbins=5)
    return figure, start, end, whole


def _first(times: Trajectory) -> slice:
    return slice(0, -(-len(times) // PARTS))


def _last(times: Trajectory) -> slice:
    return slice(-len(times) // PARTS, None)


def _weights(records: Mapping[str, Records], settings: Settings) -> Figure:
    """Draw |theta| of the network, and of its blocks if they are few."""
    figure = _figure()
    axes = dressed(figure.add_subplot())
    if 1 < len(records) <= MOST_BLOCKS:
        for i, (name, own) in enumerate(records.items()):
            times, _ = _time(own.tick.double().numpy(), settings)
            colour, dashes = COLOURS[i], DASHES[i % len(DASHES)]
            axes.plot(times, own.theta_norm, color=colour, linestyle=dashes, label=name)
    ticks, _ = lagrangian(records)
    squares = torch.zeros(len(ticks), dtype=torch.float64)
    for own in records.values():
        squares += own.theta_norm[torch.isin(own.tick, ticks)].square()
    times, label = _time(ticks.double().numpy(), settings)
    colour = "#444444" if len(records) > 1 else COLOURS[0]
    axes.plot(times, squares.sqrt(), color=colour, linewidth=CURVE_WIDTH, label="all blocks")
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("norm of the weights")
    axes.set_title("Norm of the weights", loc="left")
    if len(records) > 1:
        legend(figure, axes, MOST_BLOCKS + 1)
    return figure


def _time(ticks: Trajectory, settings: Settings) -> tuple[Trajectory, str]:
    """Return the horizontal axis and its label."""
    times = seconds(ticks, settings)
    return (ticks, "tick") if times is None else (times, "time, s")


def _figure(height: float = 1.0) -> Figure:
    import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(SIZE[0], height * SIZE[1]), dpi=DPI, layout="constrained")
