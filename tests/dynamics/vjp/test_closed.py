"""Closed-form cells against the oracle: autograd in float64, per kind and in chains."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from dynamics.helpers import F64, noise
from torch import Tensor, nn
from torch.nn import functional

from hamdist.config import Order
from hamdist.dynamics.finite import OutOfRange
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.modules.subspace import Subspace
from hamdist.dynamics.native import rows
from hamdist.dynamics.objective.losses import cross_entropy, loss_and_slope, mse
from hamdist.dynamics.updates.constants import Constant, Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autograd import AutogradFunction
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.dynamics.vjp.gradient import all_dense, norm_bound

TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # (biases of keys: gradients are what round-off leaves)


class Residual(nn.Module):
    """x + a f(norm(x)), as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=F64)
        self.f = nn.Linear(6, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * functional.gelu(self.f(self.norm(x)))


class OnlyAdd(nn.Module):
    """Hands its cotangent on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) - x


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5, dtype=F64),
        nn.ReLU(),
        nn.Linear(5, 4, dtype=F64, bias=False),
        nn.Tanh(),
        nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.Sigmoid()),
    )


def frozen() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.Linear(5, 2, dtype=F64))
    made[0].weight.requires_grad_(False)
    return made


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, dtype=F64),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False, dtype=F64),
        nn.Flatten(),
        nn.Linear(4, 3, dtype=F64),
    )


def pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, dtype=F64),
        nn.Tanh(),
        nn.MaxPool2d((3, 2), stride=2, padding=1, ceil_mode=True),
        nn.ReLU(),
        nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((2, None)),
        nn.MaxPool2d(2, stride=1, dilation=(1, 2)),
    )


class UsersConvnet(nn.Module):
    """As users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1, dtype=F64)
        self.second = nn.Conv2d(3, 4, 2, dtype=F64)
        self.f = nn.Linear(4, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, 1, 8, 8)
        h = functional.max_pool2d(functional.relu(self.first(h)), 2)
        h = functional.avg_pool2d(self.second(h), kernel_size=2, stride=1)
        return self.f(functional.adaptive_avg_pool2d(torch.tanh(h), 1).view(-1, 4))


class TakesPlaces(UsersConvnet):
    def forward(self, x: Tensor) -> Tensor:
        h, places = functional.max_pool2d(self.first(x), 2, return_indices=True)
        return self.f(h.flatten(1)[:, :4] + places.flatten(1)[:, :4])


def encoder_layer(**how: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        6, 2, 9, **{"dropout": 0.0, "batch_first": True, "dtype": F64, **how}
    )


def frozen_attention() -> nn.Module:
    made = encoder_layer()
    made.self_attn.in_proj_weight.requires_grad_(False)
    made.self_attn.out_proj.bias.requires_grad_(False)
    return nn.Sequential(nn.Linear(6, 6, dtype=F64), made)


class WithAttention(nn.Module):
    """A forward of a user's own around torch's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = encoder_layer()
        self.f = nn.Linear(6, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.mix(x) - x)


class Mixer(nn.Module):
    """A residual block of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=F64)
        self.mix = nn.MultiheadAttention(6, 3, batch_first=True, dtype=F64)
        self.f = nn.Linear(6, 6, dtype=F64)


class MixerByPlace(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed, _ = self.mix(h, h, h, need_weights=False)
        return x + self.f(mixed)


class MixerByName(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.f(h - self.mix(query=h, key=h, value=h)[0])


class OtherKeys(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.f(self.mix(x, h, h)[0])


class Masked(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.mix(x, x, x, attn_mask=self.f.weight)[0])


class ReadsWeights(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        mixed, weights = self.mix(x, x, x)
        return self.f(mixed) + self.f(weights)


def encoder() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        return nn.TransformerEncoder(
            encoder_layer(norm_first=True), 2, norm=nn.LayerNorm(6, dtype=F64)
        )


KINDS = {
    "linear": (lambda: nn.Linear(6, 3, dtype=F64), (4, 6)),
    "linear over rows": (lambda: nn.Linear(6, 3, dtype=F64), (4, 5, 6)),
    "mlp": (mlp, (4, 6)),
    "batch 1": (mlp, (1, 6)),
    "frozen weight": (frozen, (4, 6)),
    "convnet": (convnet, (3, 2, 5, 5)),
    "pools": (pools, (3, 2, 9, 9)),
    "user's convnet": (UsersConvnet, (3, 64)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6, dtype=F64)), (4, 6)),
    "plain layer norm": (
        lambda: nn.Sequential(
            nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2, dtype=F64)
        ),
        (4, 6),
    ),
    "residual": (Residual, (4, 6)),
    "two residuals": (lambda: nn.Sequential(Residual(), Residual()), (4, 6)),
    "difference": (OnlyAdd, (4, 6)),
    "flat first": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3, dtype=F64)), (4, 2, 3)),
    "unflatten": (
        lambda: nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Unflatten(1, (2, 3))),
        (4, 6),
    ),
}
KINDS |= {
    "subspace": (
        lambda: nn.Sequential(nn.Linear(6, 9, dtype=F64), Subspace(9, 4, dtype=F64), nn.ReLU()),
        (4, 6),
    ),
    "subspace of tokens": (
        lambda: nn.Sequential(Residual(), Subspace(6, 2, seed=4, dtype=F64)),
        (4, 3, 6),
    ),
}
TOKENS = (3, 5, 6)
KINDS |= {
    "attention": (encoder_layer, TOKENS),
    "norm first": (lambda: encoder_layer(norm_first=True, activation="gelu"), TOKENS),
    "no biases": (lambda: encoder_layer(bias=False), TOKENS),
    "one head of many tokens": (
        lambda: nn.TransformerEncoderLayer(6, 1, 9, 0.0, batch_first=True, dtype=F64),
        (1, 40, 6),
    ),
    "one sample of tokens": (encoder_layer, (5, 6)),
    "frozen attention": (frozen_attention, TOKENS),
    "user's forward": (WithAttention, TOKENS),
    "encoder": (encoder, TOKENS),
    "attention by place": (MixerByPlace, TOKENS),
    "attention by name": (lambda: nn.Sequential(MixerByName(), MixerByPlace()), TOKENS),
}
for _kind in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus, nn.ELU):
    KINDS[_kind.__name__] = (lambda k=_kind: nn.Sequential(nn.Linear(6, 6, dtype=F64), k()), (4, 6))
    KINDS[f"{_kind.__name__} first"] = (
        lambda k=_kind: nn.Sequential(k(), nn.Linear(6, 2, dtype=F64)),
        (4, 6),
    )
KINDS["Hardtanh"] = (lambda: nn.Sequential(nn.Hardtanh(), nn.Linear(6, 2, dtype=F64)), (4, 6))
KINDS["ReLU6"] = (lambda: nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.ReLU6()), (4, 6))


def pair(make):
    torch.manual_seed(0)
    module = make()
    closed = make_closed(copy.deepcopy(module), Combine.CONCAT, 0, 1)
    assert closed is not None
    return closed, AutogradFunction(module, Combine.CONCAT, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_autograd(kind):
    """Several samples under way, pulled late, as in a trace; weights move in between."""
    make, shape = KINDS[kind]
    ours, theirs = pair(make)
    assert ours.names == theirs.names
    records = []
    sent = []
    for n in range(9):
        x = noise(n, *shape)
        a, b = ours.forward([x], [True]), theirs.forward([x], [True])
        torch.testing.assert_close(a.output, b.output, **TIGHT)
        records.append((a, b))
        sent.append((a.output, a.output.clone()))
        if n < 3:
            continue
        a, b = records[n - 3]
        z = noise(100 + n, *a.output.shape)
        (to_a,), g_a = ours.pull(a, z)
        (to_b,), g_b = theirs.pull(b, z)
        torch.testing.assert_close(to_a, to_b, **TIGHT)
        torch.testing.assert_close(all_dense(g_a), all_dense(g_b), **TIGHT)
        sent.append((to_a, to_a.clone()))
        for cell, g in ((ours, g_a), (theirs, g_b)):
            torch._foreach_add_(cell.theta, all_dense(g), alpha=-0.1)
    for signal, was in sent:  # a neighbour may keep what it was sent
        assert torch.equal(signal, was)


def test_memory_is_used_again():
    ours, _ = pair(mlp)
    seen: set[int] = set()
    for n in range(6):
        record = ours.forward([noise(n, 4, 6)], [True])
        first = record.saved[0][2].data_ptr()
        if n >= 2:
            assert first in seen
        seen.add(first)
        ours.pull(record, noise(50 + n, 4, 3))
    assert len(seen) == 2


def test_only_what_is_asked_for():
    ours, theirs = pair(mlp)
    x, z = noise(0, 4, 6), noise(1, 4, 3)
    (to,), g = ours.pull(ours.forward([x], [False]), z)
    assert to is None
    _, expected = theirs.pull(theirs.forward([x], [False]), z)
    torch.testing.assert_close(all_dense(g), all_dense(expected), **TIGHT)
    (to,), g = ours.pull(ours.forward([x], [True]), z, weights=False)
    assert g == []
    (expected_to,), _ = theirs.pull(theirs.forward([x], [True]), z)
    torch.testing.assert_close(to, expected_to, **TIGHT)
    (to,), g = ours.pull(ours.forward([x], [True]), z, inputs=False)
    assert to is None
    assert len(g) == len(expected)


@pytest.mark.parametrize("combine", [Combine.CONCAT, Combine.SUM])
def test_several_parents(combine):
    width = 3 if combine is Combine.CONCAT else 6
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4, dtype=F64), nn.Tanh())
    ours = make_closed(copy.deepcopy(module), combine, 0, 2)
    theirs = AutogradFunction(module, combine, 0)
    x = [noise(0, 5, width), noise(1, 5, width)]
    z = noise(2, 5, 4)
    for wanted in ([True, True], [False, True]):
        to_a, _ = ours.pull(ours.forward(x, wanted), z)
        to_b, _ = theirs.pull(theirs.forward(x, wanted), z)
        for a, b, want in zip(to_a, to_b, wanted, strict=True):
            assert (a is not None) == want
            if want:
                torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Embedding(7, 3, padding_idx=padding, dtype=F64), nn.Linear(3, 2, dtype=F64)
    )
    ours = make_closed(copy.deepcopy(module), Combine.CONCAT, 0, 1)
    theirs = AutogradFunction(module, Combine.CONCAT, 0)
    words = torch.tensor([[1, 2, 2], [6, 0, 1]])
    z = noise(1, 2, 3, 2)
    (to,), g = ours.pull(ours.forward([words], [True]), z)
    assert to is None
    _, expected = theirs.pull(theirs.forward([words], [True]), z)
    torch.testing.assert_close(all_dense(g), all_dense(expected), **TIGHT)


class Counts(nn.Module):
    """A forward pass that leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.f(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.f(x))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) * float(torch.rand(()))


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return self.relu(h) + h


class SameUnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.same = nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return self.relu(self.same(h)) + h


def hooked() -> nn.Module:
    module = nn.Linear(6, 6)
    module.register_forward_hook(lambda *_: None)
    return module


def another_subspace() -> nn.Module:
    """A projection that is not the one of its seed."""
    module = nn.Sequential(nn.Linear(6, 6), Subspace(6, 2, seed=1))
    module[1].load_state_dict(Subspace(6, 2, seed=2).state_dict())
    return module


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


@pytest.mark.parametrize(
    "make",
    [
        Counts,
        Tied,
        Draws,
        ChangesItsInput,
        SameUnderTwoNames,
        hooked,
        weight_norm,
        another_subspace,
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
        lambda: nn.GRUCell(6, 6),
        nn.Identity,
        OtherKeys,
        Masked,
        ReadsWeights,
        TakesPlaces,
        lambda: nn.MaxPool2d(2, return_indices=True),
        lambda: encoder_layer(dropout=0.1),
        lambda: encoder_layer(batch_first=False),
        lambda: encoder_layer(dtype=torch.bfloat16),
        lambda: encoder_layer(activation=functional.silu),
    ],
)
def test_left_to_autograd(make):
    module = make()
    before = {k: v for k, v in vars(module).items() if k == "calls"}
    assert make_closed(module, Combine.CONCAT, 0, 1) is None
    assert {k: v for k, v in vars(module).items() if k == "calls"} == before


def constants(eta_omega: float, limit: float = 1e12) -> Dynamics:
    return Dynamics(
        tau=Constant(0.5), c=2.0, eta_z=0.0, eta_omega=eta_omega, beta=0.3, phi=Constant(1.0),
        limit=limit,
    )  # fmt: skip


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("eta_omega", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("read", [False, True])
def test_fused_update_equals_the_plain_one(order, eta_omega, read):
    """read: omega is looked at after every tick, and what was seen stays as it was."""
    ours, theirs = pair(mlp)
    fused = Weights(ours.theta, constants(eta_omega), order)
    plain = Weights(theirs.theta, constants(eta_omega), order)
    seen = []
    for n in range(8):
        x, z = noise(n, 4, 6), noise(50 + n, 4, 3)
        _, g = ours.pull(ours.forward([x], [False]), z)
        _, expected = theirs.pull(theirs.forward([x], [False]), z)
        quiet = n == 5  # a tick without a gradient
        fused.move(None if quiet else g, 0.5, 0.5)
        plain.move(None if quiet else expected, 0.5, 0.5)
        torch.testing.assert_close(fused.theta, plain.theta, **TIGHT)
        if read:
            torch.testing.assert_close(fused.omega, plain.omega, **TIGHT)
            seen.append((fused.omega, [o.clone() for o in fused.omega]))
    torch.testing.assert_close(fused.omega, plain.omega, **TIGHT)
    for omega, was in seen:
        assert all(torch.equal(a, b) for a, b in zip(omega, was, strict=True))


@pytest.mark.parametrize("eta_omega", [0.0, 2.0])
def test_bad_gradients_move_nothing(eta_omega):
    ours, _ = pair(mlp)
    weights = Weights(ours.theta, constants(eta_omega, limit=50.0), Order.OMEGA_FIRST)
    before = [t.clone() for t in ours.theta]
    for bad in (1e6, float("inf"), float("nan")):
        _, g = ours.pull(ours.forward([noise(0, 4, 6)], [False]), torch.full((4, 3), bad).to(F64))
        with pytest.raises(OutOfRange):
            weights.move(g, 1.0, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(before, ours.theta, strict=True))


def test_the_bound_is_one_and_the_norm_decides():
    """Below the limit by its norm, above it by the bound: it moves."""
    ours, _ = pair(lambda: nn.Linear(6, 3, dtype=F64))
    _, g = ours.pull(ours.forward([noise(0, 4, 6)], [False]), noise(1, 4, 3))
    norm = float(torch.cat([t.flatten() for t in all_dense(g)]).norm())
    assert norm < norm_bound(g)
    limit = (norm + norm_bound(g)) / 4  # omega is half the gradient
    weights = Weights(ours.theta, constants(2.0, limit=limit), Order.OMEGA_FIRST)
    weights.move(g, 1.0, 0.5)
    assert weights.updates == 1


@pytest.mark.parametrize("rows", [1, 5])
def test_slopes_equal_autograd(rows):
    y = noise(0, rows, 4)
    classes = torch.arange(rows) % 4
    for loss, target in (
        (mse, noise(1, rows, 4)),
        (cross_entropy, classes),
        (cross_entropy, noise(2, rows, 4).softmax(1)),
        (lambda a, b: (a - b).abs().sum(), noise(3, rows, 4)),
    ):
        leaf = y.clone().requires_grad_()
        expected = loss(leaf, target)
        (by_autograd,) = torch.autograd.grad(3.0 * expected, leaf)
        value, slope = loss_and_slope(loss, y, target)
        torch.testing.assert_close(value, expected.detach(), **TIGHT)
        torch.testing.assert_close(slope(3.0), by_autograd, **TIGHT)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (3, 3), (3, 5), (2, 3, 2), (2, 4, 2)])
def test_another_width_is_refused_as_by_torch(native, layers, shape):
    """Not read over its end, and not taken as other rows: (2, 4, 2) holds 4 rows of 4."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).double()
    made = make_closed(module, Combine.CONCAT, 1, 1, native=native and rows.built())
    x = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        module(x)
    with pytest.raises(RuntimeError, match="a linear layer of 4 inputs got a tensor"):
        made.forward([x], [False])
