"""Medians, spreads, targets and rows: pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it: half of the values lie between `low` and `high`."""

    median: float
    low: float
    high: float
    number: int

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.number)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (linear between neighbouring values). Raises ValueError for no value."""
    if not values:
        raise ValueError("no value, so no median")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


@dataclass(frozen=True)
class Target:
    """A bound that a ratio keeps from below (`at_least`) or from above."""

    bound: float
    at_least: bool = True

    def reached(self, ratio: float | None) -> bool:
        if ratio is None or math.isnan(ratio):
            return False
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One figure. ratio: None where there is none; `profile` then says why. run: False where it was
    left out, which is no missed target.

    medians: by side, in `unit`. profile: where the time goes, or what
    else explains the ratio; it is asked for where a target is missed.
    """

    name: str
    ratio: float | None
    target: Target | None = None
    medians: Mapping[str, Spread] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    profile: str = ""
    unit: str = "seconds"
    run: bool = True

    @property
    def reached(self) -> bool | None:
        """Whether the target is; None where there is none, or nothing was run."""
        if self.target is None or not self.run:
            return None
        return self.target.reached(self.ratio)

    @property
    def verdict(self) -> str:
        if not self.run:
            return "not run"
        return {True: "reached", False: "missed", None: ""}[self.reached]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        target = self.target
        return {
            "name": self.name,
            "ratio": self.ratio,
            "target": None if target is None else target.bound,
            "at_least": None if target is None else target.at_least,
            "reached": self.reached,
            "unit": self.unit,
            "medians": {side: found.median for side, found in self.medians.items()},
            "spread": {side: [found.low, found.high] for side, found in self.medians.items()},
            "repeats": {side: found.number for side, found in self.medians.items()},
            "configuration": dict(self.configuration),
            "profile": self.profile,
        }


def faster(name: str, ours: Spread, theirs: Spread, target: Target, **rest: Any) -> Row:
    """How often as fast as `theirs` we are. Both are times, so the ratio is theirs / ours."""
    return Row(name, theirs.median / ours.median, target, {"ours": ours, "theirs": theirs}, **rest)


def missing(name: str, target: Target, reason: str) -> Row:
    """A row that was not run."""
    return Row(name, None, target, profile=f"not measured: {reason}", run=False)


def worst(name: str, rows: Sequence[Row], target: Target) -> Row:
    """One row for several that share a target: reached where all of them reach it, and missed where
    one of them misses it."""
    known = [row.ratio for row in rows if row.ratio is not None]
    missed = [row for row in rows if row.run and not target.reached(row.ratio)]
    whole = all(row.ratio is not None for row in rows)
    ratio = None
    if whole or (missed and all(row.ratio is not None for row in missed)):
        ratio = min(known) if target.at_least else max(known)
    profile = "; ".join(f"{row.name}: {row.profile}" for row in missed)
    of = {"of": [row.name for row in rows]}
    return Row(name, ratio, target, {}, of, profile, run=whole or bool(missed))
