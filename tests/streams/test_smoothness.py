"""The estimate against the number of frames that a stream was made with."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from hamdist.config import Motion
from hamdist.streams import ArrayStream, DriftStream, Smooth, Smoothness, Stream, digits
from hamdist.streams.smoothness import MOST_VALUES


def estimate(stream: Stream, items: int = 64) -> float:
    smoothness = Smoothness()
    for sample in islice(stream.samples(), items):
        smoothness.observe(sample.u)
    assert smoothness.frames is not None
    return smoothness.frames


def gaussian(seed: int, batch: int = 1, features: int = 256) -> Stream:
    x = torch.randn(400, features, generator=torch.Generator().manual_seed(seed))
    return ArrayStream(x, torch.zeros(400, dtype=torch.int64), batch, seed)


@pytest.mark.parametrize("frames", [1, 5, 10, 20, 40])
@pytest.mark.parametrize("seed", range(4))
def test_cross_fades(frames: int, seed: int) -> None:
    assert estimate(Smooth(gaussian(seed), frames)) == pytest.approx(frames, rel=0.25)
    images = Smooth(digits(32, seed, torch.float32).train, frames)
    assert estimate(images) == pytest.approx(frames, rel=0.25)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 10, 20])
def test_few_features(frames: int) -> None:
    noisy = [
        DriftStream(features=16, classes=4, period=500, noise=0.5, batch=32, seed=seed)
        for seed in range(3)
    ]
    for stream in noisy:
        assert estimate(Smooth(stream, frames)) == pytest.approx(frames, rel=0.25)


@pytest.mark.parametrize("motion", [Motion.SHIFT, Motion.ROTATE])
def test_motion_on_top_of_a_fade(motion: Motion) -> None:
    stream = Smooth(digits(32, 0, torch.float32).train, 10, motion)
    assert estimate(stream) == pytest.approx(10, rel=0.35)


def test_independent_samples_are_one() -> None:
    for seed in range(5):
        assert estimate(gaussian(seed)) == pytest.approx(1.0, abs=0.05)
        assert estimate(digits(1, seed, torch.float32).train) == pytest.approx(1.0, abs=0.1)


def test_scale_offset_and_dtype_do_not_matter() -> None:
    plain, moved = Smoothness(), Smoothness()
    for sample in islice(Smooth(gaussian(0), 10).samples(), 64):
        plain.observe(sample.u.double())
        moved.observe(sample.u.double() * 30 - 70)
    assert plain.frames == pytest.approx(moved.frames, rel=1e-3)


def held(many: int) -> Smoothness:
    smoothness = Smoothness()
    for sample in islice(gaussian(0).samples(), 200):
        for _ in range(many):
            smoothness.observe(sample.u)
    return smoothness


def test_held_samples() -> None:
    # the documented quarter too much, up to where the ends of 64 samples fall
    assert held(8).frames == pytest.approx(1.25 * 8, rel=0.2)


def test_a_stream_that_stands_still_and_one_slower_than_64_items() -> None:
    still = Smoothness()
    for _ in range(64):
        still.observe(torch.ones(3, 3))
    assert still.frames == 64.0
    assert estimate(Smooth(gaussian(0), 1000)) == 64.0


def test_needs_sixteen_items() -> None:
    smoothness = Smoothness()
    for sample in islice(gaussian(0).samples(), 15):
        smoothness.observe(sample.u)
        assert smoothness.frames is None
    smoothness.observe(torch.randn(1, 256, generator=torch.Generator().manual_seed(5)))
    assert smoothness.frames == pytest.approx(1.0, abs=0.05)


def test_only_the_first_64_items_count() -> None:
    smoothness = Smoothness()
    for sample in islice(Smooth(gaussian(0), 10).samples(), 64):
        smoothness.observe(sample.u)
    before = smoothness.frames
    for sample in islice(gaussian(1).samples(), 100):
        smoothness.observe(sample.u)
    assert smoothness.frames == before


def test_items_of_another_shape_are_left_out() -> None:
    plain, mixed = Smoothness(), Smoothness()
    for sample in islice(Smooth(gaussian(0), 5).samples(), 64):
        plain.observe(sample.u)
        mixed.observe(sample.u)
        mixed.observe(sample.u[:, :7])
    assert mixed.frames == plain.frames


def test_memory_is_bounded_and_inputs_are_copied() -> None:
    def kept(smoothness: Smoothness) -> list[Tensor]:
        return smoothness._kept

    small, u = Smoothness(), torch.zeros(2, 3)
    for n in range(20):
        small.observe(u.fill_(n))
    assert [item.tolist() for item in kept(small)] == [[n] * 6 for n in range(20)]

    smoothness = Smoothness()
    u = torch.zeros(3, 100_000)
    for n in range(100):
        smoothness.observe(u.fill_(n))
    assert len(kept(smoothness)) == 64
    assert sum(item.untyped_storage().nbytes() for item in kept(smoothness)) == 64 * MOST_VALUES * 4
    assert all(bool((item == n).all()) for n, item in enumerate(kept(smoothness)))
