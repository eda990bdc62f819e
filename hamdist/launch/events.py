"""Events of a job on a cluster for the terminal that started it: lines in the job's log.

Ray's Jobs API sends the log over HTTP, from the start, to any terminal that attaches, also when the
job has ended; so a terminal needs no other connection to the cluster. An event is a line `#hamdist
` with JSON; anything else (a traceback, a print of the user's model) is text and shown unchanged.
What happens in the run are the events of every run (runtime/results/events.py), which come ever
less often, so that a log stays small (run_events.py). Here are those of the job besides. The
files of the result come as the last lines, in base64, with their SHA-256.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from hamdist.errors import ClusterError
from hamdist.runtime.results.events import EventListener, FolderEnded, RunEvent, from_values
from hamdist.study.shared.result_folder import prepare_folder

PREFIX = "#hamdist "
PART_BYTES = 48 * 2**10

# No path, no hidden file: a name comes from the cluster and becomes a file of the user's.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=200)]
ByteCount = Annotated[int, Field(ge=0)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listening(_Event):
    """A live run is served there (`hamdist.attach`)."""

    event: Literal["listening"] = "listening"
    address: str
    token: str


class DriverLost(_Event):
    """The driver before this one was ended by `signal`; the run goes on from `tick` (0: anew)."""

    event: Literal["lost"] = "lost"
    signal: str
    tick: int


class ResultValues(_Event):
    """The facts of a finished run, by name."""

    event: Literal["reached"] = "reached"
    title: str
    facts: dict[str, str]


class File(_Event):
    """A file of the result, followed by its chunks, unless it was too large (`sent`)."""

    event: Literal["file"] = "file"
    name: FileName
    size: ByteCount
    sha256: str
    sent: bool = True


class FileChunk(_Event):
    """A part of the packed files of the result, in base64."""

    event: Literal["part"] = "part"
    data: str


class FilesStay(_Event):
    """The folder on the cluster in which the files of the result stay."""

    event: Literal["kept"] = "kept"
    host: str
    folder: str


class DoctorReport(_Event):
    """The findings of `hamdist doctor` (as JSON)."""

    event: Literal["report"] = "report"
    report: str


class Ended(_Event):
    """The end of a run.

    Attributes:
        code: the exit code of `hamdist run`.
        error: the reason; details: a traceback.
        resume: the argument of `hamdist launch --resume` that continues the run.
    """

    event: Literal["ended"] = "ended"
    code: int
    samples: int = 0
    interrupted: bool = False
    error: str | None = None
    details: str = ""
    resume: str | None = None


_Own = Listening | DriverLost | ResultValues | File | FileChunk | FilesStay | DoctorReport | Ended
JobEvent = _Own | RunEvent
_events: TypeAdapter[_Own] = TypeAdapter(Annotated[_Own, Field(discriminator="event")])


def to_line(event: JobEvent) -> str:
    """Return the event as ASCII, without the line's end."""
    values = event.as_json() if isinstance(event, RunEvent) else event.model_dump()
    return PREFIX + json.dumps(values)


_line_is_open = False  # whether the last line was not written to its end


def tell(event: JobEvent) -> bool:
    """Write `event` into this process's log, in one write that no other output can split.

    False if it was not written: a log on a full disk ends no run.
    """
    global _line_is_open
    data = ("\n" * _line_is_open + to_line(event) + "\n").encode("ascii")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        while data:
            data = data[os.write(1, data) :]
    _line_is_open = bool(data)
    return not _line_is_open


def from_line(line: str) -> tuple[str, JobEvent | None]:
    """Return the text of a line, and its event, if it has a readable one."""
    text, prefix, body = line.partition(PREFIX)
    if not prefix:
        return line, None
    try:
        values = json.loads(body)
    except ValueError:
        return line, None
    event: JobEvent | None = from_values(values) if isinstance(values, dict) else None
    with contextlib.suppress(ValidationError):
        event = _events.validate_python(values)
    return (line, None) if event is None else (text, event)


def file_events(path: Path, most: int) -> Iterator[JobEvent]:
    """Yield a file and its chunks; without chunks if it has more than `most` bytes."""
    size = path.stat().st_size
    yield File(name=path.name, size=size, sha256=_digest(path), sent=size <= most)
    if size <= most:
        with path.open("rb") as file:
            while data := file.read(PART_BYTES):
                yield FileChunk(data=base64.b64encode(data).decode("ascii"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


# -- following it from a terminal ------------------------------------------------------------------


class Results:
    """Receives the files of a result into `out` (None: they are ignored).

    A file gets its name when it is complete and its checksum is right. `written` are their names,
    `left` those that stayed on the cluster, and where.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._arriving: tuple[File, BinaryIO] | None = None
        self._hash = hashlib.sha256()
        self._got = 0
        self.written: list[str] = []
        self.left: list[File] = []
        self.files_stay: FilesStay | None = None
        if out is not None:
            prepare_folder(out)

    def take(self, event: File | FileChunk | FilesStay) -> None:
        """Take a part of a result. Raises ClusterError for a file that is damaged or unwritable."""
        if isinstance(event, FilesStay):
            self.files_stay = event
        elif isinstance(event, FileChunk):
            self._take_part(event)
        else:
            self._take_file(event)

    def _take_file(self, event: File) -> None:
        self.close()
        if not event.sent:
            self.left.append(event)
            return
        part = Path(os.devnull) if self.out is None else self.out / f".{event.name}.part"
        with self._writing():
            self._arriving = event, part.open("wb")
        self._hash, self._got = hashlib.sha256(), 0
        self._finish()

    def _take_part(self, event: FileChunk) -> None:
        if self._arriving is None:
            raise ClusterError("the run's log is damaged: a part of no file")
        file, part = self._arriving
        try:
            data = base64.b64decode(event.data, validate=True)
        except binascii.Error:
            data = b""
        self._got += len(data)
        self._hash.update(data)
        with self._writing():
            part.write(data)
        if not data or self._got > file.size:
            self.close()
        self._finish()

    def _finish(self) -> None:
        """Give the file its name, once it is complete."""
        if self._arriving is None or self._got < self._arriving[0].size:
            return
        (file, part), self._arriving = self._arriving, None
        with self._writing():
            part.close()
        if self.out is None:
            return
        if self._hash.hexdigest() != file.sha256:
            Path(part.name).unlink()
            raise ClusterError(
                f"{file.name} arrived damaged (its checksum differs); fetch it again (hamdist "
                "attach)"
            )
        with self._writing(file.name):
            Path(part.name).replace(self.out / file.name)
        if file.name not in self.written:
            self.written.append(file.name)

    @contextlib.contextmanager
    def _writing(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.out if self.out is None or not name else self.out / name
            raise ClusterError(
                f"--out {str(where)!r}: cannot be written: {error.strerror or error}; the results "
                "stay with the run: hamdist attach fetches them again"
            ) from None

    def close(self) -> None:
        """Remove an incomplete file, if there is one, and raise ClusterError."""
        arriving = self._arriving
        self.discard()
        if arriving is not None:
            raise ClusterError(
                f"{arriving[0].name} did not arrive whole ({self._got} of {arriving[0].size} "
                "bytes); fetch it again (hamdist attach)"
            )

    def discard(self) -> None:
        """Remove an incomplete file, if there is one."""
        if self._arriving is not None:
            (_, part), self._arriving = self._arriving, None
            part.close()
            if self.out is not None:
                Path(part.name).unlink(missing_ok=True)


def mirror_events(lines: Iterable[str], emit: EventListener) -> None:
    """Hand the events of a run's log, as they come, to `emit`."""
    for line in lines:
        _, event = from_line(line)
        if isinstance(event, RunEvent):
            emit(event)
        elif isinstance(event, Ended):
            emit(FolderEnded(error=event.error))


def follow(
    lines: Iterable[str], results: Results, say: Callable[[str], None]
) -> Iterator[JobEvent]:
    """Yield the events of a log that concern no files; `say` is called with plain text."""
    try:
        for line in lines:
            text, event = from_line(line)
            if text.strip():
                say(text)
            if isinstance(event, (File, FileChunk, FilesStay)):
                results.take(event)
            elif isinstance(event, Ended):
                results.close()
                yield event
                return
            elif event is not None:
                if isinstance(event, DriverLost):
                    results.discard()  # of a driver that was lost while it handed a file over
                yield event
        results.close()
    finally:
        results.discard()
