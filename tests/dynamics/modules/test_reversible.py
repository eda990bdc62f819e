"""Oracles: closed forms, autograd through the plain modules, hand-written cuts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dynamics.helpers import F64, layer, linear, noise
from torch import nn

from hamdist.config import Grouping, ModelKind, ModelSettings, PartitionSettings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.modules.pairs import InvertibleMap, MeanHalf, SecondHalf, ToPair
from hamdist.dynamics.modules.reversible import (
    Coupling,
    InversePass,
    Midpoint,
    MidpointStart,
    Squeeze,
    pieces_of,
    undone,
)
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.partition.reversible_blocks import (
    drift_warnings,
    recoveries,
    reversible_blocks,
)
from hamdist.dynamics.partition.split import split_module
from hamdist.errors import GraphError, LevelError, SettingsError
from hamdist.models.build import make_model
from hamdist.streams.sample import SampleSpec

N = 3  # features of one state


def convolution(channels: int, seed: int) -> nn.Sequential:
    """In place, as users write it; begins with an activation that would change its input."""
    made = nn.Conv2d(channels, channels, 3, padding=1, dtype=F64)
    with torch.no_grad():
        made.weight.copy_(noise(seed, *made.weight.shape) / 5)
    return nn.Sequential(nn.ReLU(inplace=True), made)


class Constant(nn.Module):
    """Does not look at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(noise(5, N))

    def forward(self, h):
        return self.value.expand_as(h)


MODULES = {
    "coupling": (Coupling(layer(N, N, 1)), (4, 2 * N)),
    "coupling, scale": (Coupling(layer(N, N, 1), 0.3), (4, 2 * N)),
    "coupling, leak": (Coupling(layer(N, N, 1), 0.3, leak=0.7), (4, 2 * N)),
    "coupling of identities": (Coupling(nn.Identity(), 0.3), (4, 2 * N)),
    "coupling of a constant": (Coupling(Constant(), 0.3), (4, 2 * N)),
    "convolutional coupling": (Coupling(convolution(2, 1)), (3, 4, 5, 5)),
    "start": (MidpointStart(layer(N, N, 1), 0.2), (4, N)),
    "start, leak": (MidpointStart(layer(N, N, 1), 0.2, leak=0.7), (4, N)),
    "start, images": (MidpointStart(convolution(2, 1), 0.2), (3, 2, 5, 5)),
    "to pair": (ToPair(), (4, N)),
    "squeeze": (Squeeze(2), (3, 2, 4, 6)),
    "squeeze by 3": (Squeeze(3), (3, 2, 3, 6)),
    "midpoint": (Midpoint(layer(N, N, 1), 7, 0.2), (4, N)),
    "midpoint, one step": (Midpoint(layer(N, N, 1), 1, 0.2), (4, N)),
    "midpoint, on": (Midpoint(layer(N, N, 1), 7, 0.2, start=False), (4, 2 * N)),
    "midpoint, leak": (Midpoint(layer(N, N, 1), 7, 0.2, leak=0.5), (4, N)),
    "in a row": (
        nn.Sequential(
            ToPair(), nn.Sequential(Coupling(layer(N, N, 1)), Coupling(layer(N, N, 2), 0.4))
        ),
        (4, N),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_states_are_recovered(name):
    module, shape = MODULES[name]
    x = noise(3, *shape)
    before = x.clone()
    with torch.no_grad():
        y = module(x)
        torch.testing.assert_close(undone(pieces_of(module), y), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", MODULES)
def test_products_from_the_output_are_those_of_autograd(name):
    module, shape = MODULES[name]
    parameters = list(module.parameters())
    x = noise(3, *shape).requires_grad_()
    y = module(x)
    message = noise(4, *y.shape)
    expected = torch.autograd.grad(y, [x, *parameters], message, allow_unused=True)
    held = [y.detach().clone(), message]
    back = InversePass(pieces_of(module), parameters).back(held)
    assert not held
    torch.testing.assert_close(back.x, x.detach(), rtol=1e-12, atol=1e-12)
    for found, exact in zip([back.message, *back.g], expected, strict=True):
        if exact is None:
            assert found is None
        else:
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_midpoint_is_the_rule():
    f, tau, x = layer(N, N, 1), 0.2, noise(3, 4, N)
    h = [x, x + tau * f(x)]
    for k in range(1, 6):
        h.append(h[k - 1] + 2 * tau * f(h[k]))
    found = Midpoint(f, 6, tau)(x)
    torch.testing.assert_close(found, torch.cat([h[5], h[6]], 1), rtol=1e-13, atol=1e-13)
    assert torch.equal(SecondHalf()(found), found[:, N:])
    torch.testing.assert_close(MeanHalf()(found), (found[:, :N] + found[:, N:]) / 2)
    first, second = Midpoint(f, 2, tau), Midpoint(f, 4, tau, start=False)
    assert torch.equal(second(first(x)), found)
    # dh/dt = -lambda h + f
    leaking = Midpoint(f, 2, tau, leak=0.3)(x)
    h_1 = x + tau * (f(x) - 0.3 * x)
    h_2 = x + 2 * tau * (f(h_1) - 0.3 * h_1)
    torch.testing.assert_close(leaking, torch.cat([h_1, h_2], 1), rtol=1e-13, atol=1e-13)


def test_couplings_are_a_block_of_revnet():
    """y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1) (Gomez et al. 2017), in the order (y_1, y_2)."""
    f, g, x = layer(N, N, 1), layer(N, N, 2), noise(3, 4, 2 * N)
    x_1, x_2 = x[:, :N], x[:, N:]
    y_1 = x_1 + f(x_2)
    y_2 = x_2 + g(y_1)
    found = nn.Sequential(Coupling(f), Coupling(g))(x)
    torch.testing.assert_close(found, torch.cat([y_1, y_2], 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("leak", "tau"), [(0.8, 0.25), (-0.5, 0.2), (10.0, 0.1)])
def test_a_leak_grows_as_stated(leak, tau):
    """|lambda| tau + sqrt(1 + (lambda tau)^2) per step, backwards (for a decay); c tau = 1 is
    2.414^k."""
    steps = Midpoint(nn.Identity(), 30, tau, leak=leak + 1, start=False)  # f(h) = h
    pair = torch.tensor([[1.0, 1.0]], dtype=F64)
    grown = steps.inverse(pair) if leak > 0 else steps(pair)
    rate = abs(leak) * tau + math.sqrt(1 + (leak * tau) ** 2)
    more = steps.inverse(grown) if leak > 0 else steps(grown)
    # Twice 30 steps, so that only the growing part counts.
    assert float(more.norm() / grown.norm()) == pytest.approx(rate**30, rel=1e-3)
    if leak * tau == 1:
        assert rate == pytest.approx(2.414, abs=1e-3)


def test_parts_that_cannot_be_undone():
    coupling = Coupling(layer(N, N, 1))
    assert pieces_of(nn.Sequential(coupling, nn.Sequential(coupling))) == [coupling, coupling]
    for module in (
        layer(N, N, 1),
        nn.Identity(),
        SecondHalf(),
        MeanHalf(),
        nn.Sequential(),
        nn.Sequential(coupling, nn.ReLU()),
        nn.Sequential(coupling, nn.Sequential()),
    ):
        assert pieces_of(module) == [], module

    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x).relu()

    assert pieces_of(Own(coupling)) == []


def test_wrong_constants_and_shapes():
    f = layer(N, N, 1)
    for make, message in (
        (lambda: Midpoint(f, 0, 0.1), "steps 0: give a whole number"),
        (lambda: Midpoint(f, 2.0, 0.1), "steps 2.0"),
        (lambda: Midpoint(f, 3, 0.0), "tau 0.0: give a finite number above 0"),
        (lambda: MidpointStart(f, math.inf), "tau inf"),
        (lambda: Coupling(f, math.nan), "scale nan"),
        (lambda: Coupling(f, leak=math.inf), "leak inf"),
        (lambda: Squeeze(0), "factor 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            make()
    with pytest.raises(ValueError, match=r"even number of features on axis 1, received \(4, 7\)"):
        Coupling(f)(noise(1, 4, 7))
    with pytest.raises(ValueError, match=r"turns \(4, 3\) into \(4, 1\); it must keep the shape"):
        Coupling(linear(3, 1, 0))(noise(1, 4, 6))
    blocks = [
        BlockSpec("a", Coupling(linear(4, 4, 0)), ("u",)),
        BlockSpec("y", nn.Identity(), ("a",), loss=mse),
    ]
    with pytest.raises(GraphError, match="block 'a' .* even number of features"):
        Graph(blocks).shapes((2, 7), F64)


# -- cuts ---------------------------------------------------------------------------------------


def stack(depth: int, *behind: nn.Module, f=layer) -> nn.Sequential:
    """stem, ReLU, `depth` couplings, what is `behind` them, head."""
    couplings = [Coupling(f(N, N, i)) for i in range(depth)]
    return nn.Sequential(linear(2, 2 * N, 90), nn.ReLU(), *couplings, *behind, linear(2 * N, 2, 91))


def cut(model, grouping=Grouping.LAYER, **partition):
    graph = split_module(
        model, mse, PartitionSettings(**partition), grouping, example=noise(1, 4, 2)
    )
    return [list(block.module._modules) for block in graph.blocks.values()]


def test_what_cannot_be_undone_goes_to_the_next_unit():
    model = stack(2, MeanHalf(), ToPair(), nn.Flatten())
    assert cut(model) == [["0", "1"], ["2"], ["3"], ["4", "5", "6", "7"]]
    assert cut(model, Grouping.GROUP) == [["0", "1", "2"], ["3", "4", "5", "6", "7"]]
    assert cut(model, blocks=3)[0] == ["0", "1"]
    alone = nn.Sequential(*list(stack(1, SecondHalf()))[:-1])
    assert cut(alone) == [["0", "1"], ["2"], ["3"]]
    images = nn.Sequential(
        nn.Conv2d(1, 4, 3), ToPair(), Coupling(convolution(4, 1)), Squeeze(), nn.Flatten(),
        linear(8, 2, 1),
    )  # fmt: skip
    assert cut(images) == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_units_without_invertible_children_are_as_before():
    model = nn.Sequential(nn.Flatten(), linear(2, 3, 0), nn.ReLU(), linear(3, 2, 1), nn.Tanh())
    assert cut(model) == [["0", "1", "2"], ["3", "4"]]


# -- what a graph must be ------------------------------------------------------------------------


def graph_of(*blocks: tuple[str, nn.Module, str]) -> Graph:
    """Blocks as (name, module, parents); those that nobody reads are readouts."""
    read = {p for _, _, parents in blocks for p in parents.split()}
    return Graph(
        BlockSpec(name, module, tuple(parents.split()), loss=None if name in read else mse)
        for name, module, parents in blocks
    )


def checked(graph: Graph, features: int = 2, dtype=F64) -> frozenset[str]:
    return reversible_blocks(graph, graph.shapes((4, features), dtype))


STEM = ("s", linear(2, 2 * N, 0), "u")
HEAD = ("y", linear(2 * N, 2, 1), "c")


def coupling(seed: int = 1) -> Coupling:
    return Coupling(layer(N, N, seed))


def test_reversible_blocks():
    assert checked(graph_of(STEM, ("c", coupling(), "s"), HEAD)) == {"c"}
    two = graph_of(STEM, ("b", coupling(1), "s"), ("c", coupling(2), "b"), HEAD)
    assert checked(two) == {"b", "c"}
    first = graph_of(("c", Midpoint(layer(2, 2, 1), 5, 0.1), "u"), ("y", linear(4, 2, 1), "c"))
    assert checked(first) == {"c"}
    last = graph_of(STEM, ("c", coupling(), "s"), ("y", coupling(3), "c"))
    assert checked(last) == {"c"}  # a readout keeps its record


def dropped(seed: int) -> nn.Module:
    return Coupling(nn.Sequential(layer(N, N, seed), nn.Dropout(0.1)))


def normed(**options) -> nn.Module:
    return Coupling(nn.BatchNorm1d(N, dtype=F64, **options))


REFUSED = {
    "Eq. 9": (
        [STEM, ("b", layer(2 * N, 2 * N, 1), "s"), ("c", coupling(), "b"), HEAD],
        r"'b' \(Linear, Tanh\) is h' = f\(h\) \(HL Eq. 9\).*hamdist.Coupling.*'backprop'",
    ),
    "half": (
        [STEM, ("b", nn.Sequential(coupling(), nn.ReLU()), "s"), ("c", coupling(2), "b"), HEAD],
        r"'b' \(Coupling, ReLU\).*put it into the block of the readout",
    ),
    "none": (
        [STEM, ("y", layer(2 * N, 2, 1), "s")],
        "no block is reversible.*partition.cuts.*'backprop'",
    ),
    "two children": (
        [STEM, ("c", coupling(), "s"), HEAD, ("w", linear(2 * N, 2, 2), "c")],
        "'c' has the children y, w; .* put its children into one block",
    ),
    "two parents": (
        [STEM, ("t", linear(2, 4, 2), "u"), ("c", Coupling(layer(5, 5, 1)), "s t"),
         ("y", linear(10, 2, 1), "c")],
        "'c' reads s, t; a reversible block recomputes the state of one parent",
    ),
    "dropout": ([STEM, ("c", dropped(1), "s"), HEAD], "'c' has a Dropout, which would draw other"),
    "batch norm": (
        [STEM, ("c", normed(), "s"), HEAD],
        "'c' has a BatchNorm1d in training mode.*LayerNorm",
    ),
    "leak of Eq. 9": (
        [STEM, ("c", Coupling(layer(N, N, 1), 2.0, leak=1.0), "s"), HEAD],
        r"'c' has a leak of \|lambda\| tau = 1 per step.*Eq. 9.*2.414\^k.*leak=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    blocks, message = REFUSED[name]
    with pytest.raises(LevelError, match=message):
        checked(graph_of(*blocks))


def test_parts_that_are_the_same_at_every_evaluation_pass():
    for part in (
        dropped(1).eval(),
        normed().eval(),
        normed(track_running_stats=False),
        Coupling(nn.Dropout(0.0)),
        Coupling(nn.LayerNorm(N, dtype=F64)),
    ):
        assert checked(graph_of(STEM, ("c", part, "s"), HEAD)) == {"c"}, part
    # At the ends, where activations are kept, anything goes.
    stem = ("s", nn.Sequential(linear(2, 2 * N, 0), nn.Dropout(0.5)), "u")
    head = ("y", nn.Sequential(nn.BatchNorm1d(2 * N), linear(2 * N, 2, 1)).double(), "c")
    assert checked(graph_of(stem, ("c", coupling(), "s"), head)) == {"c"}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5), (F64, 10)])
def test_the_leak_that_is_still_allowed(dtype, limit):
    """Over all blocks in a row: two with limit/2 * (1 - 1e-3) each pass, a bit more does not."""

    def row(leak):
        return graph_of(
            ("s", linear(2, N, 0), "u"),
            ("b", Midpoint(layer(N, N, 1), 50, 0.1, leak=leak), "s"),
            ("c", Midpoint(layer(N, N, 2), 50, 0.1, leak=-leak, start=False), "b"),
            ("y", linear(2 * N, 2, 1), "c"),
        )

    exact = limit / 100 / 0.1
    for leak, passes in ((exact * 0.999, True), (exact * 1.001, False)):
        graph = row(leak)
        for block in graph.blocks.values():
            block.module.to(dtype)
        if passes:
            assert checked(graph, dtype=dtype) == {"b", "c"}
        else:
            message = rf"with block 'c' .* = {limit}\.0.*, above {limit} for {str(dtype)[6:]}.*"
            with pytest.raises(LevelError, match=message + "leak=0, a smaller tau or fewer steps"):
                checked(graph, dtype=dtype)


# -- drift ----------------------------------------------------------------------------------------


def expanding(steps: int, dtype=torch.float32) -> Graph:
    """h' = -h/2 in disguise: the error grows by e^(tau steps / 2), and no leak is declared."""
    f = nn.Linear(N, N, bias=False)
    f.weight.data = -0.5 * torch.eye(N)
    return graph_of(
        ("s", linear(2, N, 0).to(dtype), "u"),
        ("c", Midpoint(f.to(dtype), steps, 0.1), "s"),
        ("y", linear(2 * N, 2, 1).to(dtype), "c"),
    )


def drift(graph: Graph, u=None) -> list[str]:
    u = noise(1, 4, 2).float() if u is None else u
    return drift_warnings(graph, reversible_blocks(graph, graph.shapes(u.shape, u.dtype)), u)


def test_drift_is_estimated_and_warned_of():
    assert drift(expanding(100)) == []
    (warning,) = drift(expanding(200))
    assert "block 'c' recover" in warning
    assert "(float32, at the weights of the start)" in warning
    assert "float64, a smaller tau" in warning
    with pytest.raises(LevelError, match=r"block 'c'.*relative error of .*would mean nothing"):
        drift(expanding(320))
    with pytest.raises(LevelError, match="would mean nothing"):
        drift(expanding(2500))  # not even finite
    assert drift(expanding(200, F64), noise(1, 4, 2)) == []


def test_drift_is_the_error_of_the_whole_row_and_leaves_everything_as_it_was():
    """The same steps cut into four blocks drift as they do in one."""
    f = expanding(200).blocks["c"].module.f
    parts = [Midpoint(copy.deepcopy(f), 50, 0.1, start=i == 0) for i in range(4)]
    names = ["a", "b", "c", "d"]
    stem, head = ("s", linear(2, N, 0).float(), "u"), ("y", linear(2 * N, 2, 1).float(), "d")
    row = graph_of(stem, *zip(names, parts, ["s", *names[:-1]], strict=True), head)
    u, uncut = noise(1, 4, 2).float(), expanding(200)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    (whole,) = recoveries(uncut, {"c"}, u)
    (cut_up,) = recoveries(row, set(names), u)
    assert torch.equal(torch.get_rng_state(), state)
    assert cut_up.blocks == names
    assert cut_up.error == whole.error
    assert 1e-3 < whole.error < 1e-1


class Jitter(nn.Module):
    """Draws random numbers, which nobody can see from outside."""

    def forward(self, h):
        return h + torch.randn_like(h)


class Writing(nn.Module):
    """Writes to its input."""

    def forward(self, h):
        return h.relu_()


class Counting(nn.Module):
    """Counts its evaluations in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return h


def test_hidden_randomness_and_hidden_states_are_found():
    def with_f(f):
        return graph_of(STEM, ("c", nn.Sequential(Coupling(f), Coupling(f)), "s"), HEAD)

    u = noise(1, 4, 2)
    for f in (Jitter(), Writing()):
        with pytest.raises(LevelError, match="draws random numbers or writes to its input"):
            drift(with_f(f), u)
    with pytest.raises(LevelError, match="'c' moves its buffer '0.f.calls'"):
        drift(with_f(Counting()), u)
    assert drift(with_f(nn.Identity()), u) == []


def test_invertible_parts_that_keep_their_activations_are_named():
    mixed = nn.Sequential(linear(2, 2 * N, 0), coupling(2))
    graph = graph_of(("s", mixed, "u"), ("c", coupling(), "s"), HEAD)
    (warning,) = drift(graph, noise(1, 4, 2))
    assert "'s' has invertible parts but keeps their activations" in warning
    assert "first Coupling (partition.cuts)" in warning
    plain = nn.Sequential(linear(2, N, 0), ToPair())  # nothing to save there
    assert drift(graph_of(("s", plain, "u"), ("c", coupling(), "s"), HEAD), noise(1, 4, 2)) == []


# -- models ---------------------------------------------------------------------------------------


def norm(h):
    mean = h.mean(1, keepdim=True)
    return (h - mean) / torch.sqrt(((h - mean) ** 2).mean(1, keepdim=True) + 1e-3)


@pytest.mark.parametrize("kind", [ModelKind.REVERSIBLE_MLP, ModelKind.MIDPOINT])
def test_models_are_their_formulas(kind):
    spec = SampleSpec((4, 2, 3), F64, (4,), torch.int64, 3)
    settings = ModelSettings(kind=kind, width=5, depth=5, tau=0.2)
    model = make_model(settings, spec, seed=1, dtype=F64)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for i, made in enumerate(linears):
        made.bias.data = noise(i, *made.bias.shape)
    (W, b), *hidden, (V, d) = [(m.weight.detach().T, m.bias.detach()) for m in linears]
    u = noise(9, 4, 2, 3)
    h = torch.relu(u.flatten(1) @ W + b)
    if kind is ModelKind.REVERSIBLE_MLP:
        a, c = h[:, :5], h[:, 5:]
        for w, e in hidden:
            a, c = c, a + torch.relu(norm(c) @ w + e) / math.sqrt(5)
    else:
        w, e = hidden[0]
        a, c = h, h + 0.2 * torch.tanh(h @ w + e)
        for w, e in hidden[1:]:
            a, c = c, a + 0.4 * torch.tanh(c @ w + e)
    expected = norm(torch.cat([a, c], 1)) @ V + d
    torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-12)
    assert [bool(pieces_of(part)) for part in model] == [False, True, True, True, False]
    assert all(isinstance(part, InvertibleMap) for part in list(model)[1:-1])
    with pytest.raises(SettingsError, match=r"model\.depth.*at least 3 layers"):
        make_model(ModelSettings(kind=kind, depth=2), spec, seed=1, dtype=F64)
