"""Real time on a clock that stands still until somebody moves it: what is given, dropped, kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from hamdist.config import Late
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import (
    Delayed,
    Paced,
    Rejoin,
    Sample,
    Smooth,
    Stream,
    Withhold,
    from_iterable,
    report_of,
)
from hamdist.streams.replay import passed_over, replays, samples_from
from hamdist.streams.wrappers.derived import with_targets_of


class Clock:
    """`now` seconds; sleeping moves it, and so does each look by `cost`."""

    def __init__(self, now: float = 100.0, cost: float = 0.0) -> None:
        self.now = now
        self.cost = cost
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += self.cost
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def numbered(items: int, ends: Sequence[int] = (), times: Sequence[float] | None = None) -> Stream:
    return from_iterable(
        [
            Sample(torch.tensor([[float(n)]]), torch.tensor([n]), n in ends, times and times[n])
            for n in range(items)
        ],
        classes=1000,
    )


def paced(stream: Stream, clock: Clock, late: Late, period: float | None = 1.0) -> Paced:
    return Paced(stream, period, late, clock=clock, sleep=clock.sleep)


def given(stream: Paced, clock: Clock, busy: Sequence[float]) -> list[tuple[float, int, bool]]:
    """(seconds since the first, number, end) of what is given to a network that is busy for so many
    seconds after each sample."""
    begun, seen = clock.now, []
    work: Iterator[float] = iter(busy)
    for sample in stream.samples():
        seen.append((clock.now - begun, int(sample.u), sample.end))
        clock.now += next(work, 0.0)
    return seen


def test_a_quick_network_waits_for_each_sample() -> None:
    clock = Clock()
    stream = paced(numbered(4), clock, Late.DROP)
    assert given(stream, clock, [0.25] * 4) == [
        (0.0, 0, False),
        (1.0, 1, False),
        (2.0, 2, False),
        (3.0, 3, False),
    ]
    assert clock.slept == [0.75] * 3
    assert stream.report() == {"dropped": 0}


@pytest.mark.parametrize("late", list(Late))
def test_a_run_that_goes_on_gets_the_items_that_follow(late: Late) -> None:
    """The first of them arrives at once, the others in their pace."""
    clock = Clock()
    stream = paced(numbered(6), clock, late)
    assert replays(stream) == (late is Late.KEEP)
    begun = clock.now
    seen = [(clock.now - begun, int(sample.u)) for sample in samples_from(stream, 3)]
    assert seen == [(0.0, 3), (1.0, 4), (2.0, 5)]


# busy after each given sample: 2.5 s, 0.25 s, 0, 3 s, 0; samples arrive at 0, 1, 2, ... 8
BUSY = (2.5, 0.25, 0.0, 3.0, 0.0)


def test_drop() -> None:
    clock = Clock()
    stream = paced(numbered(9), clock, Late.DROP)
    # at 2.5: 1 and 2 have arrived, 2 is given; at 2.75: wait for 3; 4 at 4; at 7: 5, 6, 7
    assert [(t, n) for t, n, _ in given(stream, clock, BUSY)] == [
        (0.0, 0),
        (2.5, 2),
        (3.0, 3),
        (4.0, 4),
        (7.0, 7),
        (8.0, 8),
    ]
    assert stream.report() == {"dropped": 3}


def test_dropped_items_do_not_come_again() -> None:
    """As in `test_drop`, but another stream goes on after the third, 3, with its own clock: 4 at
    once; then it is busy until 2.5, when 5 and 6 have arrived; 7 at 3."""
    clock = Clock()
    stream = paced(numbered(9), clock, Late.DROP)
    samples = stream.samples()
    for busy in (*BUSY[:2], 0.0):
        next(samples)
        clock.now += busy
    assert passed_over(stream) == 1
    clock = Clock(7000.0)
    stream = paced(numbered(9), clock, Late.DROP)
    seen = []
    for busy, sample in zip((2.5, 0.0, 0.0, 0.0), samples_from(stream, 3, passed=1), strict=True):
        seen.append((clock.now - 7000.0, int(sample.u)))
        clock.now += busy
    assert seen == [(0.0, 4), (2.5, 6), (3.0, 7), (4.0, 8)]
    assert stream.report() == {"dropped": 2}  # 1 and 5


def test_the_wrapped_stream_of_one_that_drops_its_targets() -> None:
    """What `train` wraps on its own passes the way to go on through."""
    clock = Clock()
    inner = from_iterable(
        [Sample(torch.tensor([[float(n)]]), {"a": torch.tensor([n]), "b": None}) for n in range(9)],
        classes={"a": 9, "b": 9},
    )
    stream = with_targets_of(paced(inner, clock, Late.DROP), ["a"])
    assert not replays(stream)
    assert [int(s.u) for s in samples_from(stream, 3, passed=4)] == [7, 8]
    assert passed_over(stream) == 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda stream: Delayed(stream, 2),
        lambda stream: Rejoin(stream, 2),
        lambda stream: Smooth(stream, 1),
        lambda stream: Withhold(stream, 0.5, 1),
    ],
)
def test_a_wrapped_list_goes_on_where_it_was_left(wrap: Callable[[Stream], Stream]) -> None:
    assert replays(wrap(numbered(9)))
    whole = [float(s.u) for s in wrap(numbered(9)).samples()]
    assert [float(s.u) for s in samples_from(wrap(numbered(9)), 3)] == whole[3:]
    once = from_iterable(iter([(torch.ones(1, 1), torch.tensor([1]))]), classes=2)
    assert not replays(wrap(once))


def test_keep() -> None:
    clock = Clock()
    stream = paced(numbered(9), clock, Late.KEEP)
    # at 2.5: 1, with 2 behind it; at 2.75: 2; 3 at 3; at 6: 4, with 5 and 6 behind it; then these
    assert [(t, n) for t, n, _ in given(stream, clock, BUSY)] == [
        (0.0, 0),
        (2.5, 1),
        (2.75, 2),
        (3.0, 3),
        (6.0, 4),
        (6.0, 5),
        (6.0, 6),
        (7.0, 7),
        (8.0, 8),
    ]
    assert stream.report() == {"waiting_most": 2}


def test_the_end_of_a_sequence_is_never_dropped() -> None:
    clock = Clock()
    stream = paced(numbered(9, ends=(1, 3, 5)), clock, Late.DROP)
    # 1 (an end) is dropped for 2, which carries it; 3 is given; 5 is dropped for 7, by way of 6
    assert [(n, end) for _, n, end in given(stream, clock, BUSY)] == [
        (0, False),
        (2, True),
        (3, True),
        (4, False),
        (7, True),
        (8, False),
    ]


def test_samples_arrive_at_their_own_times() -> None:
    clock = Clock()
    times = [5.0, 5.5, 9.0, 9.25, 9.5, 20.0]
    stream = paced(numbered(6, times=times), clock, Late.DROP, period=None)
    assert [(t, n) for t, n, _ in given(stream, clock, [1.0, 4.0, 0.0])] == [
        (0.0, 0),
        (1.0, 1),
        (5.0, 4),
        (15.0, 5),
    ]
    assert stream.report() == {"dropped": 2}


def test_a_dropped_target_is_gone_and_the_newest_keeps_its_own() -> None:
    clock = Clock()
    stream = paced(numbered(9), clock, Late.DROP)
    samples = stream.samples()
    assert int(next(samples).y) == 0
    clock.now += 3.0
    sample = next(samples)
    assert (int(sample.u), int(sample.y)) == (3, 3)


def test_the_clock_starts_when_the_first_sample_is_asked_for() -> None:
    clock = Clock()
    stream = paced(numbered(3), clock, Late.DROP)
    samples = stream.samples()
    clock.now += 50.0
    assert [int(s.u) for s in samples] == [0, 1, 2]
    assert stream.report() == {"dropped": 0}


def test_reading_the_data_for_the_first_sample_costs_no_others() -> None:
    clock = Clock()

    class Slow:
        portable, spec = True, numbered(3).spec

        def samples(self) -> Iterator[Sample]:
            clock.now += 50.0
            return numbered(3).samples()

    stream = paced(Slow(), clock, Late.DROP)
    assert [int(s.u) for s in stream.samples()] == [0, 1, 2]


def test_counts_begin_anew_and_come_through_wrappers() -> None:
    clock = Clock()

    class Again:
        portable, spec = True, numbered(9).spec

        def samples(self) -> Iterator[Sample]:
            return numbered(9).samples()

    inner = paced(Again(), clock, Late.DROP)
    stream = Withhold(inner, 0.5, 0)
    for _ in range(2):
        for _ in stream.samples():
            clock.now += 2.0
        assert report_of(stream) == {"dropped": 4}
    assert report_of(numbered(2)) == {}


def test_a_source_slower_than_its_pace_is_found_out() -> None:
    clock = Clock()

    class Slow:
        portable, spec = True, numbered(1).spec

        def samples(self) -> Iterator[Sample]:
            while True:
                clock.now += 0.02  # to make a sample; it arrives after 0.01 s
                yield Sample(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    with pytest.raises(StreamError, match=r"cannot keep up with its own pace"):
        for _ in paced(Slow(), clock, Late.DROP, period=0.01).samples():
            pass


def test_a_slow_network_alone_is_no_fault_of_the_source() -> None:
    clock = Clock()

    class Quick:
        portable, spec = True, numbered(1).spec

        def samples(self) -> Iterator[Sample]:
            while True:
                clock.now += 0.001
                yield Sample(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    samples = paced(Quick(), clock, Late.DROP, period=0.01).samples()
    next(samples)
    clock.now += 50.0  # 5,000 samples
    next(samples)


def test_portable_as_the_stream_within() -> None:
    assert not Paced(numbered(2), 1.0).portable
    clock = Clock()

    class Portable:
        portable, spec = True, numbered(2).spec

        def samples(self) -> Iterator[Sample]:
            return iter(())

    assert paced(Portable(), clock, Late.KEEP).portable


def test_a_sample_without_time_stamp() -> None:
    clock = Clock()
    with pytest.raises(StreamError, match=r"sample 0 has no time stamp to arrive at"):
        next(paced(numbered(2), clock, Late.DROP, period=None).samples())


@pytest.mark.parametrize("period", [0.0, -1.0, float("nan"), float("inf")])
def test_refused(period: float) -> None:
    with pytest.raises(SettingsError, match="period is"):
        Paced(numbered(2), period)
