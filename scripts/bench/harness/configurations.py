"""What the baselines can be set to. Each has a name, which is its `str`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product

OPTIMISERS = "plain", "foreach", "fused"
SCHEDULES = "GPipe", "1F1B"
MICRO_BATCHES = 1, 2, 4, 8
STAGES = 2


@dataclass(frozen=True)
class Centralised:
    """compiled: 'no', 'step' (all of it) or 'model' (its forward and backward pass)."""

    threads: int
    optimiser: str = "plain"
    compiled: str = "no"

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.compiled == "step":
            return f"{threads}, whole step compiled"
        how = ", compiled" if self.compiled == "model" else ""
        return f"{threads}, {self.optimiser} SGD{how}"


def eager(cores: int) -> list[Centralised]:
    return [Centralised(t, o) for t, o in product(sorted({1, cores}), OPTIMISERS)]


def compiled(cores: int) -> list[Centralised]:
    return [Centralised(t, compiled="step") for t in sorted({1, cores})]


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, if this machine has one."""
    return next((found for name in ("g++", "clang++") if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Pipeline:
    schedule: str
    micro_batches: int
    optimiser: str

    def __str__(self) -> str:
        many = "es" if self.micro_batches > 1 else ""
        return f"{self.schedule}, {self.micro_batches} micro-batch{many}, {self.optimiser} SGD"


def schedules(batch: int, optimiser: str) -> list[Pipeline]:
    """All that there are: 1F1B asks for at least as many micro-batches as stages."""
    return [
        Pipeline(schedule, number, optimiser)
        for schedule, number in product(SCHEDULES, MICRO_BATCHES)
        if batch % number == 0 and (schedule == "GPipe" or number >= STAGES)
    ]
