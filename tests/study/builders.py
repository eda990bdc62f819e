"""Runs with given numbers, for tests that need no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hamdist.dynamics.objective.prequential import Window
from hamdist.runtime.results.scores import Scores
from hamdist.study.run.run import Run


def make_run(
    level: str,
    seed: int = 0,
    *,
    accuracy: float | None = 0.5,
    loss: float = 1.0,
    windows: Sequence[Window] = (Window(0, 9, 10, 5.0, 30, 40), Window(10, 19, 10, 2.0, 36, 40)),
    **other: Any,
) -> Run:
    """A run of 20 samples of 4 rows in 2 seconds; see the arguments for the rest."""
    numbers: dict[str, Any] = {
        "engine": "inprocess",
        "samples": 20,
        "batch": 4,
        "ticks": 24,
        "seconds": 2.0,
        "startup_seconds": 0.5,
        "held_out": Scores(loss, accuracy),
        "bytes_per_edge": {},
        "peak_memory": {"driver": 100},
        "staleness": 0,
        **other,
    }
    seconds = [numbers["seconds"] * (w.last + 1) / numbers["samples"] for w in windows]
    return Run(level=level, seed=seed, windows=windows, window_seconds=seconds, **numbers)
