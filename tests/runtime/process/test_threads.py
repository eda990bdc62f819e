"""Processors and threads. Oracles: tables made by hand; what the operating system says of every
thread."""

from __future__ import annotations

import os
import re
import threading

import pytest
import torch
from runtime.networks import CLASSES, FEATURES, PortableStream, batches, chain
from torch import nn

from hamdist.config import EngineSettings, Pin, Settings, read_settings
from hamdist.runtime.advice.advice import thread_warnings
from hamdist.runtime.process import threads
from hamdist.runtime.process.threads import pinned, processors_of_actor
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

pytestmark = pytest.mark.timeout(90)

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system pins no threads"
)


@pytest.mark.parametrize(
    ("processors", "actors", "of_a_thread", "options_of_actors"),
    [
        ({0, 1}, 2, 1, [{0}, {1}]),
        ({4, 5, 6, 7}, 2, 1, [{4}, {6}]),  # far apart
        ({0, 3, 9}, 3, 1, [{0}, {3}, {9}]),
        ({0, 1}, 3, 1, [None, None, None]),
        ({0, 1}, 1, 1, [None]),
        ({0, 1, 2, 3}, 2, 2, [None, None]),
    ],
)
def test_options_of_actors(monkeypatch, processors, actors, of_a_thread, options_of_actors):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: processors, raising=False)  # type: ignore[attr-defined]
    assert [processors_of_actor(i, actors, of_a_thread) for i in range(actors)] == options_of_actors


@needs_affinity
def test_only_the_calling_thread_is_pinned_and_not_for_ever():
    before = os.sched_getaffinity(0)
    one = {min(before)}
    go_on, seen = threading.Event(), []

    def other():
        go_on.wait(20)
        seen.append(os.sched_getaffinity(0))

    def inside():
        with pinned(one):
            assert os.sched_getaffinity(0) == one
            go_on.set()
            thread.join(20)
            raise ZeroDivisionError

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        inside()
    assert seen == [before]
    assert os.sched_getaffinity(0) == before
    with pinned(None):
        assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ({"kind": "inprocess"}, 1),
        ({"kind": "ray", "actors": 3}, 3),
        ({"kind": "ray", "actors": "auto"}, 1),
        ({"kind": "ray", "placement": [["a"], ["b"]]}, 2),
    ],
)
def test_how_many_processes_are_asked_for(engine, processes):
    assert EngineSettings.model_validate(engine).processes() == processes


@pytest.mark.parametrize(
    ("processes", "of_each", "processors", "words"),
    [
        (2, 1, 2, None),
        (1, 2, 2, None),
        (3, 1, 2, r"3 actors of 1 thread\(s\) on 2 processor\(s\) wait"),
        (2, 2, 3, r"2 actors of 2 thread\(s\) on 3"),
        (1, 4, 2, r"1 process of 4 thread"),
    ],
)
def test_more_threads_than_processors(processes, of_each, processors, words):
    told = thread_warnings(processes, of_each, processors)
    assert len(told) == (words is not None)
    assert words is None or re.search(words, told[0])


def test_a_run_with_too_many_threads_says_so():
    engine = {"threads": threads.cores() + 1}
    settings = Settings.model_validate({"level": "trace", "engine": engine})
    with pytest.warns(UserWarning, match="wait for each other"):
        result = train(chain(), PortableStream(5), settings)
    assert any("wait for each other" in text for text in result.warnings)


class Where(nn.Module):
    """Notes on which processors its thread may run, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(64, dtype=torch.int64))

    def forward(self, x):
        if x.device.type != "meta":
            for processor in os.sched_getaffinity(0):
                self.mask[processor % 64] = 1
        return x


@needs_affinity
@pytest.mark.ray
@pytest.mark.skipif(threads.cores() < 2, reason="one processor")
@pytest.mark.parametrize("pin", ["auto", "off"])
def test_where_the_blocks_of_an_actor_run(session, leaves_no_socket, pin):
    """Two actors: each on a processor of its own, or on all; and once more, on the same actors."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, 8), Where()),
        nn.Sequential(nn.Linear(8, CLASSES), Where()),
    )
    engine = {"kind": "ray", "actors": 2, "pin": pin}
    settings = Settings.model_validate({"level": "trace", "steps": 5, "engine": engine})
    for _ in range(2):
        result = train(model, PortableStream(5), settings)
        masks = [buffers for b in result.blocks.values() for buffers in [*b.buffers.values()]]
        one, other = [{int(i) for i in mask.nonzero()} for mask in masks]
        everywhere = {processor % 64 for processor in os.sched_getaffinity(0)}
        if pin == "off":
            assert one == other == everywhere
        else:
            assert len(one) == len(other) == 1
            assert one != other
            assert one | other <= everywhere


def test_off_as_yaml_reads_it():
    settings = read_settings("engine: {pin: off}", "here")
    assert settings.engine.pin is Pin.OFF


@pytest.mark.ray
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no such threads")
def test_the_thread_that_draws_a_stream_interrupts_no_actor(session, leaves_no_socket):
    """It alone: the program's own threads are as they were."""
    policies = set()

    class Noting:
        def __iter__(self):
            for sample in batches(5):
                policies.add(os.sched_getscheduler(0))
                yield sample

    source = from_iterable(Noting(), classes=CLASSES)
    policies.clear()
    engine = {"kind": "ray", "actors": 2}
    settings = Settings.model_validate({"level": "trace", "engine": engine})
    assert train(chain(), source, settings).samples == 5
    assert policies == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
