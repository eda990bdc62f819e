"""Hand-written situations: what the watchdog says, and when."""

from __future__ import annotations

from hamdist.runtime.engines.worker_report import BlockedChannel
from hamdist.runtime.ray_engine.engine import Watchdog, explain


def test_it_speaks_once_per_standstill():
    dog = Watchdog(warning=10, limit=60)
    dog.poll({"a": 1}, 100)
    assert dog.poll({"a": 1}, 105) == (5, False)
    assert dog.poll({"a": 1}, 111) == (11, True)
    assert dog.poll({"a": 1}, 112) == (12, False)
    assert dog.poll({"a": 2}, 113) == (0, False)
    assert dog.poll({"a": 2}, 124) == (11, True)
    assert not dog.over(59)
    assert dog.over(60)


def test_the_root_of_a_chain_of_waits_is_named():
    waits = [
        BlockedChannel("c", "b", "the state on edge b->c", 12.2),
        BlockedChannel("b", "a", "the state on edge a->b", 12.4),
    ]
    text = explain(waits, {"a": 7, "b": 8, "c": 9}, [], 12)
    assert "block 'b' has waited 12 s for the state on edge a->b; 'a' is at tick 7" in text
    assert "edge b->c" not in text


def test_a_silent_process_and_a_circle_are_told():
    circle = [BlockedChannel("a", "b", "x", 3), BlockedChannel("b", "a", "y", 3)]
    text = explain(circle, {"a": 1, "b": 1}, ["actor 2 (blocks c; process 5)"], 3)
    assert "for x" in text
    assert "for y" in text
    assert "actor 2 (blocks c; process 5) does not answer" in text


def test_nobody_waits():
    assert "every block is computing: a tick 4" in explain([], {"a": 4}, [], 11)
