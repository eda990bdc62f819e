"""Codecs that send signals in fewer bytes. Receivers see decode(encode(x)), in every engine.

    fp16, bf16   the nearest number of the type                     2 bytes a number
    int8         by row b of x, (B, ...):
                 s_b = max_j |x_bj| / 127,  q_bj = round(x_bj / s_b)
                 decoded: s_b q_bj, off by at most s_b / 2          1 byte a number, and s_b

Each row has a scale of its own, for a row is a sample: a sample that is well predicted sends
messages orders of magnitude smaller than those of its neighbours in the batch, and one scale for
all would round them to zero. It costs 4 bytes a row (8 of float64), and confines a number that is
not finite to its row.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019) adds the error of a signal to the next:

    v_n = x_n + e_{n-1},    sent: encode(v_n),    e_n = v_n - decode(encode(v_n))

so that the decoded signals sum up to the exact ones but for the last error: sum_n d_n = sum_n x_n
- e_N. That helps where a receiver adds its signals up. Where each is used on its own, as the state
of one sample among others, it only exchanges an error e_n for e_n - e_{n-1}, of twice the variance.

B: batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.config import Compress
from hamdist.dynamics.saved_state.remember import Remembers

LEVELS = 127  # of an int8, on either side of zero


@dataclass(frozen=True, slots=True)
class Codec:
    """The encoding of one direction of an edge.

    Attributes:
        name: of the code; never 'none'.
        dtype: of the exact signal.
        row: shape of the exact signal without the batch.
        feedback: True if the sender adds the error of each signal to the next.
    """

    name: Compress
    dtype: torch.dtype
    row: tuple[int, ...]
    feedback: bool = False

    @property
    def pays(self) -> bool:
        """Return True if encoding saves bytes.

        It does not for integers, for types that are as short, and for rows too short to carry a
        scale.
        """
        if not self.dtype.is_floating_point:
            return False
        exact = math.prod(self.row) * self.dtype.itemsize
        return exact > 0 and self.nbytes(1) < exact

    def nbytes(self, batch: int) -> int:
        """Return the bytes of an encoded signal (batch, *row)."""
        n = math.prod(self.row)
        a_row = n + self._real.itemsize if self.name is Compress.INT8 else n * self._half.itemsize
        return batch * a_row

    @property
    def _half(self) -> torch.dtype:
        return torch.bfloat16 if self.name is Compress.BF16 else torch.float16

    @property
    def _real(self) -> torch.dtype:
        """Return the type in which int8 computes, which is also the type of a scale."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def encode(self, x: Tensor) -> Tensor:
        """Encode x, (B, *row): int8 as (B, n + the bytes of a scale), other codes in the shape of
        x.

        A signal that is not finite, or too large for the type, is returned unchanged.
        """
        fits = x.dtype == self.dtype and x.shape[1:] == self.row and x.numel() > 0
        coded = self._coded(x) if fits else None
        return x if coded is None else coded

    def _coded(self, x: Tensor) -> Tensor | None:
        """Return the encoded signal; None if numbers would be lost."""
        if self.name is not Compress.INT8:
            half = x.to(self._half)
            return half if bool(torch.isfinite(half).all()) else None
        rows = x.reshape(x.shape[0], -1).to(self._real)
        scale = rows.abs().amax(1, keepdim=True).div_(LEVELS)
        if not bool(torch.isfinite(scale).all()):
            return None
        # A row of zeros has the scale 0; among the smallest numbers of all a scale is rounded so
        # much that the largest quotient may lie beyond 127.
        quotients = rows / scale.masked_fill(scale == 0, 1)
        levels = quotients.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
        return torch.cat([levels, scale.view(torch.int8)], 1)

    def decode(self, sent: Tensor) -> Tensor:
        """Return the nearest approximation of the tensor given to `encode`, (B, *row)."""
        if sent.dtype == self.dtype:
            return sent
        if self.name is not Compress.INT8:
            return sent.to(self.dtype)
        n = math.prod(self.row)
        scale = sent[:, n:].clone(memory_format=torch.contiguous_format).view(self._real)
        return (sent[:, :n].to(self._real) * scale).to(self.dtype).view(-1, *self.row)


@dataclass(frozen=True, slots=True)
class Compressed:
    """Result of the compression of one direction of an edge.

    Attributes:
        codec: name of the code.
        feedback: True if errors were fed back.
        signals: number of signals with a payload.
        sent, saved: bytes.
        mean, worst: |decoded - exact| / |exact| over the signals that were not zero.
    """

    codec: str
    feedback: bool
    signals: int
    sent: int
    saved: int
    mean: float
    worst: float


class Encoder(Remembers):
    """The sending end of one direction of an edge.

    Attributes:
        error: e_n; starts again at zero when the batch changes its size.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.error: Tensor | None = None
        self._signals = self._sent = self._saved = self._compared = 0
        self._sum = self._worst = 0.0

    STATE = ("error", "_signals", "_sent", "_saved", "_compared", "_sum", "_worst")

    def __call__(self, x: Tensor) -> Tensor:
        """Encode x, (B, *row)."""
        v = x
        if self.codec.feedback and self.error is not None and self.error.shape == x.shape:
            v = x + self.error
        sent = self.codec.encode(v)
        if sent is v:  # as it is, and what is owed stays owed
            sent = decoded = x
        else:
            decoded = self.codec.decode(sent)
            if self.codec.feedback:
                self.error = v - decoded
        self._note(x, sent, decoded)
        return sent

    def _note(self, x: Tensor, sent: Tensor, decoded: Tensor) -> None:
        self._signals += 1
        self._sent += sent.nbytes
        self._saved += x.nbytes - sent.nbytes
        size = float(torch.linalg.vector_norm(x, dtype=torch.float64))
        if 0 < size < math.inf:
            apart = 0.0
            if decoded is not x:
                apart = float(torch.linalg.vector_norm(decoded - x, dtype=torch.float64)) / size
            self._compared += 1
            self._sum += apart
            self._worst = max(self._worst, apart)

    def result(self) -> Compressed:
        """Return the result of the compression so far."""
        mean = self._sum / self._compared if self._compared else 0.0
        return Compressed(
            codec=self.codec.name.value,
            feedback=self.codec.feedback,
            signals=self._signals,
            sent=self._sent,
            saved=self._saved,
            mean=mean,
            worst=self._worst,
        )
