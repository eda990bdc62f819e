"""A run that leaves the finite range stops with tick, block and quantity, and keeps its weights.

Oracle: the same run with the stream cut off before the tick in which it failed.
"""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from runtime.networks import CLASSES, FEATURES, PortableStream, chain, stream
from torch import nn

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import DivergedError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable


def settings(**given):
    return Settings.model_validate({"level": "trace", "learning": {"lr": 0.1}, **given})


class Grows(nn.Module):
    """The input times 10 to the power of how often it was called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, 8)
        self.calls = 0

    def forward(self, x):
        if x.device.type != "meta":
            self.calls += 1
        return self.linear(x) * 10.0**self.calls


def growing(engine):
    """h of block0 passes the limit of 1e6 in its seventh or eighth sample, wherever it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(Grows(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    return model, settings(engine=engine, dynamics={"limit": 1e6}, learning={"lr": 1e-9})


@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "inprocess"},
        pytest.param(
            {"kind": "ray", "actors": 2}, marks=[pytest.mark.ray, pytest.mark.timeout(120)]
        ),
    ],
    ids=["inprocess", "ray"],
)
def test_where_and_what(engine, request):
    if engine["kind"] == "ray":
        request.getfixturevalue("session")
    model, asked = growing(engine)
    u = next(iter(PortableStream(30).samples())).u
    with pytest.raises(DivergedError) as caught:
        train(model, PortableStream(30), asked)
    error = caught.value
    assert (error.block, error.quantity) == ("block0", "h")
    assert error.norm > 1e6
    # trace, c = 1: sample n passes block 0 in tick n, so it grew to 10^(n+1)
    size = float(torch.linalg.vector_norm(model[0].linear(u).detach()))
    assert abs(error.tick + 1 - math.log10(1e6 / size)) < 2
    assert f"block 'block0' failed at tick {error.tick}: h left the finite range" in str(error)
    assert "use a smaller learning.lr" in error.cause
    assert "messages are up to 4 samples late" in error.cause
    result = error.result
    assert str(error) in result.warnings
    assert all(t.isfinite().all() for t in result.model.state_dict().values())
    assert result.blocks.keys() == {"block0", "block1", "block2"}
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # as Ray does
    assert (again.block, again.tick, str(again)) == (error.block, error.tick, str(error))


def test_the_weights_are_those_from_before():
    """In one process the blocks stop where they are: those of a run of as many samples."""
    items = [
        (torch.ones(2, 3), torch.full((2, 1), float("nan") if n == 6 else 1.0)) for n in range(9)
    ]

    def loss(prediction, target):
        return mse(prediction, target.nan_to_num(1e30))

    model = nn.Sequential(nn.Linear(3, 1))
    asked = settings(level="backprop", loss="mse")
    finite = [(u, y.nan_to_num(0.0)) for u, y in items]
    finite[6] = (finite[6][0], torch.full((2, 1), 1e30))
    with pytest.raises(DivergedError) as caught:
        train(model, from_iterable(finite), asked, loss=loss)
    assert (caught.value.quantity, caught.value.tick) == ("loss", 6)
    assert math.isinf(caught.value.norm)
    before = train(model, from_iterable(finite[:6]), asked, loss=loss)
    left = caught.value.result
    for name, weight in before.model.state_dict().items():
        assert torch.equal(left.model.state_dict()[name], weight)
    assert sum(w.samples for w in left.windows["block0"]) == 6


def test_a_limit_below_the_first_state_is_named():
    with pytest.raises(DivergedError, match=r"dynamics\.limit \(0\.001\)"):
        train(chain(), stream(3), settings(dynamics={"limit": 1e-3}))


def test_learning_that_runs_away():
    with pytest.raises(DivergedError, match="use a smaller learning.lr") as caught:
        train(chain(), stream(300), settings(learning={"lr": 1e9}))
    assert caught.value.tick < 300


def oscillator(activation=nn.Tanh, **dynamics):
    """Two neurons on a cycle with themselves, compared with a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        block = BlockSpec(
            "x",
            nn.Sequential(nn.Linear(2, 2), activation()),
            ("x",),
            shape=(2,),
            loss=mse,
            state=True,
        )
    items = [(torch.zeros(1, 1), torch.full((1, 2), 0.5)) for _ in range(4000)]
    asked = settings(
        level="local",
        locality={"readout": "state", "target": "current"},
        dynamics={"tau": 0.01, "c": 30, "beta": 10, "phi": 100, **dynamics},
    )
    return lambda: train(Graph([block]), from_iterable(items), asked)


def test_the_original_hamilton_equations_blow_up():
    """s = +1 integrated forward has z' = +c z: it grows as e^{(c - eta) t}."""
    with pytest.raises(DivergedError, match=r"sign s = \+1 .* use dynamics.sign -1") as caught:
        oscillator(sign=1, eta=10)()
    assert caught.value.quantity == "z"
    # |z| reaches the limit 1e12 from about 1 at a rate between c - eta and 2 c
    assert math.log(1e12) / (2 * 30 * 0.01) < caught.value.tick < 3 * math.log(1e12) / (20 * 0.01)


@pytest.mark.filterwarnings("ignore:block 'x' lies on a cycle")
def test_too_little_dissipation_on_a_cycle():
    with pytest.raises(DivergedError, match=r"lies on a cycle with eta_omega = 0 1/s, below 2K/c"):
        oscillator(nn.Identity, eta_z=0, eta_omega=0, weight_cost=1)()


class Root(nn.Module):
    """x |x|: differentiable at 0, but autograd's derivative of the root is not."""

    def forward(self, x):
        return x * x.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("level", ["backprop", "local"])
def test_a_derivative_that_does_not_exist(level):
    """h, z and the loss stay finite, the gradient does not: the weights must not take it."""
    items = [(torch.ones(2, 3), torch.ones(2, 1)) for _ in range(6)]
    items[4] = (torch.zeros(2, 3), torch.ones(2, 1))
    model = nn.Sequential(nn.Linear(3, 4, bias=False), Root(), nn.Linear(4, 1))
    asked = settings(level=level, loss="mse", learning={"lr": 0.01})
    with pytest.raises(DivergedError, match="a derivative does not exist") as caught:
        train(model, from_iterable(items), asked)
    assert (caught.value.block, caught.value.quantity) == ("block0", "omega")
    assert all(t.isfinite().all() for t in caught.value.result.model.state_dict().values())


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_several_blocks_at_once(session):
    """The first one by tick and order is reported, and what came before is kept, on Ray as well."""

    def run(engine):
        def explode(prediction, target):
            return mse(prediction, target) * 1e30

        blocks = [BlockSpec("a", nn.Linear(FEATURES, 3), ("u",))]
        blocks += [BlockSpec(f"y{i}", nn.Linear(3, 1), ("a",), loss=explode) for i in range(3)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            graph = Graph(blocks)
        items = [(torch.ones(2, FEATURES), torch.ones(2, 1)) for _ in range(20)]
        with pytest.raises(DivergedError) as caught:
            train(graph, from_iterable(items), settings(engine=engine))
        return caught.value

    alone = run({"kind": "inprocess"})
    spread = run({"kind": "ray", "placement": [["a"], ["y1"], ["y0"], ["y2"]]})
    assert (alone.quantity, alone.tick) == (spread.quantity, spread.tick) == ("loss", 1)
    assert alone.block == "y0"
    assert spread.block.startswith("y")
    assert spread.result is not None
