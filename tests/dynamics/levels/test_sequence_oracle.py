"""Oracle: autograd through the unrolled network (nn.RNN, nn.GRU, nn.LSTM, or token by token), and
torch.optim.SGD on the sum of each sequence's losses. Float64, differences of at most 1e-12."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, mlp
from dynamics.sequences import KINDS, H, I, O, Tangle, Torch, learn, losses, stacked, tangle, text
from torch import nn

import hamdist
from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import LevelError
from hamdist.streams import from_iterable

BOUND = 1e-12
LENGTHS = [5, 1, 7, 3]


def run(graph, data, truncation=None, **fields):
    if truncation is not None:
        fields["locality"] = {**fields.get("locality", {}), "truncation": truncation}
    stream = from_iterable(data.samples, outputs=O)
    return hamdist.train(graph, stream, level="bptt", dtype="float64", **fields)


def assert_weights(result, net):
    for block, state in result.blocks.items():
        for name, value in state.theta.items():
            apart = (value - net.parameter(block, name)).abs().max()
            assert apart <= BOUND, (block, name, float(apart))


def assert_gradient(result, net):
    """omega of a sequence without momentum is the gradient."""
    for block, state in result.blocks.items():
        for name, value in state.omega.items():
            apart = (value - net.parameter(block, name).grad).abs().max()
            assert apart <= BOUND, (block, name, float(apart))


@pytest.mark.parametrize("truncation", [None, 1, 3, 6, 9])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_sequence(kind, layers, truncation):
    graph, data = stacked(kind, layers), text([6])
    net = Torch(graph, kind)
    sum(losses(net, data.u[0], data.y[0], min(6, truncation or 6))).backward()
    result = run(graph, data, truncation, learning={"lr": 0.0})
    assert_gradient(result, net)
    assert all(state.updates == 1 for state in result.blocks.values())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("truncation", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_momentum_over_sequences(kind, truncation, batch):
    graph, data = stacked(kind, 2), text(LENGTHS * 3, batch=batch)
    net = Torch(graph, kind)
    sgd = {"lr": 0.1, "momentum": 0.6, "dampening": 0.3}
    learn(net, data, truncation, **sgd)
    result = run(graph, data, truncation, learning=sgd)
    assert_weights(result, net)
    assert all(state.updates == 12 for state in result.blocks.values())


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("truncation", [None, 1, 2, 20])
def test_a_tangle_of_edges(truncation, tau):
    graph, data = tangle(), text(LENGTHS * 2, words=True)
    net = Tangle(graph)
    learn(net, data, truncation, lr=0.1, momentum=0.5)
    learning = {"lr": 0.1, "momentum": 0.5}
    assert_weights(run(graph, data, truncation, learning=learning, dynamics={"tau": tau}), net)


@pytest.mark.parametrize("truncation", [None, 2])
def test_missing_targets(truncation):
    """Of some tokens; of a whole sequence (1); of the part that is gone through in reverse (2):
    then neither theta nor omega moves, as with an optimiser that is not asked to step."""

    def missing(s, t):
        return t % 3 == 1 if s in (0, 4) else s == 1 or (s == 2 and t > 1)

    graph, data = tangle(), text([6, 4, 5, 3, 7, 2], words=True, missing=missing)
    net = Tangle(graph)
    sgd = {"lr": 0.1, "momentum": 0.5, "dampening": 0.2}
    learn(net, data, truncation, **sgd)
    result = run(graph, data, truncation, learning=sgd)
    assert_weights(result, net)
    assert all(state.updates == 6 for state in result.blocks.values())


def test_the_first_step_is_not_dampened_even_where_it_comes_late():
    """The first sequence has no targets: the optimiser's first step is the second sequence's."""
    graph, data = stacked("gru"), text([3, 4, 2], missing=lambda s, t: s == 0)
    sgd = {"lr": 0.1, "momentum": 0.5, "dampening": 0.9}
    net = Torch(graph, "gru")
    learn(net, data, **sgd)
    assert_weights(run(graph, data, learning=sgd), net)


def test_every_step_dampened():
    """first_step 'dampened': like an optimiser whose first gradient was scaled, too."""
    graph, data = stacked("gru"), text([3, 4])
    net = Torch(graph, "gru")
    rates = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for u, y in zip(data.u, data.y, strict=True):
        net.zero_grad()
        sum(losses(net, u, y, len(u))).backward()
        for name, p in net.named_parameters():
            rates[name] = 0.5 * rates[name] + (1 - 0.9) * p.grad
            p.data -= 0.1 * rates[name]
    learning = {"lr": 0.1, "momentum": 0.5, "dampening": 0.9, "first_step": "dampened"}
    assert_weights(run(graph, data, learning=learning), net)


def test_decay_counts_tokens():
    graph, data = stacked("rnn"), text(LENGTHS)
    net = Torch(graph, "rnn")
    learn(net, data, decay_over=16, lr=0.3)
    assert_weights(run(graph, data, steps=16, learning={"lr": 0.3, "decay": "linear"}), net)


def test_weight_cost_counts_once_per_sequence():
    """r_w tau is torch's weight_decay: H' has the term phi L + r_w/2 |theta|^2, and phi = 1/tau."""
    graph, data = stacked("lstm"), text(LENGTHS)
    net = Torch(graph, "lstm")
    learn(net, data, lr=0.1, momentum=0.5, weight_decay=0.2)
    learning = {"lr": 0.1, "momentum": 0.5}
    result = run(graph, data, learning=learning, dynamics={"tau": 0.5, "weight_cost": 0.4})
    assert_weights(result, net)


class Ways(nn.Module):
    """Uses one of two layers, by the sign of what comes."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(I, I, dtype=F64) for _ in range(2)])

    def forward(self, u):
        return self.ways[int(u.sum() > 0)](u)


SGD = {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("optimizer", [None, lambda params: torch.optim.SGD(params, **SGD)])
@pytest.mark.parametrize("truncation", [None, 2])
def test_weights_that_no_token_uses_stay(truncation, optimizer):
    """As with torch.optim, which passes over weights without a gradient: their momentum, too."""
    cell = RecurrentCell(nn.RNNCell(I, H, dtype=F64))
    graph = Graph(
        [
            BlockSpec("e", Ways(), ("u",)),
            BlockSpec("a", cell, ("e", "a"), combine=Combine.ARGUMENTS, shape=(H,)),
            BlockSpec("y", nn.Linear(H, O, dtype=F64), ("a",), loss=mse),
        ]
    )

    class Unrolled(Tangle):
        def forward(self, u, keep):
            e, a, y = self.blocks.values()
            h, found = torch.zeros(u.shape[1], H, dtype=F64), []
            for t, token in enumerate(u):
                h = a.cell(e(token), h.detach() if t == len(u) - keep else h)
                found.append([y(h)] if t >= len(u) - keep else None)
            return found

    data, net = text([4, 3, 5, 2, 4]), Unrolled(graph)
    for s, u in enumerate(data.u):
        u.abs_().mul_(1 if s in (0, 3) else -1)
    data.u[2][-1].abs_()  # a sequence of both signs
    learn(net, data, truncation, **SGD)
    fields = {"learning": SGD} if optimizer is None else {"optimizer": optimizer}
    assert_weights(run(graph, data, truncation, **fields), net)


@pytest.mark.parametrize("truncation", [None, 2])
def test_states_carried_over_chunks(truncation):
    """reset.h 'never': a chunk begins with the states that the one before it ended with, and no
    gradient flows into that one (truncated BPTT as it is mostly done)."""
    graph, data = tangle(), text([3, 1, 4], words=True)
    net = Tangle(graph)
    e, a, b, w, y = net.blocks.values()
    h, g = torch.zeros(2, 4, dtype=F64), torch.zeros(2, 5, dtype=F64)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for us, ys in zip(data.u, data.y, strict=True):
        taken = []
        keep = min(len(us), truncation or len(us))
        h, g = h.detach(), g.detach()
        for t, (token, target) in enumerate(zip(us, ys, strict=True)):
            if t == len(us) - keep:
                h, g = h.detach(), g.detach()
            x = e(token)
            h = a.cell(torch.cat([x, g], -1), h)
            g = b.cell(torch.cat([h, x], -1), g)
            if t >= len(us) - keep:
                taken += [mse(w(h), target), mse(y(torch.cat([h, g], -1)), target)]
        optimiser.zero_grad()
        sum(taken).backward()
        optimiser.step()
    fields = {"learning": {"lr": 0.1}, "dynamics": {"reset": {"h": "never"}}}
    result = run(graph, data, truncation, **fields)
    assert_weights(result, net)
    assert (result.blocks["a"].h - h).abs().max() <= BOUND


def test_by_default_states_are_cleared_and_saying_so_changes_nothing():
    graph, data = stacked("gru"), text(LENGTHS)
    default = run(graph, data, learning={"lr": 0.1})
    said = run(graph, data, learning={"lr": 0.1}, dynamics={"reset": {"h": "sequence"}})
    kept = run(graph, data, learning={"lr": 0.1}, dynamics={"reset": {"h": "never"}})
    for block, state in default.blocks.items():
        for name, value in state.theta.items():
            assert torch.equal(value, said.blocks[block].theta[name])
            assert not torch.equal(value, kept.blocks[block].theta[name])


def test_without_recurrence_a_sequence_is_a_batch_of_steps():
    """A feed-forward model, cut into its layers: one step of SGD on each sequence's summed loss."""
    model, data = mlp([3, 5, 2]), text(LENGTHS)
    net = copy.deepcopy(model)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for u, y in zip(data.u, data.y, strict=True):
        optimiser.zero_grad()
        sum(mse(net(x), t) for x, t in zip(u, y, strict=True)).backward()  # type: ignore[attr-defined]
        optimiser.step()
    result = run(model, data, loss=mse, learning={"lr": 0.1})
    assert isinstance(result.model, nn.Sequential)
    for found, expected in zip(result.model.parameters(), net.parameters(), strict=True):
        assert (found - expected).abs().max() <= BOUND


def test_phi_by_token():
    """phi = 0 for all tokens but the third, in a cycle of three: only that loss counts."""
    graph, data = stacked("gru"), text([3, 3])
    net = Torch(graph, "gru")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for u, y in zip(data.u, data.y, strict=True):
        optimiser.zero_grad()
        (2 * losses(net, u, y, 3)[2]).backward()
        optimiser.step()
    phi = {"values": [0.0, 0.0, 2.0], "cycle": True}
    assert_weights(run(graph, data, learning={"lr": 0.1}, dynamics={"phi": phi}), net)


def test_dissipation_per_reversed_token():
    """eta_z and eta_omega given: the recursion of equations.md written out, over sequences that
    begin with z = 0 and omega = mu omega."""
    graph, data = stacked("rnn"), text([4, 3, 5])
    tau, eta_z, eta_omega, mu, lr = 0.5, 0.3, 0.2, 0.6, 0.1
    cell, head = (copy.deepcopy(graph.blocks[name].module) for name in ("cell0", "y"))
    omega = {m: [torch.zeros_like(p) for p in m.parameters()] for m in (cell, head)}

    def gain(module, slopes):
        """omega_{j+1} = omega_j + tau ( slope - eta omega_j )."""
        pairs = zip(omega[module], slopes, strict=True)
        omega[module] = [o + tau * (g - eta_omega * o) for o, g in pairs]

    for us, ys in zip(data.u, data.y, strict=True):
        h = [torch.zeros(2, 4, dtype=F64)]
        for u in us:
            h.append(cell(u, h[-1]).detach())
        omega = {m: [mu * o for o in own] for m, own in omega.items()}
        z, carried = torch.zeros(2, 4, dtype=F64), torch.zeros(2, 4, dtype=F64)
        for m in reversed(range(len(us))):
            after = h[m + 1].clone().requires_grad_()
            loss = mse(head(after), ys[m]) / tau  # phi L
            read, *slopes = torch.autograd.grad(loss, [after, *head.parameters()])
            gain(head, slopes)
            z = tau * (read + carried) - tau * eta_z * z
            before = h[m].clone().requires_grad_()
            f = cell(us[m], before)
            carried, *slopes = torch.autograd.grad(f, [before, *cell.parameters()], z / tau)
            gain(cell, slopes)
        for module, own in omega.items():
            for p, o in zip(module.parameters(), own, strict=True):
                p.data -= lr * o
    dynamics = {"tau": tau, "eta_z": eta_z, "eta_omega": eta_omega}
    result = run(graph, data, learning={"lr": lr, "momentum": mu}, dynamics=dynamics)
    for name, module in (("cell0", cell), ("y", head)):
        for key, value in module.named_parameters():
            assert (result.blocks[name].theta[key] - value).abs().max() <= BOUND, (name, key)
    assert (result.blocks["cell0"].z - z).abs().max() <= BOUND


# -- what is stored, and what comes out ------------------------------------------------------------


@pytest.mark.parametrize(("truncation", "most"), [(None, 7), (3, 3), (20, 7), (1, 1)])
def test_stored_states(truncation, most):
    """As many tokens as the longest sequence has, or as are gone through in reverse."""
    result = run(stacked("lstm", 2), text(LENGTHS), truncation)
    assert result.stored == {"cell0": most, "cell1": most, "y": most}


def test_prequential_losses_are_those_of_the_forward_pass():
    """Every token is predicted before its sequence is learned from."""
    graph, data = stacked("gru"), text([4, 3], missing=lambda s, t: t == 1)
    net = Torch(graph, "gru")
    expected = []
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for u, y in zip(data.u, data.y, strict=True):
        taken = losses(net, u, y, len(u))
        expected += [float(v.detach()) for v in taken]
        optimiser.zero_grad()
        sum(taken).backward()
        optimiser.step()
    result = run(graph, data, learning={"lr": 0.1}, metrics={"window": 1})
    windows = result.windows["y"]
    assert [w.first for w in windows] == [0, 2, 3, 4, 6]
    assert [w.loss for w in windows] == pytest.approx(expected, abs=BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_comes_out_takes_whole_sequences(kind):
    graph, data = stacked(kind, 2), text(LENGTHS)
    net = Torch(graph, kind)
    learn(net, data, lr=0.1)
    result = run(graph, data, learning={"lr": 0.1})
    u = text([6]).u[0]
    assert (result.model(u) - torch.stack(net(u, 6))).abs().max() <= BOUND
    assert set(result.model.state_dict()) == {
        f"blocks.{b}.module.{name}" for b, s in result.blocks.items() for name in s.theta
    }


def test_the_model_of_a_tangle():
    graph = tangle()
    net = Tangle(graph)
    result = run(graph, text(LENGTHS, words=True), learning={"lr": 0.0})
    u = text([6], words=True).u[0]
    found = result.model(u)
    for i, name in enumerate(("w", "y")):
        expected = torch.stack([read[i] for read in net(u, 6)])
        assert (found[name] - expected).abs().max() <= BOUND


def test_a_stream_without_ends_is_pointed_out(monkeypatch):
    monkeypatch.setattr("hamdist.runtime.advice.advice.LONG_SEQUENCE", 20)
    long, short, two = (run(stacked("rnn"), text(lengths)) for lengths in ([20], [19], [10, 10]))
    assert any("one sequence of 20 samples" in warning for warning in long.warnings)
    assert not any("one sequence" in warning for warning in (*short.warnings, *two.warnings))


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"dynamics": {"reset": {"h": "sample"}}},
            r"reset\.h 'sample'.*use 'sequence', or 'never'",
        ),
        ({"dynamics": {"reset": {"z": "never", "omega": "sequence"}}}, r"reset\.omega.*momentum"),
        ({"dynamics": {"tau": {"values": [1.0, 0.5]}}}, r"dynamics\.tau changes"),
        ({"dynamics": {"c": 0.5}}, r"c tau = 0\.5"),
        ({"dynamics": {"sign": 1}}, r"sign = 1"),
        ({"locality": {"order": "simultaneous"}}, r"order 'simultaneous'.*'omega-first'"),
        ({"locality": {"memory": "trace+weights"}}, r"memory 'trace\+weights'.*'trace'"),
        ({"locality": {"speed": 3}}, r"speed 3.*'inf'"),
        ({"metrics": {"record": "energy"}}, r"metrics\.record 'energy'.*'sequence'"),
    ],
)
def test_knobs_that_mean_nothing_here(fields, match):
    with pytest.raises(LevelError, match=match):
        run(stacked("rnn"), text([2]), **fields)


def test_other_levels_point_to_bptt_for_a_graph_with_cycles():
    with pytest.raises(LevelError, match="'bptt'"):
        hamdist.train(stacked("rnn"), text([2]).samples, level="backprop")


def test_truncation_belongs_to_sequences():
    graph = Graph([BlockSpec("y", nn.Linear(3, 2, dtype=F64), ("u",), loss=mse)])
    with pytest.raises(LevelError, match="truncation 3.*'bptt'"):
        hamdist.train(graph, text([2]).samples, level="trace", locality={"truncation": 3})
