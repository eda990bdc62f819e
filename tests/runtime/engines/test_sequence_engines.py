"""Oracle: the in-process engine, to the last bit; and sequences that end by their tag, for those
that end with the stream, with the run's steps, or by an interruption."""

from __future__ import annotations

import pytest
import torch
from dynamics.sequences import O, stacked, tangle, text
from runtime.engines.test_engines_equal import assert_equal, learned

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.train.train import train
from hamdist.streams import Sample, from_iterable

LENGTHS = [6, 1, 4, 9, 2] * 3


class PortableText:
    """Sequences that can be sent to another process."""

    portable = True

    def __init__(self, *, words):
        self._words = words
        self.spec = from_iterable(self._samples(), outputs=O).spec

    def _samples(self):
        missing = lambda s, t: s == 3 or t == 1  # noqa: E731
        return text(LENGTHS, words=self._words, missing=missing).samples

    def samples(self):
        return iter(self._samples())


def settings(engine=None, *, truncation=None, **fields):
    return Settings.model_validate(
        {
            "level": "bptt",
            "dtype": "float64",
            "engine": {"digests": True, **(engine or {})},
            "locality": {"truncation": truncation},
            "learning": {"lr": 0.05, "momentum": 0.5, "dampening": 0.2},
            **fields,
        }
    )


def network(name):
    return tangle() if name == "tangle" else stacked("lstm", 2)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "engine", "truncation", "dynamics"),
    [
        ("tangle", {"actors": 2}, None, {}),
        ("tangle", {"actors": 3}, 3, {}),
        ("tangle", {"placement": [["e", "b"], ["a", "y"], ["w"]]}, None, {"reset": {"h": "never"}}),
        ("lstm", {"actors": 2}, 2, {"eta": 0.1, "tau": 0.5}),
        ("lstm", {"actors": 3, "queue": 1}, None, {}),
    ],
)
def test_two_engines(session, leaves_no_socket, name, engine, truncation, dynamics):
    source = PortableText(words=name == "tangle")
    alone, spread = (
        train(network(name), source, settings(e, truncation=truncation, dynamics=dynamics))
        for e in ({}, {"kind": "ray", **engine})
    )
    assert learned(alone, lambda: train(network(name), source, settings(steps=1)).model)
    assert_equal(alone, spread)
    assert alone.stored == spread.stored
    assert alone.samples == sum(LENGTHS)


@pytest.mark.ray
def test_a_stream_of_the_driver_that_ends_without_a_tag(session):
    untagged = [
        Sample(s.u, s.y, end=s.end and n < 10) for n, s in enumerate(text([6, 4, 7]).samples)
    ]
    alone, spread = (
        train(stacked("gru"), from_iterable(untagged), settings(e))
        for e in ({}, {"kind": "ray", "actors": 2})
    )
    assert alone.blocks["y"].updates == 3
    assert_equal(alone, spread)


# -- the end ---------------------------------------------------------------------------------------


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, state in found.items():
        assert state.updates == expected[name].updates, name
        for key, value in state.theta.items():
            assert torch.equal(value, expected[name].theta[key]), (name, key)


@pytest.mark.parametrize("steps", [3, 9, 10, 11])
def test_steps_end_a_sequence(steps):
    """The run takes `steps` tokens of sequences of 10 and 4: as if the stream had ended there."""
    samples = text([10, 4]).samples
    tagged = [*samples[: steps - 1], Sample(samples[steps - 1].u, samples[steps - 1].y, end=True)]
    expected = train(stacked("gru"), from_iterable(tagged), settings())
    found = train(stacked("gru"), from_iterable(samples), settings(steps=steps))
    assert found.samples == steps
    assert_same(found.blocks, expected.blocks)


def test_an_interruption_ends_a_sequence():
    """The run is stopped while the stream yields token 7, which is then the last one."""
    samples = text([20]).samples
    graph, run = stacked("gru"), settings()

    def drawing():
        for n, sample in enumerate(samples):
            if n == 7:
                source.stop.set()
            yield sample

    stream = from_iterable(drawing(), outputs=O)
    plan = make_plan(graph, run, stream.spec)
    mailbox = Mailbox({INPUT, *graph.blocks})
    nodes = [make_node(plan, name, mailbox) for name in graph.blocks]
    source = SourceNode(plan, stream, mailbox)
    run_loop([source, *nodes])
    sent = source.samples
    assert sent == 8
    cut = [*samples[: sent - 1], Sample(samples[sent - 1].u, samples[sent - 1].y, end=True)]
    expected = train(stacked("gru"), from_iterable(cut), run)
    assert_same({n.name: n.state() for n in nodes}, expected.blocks)


def test_a_stream_that_is_stopped_before_it_begins():
    graph, run = stacked("gru"), settings()
    stream = from_iterable(text([3]).samples)
    plan = make_plan(graph, run, stream.spec)
    mailbox = Mailbox({INPUT, *graph.blocks})
    nodes = [make_node(plan, name, mailbox) for name in graph.blocks]
    source = SourceNode(plan, stream, mailbox)
    source.stop.set()
    run_loop([source, *nodes])
    assert source.samples == 0
    assert all(node.state().updates == 0 for node in nodes)
