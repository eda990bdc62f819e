"""Fades, motion and withheld targets against their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from hamdist.config import Motion
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import ArrayStream, Sample, Smooth, Stream, Withhold, from_iterable
from hamdist.streams.wrappers.smooth import first_frame, nearest_sample


def listed(samples: Sequence[Sample]) -> Stream:
    return from_iterable(samples, classes=100)


def point(value: float, label: int | None, end: bool = False, time: float | None = None) -> Sample:
    return Sample(
        torch.tensor([[value]], dtype=torch.float64),
        None if label is None else torch.tensor([label]),
        end,
        time,
    )


def labels(stream: Stream, items: int | None = None) -> list[int | None]:
    samples = islice(stream.samples(), items)
    return [None if sample.y is None else int(sample.y) for sample in samples]


class TestFade:
    SAMPLES = (point(0.0, 1), point(8.0, 2), point(4.0, None))

    def test_table_of_four_frames(self) -> None:
        items = list(Smooth(listed(self.SAMPLES), 4).samples())
        assert [item.u.item() for item in items] == [0, 2, 4, 6, 8, 7, 6, 5, 4]
        expected = [1, 1, 2, 2, 2, 2, None, None, None]
        assert labels(Smooth(listed(self.SAMPLES), 4)) == expected

    def test_odd_frames(self) -> None:
        # j/S = 0, 1/3, 2/3: the first two are nearer to x_n
        assert labels(Smooth(listed(self.SAMPLES), 3)) == [1, 1, 2, 2, 2, None, None]

    def test_one_frame_is_the_stream_itself(self) -> None:
        items = list(Smooth(listed(self.SAMPLES), 1).samples())
        assert [item.u.item() for item in items] == [0, 8, 4]
        assert labels(Smooth(listed(self.SAMPLES), 1)) == [1, 2, None]

    def test_one_sample(self) -> None:
        assert [item.u.item() for item in Smooth(listed([point(3.0, 1)]), 4).samples()] == [3]

    def test_an_iterator_is_read_once(self) -> None:
        stream = Smooth(from_iterable(iter(self.SAMPLES), classes=100), 2)
        assert [item.u.item() for item in stream.samples()] == [0, 4, 8, 6, 4]

    def test_endless(self) -> None:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        source = ArrayStream(x, torch.arange(6), 2, 0)
        drawn = list(islice(source.samples(), 11))
        for m, item in enumerate(islice(Smooth(source, 7).samples(), 70)):
            n, j = divmod(m, 7)
            expected = (1 - j / 7) * drawn[n].u + (j / 7) * drawn[n + 1].u
            torch.testing.assert_close(item.u, expected, rtol=1e-14, atol=1e-14)

    def test_end_marks_the_last_item_of_its_sample(self) -> None:
        for frames in (1, 2, 3, 4, 5, 8):
            samples = (point(0, 1), point(1, 2, end=True), point(2, 3), point(3, 4, end=True))
            stream = Smooth(listed(samples), frames)
            ends = [m for m, item in enumerate(stream.samples()) if item.end]
            drawn = labels(stream)
            assert ends == [max(m for m, label in enumerate(drawn) if label == 2), len(drawn) - 1]

    def test_time_fades_too(self) -> None:
        samples = (point(0, 1, time=10.0), point(1, 2, time=12.0), point(2, 3))
        times = [item.time for item in Smooth(listed(samples), 2).samples()]
        assert times == [10.0, 11.0, None, None, None]

    def test_portable_iff_wrapped(self) -> None:
        portable = ArrayStream(torch.zeros(2, 1), torch.zeros(2, 1), 1, 0)
        assert Smooth(portable, 2).portable
        assert Withhold(portable, 0.5, 0).portable
        assert not Smooth(listed(self.SAMPLES), 2).portable
        assert not Withhold(listed(self.SAMPLES), 0.5, 0).portable
        assert Smooth(portable, 2).spec == portable.spec == Withhold(portable, 0.5, 0).spec

    @pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 20])
    def test_nearest_sample_and_first_item(self, frames: int) -> None:
        stream = Smooth(listed([point(n, n) for n in range(6)]), frames)
        drawn = labels(stream)
        assert drawn == [nearest_sample(m, frames) for m in range(len(drawn))]
        assert [drawn.index(n) for n in range(6)] == [first_frame(n, frames) for n in range(6)]


def images(shape: tuple[int, ...], x: Tensor) -> Stream:
    """An endless stream of one and the same batch of images."""
    rows = x.reshape(shape)
    return ArrayStream(
        rows, torch.zeros(len(rows), dtype=torch.int64), len(rows), 0, shuffled=False
    )


def frame(stream: Stream, item: int) -> Tensor:
    return next(islice(stream.samples(), item, None)).u


class TestMotion:
    # frames 4: a period of 32 samples; the turning point is sample 8

    def test_starts_where_the_image_is(self) -> None:
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        for motion in Motion:
            torch.testing.assert_close(frame(Smooth(images(x.shape, x), 4, motion), 0), x)

    def test_shift_by_a_whole_pixel(self) -> None:
        # side 16: at the turning point sin p = 1, sin 2p = 0: 1/16 of the side is one pixel
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
        right = torch.cat([x[..., :1], x[..., :-1]], -1)
        left = torch.cat([x[..., 1:], x[..., -1:]], -1)
        stream = Smooth(images(x.shape, x), 4, Motion.SHIFT)
        torch.testing.assert_close(frame(stream, 8), right, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(frame(stream, 24), left, rtol=1e-9, atol=1e-9)

    def test_shift_of_a_plane(self) -> None:
        # bilinear interpolation is exact on a x + b y, away from the border
        y, x = torch.meshgrid(*[torch.arange(16.0, dtype=torch.float64)] * 2, indexing="ij")
        plane = 3 * x + 10 * y
        stream = Smooth(images((1, 16, 16), plane), 4, Motion.SHIFT)
        for item in (1, 4, 13, 27):
            p = 2 * math.pi * item / 32
            expected = 3 * (x - math.sin(p)) + 10 * (y - math.sin(2 * p))
            got = frame(stream, item)[0]
            torch.testing.assert_close(got[2:-2, 2:-2], expected[2:-2, 2:-2])

    def test_rotation_of_a_plane(self) -> None:
        y, x = torch.meshgrid(*[torch.arange(16.0, dtype=torch.float64) - 7.5] * 2, indexing="ij")
        stream = Smooth(images((1, 16, 16), 3 * x + 10 * y), 4, Motion.ROTATE)
        for item, degrees in ((8, 15.0), (16, 0.0), (24, -15.0), (4, 15.0 * math.sqrt(0.5))):
            a = math.radians(degrees)
            # the gradient (3, 10) turns with the image
            along, down = 3 * math.cos(a) - 10 * math.sin(a), 3 * math.sin(a) + 10 * math.cos(a)
            got = frame(stream, item)[0]
            expected = along * x + down * y
            torch.testing.assert_close(got[4:-4, 4:-4], expected[4:-4, 4:-4])

    def test_rotation_against_scipy(self) -> None:
        ndimage = pytest.importorskip("scipy.ndimage", reason="comes with scikit-learn")
        x = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
        got = frame(Smooth(images((1, 81), x), 4, Motion.ROTATE), 8).reshape(9, 9)
        a = math.radians(15.0)
        # rows and columns of the source pixel, for the transposed axes that scipy uses
        back = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        centre = np.array([4.0, 4.0])
        expected = ndimage.affine_transform(
            x.numpy(), back, centre - back @ centre, order=1, mode="nearest"
        )
        torch.testing.assert_close(got, torch.from_numpy(expected))

    def test_continuous_in_time(self) -> None:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        for motion in (Motion.SHIFT, Motion.ROTATE):
            slow, fast = (
                frame(Smooth(images(x.shape, x), frames, motion), 1) for frames in (200, 20)
            )
            assert (slow - x).norm() == pytest.approx((fast - x).norm().item() / 10, rel=0.1)

    @pytest.mark.parametrize("shape", [(2, 25), (2, 5, 5), (2, 1, 5, 5)])
    def test_shapes_agree(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(2, 25, generator=torch.Generator().manual_seed(0))
        for motion in (Motion.SHIFT, Motion.ROTATE):
            got = frame(Smooth(images(shape, x), 4, motion), 3)
            assert got.shape == shape
            expected = frame(Smooth(images((2, 25), x), 4, motion), 3)
            assert torch.equal(got.reshape(2, 25), expected)

    def test_targets_are_those_of_the_fade(self) -> None:
        source = ArrayStream(torch.randn(9, 4), torch.arange(9), 1, 0)
        expected = labels(Smooth(source, 3), 30)
        assert labels(Smooth(source, 3, Motion.ROTATE), 30) == expected

    @pytest.mark.parametrize("shape", [(2, 26), (2, 5, 6), (2, 1, 5, 6), (2, 1, 1, 5, 5), (2,)])
    def test_no_square_images(self, shape: tuple[int, ...]) -> None:
        source = ArrayStream(torch.zeros(shape), torch.zeros(2, 1), 2, 0)
        Smooth(source, 2, Motion.FADE)
        for motion in (Motion.SHIFT, Motion.ROTATE):
            with pytest.raises(StreamError, match=f"{motion.value}.* square images.*use .*fade"):
                Smooth(source, 2, motion)


class TestErrors:
    def test_motion_by_its_name(self) -> None:
        def items(motion: Motion | str) -> list[Tensor]:
            stream = Smooth(listed([point(0.0, 1), point(8.0, 2)]), 4, motion)
            return [item.u for item in islice(stream.samples(), 6)]

        assert all(map(torch.equal, items("fade"), items(Motion.FADE)))
        with pytest.raises(SettingsError, match="motion is 'faded'; choose one of 'fade'"):
            items("faded")

    def test_frames(self) -> None:
        with pytest.raises(SettingsError, match="frames is 0"):
            Smooth(listed([point(0, 0)]), 0)

    def test_integer_inputs(self) -> None:
        source = ArrayStream(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), 1, 0)
        with pytest.raises(StreamError, match=r"torch\.int64 cannot fade"):
            Smooth(source, 2)

    def test_short_batch(self) -> None:
        x = torch.zeros(5, 3)
        source = ArrayStream(x, torch.zeros(5, 1), 2, 0, endless=False)
        message = r"sample 4 cannot fade: sample 1 has shape \(2, 3\), sample 2 has \(1, 3\)"
        with pytest.raises(StreamError, match=message):
            list(Smooth(source, 4).samples())

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_share(self, share: float) -> None:
        with pytest.raises(SettingsError, match=f"missing is {share}"):
            Withhold(listed([point(0, 0)]), share, 0)


class TestWithhold:
    def source(self, many: int = 3000) -> Stream:
        return ArrayStream(torch.arange(float(many)), torch.arange(many), 1, 0, endless=False)

    def missing(self, share: float, seed: int) -> Tensor:
        return torch.tensor([y is None for y in labels(Withhold(self.source(), share, seed))])

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_share(self, share: float) -> None:
        # standard deviation of the share at 3000 items: at most .0091
        assert self.missing(share, 0).double().mean().item() == pytest.approx(share, abs=0.04)

    def test_none(self) -> None:
        assert not self.missing(0.0, 0).any()

    def test_seeded(self) -> None:
        assert torch.equal(self.missing(0.5, 3), self.missing(0.5, 3))
        agree = (self.missing(0.5, 3) == self.missing(0.5, 4)).double().mean().item()
        assert agree == pytest.approx(0.5, abs=0.05)

    def test_neighbours_are_independent(self) -> None:
        missing = self.missing(0.5, 0)
        assert (missing[1:] == missing[:-1]).double().mean().item() == pytest.approx(0.5, abs=0.05)

    def test_the_rest_is_untouched(self) -> None:
        withheld = Withhold(self.source(50), 0.5, 0).samples()
        for plain, sample in zip(self.source(50).samples(), withheld, strict=True):
            assert torch.equal(plain.u, sample.u)
            assert sample.y is None or (plain.y is not None and torch.equal(plain.y, sample.y))

    def test_already_missing_stays_missing_and_costs_no_draw(self) -> None:
        many = 40
        gaps = [point(n, None if n % 2 else n) for n in range(many)]
        full = [point(n, n) for n in range(many)]
        expected = [
            None if n % 2 else y for n, y in enumerate(labels(Withhold(listed(full), 0.5, 1)))
        ]
        assert labels(Withhold(listed(gaps), 0.5, 1)) == expected
