"""The prequential accuracy after each labelled drift of a stream.

The measure, for a drift at sample d with the next one at sample e:

    before    accuracy over the windows of the last third of the concept that ends at d
    lowest    of a window that begins in d ... e
    recovery  samples from d to the end of the first window behind `lowest` whose accuracy is at
              least `before` minus 2 points; None where there is none before e

Windows that hold samples of both concepts belong to neither. A drift without a whole window before
and behind it has no measure, so `metrics.window` should be a small part of a concept.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hamdist.dynamics.objective.prequential import Window, merge_windows

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
