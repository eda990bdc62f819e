"""The journal of a live run: how it began, and what was said to it, in the order of acceptance.

    journal.jsonl    a line for each entry: {"event": "feed", "number": 3, "at": 1032, "bytes": 208}
    journal.bin      their tensors, in the safetensors format, one piece an entry

The first line has the settings; its tensors are an example of the samples and the first weights. An
entry is handed to the operating system before the call that brings it returns: the end of the
process loses nothing that was acknowledged (the end of the machine: what its disk had not written
yet). A line that was cut off was not acknowledged, and is removed.
"""

from __future__ import annotations

import fcntl
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hamdist.errors import SettingsError, SnapshotError
from hamdist.streams.entries import ROOM, Entry
from hamdist.streams.sample import Sample

LINES, TENSORS = "journal.jsonl", "journal.bin"
_REACH = ("feed", "teach", "set", "idle")  # the network


class Journal:
    """The journal in a folder, locked by this process unless it is only read.

    Attributes:
        new: nothing was written yet.
    """

    def __init__(self, folder: str | Path, *, reads: bool = False) -> None:
        self.folder = Path(folder)
        self._files: list[IO[bytes]] = []
        if reads:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = [(self.folder / name).open("ab") for name in (LINES, TENSORS)]
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = (self.folder / LINES).read_bytes().rfind(b"\n") + 1
            self._files[0].truncate(whole)
            self.new = not whole
        except OSError as error:
            self.close()
            why = (
                f": {error.strerror}"
                if not isinstance(error, BlockingIOError)
                else (" is written by another run")
            )
            raise SettingsError(f"out {str(folder)!r}{why}") from None

    def write(self, line: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        """Write a line and its tensors. Raises SnapshotError where the disk does not take it."""
        try:
            lines, data = self._files
            if any(t is not None for t in tensors.values()):
                piece = packed(tensors)
                line |= {"at": data.tell(), "bytes": len(piece)}
                data.write(piece)
                data.flush()
            lines.write(json.dumps(line).encode() + b"\n")
            lines.flush()
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{self.folder / LINES}: cannot be written: {error}") from None

    def append(self, entry: Entry) -> None:
        """Write an entry. Raises SnapshotError."""
        line: dict[str, Any] = {"event": entry.event, "number": entry.number}
        sample, tensors = entry.sample, {}
        if entry.event == "set":
            line["rate"] = entry.rate
        if sample is not None:
            u = sample.u if sample.inputs is None else sample.inputs
            tensors = {
                **(named_tensors("u", u) if entry.event == "feed" else {}),
                **named_tensors("y", sample.y),
            }
            line |= {"end": True} if sample.end else {}
        self.write(line, tensors)

    def lines(self) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Yield the lines with their tensors. Raises SnapshotError for a damaged journal."""
        path = self.folder / LINES
        try:
            with path.open("rb") as lines, (self.folder / TENSORS).open("rb") as data:
                for number, text in enumerate(lines, 1):  # noqa: B007 (for the error)
                    if text.endswith(b"\n"):
                        line = json.loads(text)
                        data.seek(line.get("at", 0))
                        yield line, load(data.read(line["bytes"])) if "at" in line else {}
        except OSError as error:
            raise SettingsError(
                f"{path}: {error.strerror}; a live run with out= writes it"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise SnapshotError(f"{path}, line {number}: damaged: {error}") from None

    def changes(self) -> list[str]:
        """Return what runs that went on with the journal had otherwise than the first one."""
        with (self.folder / LINES).open("rb") as lines:
            resumed = [json.loads(line) for line in lines if line.startswith(b'{"event": "resume"')]
        return sorted({name for line in resumed for name in line["changed"]})

    def entries(self) -> Iterator[Entry]:
        """Yield the entries that reach the network, from the first one on, in that order.

        It is the order of acceptance, but for idle ticks: they may have come before what waited.
        """
        waiting: deque[Entry] = deque()
        reached = 0
        for line, read in self.lines():
            if line["event"] not in _REACH:
                continue
            u, y = read_named("u", read), read_named("y", read)
            inputs = u if isinstance(u, dict) else None
            first: Any = next(iter(inputs.values())) if inputs else u
            sample = Sample(first, y, line.get("end", False), inputs=inputs) if read else None
            entry = Entry(line["event"], line["number"], sample, line.get("rate", 1.0))
            idle = entry.event == "idle"
            if not idle:
                waiting.append(entry)
            while waiting and (reached < entry.number if idle else len(waiting) > ROOM):
                yield waiting.popleft()
                reached += 1
            if idle:
                yield entry
                reached += 1
        yield from waiting

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def packed(tensors: Mapping[str, Any], facts: dict[str, str] | None = None) -> bytes:
    """Return tensors by name, those that are None left out, in the safetensors format."""
    copies = {n: t.detach().clone().contiguous() for n, t in tensors.items() if t is not None}
    return save(copies, facts)


def named_tensors(name: str, value: Any) -> dict[str, Tensor | None]:
    """Return one tensor, or those of a dict or tuple, by names for a file: 'u', or 'u.NAME'."""
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {f"{name}.{key}": tensor for key, tensor in value.items()}
    return {name: value}


def read_named(name: str, read: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor] | None:
    """Return what `named_tensors` has made the names of."""
    several = {k[len(name) + 1 :]: t for k, t in read.items() if k.startswith(f"{name}.")}
    return several or read.get(name)
