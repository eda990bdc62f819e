"""Documented contract: nothing is paired by arrival order. A receiver that finds another stamp than
the one its schedule names stops, and names the edge and both stamps."""

from __future__ import annotations

import pytest
import torch
from runtime.networks import chain, stream

from hamdist.config import Settings
from hamdist.dynamics.losses import cross_entropy
from hamdist.dynamics.schedule import Kind, Stamp
from hamdist.errors import StampError
from hamdist.runtime.loop import run_loop
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.nodes import make_node
from hamdist.runtime.plan import make_plan
from hamdist.runtime.signal import Channel, Signal
from hamdist.runtime.source import SourceNode
from hamdist.runtime.train import as_graph

CHANNEL = Channel(0, Kind.STATE, "a", "b", "a->b", 4)


def test_the_named_signal_is_handed_over():
    mail = Mailroom({"a", "b"})
    signal = Signal(Stamp(4, 2, 1), torch.ones(2))
    mail.post(CHANNEL, signal)
    assert mail.take(CHANNEL, Stamp(4, 2, 1), 5) is signal
    assert mail.payload_bytes == {"a->b": 8}


@pytest.mark.parametrize("sent", [Stamp(3, 2, 1), Stamp(4, 3, 1), Stamp(4, 2, 0)])
def test_another_stamp_is_a_defect(sent):
    mail = Mailroom({"a", "b"})
    mail.post(CHANNEL, Signal(sent))
    with pytest.raises(StampError) as caught:
        mail.take(CHANNEL, Stamp(4, 2, 1), 5)
    text = str(caught.value)
    assert "edge a->b" in text
    assert "names tick 4, sample 2, version 1" in text
    assert f"tick {sent.tick}, sample {sent.sample}, version {sent.version} was there" in text
    assert caught.value.block == "b"


def test_nothing_there_is_a_defect_too():
    with pytest.raises(StampError, match="nothing was there"):
        Mailroom({"a", "b"}).take(CHANNEL, Stamp(0, 0, 0), 1)


class Meddling(Mailroom):
    """Changes one signal on its way: what a defect of an engine would do."""

    def __init__(self, inside, kind, at, change):
        super().__init__(inside)
        self.kind, self.at, self.change = kind, at, change
        self.count = 0

    def post(self, channel, signal):
        if channel.kind is self.kind and channel.edge == "block1->block2":
            if self.count == self.at:
                signal = Signal(self.change(signal.stamp), signal.payload)
            self.count += 1
        super().post(channel, signal)


@pytest.mark.parametrize("kind", [Kind.STATE, Kind.MESSAGE])
@pytest.mark.parametrize("level", ["local", "trace"])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s._replace(tick=s.tick + 1),
        lambda s: s._replace(sample=s.sample - 1),
        lambda s: s._replace(version=s.version + 1),
    ],
)
def test_a_run_stops_at_the_first_wrong_stamp(kind, level, change):
    source = stream(40)
    settings = Settings.model_validate({"level": level})
    graph = as_graph(chain(), settings, source.spec, cross_entropy)
    plan = make_plan(graph, settings, source.spec)
    mail = Meddling({"u", *graph.blocks}, kind, 11, change)
    nodes = [SourceNode(plan, source, mail), *(make_node(plan, b, mail) for b in graph.blocks)]
    with pytest.raises(StampError, match="block1->block2"):
        run_loop(nodes)
