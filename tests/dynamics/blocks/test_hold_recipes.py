"""Oracle: a chain of three blocks in hold, tick by tick with matrices, after
time-and-signals.md and the equations of stillness.py: gate, retrospective gradients,
prospective and leaky states."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import Network, mlp, relative, samples, settings

from hamdist.dynamics.blocks.gate import Gate, RetrospectiveInput
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import LevelError
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]
D = 2


def simulate(items, *, c, lr, gate=None, blend=None, lead=0.0, leak=1.0, opened=None):
    """theta after all samples. At tick k block l reads what its parent sent at tick k - 1, its
    costate is the message of tick k - 1; the readout compares with the target of tick k - D."""
    model = mlp(SIZES)
    w = [model[2 * i].weight.detach().clone() for i in range(3)]
    b = [model[2 * i].bias.detach().clone() for i in range(3)]
    h = [torch.zeros(3, 5).double(), torch.zeros(3, 6).double()]
    sent = [h[0], h[1]]
    message = [None, None, None]  # by sender, of the tick before
    z = [torch.zeros_like(h[0]), torch.zeros_like(h[1])]
    e, before, still = [None, None], [None] * 3, [0] * 3
    many = len(items) * c
    for k in range(many + D):
        x = [items[min(k // c, len(items) - 1)][0], sent[0], sent[1]]
        now_sent, now_message, steps = list(sent), [None, None, None], []
        for i in range(3):
            if k >= many + i:  # the end has come
                continue
            d = 2 * (D - i)
            if d and before[i] is not None:
                alike = (x[i] - before[i]).norm() <= (gate or 0) * x[i].norm()
                still[i] = still[i] + 1 if alike else 0
            before[i] = x[i]
            moves = gate is None or still[i] >= d
            if opened is not None and moves:
                opened[i].append(k)
            if i == 2:
                n = (k - D) // c
                if k < D:
                    continue
                delta = (x[2] @ w[2].T + b[2] - items[n][1]) / 3
                now_message[2] = delta @ w[2]
                steps.append((2, delta.T @ x[2], delta.sum(0)))
                continue
            f = torch.tanh(x[i] @ w[i].T + b[i])
            m = message[i + 1]
            came = torch.zeros_like(z[i]) if m is None else m
            z[i] = came if leak == 1 else (1 - leak) * z[i] + came
            delta = leak * z[i] * (1 - f**2)
            now_message[i] = delta @ w[i]
            past, y = x[i], f
            if blend is not None:
                e[i] = x[i].clone() if e[i] is None else e[i] + (x[i] - e[i]) / (1 + d / blend)
                past = x[i] + blend * (e[i] - x[i])
                y = torch.tanh(past @ w[i].T + b[i])
            delta = leak * z[i] * (1 - y**2)
            if moves:
                steps.append((i, delta.T @ past, delta.sum(0)))
            new = h[i] + leak * (f - h[i])
            now_sent[i] = new + lead * (new - h[i])
            h[i] = new
        for i, gw, gb in steps:
            w[i] = w[i] - lr * gw
            b[i] = b[i] - lr * gb
        sent, message = now_sent, now_message
    return [t for pair in zip(w, b, strict=True) for t in pair]


def found(items, c, **fields):
    locality = {"speed": c, **fields.pop("locality", {})}
    config = settings("local", locality=locality, learning={"lr": 0.1}, **fields)
    result = train(mlp(SIZES), from_iterable(items, outputs=2), config, loss=mse)
    return list(result.model.parameters())


ITEMS = samples(12, 3, 4, 2)


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize("c", [1, 3, 7])
def test_the_oracle_itself(c, step):
    expected = simulate(ITEMS, c=c, lr=0.1)
    assert relative(found(ITEMS, c, engine={"step": step}), expected) <= 1e-12


@pytest.mark.parametrize("c", [1, 3, 5, 9])
@pytest.mark.parametrize("tolerance", [1e-6, 0.05])
def test_gate(c, tolerance):
    opened = [[], [], []]
    expected = simulate(ITEMS, c=c, lr=0.1, gate=tolerance, opened=opened)
    assert relative(found(ITEMS, c, locality={"gate": tolerance}), expected) <= 1e-12
    assert len(opened[2]) == len(ITEMS) * c + 2  # a readout waits for nothing
    if c <= 2 * D:
        assert not opened[0]
    elif c == 2 * D + 1:
        assert opened[0] == [c * n + 2 * D for n in range(len(ITEMS))]


def test_gate_by_hand():
    gate = Gate(2, 0.1)
    one, near, far = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.05]), torch.tensor([0.0, 1.0])
    shown = [one, one, near, near, far, far, far, one, one]
    told = [gate.open([x]) for x in shown]
    assert told == [False, False, True, True, False, False, True, False, False]
    assert all(Gate(0, 0.1).open([x]) for x in shown)
    short = Gate(1, 0.1)
    assert [short.open([one]), short.open([one[:1]]), short.open([one[:1]])] == [False, False, True]


def test_a_gate_counts_ticks_as_updates():
    """The stamps of what is sent follow from the schedule alone."""
    config = settings("local", locality={"speed": 3, "gate": True}, learning={"lr": 0.1})
    graph = as_graph(mlp(SIZES), config, from_iterable(ITEMS).spec, mse)
    network = Network(graph, config, ITEMS).run()
    updates = [network.nodes[f"block{i}"].block.weights.updates for i in range(3)]
    assert updates == [36, 37, 38]


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("blend", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("step", ["auto", "autograd"])
def test_retrospective(c, blend, step):
    expected = simulate(ITEMS, c=c, lr=0.1, blend=blend)
    made = found(ITEMS, c, locality={"blend": blend}, engine={"step": step})
    assert relative(made, expected) <= 1e-12
    assert relative(simulate(ITEMS, c=c, lr=0.1), expected) > 1e-4


def test_an_estimate_is_exact_where_the_input_moves_evenly():
    """For x_k = x_0 + k v the average lags by T - 1 ticks in the end, so x^ = x - d v."""
    start, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, -1.0]).double()
    for ticks, blend in [(4, 1.0), (6, 1.5), (8, 2.0)]:
        retrospect = RetrospectiveInput(ticks, blend)
        for k in range(400):
            (estimate,) = retrospect.estimate([start + k * v])
        torch.testing.assert_close(estimate, start + (399 - ticks) * v, rtol=1e-9, atol=1e-9)
    tokens = torch.tensor([1, 2])
    assert RetrospectiveInput(4, 1.0).estimate([tokens])[0] is tokens


@pytest.mark.parametrize("lead", [0.5, 2.0])
def test_prospective(lead):
    expected = simulate(ITEMS, c=2, lr=0.1, lead=lead)
    # (with a lead of 2 the weights grow to 1e3, and what is rounded with them)
    assert relative(found(ITEMS, 2, locality={"lead": lead}), expected) <= 1e-11


@pytest.mark.parametrize("leak", [0.25, 0.8])
def test_leaky_states_and_the_lead_that_undoes_them(leak):
    """h_{k+1} + (1 - a)/a (h_{k+1} - h_k) = f_k: with that lead children see no leak."""
    leaky = {"dynamics": {"c": leak}}
    made = found(ITEMS, 2, **leaky)
    assert relative(made, simulate(ITEMS, c=2, lr=0.1, leak=leak)) <= 1e-12
    lead = (1 - leak) / leak
    made = found(ITEMS, 2, **leaky, locality={"lead": lead})
    assert relative(made, simulate(ITEMS, c=2, lr=0.1, leak=leak, lead=lead)) <= 1e-12
    config = settings("local", locality={"speed": 2, "lead": lead}, learning={"lr": 0.0}, **leaky)
    at_once = settings("local", locality={"speed": 2}, learning={"lr": 0.0})
    runs = [
        train(mlp(SIZES), from_iterable(ITEMS, outputs=2), one, loss=mse).windows["block2"]
        for one in (config, at_once)
    ]
    for a, b in zip(*runs, strict=True):
        assert a.mean_loss == pytest.approx(b.mean_loss, rel=1e-12)


@pytest.mark.parametrize(
    ("level", "locality", "named"),
    [
        ("trace", {"gate": True}, "gate with presentation 'pulse'"),
        ("local", {"gate": 0.1, "update": "last-tick", "speed": 9}, "update 'last-tick'"),
        ("delay-free", {"gate": True}, "moves 'layer-by-layer'"),
        ("trace", {"lead": 1.0}, "'prospective' with presentation 'pulse'"),
        ("trace", {"blend": 1.0}, "'retrospective' with presentation 'pulse'"),
        ("local", {"blend": 1.0, "order": "sequential"}, "order 'sequential'"),
        ("bptt", {"gate": True}, "gate"),
    ],
)
def test_what_does_not_fit_is_refused(level, locality, named):
    with pytest.raises(LevelError, match=named):
        train(mlp(SIZES), from_iterable(ITEMS), settings(level, locality=locality), loss=mse)


def test_no_gate():
    config = {"locality": {"gate": False}}
    assert relative(found(ITEMS, 3, **config), simulate(ITEMS, c=3, lr=0.1)) <= 1e-12
