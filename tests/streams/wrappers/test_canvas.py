"""Images on a canvas against images that were pasted by hand, and ways against a billiard's."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from pydantic import ValidationError

from hamdist.config import StreamSettings
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import ArrayStream, Canvas, Sample, digits, held_out, make_stream
from hamdist.streams.wrappers.canvas import placed, still

B, h, H = 3, 4, 9
BACK = -0.8


def source(items: int, *, flat: bool = True) -> ArrayStream:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(items * B, h * h, generator=draw, dtype=torch.float64)
    x = x if flat else x.reshape(-1, h, h)
    return ArrayStream(x, torch.arange(items * B) % 5, B, 0, shuffled=False, endless=False)


def canvas(items: int = 4, **changes: object) -> Canvas:
    options = {"side": H, "frames": 4, "fade": 2, "speed": 0.5, "background": BACK, "seed": 1}
    return Canvas(source(items), **{**options, **changes})


def pasted(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    found = torch.full((len(images), 1, H, H), BACK, dtype=images.dtype)
    for row, (right, down) in enumerate(places.long().tolist()):
        found[row, :, down : down + h, right : right + h] = images[row]
    return found


def test_at_whole_pixels_an_image_is_pasted() -> None:
    images = next(source(1).samples()).u.reshape(B, 1, h, h)
    places = torch.tensor([[0, 0], [5, 2], [1, 5]], dtype=torch.float64)
    assert torch.allclose(placed(images, places, H, BACK), pasted(images, places), atol=1e-12)


def test_between_two_pixels_it_is_the_mean_of_both() -> None:
    images = next(source(1).samples()).u.reshape(B, 1, h, h)
    left = torch.tensor([[1, 2]] * B, dtype=torch.float64)
    right = left + torch.tensor([1.0, 0.0])
    mean = (pasted(images, left) + pasted(images, right)) / 2
    half = placed(images, left + torch.tensor([0.5, 0.0]), H, BACK)
    assert torch.allclose(half, mean, atol=1e-12)


def test_ways_are_straight_turn_at_the_border_and_stay_inside() -> None:
    stream = canvas(speed=0.75)
    places = torch.stack([stream.places(2, item, 50) for item in range(-20, 60)])
    assert places.min() >= 0
    assert places.max() <= H - h
    steps = places.diff(dim=0)
    inside = (places[:-1].min(2).values > 1) & (places[:-1].max(2).values < H - h - 1)
    lengths = steps.norm(dim=2)[inside]
    assert torch.allclose(lengths, torch.full_like(lengths, 0.75))
    assert lengths.numel() > 100
    assert (steps.norm(dim=2) < 0.75 + 1e-9).all()
    assert not torch.equal(places[:, 0], places[:, 1])
    assert torch.equal(stream.places(2, 7, 50), canvas(speed=0.75).places(2, 7, 50))
    still_there = canvas(side=h).places(0, 5, 2)
    assert torch.equal(still_there, torch.zeros(2, 2, dtype=torch.float64))


def test_clips_fade_into_each_other() -> None:
    stream, images = canvas(3), [s.u.reshape(B, 1, h, h) for s in source(3).samples()]
    targets = [s.y for s in source(3).samples()]
    items = list(stream.samples())
    assert len(items) == 2 * 4 + 1
    for m, (n, j, share) in enumerate(
        [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0.5), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0.5)]
    ):
        now = placed(images[n], stream.places(n, j, B), H, BACK)
        after = placed(images[n + 1], stream.places(n + 1, j - 4, B), H, BACK)
        expected = (1 - share) * now + share * after
        assert torch.allclose(items[m].u, expected.flatten(1)), m
        shown = targets[n + (share >= 0.5)]
        assert torch.equal(items[m].y, shown), m
    assert stream.spec.u_shape == items[0].u.shape == (B, H * H)


def test_cut_clips_and_images_that_are_not_flat() -> None:
    cut = list(canvas(3, fade=0).samples())
    assert [int(sample.y[0]) for sample in cut] == [0] * 4 + [3] * 4 + [1]
    square = Canvas(
        source(2, flat=False),
        side=H,
        frames=4,
        fade=2,
        speed=0.5,
        background=BACK,
        seed=1,
    )
    assert square.spec.u_shape == (B, H, H)
    flat = next(canvas(2).samples()).u
    assert torch.equal(next(square.samples()).u.flatten(1), flat)


def test_from_settings() -> None:
    own = StreamSettings.model_validate(
        {"source": "digits", "batch": 2, "canvas": {"side": 12, "frames": 3, "fade": 1}}
    )
    data = digits(2, 5, torch.float64)
    expected = Canvas(
        data.train, side=12, frames=3, fade=1, speed=1.0, background=float(data.x.min()), seed=5
    )
    made = make_stream(own, seed=5, dtype=torch.float64)
    for one, other in zip(islice(made.samples(), 7), expected.samples(), strict=False):
        assert torch.equal(one.u, other.u)
    part = held_out(own, seed=9, dtype=torch.float64, samples=4)
    assert part is not None
    assert torch.equal(part[0], still(data.x, 12, float(data.x.min())))
    assert torch.equal(part[1], data.y)
    # an image is all there, wherever it lies: bilinear shares of a pixel sum up to the pixel
    ink = (part[0] - data.x.min()).sum(1)
    assert torch.allclose(ink, (data.x - data.x.min()).sum(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"side": 3}, "stream.canvas.side is 3, but the images have 4 pixels"),
        ({"fade": 4}, "fade < frames"),
        ({"frames": 0, "fade": 0}, "frames >= 1"),
        ({"speed": 0.0}, "speed is 0.0"),
        ({"speed": math.inf}, "speed is inf"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        canvas(**changes)


def test_what_is_no_image() -> None:
    oblong = ArrayStream(torch.rand(6, 7), torch.zeros(6, dtype=torch.int64), 2, 0)
    with pytest.raises(StreamError, match="stream.canvas needs square images"):
        Canvas(oblong, side=9, frames=4, fade=2, speed=1.0, background=0.0, seed=0)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"source": "drift", "canvas": {}}, "moves images, which source 'drift' has not"),
        ({"canvas": {}, "smooth": {}}, "leave one of them out"),
        ({"canvas": {"frames": 5, "fade": 5}}, "'fade' is 5, but a clip has 5 samples"),
    ],
)
def test_settings_that_do_not_go_together(raw: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StreamSettings.model_validate(raw)


def test_the_sequence_ends_with_its_clip() -> None:
    class Ends:
        portable = True
        spec = source(2).spec

        def samples(self):
            return iter([Sample(s.u, s.y, end=True) for s in source(2).samples()])

    made = Canvas(Ends(), side=H, frames=3, fade=0, speed=1.0, background=0.0, seed=0)
    assert [sample.end for sample in made.samples()] == [False, False, True, True]
