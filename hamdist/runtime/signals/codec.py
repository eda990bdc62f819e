"""Codecs that send signals in fewer bytes. Receivers see decode(encode(x)), in every engine.

The codes of vectors are in codes.py. Each row of int8 has a scale of its own, for a row is a
sample: one that is well predicted sends messages orders of magnitude smaller than those of its
neighbours in the batch, and one scale for all would round them to zero. It costs 4 bytes a row (8
of float64), and confines a number that is not finite to its row. The shorter codes take the last
dimension of a signal as a vector where it is long enough, so that tokens of a sequence have scales
of their own, too.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019) adds the error of a signal to the next:

    v_n = x_n + e_{n-1},    sent: encode(v_n),    e_n = v_n - decode(encode(v_n))

so that the decoded signals sum up to the exact ones but for the last error: sum_n d_n = sum_n x_n
- e_N. That helps where a receiver adds its signals up. Where each is used on its own, as the state
of one sample among others, it only exchanges an error e_n for e_n - e_{n-1}, of twice the variance.

Delta coding (closed loop, as in differential pulse-code modulation, Cutler 1952) sends the
difference to what the receiver has, by int4:

    sent: encode(x_n - r_{n-1}),    r_n = r_{n-1} + decode(sent)

where both sides have r_n, which is what the receiver sees. Its error is that of the difference
alone; none adds up. A signal that goes as it is leaves r as it was; with another batch size r
starts again at zero. `codebook` (codebook.py) sends the difference to one of many vectors, whose
table is r.

Behind a `Subspace` the signals x of all codes are the coefficients Q^T x, and receivers see Q d
(dynamics/modules/subspace.py). What a message loses by it has no effect on its block.

B: batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hamdist.config import Compress
from hamdist.dynamics.modules.subspace import Subspace, coefficients, lifted
from hamdist.dynamics.native.rows import norm
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.runtime.signals.codebook import CodebookCode
from hamdist.runtime.signals.codes import (
    ByteCode,
    Code,
    ExactCode,
    HalfCode,
    LargestCode,
    NibbleCode,
)

LONG = 64  # numbers of a last dimension from which on it is a vector of its own
WHOLE_ROWS = (Compress.FP16, Compress.BF16, Compress.INT8)


@dataclass(frozen=True, slots=True)
class Codec:
    """The encoding of one direction of an edge.

    Attributes:
        name: of the code; never 'none'.
        dtype: of the exact signal.
        row: shape of the exact signal without the batch.
        feedback: True if the sender adds the error of each signal to the next.
        seed: of the run, which draws the signs of rotations.
        share: of the numbers, that 'topk' sends.
        rank: of the subspace to which the signal belongs; 0 for none.
        basis: the seed that draws the subspace.
    """

    name: Compress
    dtype: torch.dtype
    row: tuple[int, ...]
    feedback: bool = False
    seed: int = 0
    share: float = 1 / 16
    rank: int = 0
    basis: int = 0

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

    @property
    def bytes_share(self) -> float:
        """Return the bytes of an encoded signal as a share of the exact one's."""
        return self.nbytes(1) / (math.prod(self.row) * self.dtype.itemsize)

    def nbytes(self, batch: int) -> int:
        """Return the bytes of an encoded signal (batch, *row)."""
        n = self._vector
        return batch * self._places * self._code().nbytes(n)

    @property
    def coded_row(self) -> tuple[int, ...]:
        """Return the shape of a row of what is encoded: of the signal, or of its coefficients."""
        return (*self.row[:-1], self.rank) if self.rank else self.row

    @property
    def delta(self) -> bool:
        """Return True if differences are sent."""
        return self.name is Compress.DELTA

    @property
    def _vector(self) -> int:
        """Return n, the numbers of a vector."""
        row = self.coded_row
        long = self.name not in WHOLE_ROWS and row[-1:] >= (LONG,)
        return row[-1] if long else math.prod(row)

    @property
    def _places(self) -> int:
        """Return the vectors of a row."""
        return math.prod(self.coded_row) // self._vector

    def _code(self, received: Tensor | None = None) -> Code:
        if self.name in (Compress.FP16, Compress.BF16):
            return HalfCode(torch.bfloat16 if self.name is Compress.BF16 else torch.float16)
        if self.name is Compress.INT8:
            return ByteCode(self._real)
        if self.name is Compress.SUBSPACE:
            return ExactCode(self.dtype)
        if self.name is Compress.CODEBOOK:
            return CodebookCode(self.seed, self._places, received)
        return LargestCode(self.share) if self.name is Compress.TOPK else NibbleCode(self.seed)

    @property
    def _real(self) -> torch.dtype:
        """Return the type in which codes compute, which is also the type of a scale of int8."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def inner(self, x: Tensor) -> Tensor:
        """Return what is encoded of a signal x, (B, *row): x, or its coefficients."""
        if not self.rank or x.dtype != self.dtype or x.shape[1:] != self.row:
            return x
        vectors = x.reshape(-1, self.row[-1]).to(self._real)
        sizes = coefficients(vectors, self.rank, self.basis)
        return sizes.to(self.dtype).view(len(x), *self.coded_row)

    def outer(self, x: Tensor) -> Tensor:
        """Return the signal, (B, *row), of what `inner` gives, or nearly gives."""
        if not self.rank:
            return x
        vectors = lifted(x.reshape(-1, self.rank).to(self._real), self.row[-1], self.basis)
        return vectors.to(self.dtype).view(len(x), *self.row)

    def encode(self, x: Tensor, received: Tensor | None = None) -> Tensor:
        """Encode x, (B, *coded_row), as (B, ...), in another type.

        A signal that is not finite, or too large for the type, is returned unchanged.

        Args:
            received: the table of `codebook`.
        """
        if x.dtype != self.dtype or x.shape[1:] != self.coded_row or not x.numel():
            return x
        sent = self._code(received).encode(x.reshape(-1, self._vector).to(self._real))
        return x if sent is None else sent.view(len(x), -1)

    def decode(self, sent: Tensor, received: Tensor | None = None) -> Tensor:
        """Return the nearest approximation of the tensor given to `encode`."""
        if sent.dtype == self.dtype:
            return sent
        vectors = sent.reshape(len(sent) * self._places, -1)
        decoded = self._code(received).decode(vectors, self._vector, self._real)
        return decoded.to(self.dtype).view(-1, *self.coded_row)

    def learned(self, received: Tensor | None, sent: Tensor, decoded: Tensor) -> Tensor | None:
        """Return what both ends know after a signal that was encoded, (B, ...)."""
        if self.delta:
            return _added(received, decoded)
        code = self._code(received)
        if not isinstance(code, CodebookCode):
            return None
        vectors = decoded.reshape(-1, self._vector).to(self._real)
        return code.learned(sent.reshape(len(vectors), -1), vectors)


def subspace_of(module: nn.Module) -> Subspace | None:
    """Return the `Subspace` in which a block's module ends, if it does."""
    *_, last = module.modules()
    return last if isinstance(last, Subspace) else None


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


class Encoder(Stateful):
    """The sending end of one direction of an edge.

    Attributes:
        error: e_n; starts again at zero when the batch changes its size.
        received: r_n, of delta coding (as `error`), or the table of `codebook`.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.error: Tensor | None = None
        self.received: Tensor | None = None
        self._signals = self._sent = self._saved = self._compared = 0
        self._sum = self._worst = 0.0

    STATE = ("error", "received", "_signals", "_sent", "_saved", "_compared", "_sum", "_worst")
    ADDED: ClassVar = {"received": None}

    def __call__(self, x: Tensor) -> Tensor:
        """Encode x, (B, *row)."""
        v = exact = self.codec.inner(x)
        if self.error is not None and self.error.shape == exact.shape:
            v = exact + self.error
        elif self.received is not None and self.received.shape == exact.shape:
            v = exact - self.received
        sent = self.codec.encode(v, self.received)
        if sent is v:  # as it is, and what is owed stays owed
            sent = exact = decoded = x
        else:
            decoded = self.codec.decode(sent, self.received)
            if self.codec.feedback:
                self.error = v - decoded
            self.received = self.codec.learned(self.received, sent, decoded)
            if self.codec.delta and self.received is not None:
                decoded = self.received
        self._note(x.nbytes, exact, sent, decoded)
        return sent

    def _note(self, nbytes: int, x: Tensor, sent: Tensor, decoded: Tensor) -> None:
        self._signals += 1
        self._sent += sent.nbytes
        self._saved += nbytes - sent.nbytes
        size = _norm(x)
        if 0 < size < math.inf:
            apart = 0.0
            if decoded is not x:
                apart = _norm(decoded - x) / size
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


class Decoder:
    """The receiving end of one direction of an edge.

    Attributes:
        received: r_n, of delta coding, or the table of `codebook`.
    """

    def __init__(self, codec: Codec, received: Tensor | None = None) -> None:
        self.codec = codec
        self.received = received

    def __call__(self, sent: Tensor) -> Tensor:
        """Return what the receiver sees of a signal, (B, *row)."""
        decoded = self.codec.decode(sent, self.received)
        if decoded is sent:
            return sent
        self.received = self.codec.learned(self.received, sent, decoded)
        if self.codec.delta and self.received is not None:
            decoded = self.received.detach()  # (a reader may ask for its gradient)
        return self.codec.outer(decoded)


def _norm(x: Tensor) -> float:
    """Return |x|, of sums in float64."""
    size = norm(x)
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) if size is None else size


def _added(received: Tensor | None, difference: Tensor) -> Tensor:
    fits = received is not None and received.shape == difference.shape
    return received + difference if fits and received is not None else difference
