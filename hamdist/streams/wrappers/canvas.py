"""Images that move over a larger canvas: a moving-image stream made of a data set.

B: batch, h: side of an image, H: side of the canvas, S: samples of a clip, F: samples of a fade.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec, Stream, check_stream, generator
from hamdist.streams.wrappers.derived import Derived

_WHO = "stream.canvas", "leave it out"


class Canvas(Derived):
    """Stream of clips of square images: each image moves over a canvas for S samples.

    Row b of clip n begins at a place and with a direction drawn from (seed, n) and goes on straight
    at `speed` pixels a sample; at a border it turns back (a billiard). Sample m = n S + j, 0 <= j <
    S:

        u_m = (1 - a) P(x_n, p_n(j)) + a P(x_(n+1), p_(n+1)(j - S)),   a = max(0, j - S + F) / F

    P(x, p) has x at p (bilinear between pixels) and `background` elsewhere; so in the last F
    samples of a clip the next fades in, on its own way. With F = 0 clips are cut. The target is
    that of the clip that shows more: x_(n+1)'s from a >= 1/2 on. A finite stream ends with its last
    image's first place; time stamps and sequence ends are those of x_n. Portable where the wrapped
    stream is.

    Args:
        stream: yields images (B, h, h), (B, C, h, h) or flat (B, h*h).
        side: H.
        frames: S.
        fade: F.
        speed: pixels per sample.
        background: value of the canvas around the image.

    Raises:
        SettingsError: a canvas smaller than the images, S below 1, F outside 0 ... S - 1, or a
            speed that is not above 0.
        StreamError: inputs that are not square images, several inputs, or late targets.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        side: int,
        frames: int,
        fade: int,
        speed: float,
        background: float,
        seed: int,
    ) -> None:
        check_stream("Canvas", stream)
        spec = stream.spec
        if spec.inputs is not None or not spec.u_dtype.is_floating_point:
            raise StreamError("stream.canvas moves one input of real values: leave it out here")
        small = square_images(spec.u_shape, *_WHO)[-1]
        if side < small:
            raise SettingsError(f"stream.canvas.side is {side}, but the images have {small} pixels")
        if frames < 1 or not 0 <= fade < frames:
            raise SettingsError(
                f"stream.canvas: a clip has frames >= 1 samples and 0 <= fade < frames of them "
                f"fade (received frames {frames}, fade {fade})"
            )
        if not (speed > 0 and math.isfinite(speed)):
            raise SettingsError(f"stream.canvas.speed is {speed}; give pixels a sample, above 0")
        super().__init__(stream)
        self._side, self._small = side, small
        self._frames, self._fade, self._speed = frames, fade, speed
        self._background = background
        self._seed = seed

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, with canvases for images."""
        inner = self._stream.spec
        return replace(inner, u_shape=canvas_shape(inner.u_shape, self._side))

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on.

        Raises:
            StreamError: the wrapped stream has late targets.
        """
        now: Sample | None = None
        n = 0
        for after in self._stream.samples():
            if after.late is not None:
                raise StreamError("stream.canvas and late targets: rejoin them first")
            if now is not None:
                yield from self._clip(now, after, n)
                n += 1
            now = after
        if now is not None:
            yield replace(now, u=self._shown(now.u, n, 0))

    def places(self, clip: int, frame: int, rows: int) -> Tensor:
        """Return the upper left corners of a clip's images: (rows, 2), right and down in pixels.

        Args:
            clip: its number.
            frame: the sample of the clip; negative: before its beginning.
            rows: number of images.
        """
        room = self._side - self._small
        random = generator("canvas", self._seed, clip)
        start = room * torch.rand(rows, 2, generator=random, dtype=torch.float64)
        angle = 2 * math.pi * torch.rand(rows, generator=random, dtype=torch.float64)
        way = start + frame * self._speed * torch.stack([angle.cos(), angle.sin()], 1)
        # a billiard: the straight way on a line that is folded at 0 and at `room`
        return room - (way.remainder(2 * room) - room).abs() if room else torch.zeros_like(way)

    def _clip(self, now: Sample, after: Sample, n: int) -> Iterator[Sample]:
        if now.u.shape != after.u.shape:
            raise StreamError(
                f"stream.canvas: sample {n} has shape {tuple(now.u.shape)}, the next one "
                f"{tuple(after.u.shape)}; batches must be equal (drop_last=True)"
            )
        begin = self._frames - self._fade
        for j in range(self._frames):
            share = max(0, j - begin) / self._fade if self._fade else 0.0
            u = self._shown(now.u, n, j)
            if share:
                u = torch.lerp(u, self._shown(after.u, n + 1, j - self._frames), share)
            last = j == self._frames - 1
            yield Sample(u, after.y if share >= 0.5 else now.y, now.end and last, now.time)

    def _shown(self, u: Tensor, clip: int, frame: int) -> Tensor:
        images = u.reshape(square_images(tuple(u.shape), *_WHO))
        shown = placed(images, self.places(clip, frame, len(u)), self._side, self._background)
        return shown.reshape(canvas_shape(tuple(u.shape), self._side))


def placed(images: Tensor, places: Tensor, side: int, background: float) -> Tensor:
    """Return images (B, C, h, h) on canvases (B, C, H, H), at places (B, 2) in pixels; side: H."""
    small = images.shape[-1]
    # grid_sample's coordinates: pixel i of a side of n pixels lies at (2 i + 1) / n - 1, and canvas
    # pixel i shows image pixel i - p, so x_image = x H/h + (H - 2 p) / h - 1.
    theta = torch.zeros(len(images), 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = theta[:, 1, 1] = side / small
    theta[:, :, 2] = (side - 2 * places) / small - 1
    shape = [len(images), images.shape[1], side, side]
    grid = F.affine_grid(theta, shape, align_corners=False).to(images.dtype)
    return F.grid_sample(images - background, grid, align_corners=False) + background


def still(x: Tensor, side: int, background: float) -> Tensor:
    """Return held-out images (N, ...) on canvases, at places that depend on their number alone."""
    images = x.reshape(square_images(tuple(x.shape), *_WHO))
    random = generator("canvas held-out")
    room = side - images.shape[-1]
    places = room * torch.rand(len(x), 2, generator=random, dtype=torch.float64)
    return placed(images, places, side, background).reshape(canvas_shape(tuple(x.shape), side))


def canvas_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Return the shape of a batch of canvases for that of a batch of images."""
    return (shape[0], side * side) if len(shape) == 2 else (*shape[:-2], side, side)


def square_images(
    shape: tuple[int, ...], needed_by: str, instead: str
) -> tuple[int, int, int, int]:
    """Return (B, C, H, H) for the shape of a batch of square images, flat ones included.

    Raises StreamError for other shapes; needed_by: the setting that needs such images, instead:
    what to do without them, both for its message.
    """
    match shape:
        case (batch, flat) if math.isqrt(flat) ** 2 == flat:
            return batch, 1, math.isqrt(flat), math.isqrt(flat)
        case (batch, height, width) if height == width:
            return batch, 1, height, width
        case (batch, channels, height, width) if height == width:
            return batch, channels, height, width
    raise StreamError(
        f"{needed_by} needs square images, (B, H, H), (B, C, H, H) or (B, H*H), "
        f"but inputs have shape {shape}: {instead}"
    )
