"""Folders for snapshots: of this host, of a shared file system, or by URL (s3://, gs://, ...).

Files appear whole or not at all: in a folder by writing another file, forcing it to the disk and
renaming it; object stores do so by themselves.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from hamdist.errors import SnapshotError


class Storage(Protocol):
    """Where the files of snapshots lie; names are relative, with '/'."""

    where: str

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes: ...

    def folders(self) -> list[str]:
        """The names of the folders in it; none where it does not exist yet."""

    def remove(self, folder: str) -> None:
        """Removes a folder of files."""


def storage(where: str | Path) -> Storage:
    """Raises SnapshotError for a URL that no installed file system knows."""
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
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise SnapshotError(f"{path}: cannot be written: {error.strerror or error}") from None

    def read(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except OSError as error:
            raise SnapshotError(
                f"{self._path / name}: cannot be read: {error.strerror or error}"
            ) from None

    def folders(self) -> list[str]:
        try:
            return sorted(p.name for p in self._path.iterdir() if p.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SnapshotError(
                f"{self._path}: cannot be read: {error.strerror or error}"
            ) from None

    def remove(self, folder: str) -> None:
        path = self._path / folder
        try:
            for file in sorted(path.iterdir(), key=lambda f: f.name != "manifest.json"):
                file.unlink(missing_ok=True)  # the manifest first: no half snapshot has one
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be removed: {error.strerror or error}") from None


class _Remote:
    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]  # (file systems for clouds are packages)

        self.where = url
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SnapshotError(f"{url}: no file system for it is installed: {error}") from None

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        try:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)
        except OSError as error:
            raise SnapshotError(f"{self.where}/{name}: cannot be written: {error}") from None

    def read(self, name: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))
        except OSError as error:
            raise SnapshotError(f"{self.where}/{name}: cannot be read: {error}") from None

    def folders(self) -> list[str]:
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SnapshotError(f"{self.where}: cannot be read: {error}") from None
        names = (str(f["name"]) for f in found if f["type"] == "directory")
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def remove(self, folder: str) -> None:
        path = f"{self._root}/{folder}"
        try:
            if self._fs.exists(f"{path}/manifest.json"):
                self._fs.rm_file(f"{path}/manifest.json")
            self._fs.rm(path, recursive=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise SnapshotError(f"{self.where}/{folder}: cannot be removed: {error}") from None
