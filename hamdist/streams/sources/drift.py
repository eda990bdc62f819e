"""A synthetic stream whose classes change: the ground truth for studies of drift.

B: batch, F: features, C: classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from hamdist.errors import SettingsError
from hamdist.streams.sample import Sample, SampleSpec, generator

HELD_OUT_ROWS = 1024


class DriftStream:
    """Gaussian classes whose centres jump every `period` samples; endless and portable.

    Sample n: y (B,) int64 uniform over C classes, u (B, F) = centre[y] + noise * N(0, 1), of
    `dtype`. The centres are drawn from N(0, 1) for each concept k = n // period, independently of
    all other concepts. Numbers are drawn in float64 and then rounded, so that both dtypes see the
    same stream. Equal seeds give equal samples; memory is constant.

    Args:
        noise: standard deviation around the centre.

    Raises:
        SettingsError: features, period or batch below 1, classes below 2, or noise that is
            negative or not finite.
    """

    portable: bool = True

    def __init__(
        self,
        *,
        features: int,
        classes: int,
        period: int,
        noise: float,
        batch: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        lowest = {"features": (features, 1), "classes": (classes, 2), "period": (period, 1)}
        for name, (value, least) in {**lowest, "batch": (batch, 1)}.items():
            if value < least:
                raise SettingsError(f"{name} is {value}; a drifting stream needs at least {least}")
        if noise < 0 or not math.isfinite(noise):
            raise SettingsError(f"noise is {noise}; it is a standard deviation, 0 or more")
        self._features = features
        self._classes = classes
        self._period = period
        self._noise = noise
        self._batch = batch
        self._seed = seed
        self._dtype = dtype

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""
        u_shape, y_shape = (self._batch, self._features), (self._batch,)
        return SampleSpec(u_shape, self._dtype, y_shape, torch.int64, self._classes)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on, without end."""
        for concept in count():
            centres = self.centres(concept)
            random = generator("drift items", self._seed, concept)
            for _ in range(self._period):
                yield Sample(*self._draw(centres, self._batch, random))

    def concept(self, sample: int) -> int:
        """Return the number of the concept in force at a sample: 0, 1, 2, ...

        Args:
            sample: its number.
        """
        return sample // self._period

    def drifts(self, samples: int) -> tuple[int, ...]:
        """Return the samples that are the first of a new concept.

        Args:
            samples: how many are looked at, from the first one on.
        """
        return tuple(range(self._period, samples, self._period))

    def centres(self, concept: int) -> Tensor:
        """Return the centres (C, F), float64, of the classes of a concept.

        Args:
            concept: its number.
        """
        random = generator("drift centres", self._seed, concept)
        shape = (self._classes, self._features)
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def held_out(self, sample: int, rows: int = HELD_OUT_ROWS) -> tuple[Tensor, Tensor]:
        """Return x (rows, F) and y (rows,) of the concept at a sample; no row is in the stream.

        Args:
            sample: its number.
            rows: how many.

        Raises:
            SettingsError: a negative sample, or rows below 1.
        """
        if sample < 0 or rows < 1:
            raise SettingsError(f"held-out rows of sample {sample}, {rows} of them: there are none")
        concept = self.concept(sample)
        random = generator("drift held-out", self._seed, concept)
        return self._draw(self.centres(concept), rows, random)

    def _draw(self, centres: Tensor, rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(self._classes, (rows,), generator=random)
        noise = torch.randn(rows, self._features, generator=random, dtype=torch.float64)
        return (centres[y] + self._noise * noise).to(self._dtype), y
