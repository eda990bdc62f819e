"""How the step size changes over a run: a factor of beta by sample n = 0, 1, ... of N.

    decay    linear  1 - (1 - f) n/N           cosine  f + (1 - f) (1 + cos(pi n/N))/2
    warm-up  min(1, (n + 1)/W)                 course  values by sample (`learning.course`)

f: `learning.floor`, W: `learning.warmup`; the factors multiply. Every block reads its own sample's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hamdist.config import CourseSettings, Decay, LearningSettings
from hamdist.errors import LevelError


@dataclass(frozen=True, slots=True)
class Listed:
    """Curve through values[k // every].

    Behind the end it has the last value, or with `cycle` starts again. With `smooth` it is a
    straight line from each value to the next.
    """

    values: tuple[float, ...]
    cycle: bool = False
    every: int = 1
    smooth: bool = False

    def __call__(self, k: int) -> float:
        at, rest = divmod(k, self.every)
        value = self._at(at)
        return value + (self._at(at + 1) - value) * rest / self.every if self.smooth else value

    def _at(self, i: int) -> float:
        n = len(self.values)
        return self.values[i % n if self.cycle else min(i, n - 1)]


def listed(course: CourseSettings) -> Listed:
    """Return the course that a list in the settings describes."""
    return Listed(course.values, course.cycle, course.every, course.smooth)


@dataclass(frozen=True, slots=True)
class StepCourse:
    """The factor of beta by sample. steps: N, where `decay` needs it."""

    decay: Decay = Decay.NONE
    steps: int = 0
    floor: float = 0.0
    warmup: int = 0
    course: Listed | None = None

    def __call__(self, sample: int) -> float:
        factor = 1.0
        if self.decay is not Decay.NONE:
            done = min(1.0, sample / self.steps)
            left = 1 - done if self.decay is Decay.LINEAR else (1 + math.cos(math.pi * done)) / 2
            factor = self.floor + (1 - self.floor) * left if self.floor else left
        if sample + 1 < self.warmup:
            factor *= (sample + 1) / self.warmup
        return factor if self.course is None else factor * self.course(sample)


def step_course(learning: LearningSettings, steps: int | None) -> StepCourse:
    """Return the curve that `learning` defines; raise LevelError for a decay without an end."""
    if learning.decay is not Decay.NONE and steps is None:
        raise LevelError(
            f"learning.decay {learning.decay.value!r} falls over the run, so the run needs 'steps'"
        )
    return StepCourse(
        decay=learning.decay,
        steps=steps or 0,
        floor=learning.floor,
        warmup=learning.warmup,
        course=None if learning.course is None else listed(learning.course),
    )
