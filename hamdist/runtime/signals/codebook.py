"""Signals by the nearest of 256 vectors that both ends know, and the difference to it by int4.

    x = p_t + c_z + r,    z = argmin_j |x - p_t - c_j|,    sent: z, and r by int4
    decoded: d = p_t + c_z + decoded r

p_t: running mean of the decoded vectors at place t of a row (token t); c_j: the codebook, the means
of the decoded d - p_t that chose it, which both ends learn from what was sent (online k-means,
MacQueen 1967; differences to it in a closed loop, Cutler 1952). A state of a network of tokens is
mostly a function of the token and its place: r has a tenth of its square, and so the error of int4.

Of n_j vectors that chose c_j, and a batch's vectors at place t:

    N_j <- f N_j + n_j,    c_j <- c_j + sum(d - p_t - c_j) / max(N_j, 1)
    M   <- 19/20 M + 1,    p_t <- p_t + mean(d - p_t) / M

f forgets so fast that entries average over their last 16 vectors. Entries that hardly any vector
chose (N_j < 1/2) become decoded vectors, at even distances in the batch: which ones depends on
numbers of vectors alone, so that ends whose arithmetic rounds otherwise still agree on it.

The scale of r is one byte: exponent and 3 bits of bf16, from 2^-20 to below 2^12. A larger one
sends the signal as it is, a smaller one becomes the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.runtime.signals.codes import BYTE, SCALE, Code, NibbleCode

ENTRIES = 256
AVERAGED = 16  # vectors by entry
PLACE_MEMORY = 19 / 20
SHIFT, SMALLEST = 4, (127 - 20) << 3  # bits of bf16 that are left out; the scale 2^-20


@dataclass(frozen=True, slots=True)
class CodebookCode(Code):
    """The code of vectors with a table of what both ends know.

    Attributes:
        seed: of the rotation of r.
        places: T; of N vectors the i-th is at place i mod T.
        table: (256 + T, n + 1): each c_j with N_j, each p_t with M; None before the first signal.
    """

    seed: int
    places: int
    table: Tensor | None = None

    def nbytes(self, n: int) -> int:
        return NibbleCode(self.seed).nbytes(n)

    def encode(self, x: Tensor) -> Tensor | None:
        book, means = self._known(x)
        v = x - means.repeat(len(x) // self.places, 1)
        nearest = (book.square().sum(1) - 2 * v @ book.T).argmin(1)
        sent = NibbleCode(self.seed).encode(v - book[nearest])
        if sent is None:
            return None
        scale = sent[:, -SCALE.itemsize :].contiguous().view(torch.int16)
        short = (((scale + (1 << SHIFT - 1)) >> SHIFT) - SMALLEST).clamp_(min=0)
        if bool((short >= 1 << 8).any()):
            return None
        return torch.cat([sent[:, : -SCALE.itemsize], short.to(BYTE), nearest[:, None].to(BYTE)], 1)

    def decode(self, sent: Tensor, n: int, real: torch.dtype) -> Tensor:
        scale = (sent[:, -2:-1].to(torch.int16) + SMALLEST) << SHIFT
        nibbles = torch.cat([sent[:, :-2], scale.view(BYTE)], 1)
        r = NibbleCode(self.seed).decode(nibbles, n, real)
        book, means = self._known(r)
        return r + book[sent[:, -1].long()] + means.repeat(len(sent) // self.places, 1)

    def learned(self, sent: Tensor, decoded: Tensor) -> Tensor:
        """Return the table after a signal.

        Args:
            sent: what `encode` returned, (N, ...).
            decoded: what `decode` returned, (N, n).
        """
        count, n = decoded.shape
        table = (
            decoded.new_zeros(ENTRIES + self.places, n + 1) if self.table is None else self.table
        )
        book, means = table[:ENTRIES], table[ENTRIES:]
        v = decoded - means[:, :n].repeat(count // self.places, 1)
        chosen = torch.nn.functional.one_hot(sent[:, -1].long(), ENTRIES).to(v.dtype)
        forget = max(0.5, 1 - count / (AVERAGED * ENTRIES))
        book = _averaged(book, chosen.T @ v, chosen.sum(0), forget)
        unused = (book[:, n] < 0.5).nonzero()[:count, 0]
        if len(unused):
            at = torch.arange(len(unused), device=v.device) * (count // len(unused))
            book[unused] = torch.nn.functional.pad(v[at], (0, 1), value=1.0)
        mean = decoded.view(-1, self.places, n).mean(0)
        return torch.cat([book, _averaged(means, mean, mean.new_ones(self.places), PLACE_MEMORY)])

    def _known(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codebook and the means, of the type of `like`, (N, n)."""
        if self.table is None:
            return like.new_zeros(ENTRIES, like.shape[1]), like.new_zeros(
                self.places, like.shape[1]
            )
        return self.table[:ENTRIES, :-1], self.table[ENTRIES:, :-1]


def _averaged(rows: Tensor, sums: Tensor, counts: Tensor, memory: float) -> Tensor:
    """Return means and their counts, (N, n + 1), after `counts` further vectors, of sums `sums`."""
    means, known = rows[:, :-1], rows[:, -1] * memory + counts
    change = (sums - counts[:, None] * means) / known.clamp(min=1)[:, None]
    return torch.cat([means + change, known[:, None]], 1)
