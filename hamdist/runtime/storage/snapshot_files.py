"""Snapshots as files.

    PATH/tick-000000001000/block-0.RUN.1.safetensors  a block: its state in JSON, and its tensors
                           block-1.RUN.1.safetensors
                           stream.RUN.1.safetensors   how far the stream was drawn
                           manifest.json              written last: what belongs to it, checksums

A file is named after its node, the run, and the epoch of the process that wrote it, so that a
process that was given up, or whose driver was lost, cannot write into what its successor has
written. Nothing in a file can execute code: safetensors holds numbers, the rest is JSON that is
checked (dynamics/saved_state, `Manifest`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hamdist.config import Settings, describe
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.saved_state.stateful import unpacked
from hamdist.errors import SnapshotError
from hamdist.runtime.process.arithmetic import Arithmetic
from hamdist.runtime.storage.store import Storage, storage

FORMAT = 1
# Formats whose states can be gone on from. Of others the weights and the place in the stream are
# taken over. A state that gets another layout without defaults (stateful.py) ends a format.
STATE_FORMATS = (1,)
MANIFEST = "manifest.json"
_PREFIX = "tick-"
_FOLDER = re.compile(_PREFIX + r"\d{12}")
_HEAD = struct.Struct("<Q")
_STATE = "hamdist"
# safetensors' names of what `packed` meets
_DTYPES = {"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"}


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SnapshotFile(_Checked):
    """A file of a snapshot: its name, its size, and the SHA-256 of all its bytes."""

    file: str = Field(pattern=r"^\w[\w.-]*$")
    nbytes: int
    sha256: str


class Manifest(_Checked):
    """The contents of a snapshot.

    Attributes:
        parts: files by node.
        settings: of the run, one level's.
        network: has to be equal for a run to resume (`fingerprint`).
        delays: ticks by edge.
        samples: that had entered the network, `skip` of them in an earlier run whose weights this
            one has begun with; passed: samples that the stream had passed over.
        versions: of the software; time: when it was complete.
        stream: the identity of the stream (snapshots/resume.py).
        arithmetic: of the kinds of processes that computed it; switches: torch's (empty: unknown).
    """

    format: int = Field(ge=1)
    tick: int
    run: str
    parts: dict[str, SnapshotFile]
    settings: dict[str, Any]
    network: dict[str, Any]
    delays: dict[str, int]
    versions: dict[str, str]
    samples: int = 0
    passed: int = 0
    skip: int = 0
    arithmetic: list[Arithmetic] = []
    switches: dict[str, bool | int | str] = {}
    time: str = ""
    stream: dict[str, str] = {}

    def dumped(self) -> bytes:
        """Return the manifest as a file, with a checksum of its own."""
        body = self.model_dump(mode="json")
        return (json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(data: bytes, name: str) -> Manifest:
    """Read a manifest. Raises SnapshotError for anything that `dumped` did not write."""
    try:
        body = json.loads(data)
        checksum = body.pop("sha256")
        json.dumps(body, ensure_ascii=False).encode()  # UnicodeEncodeError: a lone surrogate
        manifest = Manifest.model_validate(body)
        # (a field that was not known when it was written is not under its checksum)
        whole = checksum == _digest(manifest.model_dump(mode="json", exclude_unset=True))
    except ValidationError as error:
        raise SnapshotError(f"{name}: no manifest of a snapshot: {describe(error)}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise SnapshotError(f"{name}: no manifest of a snapshot, or cut off") from None
    if manifest.format > FORMAT:
        raise SnapshotError(
            f"{name}: written in format {manifest.format}, this is hamdist for format {FORMAT} and "
            "those before it: install a later hamdist"
        )
    if not whole:
        raise SnapshotError(f"{name}: altered: it does not have its checksum")
    return manifest


def to_bytes(data: Any, tensors: list[Tensor]) -> bytes:
    """Make a file. Raises SnapshotError for tensors of a type that files do not hold."""
    numbered = {str(i): t for i, t in enumerate(tensors)}
    try:
        return bytes(save(numbered, metadata={_STATE: json.dumps(data, allow_nan=False)}))
    except (SafetensorError, ValueError, KeyError) as error:
        raise SnapshotError(f"a state cannot be written: {error}") from None


def from_bytes(data: bytes, name: str, gpu: torch.device | None = None) -> Any:
    """Return the state that `to_bytes` has written (`gpu`: see `unpacked`).

    Raises SnapshotError for anything else.
    """
    try:
        (length,) = _HEAD.unpack_from(data)
        header = json.loads(data[_HEAD.size : _HEAD.size + length])
        values = json.loads(header["__metadata__"][_STATE])
        kinds = {entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
        if not kinds <= _DTYPES:
            raise ValueError(f"types {sorted(kinds - _DTYPES)}")
        tensors = load(data)
        numbered = [tensors[str(i)] for i in range(len(tensors))]
    except (
        SafetensorError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SnapshotError(f"{name}: no file of a snapshot, or damaged ({reason})") from None
    try:
        return unpacked(values, numbered, gpu)
    except (SnapshotError, RecursionError) as error:
        raise SnapshotError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Snapshot:
    """A complete snapshot; `folder` is its name in the storage at `where`."""

    where: str
    folder: str
    manifest: Manifest

    @property
    def tick(self) -> int:
        """Return the tick at which it was taken."""
        return self.manifest.tick

    @property
    def digests(self) -> bool:
        """Return True if the run kept digests (digests.py), which continue from it."""
        return "digests" in self.state(INPUT)

    def __str__(self) -> str:
        return f"{self.where}/{self.folder}"

    def state(self, node: str, gpu: torch.device | None = None) -> Any:
        """Return the state of a node. Raises SnapshotError naming a file that is damaged."""
        part = self.manifest.parts.get(node)
        if part is None:
            raise SnapshotError(f"{self}: has no block {node!r}")
        name = f"{self.where}/{self.folder}/{part.file}"
        return from_bytes(self._bytes(part, name), name, gpu)

    def check(self, nodes: Collection[str] | None = None) -> None:
        """Compare the files (of `nodes` alone) with their checksums.

        Raises SnapshotError naming the first that differs.
        """
        for node, part in self.manifest.parts.items():
            if nodes is None or node in nodes:
                self._bytes(part, f"{self.where}/{self.folder}/{part.file}")

    def _bytes(self, part: SnapshotFile, name: str) -> bytes:
        data = storage(self.where).read(f"{self.folder}/{part.file}")
        if len(data) != part.nbytes:
            raise SnapshotError(f"{name}: {len(data)} bytes, but {part.nbytes} were written")
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise SnapshotError(f"{name}: altered: it does not have its checksum")
        return data


def folder_of(tick: int) -> str:
    """Return the name of the folder of a snapshot."""
    return f"{_PREFIX}{tick:012d}"


def snapshot_folders(store: Storage) -> Iterator[str]:
    """Yield the folders of snapshots, complete ones and others, the latest first."""
    return reversed([name for name in store.folders() if _FOLDER.fullmatch(name)])


def latest_complete(store: Storage, tick: float = math.inf) -> str | None:
    """Return the folder of the latest complete snapshot up to `tick`, which may be damaged."""
    folders = (name for name in snapshot_folders(store) if int(name.removeprefix(_PREFIX)) <= tick)
    return next((name for name in folders if _finished(store, name)), None)


def latest(where: str | Path, say: Callable[[str], None]) -> Snapshot:
    """Return the latest undamaged snapshot in a folder, or the one that `where` itself is.

    `say` is called with a line for each damaged one, naming the file. Raises SnapshotError if
    there is no snapshot.
    """
    store = storage(where)
    parent, _, name = store.where.rpartition("/")
    if _FOLDER.fullmatch(name):
        return _whole(storage(parent), name)
    damaged = []
    for folder in snapshot_folders(store):
        try:
            return _whole(store, folder)
        except SnapshotError as error:
            damaged.append(str(error))
            say(f"{error}; the snapshot before it is used")
    if damaged:
        raise SnapshotError(f"{where}: no snapshot is as it was written: {damaged[0]}")
    raise SnapshotError(
        f"{where}: no snapshots there; give the folder that `snapshots.path` (or --snapshots) "
        "named (a run that ends before `snapshots.seconds` or `snapshots.every` takes none)"
    )


def _whole(store: Storage, folder: str) -> Snapshot:
    name = f"{folder}/{MANIFEST}"
    manifest = read_manifest(store.read(name), f"{store.where}/{name}")
    snapshot = Snapshot(store.where, folder, manifest)
    snapshot.check()
    return snapshot


def check_usable(where: str, nbytes: int) -> None:
    """Check that snapshots of at least `nbytes` can be taken at `where`, before a run starts.

    Raises SnapshotError also if those of another run lie there: a later one of them would be taken
    for this run's.
    """
    store = storage(where)
    folder = latest_complete(store)
    if folder is not None:
        raise SnapshotError(
            f"snapshots.path {where!r}: another run's snapshots lie there ({folder}); go on "
            "from them (--resume), remove them, or give another folder"
        )
    check_writable(store, nbytes)


def check_writable(store: Storage, nbytes: int = 0) -> None:
    """Write as much as a snapshot takes, and remove it again. Raises SnapshotError if that fails:
    found before a run, not when the first snapshot is due."""
    trial = f"trial-{secrets.token_hex(4)}"
    try:
        store.reserve(f"{trial}/empty", nbytes)
    except SnapshotError as error:
        least = f" (a snapshot takes {nbytes / 2**20:.1f} MiB and more)" if error.full else ""
        raise SnapshotError(f"snapshots.path {store.where!r}: {error}{least}") from None
    finally:
        with suppress(SnapshotError):
            store.remove(trial)


def make_room(store: Storage) -> bool:
    """Remove the oldest complete snapshot but the latest undamaged one; True if there was one."""
    with suppress(SnapshotError):
        whole = latest(store.where, lambda _: None).folder
        for name in sorted(snapshot_folders(store)):
            if name != whole and _finished(store, name):
                store.remove(name)
                return True
    return False


def remove_unfinished(store: Storage, before: int) -> None:
    """Remove the files of unfinished snapshots of ticks before `before`."""
    for name in snapshot_folders(store):
        if name < folder_of(before) and not _finished(store, name):
            store.remove(name)


def write_part(store: Storage, tick: int, file: str, data: bytes) -> SnapshotFile:
    """Write one node's file."""
    store.write(f"{folder_of(tick)}/{file}", data)
    return SnapshotFile(file=file, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def conclude(
    store: Storage, manifest: Manifest, keep: int, damaged: Collection[str] = ()
) -> Snapshot:
    """Write the manifest, and remove all but the `keep` latest snapshots.

    Earlier snapshots that are unfinished, or `damaged` (folders), are removed as well.
    """
    folder = folder_of(manifest.tick)
    try:
        store.write(f"{folder}/{MANIFEST}", manifest.dumped())
    except SnapshotError as error:
        if not (error.full and make_room(store)):
            store.remove(folder)
            raise
        store.write(f"{folder}/{MANIFEST}", manifest.dumped())
    complete_ones = 0
    for name in snapshot_folders(store):
        if name > folder:
            continue  # one that is being written
        if complete_ones < keep and name not in damaged and _finished(store, name):
            complete_ones += 1
        else:
            store.remove(name)
    return Snapshot(store.where, folder, manifest)


def _finished(store: Storage, folder: str) -> bool:
    try:
        return bool(store.read(f"{folder}/{MANIFEST}"))
    except SnapshotError:
        return False


def versions() -> dict[str, str]:
    """Return the versions of the software that computes the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        here = version("hamdist")
    except PackageNotFoundError:
        here = "unknown"
    return {"hamdist": here, "torch": torch.__version__}


def file_of(node: str, blocks: list[str], run: int, epoch: int) -> str:
    """Return the name of a node's file, which is numbered, as block names may hold anything."""
    number = "stream" if node == INPUT else f"block-{blocks.index(node)}"
    return f"{number}.{run:016x}.{epoch}.safetensors"


def settings_of(manifest: Manifest, where: str) -> Settings:
    """Return the settings of the run."""
    try:
        return Settings.model_validate(manifest.settings)
    except ValidationError as error:
        raise SnapshotError(f"{where}: its settings: {describe(error)}") from None
