"""The data sets that settings can name: scikit-learn's digits and Fashion-MNIST.

B: batch, N: images of a part. A data set is a portable stream of its training part, and its
held-out part as two tensors. The held-out part never depends on the seed.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import StreamError, need_package
from hamdist.streams.sample import Sample, SampleSpec, Stream
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.parts import without_test

FASHION_CLASSES = 10
FASHION_SIDE = 28
FASHION_MEAN = 0.286  # of the training pixels, on a scale of 0 to 1
FASHION_STD = 0.353

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "held-out": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_INSTALL = "sudo apt-get install dataset-fashion-mnist"
_HOW = (
    f"get it by '{FASHION_INSTALL}' (Debian, Ubuntu), or anywhere by 'git clone --depth 1 "
    "https://github.com/zalandoresearch/fashion-mnist' and '--set "
    "stream.path=fashion-mnist/data/fashion'; stream.path may be any folder that holds "
    + ", ".join(name for names in _FILES.values() for name in names)
    + " (with or without .gz)"
)


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set in two parts.

    Attributes:
        train: an endless stream of the training part.
        x: the inputs (N, F) of the held-out part.
        y: its targets (N,) int64.
    """

    train: Stream
    x: Tensor
    y: Tensor


def digits(batch: int, seed: int, dtype: torch.dtype, *, validation: bool = False) -> DataSet:
    """Return scikit-learn's handwritten digits: 1797 images of 8 x 8, 10 classes, no download.

    Items: u (B, 64) of `dtype`, y (B,) int64. Of each class every fifth image, counted from the
    third, is held out (20 %, stratified). Pixels are standardised with the mean and the standard
    deviation of all pixels of the training part; per-pixel factors would blow up the pixels that
    are nearly always blank.

    Args:
        validation: hold out a sixth of the training part instead (sources/parts.py).

    Raises:
        SettingsError: `batch` is below 1.
    """
    pixels, targets = _digits()
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(10):
        held[(targets == label).nonzero().squeeze(1)[2::5]] = True
    train = pixels[~held]
    pixels = ((pixels - train.mean()) / train.std(correction=0)).to(dtype)
    x, y, x_held, y_held = pixels[~held], targets[~held], pixels[held], targets[held]
    if validation:
        x, y, x_held, y_held = without_test(x, y)
    return DataSet(ArrayStream(x, y, batch, seed, classes=10), x_held, y_held)


def _digits() -> tuple[Tensor, Tensor]:
    """Return all digits: pixels (1797, 64) float64, targets (1797,) int64.

    They are read from scikit-learn's own file: `import sklearn` takes a second.
    """
    need_package("sklearn", "scikit-learn", "stream.source digits, which reads its data set")
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as text:
                table = np.loadtxt(text, delimiter=",")
            return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].astype(np.int64))
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.data.astype(np.float64))
    return pixels, torch.from_numpy(bunch.target.astype(np.int64))


def fashion_mnist(
    batch: int,
    seed: int,
    dtype: torch.dtype,
    path: Path | str | None = None,
    *,
    validation: bool = False,
) -> DataSet:
    """Read Fashion-MNIST from IDX files: 60 000 images of 28 x 28, 10 classes, 10 000 held out.

    Items: u (B, 784) of `dtype`, (pixel/255 - 0.286) / 0.353; y (B,) int64. The files may be
    gzipped. Any data set of that format and size of image will do; the number of images is free.
    The stream keeps bytes and scales batch by batch.

    Args:
        path: folder of the files; None: share/datasets/fashion-mnist of sys.prefix, /usr and
            /usr/local.
        validation: hold out a sixth of the training part instead (sources/parts.py).

    Raises:
        StreamError: files are missing (the message says how to get them) or are no IDX files of
            such images and labels (it names the file).
        SettingsError: `batch` is below 1.
    """
    folder = find_fashion_mnist(path)
    images, labels = _part(folder, "train")
    if validation:
        images, labels, x, y = without_test(images, labels)
    else:
        x, y = _part(folder, "held-out")
    train = ArrayStream(images, labels, batch, seed, classes=FASHION_CLASSES)
    return DataSet(_Standardised(train, dtype), _standardise(x, dtype), y.to(torch.int64))


def fashion_mnist_folders() -> tuple[Path, ...]:
    """Return the folders in which `fashion_mnist` looks without a path, in this order."""
    prefixes = dict.fromkeys((sys.prefix, "/usr", "/usr/local"))
    return tuple(Path(prefix, "share", "datasets", "fashion-mnist") for prefix in prefixes)


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
        raise StreamError(f"{path}: its header announces {_by(shape)} values, that is none")
    if len(raw) < header + size:
        raise StreamError(
            f"{path}: truncated: {_by(shape)} values announced, {len(raw) - header} of {size} "
            "bytes there: get it again"
        )
    if len(raw) > header + size:
        raise StreamError(
            f"{path}: {len(raw) - header - size} bytes follow after the {_by(shape)} values that "
            "its header announces: get it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


class _Standardised:
    """Standardised, flat images (B, H*W) of a stream of bytes (B, H, W)."""

    portable: bool = True

    def __init__(self, stream: ArrayStream, dtype: torch.dtype) -> None:
        self._stream = stream
        self._dtype = dtype

    @property
    def spec(self) -> SampleSpec:
        inner = self._stream.spec
        flat = (inner.batch, math.prod(inner.u_shape[1:]))
        return replace(inner, u_shape=flat, u_dtype=self._dtype)

    def samples(self) -> Iterator[Sample]:
        for sample in self._stream.samples():
            yield replace(sample, u=_standardise(sample.u, self._dtype))


def _standardise(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.flatten(1).to(dtype).div_(255).sub_(FASHION_MEAN).div_(FASHION_STD)


def find_fashion_mnist(path: Path | str | None = None) -> Path:
    """Return the folder that `fashion_mnist` reads: the first one that holds all four files.

    Args:
        path: the folder to look in; None: those of `fashion_mnist_folders`.

    Raises:
        StreamError: files are missing; the message says which, and how to get them.
    """
    folders = fashion_mnist_folders() if path is None else (Path(path).expanduser(),)
    names = [name for part in _FILES.values() for name in part]
    missing = []
    for folder in folders:
        absent = [name for name in names if _file(folder, name) is None]
        if not absent:
            return folder
        what = "all four files" if len(absent) == len(names) else ", ".join(absent)
        missing.append(f"{folder} ({what} missing)")
    raise StreamError(f"no Fashion-MNIST in {'; '.join(missing)}: {_HOW}")


def _file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) and labels (N,), both uint8, of one part of the data set."""
    images_file, labels_file = (_file(folder, name) or folder / name for name in _FILES[part])
    images, labels = _remembered(images_file, 3), _remembered(labels_file, 1)
    if images.shape[1:] != (FASHION_SIDE, FASHION_SIDE):
        raise StreamError(
            f"{images_file}: images of {_by(images.shape[1:])} pixels, "
            f"expected {FASHION_SIDE} x {FASHION_SIDE}"
        )
    if len(images) != len(labels):
        raise StreamError(
            f"{images_file} has {len(images)} images and {labels_file} has {len(labels)} labels: "
            "they do not belong together"
        )
    if int(labels.max()) >= FASHION_CLASSES:
        at = int((labels >= FASHION_CLASSES).nonzero()[0])
        raise StreamError(
            f"{labels_file}: label {at} is {int(labels[at])}, expected 0 to {FASHION_CLASSES - 1}"
        )
    return images, labels


def _remembered(path: Path, dimensions: int) -> Tensor:
    """Return `read_idx(path)`, read once per process while the file does not change.

    A run reads it for its stream and again to be scored, and a study makes many runs.
    """
    if not path.is_file():
        return read_idx(path, dimensions)
    found = path.stat()
    return _read_once(path, dimensions, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=sum(map(len, _FILES.values())))
def _read_once(path: Path, dimensions: int, changed: int, size: int) -> Tensor:  # noqa: ARG001
    return read_idx(path, dimensions)


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise StreamError(f"{path}: cannot be read: {error}: get it again") from error


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
