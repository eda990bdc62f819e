"""Eligibility traces of recurrent blocks, in float64.

Oracles: real-time recurrent learning with Jacobians by torch.autograd.functional, masked by hand;
e-prop of an LSTM and of spiking units gate by gate, as the paper writes it; autograd through time.
"""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import F64, Network, noise, relative, settings
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import DiagonalCell, LeakyCell, RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.rules.eligibility import DiagonalTraces, EProp, SnAp1
from hamdist.errors import GraphError, LevelError, SettingsError
from hamdist.runtime.train.train import train
from hamdist.streams import Sample, from_iterable

B, IN, N, OUT, LR = 2, 3, 4, 2, 0.3
LENGTHS = (5, 3, 4)


def data(missing=(2, 6)):
    """Tokens of three sequences; some have no target."""
    many = sum(LENGTHS)
    u, y = noise(1, many, B, IN), noise(2, many, B, OUT)
    last = {sum(LENGTHS[: i + 1]) - 1 for i in range(len(LENGTHS))}
    return [Sample(u[t], None if t in missing else y[t], end=t in last) for t in range(many)]


def cells(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = {
            "rnn": lambda: RecurrentCell(nn.RNNCell(IN, N)),
            "gru": lambda: RecurrentCell(nn.GRUCell(IN, N)),
            "lstm": lambda: RecurrentCell(nn.LSTMCell(IN, N)),
            "leaky": lambda: LeakyCell(IN, N),
            "spiking": lambda: LeakyCell(IN, N, threshold=0.4),
            "diagonal": lambda: DiagonalCell(IN, N),
        }[kind]().double()
        return made, nn.Linear(made.size, OUT).double()


def graph(kind, rule):
    cell, head = cells(kind)
    return Graph(
        [
            BlockSpec(
                "cell",
                cell,
                ("u", "cell"),
                combine=Combine.ARGUMENTS,
                shape=(cell.size,),
                rule=rule,
            ),
            BlockSpec("y", head, ("cell",), loss=mse),
        ]
    )


def run(kind, rule, level="backprop", lr=LR, **more):
    fields = {"learning": {"lr": lr}, "seed": 3, **more}
    return Network(graph(kind, rule), settings(level, **fields), data())


def weights(net):
    return [t for name in ("cell", "y") for t in net.theta(name)]


def online(kind, traced, lag=0, signal=None):
    """Learn online. traced(cell, theta, x, h, J) returns h and J, (B, S, *weight) by weight; lag:
    tokens by which an update of the cell is late; signal: of the error, the learning signal."""
    cell, head = cells(kind)
    theta = {n: p.detach().clone() for n, p in cell.named_parameters()}
    W, b = (p.detach().clone() for p in head.parameters())
    h = J = None
    waiting = []
    for sample in data():
        if h is None:
            h = torch.zeros(B, cell.size, dtype=F64)
        h, J = traced(cell, theta, sample.u, h, J)
        step = None
        if sample.y is not None:
            e = (h @ W.T + b - sample.y) / B
            z = e @ W if signal is None else signal(e)
            step = {n: torch.einsum("bs,bs...->...", z, J[n]) for n in theta}
            W, b = W - LR * e.T @ h, b - LR * e.sum(0)
        waiting.append(step)
        if len(waiting) > lag:
            late = waiting.pop(0)
            theta = theta if late is None else {n: t - LR * late[n] for n, t in theta.items()}
        if sample.end:
            h = J = None
    for late in waiting:
        theta = theta if late is None else {n: t - LR * late[n] for n, t in theta.items()}
    return [*theta.values(), W, b]


def masked(pattern):
    """Real-time recurrent learning; pattern(name, weight, S): what is kept of J."""

    def traced(cell, theta, x, h, J):
        now, direct = [], {n: [] for n in theta}
        for row in range(B):

            def f(state, *values, row=row):
                named = dict(zip(theta, values, strict=True))
                arguments = (x[row : row + 1], state[None])
                return torch.func.functional_call(cell, named, arguments)[0]

            jacobians = torch.autograd.functional.jacobian(f, (h[row], *theta.values()))
            now.append(jacobians[0])
            for n, i in zip(theta, jacobians[1:], strict=True):
                direct[n].append(i)
        D = torch.stack(now)
        new = {n: torch.stack(i) for n, i in direct.items()}
        if J is not None:
            for n, before in J.items():
                kept = pattern(n, theta[n], h.shape[1])
                new[n] = kept * (new[n] + torch.einsum("bst,bt...->bs...", D, before))
        after = torch.func.functional_call(cell, theta, (x, h))
        return after, new

    return traced


def snap(kind):
    """By hand: number s and row r are of one unit, and c of an LSTM does not depend on o."""

    def pattern(name, w, size):
        kept = torch.zeros(size, *w.shape, dtype=F64)
        for s in range(size):
            for r in range(len(w)):
                gate = r // N
                kept[s, r] = s % N == r % N and not (kind == "lstm" and s >= N and gate == 3)
        return kept

    return pattern


@pytest.mark.parametrize(
    ("kind", "level", "lag"),
    [("rnn", "backprop", 0), ("gru", "trace", 2), ("lstm", "backprop", 0)],
)
def test_snap_1_is_masked_real_time_recurrent_learning(kind, level, lag):
    expected = online(kind, masked(snap(kind)), lag)
    assert relative(weights(run(kind, SnAp1(), level).run()), expected) <= 1e-12
    whole = online(kind, masked(lambda n, w, size: torch.ones(size, *w.shape, dtype=F64)), lag)
    assert relative(expected, whole) > 1e-4


def lstm_traces(cell, theta, x, h, J):
    """Bellec et al. 2020: the trace of c is f times its own, plus what acts at once."""
    (Wi, Wh, bi, bh), (h, c) = theta.values(), h.chunk(2, 1)
    i, f, g, o = (x @ Wi.T + bi + h @ Wh.T + bh).chunk(4, 1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    new = f * c + i * g
    gates = [g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), 0 * o]
    slope = o * (1 - torch.tanh(new) ** 2)
    ones = torch.ones(B, 1, dtype=F64)
    traces = {}
    for name, before in zip(theta, (x, h, ones, ones), strict=True):
        eps = torch.zeros(B, 4, N, before.shape[1], dtype=F64)
        for gate in range(4):
            for j in range(N):
                eps[:, gate, j] = gates[gate][:, j : j + 1] * before
                if J is not None:
                    eps[:, gate, j] += f[:, j : j + 1] * J["eps", name][:, gate, j]
        e = slope[:, None, :, None] * eps
        e[:, 3] += (torch.tanh(new) * o * (1 - o))[:, :, None] * before[:, None]
        traces[name] = e, eps
    return torch.cat([o * torch.tanh(new), new], 1), traces


def test_e_prop_of_an_lstm():
    """The readout reads h and c, so that both have their traces."""

    def traced(cell, theta, x, h, J):
        h, traces = lstm_traces(cell, theta, x, h, J)
        new = {("eps", name): eps for name, (_, eps) in traces.items()}
        for name, (e, eps) in traces.items():
            full = torch.zeros(B, 2 * N, 4, N, e.shape[3], dtype=F64)
            for j in range(N):
                full[:, j, :, j], full[:, N + j, :, j] = e[:, :, j], eps[:, :, j]
            new[name] = full.reshape(B, 2 * N, *theta[name].shape)
        return h, new

    assert relative(weights(run("lstm", EProp()).run()), online("lstm", traced)) <= 1e-12


def test_random_e_prop_of_spiking_units():
    """Traces are filtered spikes of the units before: e_ji = psi_j sum_s alpha^(t-s) z_i^s."""
    net = run("spiking", EProp("random"))
    feedback = net.nodes["cell"].block.rule.view.memory["B"].clone()
    assert feedback.shape == (OUT, N)
    alpha, threshold = 0.9, 0.4
    spikes = []

    def traced(cell, theta, x, h, J):
        W, b, U = (theta[n] for n in ("input.weight", "input.bias", "recurrent.weight"))
        z, v = h.chunk(2, 1)
        v = alpha * v + x @ W.T + b + z @ U.T - threshold * z
        spikes.append(z)
        psi = 0.3 / threshold * (1 - ((v - threshold) / threshold).abs()).clamp(min=0)
        new = {}
        for name, before in (
            ("input.weight", x),
            ("input.bias", torch.ones(B, 1, dtype=F64)),
            ("recurrent.weight", z),
        ):
            filtered = before if J is None else alpha * J["filtered", name] + before
            full = torch.zeros(B, 2 * N, N, before.shape[1], dtype=F64)
            for j in range(N):
                full[:, j, j] = psi[:, j : j + 1] * filtered
            new[name] = full.reshape(B, 2 * N, *theta[name].shape)
            new["filtered", name] = filtered
        return torch.cat([(v > threshold).double(), v], 1), new

    def signal(e):
        return torch.cat([e @ feedback, torch.zeros(B, N, dtype=F64)], 1)

    expected = online("spiking", traced, signal=signal)
    assert relative(weights(net.run()), expected) <= 1e-12
    assert 0.1 < float(torch.cat(spikes).mean()) < 0.9


def through_time(kind):
    """Gradients of the summed losses of each sequence, by autograd."""
    cell, head = cells(kind)
    total, h = torch.zeros((), dtype=F64), None
    for sample in data():
        h = torch.zeros(B, cell.size, dtype=F64) if h is None else h
        h = cell(sample.u, h)
        if sample.y is not None:
            total = total + mse(head(h), sample.y)
        h = None if sample.end else h
    return torch.autograd.grad(total, list(cell.parameters()))


@pytest.mark.parametrize("level", ["backprop", "trace"])
def test_diagonal_traces_are_exact(level):
    """With weights that do not move, updates sum to the gradient through the whole sequence."""
    net = run("diagonal", DiagonalTraces(), level, lr=0.0)
    sums = [torch.zeros_like(t) for t in net.theta("cell")]

    def after(node, event):
        learns = {n for n, sample in enumerate(data()) if sample.y is not None}
        if node.name == "cell" and event.phase.value == "B" and event.sample in learns:
            for total, g in zip(sums, node.block.weights.omega, strict=True):
                total += g

    net.run(after=after)
    assert relative(sums, through_time("diagonal")) <= 1e-12


def test_diagonal_traces_online():
    whole = masked(lambda n, w, size: torch.ones(size, *w.shape, dtype=F64))
    expected = online("diagonal", whole, lag=2)
    assert relative(weights(run("diagonal", DiagonalTraces(), "trace").run()), expected) <= 1e-12


def test_messages_to_parents_are_of_the_same_token():
    """Below a cell: backpropagation within the token."""
    seen = {}

    class Sees(hamdist.Rule):
        def backward(self, block, kept, message):
            seen[block.sample] = message.clone()
            return block.vjp(kept, message)

    cell, head = cells("gru")
    blocks = graph("gru", SnAp1())
    below = BlockSpec("x", nn.Linear(IN, IN).double(), ("u",), rule=Sees())
    spec = BlockSpec(**{**vars(blocks.blocks["cell"]), "parents": ("x", "cell")})
    net = Network(
        Graph([below, spec, blocks.blocks["y"]]), settings("backprop", learning={"lr": 0.0}), data()
    )
    net.run()
    h = None
    for n, sample in enumerate(data()):
        x = functional.linear(sample.u, below.module.weight, below.module.bias).detach()
        x.requires_grad_()
        h = cell(x, torch.zeros(B, N, dtype=F64) if h is None else h.detach())
        if sample.y is not None:
            (expected,) = torch.autograd.grad(mse(head(h), sample.y), x)
            assert relative([seen[n]], [expected]) <= 1e-12
        h = None if sample.end else h


def test_the_model_is_that_of_sequences():
    """Of a whole run: (T, B, I) -> (T, B, O), and other tokens than those of one length."""
    fields = {"level": "trace", "dtype": "float64", "engine": {"kind": "inprocess"}}
    config = settings("trace", **{k: v for k, v in fields.items() if k != "level"})
    made = graph("lstm", None)
    result = train(made, from_iterable(data(), classes=None), config, rules={"*": "e-prop"})
    assert result.model(noise(3, 7, B, IN)).shape == (7, B, OUT)
    assert (
        result.blocks["cell"].theta.keys()
        == dict(made.blocks["cell"].module.named_parameters()).keys()
    )


def refused(rule, error, match, kind="lstm", level="trace", made=None, **more):
    config = settings(level, engine={"kind": "inprocess"}, **more)
    with pytest.raises(error, match=match):
        train(made or graph(kind, None), from_iterable(data()), config, rules=rule)


def test_what_is_refused():
    refused({"cell": "diagonal"}, GraphError, "units depend on states of other units", "gru")
    refused({"cell": "e-prop"}, GraphError, "other units read all of its state", "gru")
    refused({"*": "e-prop"}, LevelError, "use level trace or backprop", level="bptt")
    refused({"*": "snap-1"}, LevelError, "metrics.alignment", metrics={"alignment": 2})
    wrong = {"name": "e-prop", "feedback": "x"}
    refused({"*": wrong}, SettingsError, "'symmetric' or 'random'")
    refused({"y": "snap-1"}, SettingsError, "SnAp1 is no rule of a readout")
    mixing = nn.Sequential(nn.Linear(IN + N, N), nn.Linear(N, N)).double()
    spec = BlockSpec("cell", mixing, ("u", "cell"), shape=(N,))
    readout = BlockSpec("y", nn.Linear(N, OUT).double(), ("cell",), loss=mse)
    made = Graph([spec, readout])
    refused({"*": "snap-1"}, GraphError, "depend on weights '0.weight' of other units", made=made)
    spec = BlockSpec("cell", nn.Linear(IN, N).double(), ("u",))
    made = Graph([spec, readout])
    refused({"cell": "snap-1"}, SettingsError, "a block that does not read itself", made=made)
    refused(
        {"*": "snap-1"},
        SettingsError,
        "SnAp1 fits none of its blocks, as 'cell' is a block that does not read itself",
        made=made,
    )
