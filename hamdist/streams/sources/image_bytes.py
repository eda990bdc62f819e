"""The bytes of files of images: IDX files, and records of CIFAR-10's binary version."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import StreamError

REMEMBERED = 16  # files


def file_bytes(path: Path, name: str | int) -> Tensor:
    """Return the bytes of a file, read once per process while the file does not change.

    A run reads it for its stream and again to be scored, and a study makes many runs.
    name: 'images' or 'labels' of an IDX file, or the bytes of a record.
    """
    if not path.is_file():
        return _contents(path, name)
    status = path.stat()
    return _read_once(path, name, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=REMEMBERED)
def _read_once(path: Path, name: str | int, changed: int, size: int) -> Tensor:  # noqa: ARG001
    return _contents(path, name)


def _contents(path: Path, name: str | int) -> Tensor:
    if isinstance(name, str):
        return read_idx(path, 3 if name == "images" else 1)
    raw = _read(path)
    if not raw or len(raw) % name:
        raise StreamError(
            f"{path}: {len(raw)} bytes are no multiple of {name}, a label and an image: is it "
            "another file (not the binary version), or cut off? Get it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, name).copy())


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read the bytes of an IDX file, plain or gzipped, as a uint8 tensor of `dimensions` axes.

    Format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension
    as a big-endian 32-bit number, then the bytes, the last dimension fastest.

    Raises:
        StreamError: names the file that cannot be read, begins with another magic number, holds
            nothing, ends early, or continues after its last byte.
    """
    raw = _read(path)
    magic = bytes((0, 0, 8, dimensions))
    if raw[:4] != magic:
        raise StreamError(
            f"{path}: begins with {raw[:4].hex(' ') or 'nothing'}, but an IDX file of unsigned "
            f"bytes in {dimensions} dimensions begins with {magic.hex(' ')}: is it another file?"
        )
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise StreamError(
            f"{path}: ends after {len(raw)} bytes, inside its header of {header}: get it again"
        )
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    size = math.prod(shape)
    if size == 0:
        raise StreamError(f"{path}: its header announces {by(shape)} values, that is none")
    if len(raw) < header + size:
        raise StreamError(
            f"{path}: truncated: {by(shape)} values announced, {len(raw) - header} of {size} "
            "bytes there: get it again"
        )
    if len(raw) > header + size:
        raise StreamError(
            f"{path}: {len(raw) - header - size} bytes follow after the {by(shape)} values that "
            "its header announces: get it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise StreamError(f"{path}: cannot be read: {error}: get it again") from error


def by(shape: tuple[int, ...]) -> str:
    """Return a shape as text, such as 3 x 32 x 32."""
    return " x ".join(map(str, shape))
