"""Codes: numbers in fewer bytes, vector by vector.

    fp16, bf16   the nearest number of the type                          2 bytes a number
    int8         s = max_j |x_j| / 127,  q_j = round(x_j / s)
                 decoded: s q_j, off by at most s / 2                    1 byte, and s
    int4         y = R x,  s = max_j |y_j| / 7,  q_j = round(y_j / s)
                 decoded: R^T (s q)                                      1/2 byte, and 2 of s
    topk         the k = share n numbers of largest |x_j|, others 0      4 bytes of each of the k
    subspace     x as it is                                              as x

R rotates (dynamics/modules/subspace.py): few large numbers among small ones, which would take the
whole range of q, are spread over all (QuaRot, Ashkboos et al. 2024).

top-k: Aji and Heafield 2017; Stich et al. 2018. n: numbers of a vector; N: vectors.
A new code also gets its name in config/sections/engine.py, and its place in codec.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.dynamics.modules.subspace import rotated, rotated_back, signs_of
from hamdist.dynamics.native.rotation import from_nibbles, to_nibbles

BYTE = torch.uint8
SCALE = torch.bfloat16  # of int4: the range of float32, in half its bytes


class Code(ABC):
    """A form of vectors on their way; a function of each vector alone."""

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """Return the bytes of an encoded vector.

        Args:
            n: its numbers.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor | None:
        """Encode vectors.

        Args:
            x: N vectors, (N, n), of a floating-point type.

        Returns:
            (N, ...), `nbytes(n)` bytes of each; None, so that x goes as it is, if numbers would
            be lost.
        """

    @abstractmethod
    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:
        """Return the approximation of encoded vectors.

        Args:
            sent: as of `encode`, (N, ...).
            n: numbers of a vector.
            real: the type of the vectors.

        Returns:
            (N, n), of type `real` or of one that is shorter.
        """


@dataclass(frozen=True, slots=True)
class HalfCode(Code):
    """The nearest numbers of a type of two bytes."""

    dtype: torch.dtype

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize

    def encode(self, x: Tensor) -> Tensor | None:
        half = x.to(self.dtype)
        return half if bool(torch.isfinite(half).all()) else None

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:  # noqa: ARG002
        return sent


@dataclass(frozen=True, slots=True)
class ExactCode(Code):
    """The numbers of type `dtype` themselves."""

    dtype: torch.dtype

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize

    def encode(self, x: Tensor) -> Tensor | None:
        return x.to(self.dtype).view(BYTE)

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:  # noqa: ARG002
        return _numbers(sent, self.dtype)


@dataclass(frozen=True, slots=True)
class ByteCode(Code):
    """int8, and a scale of type `real`."""

    real: torch.dtype
    levels = 127

    def nbytes(self, n: int) -> int:
        return n + self.real.itemsize

    def encode(self, x: Tensor) -> Tensor | None:
        coded = quantised(x, self.levels, self.real)
        return None if coded is None else torch.cat([coded[0], coded[1].view(torch.int8)], 1)

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:
        return sent[:, :n].to(real) * _numbers(sent[:, n:], self.real)


@dataclass(frozen=True, slots=True)
class NibbleCode(Code):
    """int4 of the rotated vector, two in a byte, and a scale; `seed` draws the signs."""

    seed: int
    levels = 7

    def nbytes(self, n: int) -> int:
        return (n + 1) // 2 + SCALE.itemsize

    def encode(self, x: Tensor) -> Tensor | None:
        native = to_nibbles(x.detach(), signs_of(x.shape[1], self.seed, x.dtype, x.device))
        if native is not None:
            return native[0]
        coded = quantised(rotated(x, self.seed), self.levels, SCALE)
        if coded is None:
            return None
        q = torch.nn.functional.pad(coded[0] + (self.levels + 1), (0, x.shape[1] % 2)).to(BYTE)
        return torch.cat([q[:, ::2] | q[:, 1::2] << 4, coded[1].view(BYTE)], 1)

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:
        native = from_nibbles(sent, signs_of(n, self.seed, real, sent.device), n)
        if native is not None:
            return native
        pairs = sent[:, : -SCALE.itemsize]
        q = torch.stack([pairs & 15, pairs >> 4], 2).view(len(sent), -1)[:, :n]
        scale = _numbers(sent[:, -SCALE.itemsize :], SCALE).to(real)
        return rotated_back((q.to(real) - (self.levels + 1)) * scale, self.seed)


@dataclass(frozen=True, slots=True)
class LargestCode(Code):
    """The `share` of numbers of the largest size, as places and numbers of two bytes."""

    share: float

    def nbytes(self, n: int) -> int:
        return self._count(n) * (_place(n).itemsize + SCALE.itemsize)

    def _count(self, n: int) -> int:
        return max(1, round(self.share * n))

    def encode(self, x: Tensor) -> Tensor | None:
        n = x.shape[1]
        places = x.abs().topk(self._count(n), 1).indices  # (first those that are not finite)
        numbers = x.gather(1, places).to(SCALE)
        if not bool(torch.isfinite(numbers).all()):
            return None
        return torch.cat([places.to(_place(n)).view(BYTE), numbers.view(BYTE)], 1)

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:
        ends = self._count(n) * _place(n).itemsize
        places = _numbers(sent[:, :ends], _place(n)).to(torch.int64)
        numbers = _numbers(sent[:, ends:], SCALE).to(real)
        return numbers.new_zeros(len(sent), n).scatter_(1, places, numbers)


def _place(n: int) -> torch.dtype:
    """Return the type of a place among n numbers."""
    return torch.int16 if n <= 2**15 else torch.int32


def quantised(x: Tensor, levels: int, scale: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return round(x / s), int8 between -levels and levels, and s, (N, 1).

    None if a scale is not finite. A vector of zeros has the scale 0; where a scale is rounded much
    (among the smallest numbers of all), the largest quotient may lie beyond the levels.
    """
    s = (x.abs().amax(1, keepdim=True) / levels).to(scale)
    if not bool(torch.isfinite(s).all()):
        return None
    quotients = x / s.masked_fill(s == 0, 1).to(x.dtype)
    return quotients.round_().clamp_(-levels, levels).to(torch.int8), s


def _numbers(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of type `dtype` that bytes (N, ...) stand for."""
    return sent.clone(memory_format=torch.contiguous_format).view(dtype)
