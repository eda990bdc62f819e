"""Centralised training against hand-written loops, and what it must leave alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hamdist.config import Level, Settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.errors import BlockError, LevelError, SettingsError, StreamError
from hamdist.runtime.results.result import Progress
from hamdist.runtime.train.train import train
from hamdist.streams.sample import Sample, SampleSpec
from hamdist.study.run import baseline
from hamdist.study.run.baseline import CENTRALISED, train_centralised

STEPS, B, F, C = 40, 6, 5, 3  # samples, batch, features, classes
MISSING = {0, 7, 8, 21}  # samples without target


class Items:
    """A stream of random samples; `fault` is raised instead of sample `at`."""

    portable = True
    spec = SampleSpec((B, F), torch.float64, (B,), torch.int64, classes=C)

    def __init__(self, fault: BaseException | None = None, at: int = 0) -> None:
        self.fault, self.at = fault, at

    def samples(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(11)
        for item in range(3 * STEPS):
            if self.fault is not None and item == self.at:
                raise self.fault
            u = torch.randn(B, F, dtype=torch.float64, generator=generator)
            y = torch.randint(C, (B,), generator=generator)
            yield Sample(u, None if item in MISSING else y)


def net(*, dropout: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        hidden: list[nn.Module] = [nn.Dropout(0.3)] if dropout else []
        model = nn.Sequential(nn.Linear(F, 8), nn.Tanh(), *hidden, nn.Linear(8, C))
    return model.double()


def settings(**learning: object) -> Settings:
    return Settings.model_validate(
        {"steps": STEPS, "dtype": "float64", "learning": learning, "metrics": {"window": 9}}
    )


@pytest.mark.parametrize("decay", ["none", "linear"])
@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.6, 0.3)])
def test_weights_are_those_of_sgd_written_out(
    decay: str, momentum: float, dampening: float
) -> None:
    """v <- mu v + (1 - rho) g (the first v is g itself), theta <- theta - lr_n v."""
    model = net()
    asked = settings(lr=0.2, momentum=momentum, dampening=dampening, decay=decay)
    result = train_centralised(model, Items(), asked)

    theta = [p.detach().clone() for p in net().parameters()]
    velocity: list[torch.Tensor] | None = None
    for n, sample in zip(range(STEPS), Items().samples(), strict=False):
        if sample.y is None:
            continue
        leaves = [p.requires_grad_() for p in theta]
        hidden = torch.tanh(sample.u @ leaves[0].T + leaves[1])
        log_p = torch.log_softmax(hidden @ leaves[2].T + leaves[3], 1)
        loss = -log_p[torch.arange(B), sample.y].mean()
        gradient = torch.autograd.grad(loss, leaves)
        if velocity is None:
            velocity = [g.clone() for g in gradient]
        else:
            velocity = [
                momentum * v + (1 - (dampening if momentum else 0.0)) * g
                for v, g in zip(velocity, gradient, strict=True)
            ]
        rate = 0.2 * (1 - n / STEPS) if decay == "linear" else 0.2
        theta = [(p - rate * v).detach() for p, v in zip(leaves, velocity, strict=True)]
    for learned, expected in zip(result.model.parameters(), theta, strict=True):
        torch.testing.assert_close(learned.detach(), expected, rtol=1e-12, atol=1e-13)


def test_a_step_for_several_samples_is_torchs_accumulation() -> None:
    """As at level `backprop`: a sample without a target counts as zero; what is left is not
    learned."""
    asked = settings(lr=0.2, momentum=0.9, decay="linear", average=0.5)
    asked = asked.changed(locality={"accumulate": 4})
    result, model = train_centralised(net(), Items(), asked), net()
    optimiser = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    for n, sample in zip(range(STEPS), Items().samples(), strict=False):
        if sample.y is not None:
            (nn.functional.cross_entropy(model(sample.u), sample.y) / 4).backward()
        if n % 4 == 3:
            optimiser.param_groups[0]["lr"] = 0.2 * (1 - n / STEPS)
            optimiser.step()
            optimiser.zero_grad()
    for learned, expected in zip(result.plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(learned, expected, rtol=1e-12, atol=1e-13)
    level = train(net(), Items(), asked.changed(level=Level.BACKPROP))
    for learned, expected in zip(result.model.parameters(), level.model.parameters(), strict=True):
        torch.testing.assert_close(learned, expected, rtol=1e-12, atol=1e-13)


def test_metrics_are_test_then_train() -> None:
    result = train_centralised(net(), Items(), settings(lr=0.3))
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), 0.3)
    losses, right = [], []
    for n, sample in zip(range(STEPS), Items().samples(), strict=False):
        if sample.y is None:
            continue
        prediction = model(sample.u)
        loss = nn.functional.cross_entropy(prediction, sample.y)
        losses.append((n, float(loss.detach())))
        right.append(int((prediction.argmax(1) == sample.y).sum()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    windows = result.windows[CENTRALISED]
    assert [w.samples for w in windows] == [9, 9, 9, 9]
    assert [w.first for w in windows] == [losses[i][0] for i in (0, 9, 18, 27)]
    assert [w.correct for w in windows] == [sum(right[i : i + 9]) for i in (0, 9, 18, 27)]
    assert [w.loss for w in windows] == pytest.approx(
        [sum(loss for _, loss in losses[i : i + 9]) for i in (0, 9, 18, 27)], rel=1e-12
    )
    assert (result.samples, result.ticks, result.staleness) == (STEPS, STEPS, 0)
    assert result.bytes_per_edge == {}
    assert result.peak_memory["driver"] > 2**20
    assert not result.interrupted


def test_leaves_model_generator_and_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "fair_threads", lambda _: torch.get_num_threads() + 1)
    model = net(dropout=True)
    before = [p.detach().clone() for p in model.parameters()]
    state, count = torch.get_rng_state(), torch.get_num_threads()
    first = train_centralised(model, Items(), settings(lr=0.3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == count
    torch.manual_seed(123)  # what the caller did with the global generator must not matter
    second = train_centralised(model, Items(), settings(lr=0.3))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_own_loss() -> None:
    doubled = train_centralised(
        net(), Items(), settings(lr=0.1), loss=lambda p, y: 2 * cross_entropy(p, y)
    )
    plain = train_centralised(net(), Items(), settings(lr=0.2))
    for a, b in zip(doubled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_interrupted_keeps_what_was_reached() -> None:
    result = train_centralised(net(), Items(KeyboardInterrupt(), at=25), settings(lr=0.1))
    assert result.interrupted
    assert result.samples == 25
    assert result.windows[CENTRALISED][-1].last == 24


def test_failures_are_named() -> None:
    with pytest.raises(StreamError, match="sample 4"):
        train_centralised(net(), Items(StreamError("sample 4"), at=4), settings(lr=0.1))
    with pytest.raises(BlockError, match="'centralised' failed at tick 1: RuntimeError") as caught:
        train_centralised(nn.Linear(F + 1, C).double(), Items(), settings(lr=0.1))
    assert "Traceback" in caught.value.details
    endless = Settings.model_validate({"learning": {"decay": "linear"}})
    with pytest.raises(LevelError, match="steps"):
        train_centralised(net(), Items(), endless)


def test_progress_ends_with_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "PROGRESS_SECONDS", 0.0)
    seen: list[Progress] = []
    train_centralised(net(), Items(), settings(lr=0.1), on_progress=seen.append)
    assert [p.samples for p in seen] == [*range(1, STEPS + 1), STEPS]
    assert seen[-1].steps == STEPS
    assert (seen[-1].blocks[0].tick, seen[-1].blocks[0].updates) == (STEPS, STEPS - len(MISSING))
    assert sum(window.samples for window in seen[-1].windows) == STEPS - len(MISSING)


@pytest.mark.parametrize(
    ("engine", "cores", "expected"),
    [
        ({"kind": "inprocess", "threads": 1}, 8, 1),
        ({"kind": "inprocess", "threads": 3}, 8, 3),
        ({"kind": "inprocess", "threads": 16}, 8, 8),
        ({"kind": "ray", "actors": 4}, 8, 4),
        ({"kind": "ray", "actors": 4, "threads": 2}, 16, 8),
        ({"kind": "ray", "actors": 4, "threads": 2}, 2, 2),
        ({"kind": "ray"}, 6, 6),
        ({"kind": "ray", "placement": [["a", "b"], ["c"]], "threads": 2}, 8, 4),
    ],
)
def test_fair_threads(
    engine: dict[str, object], cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "cores", lambda: cores)
    asked = Settings.model_validate({"engine": engine}).engine
    assert baseline.fair_threads(asked) == expected


def test_the_faster_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    cost = {1: 1, 2: 3}  # readings of the clock that a step takes

    def step() -> None:
        for _ in range(cost[torch.get_num_threads()]):
            next(clock)

    monkeypatch.setattr(baseline.time, "perf_counter", lambda: float(next(clock)))  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    assert baseline.faster_of({1, 2}, step) == 1
    cost[1] = 5
    assert baseline.faster_of({1, 2}, step) == 2
    assert torch.get_num_threads() == before


def test_adaptive_rates_are_adam():
    """The centralised run against a loop of torch.optim.Adam, and level backprop against both."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(F, 7), nn.Tanh(), nn.Linear(7, C)).double()
    settings = Settings.model_validate(
        {
            "level": "backprop",
            "steps": STEPS,
            "learning": {"lr": 0.02, "momentum": 0.8, "adaptive": {"memory": 0.97}},
        }
    )
    plain = copy.deepcopy(model)
    optimiser = torch.optim.Adam(plain.parameters(), 0.02, (0.8, 0.97), 1e-8)
    for sample in itertools.islice(Items().samples(), STEPS):
        if sample.y is not None:
            optimiser.zero_grad()
            cross_entropy(plain(sample.u), sample.y).backward()
            optimiser.step()
    runs = train_centralised(model, Items(), settings), train(model, Items(), settings)
    for run in runs:
        for key, expected in plain.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[key], expected, rtol=0, atol=1e-12)


def test_adaptive_rates_have_no_dampening():
    with pytest.raises(ValueError, match="'dampening' is 0.5 with 'adaptive'"):
        Settings.model_validate({"learning": {"dampening": 0.5, "adaptive": {}}})
    settings = Settings.model_validate({"level": "bptt", "learning": {"adaptive": {}}})
    with pytest.raises(LevelError, match=r"learning.adaptive with presentation 'sequence'"):
        train(nn.Sequential(nn.Linear(F, C)).double(), Items(), settings)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_frozen_trains_the_last_layer_on_what_the_others_were_drawn(kind: str) -> None:
    """Against a loop over a linear model of the frozen features."""
    adaptive = {"adaptive": {}} if kind == "adam" else {}
    given = settings(lr=0.1, decay="linear", **adaptive)
    result = train_centralised(net(), Items(), given, frozen=True)
    begin = net()
    features, last = begin[:-1], copy.deepcopy(begin[-1])
    if kind == "adam":
        optimiser: torch.optim.Optimizer = torch.optim.Adam(last.parameters(), 0.1, (0.0, 0.999))
    else:
        optimiser = torch.optim.SGD(last.parameters(), 0.1)
    for item, sample in enumerate(itertools.islice(Items().samples(), STEPS)):
        if sample.y is None:
            continue
        with torch.no_grad():
            h = features(sample.u)
        optimiser.zero_grad()
        cross_entropy(last(h), sample.y).backward()
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - item / STEPS)
        optimiser.step()
    own = result.model.state_dict()
    assert torch.equal(own["0.weight"], begin[0].weight)
    assert torch.allclose(own["2.weight"], last.weight, atol=1e-12)
    assert torch.allclose(own["2.bias"], last.bias, atol=1e-12)
    assert not torch.allclose(own["2.weight"], begin[2].weight, atol=1e-3)


def test_frozen_needs_hidden_layers() -> None:
    for model in (nn.Linear(F, C).double(), nn.Sequential(nn.Linear(F, C)).double()):
        with pytest.raises(SettingsError, match="'frozen' trains the last child"):
            train_centralised(model, Items(), settings(), frozen=True)
