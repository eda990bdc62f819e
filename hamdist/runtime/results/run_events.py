"""The events of one run, from its progress to those who listen; and their file.

Measurements (`progress`, `blocks`, `actors`, `edges`) come at most once a second and ever less
often: with pauses of max(1, t / 2000) seconds at time t, T seconds give at most
2000 (1 + ln(T / 2000)) of each; of more than 100 blocks in proportion fewer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.runtime.results.events import (
    ActorReplaced,
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    Evaluated,
    EventListener,
    FolderEnded,
    NetworkPlaced,
    PhaseBegun,
    RunBegun,
    RunEvent,
    RunFinished,
    RunProgressed,
    SettingsChanged,
    SnapshotComplete,
    UpdatesAligned,
    Warned,
    WindowFull,
)
from hamdist.runtime.results.measured import Replaced, summed

if TYPE_CHECKING:  # (a command's folder is there before torch is imported)
    from hamdist.config import Settings
    from hamdist.dynamics.objective.prequential import Window
    from hamdist.runtime.results.result import Progress, RunFacts

LINES = 2000
BLOCKS_AT_FULL_PACE = 100
EVENTS = "events.jsonl"
LOGGER = logging.getLogger("hamdist.run")
logging.getLogger("hamdist").addHandler(logging.NullHandler())  # (warnings are shown anyway)
Result = TypeVar("Result", bound="RunFacts")


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
        self._last: dict[str, Window] = {}  # the last window, by readout
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
        if progress.over or self._pace.due(progress.seconds, len(progress.blocks)):
            events += self._measured(progress)
        return events

    def _new(self, texts: Sequence[str]) -> list[str]:
        new = [text for text in dict.fromkeys(texts) if text not in self._reported]
        self._reported.update(new)
        return new

    def _windows(self, progress: Progress) -> Iterator[RunEvent]:
        for readout, windows in {progress.readout: progress.windows, **progress.others}.items():
            for window in _behind(self._last.get(readout), windows):
                yield WindowFull.of(window, readout, progress.seconds, **self.head)
                self._last[readout] = window

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


def _behind(last: Window | None, windows: Sequence[Window]) -> Sequence[Window]:
    """Return the windows behind `last`, which may have been joined with others since."""
    if last is None:
        return windows
    place = next((i for i in reversed(range(len(windows))) if windows[i] == last), None)
    if place is None:
        return [window for window in windows if window.last > last.last]
    return windows[place + 1 :]


def _fields(of: PlacedNetwork | Replaced) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}


def cut_off(path: Path) -> bool:
    """Return True if a file ends within a line, as of a process that was killed."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class EventFile:
    """`events.jsonl` of a folder, locked while it is open, a line an event, flushed at once.

    A disk that gets full is told by `say`, once, and the run goes on.

    Raises FileExistsError (`mode` 'x'), and BlockingIOError if another process writes it.
    """

    def __init__(self, folder: Path, say: Callable[[str], object], mode: str = "x") -> None:
        self._say, self._folder = say, folder
        self._file = (folder / EVENTS).open(mode, encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        except OSError:  # a file system without locks
            pass
        if mode == "a" and cut_off(folder / EVENTS):
            self._file.write("\n")

    def __call__(self, event: RunEvent) -> None:
        """Write an event."""
        if self._file.closed:
            return
        try:
            self._file.write(event.to_line() + "\n")
            self._file.flush()
        except OSError as error:
            self.close()
            self._say(f"Warning: {self._folder}: events are written no more: {error.strerror}")

    def close(self) -> None:
        """Release the folder."""
        with contextlib.suppress(OSError):  # of what it holds back
            self._file.close()


def line_of(event: RunEvent) -> str | None:
    """Return what happened, on a line; None for a measurement."""
    if isinstance(event, Evaluated):
        right = "" if event.accuracy is None else f", accuracy {100 * event.accuracy:.2f} %"
        return f"held out, after {event.samples} samples: loss {event.loss:.4g}{right}"
    if isinstance(event, ActorReplaced):
        event_text = "lost" if event.lost else "set back"
        back = f"is back from tick {event.since} after {event.seconds:.1f} s"
        return f"{event.actor} was {event_text}, and {back}"
    if isinstance(event, RunFinished):
        how = "interrupted" if event.interrupted else "stopped" if event.stopped else "finished"
        new = event.samples - event.resumed
        return f"{event.failure or how}: {new} samples in {event.seconds:.1f} s"
    texts: dict[type[RunEvent], str] = {
        RunBegun: "title",
        SnapshotComplete: "path",
        SettingsChanged: "changed",
        Warned: "text",
    }
    name = texts.get(type(event))
    return None if name is None else f"{event.name}: {getattr(event, name)}"


class RunEvents:
    """Hands the events of one run to listeners, whichever thread they come from, and logs them.

    As a context it tells the end.
    """

    def __init__(
        self, settings: Settings, listeners: Sequence[EventListener], batch: int | None
    ) -> None:
        self._listeners = list(listeners)
        self._of = ProgressEvents(settings.level_name, settings.seed)
        self.head = self._of.head
        self._lock = threading.RLock()
        self.emit(RunBegun.of(settings, settings.name, batch))

    def emit(self, event: RunEvent) -> None:
        """Hand over an event."""
        line = line_of(event)
        if line is not None:
            warns = isinstance(event, (ActorReplaced, Warned))
            LOGGER.log(logging.WARNING if warns else logging.INFO, "%s", line)
        with self._lock:
            for listener in self._listeners:
                listener(event)

    def __call__(self, progress: Progress) -> list[RunEvent]:
        """Hand over the events that are new in `progress`, and return them."""
        events = self._of(progress)
        for event in events:
            self.emit(event)
        return events

    def over(self, then: Any) -> Any:
        """Return an `on_progress` that calls `then`, too; `then` if nobody listens or logs."""
        if not self._listeners and not LOGGER.isEnabledFor(logging.INFO):
            return then

        def note(progress: Progress) -> object:
            answer = None if then is None else then(progress)
            self(progress)
            return answer

        return note

    def finish(self, result: Result, failure: str | None = None) -> Result:
        """Tell the figures of the run, and return them."""
        self.emit(RunFinished.of(result, failure, **self.head))
        return result

    def end(self, error: BaseException | None = None) -> None:
        """Tell that nothing more comes; `error`: what has ended the run."""
        failure = None if error is None else str(error) or type(error).__name__
        result = getattr(error, "result", None)
        if result is not None:
            self.finish(result, failure)
        self.emit(FolderEnded(error=failure))

    def __enter__(self) -> RunEvents:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self.end(error)
