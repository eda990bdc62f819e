"""Real-valued targets over time, to be tracked (NILP): there is no input, only a number to follow.

n: sample, A: amplitude, P: period in seconds, t = n tau: time in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, islice, repeat

import torch
from torch import Tensor

from hamdist.config import SignalKind
from hamdist.errors import SettingsError
from hamdist.streams.sample import Sample, SampleSpec, generator

# (amplitude, offset) of a kind, where none are given: those of the golden files tracking_*
DEFAULTS = {
    SignalKind.SINUSOID: (0.6, 0.0),
    SignalKind.OFFSET: (0.3, 0.5),
    SignalKind.PATCHED: (0.6, 0.0),
    SignalKind.CONSTANTS: (0.6, 0.0),
}


class SignalStream:
    """The values z(t) of a signal at t = 0, tau, 2 tau, ...; endless and portable.

    Sample n: u (1, 1) zero (a tracker has no input), y (1, 1) = z(n tau), of `dtype`, time stamp
    n tau; with `lead` u = z(n tau), y = z(n tau + lead). With t in seconds:

        sinusoid, offset   z(t) = offset + A sin(2 pi t / P)
        constants          z(t) = offset + v_k             in patch k
        patched            z(t) = offset + v_k             in patch k = 0, 2, 4, ...
                           z(t) = offset + v_k cos(2 pi (t - t_k) / P_k)   in patch k = 1, 3, 5, ...

    A patch begins at t_k and lasts for `dwell` seconds (rounded to whole samples); v_k is uniform
    in [-A, A] (of a cosine with A/2 <= |v_k|), P_k uniform in [P/2, P], both drawn from (seed, k)
    alone.

    Args:
        kind: the form of the signal; `sinusoid` and `offset` differ in their defaults only.
        amplitude: A; None for that of `kind` in DEFAULTS.
        offset: offset; None for that of `kind` in DEFAULTS.
        period: P, in seconds.
        tau: seconds between samples.
        dwell: seconds of a patch.
        lead: seconds by which the target is ahead of the input, in whole samples; None for a
            target without an input.

    Raises:
        SettingsError: an amplitude, a period, tau or lead that is not above 0, a dwell or lead
            shorter than tau, or a value that is not finite.
    """

    portable: bool = True

    def __init__(
        self,
        kind: SignalKind = SignalKind.SINUSOID,
        *,
        amplitude: float | None = None,
        offset: float | None = None,
        period: float = 2.0 * math.pi,
        tau: float = 1e-3,
        dwell: float = 5.0,
        lead: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        default_amplitude, default_offset = DEFAULTS[kind]
        self._kind = kind
        self._amplitude = default_amplitude if amplitude is None else amplitude
        self._offset = default_offset if offset is None else offset
        positive = {"amplitude": self._amplitude, "period": period, "tau": tau, "dwell": dwell}
        positive |= {} if lead is None else {"lead": lead}
        for name, value in positive.items():
            if not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"{name} is {value}; a signal's {name} is above 0, and finite")
        if not math.isfinite(self._offset):
            raise SettingsError(f"offset is {self._offset}; give a finite number")
        for name, value in {"dwell": dwell, "lead": dwell if lead is None else lead}.items():
            if value < tau:
                raise SettingsError(
                    f"{name} is {value} s and tau is {tau} s: it lasts at least one sample"
                )
        self._ahead = None if lead is None else round(lead / tau)
        self._period = period
        self._tau = tau
        self._samples_of_patch = round(dwell / tau)
        self._seed = seed
        self._dtype = dtype

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""
        return SampleSpec((1, 1), self._dtype, (1, 1), self._dtype)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on, without end."""
        shown = repeat(0.0) if self._ahead is None else self._values()
        for n, (x, z) in enumerate(
            zip(shown, islice(self._values(), self._ahead, None), strict=False)
        ):
            u, y = (torch.tensor([[value]], dtype=self._dtype) for value in (x, z))
            yield Sample(u, y, time=n * self._tau)

    def values(self, samples: int) -> Tensor:
        """Return z of the first samples, (samples,), float64: for plots and scales.

        Args:
            samples: how many.
        """
        return torch.tensor(list(islice(self._values(), samples)), dtype=torch.float64)

    def jumps(self, samples: int) -> tuple[int, ...]:
        """Return the samples that are the first of a new patch.

        Args:
            samples: how many are looked at, from the first one on.
        """
        if self._kind in (SignalKind.SINUSOID, SignalKind.OFFSET):
            return ()
        return tuple(range(self._samples_of_patch, samples, self._samples_of_patch))

    def _values(self) -> Iterator[float]:
        if self._kind in (SignalKind.SINUSOID, SignalKind.OFFSET):
            for n in count():
                turn = 2.0 * math.pi * (n * self._tau) / self._period
                yield self._offset + self._amplitude * math.sin(turn)
        for patch in count():
            yield from self._patch(patch)

    def _patch(self, k: int) -> Iterator[float]:
        draw = torch.rand(3, generator=generator("signal", self._seed, k), dtype=torch.float64)
        level, sign, stretch = draw.tolist()
        if self._kind is SignalKind.CONSTANTS or k % 2 == 0:
            v = self._amplitude * (2.0 * level - 1.0)
            for _ in range(self._samples_of_patch):
                yield self._offset + v
            return
        v = math.copysign(self._amplitude * (1.0 + level) / 2.0, sign - 0.5)
        period = self._period * (1.0 + stretch) / 2.0
        for j in range(self._samples_of_patch):
            yield self._offset + v * math.cos(2.0 * math.pi * (j * self._tau) / period)
