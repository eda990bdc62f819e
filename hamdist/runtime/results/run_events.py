"""The events of one run, from its progress to those who listen; and their file."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hamdist.runtime.results.events import (
    ActorReplaced,
    Evaluated,
    EventListener,
    FolderEnded,
    RunBegun,
    RunEvent,
    RunFinished,
    SettingsChanged,
    SnapshotComplete,
    Warned,
)
from hamdist.runtime.results.progress_events import ProgressEvents

if TYPE_CHECKING:
    from hamdist.config import Settings
    from hamdist.runtime.results.result import Progress, RunFacts

EVENTS = "events.jsonl"
LOGGER = logging.getLogger("hamdist.run")
logging.getLogger("hamdist").addHandler(logging.NullHandler())  # (warnings are shown anyway)
Result = TypeVar("Result", bound="RunFacts")


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
        return f"{event.failure or how}: {event.samples} samples in {event.seconds:.1f} s"
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
        self._of = ProgressEvents(settings.level.value, settings.seed)
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
