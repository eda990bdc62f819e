"""The folder of a run's or a comparison's results: claimed at the start, written as it goes.

    events.jsonl     events, a line each, flushed at once: `tail -f` shows the run
    metrics.jsonl    (of a comparison runs.jsonl) each prequential window when it is full; at the
                     end replaced by the whole, with the run itself

The writing process holds a lock on events.jsonl, which ends with the process in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hamdist.errors import SettingsError

if TYPE_CHECKING:
    from hamdist.runtime.results.result import Progress

EVENTS, RUNS = "events.jsonl", "runs"
PROGRESS_SECONDS = 5.0  # between two lines of progress
_STUDIES = (
    *("speed.csv", "speed.json", "speed.md", "speed.png", "speed.svg"),
    *("recovery.csv", "recovery.json", "recovery.md"),
)
FILES = (  # what --overwrite may remove: whatever these commands write
    *(EVENTS, "metrics.jsonl", "runs.jsonl", "settings*.yaml", "summary.json", "results.csv"),
    *("model.safetensors", "plain.safetensors", "records.npz", "report.html", "gap.png"),
    *("accuracy-rows.png", "accuracy-seconds.png", "energies.png", "weights.png"),
    *("tracking.png", "digests*.json", f"{RUNS}/*.json", *_STUDIES),
)


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
        part.unlink(missing_ok=True)
        raise SettingsError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def free_folder(
    folder: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    take: Callable[[Path], bool] = lambda _: True,
) -> Path:
    """Return the folder for new results.

    It is `folder`, or the first of folder-2, folder-3, ... that is new or empty, which is reported.
    Raises SettingsError if it cannot be written.

    Args:
        folder: the first choice.
        overwrite: take `folder` itself, without the files that hamdist wrote there.
        say: called with reports.
        take: claims a folder; False if another process was faster.
    """
    prepare_folder(folder)
    if overwrite:
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
        grows: the file of windows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        overwrite: bool = False,
        key: str | None = None,
        grows: str = "metrics.jsonl",
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._moved = False
        self._events: IO[str] | None = None
        self._grows = grows
        self.goes_on = False
        unfinished = self._unfinished(folder, key) if key and not overwrite else None
        self.path = unfinished or free_folder(folder, overwrite=overwrite, say=say, take=self._take)
        if self.goes_on:
            say(f"Going on with the comparison in {self.path}")
        self.tell("goes on" if self.goes_on else "started", key=key, process=os.getpid())

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
            events = (folder / EVENTS).open(mode, encoding="utf-8")
        except FileExistsError:
            return False
        try:
            fcntl.flock(events, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            events.close()
            return False
        except OSError:  # a file system without locks
            pass
        self._events = events
        return True

    def __enter__(self) -> ResultFolder:
        self._show, warnings.showwarning = warnings.showwarning, self._warned
        return self

    def _warned(self, message: Warning | str, *where: Any, **more: Any) -> None:
        """Write a Python warning as an event, and show it as before."""
        self.tell("warning", text=str(message))
        self._show(message, *where, **more)

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Release the folder, and remove it if a run has failed before its first sample."""
        warnings.showwarning = self._show
        self.tell("ended", error=None if error is None else str(error) or type(error).__name__)
        if self._events is not None:
            self._events.close()
        if error is not None and not self._moved and not self.goes_on:
            for name in (EVENTS, self._grows):
                (self.path / name).unlink(missing_ok=True)
            for empty in (self.path / RUNS, self.path):
                with contextlib.suppress(OSError):  # there is something in it
                    empty.rmdir()

    def tell(self, event: str, **values: Any) -> None:
        """Write a line of events.jsonl."""
        if self._events is not None:
            self._line(self._events, {"time": round(time.time(), 3), "event": event, **values})

    def _line(self, file: IO[str], values: Mapping[str, Any]) -> None:
        """Write a line; a failure is reported once, and the run goes on."""
        try:
            file.write(json.dumps(values) + "\n")
            file.flush()
        except OSError as error:
            self._events = None
            with contextlib.suppress(OSError):  # of what it holds back
                file.close()
            self._say(f"Warning: {self.path}: events are written no more: {error.strerror}")

    def watch(
        self, level: str, seed: int, then: Callable[[Progress], object]
    ) -> Callable[[Progress], object]:
        """Return a function for a run's progress, which writes it and calls `then`."""
        head = {"level": level, "seed": seed}
        due, last, lost = 0.0, -1, 0

        def note(progress: Progress) -> None:
            nonlocal due, last, lost
            then(progress)
            if progress.phase is not None:
                self.tell("phase", **head, phase=progress.phase)
                return
            self._moved = True
            for one in progress.replaced[lost:]:
                self.tell("replaced", **head, **dataclasses.asdict(one))
            lost = len(progress.replaced)
            full = [window for window in progress.windows if window.last > last]
            if full and self._events is not None:
                last = full[-1].last
                with (self.path / self._grows).open("a", encoding="utf-8") as file:
                    for window in full:
                        values = dataclasses.asdict(window)
                        means = {"mean_loss": window.mean_loss, "accuracy": window.accuracy}
                        self._line(file, {"event": "window", **head, **values, **means})
            if time.monotonic() >= due:
                due = time.monotonic() + PROGRESS_SECONDS
                seconds = round(progress.seconds, 3)
                self.tell("progress", **head, samples=progress.samples, seconds=seconds)

        return note


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
