"""Oracle: the factors written out by hand, and torch's own schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hamdist.config import CourseSettings, LearningSettings
from hamdist.dynamics.updates.learning_rate import StepCourse
from hamdist.errors import LevelError


def factors(many, steps=None, **learning):
    course = StepCourse(LearningSettings.model_validate(learning), steps)
    return [course(n) for n in range(many)]


def test_by_hand():
    assert factors(3) == [1, 1, 1]
    assert factors(6, 4, decay="linear") == [1, 0.75, 0.5, 0.25, 0, 0]
    assert factors(5, 4, decay="linear", floor=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(5, warmup=4) == [0.25, 0.5, 0.75, 1, 1]
    assert factors(4, 4, decay="linear", warmup=2) == [0.5, 0.75, 0.5, 0.25]
    drops = {"values": [1, 0.5, 0.1], "every": 2}
    assert factors(7, course=drops) == [1, 1, 0.5, 0.5, 0.1, 0.1, 0.1]
    assert factors(2, 4, decay="linear", course=drops) == [1, 0.75]
    root = math.sqrt(0.5)
    expected = [1, (1 + root) / 2, 0.5, (1 - root) / 2, 0, 0]
    assert factors(6, 4, decay="cosine") == pytest.approx(expected)


def test_torchs_cosine():
    optimiser = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20, eta_min=0.1)
    expected = []
    for _ in range(20):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert factors(20, 20, decay="cosine", floor=0.1) == pytest.approx(expected)


def test_courses():
    smooth = CourseSettings(values=(1.0, 3.0), smooth=True, every=4)
    assert [smooth(k) for k in range(6)] == [1, 1.5, 2, 2.5, 3, 3]
    cycle = CourseSettings(values=(1.0, 3.0), cycle=True, every=2, smooth=True)
    assert [cycle(k) for k in range(6)] == [1, 2, 3, 2, 1, 2]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_needs_an_end(decay):
    with pytest.raises(LevelError, match="'steps'"):
        factors(1, decay=decay)
