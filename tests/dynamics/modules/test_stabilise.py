"""Oracle: the formulas of stabilise.py written out, and the recipe's network of models.py."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from dynamics.helpers import F64, noise, relative, samples
from torch import nn

import hamdist
from hamdist.config import ModelSettings
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.modules.prenorm import PreNorm, stabilised
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.errors import ChoiceWarning, GraphError, SettingsError
from hamdist.models.build import make_model
from hamdist.streams import from_iterable


def normed(x):
    over = tuple(range(1, x.dim()))
    centred = x - x.mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True) + 1e-3).sqrt()


def mlp(*sizes):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def test_a_chain_becomes_the_recipes_network():
    """relu(xW + b); h + relu(LN(h) W + b)/sqrt(L); LN(h) W + b, as residual-mlp has it."""
    model = mlp(6, 8, 8, 8, 3)
    made, told = stabilised(model, noise(0, 5, 6))
    recipe = make_model(
        ModelSettings(kind="residual-mlp", width=8, depth=4),
        from_iterable(samples(1, 5, 6, 3)).spec,
        seed=0,
        dtype=F64,
    )
    for p, q in zip(recipe.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    x = noise(1, 5, 6)
    torch.testing.assert_close(made(x), recipe(x), rtol=1e-13, atol=1e-13)
    assert told == [
        "stabilised: of 4 layers 2 have become h + 0.5 f(LN(h)), 1 f(LN(h)); the keys of their "
        "weights have 'branch' in them"
    ]


def test_the_recipes_network_by_hand():
    """staleness.md's formulas and initial weights, without any module of ours."""
    recipe = make_model(
        ModelSettings(kind="residual-mlp", width=400, depth=5),
        from_iterable([(noise(0, 5, 300), torch.arange(5))], classes=200).spec,
        seed=3,
        dtype=F64,
    )
    weights = [m for m in recipe.modules() if isinstance(m, nn.Linear)]
    x = noise(1, 5, 300)
    h = torch.relu(x @ weights[0].weight.T + weights[0].bias)
    for layer in weights[1:-1]:
        h = h + torch.relu(normed(h) @ layer.weight.T + layer.bias) / math.sqrt(5)
    expected = normed(h) @ weights[-1].weight.T + weights[-1].bias
    torch.testing.assert_close(recipe(x), expected, rtol=1e-12, atol=1e-12)
    for i, layer in enumerate(weights):
        gain = 1.0 if layer is weights[-1] else 2.0
        std = float(layer.weight.detach().std())
        assert std == pytest.approx((gain / layer.in_features) ** 0.5, rel=0.02), i
        assert not layer.bias.any()


def test_convolutions_and_changes_of_shape():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    ).double()
    before = copy.deepcopy(model.state_dict())
    made, _ = stabilised(model, noise(0, 2, 1, 8, 8))
    x = noise(1, 2, 1, 8, 8)
    model.eval()
    h = model[1](model[0](x))
    h = h + 0.5 * model[4](model[3](model[2](normed(h))))
    h = model[7](model[6](model[5](normed(h))))
    torch.testing.assert_close(made.eval()(x), model[8](normed(h)), rtol=1e-12, atol=1e-12)
    assert relative(model.state_dict().values(), before.values()) == 0
    assert [n for n, _ in made.named_children()] == ["0", "1", "2", "5", "8"]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))))


def test_the_chains_inside_a_module_of_ones_own():
    """The first layer of them all stays; here that is the body's, for the stem stands outside."""
    torch.manual_seed(0)
    model = Own().double().eval()
    state = torch.get_rng_state()
    made, _ = stabilised(model, noise(0, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    x = noise(1, 5, 6)
    h = model.body[1](model.body[0](torch.relu(model.stem(x))))
    h = h + model.body[3](model.body[2](normed(h))) / math.sqrt(3)
    torch.testing.assert_close(made(x), model.head[1](normed(h)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.ReLU())])
def test_nothing_to_stabilise(model):
    with pytest.raises(GraphError, match="hamdist.PreNorm"):
        stabilised(model, torch.zeros(3, 4))


def test_pre_norm_is_a_module_for_networks_of_ones_own():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double()
    block = hamdist.PreNorm(branch, 8, 0.3)
    x = noise(1, 5, 8)
    torch.testing.assert_close(block(x), x + 0.3 * branch(normed(x)), rtol=1e-13, atol=1e-13)
    assert make_closed(block, Combine.CONCAT, 0, 1) is not None  # as fast as the recipe's own


def test_in_a_run_only_where_it_is_asked_for():
    items = samples(6, 5, 6, 3)
    model = mlp(6, 8, 8, 3)
    given = {"level": "backprop", "dtype": "float64", "loss": "mse"}
    plain = hamdist.train(copy.deepcopy(model), items, **given)
    assert not any(isinstance(m, PreNorm) for m in plain.model.modules())
    asked = hamdist.Settings.model_validate({**given, "model": {"stabilise": True}})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = hamdist.train(copy.deepcopy(model), items, asked)
    assert any(isinstance(w.message, ChoiceWarning) for w in told)
    assert sum(isinstance(m, PreNorm) for m in result.model.modules()) == 1
    assert len(result.blocks) == 3
    graph = hamdist.Graph([hamdist.BlockSpec("a", nn.Linear(6, 3).double(), ("u",), loss=abs)])
    with pytest.raises(SettingsError, match="Graph"):
        hamdist.train(graph, items, hamdist.Settings(model={"stabilise": True}))
