"""Measures of a run on a signal, or on a stream that drifts.

The tracking error of a net that follows a signal, and warnings before such a run. The error is a
share of the target's size: rms(y - target) / rms(target), the latter over the whole run, whatever
part the error is of.

The prequential accuracy after each labelled drift of a stream, for a drift at sample d with the
next one at sample e:

    before    accuracy over the windows of the last third of the concept that ends at d
    lowest    of a window that begins in d ... e
    recovery  samples from d to the end of the first window behind `lowest` whose accuracy is at
              least `before` minus 2 points; None where there is none before e

Windows that hold samples of both concepts belong to neither. A drift without a whole window before
and behind it has no measure, so `metrics.window` should be a small part of a concept.

K: recorded ticks, B: batch, O: outputs.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hamdist.config import Loss, ModelKind, Settings, Source
from hamdist.dynamics.blocks.energy import Records, hamiltonian, lagrangian, robust_hamiltonian
from hamdist.dynamics.objective.prequential import Window, merge_windows
from hamdist.dynamics.schedule.levels import make_locality
from hamdist.dynamics.updates.constants import make_dynamics
from hamdist.streams.sources.signals import SignalStream

Trajectory = npt.NDArray[np.float64]

SETTLING = 0.3  # seconds after the start, and after a jump of the target
# A jump is a step of the target by this share of its rms, and by so many times its mean step.
JUMP_SHARE, JUMP_STEPS = 0.05, 20.0
PARTS = 10


@dataclass(frozen=True, slots=True)
class Tracking:
    """How well a real-valued target was followed.

    rms: of the target; share, first, last: rms of the error over the run, its first and its last
    tenth, divided by it. jumps: of the target; settled: the share outside SETTLING seconds after
    the start and after each jump, None without jumps (and where the time is not known)."""

    rms: float
    share: float
    first: float
    last: float
    settled: float | None
    jumps: int


def seconds(ticks: Trajectory, settings: Settings) -> Trajectory | None:
    """Return the times t_k of `ticks` (K,); None if only the stream's time stamps had them."""
    knobs = make_locality(settings.level, settings.locality)
    tau = make_dynamics(settings.dynamics, settings.learning, knobs).tau
    if tau is None:
        return None
    steps = [0.0, *(tau(k) for k in range(int(ticks.max(initial=0))))]
    times: Trajectory = np.cumsum(steps)[ticks.astype(np.int64)]
    return times


def signals(records: Records) -> tuple[Trajectory, Trajectory, Trajectory] | None:
    """Return ticks (K,), prediction and target (K, B O) of a readout, if both were recorded.

    None for targets that are no values of the prediction's shape, and without trajectories.
    """
    y, target = records.prediction, records.target
    if y is None or target is None or y.shape != target.shape:
        return None
    there = ~target.isnan().flatten(1).any(dim=1)
    if not there.any():
        return None
    values = [t[there].flatten(1).double().numpy() for t in (y, target)]
    return records.tick[there].double().numpy(), values[0], values[1]


def last_signals(
    records: Mapping[str, Records],
) -> tuple[Trajectory, Trajectory, Trajectory] | None:
    """Return `signals` of the last readout that has some."""
    recorded = [s for r in records.values() for s in [signals(r)] if s is not None]
    return recorded[-1] if recorded else None


def tracking(records: Mapping[str, Records], settings: Settings) -> Tracking | None:
    """Return the tracking of the last readout that recorded real values; None if none did."""
    if settings.loss is not Loss.MSE:
        return None
    recorded = last_signals(records)
    if recorded is None:
        return None
    ticks, y, target = recorded
    return follow(y, target, seconds(ticks, settings))


def follow(y: Trajectory, target: Trajectory, times: Trajectory | None) -> Tracking | None:
    """Return how well y follows the target, both (K, B O), at `times` (K,) in seconds.

    None for a target that is zero throughout.
    """
    size = rms(target)
    if not size:
        return None
    error = y - target
    at = jumps(target)
    part = -(-len(error) // PARTS)
    settled = None
    if len(at) and times is not None:
        begins = times[np.concatenate([[0], at])]
        latest = begins[np.searchsorted(begins, times, side="right") - 1]
        settled_ticks = times - latest >= SETTLING
        settled = rms(error[settled_ticks]) / size if settled_ticks.any() else None
    return Tracking(
        rms=size,
        share=rms(error) / size,
        first=rms(error[:part]) / size,
        last=rms(error[-part:]) / size,
        settled=settled,
        jumps=len(at),
    )


def jumps(target: Trajectory) -> npt.NDArray[np.intp]:
    """Return the entries of target (K, B O) at which it has jumped."""
    steps = np.abs(np.diff(target, axis=0)).max(axis=1)
    least = max(JUMP_SHARE * rms(target), JUMP_STEPS * float(steps.mean())) if len(steps) else 0
    return np.flatnonzero(steps > least) + 1


def rms(values: Trajectory) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def advice(settings: Settings) -> list[str]:
    """Return the warnings before a tracker runs."""
    if settings.model.kind is not ModelKind.TRACKER or settings.stream.source is not Source.SIGNAL:
        return []
    return [*_pure_advice(settings), *_time_advice(settings)]


def _pure_advice(settings: Settings) -> list[str]:
    if settings.model.bias:
        return []
    signal = settings.stream.signal
    values = SignalStream(
        signal.kind,
        amplitude=signal.amplitude,
        offset=signal.offset,
        period=signal.period,
        tau=signal.period / 1000,
        dwell=max(signal.dwell, signal.period / 1000),
        seed=settings.seed,
    ).values(10_000)
    if float(values.min() * values.max()) > 0:
        return []
    return [
        "neurons without a bias cannot leave zero by themselves, and this target goes through "
        "zero: h = 0 and W = 0 will draw the net in, and it dies there (NILP); use model.bias "
        "true, or an offset larger than the amplitude (stream.signal.offset)"
    ]


def _time_advice(settings: Settings) -> list[str]:
    step, speed = settings.dynamics.tau, settings.locality.speed or 1
    if not isinstance(step, float) or not isinstance(speed, int):
        return []
    shown, tau = speed * step, settings.stream.signal.tau
    if abs(shown - tau) <= 1e-9 * tau:
        return []
    return [
        f"a value of the signal stands for {tau:g} s (stream.signal.tau), but lasts {shown:g} s "
        "for the network (dynamics.tau times locality.speed): it sees the signal "
        f"{'slower' if shown > tau else 'faster'} than in its own time"
    ]


def records_npz(records: Mapping[str, Records], settings: Settings) -> bytes:
    """Return a .npz file of plain arrays (no pickle), for `numpy.load`.

    Of the network, at the ticks that all blocks have: tick, seconds (without it where only the
    stream has the time), lagrangian, hamiltonian, robust_hamiltonian. Of each block, as in
    `Records`: BLOCK.tick, BLOCK.loss, BLOCK.work, BLOCK.kinetic, BLOCK.cost, BLOCK.theta_norm and,
    of a trajectory, BLOCK.h, BLOCK.z, BLOCK.prediction, BLOCK.target.
    """
    ticks, total = lagrangian(records)
    arrays: dict[str, Any] = {"tick": ticks.numpy(), "lagrangian": total.numpy()}
    arrays["hamiltonian"] = hamiltonian(records)[1].numpy()
    arrays["robust_hamiltonian"] = robust_hamiltonian(records)[1].numpy()
    times = seconds(ticks.double().numpy(), settings)
    if times is not None:
        arrays["seconds"] = times
    for name, of_block in records.items():
        for column in Records.__dataclass_fields__:
            values = getattr(of_block, column)
            if values is not None:
                arrays[f"{name}.{column}"] = values.numpy()
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


# -- drifts ----------------------------------------------------------------------------------------


TOLERANCE = 0.02  # of accuracy
SETTLED = 3  # the last so-manieth part of a concept says what accuracy had been reached


@dataclass(frozen=True, slots=True)
class DriftRecovery:
    """Recovery from a drift at `sample`, the first one of the new concept.

    `before`, `lowest`: accuracies in [0, 1]; `samples`: until the accuracy was back, None if it was
    not before the next drift.
    """

    sample: int
    before: float
    lowest: float
    samples: int | None


def recoveries(windows: Sequence[Window], drifts: Sequence[int]) -> tuple[DriftRecovery, ...]:
    """Return the recovery from each drift with a measure; `windows` are in order."""
    if not windows:
        return ()
    edges = [0, *drifts, windows[-1].last + 1]
    concepts = [
        [w for w in windows if first <= w.first and w.last < end and w.rows]
        for first, end in pairwise(edges)
    ]
    return tuple(
        _recovery(sample, old[-max(1, len(old) // SETTLED) :], new)
        for sample, old, new in zip(drifts, concepts, concepts[1:], strict=False)
        if old and new
    )


def _recovery(sample: int, settled: Sequence[Window], new: Sequence[Window]) -> DriftRecovery:
    before = merge_windows(settled).accuracy or 0.0
    accuracies = [window.accuracy or 0.0 for window in new]
    lowest = min(accuracies)
    back = None
    for window, accuracy in list(zip(new, accuracies, strict=True))[accuracies.index(lowest) :]:
        if accuracy >= before - TOLERANCE:
            back = window.last + 1 - sample
            break
    return DriftRecovery(sample, before, lowest, back)


def drift_fact(drifts: Sequence[DriftRecovery]) -> str:
    """Return the recoveries in words; empty if there was no drift."""
    if not drifts:
        return ""
    back = [drift.samples for drift in drifts if drift.samples is not None]
    text = f"recovered from {len(back)} of {len(drifts)}"
    if back:
        text += f" within {statistics.fmean(back):.0f} samples (at most {max(back)})"
    fall = statistics.fmean(drift.before - drift.lowest for drift in drifts)
    return f"{text}; accuracy fell by {100 * fall:.1f} points on average"
