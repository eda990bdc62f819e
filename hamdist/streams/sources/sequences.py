"""Sequences of tokens as a stream of tokens, one after the other.

N: sequences, B: batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hamdist.errors import StreamError
from hamdist.streams.sample import Sample, SampleSpec
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.texts import padded


class TokenStream:
    """The tokens of N sequences, sequence after sequence, for a recurrent network.

    Sample: u (B,) int64, the next token of B sequences side by side; a sequence's last token has
    `end` and y (B,) int64, the labels; the others have no target, unless `every` is set. The
    sequences of a batch are padded with 0 in front, to the longest of them. Their order, `shuffled`
    and `endless` are those of an `ArrayStream` of their numbers. Portable.

    Args:
        sequences: N of them, each (T,) int64 with a T of its own, at least 1.
        labels: (N,) int64.
        classes: number of classes; None for the largest label plus one.
        tokens: number of different tokens, if it is known.
        every: give every token the label of its sequence as target.

    Raises:
        SettingsError: as for `ArrayStream`.
        StreamError: as for `ArrayStream`, and for a tensor that is no such sequence.
    """

    portable: bool = True

    def __init__(
        self,
        sequences: Sequence[Tensor],
        labels: Tensor,
        batch: int,
        seed: int,
        *,
        classes: int | None = None,
        tokens: int | None = None,
        every: bool = False,
        shuffled: bool = True,
        endless: bool = True,
    ) -> None:
        for n, ids in enumerate(sequences):
            if ids.dim() != 1 or len(ids) == 0 or ids.dtype != torch.int64:
                raise StreamError(
                    f"sequence {n} has shape {tuple(ids.shape)} and dtype {ids.dtype}: a sequence "
                    "is (T,) int64, with at least one token"
                )
        self._sequences = list(sequences)
        self._every = every
        self._tokens = tokens
        self._rows = ArrayStream(
            torch.arange(len(self._sequences)),
            labels,
            batch,
            seed,
            classes=classes,
            shuffled=shuffled,
            endless=endless,
        )

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""
        return replace(self._rows.spec, tokens=self._tokens)

    def samples(self) -> Iterator[Sample]:
        """Yield the tokens from the first one of the first sequence on."""
        for chosen in self._rows.samples():
            batch = [self._sequences[row] for row in chosen.u.tolist()]
            tokens = padded(batch, max(map(len, batch))).T.contiguous()
            last = len(tokens) - 1
            for t, u in enumerate(tokens):
                y = chosen.y if self._every or t == last else None
                yield Sample(u.clone(), y, end=t == last)
