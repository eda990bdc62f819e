"""The folder of a run's or a comparison's results: claimed at the start, written as it goes.

    events.jsonl     events (runtime/results/events.py), a line each, flushed at once: `tail -f`
                     shows the run
    control.jsonl    requests to the run ({"request": "stop"}), a line each, by the live page

The writing process holds a lock on events.jsonl, which ends with the process in any case.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hamdist.errors import HamdistError, SettingsError, Stop, TakeSnapshot
from hamdist.runtime.results.events import (
    EventListener,
    FolderEnded,
    FolderStarted,
    RunBegun,
    RunEvent,
    Warned,
)
from hamdist.runtime.results.run_events import EVENTS, EventFile, ProgressEvents

if TYPE_CHECKING:
    from hamdist.runtime.results.result import Progress

RUNS, CONTROL = "runs", "control.jsonl"
REQUESTS: Mapping[str, object] = {"stop": Stop, "snapshot": TakeSnapshot}
_STUDIES = (
    *("speed.csv", "speed.json", "speed.md", "speed.html"),
    *("recovery.csv", "recovery.json", "recovery.md", "runner-up-*.yaml"),
)
FILES = (  # what --overwrite may remove: whatever these commands write
    *(EVENTS, CONTROL, "metrics.jsonl", "runs.jsonl", "settings*.yaml", "summary.json"),
    *("results.csv", "results.tex", "report.html", "records.npz", "records.html"),
    *("model.safetensors", "plain.safetensors", "digests*.json", f"{RUNS}/*.json", *_STUDIES),
)


def results_of(name: str) -> Path:
    """Return the default folder of a comparison or a study; no name leads out of `results`."""
    return Path("results") / (re.sub(r"[^\w-]+", "-", name).strip("-") or "run")


def prepare_folder(folder: Path) -> None:
    """Make `folder` and try to write there; SettingsError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # (ValueError: a NUL in the path)
        raise SettingsError(
            f"--out {str(folder)!r}: cannot write there: {getattr(error, 'strerror', '') or error}"
        ) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step. Raises SettingsError where that fails."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise SettingsError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


@contextlib.contextmanager
def written_at_the_end() -> Iterator[None]:
    """Raise what cannot be written as an error of a run that was made, not of its settings.

    Ctrl-C and SIGTERM are delayed, so that half of the files is never missing.
    """
    from hamdist.runtime.process.interrupts import interrupts_delayed  # (imports torch)

    try:
        with interrupts_delayed():
            yield
    except SettingsError as error:
        raise HamdistError(str(error)) from None


def free_folder(
    folder: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    take: Callable[[Path], bool] = lambda _: True,
) -> Path:
    """Return the folder for new results.

    It is `folder`, or the first of folder-2, folder-3, ... that is new or empty, which is reported.
    Raises SettingsError if it cannot be written, or is to be overwritten while it is.

    Args:
        folder: the first choice.
        overwrite: take `folder` itself, without the files that hamdist wrote there.
        say: called with reports.
        take: claims a folder; False if another process was faster.
    """
    prepare_folder(folder)
    if overwrite:
        try:
            EventFile(folder, say, "r+").close()
        except FileNotFoundError:
            pass
        except BlockingIOError:
            raise SettingsError(
                f"--out {str(folder)!r}: another process writes its results there; wait for its "
                "end, or name another folder"
            ) from None
        for path in [path for pattern in FILES for path in folder.glob(pattern)]:
            path.unlink()
    if (overwrite or not any(folder.iterdir())) and take(folder):
        return folder
    for number in itertools.count(2):
        other = _numbered(folder, number)
        prepare_folder(other)
        if not any(other.iterdir()) and take(other):
            break
    say(f"{folder} is not empty: results go to {other} (--overwrite: into {folder})")
    return other


def _numbered(folder: Path, number: int) -> Path:
    whole = folder if folder.name else folder.resolve()
    return whole.with_name(f"{whole.name}-{number}")


class ResultFolder:
    """A claimed folder of results.

    Attributes:
        path: of the folder.
        key: of the computation, by which an unfinished comparison continues.
        controls: it answers the requests of the live page.
    """

    def __init__(
        self,
        folder: Path,
        *,
        overwrite: bool = False,
        key: str | None = None,
        controls: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._controls = controls
        self._read = 0  # bytes of requests
        self._moved = False
        self._head: dict[str, Any] = {}
        self._warned_of: set[tuple[str | None, int | None, str]] = set()
        self._events: EventFile | None = None
        self._listeners: list[EventListener] = []
        self.goes_on = False
        unfinished = self._unfinished(folder, key) if key and not overwrite else None
        self.path = unfinished or free_folder(folder, overwrite=overwrite, say=say, take=self._take)
        if self.goes_on:
            say(f"Going on with the comparison in {self.path}")
        self.emit(
            FolderStarted(key=key, process=os.getpid(), goes_on=self.goes_on, controls=controls)
        )

    def _unfinished(self, folder: Path, key: str) -> Path | None:
        """Return the folder of an unfinished comparison of this key that no process uses."""
        numbered = (_numbered(folder, number) for number in itertools.count(2))
        for path in (folder, *itertools.takewhile(Path.is_dir, numbered)):
            if _key_of(path) == key and not _finished(path) and self._take(path, "a"):
                self.goes_on = True
                return path
        return None

    def _take(self, folder: Path, mode: str = "x") -> bool:
        try:
            self._events = EventFile(folder, self._say, mode)
        except (FileExistsError, BlockingIOError):
            return False
        return True

    def __enter__(self) -> ResultFolder:
        self._show, warnings.showwarning = warnings.showwarning, self._warned
        return self

    def _warned(self, message: Warning | str, *where: Any, **more: Any) -> None:
        """Write a Python warning as an event, and show it as before."""
        self.emit(Warned(text=str(message), **self._head))
        self._show(message, *where, **more)

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Release the folder, and remove it if a run has failed before its first sample."""
        warnings.showwarning = self._show
        failure = None if error is None else str(error) or type(error).__name__
        self.emit(FolderEnded(error=failure))
        if self._events is not None:
            self._events.close()
        if error is not None and not self._moved and not self.goes_on:
            (self.path / EVENTS).unlink(missing_ok=True)
            for empty in (self.path / RUNS, self.path):
                with contextlib.suppress(OSError):  # there is something in it
                    empty.rmdir()

    def listen(self, listener: EventListener) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def emit(self, event: RunEvent) -> None:
        """Write an event, and hand it to the listeners; a warning that was told already is not
        told again.
        """
        if isinstance(event, Warned):
            warning = (event.level, event.seed, event.text)
            if warning in self._warned_of:
                return
            self._warned_of.add(warning)
        if self._events is not None:
            self._events(event)
        for listener in self._listeners:
            listener(event)

    def _requested(self) -> object:
        """Return the latest request that has come since the last call, as `on_progress` answers."""
        if not self._controls:
            return None
        try:
            with (self.path / CONTROL).open("rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines()
                self._read = file.tell()
        except OSError:  # nobody has asked for anything
            return None
        requests = [name for name in REQUESTS for line in lines if name.encode() in line]
        return REQUESTS[requests[0]] if requests else None

    def watch(
        self, event: RunBegun, then: Callable[[Progress], object]
    ) -> Callable[[Progress], object]:
        """Return a function for a run's progress, which emits its events and calls `then`.

        Args:
            event: the event of the run's begin, emitted now; it names the run's level and seed.
            then: called first; what it returns is returned.
        """
        self._head = {"level": event.level, "seed": event.seed}
        self.emit(event)
        events = ProgressEvents(event.level, event.seed)

        def note(progress: Progress) -> object:
            answer = then(progress)
            self._moved = self._moved or progress.phase is None
            for event in events(progress):
                self.emit(event)
            return self._requested() or answer

        return note


def ask_of(folder: Path, request: str) -> None:
    """Leave a request (one of REQUESTS) to the run that writes `folder`. Raises SettingsError."""
    try:
        with (folder / CONTROL).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"request": request}) + "\n")
    except OSError as error:
        raise SettingsError(f"{folder / CONTROL}: {error.strerror or error}") from None


def _key_of(folder: Path) -> str | None:
    try:
        with (folder / EVENTS).open(encoding="utf-8") as file:
            key = json.loads(file.readline()).get("key")
    except (OSError, ValueError, AttributeError):
        return None
    return key if isinstance(key, str) else None


def _finished(folder: Path) -> bool:
    """Return True if a comparison has ended there."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        return summary["interrupted"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- finished runs of a study or a comparison: one JSON file a run, named by its key ---------------
# Each is written whole or not at all, so an interrupted study continues from its finished runs.

RecordType = TypeVar("RecordType")


class Store(Generic[RecordType]):
    """Records in `folder`, which is made. Raises SettingsError if it cannot be written.

    `read` makes a record of plain values, or raises ValueError or TypeError.
    """

    def __init__(self, folder: Path, read: Callable[[dict[str, Any]], RecordType]) -> None:
        prepare_folder(folder)
        self._folder = folder
        self._read = read

    def find(self, key: str) -> RecordType | None:
        """Return the record of a finished run. Raises SettingsError for a damaged file."""
        path = self._folder / f"{key}.json"
        try:
            values = json.loads(path.read_text("utf-8"))
            record = self._read(values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(
                f"{path}: cannot be read as the record of a run ({error}); delete it, and the run "
                "is made again"
            ) from None
        if values.get("key") != key:
            raise SettingsError(f"{path}: holds the record of run {values.get('key')}; delete it")
        return record

    def keep(self, key: str, text: str) -> None:
        """Write the JSON `text` of a record. Raises HamdistError if it cannot be written."""
        with written_at_the_end():
            write_file(self._folder / f"{key}.json", text + "\n")
