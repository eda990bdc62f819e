"""Streams in runs. Oracles: autograd with torch.optim.SGD (targets by readout), the run without
delay (late targets), tables written by hand (pace), the in-process engine (Ray)."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import BATCH, CLASSES, FEATURES, chain, seeded
from study.builders import make_run
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.config import Late, Settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.errors import GraphError, SettingsError, StreamError
from hamdist.models.build import make_model
from hamdist.runtime.train.train import train
from hamdist.streams import Delayed, Paced, Rejoin, Sample, SampleSpec, TargetSpec, from_iterable
from hamdist.streams.replay import next_sample
from hamdist.study.report.table import run_facts
from hamdist.study.run.baseline import train_centralised

F64 = torch.float64
OUTPUTS = 2
TARGETS = {
    "kind": TargetSpec((BATCH,), torch.int64, CLASSES),
    "place": TargetSpec((BATCH, OUTPUTS), F64),
}


class TwoTargets:
    """Endless samples with a class and a place; of every third sample one target is missing."""

    portable = True
    spec = SampleSpec.several((BATCH, FEATURES), F64, TARGETS)

    def samples(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(11)
        for n in itertools.count():
            u = torch.randn(BATCH, FEATURES, generator=generator, dtype=F64)
            kind = torch.randint(CLASSES, (BATCH,), generator=generator)
            place = torch.randn(BATCH, OUTPUTS, generator=generator, dtype=F64)
            known = ({"kind": kind, "place": place}, {"kind": kind}, {"kind": None, "place": place})
            yield Sample(u, known[n % 3])


class OneTarget:
    """The classes of `TwoTargets`, numbered by their inputs: sample n is all n."""

    portable = True
    spec = SampleSpec((BATCH, FEATURES), torch.float32, (BATCH,), torch.int64, CLASSES)

    def samples(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(12)
        for n in itertools.count():
            u = torch.randn(BATCH, FEATURES, generator=generator)
            y = torch.randint(CLASSES, (BATCH,), generator=generator)
            yield Sample(u, y, time=float(n))


class Clock:
    """Every look at it takes `cost` seconds, and nothing else takes any."""

    def __init__(self, cost: float) -> None:
        self.now = 0.0
        self.cost = cost

    def __call__(self) -> float:
        self.now += self.cost
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def two_readouts() -> Graph:
    return seeded(
        lambda: Graph(
            [
                BlockSpec("trunk", nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh()), ("u",)),
                BlockSpec("kind", nn.Linear(5, CLASSES), ("trunk",), loss=cross_entropy),
                BlockSpec("place", nn.Linear(5, OUTPUTS), ("trunk",), loss=mse),
            ]
        )
    ).copy()


def double(graph: Graph) -> Graph:
    for block in graph.blocks.values():
        block.module.double()
    return graph


def settings(**fields: Any) -> Settings:
    return Settings.model_validate({"level": "backprop", "seed": 5, "steps": 30, **fields})


class TestTargetsByReadout:
    def test_against_autograd(self) -> None:
        result = train(double(two_readouts()), TwoTargets(), settings(learning={"lr": 0.1}))
        graph = double(two_readouts())
        trunk, kind, place = (graph.blocks[n].module for n in ("trunk", "kind", "place"))
        model = nn.ModuleList([trunk, kind, place])
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: dict[str, float] = {"kind": 0.0, "place": 0.0}
        for sample in itertools.islice(TwoTargets().samples(), 30):
            h = trunk(sample.u)
            found = {}
            if sample.target("kind") is not None:
                found["kind"] = functional.cross_entropy(kind(h), sample.target("kind"))
            if sample.target("place") is not None:
                squares = (place(h) - sample.target("place")).square().sum()
                found["place"] = squares / (2 * BATCH)
            optimiser.zero_grad()
            sum(found.values()).backward()
            optimiser.step()
            for name, loss in found.items():
                losses[name] += loss.item()
        for name, module in (("trunk", trunk), ("kind", kind), ("place", place)):
            for key, value in module.state_dict().items():
                assert (value - result.blocks[name].theta[key]).abs().max() <= 1e-12
        counted = {name: sum(w.samples for w in result.windows[name]) for name in losses}
        assert counted == {"kind": 20, "place": 20}
        for name, loss in losses.items():
            assert sum(w.loss for w in result.windows[name]) == pytest.approx(loss, rel=1e-12)

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("level", ["backprop", "local"])
    def test_through_ray(self, session: object, level: str) -> None:
        alone, spread = (
            train(
                double(two_readouts()),
                TwoTargets(),
                settings(level=level, engine=engine),
            )
            for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2})
        )
        assert_equal(alone, spread)

    def stream(self, **targets: TargetSpec) -> TwoTargets:
        stream = TwoTargets()
        stream.spec = SampleSpec.several((BATCH, FEATURES), F64, targets)
        return stream

    @pytest.mark.parametrize(
        ("targets", "words"),
        [
            (
                {**TARGETS, "time": TARGETS["place"]},
                "targets for 'time', which is no readout.*kind",
            ),
            ({"kind": TARGETS["kind"]}, "readout 'place' has no targets in the stream.*'kind'"),
            (
                {**TARGETS, "kind": TargetSpec((BATCH,), torch.int64, CLASSES + 1)},
                "'kind' predicts .* the stream has 4 classes",
            ),
            (
                {**TARGETS, "place": TargetSpec((BATCH, 3), F64)},
                r"'place' predicts \(4, 2\), but the targets are \(4, 3\)",
            ),
            ({**TARGETS, "kind": TARGETS["place"]}, "'kind' has the loss cross-entropy"),
        ],
    )
    def test_what_does_not_fit_the_graph(self, targets: Any, words: str) -> None:
        with pytest.raises(GraphError, match=words):
            train(double(two_readouts()), self.stream(**targets), settings())

    def test_centralised_training_has_one_output(self) -> None:
        model = nn.Linear(FEATURES, CLASSES).double()
        with pytest.raises(GraphError, match="targets by readout .'kind', 'place'."):
            train_centralised(model, TwoTargets(), settings())

    def test_models_that_settings_name_have_one_output(self) -> None:
        with pytest.raises(SettingsError, match="targets by readout .'kind', 'place'."):
            make_model(settings().model, TwoTargets.spec, seed=0, dtype=F64)


class TestLateTargets:
    @pytest.mark.parametrize("tagged", [True, False])
    def test_the_run_is_the_same(self, tagged: bool) -> None:
        late = Rejoin(Delayed(OneTarget(), 4, tagged=tagged), None if tagged else 4)
        plain = train(chain(), OneTarget(), settings(level="trace"))
        rejoined = train(chain(), late, settings(level="trace"))
        assert_equal(plain, rejoined)
        assert plain.stream == {}
        assert rejoined.stream == {"let_go": 0, "too_late": 0, "awaiting_most": 4}

    def test_centralised(self) -> None:
        plain = train_centralised(chain(), OneTarget(), settings())
        late = train_centralised(chain(), Rejoin(Delayed(OneTarget(), 4)), settings())
        assert plain.windows == late.windows
        assert late.stream["awaiting_most"] == 4

    def test_nobody_rejoined_them(self) -> None:
        with pytest.raises(StreamError, match="sample 2 brings targets of earlier samples"):
            train(chain(), Delayed(OneTarget(), 2), settings())


class TestPace:
    def stream(self, late: Late) -> Paced:
        # one look for each sample that is given, and it takes 2.5 periods
        clock = Clock(cost=0.3125)
        return Paced(OneTarget(), 0.125, late, clock=clock, sleep=clock.sleep)

    def numbers(self, late: Late) -> list[float]:
        return [s.time for s in itertools.islice(self.stream(late).samples(), 30)]

    def test_dropped(self) -> None:
        assert self.numbers(Late.DROP) == [int(2.5 * (k + 1)) for k in range(30)]
        result = train(chain(), self.stream(Late.DROP), settings())
        assert result.samples == 30
        assert result.stream == {"dropped": 75 - 29}

    def test_kept(self) -> None:
        assert self.numbers(Late.KEEP) == list(range(30))
        result = train(chain(), self.stream(Late.KEEP), settings())
        assert_equal(train(chain(), OneTarget(), settings()), result)
        assert result.stream == {"waiting_most": 75 - 29}

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("late", list(Late))
    def test_counts_come_back_from_another_process(self, session: object, late: Late) -> None:
        alone, spread = (
            train(chain(), self.stream(late), settings(engine=engine))
            for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2})
        )
        assert_equal(alone, spread)
        assert alone.stream == spread.stream
        assert sum(spread.stream.values()) == 75 - 29


def test_time_stamps_that_stand_still() -> None:
    class Still(OneTarget):
        def samples(self) -> Iterator[Sample]:
            for n, sample in enumerate(super().samples()):
                yield Sample(sample.u, sample.y, time=min(float(n), 3.0))

    dynamics = {"tau": "stamps", "c": 1.0, "eta": 1.0, "beta": 0.1, "phi": 1.0}
    with pytest.raises(StreamError, match="sample 4 has time stamp 3 s, the one before 3 s"):
        train(chain(), Still(), settings(level="local", dynamics=dynamics))


def test_counts_are_printed() -> None:
    counts = {"dropped": 1200, "let_go": 3, "too_late": 0, "own": 4}
    assert run_facts(make_run("local", stream=counts))["stream"] == (
        "1,200 dropped while the network was busy, 3 let go without a target, own 4"
    )
    none = run_facts(make_run("local", stream={"dropped": 0}))
    assert none["stream"] == "0 dropped while the network was busy"
    assert "stream" not in run_facts(make_run("local"))


def test_what_a_failed_stream_held_is_let_go_at_once():
    """As the processes of a DataLoader, which are slow to end as garbage."""
    held = []

    def samples():
        loader = torch.zeros(1)
        held.append(weakref.ref(loader))
        yield torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
        raise OSError("gone")

    stream = from_iterable(samples(), classes=2).samples()
    next(stream)
    with pytest.raises(StreamError, match="gone") as caught:
        next_sample(stream, 1)
    assert held[0]() is None
    assert isinstance(caught.value.__cause__, OSError)


def test_whole_numbers_are_no_probabilities():
    one_hot = torch.eye(3, dtype=torch.long)[[0, 2]]
    with pytest.raises(GraphError, match=r"place of probabilities; .* y.argmax\(1\), or y.float"):
        hamdist.train(nn.Linear(4, 3), [(torch.zeros(2, 4), one_hot)] * 3)
    result = hamdist.train(nn.Linear(4, 3), [(torch.zeros(2, 4), one_hot.float())] * 3)
    assert result.samples == 3
