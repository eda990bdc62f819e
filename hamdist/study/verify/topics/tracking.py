"""The tracker of NILP, as the recipe `tracking` runs it: five fully connected neurons, the first of
which follows a signal.

Its trajectory is that of golden files (oracles/tracking_golden.py). The oracle of how well it
follows is the rms of the error as a share of the target's (docs: concepts/equations).
A horizon is one period of the sinusoid, 2 pi seconds. K: ticks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

from hamdist.config import Settings
from hamdist.dynamics.blocks.energy import Records
from hamdist.errors import DivergedError
from hamdist.models.tracker import tracker
from hamdist.runtime.train.train import train
from hamdist.streams import make_stream
from hamdist.study.run.measures import Tracking, Trajectory, follow, rms, seconds, signals
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
    long = 10 * HORIZON
    ticks = long if full else 4000
    error = cache(partial(_error, ticks))
    title = f"{_title('sinusoid', ticks)}, after the first second"
    yield Check(title, STATED, 0.02, lambda: rms(error()))
    if full:
        title = f"tracking the sinusoid: growth of the error over {ticks / HORIZON:.1f} horizons"
        yield Check(title, "no drift: equations.md (NILP)", 0.05, lambda: _growth(error()))
    ticks = long if full else 3000
    offset = partial(_error, ticks, PURE, kind="offset")  # .5 + .3 sin t, without a bias
    title = _title("sinusoid with an offset, without bias, eta = 70", ticks)
    yield Check(f"{title}, after the first second", STATED, 0.04, lambda: rms(offset()))
    patched = "signal of cosines and constants"
    if full:
        yield from _with_jumps(patched, long, kind="patched")
        yield from _with_jumps("signal of constants", 16_000, kind="constants")
    else:
        yield from _with_jumps(patched, 8000, kind="patched", dwell=4.0)


def _with_jumps(name: str, ticks: int, **signal: Any) -> Iterator[Check]:
    @cache
    def tracking() -> Tracking:
        times, y, target = _followed(ticks, **signal)
        result = follow(y, target, times)
        if result is None or result.settled is None:
            raise ValueError("the target does not jump")
        return result

    yield Check(_title(name, ticks), STATED, 0.27, lambda: tracking().share)
    title = f"{_title(name, ticks)}, outside 0.3 s after each jump"
    yield Check(title, STATED, 0.09, lambda: tracking().settled or 0.0)


def _title(target: str, ticks: int) -> str:
    return f"tracking the {target} ({ticks:,} ticks): rms error / rms of the target"


def _error(ticks: int, *overrides: Mapping[str, Any], **signal: Any) -> Trajectory:
    """Return the error behind the first second, in rms of the target."""
    _, y, target = _followed(ticks, *overrides, **signal)
    error: Trajectory = (y - target)[SETTLED:] / rms(target)
    return error


def _growth(error: Trajectory) -> float:
    half = HORIZON // 2  # the error of a sinusoid has half its period
    return rms(error[-half:]) / rms(error[:half]) - 1


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
) -> tuple[Trajectory, Trajectory, Trajectory]:
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
