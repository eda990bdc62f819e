"""Times of a run's start, phase by phase, before the first tick.

plan: the graph is cut and checked. measure: a few steps of every block, for the placement.
ray: Ray is imported and started, or joined. actors: their processes start and import torch.
links: the links between them are measured, for delays that hide them.
blocks: every process builds its blocks. sockets: the processes are connected.
The command adds the phases before: imports (from the start of its process), data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hamdist.runtime.results.result import Progress

TITLES = {
    "imports": "imports",
    "data": "data and model",
    "plan": "plan",
    "measure": "measuring blocks",
    "ray": "Ray",
    "actors": "actors",
    "links": "measuring links",
    "blocks": "blocks",
    "sockets": "sockets",
}


class Startup:
    """Seconds by phase, in the order of their begin; `told` is called with each name."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for phase `name`, which may come more than once."""
        if self._on_phase is not None:
            self._on_phase(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add phases that were timed elsewhere."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def phases_to(
    on_progress: Callable[[Progress], object] | None, steps: int | None
) -> Callable[[str], None] | None:
    """Return a function that reports every phase to `on_progress`."""
    if on_progress is None:
        return None

    def begin(name: str) -> None:
        on_progress(Progress(0.0, 0, steps, [], [], phase=name))

    return begin


def startup_line(total_seconds: float, seconds: Mapping[str, float]) -> str:
    """Return '8.3 s: Ray 4.0, actors 2.9, plan 1.0': the longest first, short ones left out."""
    total = f"{total_seconds:.1f} s"
    longest = sorted(seconds.items(), key=lambda pair: -pair[1])
    parts = [f"{TITLES.get(name, name)} {spent:.1f}" for name, spent in longest if spent >= 0.05]
    return f"{total}: {', '.join(parts)}" if parts else total
