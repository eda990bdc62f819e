"""Measures how slowly a stream changes, on its first samples.

M: samples observed, S: frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hamdist.streams.sample import generator

MOST_SAMPLES = 64
FEWEST_ITEMS = 16
MOST_VALUES = 4096


class Smoothness:
    """Estimates S, the number of samples over which a stream decorrelates.

    About 1 for independent samples, about S for samples that fade into each other over S samples
    (`Smooth`), a quarter more than S for samples that are held for S samples; at most 64, which
    means "64 or more". The estimate compares two distances between samples: the mean one between
    neighbours, and the mean one between samples at least half the observation apart. Their ratio
    is 1 for independent samples and grows with S; which S it belongs to follows from the
    covariance of a cross-fade with a random start (`_ratios`).

    Looks at the first 64 samples only, and keeps of each at most 4096 values, always the same
    positions: at most 1 MiB. Samples whose shape differs from the first one's are left out.
    """

    def __init__(self) -> None:
        self._shape: torch.Size | None = None
        self._picked: Tensor | None = None
        self._kept: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the observations as plain data."""
        return {"shape": self._shape, "picked": self._picked, "items": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the data of an earlier `snapshot`.

        Args:
            state: what it returned.
        """
        self._shape, self._picked = state["shape"], state["picked"]
        self._kept = list(state["items"])

    def observe(self, u: Tensor) -> None:
        """Record the next sample's input; ignore samples from the 65th on.

        Args:
            u: the input, (B, ...).
        """
        if len(self._kept) >= MOST_SAMPLES:
            return
        if self._shape is None:
            self._shape = u.shape
            if u.numel() > MOST_VALUES:
                random = generator("smoothness")
                self._picked = torch.randint(u.numel(), (MOST_VALUES,), generator=random)
        if u.shape != self._shape:
            return
        values = u.detach().reshape(-1)
        values = values if self._picked is None else values[self._picked]
        self._kept.append(values.to(torch.float32, copy=True))

    @property
    def frames(self) -> float | None:
        """Return the estimate, 1 to 64 samples; None before 16 have been observed."""
        samples = len(self._kept)
        if samples < FEWEST_ITEMS:
            return None
        u = torch.stack(self._kept)
        # not the product form, which loses small distances between large vectors
        apart = torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist").double()
        step = apart.diagonal(1).mean().item()
        far = (
            torch.cat([apart.diagonal(lag) for lag in range(_far(samples), samples)]).mean().item()
        )
        if step == 0.0:  # nothing moved
            return float(MOST_SAMPLES)
        return float(np.interp(far / step, _ratios(samples), range(1, MOST_SAMPLES + 1)))


def _far(samples: int) -> int:
    """Return the smallest lag that counts as far apart."""
    return (samples + 1) // 2


@lru_cache(maxsize=MOST_SAMPLES)
def _ratios(samples: int) -> tuple[float, ...]:
    """Return far/step for S = 1 ... 64, root mean squares, of a cross-fade seen for `many` samples.

    Sample m of a cross-fade is sum_n L(m/S - n) x_n with the hat L(t) = max(0, 1 - |t|). For
    independent x_n and a random start its covariance over a lag l is, up to the variance of x,

        c(l) = 1/S sum_t L(t/S) L((t + l)/S)        (t an integer, from -S to S)

    and the mean squared distance of samples l apart is 2 (c(0) - c(l)).
    """
    lags = torch.arange(samples, dtype=torch.float64)
    pairs = samples - lags[_far(samples) :]
    ratios = []
    for frames in range(1, MOST_SAMPLES + 1):
        t = torch.arange(-frames, frames + 1, dtype=torch.float64)
        hat = (1.0 - t.abs() / frames).clamp(min=0.0)
        shifted = (1.0 - (t + lags[:, None]).abs() / frames).clamp(min=0.0)
        covariance = (hat * shifted).sum(1) / frames
        distances = covariance[0] - covariance
        far = (pairs * distances[_far(samples) :]).sum() / pairs.sum()
        ratios.append(float((far / distances[1]).sqrt()))
    return tuple(ratios)
