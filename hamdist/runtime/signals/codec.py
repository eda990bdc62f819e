"""Signals in fewer bytes. What a receiver sees is decode(encode(x)), in every engine.

    fp16, bf16   the nearest number of the type                     2 bytes a number
    int8         by row b of x, (B, ...):
                 s_b = max_j |x_bj| / 127,  q_bj = round(x_bj / s_b)
                 decoded: s_b q_bj, off by at most s_b / 2          1 byte a number, and s_b

Each row has a scale of its own, for a row is a sample: what is well predicted sends messages that
are orders of magnitude smaller than those of its neighbours in the batch, and one scale for all
would round them to zero. It costs 4 bytes a row (8 of float64), and keeps a number that is not
finite from spoiling more than it has to.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019) adds what was lost to the next signal:

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
from hamdist.dynamics.state.remember import Remembers

LEVELS = 127  # of an int8, on either side of zero


@dataclass(frozen=True, slots=True)
class Codec:
    """The form of one direction's signals on their way.

    name: never 'none'. dtype: of the exact signal. row: its shape without the batch. feedback:
    whether the sender keeps what was lost, for the next signal.
    """

    name: Compress
    dtype: torch.dtype
    row: tuple[int, ...]
    feedback: bool = False

    @property
    def pays(self) -> bool:
        """Whether it saves bytes: not of integers, of types that are as short, and where a row is
        too short to bear a scale."""
        if not self.dtype.is_floating_point:
            return False
        exact = math.prod(self.row) * self.dtype.itemsize
        return exact > 0 and self.nbytes(1) < exact

    def nbytes(self, batch: int) -> int:
        """Of a signal (B, *row), encoded."""
        n = math.prod(self.row)
        a_row = n + self._real.itemsize if self.name is Compress.INT8 else n * self._half.itemsize
        return batch * a_row

    @property
    def _half(self) -> torch.dtype:
        return torch.bfloat16 if self.name is Compress.BF16 else torch.float16

    @property
    def _real(self) -> torch.dtype:
        """What int8 computes in, and the type of a scale."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def encode(self, x: Tensor) -> Tensor:
        """x, (B, *row), in few bytes: int8 as (B, n + the bytes of a scale), else like x.

        A signal that does not fit goes as it is: one that is not finite, or too large for the type.
        """
        fits = x.dtype == self.dtype and x.shape[1:] == self.row and x.numel() > 0
        coded = self._coded(x) if fits else None
        return x if coded is None else coded

    def _coded(self, x: Tensor) -> Tensor | None:
        """None where numbers would get lost."""
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
        """What `encode` was given, as near as it may be; (B, *row)."""
        if sent.dtype == self.dtype:
            return sent
        if self.name is not Compress.INT8:
            return sent.to(self.dtype)
        n = math.prod(self.row)
        scale = sent[:, n:].clone(memory_format=torch.contiguous_format).view(self._real)
        return (sent[:, :n].to(self._real) * scale).to(self.dtype).view(-1, *self.row)


@dataclass(frozen=True, slots=True)
class Compressed:
    """What compression did to one direction of an edge.

    codec: its name. feedback: whether errors were fed back. signals: with a payload; sent, saved:
    bytes. mean, worst: |decoded - exact| / |exact| over the signals that were not zero.
    """

    codec: str
    feedback: bool
    signals: int
    sent: int
    saved: int
    mean: float
    worst: float


class Encoder(Remembers):
    """The sending end of one direction of an edge. error: e, as long as the batch keeps its size;
    it begins anew with another one."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.error: Tensor | None = None
        self._signals = self._sent = self._saved = self._compared = 0
        self._sum = self._worst = 0.0

    STATE = ("error", "_signals", "_sent", "_saved", "_compared", "_sum", "_worst")

    def __call__(self, x: Tensor) -> Tensor:
        """What is sent for x, (B, *row)."""
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
        """What it did so far."""
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
