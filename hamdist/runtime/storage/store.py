"""Folders for snapshots: of this host, of a shared file system, or by URL (s3://, gs://, ...).

Files appear whole or not at all: in a folder by writing another file, forcing it to the disk and
renaming it; object stores do so by themselves.

A folder of snapshots belongs to one run at a time: the second one is refused. The claim is a file,
`run.json`, made exclusively at the start and removed at the end. The claim of a killed run is taken
over: on its own host once its process is gone, on another one once the claim has not been renewed
for a while (the clocks of the hosts should agree to that).
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import psutil

from hamdist.errors import SnapshotError

CHUNK = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)
# What hamdist writes, and so what it may remove: snapshots, and a try before the start.
_OURS = re.compile(r"tick-\d{12}|trial-[0-9a-f]{8}")
_OUR_FILES = re.compile(r"manifest\.json|empty|[\w.-]+\.safetensors|\..*\.part")


class Storage(Protocol):
    """A place for the files of snapshots; names are relative, with '/'."""

    where: str

    def write(self, name: str, data: bytes) -> None:
        """Write a file as a whole, or not at all.

        Args:
            name: of the file, relative to the place.
            data: its content.

        Raises:
            SnapshotError: it cannot be written; `full` where there is no room.
        """

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Args:
            name: of the file.

        Raises:
            SnapshotError: it cannot be read.
        """

    def folders(self) -> list[str]:
        """Return the names of the folders in it; none where it does not exist yet."""

    def remove(self, folder: str) -> None:
        """Remove hamdist's files from a folder of its names, and it if nothing else is left.

        Args:
            folder: its name.
        """

    def delete(self, name: str) -> None:
        """Remove a file, if it is there.

        Args:
            name: of the file.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; return True if it was written.

        Args:
            name: of the file.
            data: its content.

        Raises:
            SnapshotError: it cannot be written.
        """

    def reserve(self, name: str, nbytes: int) -> None:
        """Write a file of a size, where the place can be full.

        Args:
            name: of the file.
            nbytes: the size.

        Raises:
            SnapshotError: there is no room.
        """


def storage(where: str | Path) -> Storage:
    """Open a folder or URL. Raises SnapshotError for a URL without an installed file system."""
    text = str(where)
    if "\0" in text:
        raise SnapshotError(f"{text!r}: a path has no NUL character")
    if "://" not in text:
        return _Folder(Path(text).expanduser().absolute())
    if text.startswith("file://"):
        return _Folder(Path(text.removeprefix("file://")))
    return _Remote(text.rstrip("/"))


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def write(self, name: str, data: bytes) -> None:
        path = self._path / name
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with _failing(path, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
                descriptor = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except SnapshotError:
            with suppress(OSError):
                part.unlink()
            raise

    def reserve(self, name: str, nbytes: int) -> None:
        path = self._path / name
        with _failing(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for _ in range(nbytes // CHUNK):
                    file.write(bytes(CHUNK))
                file.write(bytes(nbytes % CHUNK))
                file.flush()
                os.fsync(file.fileno())

    def create(self, name: str, data: bytes) -> bool:
        path = self._path / name
        with _failing(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        with suppress(OSError):
            (self._path / name).unlink()
        if "/" in name:
            with suppress(OSError):  # others' files are in it
                (self._path / name).parent.rmdir()

    def read(self, name: str) -> bytes:
        with _failing(self._path / name, "read"):
            return (self._path / name).read_bytes()

    def folders(self) -> list[str]:
        with _failing(self._path, "read"):
            try:
                paths = list(self._path.iterdir())
            except FileNotFoundError:
                return []
            return sorted(path.name for path in paths if path.is_dir() and not path.is_symlink())

    def remove(self, folder: str) -> None:
        path = self._path / folder
        if not _OURS.fullmatch(folder) or path.is_symlink():
            return
        with _failing(path, "removed"), suppress(FileNotFoundError):
            for file in sorted(path.iterdir(), key=lambda f: f.name != "manifest.json"):
                if _OUR_FILES.fullmatch(file.name):
                    file.unlink(missing_ok=True)  # the manifest first: no half snapshot has one
            with suppress(OSError):  # somebody else's file is in it
                path.rmdir()


@contextmanager
def _failing(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        failure = SnapshotError(f"{path}: cannot be {action}: {error.strerror or error}")
        failure.full = error.errno in FULL
        raise failure from None


class _Remote:
    """A folder of an object store, whose package has exceptions of its own."""

    def __init__(self, url: str) -> None:
        import fsspec  # (file systems for clouds are packages)

        self.where = url
        self._fs: Any
        with self._named("", "no file system for it is installed, or it cannot be opened"):
            self._fs, self._root = fsspec.core.url_to_fs(url)

    @contextmanager
    def _named(self, name: str, action: str) -> Iterator[None]:
        """Turn every error of the store into a SnapshotError that names the file."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (no common root: botocore, gcsfs, azure, ...)
            place = f"{self.where}/{name}" if name else self.where
            text = str(error) or type(error).__name__
            raise SnapshotError(f"{place}: {action}: {text}") from None

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        with self._named(name, "cannot be written"):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def reserve(self, name: str, nbytes: int) -> None:  # noqa: ARG002 (no store is full)
        self.write(name, b"")

    def create(self, name: str, data: bytes) -> bool:
        with self._named(name, "cannot be written"):
            if self._fs.exists(f"{self._root}/{name}"):  # (no store of fsspec creates exclusively)
                return False
        self.write(name, data)
        return True

    def read(self, name: str) -> bytes:
        with self._named(name, "cannot be read"):
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))

    def folders(self) -> list[str]:
        with self._named("", "cannot be read"):
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        names = (str(f["name"]) for f in entries if f["type"] == "directory")
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def remove(self, folder: str) -> None:
        path = f"{self._root}/{folder}"
        if not _OURS.fullmatch(folder):
            return
        with self._named(folder, "cannot be removed"):
            try:
                files = [str(f["name"]) for f in self._fs.ls(path, detail=True)]
            except FileNotFoundError:
                return
            for file in sorted(files, key=lambda name: not name.endswith("/manifest.json")):
                if _OUR_FILES.fullmatch(file.rpartition("/")[2]):
                    self._fs.rm_file(file)
            with suppress(OSError):  # (most stores have no folders; one with other files stays)
                self._fs.rmdir(path)

    def delete(self, name: str) -> None:
        with suppress(SnapshotError), self._named(name, "cannot be removed"):
            self._fs.rm_file(f"{self._root}/{name}")


# -- claims ----------------------------------------------------------------------------------------


CLAIM = "run.json"
RENEWAL_SECONDS = 20.0
STALE_SECONDS = 90.0


@contextmanager
def claimed(where: str | None, run: int) -> Iterator[None]:
    """Hold the claim of run number `run` on a folder of snapshots inside, if there is one.

    Raises SnapshotError if a run that goes on has claimed it, with which, where and since when.
    """
    if where is None:
        yield
        return
    store = storage(where)
    mine = {
        "run": f"{run:016x}",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "since": now(),
    }
    _take(store, mine)
    over = threading.Event()
    renewal = threading.Thread(target=_renew, args=(store, mine, over), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        over.set()
        renewal.join(RENEWAL_SECONDS)
        store.delete(CLAIM)


def now() -> str:
    """Return the time as text, in UTC and to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _dumped(claim: dict[str, Any]) -> bytes:
    return json.dumps({**claim, "renewed": time.time()}).encode()


def _take(store: Storage, mine: dict[str, Any]) -> None:
    try:
        if store.create(CLAIM, _dumped(mine)):
            return
    except SnapshotError as error:
        raise SnapshotError(
            f"{error}; a run that goes on writes beside the snapshot it goes on from, unless "
            "snapshots.path (--snapshots) names another folder: give one that can be written"
        ) from None
    other = _read(store)
    if other is not None and _goes_on(other, mine["host"]):
        raise SnapshotError(
            f"snapshots.path {store.where!r}: run {other['run']} writes there (process "
            f"{other['pid']} on {other['host']}, since {other['since']}); give another folder, or "
            f"wait for its end (if it has ended, remove {CLAIM} there)"
        )
    store.write(CLAIM, _dumped(mine))


def _read(store: Storage) -> dict[str, Any] | None:
    """Return the claim in the folder, if there is a valid one."""
    try:
        claim = json.loads(store.read(CLAIM))
        kinds = {"run": str, "host": str, "pid": int, "born": float, "since": str, "renewed": float}
        return claim if all(isinstance(claim[k], kind) for k, kind in kinds.items()) else None
    except (SnapshotError, ValueError, KeyError, TypeError):
        return None


def _goes_on(claim: dict[str, Any], host: str) -> bool:
    if claim["host"] != host:
        return bool(time.time() - claim["renewed"] < STALE_SECONDS)
    try:
        return bool(abs(psutil.Process(claim["pid"]).create_time() - claim["born"]) < 1)
    except psutil.NoSuchProcess:
        return False


def _renew(store: Storage, mine: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(RENEWAL_SECONDS):
        with suppress(SnapshotError):  # (a disk that fails is said elsewhere)
            store.write(CLAIM, _dumped(mine))
