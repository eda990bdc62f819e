"""The C code for linear layers against torch in float64, and cells that use it against autograd."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
from array import array

import pytest
import torch
from dynamics.helpers import F64, noise
from torch import Tensor, nn

from hamdist.config import AdaptiveSettings, Order
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.modules.subspace import Subspace
from hamdist.dynamics.native import rows
from hamdist.dynamics.native.chain import Activation, NativeChain, Operation, OperationKind
from hamdist.dynamics.objective.losses import cross_entropy, loss_and_slope
from hamdist.dynamics.updates.constants import Constant, Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autograd import AutogradFunction
from hamdist.dynamics.vjp.closed import ClosedFunction, make_closed
from hamdist.dynamics.vjp.gradient import Outer, all_dense, all_moved
from hamdist.dynamics.vjp.local_function import LocalFunction
from hamdist.dynamics.vjp.native_chain import Chain
from hamdist.runtime.process.portable import portable_environment

pytestmark = pytest.mark.skipif(not rows.built(), reason="hamdist was installed without its C code")

TIGHT = {"rtol": 1e-12, "atol": 1e-13}
LOOSE = {F64: TIGHT, torch.float32: {"rtol": 2e-5, "atol": 2e-6}}
# Whole groups of rows and vectors, and what is left over of both.
SIZES = [(1, 1), (3, 5), (4, 16), (7, 33), (8, 64), (13, 100)]


def linear(layers: list[tuple[Tensor, Tensor | None, bool]], batch: int) -> NativeChain:
    """Layers, each of which reads the one before: W, b, and True if a relu is behind them."""
    act = Activation.IDENTITY, Activation.RELU
    operations = [
        Operation(OperationKind.LINEAR, (i,), w, b, act[relu], width=len(w))
        for i, (w, b, relu) in enumerate(layers)
    ]
    widths = [layers[0][0].shape[1], *(len(w) for w, _, _ in layers)]
    return NativeChain(operations, [(batch * width, width) for width in widths])


def room(chain: NativeChain, like: Tensor, *, wanted: bool = True) -> list[Tensor]:
    return [like.new_empty(n) for n in (chain.inner, chain.d, chain.messages(wanted=wanted))]


def plain(weights: list[tuple[Tensor, Tensor | None, bool]], x: Tensor, z: Tensor):
    """By the equations in float64: the outputs, the d of every layer, and the first message."""
    outputs, inputs = [], []
    for w, b, relu in weights:
        inputs.append(x)
        x = w @ x + (0 if b is None else b)
        x = x.clamp(min=0) if relu else x
        outputs.append(x)
    ds = []
    for (w, _, relu), y in zip(reversed(weights), reversed(outputs), strict=True):
        ds.insert(0, z * (y > 0) if relu else z)
        z = w.t() @ ds[0]
    return inputs, outputs, ds, z


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("out", "into"), SIZES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_two_layers(dtype, out, into, relu, wanted, bias):
    made = [(noise(1, out, into), noise(2, out) if bias else None, relu)]
    made.append((noise(3, 5, out), noise(4, 5), False))
    used = [(w.to(dtype), None if b is None else b.to(dtype), r) for w, b, r in made]
    exact = [(w.double().clone(), None if b is None else b.double().clone(), r) for w, b, r in used]
    x, z = noise(5, into).to(dtype), noise(6, 5).to(dtype)
    inputs, outputs, ds, message = plain(exact, x.double(), z.double())
    chain = linear(used, 1)
    inner, d, m = room(chain, x, wanted=wanted)
    y = torch.empty(1, 5, dtype=dtype)
    chain.forward(x, inner, y)
    got = [chain.read_by(1, x, inner), y]
    for a, b in zip(got, outputs, strict=True):
        torch.testing.assert_close(a[0].double(), b, **LOOSE[dtype])
    to = torch.full((into,), math.nan, dtype=dtype) if wanted else None
    rates = array("d", [-0.1, -0.2, -0.3, -0.4])
    assert chain.pull(x, inner, y, z, d, m, to, rates, 1e12) == 0b11
    for a, b in zip([chain.saved(i, d) for i in range(2)], ds, strict=True):
        torch.testing.assert_close(a[0].double(), b, **LOOSE[dtype])
    if to is not None:
        torch.testing.assert_close(to.double(), message, **LOOSE[dtype])
    for i, ((w, b, _), (w0, b0, _)) in enumerate(zip(used, exact, strict=True)):
        moved = w0 + rates[2 * i] * torch.outer(ds[i], inputs[i])
        torch.testing.assert_close(w.double(), moved, **LOOSE[dtype])
        if b is not None and b0 is not None:
            moved = b0 + rates[2 * i + 1] * ds[i]
            torch.testing.assert_close(b.double(), moved, **LOOSE[dtype])


def layer(out: int, into: int, *, shift: int = 0, dtype=torch.float32):
    """W, x, z in memory that begins `shift` numbers behind a multiple of 64 bytes."""
    held = []
    for seed, shape in ((1, (out, into)), (2, (into,)), (3, (out,))):
        memory = torch.empty(math.prod(shape) + shift, dtype=dtype)[shift:].view(shape)
        held.append(memory.copy_(noise(seed, *shape)))
    return held


def stepped(w: Tensor, x: Tensor, z: Tensor, limit: float = 1e12, rates: Tensor | None = None):
    """What one layer without bias and relu makes of x and z; its weights move at rate -0.5."""
    chain = linear([(w, None, False)], 1)
    inner, d, m = room(chain, w)
    y, to = torch.empty_like(z), torch.empty_like(x)
    chain.forward(x, inner, y)
    moved = chain.pull(x, inner, y, z, d, m, to, array("d", [-0.5, 0.0]), limit)
    return moved, y, to


@pytest.mark.parametrize(("out", "into"), [(6, 37), (9, 64)])
def test_bits_do_not_depend_on_where_memory_lies(out, into):
    w, x, z = layer(out, into)
    _, y, to = stepped(w, x, z)
    for shift in (1, 3, 8):
        w_there, x_there, z_there = layer(out, into, shift=shift)
        _, y_there, to_there = stepped(w_there, x_there, z_there)
        assert torch.equal(y, y_there)
        assert torch.equal(to, to_there)
        assert torch.equal(w, w_there)


def test_rows_without_slope_stay_as_they_are():
    """-0.0 + 0.0 would be 0.0."""
    w, x, z = layer(3, 20)
    w[1] = -0.0
    z[1] = 0.0
    stepped(w, x, z)
    assert torch.signbit(w[1]).all()


def test_the_limit_is_that_of_the_gradient():
    w, x, z = layer(4, 7, dtype=F64)
    norm = float(torch.outer(z, x).norm())
    before = w.clone()
    assert stepped(w, x, z, norm * (1 - 1e-12))[0] == 0
    assert torch.equal(w, before)
    z[2] = math.nan
    assert stepped(w, x, z, math.inf)[0] == 0
    assert torch.equal(w, before)
    z[2] = 1.0
    norm = float(torch.outer(z, x).norm())
    assert stepped(w, x, z, norm * (1 + 1e-12))[0] == 1
    torch.testing.assert_close(w, before - 0.5 * torch.outer(z, x), **TIGHT)


@pytest.mark.parametrize("many", [1, 15, 16, 100])
def test_norm(many):
    x = noise(1, many)
    assert rows.norm(x) == pytest.approx(float(x.norm()), rel=1e-14)
    assert math.isnan(rows.norm(torch.tensor([1.0, math.nan])))
    assert rows.norm(torch.tensor([3e38, 3e38])) == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)
    assert rows.norm(torch.ones(4, 4)[:, :2]) is None
    assert rows.norm(torch.ones(4, dtype=torch.float16)) is None


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("many", [1, 5])
def test_cross_entropy(dtype, many):
    """One row of class -100 has no loss; large logits do not overflow; others are left to torch."""
    y = (30 * noise(1, many, 4)).to(dtype)
    classes = torch.tensor([3, -100, 0, 1, 3])[:many]
    leaf = y.double().requires_grad_()
    exact = nn.functional.cross_entropy(leaf, classes)
    (slope,) = torch.autograd.grad(exact, leaf)
    loss, d = rows.cross_entropy(y, classes, -100)
    torch.testing.assert_close(loss.double(), exact.detach(), **LOOSE[dtype])
    torch.testing.assert_close(d.double(), slope, **LOOSE[dtype])
    value, by_phi = loss_and_slope(cross_entropy, y, classes, native=True)
    assert torch.equal(value, loss)
    torch.testing.assert_close(by_phi(0.5), 0.5 * d)
    assert loss.isfinite()


def test_cross_entropy_that_is_left_to_torch():
    y = noise(1, 3, 4)
    assert rows.cross_entropy(y.t(), torch.tensor([0, 1, 2, 0]), -100) is None
    assert rows.cross_entropy(y, torch.tensor([0, 1]), -100) is None
    assert rows.cross_entropy(noise(1, 200, 4), torch.zeros(200, dtype=torch.int64), -100) is None
    with pytest.raises(IndexError, match="out of bounds"):
        loss_and_slope(cross_entropy, y, torch.tensor([0, 4, 1]), native=True)
    nobody = torch.tensor([-100, -100, -100])
    assert rows.cross_entropy(y, nobody, -100)[0].isnan()
    assert nn.functional.cross_entropy(y, nobody).isnan()


# -- cells ---------------------------------------------------------------------------------------


def mlp(*, first: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        *([] if first is None else [first]),
        nn.Linear(6, 9, dtype=F64),
        nn.ReLU(),
        nn.Linear(9, 7, dtype=F64, bias=False),
        nn.Tanh(),
        nn.Linear(7, 8, dtype=F64),
        nn.Linear(8, 3, dtype=F64),
        nn.ReLU(),
    )


class Twice(nn.Module):
    """Reads the first layer in two places, so that it cannot join the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6, dtype=F64)
        self.b = nn.Linear(6, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        return a + torch.relu(self.b(a))


class Residuals(nn.Module):
    """All that a chain can hold: sums of values that are read twice and thrice, both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [
                nn.LayerNorm(6, eps=1e-3, elementwise_affine=False, dtype=F64),
                nn.LayerNorm(6, dtype=F64),
                nn.LayerNorm(9, bias=False, dtype=F64),
            ]
        )
        self.layers = nn.ModuleList([nn.Linear(6, 6, dtype=F64) for _ in range(3)])
        self.last = nn.Linear(6, 9, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        f, g, h = self.layers
        a = x + 0.5 * torch.relu(f(self.norms[0](x)))
        b = torch.tanh(a - torch.sigmoid(g(self.norms[1](a))))
        c = b + h(a) - a
        return self.norms[2](self.last(torch.sigmoid(c)))


class Words(nn.Module):
    """(B, 3) indices: three rows of the table side by side; index 2 is the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2, padding_idx=2, dtype=F64)
        self.f = nn.Linear(6, 4, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(self.table(x).flatten(1)))


def subspaces() -> nn.Module:
    """Projections between layers and behind the last, of widths with one transform and two."""
    return nn.Sequential(
        nn.Linear(6, 64, dtype=F64),
        nn.ReLU(),
        Subspace(64, 5, seed=1, dtype=F64),
        nn.Linear(64, 9, dtype=F64),
        Subspace(9, 4, dtype=F64),
    )


def frozen() -> nn.Module:
    made = mlp()
    made[0].bias.requires_grad_(False)
    made[2].weight.requires_grad_(False)
    return made


MODULES = {
    "mlp": (mlp, (6,)),
    "flat first": (lambda: mlp(first=nn.Flatten()), (2, 3)),
    "read twice": (Twice, (6,)),
    "frozen": (frozen, (6,)),
    "residuals": (Residuals, (6,)),
    "residuals of more dimensions": (Residuals, (2, 6)),
    "words": (Words, (3,)),
    "subspaces": (subspaces, (6,)),
    "residuals in a subspace": (
        lambda: nn.Sequential(Residuals(), Subspace(9, 3, dtype=F64)),
        (6,),
    ),
    "one layer": (lambda: nn.Linear(6, 4, dtype=F64), (6,)),
    "more dimensions": (mlp, (1, 6)),
}
CONSTANTS = {
    "descent": {"eta_omega": 1.0},
    "momentum": {"eta_omega": 0.3},
    "weight cost": {"eta_omega": 1.0, "weight_cost": 0.1},
    "adam": {"eta_omega": 0.2, "adaptive": AdaptiveSettings()},
}


def cells(make) -> tuple[ClosedFunction, LocalFunction]:
    torch.manual_seed(0)
    module = make()
    closed = make_closed(copy.deepcopy(module), Combine.CONCAT, 0, 1, native=True)
    assert closed is not None
    return closed, AutogradFunction(module, Combine.CONCAT, 0)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("read", [False, True])
def test_learns_as_by_autograd(module, constants, order, read):
    """Late pulls, batches of one row and of several in turn, omega read in every tick or at the
    end."""
    make, shape = MODULES[module]
    both = cells(make)
    dynamics = Dynamics(
        tau=Constant(1.0), c=1.0, eta_z=0.0, beta=0.05, phi=Constant(1.0), **CONSTANTS[constants]
    )
    weights = [Weights(cell.theta, dynamics, order, cell.names) for cell in both]
    waiting = []
    moved_at_once = []
    for n in range(12):
        x = noise(n, 3 if n % 5 == 4 else 1, *shape)
        x = (x.abs() * 10).long() % 5 if module == "words" else x
        waiting.append([cell.forward([x], [module != "words"]) for cell in both])
        a, b = (record.output for record in waiting[-1])
        torch.testing.assert_close(a, b, **TIGHT)
        if n < 2:
            continue
        records = waiting.pop(0)
        z = noise(100 + n, *records[0].output.shape)
        sent = []
        for cell, record, own in zip(both, records, weights, strict=True):
            at_once = own.at_once(1.0, 1.0)
            (to,), g = cell.pull(record, z, at_once=at_once)
            moved_at_once.append(all_moved(g))
            own.move(g, 1.0, 1.0)
            sent.append(to)
        if module != "words":
            torch.testing.assert_close(*sent, **TIGHT)
        torch.testing.assert_close(both[0].theta, both[1].theta, **TIGHT)
        if read:
            torch.testing.assert_close(weights[0].omega, weights[1].omega, **TIGHT)
    torch.testing.assert_close(weights[0].omega, weights[1].omega, **TIGHT)
    at_once = constants == "descent" and order is not Order.SIMULTANEOUS
    assert any(moved_at_once) == at_once


def test_a_subspace_is_a_part_of_a_chain():
    closed, _ = cells(subspaces)
    assert [type(step.kernel) for step in closed._steps] == [Chain]


@pytest.mark.skipif(not rows.gemm(F64), reason="torch's library hides its BLAS")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [2, 3, 32])
@pytest.mark.parametrize("stay", [False, True], ids=["all move", "one stays"])
def test_several_rows_are_stepped_as_by_torch_to_the_bit(dtype, batch, stay, monkeypatch):
    """(by torch's BLAS) f = relu(x W^T + b); d, d W; W += alpha d^T x and b += beta 1^T d where
    the bound of the gradient's norm, |d| (|x|^2 + R)^(1/2), is in the limit."""
    monkeypatch.setattr(rows, "has_products", lambda _: False)
    sizes = [(40, 33), (7, 40), (3, 7)]
    layers = [
        (noise(i, *size).to(dtype), noise(9 + i, size[0]).to(dtype) if i != 1 else None, i < 2)
        for i, size in enumerate(sizes)
    ]
    x, z = noise(20, batch, 33).to(dtype), (0.01 * noise(21, batch, 3)).to(dtype)
    rates = array("d", [-0.1, -0.2, -0.3, 0.0, -0.5, -0.6])
    inputs, outputs = [], []
    for w, b, relu in layers:
        inputs.append(outputs[-1] if outputs else x)
        y = inputs[-1] @ w.t() if b is None else torch.addmm(b, inputs[-1], w.t())
        outputs.append(y.relu() if relu else y)
    slopes, message = {}, z
    for i in (2, 1, 0):
        slopes[i] = message * (outputs[i] > 0) if layers[i][2] else message
        message = slopes[i] @ layers[i][0]
    bounds = [
        slopes[i].double().norm() * (inputs[i].double().square().sum() + batch * (i != 1)).sqrt()
        for i in range(3)
    ]
    limit = float(max(bounds)) - 1e-6 if stay else math.inf
    moving = [i for i in range(3) if bounds[i] <= limit]
    assert len(moving) == 3 - stay
    expected = [(w.clone(), None if b is None else b.clone()) for w, b, _ in layers]
    for i in moving:
        w, b = expected[i]
        w.addmm_(slopes[i].t(), inputs[i], alpha=rates[2 * i])
        if b is not None:
            b += rates[2 * i + 1] * slopes[i].sum(0)

    chain = linear(layers, batch)
    assert chain.runs
    inner, d, m = room(chain, x)
    y = x.new_empty(batch, 3)
    chain.forward(x, inner, y)
    to = torch.empty_like(x)
    moved = chain.pull(x, inner, y, z, d, m, to, rates, limit)
    assert moved == sum(1 << i for i in moving)
    assert all(map(torch.equal, [*(chain.read_by(i, x, inner) for i in (1, 2)), y], outputs))
    assert all(torch.equal(chain.saved(i, d), slopes[i]) for i in range(3))
    assert torch.equal(to, message)
    for (w, b, _), (plain_w, plain_b) in zip(layers, expected, strict=True):
        assert torch.equal(w, plain_w)
        torch.testing.assert_close(b, plain_b)


@pytest.mark.skipif(not rows.gemm(F64), reason="torch's library hides its BLAS")
def test_another_thread_uses_torchs_number_of_threads(monkeypatch):
    """OpenMP counts by thread: a BLAS that took more than torch's would sum in another order."""
    monkeypatch.setattr(rows, "has_products", lambda _: False)
    chain = linear([(noise(1, 512, 2048).float(), None, False)], 64)
    x, ys = noise(2, 64, 2048).float(), [torch.empty(64, 512) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chain.forward(x, x.new_empty(64), ys[0])
        other = threading.Thread(target=chain.forward, args=(x, x.new_empty(64), ys[1]))
        other.start()
        other.join(60)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ys)


def test_a_record_can_be_pulled_again():
    ours, theirs = cells(mlp)
    x, z = noise(1, 1, 6), noise(2, 1, 3)
    a, b = ours.forward([x], [True]), theirs.forward([x], [True])
    (to_a,), none = ours.pull(a, z, weights=False, keep=True)
    (to_b,), _ = theirs.pull(b, z, weights=False, keep=True)
    assert none == []
    torch.testing.assert_close(to_a, to_b, **TIGHT)
    again = ours.pull(a, 2 * z, inputs=False)
    torch.testing.assert_close(
        all_dense(again[1]), all_dense(theirs.pull(b, 2 * z, inputs=False)[1]), **TIGHT
    )


def test_outputs_and_messages_are_never_written_again():
    ours, _ = cells(mlp)
    sent = []
    for n in range(6):
        record = ours.forward([noise(n, 1, 6)], [True])
        (to,), _ = ours.pull(record, noise(50 + n, 1, 3))
        sent += [(record.output, record.output.clone()), (to, to.clone())]
    for tensor, copied in sent:
        assert torch.equal(tensor, copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_left_to_torch(dtype):
    module = nn.Linear(6, 4, dtype=dtype)
    closed = make_closed(module, Combine.CONCAT, 0, 1, native=True)
    x = noise(1, 1, 6).to(dtype)
    assert torch.equal(closed.forward([x], [False]).output, module(x).detach())


def test_input_of_another_type_is_refused_as_by_torch():
    closed = make_closed(nn.Linear(6, 4), Combine.CONCAT, 0, 1, native=True)
    with pytest.raises(RuntimeError, match="dtype"):
        closed.forward([noise(1, 1, 6)], [False])


@pytest.mark.skipif(not rows.gemm(F64), reason="torch's library hides its BLAS")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("batch", "biased"), [(16, True), (63, False)])
def test_few_rows_on_a_large_weight(dtype, batch, biased, monkeypatch):
    """(as (W x^T)^T, in parts of 256 outputs, the last of which has fewer)"""
    monkeypatch.setattr(rows, "has_products", lambda _: False)
    out, into = 600, 512
    w, x = noise(1, out, into) / into**0.5, noise(2, batch, into)
    bias = noise(3, out) if biased else None
    exact = (x @ w.t() + (0 if bias is None else bias)).relu()
    used = w.to(dtype), None if bias is None else bias.to(dtype), True
    chain = linear([used], batch)
    inner, _, _ = room(chain, x.to(dtype))
    y = torch.full((batch, out), math.nan, dtype=dtype)
    chain.forward(x.to(dtype), inner, y)
    torch.testing.assert_close(y.double(), exact, **LOOSE[dtype])


@pytest.fixture
def has_products():
    if not rows.has_products(300):
        pytest.skip("products of many rows are a BLAS's on this processor")


# Whole tiles of rows, outputs and vectors, and what is left over of each.
SHAPES = [
    (2, 1, 1),
    (3, 8, 16),
    (5, 10, 33),
    (8, 48, 48),
    (11, 103, 100),
    (33, 67, 259),
    (300, 13, 21),
]


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", [False, True])
def test_products_of_several_rows(dtype, shape, wanted):
    """y = relu(x W^T + b), m = d W, W += alpha d^T x by products.h, against float64."""
    batch, out, into = shape
    w, b = noise(1, out, into) / into**0.5, noise(2, out)
    x, z = noise(3, batch, into), noise(4, batch, out)
    y = (x @ w.t() + b).relu()
    d = z * (y > 0)
    expected = y, d @ w, w - 0.1 * d.t() @ x, b - 0.2 * d.sum(0)
    used = w.to(dtype), b.to(dtype), True
    chain = linear([used], batch)
    x, z, to = x.to(dtype), z.to(dtype), torch.full((batch, into), math.nan, dtype=dtype)
    inner, kept, m = room(chain, x, wanted=wanted)
    ours = torch.full((batch, out), math.nan, dtype=dtype)
    chain.forward(x, inner, ours)
    rates = array("d", [-0.1, -0.2])
    assert chain.pull(x, inner, ours, z, kept, m, to if wanted else None, rates, math.inf)
    found = ours, to if wanted else expected[1].to(dtype), *used[:2]
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, **LOOSE[dtype])


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_row_has_the_same_bits_among_any_others(dtype):
    """The order of a sum follows from neither the tile that it is in nor the place in memory."""
    out, into, most = 53, 77, 19
    w = noise(1, out, into).to(dtype)
    x, z = noise(2, most, into).to(dtype), noise(3, most, out).to(dtype)
    whole = products(w, x, z)
    for first, end in ((0, 2), (1, 6), (3, 19)):
        part = products(w, x[first:end].clone(), z[first:end].clone())
        assert all(map(torch.equal, part, (value[first:end] for value in whole)))


def products(w: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the message of a linear layer on several rows."""
    chain = linear([(w, None, False)], len(x))
    inner, kept, m = room(chain, x)
    y, to = x.new_empty(len(x), len(w)), torch.empty_like(x)
    chain.forward(x, inner, y)
    chain.pull(x, inner, y, z, kept, m, to, None, math.inf)
    return y, to


def test_products_follow_from_rows_and_threads(monkeypatch):
    monkeypatch.setattr(rows, "library", type("Library", (), {"PRODUCT_ROWS": 8}))
    assert [rows.has_products(n) for n in (0, 1, 2, 8, 9)] == [False, False, True, True, False]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not rows.has_products(2)


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_of_both_widths_give_the_same_bits(dtype, shape):
    batch, out, into = shape
    w, x, z = (
        noise(i, *s).to(dtype) for i, s in enumerate(((out, into), (batch, into), (batch, out)))
    )

    def made() -> list[Tensor]:
        moved = w.clone()
        assert rows.add_outer(moved, z, x, -0.3, 0.9)
        return [*products(w, x, z), moved]

    wide = made()
    before = rows.library.use_wide_vectors(0)
    try:
        assert all(map(torch.equal, wide, made()))
    finally:
        rows.library.use_wide_vectors(before)


def test_portable_processes_have_products_for_all_rows():
    """(with `MKL_CBWR=COMPATIBLE`, in which MKL is slow)"""
    code = "from hamdist.dynamics.native import rows; print(rows.library.PRODUCT_ROWS)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **portable_environment()},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    assert int(done.stdout) in (0, 1 << 30)


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
def test_a_gradient_of_several_rows_is_added(dtype, shape, beta):
    """beta w + alpha z^T x, into what beta 0 does not read."""
    batch, out, into = shape
    w, z, x = noise(1, out, into), noise(2, batch, out), noise(3, batch, into)
    exact = beta * w - 0.3 * z.t() @ x
    found = w.to(dtype) if beta else torch.full((out, into), math.nan, dtype=dtype)
    g = Outer(z.to(dtype), x.to(dtype))
    assert rows.add_outer(found, g.z, g.x, -0.3, beta)
    torch.testing.assert_close(found.double(), exact, **LOOSE[dtype])
    torch.testing.assert_close(g.dense().double(), z.t() @ x, **LOOSE[dtype])
    if out > 1 < into:  # what does not lie in rows is left to torch
        assert not rows.add_outer(found.t(), g.x, g.z, -0.3, beta)
