"""The picture of a study of speed: error and 1 - cos against c, and the decay of a static error.

Colours tell the streams apart, dashes and markers c tau. Nothing touches matplotlib's global state.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hamdist.errors import need_package
from hamdist.study.propagation.settling import DecayFit
from hamdist.study.propagation.streams import StreamKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of Okabe and Ito
COLOUR_OF = {
    StreamKind.SMOOTH.value: COLOURS[0],
    StreamKind.RANDOM.value: COLOURS[1],
    StreamKind.STATIC.value: COLOURS[2],
}
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"))
GREY = "#777777"
PANEL_WIDTH, HEIGHT, DPI = 4.6, 4.7, 150
# Below these a static input's error is on its way to round-off; it would flatten all else.
ERROR_FLOOR, ANGLE_FLOOR, DECAY_FLOOR = 1e-4, 1e-8, 1e-9
ROOM = 3.0


def import_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: a notebook's backend may not be installed."""
    need_package("matplotlib", "matplotlib", "plots")
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


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
class PlotLine:
    """The line factor c^exponent."""

    exponent: float
    factor: float


def speed_plots(
    curves: Sequence[Curve],
    lines: tuple[PlotLine | None, PlotLine | None],
    decays: Sequence[DecayFit],
    title: str,
) -> dict[str, bytes]:
    """Return the picture as 'png' and 'svg'; `lines` are the fits of error and of 1 - cos."""
    import_matplotlib()
    from matplotlib.figure import Figure

    panels = 3 if decays else 2
    figure = Figure(figsize=(PANEL_WIDTH * panels, HEIGHT), dpi=DPI, layout="constrained")
    steps = sorted({c.c_tau for c in curves} | {d.c_tau for d in decays}, reverse=True)
    axes = [_axes(figure, panels, i) for i in range(panels)]
    _against_c(axes[0], [(c, c.error) for c in curves], steps, lines[0], ERROR_FLOOR)
    axes[0].set_title("Relative error of the gradient", loc="left")
    _against_c(axes[1], [(c, c.one_minus_cos) for c in curves], steps, lines[1], ANGLE_FLOOR)
    axes[1].set_title("1 − cos to backpropagation's gradient", loc="left")
    if decays:
        _draw_decays(axes[2], decays, steps)
        axes[2].set_title("Static input: error by hops", loc="left")
    figure.suptitle(title, x=0.008, ha="left", fontsize="medium", color=GREY)
    figure.legend(
        handles=_legend(axes[0], curves, steps, fitted=lines[0] is not None, decays=bool(decays)),
        loc="outside lower center",
        ncols=9,
        frameon=False,
        handlelength=2.4,
    )
    return {kind: _bytes(figure, kind) for kind in ("png", "svg")}


def _axes(figure: Figure, panels: int, i: int) -> Axes:
    axes = figure.add_subplot(1, panels, i + 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_yscale("log")
    return axes


def _against_c(
    axes: Axes,
    curves: Sequence[tuple[Curve, Sequence[float]]],
    steps: Sequence[float],
    line: PlotLine | None,
    floor: float,
) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("c, hops per second")
    top, low = floor, 1.0
    for curve, values in curves:
        dashes, marker = STYLES[steps.index(curve.c_tau) % len(STYLES)]
        seen = [max(v, floor * 1e-9) for v in values]
        axes.plot(
            curve.speeds,
            seen,
            color=COLOUR_OF[curve.stream],
            linestyle=dashes,
            marker=marker,
            markersize=5.5,
            markerfacecolor="white",
            linewidth=1.6,
        )
        top = max([top, *values])
        low = min([low, *(v for v in values if v > floor)])
    axes.set_ylim(max(floor, low / ROOM), max(1.0, top) * ROOM)
    if line is not None and curves:
        speeds = [min(c.speeds[0] for c, _ in curves), max(c.speeds[-1] for c, _ in curves)]
        axes.plot(speeds, [line.factor * c**line.exponent for c in speeds], color="black", lw=0.8)
        middle = (speeds[0] * speeds[1]) ** 0.5
        axes.annotate(
            f"{line.factor:.2g} c$^{{{line.exponent:.2f}}}$".replace("-", "−"),
            (middle, line.factor * middle**line.exponent),
            xytext=(-8, -8),
            textcoords="offset points",
            ha="right",
            va="top",
        )


def _draw_decays(axes: Axes, decays: Sequence[DecayFit], steps: Sequence[float]) -> None:
    """Draw a curve per c tau (of the first seed), against the hops made so far, k c tau."""
    drawn: set[float] = set()
    for decay in decays:
        if decay.c_tau in drawn:
            continue
        drawn.add(decay.c_tau)
        dashes, _ = STYLES[steps.index(decay.c_tau) % len(STYLES)]
        hops = [k * decay.c_tau for k in range(len(decay.differences))]
        axes.plot(hops, [max(e, 1e-30) for e in decay.expected], color=GREY, lw=3, alpha=0.35)
        axes.plot(
            hops,
            [max(d, 1e-30) for d in decay.differences],
            color=COLOUR_OF[StreamKind.STATIC.value],
            linestyle=dashes,
            linewidth=1.6,
        )
    axes.set_xlabel("hops, k · c τ after k ticks")
    axes.set_xlim(left=0)
    axes.set_ylim(DECAY_FLOOR, 30)


def _legend(
    axes: Axes, curves: Sequence[Curve], steps: Sequence[float], *, fitted: bool, decays: bool
) -> list[Line2D]:
    """Samples of what is drawn; they show no points in `axes`."""

    def sample(label: str, colour: str = GREY, **style: Any) -> None:
        handles.extend(axes.plot([], [], color=colour, label=label, **style))

    handles: list[Line2D] = []
    for stream, colour in COLOUR_OF.items():
        if any(c.stream == stream for c in curves):
            sample(stream, colour, linewidth=2.4)
    for i, a in enumerate(steps):
        dashes, marker = STYLES[i % len(STYLES)]
        sample(f"c τ = {a:g}", linestyle=dashes, marker=marker, markerfacecolor="white")
    if fitted:
        sample("fit", "black", linewidth=0.8)
    if decays:
        sample("P[Bin(k, c τ) ≤ 2ν − 1]", linewidth=3, alpha=0.35)
    return handles


def _bytes(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
