"""Runs across three hosts that lose an actor, a cable for 5 s, a raylet, a driver. Oracle: the
in-process run, in which nothing happens (scripts/faults)."""

from __future__ import annotations

import contextlib

import psutil
import pytest
from faults.events import DRIVER, KILL, LINK, RAYLET, Event
from faults.trial import trial
from faults.watch import GONE_SECONDS
from hosts.namespaces import hosts, why_not

from hamdist.launch.local_cluster import HEALTH

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "hosts can be made"),
    pytest.mark.timeout(300),
]

ITEMS = 1000
EVENTS = [
    Event(0, KILL, block=2, passes=200, seconds=0.01),
    Event(1, LINK, block=0, passes=450, seconds=5.0, host=1),
    Event(2, RAYLET, block=4, passes=700, seconds=0.0, host=2),
]


@pytest.fixture(scope="module")
def three():
    with hosts(3, environment=HEALTH) as h:
        yield h


@pytest.mark.parametrize("level", ["local", "trace", "backprop"])
def test_nothing_is_lost(three, level):
    found = trial(level, ITEMS, EVENTS, three)
    assert found.wrong == ""
    assert sorted(found.seconds) == [0, 1, 2]
    assert found.replaced >= 2
    assert found.replayed > 0


def test_a_lost_driver(three):
    """Another one, on the same cluster, goes on from what the first has left, and its actors on the
    other hosts, which have lost theirs, are gone."""
    found = trial("trace", 300, [Event(0, DRIVER, block=4, passes=200, seconds=0.0)], three)
    assert found.wrong == ""
    assert found.drivers == 1
    assert 0 < found.seconds[0] < float("inf")
    actors = [p for i in range(3) for p in three.processes(i) if "WorkerActor" in _command(p)]
    assert not psutil.wait_procs(actors, timeout=GONE_SECONDS)[1]


def _command(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
