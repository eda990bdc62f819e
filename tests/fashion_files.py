"""Small files in the format of Fashion-MNIST, so that no test needs the data set."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_fashion(folder: Path, *, train: int = 12, held: int = 7, zipped: bool = False) -> None:
    """Images whose pixels are all their own number; the label is that number modulo 10."""
    for part, many in (("train", train), ("t10k", held)):
        numbers = np.arange(many, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (many, 28, 28))
        for name, values in zip(NAMES[part], (images, numbers % 10), strict=True):
            raw = idx(values)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
