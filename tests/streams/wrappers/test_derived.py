"""Streams made of another one, against that one: what it can do, they can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hamdist.config import Late
from hamdist.streams import Delayed, Paced, Rejoin, Sample, Smooth, Stream, Withhold, from_iterable
from hamdist.streams.replay import replays, samples_from
from hamdist.streams.wrappers.canvas import Canvas
from hamdist.streams.wrappers.derived import with_targets_of

ITEMS = [(torch.full((1, 4), float(n)), torch.tensor([n])) for n in range(12)]


def moving(stream: Stream) -> Canvas:
    return Canvas(stream, side=4, frames=3, fade=1, speed=1.0, background=0.0, seed=0)


def paced(stream: Stream) -> Paced:
    return Paced(stream, 1e-9, Late.KEEP, sleep=lambda _: None)


MAKERS: dict[str, Callable[[Stream], Stream]] = {
    "Delayed": lambda stream: Delayed(stream, 2),
    "Rejoin": lambda stream: Rejoin(stream, 2),
    "Smooth": lambda stream: Smooth(stream, 3),
    "Withhold": lambda stream: Withhold(stream, 0.5, 0),
    "Canvas": moving,
    "Paced": paced,
    "two": lambda stream: Withhold(Smooth(stream, 3), 0.5, 0),
}


def content(sample: Sample) -> list[object]:
    return [sample.u.tolist(), str(sample.y), sample.end, sample.time, str(sample.late)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_made_of_a_list_it_yields_the_same_again(make: Callable[[Stream], Stream]) -> None:
    stream = make(from_iterable(ITEMS, classes=20))
    whole = [content(sample) for sample in stream.samples()]
    assert replays(stream)
    assert len(whole) >= len(ITEMS) - 2
    assert [content(sample) for sample in samples_from(stream, 5)] == whole[5:]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_made_of_an_iterator_it_does_not(make: Callable[[Stream], Stream]) -> None:
    assert not replays(make(from_iterable(iter(ITEMS), classes=20)))


def test_the_targets_of_some_readouts_of_a_list() -> None:
    items = [(u, {"digit": y, "parity": y % 2}) for u, y in ITEMS]
    stream = with_targets_of(from_iterable(items, classes={"digit": 20, "parity": 2}), ["parity"])
    assert replays(stream)
    assert [s.y and s.y.keys() for s in samples_from(stream, 10)] == [{"parity"}] * 2
