"""Streams as functions of real time, for the study of speed.

    static   u(t) = u_0, switched on at t = 0
    smooth   u_i(t) = sqrt(2/3) sum_{j<3} sin(w_ij t + p_ij),  w in [0.5, 1.5] rad/s
    random   u(t) = noise, drawn anew every `PERIOD` seconds and held

Targets are made in the same way; where they are classes they are constant (static, smooth) or drawn
anew with the input (random). Everything is float64 and a function of (seed, t) alone.
B: batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from hamdist.streams.sample import generator

F64 = torch.float64
PERIOD = 0.04  # seconds that a random sample is held
HORIZON = 20.0  # seconds over which the looks at a smooth stream are spread
SWITCHED_ON = 1.0  # seconds for which a static input has been shown when it is looked at
LOOKS = 6
WAVES = 3
SLOWEST, FASTEST = 0.5, 1.5  # rad/s


class StreamKind(str, Enum):
    """The course of a study's input in time."""

    STATIC = "static"
    SMOOTH = "smooth"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class StreamShapes:
    """Shapes of u and of the target, batch in front; `classes`: of class targets, else None."""

    u: tuple[int, ...]
    y: tuple[int, ...]
    classes: int | None = None


TimeCourse: TypeAlias = Callable[[float], Tensor]


@dataclass(frozen=True, slots=True)
class TimedStream:
    """u and target at time t in seconds.

    Attributes:
        begins: when it is switched on (-inf: always on).
        looks: the times at which gradients are compared.
        forgotten: the share of earlier states that may be left at those times.
    """

    u: TimeCourse
    y: TimeCourse
    looks: Sequence[float]
    begins: float = -math.inf
    forgotten: float = 1e-7


def timed_stream(kind: StreamKind, values: StreamShapes, seed: int) -> TimedStream:
    """Return the stream of this kind and seed."""
    u = _course(kind, "u", values.u, None, seed)
    y = _course(kind, "y", values.y, values.classes, seed)
    if kind is StreamKind.STATIC:
        return TimedStream(u, y, [SWITCHED_ON], begins=0.0, forgotten=1e-18)
    if kind is StreamKind.SMOOTH:
        return TimedStream(u, y, [HORIZON * (i + 0.5) / LOOKS for i in range(LOOKS)])
    # Each look at another sample, and at another share of its period.
    drawn = torch.rand(LOOKS, generator=generator("random looks", seed), dtype=F64).tolist()
    return TimedStream(u, y, [PERIOD * (i + (i + x) / LOOKS) for i, x in enumerate(drawn)])


def _course(
    kind: StreamKind, name: str, shape: tuple[int, ...], classes: int | None, seed: int
) -> TimeCourse:
    if kind is StreamKind.SMOOTH and classes is None:
        drawn = generator(f"smooth {name}", seed)
        w, p = (torch.rand(WAVES, *shape, generator=drawn, dtype=F64) for _ in range(2))
        w, p = SLOWEST + (FASTEST - SLOWEST) * w, 2 * math.pi * p
        return lambda t: math.sqrt(2 / WAVES) * torch.sin(w * t + p).sum(0)

    def draw(purpose: str, *numbers: int) -> Tensor:
        drawn = generator(f"{purpose} {name if classes is None else 'class'}", *numbers)
        if classes is not None:
            return torch.randint(classes, shape, generator=drawn)
        return torch.randn(shape, generator=drawn, dtype=F64)

    if kind is not StreamKind.RANDOM:
        value = draw("static", seed)
        return lambda _: value
    latest = lru_cache(maxsize=1)(lambda n: draw("random", seed, n))
    return lambda t: latest(math.floor(t / PERIOD))
