"""The journal of a live run: what was said to it, in the order in which it was accepted.

    journal.jsonl    a line for each entry: {"event": "feed", "number": 3, "at": 1032, "bytes": 208}
    journal.bin      tensors, in the safetensors format, one piece an entry

An entry is written and handed to the operating system before the call that brings it returns: the
end of the process loses nothing that was acknowledged (that of the machine: up to what its disk had
not written yet). A line that was cut off was not acknowledged, and is removed.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hamdist.errors import SettingsError, SnapshotError
from hamdist.streams.entries import Entry
from hamdist.streams.sample import Sample, Target

LINES, TENSORS = "journal.jsonl", "journal.bin"
_REACH = ("feed", "teach", "set", "idle")


class Journal:
    """The journal in a folder, locked by this process unless it is only read."""

    def __init__(self, folder: str | Path, *, reads: bool = False) -> None:
        self.folder = Path(folder)
        self._lines: IO[bytes] | None = None
        self._tensors: IO[bytes] | None = None
        path = self.folder / LINES
        if reads:
            if not path.is_file():
                raise SettingsError(f"{path}: there is no journal; a live run writes one with out=")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lines, self._tensors = path.open("ab"), (self.folder / TENSORS).open("ab")
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"out {str(folder)!r}: another run writes its journal") from None
        except OSError as error:
            raise SettingsError(f"out {str(folder)!r}: {error.strerror or error}") from None
        whole = path.read_bytes().rfind(b"\n") + 1
        self._lines.truncate(whole)

    def append(self, entry: Entry) -> None:
        """Write an entry. Raises SnapshotError where the disk does not take it."""
        if self._lines is None or self._tensors is None:
            raise SnapshotError(f"{self.folder / LINES} is closed")
        line: dict[str, Any] = {"event": entry.event}
        try:
            if entry.event == "set":
                line["rate"] = entry.rate
            elif entry.event != "idle":
                line["number"] = entry.number
            if entry.sample is not None:
                data = save(_tensors(entry))
                line |= {"at": self._tensors.tell(), "bytes": len(data)}
                line |= {"end": True} if entry.sample.end else {}
                self._tensors.write(data)
                self._tensors.flush()
            self._lines.write(json.dumps(line).encode() + b"\n")
            self._lines.flush()
        except OSError as error:
            raise SnapshotError(f"{self.folder / LINES}: {error.strerror or error}") from None

    def entries(self) -> Iterator[Entry]:
        """Yield the entries that reach the network. Raises SnapshotError for a damaged file."""
        with (self.folder / LINES).open("rb") as lines, (self.folder / TENSORS).open("rb") as data:
            for number, text in enumerate(lines, 1):
                if not text.endswith(b"\n"):
                    return
                try:
                    line = json.loads(text)
                    if line["event"] in _REACH:
                        yield _entry(line, data)
                except (ValueError, KeyError, TypeError, SafetensorError) as error:
                    raise SnapshotError(
                        f"{self.folder / LINES}, line {number}: {type(error).__name__}: {error}; "
                        "the journal is damaged: go on from a snapshot, without out="
                    ) from None

    @property
    def empty(self) -> bool:
        """Return True if nothing was written yet."""
        return not (self.folder / LINES).stat().st_size

    def close(self) -> None:
        for file in (self._lines, self._tensors):
            if file is not None:
                file.close()
        self._lines = self._tensors = None


def _tensors(entry: Entry) -> dict[str, Tensor]:
    """Return the tensors of an entry by name: 'u' or 'u.NAME', 'y' or 'y.NAME'."""
    sample = entry.sample
    if sample is None:
        return {}
    tensors: dict[str, Any] = {}
    if entry.event == "feed":
        tensors |= named("u", sample.u if sample.inputs is None else sample.inputs)
    tensors |= named("y", sample.y)
    return {name: one.contiguous() for name, one in tensors.items() if one is not None}


def named(name: str, value: Target) -> dict[str, Tensor | None]:
    """Return one tensor, or those of a dict, by names for a file: 'u', or 'u.NAME'."""
    if isinstance(value, Mapping):
        return {f"{name}.{key}": one for key, one in value.items()}
    return {name: value}


def _entry(line: Mapping[str, Any], data: IO[bytes]) -> Entry:
    sample = None
    if "at" in line:
        data.seek(line["at"])
        read = load(data.read(line["bytes"]))
        u, y = read_named("u", read), read_named("y", read)
        several = u if isinstance(u, dict) else None
        first = next(iter(several.values())) if several else u
        sample = Sample(first, y, line.get("end", False), inputs=several)  # type: ignore[arg-type]
    return Entry(line["event"], line.get("number", 0), sample, line.get("rate", 1.0))


def read_named(name: str, read: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor] | None:
    """Return what `named` has made the names of."""
    prefix = f"{name}."
    several = {k.removeprefix(prefix): one for k, one in read.items() if k.startswith(prefix)}
    return several or read.get(name)
