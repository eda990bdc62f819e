"""From settings to streams."""

from __future__ import annotations

import torch
from torch import Tensor

from hamdist.config import Source, StreamSettings
from hamdist.streams.datasets import DataSet, digits, fashion_mnist
from hamdist.streams.drift import DriftStream
from hamdist.streams.sample import Stream
from hamdist.streams.smooth import Smooth, Withhold, first_item, nearest_sample


def make_stream(settings: StreamSettings, *, seed: int, dtype: torch.dtype) -> Stream:
    """The stream that the settings name: its source, made smooth, then with targets withheld.

    Endless and portable; u of `dtype`. Raises what the parts raise: StreamError for data sets
    that are not there and for a motion of inputs that are no square images.
    """
    stream: Stream
    if settings.source is Source.DRIFT:
        stream = _drift(settings, seed, dtype)
    else:
        stream = _data_set(settings, seed, dtype).train
    if settings.smooth is not None:
        stream = Smooth(stream, settings.smooth.frames, settings.smooth.motion)
    if settings.missing > 0:
        stream = Withhold(stream, settings.missing, seed)
    return stream


def held_out(
    settings: StreamSettings, *, seed: int, dtype: torch.dtype, items: int
) -> tuple[Tensor, Tensor]:
    """x (N, F) of `dtype` and y (N,) int64 to evaluate a run of `items` items on.

    The held-out part of a data set; of the drifting stream new rows of the concept in force at
    the run's last item. Never smooth, moved, or withheld. Raises like `make_stream`.
    """
    if settings.source is Source.DRIFT:
        last = nearest_sample(max(items, 1) - 1, _frames(settings))
        return _drift(settings, seed, dtype).held_out(last)
    data = _data_set(settings, seed, dtype)
    return data.x, data.y


def drifts(settings: StreamSettings, items: int) -> tuple[int, ...]:
    """The items, among the first `items`, that are the first of a new concept: () without drift.

    In a smooth stream: the items whose targets are the first ones of a new concept.
    """
    if settings.source is not Source.DRIFT:
        return ()
    frames = _frames(settings)
    samples = range(settings.drift.period, items, settings.drift.period)
    starts = (first_item(sample, frames) for sample in samples)
    return tuple(start for start in starts if start < items)


def _frames(settings: StreamSettings) -> int:
    return 1 if settings.smooth is None else settings.smooth.frames


def _drift(settings: StreamSettings, seed: int, dtype: torch.dtype) -> DriftStream:
    drift = settings.drift
    return DriftStream(
        features=drift.features,
        classes=drift.classes,
        period=drift.period,
        noise=drift.noise,
        batch=settings.batch,
        seed=seed,
        dtype=dtype,
    )


def _data_set(settings: StreamSettings, seed: int, dtype: torch.dtype) -> DataSet:
    if settings.source is Source.DIGITS:
        return digits(settings.batch, seed, dtype)
    return fashion_mnist(settings.batch, seed, dtype, settings.path)
