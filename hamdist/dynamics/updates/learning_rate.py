"""The step size over a run: a factor of beta by sample n = 0, 1, ... of N.

    decay    linear  1 - (1 - f) n/N           cosine  f + (1 - f) (1 + cos(pi n/N))/2
    warm-up  min(1, (n + 1)/W)                 course  values by sample (`learning.course`)

f: `learning.floor`, W: `learning.warmup`; the factors multiply. Every block reads its own sample's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hamdist.config import Decay, LearningSettings
from hamdist.errors import LevelError


@dataclass(frozen=True, slots=True)
class StepCourse:
    """The factor of beta by sample. steps: N; raises LevelError for a decay without an end."""

    learning: LearningSettings
    steps: int | None

    def __post_init__(self) -> None:
        decay = self.learning.decay
        if decay is not Decay.NONE and self.steps is None:
            raise LevelError(
                f"learning.decay {decay.value!r} falls over the run, so the run needs 'steps'"
            )

    def __call__(self, sample: int) -> float:
        of, factor = self.learning, 1.0
        if self.steps is not None and of.decay is not Decay.NONE:
            done = min(1.0, sample / self.steps)
            left = 1 - done if of.decay is Decay.LINEAR else (1 + math.cos(math.pi * done)) / 2
            factor = of.floor + (1 - of.floor) * left if of.floor else left
        if sample + 1 < of.warmup:
            factor *= (sample + 1) / of.warmup
        return factor if of.course is None else factor * of.course(sample)
