"""The tracker of NILP, as the recipe `tracking` runs it: five fully connected neurons, the first of
which follows a signal.

Its trajectory is that of golden files (oracles/tracking_golden.py). The oracle of how well it
follows is the rms of the error as a share of the target's (docs: concepts/equations).
A horizon is one period of the sinusoid, 2 pi seconds. K: ticks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from hamdist.config import Settings
from hamdist.dynamics.blocks.energy import Records
from hamdist.errors import DivergedError
from hamdist.models.tracker import tracker
from hamdist.runtime.train.train import train
from hamdist.streams import make_stream
from hamdist.study.run.measures import Tracking, follow, rms, seconds, signals
from hamdist.study.shared.recipes import load_settings
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.networks import F64

STATED = "equations.md (NILP)"
HORIZON = 6283
N = 5  # neurons
SETTLED = 1000  # ticks
PURE = {"model": {"bias": False}, "dynamics": {"eta": 70}}


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks of the tracker, of 10 horizons if `full`, else as short as possible."""
    yield Check(
        "tracker, s = +1 forward: stopped, with tick, block, quantity, weights (1 if not)",
        "p' = +c p (NILP)",
        0.0,
        _blows_up,
    )
    yield from _sinusoid(10 * HORIZON if full else 4000)
    yield from _offset(10 * HORIZON if full else 3000)
    if full:
        yield from _with_jumps("patched", 10 * HORIZON)
        yield from _with_jumps("constants", 16_000)
    else:
        yield from _with_jumps("patched", 8000, dwell=4.0)


def _sinusoid(ticks: int) -> Iterator[Check]:
    @cache
    def error() -> tuple[np.ndarray, float]:
        _, y, target = _followed(ticks)
        return (y - target)[SETTLED:], rms(target)

    def share() -> float:
        values, size = error()
        return rms(values) / size

    def drift() -> float:
        values, _ = error()
        half = HORIZON // 2  # the error of a sinusoid has half its period
        return rms(values[-half:]) / rms(values[:half]) - 1

    yield Check(f"{_title('sinusoid', ticks)}, after the first second", STATED, 0.02, share)
    if ticks < 2 * HORIZON:
        return
    yield Check(
        f"tracking the sinusoid: growth of the error over {ticks / HORIZON:.1f} horizons",
        "no drift: equations.md (NILP)",
        0.05,
        drift,
    )


def _offset(ticks: int) -> Iterator[Check]:
    """.5 + .3 sin t, without a bias."""

    def share() -> float:
        _, y, target = _followed(ticks, PURE, kind="offset")
        return rms((y - target)[SETTLED:]) / rms(target)

    title = _title("sinusoid with an offset, without bias, eta = 70", ticks)
    yield Check(f"{title}, after the first second", STATED, 0.04, share)


def _with_jumps(kind: str, ticks: int, **signal: Any) -> Iterator[Check]:
    @cache
    def tracking() -> Tracking:
        times, y, target = _followed(ticks, kind=kind, **signal)
        result = follow(y, target, times)
        if result is None or result.settled is None:
            raise ValueError("the target does not jump")
        return result

    name = "signal of cosines and constants" if kind == "patched" else f"signal of {kind}"
    yield Check(_title(name, ticks), STATED, 0.27, lambda: tracking().share)
    title = f"{_title(name, ticks)}, outside 0.3 s after each jump"
    yield Check(title, STATED, 0.09, lambda: tracking().settled or 0.0)


def _title(target: str, ticks: int) -> str:
    return f"tracking the {target} ({ticks:,} ticks): rms error / rms of the target"


def _settings(ticks: int, *overrides: Mapping[str, Any], **signal: Any) -> Settings:
    changes = [{"steps": ticks, "stream": {"signal": signal}}, *overrides]
    settings = load_settings("tracking", changes)
    return settings.for_level(settings.level)


def _run(settings: Settings) -> dict[str, Records]:
    graph = tracker(N, bias=settings.model.bias, seed=settings.seed, dtype=F64)
    stream = make_stream(settings.stream, seed=settings.seed, dtype=F64)
    return train(graph, stream, settings).records


def _followed(
    ticks: int, *overrides: Mapping[str, Any], **signal: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times, output and target, (K,) and (K, 1)."""
    settings = _settings(ticks, *overrides, **signal)
    curves = signals(_run(settings)["x"])
    times = None if curves is None else seconds(curves[0], settings)
    if curves is None or times is None:
        raise ValueError("the run recorded no prediction")
    return times, curves[1], curves[2]


def _blows_up() -> Difference:
    try:
        _run(_settings(2000, {"dynamics": {"sign": 1}}))
    except DivergedError as error:
        named = (error.block, error.quantity) == ("x", "z") and error.tick > 0
        weights = [] if error.result is None else error.result.model.state_dict().values()
        finite = bool(weights) and all(bool(w.isfinite().all()) for w in weights)
        return Difference(0.0 if named and finite else 1.0, str(error))
    return Difference(1.0, "the run went on")
