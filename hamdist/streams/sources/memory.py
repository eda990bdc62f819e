"""Generated tasks in which a network has to remember, as tokens. B: batch, N: `length`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from hamdist.config import IGNORE_INDEX, MemoryTask
from hamdist.streams.sample import Sample, SampleSpec, generator

SYMBOLS = 4
CUES = 7
# features and classes
SIZES = {"copy": (SYMBOLS + 1, SYMBOLS), "recall": (4, 2), "evidence": (3, 2)}
MARKED = 1 / 6  # share of the tokens with a mark "store", and with a mark "recall"


class MemoryStream:
    """Sequences of a task, one after the other; portable, and endless unless `sequences` is given.

    copy      N symbols of 4, then N marks at which they are asked for in their order; u (B, 5) has
              a symbol, or the mark as its last feature (Graves et al. 2014; Menick et al. 2021)
    recall    N tokens, each a bit (2 features); at some there is a mark "store" as well (always at
              the first), at others "recall", which asks for the bit that was stored last; u (B, 4)
              (store-recall: Bellec et al. 2020)
    evidence  a cue on one of two sides at every second one of 14 tokens, then a pause of N tokens;
              at its last there is a mark that asks on which side there were more; u (B, 3)
              (evidence accumulation: Bellec et al. 2020)

    Sample: u float of `dtype`, y (B,) int64, None where no row is asked, IGNORE_INDEX in rows that
    are not; with `ends` the last token of a sequence has `end`. The sequence of a number depends on
    (seed, number, part) alone.
    """

    portable: bool = True

    def __init__(
        self,
        task: MemoryTask,
        *,
        length: int,
        ends: bool,
        batch: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        part: str = "train",
        sequences: int | None = None,
    ) -> None:
        self._task, self._length, self._batch, self._ends = task, length, batch, ends
        self._seed, self._dtype, self._part, self._sequences = seed, dtype, part, sequences

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""
        B, (features, classes) = self._batch, SIZES[self._task]
        return SampleSpec((B, features), self._dtype, (B,), torch.int64, classes)

    def samples(self) -> Iterator[Sample]:
        """Yield the tokens from the first one of the first sequence on."""
        make = getattr(self, f"_{self._task.value}")
        for n in count() if self._sequences is None else range(self._sequences):
            inputs, targets = make(generator(f"memory {self._part}", self._seed, n))
            last = len(inputs) - 1
            for t, (u, y) in enumerate(zip(inputs, targets, strict=True)):
                labels = y if bool((y != IGNORE_INDEX).any()) else None
                yield Sample(u.to(self._dtype), labels, end=self._ends and t == last)

    def _copy(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return u (T, B, features) and y (T, B) of one sequence."""
        N, B = self._length, self._batch
        symbols = torch.randint(SYMBOLS, (N, B), generator=random)
        shown = torch.cat([symbols, torch.full((N, B), SYMBOLS)])
        y = torch.cat([torch.full((N, B), IGNORE_INDEX), symbols])
        return torch.nn.functional.one_hot(shown, SYMBOLS + 1), y

    def _recall(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (self._length, self._batch)
        bits = torch.randint(2, shape, generator=random)
        draw = torch.rand(shape, generator=random)
        store, recall = draw < MARKED, (draw >= MARKED) & (draw < 2 * MARKED)
        store[0], recall[0] = True, False
        places = torch.arange(self._length)[:, None].expand(shape)
        latest = torch.where(store, places, 0).cummax(0).values  # token of the latest store
        y = torch.where(recall, bits.gather(0, latest), IGNORE_INDEX)
        return torch.stack([bits == 0, bits == 1, store, recall], 2), y

    def _evidence(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        B, T = self._batch, 2 * CUES + self._length
        likely = torch.where(torch.rand(B, generator=random) < 0.5, 0.3, 0.7)
        side = (torch.rand(CUES, B, generator=random) < likely).long()
        u, y = torch.zeros(T, B, 3), torch.full((T, B), IGNORE_INDEX)
        u[: 2 * CUES : 2, :, :2] = torch.nn.functional.one_hot(side, 2).float()
        u[-1, :, 2] = 1
        y[-1] = (2 * side.sum(0) > CUES).long()
        return u, y
