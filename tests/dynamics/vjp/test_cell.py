"""Oracle: torch.autograd on the plain module; formulas derived by hand for Linear + tanh."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, layer, linear, noise
from torch import nn

from hamdist.dynamics.graph.graph import Combine, combined
from hamdist.dynamics.objective.losses import loss_and_slope
from hamdist.dynamics.vjp.autograd import AutogradFunction
from hamdist.dynamics.vjp.gradient import dense
from hamdist.dynamics.vjp.seeding import block_seed
from hamdist.errors import GraphError


class Bilinear(nn.Module):
    """Two arguments, and a weight for each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(3, 4, 0), linear(3, 4, 1)

    def forward(self, x, y):
        return torch.tanh(self.a(x)) * self.b(y)


class Partly(nn.Module):
    """Reads the first of its arguments and the first of its weights."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = linear(3, 4, 0), linear(3, 4, 1)

    def forward(self, x, y):
        return self.used(x)


class InPlace(nn.Module):
    """Writes to its input, which torch allows in a plain forward pass."""

    def forward(self, x):
        x += 1
        return torch.relu_(x)


CASES = {
    "a user's in place": (Combine.SUM, lambda: nn.Sequential(InPlace(), linear(3, 4, 0))),
    "a user's in place, joined": (Combine.CONCAT, InPlace),
    "concat": (Combine.CONCAT, lambda: layer(6, 4, 0)),
    "sum": (Combine.SUM, lambda: layer(3, 4, 0)),
    "arguments": (Combine.ARGUMENTS, Bilinear),
    "unused": (Combine.ARGUMENTS, Partly),
    "in place": (Combine.SUM, lambda: nn.Sequential(nn.ReLU(inplace=True), linear(3, 4, 0))),
    "in place behind": (
        Combine.CONCAT,
        lambda: nn.Sequential(linear(6, 4, 0), nn.ReLU(inplace=True)),
    ),
    "without weights": (Combine.SUM, nn.Tanh),
    "identity": (Combine.CONCAT, nn.Identity),
}


def autograd(module, combine, inputs, wanted, cotangent):
    """z^T df/dh per wanted input, z^T df/dtheta per weight: plain torch, None as zeros."""
    module = copy.deepcopy(module)
    x = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    weights = [p for p in module.parameters() if p.requires_grad]
    # + 0: so that a module may work in place on an input that is a leaf
    output = module(*combined(combine, [t + 0 for t in x]))
    wrt = [t for t, w in zip(x, wanted, strict=True) if w] + weights
    found = torch.autograd.grad(output, wrt, cotangent, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True)]
    to_inputs = iter(found)
    return (
        output.detach(),
        [next(to_inputs) if w else None for w in wanted],
        list(to_inputs),
    )


def same(found, expected):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("stash", [False, True])
@pytest.mark.parametrize("wanted", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("case", CASES)
def test_pull_equals_autograd(case, wanted, stash):
    combine, make = CASES[case]
    cell = AutogradFunction(make(), combine, 0, stash=stash)
    inputs = [noise(0, 5, 3), noise(1, 5, 3)]
    kept = [t.clone() for t in inputs]
    record = cell.forward(inputs, wanted)
    cotangent = noise(2, *record.output.shape)
    output, to_inputs, to_weights = autograd(cell.module, combine, inputs, wanted, cotangent)
    torch.testing.assert_close(record.output.detach(), output, rtol=1e-14, atol=1e-14)
    per_parent, grads = cell.pull(record, cotangent)
    same(per_parent, to_inputs)
    same([dense(g) for g in grads], to_weights)
    same(inputs, kept)  # what a neighbour sent is never written to
    assert all(p.grad is None for p in cell.module.parameters())


@pytest.mark.parametrize("first", [lambda: nn.ReLU(inplace=True), InPlace])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("stash", [True, False])
def test_a_module_that_writes_to_its_only_input(first, wanted, stash):
    """One parent: the module's input is the very tensor that the parent sent."""
    cell = AutogradFunction(nn.Sequential(first(), linear(3, 4, 0)), Combine.CONCAT, 0, stash=stash)
    x, z = noise(0, 5, 3), noise(2, 5, 4)
    kept = x.clone()
    _, to_inputs, to_weights = autograd(cell.module, Combine.CONCAT, [x], [wanted], z)
    per_parent, grads = cell.pull(cell.forward([x], [wanted]), z)
    assert torch.equal(x, kept)
    same(per_parent, to_inputs)
    same(grads, to_weights)


def test_inputs_not_wanted_and_integer_inputs_have_no_product():
    cell = AutogradFunction(layer(6, 4, 0), Combine.CONCAT, 0)
    record = cell.forward([noise(0, 5, 3), noise(1, 5, 3)], [False, False])
    per_parent, grads = cell.pull(record, noise(2, 5, 4))
    assert per_parent == [None, None]
    assert len(grads) == 2
    words = AutogradFunction(nn.Embedding(7, 3, dtype=F64), Combine.CONCAT, 0)
    tokens = torch.tensor([[1, 2], [2, 0]])
    for wanted in (True, False):  # even if asked for
        record = words.forward([tokens], [wanted])
        cotangent = noise(2, 2, 2, 3)
        per_parent, (g,) = words.pull(record, cotangent)
        assert per_parent == [None]
        expected = torch.zeros(7, 3, dtype=F64)
        expected.index_add_(0, tokens.flatten(), cotangent.reshape(4, 3))
        torch.testing.assert_close(g, expected)


def test_pull_of_one_kind_and_pull_again():
    cell = AutogradFunction(layer(3, 4, 0), Combine.CONCAT, 0)
    x, z = noise(0, 5, 3), noise(1, 5, 4)
    _, to_inputs, to_weights = autograd(cell.module, Combine.CONCAT, [x], [True], z)
    record = cell.forward([x], [True])
    per_parent, grads = cell.pull(record, z, weights=False, keep=True)
    same(per_parent, to_inputs)
    assert grads == []
    per_parent, grads = cell.pull(record, z, inputs=False)
    assert per_parent == [None]
    same(grads, to_weights)


def test_pull_of_a_loss():
    cell = AutogradFunction(linear(3, 4, 0), Combine.CONCAT, 0)
    x, y = noise(0, 5, 3), noise(1, 5, 4)
    record = cell.forward([x], [True])
    _, slope = loss_and_slope(lambda a, b: 0.5 * (a - b).square().sum(), record.output, y)
    per_parent, grads = cell.pull(record, slope(3.0))
    error = 3.0 * (x @ cell.module.weight.T + cell.module.bias - y).detach()
    same(per_parent, [error @ cell.module.weight.detach()])
    same(grads, [error.T @ x, error.sum(0)])


def test_a_loss_without_a_gradient():
    """As with torch's backward: refused. One of 0 may be that of a batch without a target."""
    y = noise(0, 5, 3)
    for constant in (lambda *_: torch.tensor(1.0, dtype=F64), lambda y, _: y.detach().sum()):
        with pytest.raises(ValueError, match="the loss has no gradient"):
            loss_and_slope(constant, y, y)
    _, slope = loss_and_slope(lambda *_: torch.zeros((), dtype=F64), y, y)
    assert not slope(1.0).any()


@pytest.mark.parametrize("stash", [False, True])
def test_frozen_parameters_are_no_weights(stash):
    module = nn.Sequential(linear(3, 4, 0), nn.Tanh(), linear(4, 2, 1))
    module[0].requires_grad_(False)
    cell = AutogradFunction(module, Combine.CONCAT, 0, stash=stash)
    assert cell.names == ["2.weight", "2.bias"]
    assert [t.data_ptr() for t in cell.theta] == [
        module[2].weight.data_ptr(),
        module[2].bias.data_ptr(),
    ]
    x, z = noise(0, 5, 3), noise(1, 5, 2)
    _, to_inputs, to_weights = autograd(module, Combine.CONCAT, [x], [True], z)
    per_parent, grads = cell.pull(cell.forward([x], [True]), z)
    same(per_parent, to_inputs)
    same(grads, to_weights)
    module.requires_grad_(False)
    frozen = AutogradFunction(module, Combine.CONCAT, 0, stash=stash)
    per_parent, grads = frozen.pull(frozen.forward([x], [True]), z)
    same(per_parent, to_inputs)
    assert grads == []


@pytest.mark.parametrize("stash", [False, True])
def test_a_weight_used_twice_in_a_block_is_one_weight(stash):
    tied = linear(3, 3, 0)
    module = nn.Sequential(tied, nn.Tanh(), tied)
    cell = AutogradFunction(module, Combine.CONCAT, 0, stash=stash)
    assert cell.names == ["0.weight", "0.bias"]
    x, z = noise(0, 5, 3), noise(1, 5, 3)
    _, to_inputs, to_weights = autograd(module, Combine.CONCAT, [x], [True], z)
    per_parent, grads = cell.pull(cell.forward([x], [True]), z)
    same(per_parent, to_inputs)
    same(grads, to_weights)


def test_a_module_that_returns_no_tensor():
    cell = AutogradFunction(nn.LSTM(3, 4, dtype=F64), Combine.CONCAT, 0)
    with pytest.raises(GraphError, match="returned tuple, not a tensor"):
        cell.forward([noise(0, 5, 3)], [True])


# -- whose weights an old record meets -----------------------------------------------------------


def _by_hand(x, w1, b1, w2, b2, z, w2_back, w1_back):
    """tanh(W2 tanh(W1 x + b1) + b2): activations of W1, W2; products with W1_back, W2_back."""
    h1 = torch.tanh(x @ w1.T + b1)
    h2 = torch.tanh(h1 @ w2.T + b2)
    d2 = z * (1 - h2**2)
    d1 = (d2 @ w2_back) * (1 - h1**2)
    return d1 @ w1_back, [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0)]


@pytest.mark.parametrize("stash", [False, True])
def test_an_old_record_meets_its_own_activations(stash):
    """memory `trace`: with today's weights; `trace+weights`: with those of its forward."""
    module = nn.Sequential(layer(3, 4, 0), layer(4, 2, 1))
    cell = AutogradFunction(module, Combine.CONCAT, 0, stash=stash)
    x, z = noise(0, 5, 3), noise(1, 5, 2)
    record = cell.forward([x], [True])
    old = [t.clone() for t in cell.theta]
    for i, t in enumerate(cell.theta):
        t.add_(noise(10 + i, *t.shape))
    cell.forward([noise(5, 5, 3)], [True])  # a sample in between
    w1, b1, w2, b2 = old
    back = old if stash else cell.theta
    to_input, to_weights = _by_hand(x, w1, b1, w2, b2, z, back[2], back[0])
    wrong, _ = _by_hand(x, w1, b1, w2, b2, z, *([cell.theta, old][not stash][i] for i in (2, 0)))
    assert not torch.allclose(to_input, wrong)
    per_parent, grads = cell.pull(record, z)
    same(per_parent, [to_input])
    same(grads, to_weights)


def test_with_stash_an_old_record_is_pulled_at_the_old_weights():
    """A module without a formula here: conv, pool, norm. Oracle: autograd before the move."""
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, dtype=F64), nn.LayerNorm([3, 4, 4], dtype=F64), nn.GELU(), nn.Flatten()
    )
    cell = AutogradFunction(module, Combine.CONCAT, 0, stash=True)
    x, z = noise(0, 2, 1, 6, 6), noise(1, 2, 48)
    record = cell.forward([x], [True])
    _, to_inputs, to_weights = autograd(module, Combine.CONCAT, [x], [True], z)
    for t in cell.theta:
        t.mul_(-2)
    per_parent, grads = cell.pull(record, z)
    same(per_parent, to_inputs)
    same(grads, to_weights)


# -- random numbers ------------------------------------------------------------------------------


class OwnNoise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


RANDOM = {
    "dropout": lambda: nn.Sequential(linear(3, 64, 0), nn.Dropout(0.5)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, dtype=F64),
    "a user's module": OwnNoise,
    "rrelu": nn.RReLU,
}


@pytest.mark.parametrize("case", RANDOM)
def test_equal_seeds_draw_equal_masks(case):
    module = RANDOM[case]()
    one, two = (AutogradFunction(copy.deepcopy(module), Combine.CONCAT, 5) for _ in range(2))
    other = AutogradFunction(copy.deepcopy(module), Combine.CONCAT, 6)
    x = noise(0, 2, 5, 4) if case == "attention" else noise(0, 8, 3)
    outside = torch.get_rng_state()
    first = [one.forward([x], [True]).output for _ in range(3)]
    torch.rand(7)  # what others draw in between changes nothing
    second = [two.forward([x], [True]).output for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])  # every pass draws anew
    assert not torch.equal(first[0], other.forward([x], [True]).output)
    torch.set_rng_state(outside)


@pytest.mark.parametrize("case", RANDOM)
def test_the_global_generator_is_left_alone(case):
    cell = AutogradFunction(RANDOM[case](), Combine.CONCAT, 5)
    x = noise(0, 2, 5, 4) if case == "attention" else noise(0, 8, 3)
    before = torch.get_rng_state()
    for _ in range(2):
        record = cell.forward([x], [True])
        cell.pull(record, torch.ones_like(record.output))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_put_back_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(3)
            raise RuntimeError("no")

    cell = AutogradFunction(Fails(), Combine.CONCAT, 5)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        cell.forward([noise(0, 2, 3)], [True])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_message_uses_the_mask_of_its_forward():
    """Dropout drawn at the forward of a sample is the one of its backward."""
    cell = AutogradFunction(nn.Dropout(0.5), Combine.CONCAT, 5)
    x = torch.ones(4, 50, dtype=F64)
    record = cell.forward([x], [True])
    cell.forward([x], [True])
    (message,), _ = cell.pull(record, torch.ones_like(x))
    assert torch.equal(message, record.output)  # 0 or 2, where the input is 1


def test_block_seeds_depend_on_run_and_name_alone():
    names = [f"block{i}" for i in range(50)]
    seeds = {block_seed(run, name) for run in range(4) for name in names}
    assert len(seeds) == 200
    assert all(0 <= s < 2**63 for s in seeds)
    assert block_seed(1, "block0") == block_seed(1, "block0")
