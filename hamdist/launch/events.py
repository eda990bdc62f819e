"""Events of a job on a cluster for the terminal that started it: lines in the job's log.

Ray's Jobs API sends the log over HTTP, from the start, to any terminal that attaches, also when the
job has ended; so a terminal needs no other connection to the cluster. An event is a line `#hamdist
` with JSON; anything else (a traceback, a print of the user's model) is text and shown unchanged.
What happens in the run are the events of every run (runtime/results/events.py), which come ever
less often, so that a log stays small (progress_events.py). Here are those of the job besides. The
files of the result come as the last lines, in base64, with their SHA-256.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from hamdist.runtime.results.events import RunEvent, from_values

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
