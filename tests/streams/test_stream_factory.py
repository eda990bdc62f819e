"""make_stream and held_out against the parts that they are made of; streams in another process."""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch

from hamdist.config import DriftSettings, Motion, SmoothSettings, Source, StreamSettings
from hamdist.errors import StreamError
from hamdist.streams import (
    ArrayStream,
    Checker,
    DriftStream,
    Sample,
    Smooth,
    Stream,
    Withhold,
    digits,
    drifts,
    held_out,
    make_stream,
)

DRIFT = DriftSettings(features=9, classes=3, period=5, noise=0.3)


def drift_stream(batch: int = 4, seed: int = 2, dtype: torch.dtype = torch.float32) -> DriftStream:
    return DriftStream(
        features=9, classes=3, period=5, noise=0.3, batch=batch, seed=seed, dtype=dtype
    )


def same(one: Stream, two: Stream, items: int = 40) -> bool:
    def equal(a: Sample, b: Sample) -> bool:
        targets = a.y is b.y if a.y is None or b.y is None else torch.equal(a.y, b.y)
        return torch.equal(a.u, b.u) and targets

    pairs = zip(islice(one.samples(), items), islice(two.samples(), items), strict=True)
    return one.spec == two.spec and all(equal(a, b) for a, b in pairs)


def test_digits() -> None:
    settings = StreamSettings(source=Source.DIGITS, batch=6)
    stream = make_stream(settings, seed=3, dtype=torch.float64)
    assert same(stream, digits(6, 3, torch.float64).train)
    x, y = held_out(settings, seed=3, dtype=torch.float64, samples=10)
    expected = digits(1, 0, torch.float64)
    assert torch.equal(x, expected.x)
    assert torch.equal(y, expected.y)


def test_drift() -> None:
    settings = StreamSettings(source=Source.DRIFT, batch=4, drift=DRIFT)
    assert same(make_stream(settings, seed=2, dtype=torch.float32), drift_stream())


def test_smooth_and_missing() -> None:
    smooth = SmoothSettings(frames=3, motion=Motion.SHIFT)
    settings = StreamSettings(
        source=Source.DRIFT, batch=4, drift=DRIFT, smooth=smooth, missing=0.25
    )
    stream = make_stream(settings, seed=2, dtype=torch.float32)
    assert same(stream, Withhold(Smooth(drift_stream(), 3, Motion.SHIFT), 0.25, 2), 200)
    missing = [sample.y is None for sample in islice(stream.samples(), 1000)]
    assert sum(missing) == pytest.approx(250, abs=60)


@pytest.mark.parametrize("frames", [None, 1, 2, 5])
def test_held_out_of_drift_is_the_last_item_s_concept(frames: int | None) -> None:
    smooth = None if frames is None else SmoothSettings(frames=frames)
    settings = StreamSettings(source=Source.DRIFT, batch=4, drift=DRIFT, smooth=smooth)
    starts = drifts(settings, 60)
    for items in range(1, 61):
        concept = sum(start < items for start in starts)
        x, y = held_out(settings, seed=2, dtype=torch.float32, samples=items)
        expected = drift_stream().held_out(concept * 5)
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])


@pytest.mark.parametrize("frames", [None, 1, 2, 3, 4])
def test_drifts_are_where_the_targets_change_concept(frames: int | None) -> None:
    smooth = None if frames is None else SmoothSettings(frames=frames)
    settings = StreamSettings(source=Source.DRIFT, batch=40, drift=DRIFT, smooth=smooth)
    samples = islice(drift_stream(40).samples(), 12)
    targets = [sample.y.tolist() for sample in samples if sample.y is not None]
    concepts = []
    for item in islice(make_stream(settings, seed=2, dtype=torch.float32).samples(), 11):
        assert item.y is not None
        concepts.append(targets.index(item.y.tolist()) // 5)
    changes = tuple(n for n in range(1, 11) if concepts[n] != concepts[n - 1])
    assert drifts(settings, 11) == changes
    assert drifts(StreamSettings(source=Source.DIGITS), 10_000) == ()


def test_path_reaches_the_files(tmp_path: Path) -> None:
    settings = StreamSettings(source=Source.FASHION_MNIST, path=tmp_path)
    with pytest.raises(StreamError, match=f"no Fashion-MNIST in {tmp_path}"):
        make_stream(settings, seed=0, dtype=torch.float32)
    with pytest.raises(StreamError, match=f"no Fashion-MNIST in {tmp_path}"):
        held_out(settings, seed=0, dtype=torch.float32, samples=1)


def portable_streams() -> list[Stream]:
    x = torch.arange(22.0).reshape(11, 2)
    images = DriftSettings(features=16)
    moving = SmoothSettings(frames=3, motion=Motion.ROTATE)
    settings = [
        StreamSettings(source=Source.DIGITS, batch=3),
        StreamSettings(source=Source.DRIFT, drift=images, batch=3, smooth=moving, missing=0.3),
        StreamSettings(source=Source.DRIFT, batch=3),
    ]
    return [
        ArrayStream(x, torch.arange(11), 4, 5),
        ArrayStream(x, torch.arange(11), 4, 5, uneven=True),
        *(make_stream(each, seed=1, dtype=torch.float32) for each in settings),
    ]


def fingerprint(stream: Stream) -> str:
    torch.set_num_threads(1)
    digest = hashlib.sha256()
    for sample in islice(stream.samples(), 50):
        digest.update(sample.u.numpy().tobytes())
        digest.update(b"-" if sample.y is None else sample.y.numpy().tobytes())
    return digest.hexdigest()


def test_portable_streams_yield_the_same_in_another_process() -> None:
    streams = portable_streams()
    assert all(stream.portable for stream in streams)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        there = list(pool.map(fingerprint, streams))
    assert there == [fingerprint(stream) for stream in streams]
    assert len(set(there)) == len(there)


def test_streams_pass_their_own_check() -> None:
    for stream in portable_streams():
        checker = Checker(stream.spec, equal_batches=False)
        for n, sample in enumerate(islice(stream.samples(), 30)):
            assert checker.check(n, sample) is sample
