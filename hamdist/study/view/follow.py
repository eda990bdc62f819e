"""The events of a folder as they come, as the progress of its runs and as lines of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hamdist.dynamics.objective.prequential import Window
from hamdist.runtime.results.events import (
    BlocksMeasured,
    PhaseBegun,
    RunBegun,
    RunEvent,
    RunFinished,
    RunProgressed,
    WindowFull,
    from_values,
)
from hamdist.runtime.results.result import BlockProgress, Progress
from hamdist.study.view.server import events_from, is_alive

PAUSE = 0.25  # seconds between two looks into the file


def followed(folder: Path) -> Iterator[RunEvent]:
    """Yield the events of a folder, also those to come, until no process writes it any more."""
    start, alive = 0, True
    while alive:
        alive = is_alive(folder)  # (asked before the read: what is written in between is read)
        part = events_from(folder, start)
        start = part["next"]
        yield from (event for event in map(from_values, part["events"]) if event is not None)
        if part["more"]:
            alive = True
        elif alive:
            time.sleep(PAUSE)


class FollowedRun:
    """The progress of a run, put together from its events again."""

    def __init__(self, begun: RunBegun) -> None:
        self._last = Progress(0.0, 0, begun.steps, [], [])
        self._readout = ""
        self._windows: list[Window] = []

    def take(self, event: RunEvent) -> Progress | None:
        """Return the progress after `event`, if that has changed it."""
        if isinstance(event, PhaseBegun):
            return replace(self._last, phase=event.phase)
        if isinstance(event, WindowFull):
            self._readout = self._readout or event.readout
            if event.readout == self._readout:
                sums = event.samples, event.loss * event.samples, event.correct, event.rows
                self._windows.append(Window(event.first, event.last, *sums))
        if isinstance(event, BlocksMeasured):
            names = event.tick
            blocks = [
                BlockProgress(n, names[n], event.updates[n], event.waiting.get(n)) for n in names
            ]
            self._last = replace(self._last, blocks=blocks)
        if isinstance(event, (RunProgressed, RunFinished)):
            self._last = replace(
                self._last, seconds=event.seconds, samples=event.samples, windows=[*self._windows]
            )
        if isinstance(event, RunProgressed):
            self._last = replace(
                self._last, steps=event.steps, resumed=event.resumed, note=event.note
            )
        moved = isinstance(event, (RunProgressed, BlocksMeasured, RunFinished))
        return self._last if moved else None
