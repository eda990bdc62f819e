"""Events of a run on a cluster for the terminal that started it: lines in the job's log.

Ray's Jobs API sends the log over HTTP, from the start, to any terminal that attaches, also when the
job has ended; so a terminal needs no other connection to the cluster. An event is a line `#hamdist
` with JSON; anything else (a traceback, a print of the user's model) is text and shown unchanged.
The files of the result come as the last lines, in base64, with their SHA-256.

Progress is reported at most once a second and ever less often, so that a log stays small: with
pauses of max(1, t / 2000) seconds at time t, T seconds give at most 2000 (1 + ln(T / 2000)) lines.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.runtime.results.result import Progress

PREFIX = "#hamdist "
PART_BYTES = 48 * 2**10
MOST_BLOCKS = 64

# No path, no hidden file: a name comes from the cluster and becomes a file of the user's.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=200)]
ByteCount = Annotated[int, Field(ge=0)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Started(_Event):
    """The driver has started; `batch` is the rows of a sample, None if unknown."""

    event: Literal["started"] = "started"
    title: str
    batch: int | None
    level: str | None = None
    seed: int | None = None


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


class Progressed(_Event):
    """A `Progress` with two windows (all but the last one merged, and the last), its first blocks,
    and the measurements of its first processes; its network comes once.
    """

    event: Literal["moved"] = "moved"
    progress: Progress


class WarningEvent(_Event):
    event: Literal["said"] = "said"
    warning: str


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


JobEvent = (
    Started
    | Listening
    | DriverLost
    | Progressed
    | WarningEvent
    | ResultValues
    | File
    | FileChunk
    | FilesStay
    | DoctorReport
    | Ended
)
_events: TypeAdapter[JobEvent] = TypeAdapter(Annotated[JobEvent, Field(discriminator="event")])


def to_line(event: JobEvent) -> str:
    """Return the event as ASCII, without the line's end."""
    return PREFIX + json.dumps(event.model_dump())


_cut = False  # whether the last line was not written to its end


def tell(event: JobEvent) -> bool:
    """Write `event` into this process's log, in one write that no other output can split.

    Returns:
        True if it was written: a log on a full disk ends no run.
    """
    global _cut
    data = ("\n" * _cut + to_line(event) + "\n").encode("ascii")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        while data:
            data = data[os.write(1, data) :]
    _cut = bool(data)
    return not _cut


def from_line(line: str) -> tuple[str, JobEvent | None]:
    """Return the text of a line, and its event, if it has a readable one."""
    text, prefix, body = line.partition(PREFIX)
    if not prefix:
        return line, None
    try:
        return text, _events.validate_json(body)
    except ValidationError:
        return line, None


def moved(progress: Progress, *, network: bool = True) -> Progressed:
    """Return what the terminal is shown of a run's progress."""
    windows = list(progress.windows)
    brief = windows[-1:]
    if len(windows) > 1:
        brief = [merge_windows(windows[:-1]), windows[-1]]
    blocks = progress.blocks[:MOST_BLOCKS]
    actors = dict(list(progress.actors.items())[:MOST_BLOCKS])
    known = progress.network if network else None
    reduced = replace(progress, windows=brief, blocks=blocks, actors=actors, network=known)
    return Progressed(progress=replace(reduced, others={}))


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
