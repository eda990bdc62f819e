"""Built-in rules against plain torch: each formula once more, by hand, in float64.

The oracles take the random matrices out of the blocks' memory, and nothing else of hamdist.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, Network, layer, linear, noise, relative, settings
from torch import nn
from torch.nn import functional
from torch.nn import grad as torch_grad

import hamdist
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.rules.feedback_alignment import SignSymmetry
from hamdist.dynamics.rules.hebbian import Oja, SoftHebb
from hamdist.dynamics.rules.local_losses import DifferenceTargetPropagation, ForwardForward
from hamdist.dynamics.rules.names import HOMES, built_in
from hamdist.errors import GraphError

B, SIZES = 4, (5, 6, 7, 3)
LR, ITEMS = 0.2, 12


def items(many=ITEMS, missing=()):
    u = noise(1, many, B, SIZES[0])
    y = torch.randint(SIZES[-1], (many, B), generator=torch.Generator().manual_seed(2))
    return [(x, None if n in missing else t) for n, (x, t) in enumerate(zip(u, y, strict=True))]


def chain(*rules):
    """Three layers, tanh between; rules: of each block, or one for all."""
    rules = rules * 3 if len(rules) == 1 else rules
    blocks = [
        BlockSpec("a", layer(5, 6, 0), ("u",)),
        BlockSpec("b", layer(6, 7, 1), ("a",)),
        BlockSpec("r", linear(7, 3, 2), ("b",), loss=cross_entropy),
    ]
    return Graph([replace(b, rule=r) for b, r in zip(blocks, rules, strict=True)])


def run(*rules, level="backprop", data=None, **learning):
    given = {"learning": {"lr": LR, **learning}, "seed": 3}
    return Network(chain(*rules), settings(level, **given), data or items())


def memory(net, name):
    return {k: t.clone() for k, t in net.nodes[name].block.rule.view.memory.items()}


def root_mean_square(w):
    return float(w.detach().square().mean().sqrt())


def weights(net):
    return [t for name in "abr" for t in net.theta(name)]


def plain():
    made = [layer(5, 6, 0)[0], layer(6, 7, 1)[0], linear(7, 3, 2)]
    return [(m.weight.detach().clone(), m.bias.detach().clone()) for m in made]


def by_hand(back, after=None, decay=0.0, data=None):
    """Train the chain by the formulas. back(l, W, delta, e): z of layer l - 1; after: behind a
    step, with the steps of the matrices."""
    theta = plain()
    for u, y in data or items():
        h = [u]
        for n, (W, b) in enumerate(theta):
            a = h[-1] @ W.T + b
            h.append(a if n == 2 else torch.tanh(a))
        e = (torch.softmax(h[-1], 1) - functional.one_hot(y, 3)) / len(u)
        delta, steps = e, []
        for n in (2, 1, 0):
            W, b = theta[n]
            steps.insert(0, (delta.T @ h[n] + decay * W, delta.sum(0) + decay * b))
            if n:
                delta = back(n, W, delta, e) * (1 - h[n] ** 2)
        for (W, b), (dW, db) in zip(theta, steps, strict=True):
            W -= LR * dW
            b -= LR * db
        if after is not None:
            after([dW for dW, _ in steps])
    return [t for pair in theta for t in pair]


def test_feedback_alignment():
    net = run(built_in("feedback-alignment")())
    matrix = {1: memory(net, "b")["0.weight"], 2: memory(net, "r")["weight"]}
    expected = by_hand(lambda n, W, delta, e: delta @ matrix[n])
    assert relative(weights(net.run()), expected) <= 1e-13
    assert relative(expected, by_hand(lambda n, W, delta, e: delta @ W)) > 1e-3


class SentThrough(torch.autograd.Function):
    """A convolution by W, whose message to its input goes through B."""

    @staticmethod
    def forward(ctx, x, W, b, B):
        ctx.save_for_backward(x, B)
        return functional.conv2d(x, W, b)

    @staticmethod
    def backward(ctx, delta):
        x, B = ctx.saved_tensors
        to_x = torch_grad.conv2d_input(x.shape, B, delta)
        return to_x, torch_grad.conv2d_weight(x, B.shape, delta), delta.sum((0, 2, 3)), None


def test_feedback_alignment_of_pooled_convolutions():
    """As a LeNet has them; oracle: autograd, with the message of the second one by hand."""

    def layers(inputs, outputs, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conv = nn.Conv2d(inputs, outputs, 3, dtype=F64)
        return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))

    first, second, last = layers(1, 2, 0), layers(2, 3, 1), linear(12, 3, 2)
    rule = built_in("feedback-alignment")()
    blocks = [
        BlockSpec("a", copy.deepcopy(first), ("u",), rule=rule),
        BlockSpec("b", nn.Sequential(*copy.deepcopy(second), nn.Flatten()), ("a",), rule=rule),
        BlockSpec("r", copy.deepcopy(last), ("b",), loss=cross_entropy, rule=rule),
    ]
    u, y = noise(1, 5, B, 1, 14, 14), torch.randint(3, (5, B))
    data = list(zip(u, y, strict=True))
    net = Network(Graph(blocks), settings("backprop", learning={"lr": LR}), data)
    through, to_last = memory(net, "b")["0.weight"], memory(net, "r")["weight"]
    theta = [*first.parameters(), *second.parameters(), *last.parameters()]
    for x, t in data:
        h = first(x)
        conv = second[0]
        h = second[1:](SentThrough.apply(h, conv.weight, conv.bias, through)).flatten(1)
        prediction = last(h.detach())
        e = (torch.softmax(prediction, 1) - functional.one_hot(t, 3)) / B
        g = torch.autograd.grad(cross_entropy(prediction, t), list(last.parameters()))
        below = torch.autograd.grad(h, theta[:4], e.detach() @ to_last)
        with torch.no_grad():
            for w, dw in zip(theta, [*below, *g], strict=True):
                w -= LR * dw
    found = [t for name in "abr" for t in net.run().theta(name)]
    assert relative(found, theta) <= 1e-13


@pytest.mark.parametrize("magnitude", ["uniform", "fixed"])
def test_sign_symmetry(magnitude):
    net = run(SignSymmetry(magnitude))
    size = {
        n: torch.tensor(float(f"{root_mean_square(plain()[n][0]):.3g}"), dtype=F64) for n in (1, 2)
    }
    if magnitude == "fixed":
        size = {1: memory(net, "b")["0.weight"], 2: memory(net, "r")["weight"]}
        assert min(float(s.min()) for s in size.values()) >= 0
    expected = by_hand(lambda n, W, delta, e: delta @ (torch.sign(W) * size[n]))
    assert relative(weights(net.run()), expected) <= 1e-13


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_matrices_are_as_large_as_the_weights_at_the_start(spread):
    """2,000 numbers: the relative spread of their root mean square is 1 / sqrt(4,000) = 1.6 %."""
    wide = linear(50, 40, 0)
    wide.weight.data *= spread
    size = root_mean_square(wide.weight) or 50**-0.5
    for name in ("feedback-alignment", "kolen-pollack", "sign-symmetry"):
        layers = nn.Sequential(copy.deepcopy(wide), nn.Tanh())
        blocks = [
            BlockSpec("a", layer(5, 50, 0), ("u",)),
            BlockSpec("b", layers, ("a",), rule=built_in(name)()),
            BlockSpec("r", linear(40, 3, 0), ("b",), loss=cross_entropy),
        ]
        net = Network(Graph(blocks), settings("backprop", learning={"lr": LR}), items())
        matrix = memory(net, "b")["0.weight"]
        assert root_mean_square(matrix) == pytest.approx(size, rel=0.06)


def test_batchwise_magnitudes_are_drawn_anew():
    rule = SignSymmetry("batchwise")
    net = run(rule)
    view = net.nodes["b"].block.rule.view
    drawn = []
    for sample in (0, 1, 0):
        view.at("backward", sample, B)
        drawn.append(rule.feedback(view)["0.weight"].clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(torch.sign(d), torch.sign(net.theta("b")[0])) for d in drawn)


def test_kolen_pollack():
    """B gets the update of W; with weight decay both become equal."""
    net = run(built_in("kolen-pollack")(), weight_decay=0.3)
    matrix = {1: memory(net, "b")["0.weight"], 2: memory(net, "r")["weight"]}
    apart = matrix[2] - net.theta("r")[0]

    def after(steps):
        for n, b in matrix.items():
            W = net_theta[n]
            b -= LR * (steps[n] - 0.3 * W + 0.3 * b)
            net_theta[n] = W - LR * steps[n]

    net_theta = {1: plain()[1][0], 2: plain()[2][0]}
    expected = by_hand(lambda n, W, delta, e: delta @ matrix[n], after, decay=0.3)
    net.run()
    assert relative(weights(net), expected) <= 1e-13
    assert relative([memory(net, "r")["weight"]], [matrix[2]]) <= 1e-13
    # What is between them is left by nothing but the decay.
    left = memory(net, "r")["weight"] - net.theta("r")[0]
    assert relative([left], [apart * (1 - LR * 0.3) ** ITEMS]) <= 1e-12


def test_direct_feedback_alignment():
    rule = built_in("direct-feedback-alignment")()
    net = run(rule, rule, None)
    matrix = {1: memory(net, "a")["B"], 2: memory(net, "b")["B"]}
    assert [tuple(m.shape) for m in matrix.values()] == [(3, 6), (3, 7)]
    expected = by_hand(lambda n, W, delta, e: e @ matrix[n])
    assert relative(weights(net.run()), expected) <= 1e-13
    assert net.plan.channels.messages == {}
    assert {c.edge for c in net.plan.channels.errors.values()} == {"r=>a", "r=>b"}


def test_direct_feedback_keeps_the_size_of_the_error_in_wide_states():
    """|B e| is about |e| on a convolution of 8 x 24 x 24 numbers: its relative spread is 1 / 68."""
    conv = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten()).double()
    blocks = [
        BlockSpec("a", conv, ("u",), rule=built_in("direct-feedback-alignment")()),
        BlockSpec("r", linear(4608, 3, 0), ("a",), loss=cross_entropy),
    ]
    data = [(noise(1, 1, 1, 28, 28), torch.tensor([1]))]
    net = Network(Graph(blocks), settings("backprop", learning={"lr": LR}), data)
    matrix = memory(net, "a")["B"]
    e = torch.tensor([1.0, -2.0, 0.5], dtype=matrix.dtype)
    assert abs(float(torch.tensordot(e, matrix, dims=1).norm() / e.norm()) - 1) < 0.06


def test_the_error_comes_one_tick_behind_the_loss():
    """By hand: depth of r is 2, so blocks hear of sample n at tick n + 3."""
    rule = built_in("direct-feedback-alignment")()
    net = run(rule, rule, None, level="trace")
    events = []
    net.run(after=lambda node, event: events.append((node.name, event.phase.value, *event[::2])))
    backward = [(name, tick, n) for name, phase, tick, n in events if phase == "B"]
    assert sorted(backward) == sorted((name, n + 3, n) for name in "ab" for n in range(ITEMS))
    # a: 3 ticks between its passes, so 4 samples are kept; b: 2, so 3.
    assert [net.plan.schedule.stored(name) for name in "ab"] == [4, 3]


@pytest.mark.parametrize("name", HOMES)
def test_convolutions_and_a_missing_target(name):
    """Every rule runs on a convolution, where a target is missing nothing moves."""
    rule = built_in(name)()
    if rule.presentation != "pulse" or isinstance(rule, Oja):
        pytest.skip("held, of sequences, or of linear layers alone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
        ).double()
    data = [(x[:, :5].reshape(B, 1, 1, 5).expand(B, 1, 5, 5), y) for x, y in items(6)]

    def trained(data):
        given = {"classes": 3, "level": "trace", "engine": {"kind": "inprocess"}}
        cut = {"partition": {"cuts": ["3"]}, "learning": {"lr": LR}, "dtype": "float64"}
        return hamdist.train(model, data, rules={"*": name}, **given, **cut).model.state_dict()

    before, after = model.state_dict(), trained(data)
    assert all(not torch.equal(before[k], after[k]) for k in before)
    if not rule.overrides("learn"):
        last = [(data[0][0], data[0][1])] + [(u, None) for u, _ in data[1:]]
        once, alone = trained(last), trained(data[:1])
        assert all(torch.equal(once[k], alone[k]) for k in once)


# -- local losses and Hebbian rules ----------------------------------------------------------------


def one_block(rule, data, lr=LR):
    """The hidden block `a` in front of a readout; the state of `a` and what its rule remembers."""
    graph = Graph(
        [
            BlockSpec("a", layer(5, 6, 0), ("u",), rule=rule),
            BlockSpec("r", linear(6, 3, 1), ("a",), loss=cross_entropy),
        ]
    )
    return Network(graph, settings("trace", learning={"lr": lr}, seed=3), data)


def test_mono_forward():
    """Autograd of the local loss, stepped by torch.optim.SGD."""
    net = one_block(built_in("mono-forward")(), items())
    W, b = (t.requires_grad_() for t in plain()[0])
    M = memory(net, "a")["M"].requires_grad_()
    assert tuple(M.shape) == (3, 6)
    optimiser = torch.optim.SGD([W, b, M], LR)
    for u, y in items():
        optimiser.zero_grad()
        functional.cross_entropy(torch.tanh(functional.linear(u, W, b)) @ M.T, y).backward()
        optimiser.step()
    net.run()
    assert relative([*net.theta("a"), memory(net, "a")["M"]], [W, b, M]) <= 1e-13
    assert net.plan.channels.messages == {}


def test_forward_forward():
    """Autograd of the loss of each row, as the paper has it; the first rows teach nothing."""
    data = [(torch.cat([u, u[:3]]), torch.cat([y, y[:3]])) for u, y in items()]
    net = one_block(ForwardForward(0.4), data)
    W, b = (t.requires_grad_() for t in plain()[0])
    optimiser = torch.optim.SGD([W, b], LR)
    for u, _ in data:
        optimiser.zero_grad()
        g = torch.tanh(functional.linear(u, W, b)).square().mean(1)
        real, other = functional.softplus(0.4 - g[3:5]), functional.softplus(g[5:] - 0.4)
        torch.cat([real, other]).mean().backward()
        optimiser.step()
    assert relative(net.run().theta("a"), [W, b]) <= 1e-13
    with pytest.raises(GraphError, match="this one has 2 rows, give 3 or more"):
        one_block(ForwardForward(), [(u[:2], y[:2]) for u, y in items()]).run()


@pytest.mark.parametrize("decay", ["hebb", "oja", "sanger"])
def test_oja(decay):
    """Row by row, unit by unit, as the papers write it."""
    net = one_block(Oja(decay), items())
    W, b = plain()[0]
    for u, _ in items():
        dW = torch.zeros_like(W)
        for x in u:
            y = W @ x
            for i in range(6):
                to = {"hebb": 0, "oja": 6, "sanger": i + 1}[decay]
                dW[i] += y[i] * (x - sum((y[k] * W[k] for k in range(to)), 0 * x))
        W += LR * dW / B
    assert relative(net.run().theta("a"), [W, b]) <= 1e-13


def test_sanger_finds_the_principal_components():
    """Of inputs whose covariance is known."""
    scale = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2], dtype=F64)
    basis, _ = torch.linalg.qr(noise(9, 5, 5))
    data = [(x * scale @ basis.T, y) for x, y in items(2000)]
    net = one_block(Oja("sanger"), data, lr=0.005)
    W = net.run().theta("a")[0][:2]
    cosines = (functional.normalize(W, dim=1) @ basis[:, :2]).abs()
    assert cosines.diagonal().min() > 0.95


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_soft_hebb(temperature):
    net = one_block(SoftHebb(temperature), items())
    W, b = plain()[0]
    for u, _ in items():
        dW = torch.zeros_like(W)
        for x in u:
            a = W @ x
            y = torch.exp(a / temperature) / torch.exp(a / temperature).sum()
            for i in range(6):
                dW[i] += y[i] * (x - a[i] * W[i])
        W += LR * dW / B
    assert relative(net.run().theta("a"), [W, b]) <= 1e-13


def test_synthetic_gradients():
    """At level backprop: a step by the prediction, then the prediction learns from the message."""
    rule = built_in("synthetic-gradients")()
    net = run(None, rule, None)
    theta = plain()
    A, c = (memory(net, "b")[name] for name in "Ac")
    assert not A.any()
    for u, y in items():
        (W0, b0), (W1, b1), (W2, b2) = theta
        h0 = torch.tanh(u @ W0.T + b0)
        h1 = torch.tanh(h0 @ W1.T + b1)
        d = h1 @ A.T + c
        z1 = d / B * (1 - h1**2)
        step = (z1.T @ h0, z1.sum(0))
        W1 -= LR * step[0]
        b1 -= LR * step[1]
        e = (torch.softmax(h1 @ W2.T + b2, 1) - functional.one_hot(y, 3)) / B
        m = e @ W2
        # The message comes when b has moved: today's weights, the input of then.
        now = torch.tanh(h0 @ W1.T + b1)
        z0 = (d / B * (1 - now**2)) @ W1 * (1 - h0**2)
        A -= LR * (d / B - m).T @ h1
        c -= LR * (d / B - m).sum(0)
        W2 -= LR * e.T @ h1
        b2 -= LR * e.sum(0)
        W0 -= LR * z0.T @ u
        b0 -= LR * z0.sum(0)
    net.run()
    found = [*weights(net), *memory(net, "b").values()]
    assert relative(found, [*(t for pair in theta for t in pair), A, c]) <= 1e-13


def test_target_propagation():
    rule = DifferenceTargetPropagation(eta=0.3, noise=0.0)
    net = run(rule, rule, None)
    V, c = (memory(net, "b")[name] for name in "Vc")
    assert memory(net, "a") == {}

    def g(h):
        return torch.tanh(h @ V.T + c)

    theta = plain()
    for u, y in items():
        (W0, b0), (W1, b1), (W2, b2) = theta
        h0 = torch.tanh(u @ W0.T + b0)
        h1 = torch.tanh(h0 @ W1.T + b1)
        e = (torch.softmax(h1 @ W2.T + b2, 1) - functional.one_hot(y, 3)) / B
        target = h1 - 0.3 * B * (e @ W2)
        target0 = h0 + g(target) - g(h1)  # Lee et al. 2015, Eq. 15
        z1 = (h1 - target) / (0.3 * B) * (1 - h1**2)
        z0 = (h0 - target0) / (0.3 * B) * (1 - h0**2)
        back = g(h1)
        wrong = (back - h0) / B * (1 - back**2)  # of 1/2 |g(f(x)) - x|^2
        steps = [(z0.T @ u, z0.sum(0)), (z1.T @ h0, z1.sum(0)), (e.T @ h1, e.sum(0))]
        for (W, b), (dW, db) in zip(theta, steps, strict=True):
            W -= LR * dW
            b -= LR * db
        V -= LR * wrong.T @ h1
        c -= LR * wrong.sum(0)
    net.run()
    found = [*weights(net), *memory(net, "b").values()]
    assert relative(found, [*(t for pair in theta for t in pair), V, c]) <= 1e-12


def test_inverses_learn_to_undo_their_blocks():
    """With noise, over items whose states have a good inverse."""
    net = one_chain = run(
        DifferenceTargetPropagation(), DifferenceTargetPropagation(), None, data=items(200)
    )
    x = torch.tanh(noise(5, 64, 6))

    def apart():
        node = one_chain.nodes["b"].block.rule.view
        h = node.f([x])
        return float((torch.tanh(h @ node.memory["V"].T + node.memory["c"]) - x).square().mean())

    before = apart()
    net.run()
    assert apart() < 0.5 * before


# -- what is refused -------------------------------------------------------------------------------


class Backprop(hamdist.Rule):
    on_readout = True

    def backward(self, block, kept, message):
        return block.vjp(kept, message)


def test_the_plain_vjp_is_backpropagation():
    expected = by_hand(lambda n, W, delta, e: delta @ W)
    assert relative(weights(run(Backprop()).run()), expected) <= 1e-13
    assert relative(weights(run(Backprop(), None, Backprop()).run()), expected) <= 1e-13


def test_dropout_of_the_forward_pass_is_that_of_the_backward_pass():
    """Oracle: the same draws at level backprop's own rule would differ; a mask that is drawn anew
    would send a message through units that were dropped."""

    seen = []

    class Sees(Backprop):
        def backward(self, block, kept, message):
            seen.append(block.f(kept) == 0)
            return block.vjp(kept, message)

    graph = chain(None, Sees(), None)
    spec = graph.blocks["b"]
    dropping = replace(spec, module=nn.Sequential(*spec.module, nn.Dropout(0.5)))
    net = Network(
        graph.over([graph.blocks["a"], dropping, graph.blocks["r"]]), settings("trace"), items()
    )
    h = {}
    net.run(
        after=lambda node, event: (
            h.__setitem__(event.sample, node.block.h == 0)
            if node.name == "b" and event.phase.value == "F"
            else None
        )
    )
    assert all(torch.equal(h[n], dropped) for n, dropped in enumerate(seen))
    assert 0.3 < float(torch.cat(list(h.values())).double().mean()) < 0.7


def test_buffers_move_once_a_sample():
    """Oracle: level backprop's own rule, on the same net with batch norm."""

    def trained_with(*rules):
        graph = chain(None, *rules, None)
        spec = graph.blocks["b"]
        normed = replace(spec, module=nn.Sequential(spec.module[0], nn.BatchNorm1d(7).double()))
        net = Network(
            graph.over([graph.blocks["a"], normed, graph.blocks["r"]]),
            settings("backprop"),
            items(),
        ).run()
        return [t.double() for t in net.nodes["b"].block.cell.module.state_dict().values()]

    assert relative(trained_with(Backprop()), trained_with(None)) <= 1e-13


def test_h_in_learn_is_that_of_the_sample():
    seen = []

    class Sees(hamdist.Rule):
        signals = hamdist.Signals(back="none")

        def forward(self, block, inputs):
            h = block.f(inputs)
            return h, {"h": h.clone()}

        def learn(self, block, kept, label):
            seen.append(torch.equal(block.h, kept["h"]))
            return {}

    one_block(Sees(), items()).run()
    assert seen == [True] * ITEMS


def test_a_module_may_write_to_its_inputs():
    """Oracle: the same module, that does not."""

    def trained_with(inplace):
        graph = chain(None, Backprop(), None)
        spec = graph.blocks["b"]
        writing = replace(spec, module=nn.Sequential(nn.ReLU(inplace), *copy.deepcopy(spec.module)))
        blocks = [graph.blocks["a"], writing, graph.blocks["r"]]
        return weights(Network(graph.over(blocks), settings("trace"), items()).run())

    assert relative(trained_with(inplace=True), trained_with(inplace=False)) == 0


def wrong(**parts):
    return type("Wrong", (hamdist.Rule,), parts)()


def fails(self, *arguments):
    raise KeyError("forgotten")


def back(made):
    return lambda self, block, kept, message: made(block, kept, message)


REFUSED = {
    "no backward": (wrong(), "needs a method backward"),
    "no learn": (wrong(signals=hamdist.Signals(back="none")), "needs a method learn"),
    "no relax": (wrong(presentation="hold"), "needs a method relax"),
    "another presentation": (wrong(presentation="wave"), "presentation 'wave'"),
    "an unknown signal": (wrong(signals=hamdist.Signals(back="all")), "signals.back 'all'"),
    "memory with an object": (
        wrong(start=lambda self, block: {"x": object()}, backward=fails),
        r"start\(\) keeps no plain data: a object cannot be saved",
    ),
    "kept with a graph": (
        wrong(
            forward=lambda self, block, x: (block.f(x), x[0].clone().requires_grad_()),
            backward=fails,
        ),
        r"forward\(\) keeps no plain data: a tensor has a graph",
    ),
    "a weight is kept": (
        wrong(forward=lambda self, block, x: (block.f(x), block.theta["0.weight"]), backward=fails),
        r"forward\(\) keeps no plain data: a tensor is a weight itself, which moves",
    ),
    "h of another shape": (
        wrong(forward=lambda self, block, x: (block.f(x)[:, :2], x), backward=fails),
        r"gives h as a float64 tensor of shape \(4, 2\), not a float64 tensor of shape \(4, 7\)",
    ),
    "one value": (
        wrong(forward=lambda self, block, x: block.f(x), backward=fails),
        r"forward\(\) returned a float64 tensor of shape \(4, 7\), not \(h, kept\)",
    ),
    "a message of another shape": (
        wrong(backward=back(lambda b, k, m: ([m], {}))),
        r"tensor of shape \(4, 7\) as the message to a parent, not a float64 tensor of shape",
    ),
    "h of another type": (
        wrong(forward=lambda self, block, x: (block.f(x).float(), x), backward=fails),
        r"gives h as a float32 tensor of shape \(4, 7\), not a float64 tensor",
    ),
    "an update of another type": (
        wrong(backward=back(lambda b, k, m: ([None], {"0.bias": m.sum(0).long()}))),
        r"its update for '0.bias' is a int64 tensor of shape \(7,\), and the weight is a float64",
    ),
    "a sparse update": (
        wrong(backward=back(lambda b, k, m: ([None], {"0.bias": m.sum(0).to_sparse()}))),
        r"\(torch.sparse_coo\), and the weight is a float64 tensor of shape \(7,\)",
    ),
    "a weight that is moved": (
        wrong(backward=back(lambda b, k, m: b.theta["0.bias"].data.add_(1) is None or b.vjp(k, m))),
        "it changes the weight '0.bias' itself; return an update",
    ),
    "a weight in place, by nothing": (
        wrong(
            backward=back(lambda b, k, m: b.theta["0.bias"].detach().add_(0) is m or b.vjp(k, m))
        ),
        r"backward\(\) changes a weight or a signal in place",
    ),
    "its input in place": (
        wrong(forward=lambda self, b, x: (b.f(x), [x[0].mul_(2)]), backward=fails),
        r"forward\(\) changes a weight or a signal in place",
    ),
    "the message in place": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m.mul_(2)))),
        r"backward\(\) changes a weight or a signal in place",
    ),
    "h of another sample": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m * b.h))),
        r"block.h in backward\(\) is of another sample: return what",
    ),
    "the beginning of another token": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m if b.begins else 0 * m))),
        r"block.begins in backward\(\) is of another sample: move traces on in `forward`",
    ),
    "torch's own random numbers in start": (
        wrong(
            start=lambda self, b: {"B": torch.randn(7, 3)},
            backward=back(lambda b, k, m: b.vjp(k, m)),
        ),
        "it draws from the generator of torch, NumPy or Python",
    ),
    "torch's own random numbers": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m + 0 * torch.randn(())))),
        "it draws from the generator of torch, NumPy or Python, .* draw from block.generator",
    ),
    "NumPy's own random numbers": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m + 0 * np.random.rand()))),
        "it draws from the generator of torch, NumPy or Python",
    ),
    "a generator on the rule": (
        wrong(
            __init__=lambda self: setattr(self, "drawn", torch.Generator()),
            backward=lambda self, b, k, m: b.vjp(k, m + torch.rand((), generator=self.drawn)),
        ),
        "it changes self.drawn, .* draw from block.generator",
    ),
    "a list on the rule": (
        wrong(
            __init__=lambda self: setattr(self, "seen", []),
            backward=lambda self, b, k, m: self.seen.append(b.sample) or b.vjp(k, m),
        ),
        "it changes self.seen, but `self` holds constants",
    ),
    "a weight in memory": (
        wrong(start=lambda self, b: {"W": nn.Parameter(b.theta["0.weight"])}, backward=fails),
        r"start\(\) keeps no plain data: a tensor is a weight itself, which moves",
    ),
    "a weight in memory, later": (
        wrong(backward=back(lambda b, k, m: b.memory.update(b.theta) or b.vjp(k, m))),
        r"backward\(\) keeps no plain data: a tensor is a weight itself, which moves",
    ),
    "the method of the base": (
        wrong(backward=lambda self, *given: hamdist.Rule.backward(self, *given)),
        r"NotImplementedError: a rule of your own has its own backward\(\)",
    ),
    "a count on the rule": (
        wrong(
            calls=0,
            backward=lambda self, b, k, m: setattr(self, "calls", self.calls + 1) or b.vjp(k, m),
        ),
        "it changes self.calls, but `self` holds constants",
    ),
    "too many messages": (
        wrong(backward=back(lambda b, k, m: ([None, None], {}))),
        "a list of 2; return a list with one for each of its 1 parents",
    ),
    "an update of no weight": (
        wrong(backward=back(lambda b, k, m: ([None], {"W": m}))),
        r"an update for 'W', which is no weight that learns; known: 0.weight, 0.bias",
    ),
    "an update of another shape": (
        wrong(backward=back(lambda b, k, m: ([None], {"0.bias": m}))),
        r"its update for '0.bias' is a float64 tensor of shape \(4, 7\), and the weight is",
    ),
    "its own error": (
        wrong(backward=fails),
        r"block 'b'.*in a dry run: KeyError: 'forgotten' \(.*test_rules.py, line",
    ),
    "torch's error": (
        wrong(backward=back(lambda b, k, m: b.vjp(k, m[:2]))),
        r"in a dry run: RuntimeError: .* \(.*test_rules.py, line",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rule_may_not_do_is_found_before_anything_starts(case):
    rule, said = REFUSED[case]
    with pytest.raises(hamdist.HamdistError, match=said):
        trained(chain(None, rule, None))


def trained(graph, level="trace", **fields):
    given = {"classes": 3, "level": level, "engine": {"kind": "inprocess"}, "dtype": "float64"}
    return hamdist.train(graph, items(), **{**given, **fields})


LEVELS = {
    "local": ({}, "is of presentation 'pulse', the level of 'hold'; use level trace"),
    "heads": ({}, "level 'heads' sends none"),
    "pipeline": ({"locality": {"microbatches": 2}}, "use level 'backprop' instead of 'pipeline'"),
    "trace": ({"locality": {"memory": "trace+weights"}}, "use memory 'trace'"),
    "backprop": ({"learning": {"inputs": "centred"}}, "learning.inputs"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_levels_that_rules_do_not_fit(level):
    fields, said = LEVELS[level]
    with pytest.raises(hamdist.HamdistError, match=said):
        trained(chain(None, Backprop(), None), level, **fields)


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_a_number_is_laid_to_the_rule_that_returned_it(part):
    """Messages, found at the parent, and updates. (A trial on zeros is no number either.)"""

    def backward(self, block, kept, message):
        returned = block.vjp(kept, message)
        values = list(returned[1].values()) if part else [m for m in returned[0] if m is not None]
        for value in values:
            value.log_()  # of -1, ...
        return returned

    with pytest.raises(hamdist.HamdistError, match="the rule of b returns is not a number"):
        trained(chain(None, wrong(backward=backward), None))


@pytest.mark.parametrize("rules", [["kolen-pollack"], "kolen-pollack", Backprop()])
def test_rules_are_given_by_block(rules):
    with pytest.raises(hamdist.HamdistError, match="give a dict by block or pattern"):
        trained(chain(None), rules=rules)


def test_a_block_that_would_wait_for_ever():
    direct = built_in("direct-feedback-alignment")()
    with pytest.raises(
        hamdist.HamdistError, match=r"block 'a' waits for messages.*\(b\) send none"
    ):
        trained(chain(None, direct, None))


NAMES = {
    "feedback-alignmnt": "did you mean 'feedback-alignment'",
    "nowhere.py:Rule": "no file 'nowhere.py'",
    "sign-symmetry?": "is no rule",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_rules(name):
    with pytest.raises(hamdist.HamdistError, match=NAMES[name]):
        trained(chain(None), rules={"b": name})
    with pytest.raises(hamdist.HamdistError, match=NAMES[name]):
        trained(chain(None), learning={"rules": {"b": name}})


def test_patterns_arguments_and_readouts():
    with pytest.raises(hamdist.HamdistError, match=r"rules.block\*: no such block; known: a, b, r"):
        trained(chain(None), rules={"block*": "kolen-pollack"})
    with pytest.raises(
        hamdist.HamdistError, match=r"rules.r: DirectFeedbackAlignment is no rule of"
    ):
        trained(chain(None), rules={"r": "direct-feedback-alignment"})
    with pytest.raises(hamdist.HamdistError, match="magnitude 'huge'"):
        trained(chain(None), rules={"b": {"name": "sign-symmetry", "magnitude": "huge"}})
    with pytest.raises(hamdist.HamdistError, match="called with size"):
        trained(chain(None), rules={"b": {"name": "sign-symmetry", "size": 1}})
    by_settings = trained(chain(None), learning={"rules": {"*": "direct-feedback-alignment"}})
    by_name = trained(chain(None), rules={"[ab]": "direct-feedback-alignment"})
    for name, block in by_settings.blocks.items():
        assert all(torch.equal(t, by_name.blocks[name].theta[k]) for k, t in block.theta.items())
