"""Wrappers around streams: samples that fade into each other, and targets that are withheld.

B: batch, H: side of an image, S: frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hamdist.config import Motion
from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, Stream, generator
from hamdist.streams.wrappers.canvas import square_images
from hamdist.streams.wrappers.derived import Derived

SHIFT_REACH = 0.125  # largest displacement along an axis, as a share of half an image's side
ROTATE_REACH = math.radians(15.0)  # largest angle, either way
MOTION_PERIOD = 8  # samples from one turning point of the motion to the same one again


class Smooth(Derived):
    """Stream in which each sample of another stream takes `frames` samples, to fade into the next.

    Sample m = n S + j, 0 <= j < S:

        u_m = (1 - j/S) x_n + (j/S) x_(n+1)

    with the target, and the end mark, of the nearer sample (of x_n while j/S < 1/2). A missing
    target stays missing. Time stamps fade like the inputs, where both samples have one. A finite
    source of N samples gives (N - 1) S + 1 samples, the last one being x_(N-1) itself.

    `motion` moves the image as well, as a function of the sample number alone: with
    p = 2 pi m / (8 S), `shift` moves it by (sin p, sin 2p) / 16 of its side to the right and
    down, `rotate` turns it clockwise by 15 sin p degrees; bilinear, the border's pixels continued.
    That needs square images: (B, H, H), (B, C, H, H), or flat (B, H*H). Portable where the wrapped
    stream is.

    Args:
        stream: the samples, with floating-point inputs.
        frames: S.
        motion: none (`fade`), `shift` or `rotate`.

    Raises:
        SettingsError: `frames` is below 1.
        StreamError: inputs that are not floating-point, a motion of inputs that are no square
            images, and, naming the sample, neighbouring samples of different shapes, or late
            targets.
    """

    def __init__(self, stream: Stream, frames: int, motion: Motion | str = Motion.FADE) -> None:
        if frames < 1:
            raise SettingsError(f"frames is {frames}; a sample takes at least 1 frame")
        try:
            motion = Motion(motion)
        except ValueError:
            choices = ", ".join(repr(m.value) for m in Motion)
            raise SettingsError(f"motion is {motion!r}; choose one of {choices}") from None
        spec = stream.spec
        if spec.inputs is not None:
            raise StreamError(
                f"Smooth moves one input, this stream has {', '.join(map(repr, spec.inputs))}: "
                "make the samples of such a stream smooth yourself"
            )
        if not spec.u_dtype.is_floating_point:
            raise StreamError(
                f"inputs of {spec.u_dtype} cannot fade: a smooth stream needs floating-point ones"
            )
        super().__init__(stream)
        self._frames = frames
        self._motion = motion
        if motion is not Motion.FADE:
            _as_images(spec.u_shape, motion)

    def samples(self) -> Iterator[Sample]:
        for number, sample in enumerate(self._faded()):
            if self._motion is Motion.FADE:
                yield sample
            else:
                yield replace(sample, u=self._moved(sample.u, number))

    def _faded(self) -> Iterator[Sample]:
        frames = self._frames
        now = None
        for n, after in enumerate(self._stream.samples()):
            if after.late is not None:
                raise StreamError(
                    f"sample {n} brings targets of earlier samples, which have no number once "
                    "samples fade: rejoin first, as in Smooth(Rejoin(stream), ...)"
                )
            if now is not None:
                if now.u.shape != after.u.shape:
                    raise StreamError(
                        f"sample {(n - 1) * frames} cannot fade: sample {n - 1} has shape "
                        f"{tuple(now.u.shape)}, sample {n} has {tuple(after.u.shape)}; batches "
                        "must be equal (drop_last=True)"
                    )
                for j in range(frames):
                    yield _between(now, after, j, frames)
            now = after
        if now is not None:
            yield now

    def _moved(self, u: Tensor, frame: int) -> Tensor:
        images = u.reshape(_as_images(tuple(u.shape), self._motion))
        phase = 2.0 * math.pi * frame / (MOTION_PERIOD * self._frames)
        if self._motion is Motion.SHIFT:
            right, down = SHIFT_REACH * math.sin(phase), SHIFT_REACH * math.sin(2.0 * phase)
            rows = [[1.0, 0.0, -right], [0.0, 1.0, -down]]  # where each pixel comes from
        else:
            angle = ROTATE_REACH * math.sin(phase)
            cos, sin = math.cos(angle), math.sin(angle)
            rows = [[cos, sin, 0.0], [-sin, cos, 0.0]]
        theta = torch.tensor(rows, dtype=u.dtype).expand(len(images), 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return moved.reshape(u.shape)


class Withhold(Derived):
    """Stream without the targets of a random share of its samples.

    The choice for sample n depends on (seed, n) and `share` alone, not on the stream. Portable
    where the wrapped stream is.

    Args:
        share: probability that a sample loses its target.

    Raises:
        SettingsError: the share is outside 0 <= share < 1.
    """

    def __init__(self, stream: Stream, share: float, seed: int) -> None:
        if not 0.0 <= share < 1.0:
            raise SettingsError(f"missing is {share}; the share of missing targets is in [0, 1)")
        super().__init__(stream)
        self._share = share
        self._seed = seed

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on, y None where it is withheld or was missing before."""
        random = generator("withhold", self._seed)
        for sample in self._stream.samples():
            labelled = torch.rand((), generator=random, dtype=torch.float64).item() >= self._share
            yield sample if labelled else replace(sample, y=None)


def nearest_sample(frame: int, frames: int) -> int:
    """Return the source's sample whose target sample `frame` of a smooth stream carries."""
    n, j = divmod(frame, frames)
    return n + (2 * j >= frames)


def first_frame(sample: int, frames: int) -> int:
    """Return the first sample of a smooth stream with the target of the source's `sample`."""
    return max(0, (sample - 1) * frames + (frames + 1) // 2)


def _between(now: Sample, after: Sample, j: int, frames: int) -> Sample:
    share = j / frames
    nearer = now if 2 * j < frames else after
    time = None
    if now.time is not None and after.time is not None:
        time = (1.0 - share) * now.time + share * after.time
    # a sequence ends with the last frame of its last sample
    end = now.end and j == (frames + 1) // 2 - 1
    return Sample(torch.lerp(now.u, after.u, share), nearer.y, end, time)


def _as_images(shape: tuple[int, ...], motion: Motion) -> tuple[int, int, int, int]:
    return square_images(shape, f"motion {motion.value!r}", "use motion 'fade'")
