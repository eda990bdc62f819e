"""The wire of the tests' hosts (tests/hosts/wire.py), without namespaces. Oracles: the seconds of a
queue by hand; the moments of a normal distribution."""

from __future__ import annotations

import random
import statistics

import pytest
from hosts.wire import HEADER, QUEUE_SECONDS, Plan, Way, adjust, packets

FRAME = bytes(1000)


def sent(way, frames, now=0.0):
    for _ in range(frames):
        way.take(FRAME, now)
    return [due for due, _ in way.waiting]


def test_frames_queue_behind_each_other():
    """1,000 bytes at 10 kB/s: one every 0.1 s, and 20 ms on the way; what waits long is lost."""
    way = Way(1)
    adjust(way, Way(2), ["0.02", "0", "10000", "0"])
    assert sent(way, 9) == pytest.approx([0.1 * (i + 1) + 0.02 for i in range(6)])
    assert way.free == pytest.approx(QUEUE_SECONDS + 0.1)


def test_ways_differ_and_change():
    there, back = Way(1), Way(2)
    adjust(there, back, ["0.1", "0", "0", "0", "there"])
    adjust(there, back, ["0.2", "0", "0", "0", "back"])
    assert (sent(there, 1), sent(back, 1)) == ([0.1], [0.2])
    adjust(there, back, ["0.5", "0"])
    assert (sent(there, 1)[-1], sent(back, 1)[-1]) == (0.5, 0.5)


def test_a_way_changes_at_its_times():
    """0.1 s at once, 10 kB/s from 2 s on and 0.3 s from 5 s on, in whatever order."""
    plan, there, back = Plan(), Way(1), Way(2)
    plan.add("0.1 0\n@5 0.3 0\n@2 0.1 0 10000 0\n", now=100.0)
    assert sorted(plan.times) == [100, 102, 105]
    seen = []
    for now in (100.0, 101.9, 102.0, 106.0):
        for words in plan.due(now):
            adjust(there, back, words)
        seen.append((there.seconds, there.rate))
    assert seen == [(0.1, 0.0), (0.1, 0.0), (0.1, 1e4), (0.3, 1e4)]
    assert plan.times == []


def test_jitter_and_loss_follow_from_the_seed():
    def times(seed, frames=4000):
        way = Way(seed)
        adjust(way, Way(0), ["0.1", "0.05", "0", "0.2"])
        found = []
        for n in range(frames):
            way.take(FRAME, float(n))
            found += [due - n for due, _ in way.waiting]
            way.waiting.clear()
        return found

    one = times(7)
    assert one == times(7)
    assert one != times(8)
    assert len(one) == pytest.approx(0.95 * 4000, rel=0.02)
    assert statistics.mean(one) == pytest.approx(0.1, rel=0.02)
    assert statistics.stdev(one) == pytest.approx(0.02, rel=0.1)


def test_a_frame_of_many_packets_is_late_once_and_lost_with_one():
    """Of 24: 1 - 0.99^24 are lost."""
    way, late = Way(3), []
    adjust(way, Way(0), ["0.1", "0.01", "0", "0.2"])
    for n in range(4000):
        way.take(FRAME, float(n), 24)
        late += [due - n for due, _ in way.waiting]
        way.waiting.clear()
    assert len(late) == pytest.approx(0.99**24 * 4000, rel=0.02)
    assert statistics.mean(late) == pytest.approx(0.1, rel=0.01)
    header = HEADER.pack(0, 1, 54, 1448, 0, 0)
    assert packets(header + bytes(24 * 1448)) == 24
    assert packets(header + bytes(24 * 1448 + 1)) == 25
    assert packets(HEADER.pack(0, 0, 0, 0, 0, 0) + bytes(1400)) == 1


def test_a_lost_frame_that_is_sent_again_holds_up_those_behind_it():
    """Of 0.1 s one way: 0.3 s for the lost one, and for all that would have come before it."""
    way = Way(5)
    adjust(way, Way(0), ["0.1", "0.2", "0", "0", "both", "resent"])
    for n in range(500):
        way.take(FRAME, n / 100)
    lost = [n for n in range(500) if random_of(5, n) < 0.2]
    expected, before = [], 0.0
    for n in range(500):
        before = max(before, n / 100 + (0.3 if n in lost else 0.1))
        expected.append(before)
    assert 60 < len(lost) < 140
    assert [due for due, _ in way.waiting] == pytest.approx(expected)


def random_of(seed, n):
    """The number that decides about frame n: two are drawn for each, one of a normal distribution,
    which without jitter counts for nothing."""
    drawn = random.Random(seed)
    for _ in range(n):
        drawn.random()
        drawn.gauss(1.0, 0.0)
    return drawn.random()


def test_no_frame_overtakes_another():
    way = Way(3)
    adjust(way, Way(0), ["0.1", "0", "0", "1"])
    due = sent(way, 200)
    assert due == sorted(due)
