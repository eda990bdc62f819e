"""Follows a run from its terminal: the lines of its log, and the files of its result."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from hamdist.errors import ClusterError
from hamdist.launch.events import DriverLost, Ended, File, FileChunk, FilesStay, JobEvent, from_line
from hamdist.runtime.results.events import EventListener, FolderEnded, RunEvent
from hamdist.study.shared.result_folder import prepare_folder


class Results:
    """Receives the files of a result into `out` (None: they are ignored).

    A file gets its name when it is complete and its checksum is right. `written` are their names,
    `left` those that stayed on the cluster, and where.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._file: File | None = None
        self._part: BinaryIO | None = None
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
        self._file, self._hash, self._got = event, hashlib.sha256(), 0
        if self.out is not None:
            try:
                self._part = self._path(event).open("wb")
            except OSError as error:
                raise self._unwritable(error) from None
        self._finish()

    def _take_part(self, event: FileChunk) -> None:
        if self._file is None:
            raise ClusterError("the run's log is damaged: a part of no file")
        try:
            data = base64.b64decode(event.data, validate=True)
        except binascii.Error:
            data = b""
        self._got += len(data)
        self._hash.update(data)
        try:
            if self._part is not None:
                self._part.write(data)
        except OSError as error:
            raise self._unwritable(error) from None
        if not data or self._got > self._file.size:
            self.close()
        self._finish()

    def _finish(self) -> None:
        """Give the file its name, once it is complete."""
        if self._file is None or self._got < self._file.size:
            return
        file, part = self._file, self._part
        self._file, self._part = None, None
        if part is None:
            return
        part.close()
        if self._hash.hexdigest() != file.sha256:
            self._path(file).unlink()
            raise ClusterError(
                f"{file.name} arrived damaged (its checksum differs); fetch it again (hamdist "
                "attach)"
            )
        if self.out is not None:
            try:
                self._path(file).replace(self.out / file.name)
            except OSError as error:
                raise self._unwritable(error, file.name) from None
            if file.name not in self.written:
                self.written.append(file.name)

    def _unwritable(self, error: OSError, name: str = "") -> ClusterError:
        where = str(self.out) if self.out is None or not name else str(self.out / name)
        return ClusterError(
            f"--out {where!r}: cannot be written: {error.strerror or error}; the results stay with "
            "the run: hamdist attach fetches them again"
        )

    def close(self) -> None:
        """Remove an incomplete file, if there is one, and raise ClusterError."""
        file = self._file
        self.discard()
        if file is not None:
            raise ClusterError(
                f"{file.name} did not arrive whole ({self._got} of {file.size} bytes); fetch it "
                "again (hamdist attach)"
            )

    def discard(self) -> None:
        """Remove an incomplete file, if there is one."""
        file, part = self._file, self._part
        self._file, self._part = None, None
        if part is not None:
            part.close()
        if file is not None and self.out is not None:
            self._path(file).unlink(missing_ok=True)

    def _path(self, file: File) -> Path:
        if self.out is None:
            raise ValueError("no folder to write to")
        return self.out / f".{file.name}.part"


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
