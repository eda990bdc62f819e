"""From the progress of a run to its events.

Measurements (`progress`, `blocks`, `actors`, `edges`) come at most once a second and ever less
often: with pauses of max(1, t / 2000) seconds at time t, T seconds give at most
2000 (1 + ln(T / 2000)) of each; of more than 100 blocks in proportion fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.runtime.results.events import (
    ActorReplaced,
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    NetworkPlaced,
    PhaseBegun,
    RunEvent,
    RunProgressed,
    SnapshotComplete,
    UpdatesAligned,
    Warned,
    WindowFull,
)
from hamdist.runtime.results.measured import Replaced, summed

if TYPE_CHECKING:  # (a command's folder is there before torch is imported)
    from hamdist.runtime.results.result import Progress

LINES = 2000
BLOCKS_AT_FULL_PACE = 100


class ProgressPace:
    """Decides when measurements are due: see the top of this file."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, seconds: float, blocks: int = 1) -> bool:
        """Return True if one is due, `seconds` after the start."""
        if seconds < self._next:
            return False
        self._next = seconds + max(1.0, seconds / LINES) * max(1.0, blocks / BLOCKS_AT_FULL_PACE)
        return True


class ProgressEvents:
    """Turns the progress of one run into events; call it with each `Progress`.

    Attributes:
        head: `level` and `seed` of its events.
    """

    def __init__(self, level: str | None = None, seed: int | None = None) -> None:
        self.head: dict[str, Any] = {"level": level, "seed": seed}
        self._last: dict[str, int] = {}  # sample of the last window, by readout
        self._lost, self._aligned = 0, -1
        self._reported: set[str] = set()  # warnings, and paths of snapshots
        self._actors: Sequence[NetworkActor] | None = None
        self._pace = ProgressPace()

    def __call__(self, progress: Progress) -> list[RunEvent]:
        """Return the events that are new in `progress`."""
        head = self.head
        if progress.phase is not None:
            return [PhaseBegun(phase=progress.phase, **head)]
        events: list[RunEvent] = []
        net = progress.network
        if net is not None and net.actors != self._actors:
            self._actors = net.actors
            events.append(NetworkPlaced(**_fields(net), **head))
        lost, self._lost = progress.replaced[self._lost :], len(progress.replaced)
        events += [ActorReplaced(**_fields(loss), **head) for loss in lost]
        events += [Warned(text=text, **head) for text in self._new(progress.warnings)]
        events += [SnapshotComplete(path=path, **head) for path in self._new(progress.snapshots)]
        events += self._windows(progress)
        aligned = progress.alignment
        if aligned is not None and aligned.sample > self._aligned:
            self._aligned = aligned.sample
            events.append(UpdatesAligned(**aligned._asdict(), **head))
        if self._pace.due(progress.seconds, len(progress.blocks)):
            events += self._measured(progress)
        return events

    def _new(self, texts: Sequence[str]) -> list[str]:
        new = [text for text in dict.fromkeys(texts) if text not in self._reported]
        self._reported.update(new)
        return new

    def _windows(self, progress: Progress) -> Iterator[RunEvent]:
        for readout, windows in {progress.readout: progress.windows, **progress.others}.items():
            last = self._last.get(readout, -1)
            for window in windows:
                if window.last > last:
                    yield WindowFull.of(window, readout, progress.seconds, **self.head)
                    self._last[readout] = window.last

    def _measured(self, progress: Progress) -> Iterator[RunEvent]:
        head, blocks = self.head, progress.blocks
        samples = dict(progress.actors)
        yield RunProgressed(
            samples=progress.samples,
            steps=progress.steps,
            seconds=progress.seconds,
            tick=max((block.tick for block in blocks), default=0),
            resumed=progress.resumed,
            note=progress.note,
            stream={name: n for s in samples.values() for name, n in s.stream.items()},
            **head,
        )
        if not samples:
            return
        yield self.blocks(progress)
        yield ActorsMeasured(
            seconds={name: s.seconds for name, s in samples.items()},
            memory={name: s.memory for name, s in samples.items()},
            **head,
        )
        yield EdgesMeasured(edges=summed(list(samples.values())), **head)

    def blocks(self, progress: Progress) -> BlocksMeasured:
        """Return the measurements of all blocks as an event, whether it is due or not."""
        blocks, samples = progress.blocks, list(progress.actors.values())
        return BlocksMeasured(
            tick={b.block: b.tick for b in blocks},
            updates={b.block: b.updates for b in blocks},
            norms={name: norms for s in samples for name, norms in s.norms.items()},
            seconds={name: spent for s in samples for name, spent in s.steps.items()},
            staleness={name: late for s in samples for name, late in s.staleness.items()},
            histograms={name: by_kind for s in samples for name, by_kind in s.histograms.items()},
            waiting={b.block: b.waiting for b in blocks if b.waiting is not None},
            **self.head,
        )


def _fields(of: PlacedNetwork | Replaced) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
