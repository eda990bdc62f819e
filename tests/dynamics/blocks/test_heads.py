"""Oracle: loops over ticks (or samples) with autograd and plain steps, after the equations of
heads.py. No schedule, no blocks, no closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, layer, linear, mlp, noise, relative, samples, settings
from torch import nn

from hamdist.dynamics.blocks.heads import Pooled, make_head
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.vjp.seeding import block_seed
from hamdist.errors import LevelError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]
D = 2


def chain_parts():
    """The blocks of mlp(SIZES)."""
    model = copy.deepcopy(mlp(SIZES))
    return [model[0:2], model[2:4], model[4:5]]


def first_head(name, features, outputs=2):
    shape = ((3, features), F64)
    return make_head(name, shape, (3, outputs), norm=True, seed=block_seed(0, f"{name}/head"))


class Steps:
    """Gradient descent with momentum, written out."""

    def __init__(self, module, lr, momentum=0.0):
        self.p = list(module.parameters())
        self.v = [torch.zeros_like(p) for p in self.p]
        self.lr, self.momentum = lr, momentum

    def step(self, g):
        with torch.no_grad():
            for i, (p, one) in enumerate(zip(self.p, g, strict=True)):
                self.v[i] = self.momentum * self.v[i] + one
                p -= self.lr * self.v[i]


def heads_alone(items, *, lr, momentum=0.0, weights=(1.0, 1.0)):
    """Every block after all samples: block l meets sample n with its own n steps behind it."""
    blocks = chain_parts()
    heads = [first_head("block0", 5), first_head("block1", 6)]
    steps = [Steps(b, lr * w, momentum) for b, w in zip(blocks, (*weights, 1.0), strict=True)]
    head_steps = [Steps(head, lr, momentum) for head in heads]
    for u, y in items:
        h = u
        for i, block in enumerate(blocks):
            out = block(h)
            prediction = heads[i](out) if i < 2 else out
            if y is not None:
                wrt = [*steps[i].p, *(head_steps[i].p if i < 2 else [])]
                g = torch.autograd.grad(mse(prediction, y), wrt)
                steps[i].step(g[: len(steps[i].p)])
                if i < 2:
                    head_steps[i].step(g[len(steps[i].p) :])
            h = out.detach()
    return [p for b in blocks for p in b.parameters()]


def beside_messages(items, *, c, lr, weight, momentum=0.0):
    """Level trace with heads: F of sample n at tick n c + l, then the head's step; B of sample n at
    n c + 2 D - l meets the input of its own F and today's weights."""
    blocks = chain_parts()
    heads = [first_head("block0", 5), first_head("block1", 6)]
    by_message = [Steps(b, lr, momentum) for b in blocks]
    by_head = [Steps(b, lr * weight, momentum) for b in blocks[:2]]
    head_steps = [Steps(head, lr, momentum) for head in heads]
    h = {(-1, n): u for n, (u, _) in enumerate(items)}
    message, kept = {}, {}
    for k in range(len(items) * c + 2 * D + 1):
        for i in (0, 1):
            n, rest = divmod(k - i, c)
            if rest == 0 and 0 <= n < len(items):
                x, y = h[i - 1, n], items[n][1]
                linear_, act = blocks[i]
                pre = (x @ linear_.weight.T + linear_.bias).detach()
                h[i, n] = act(pre)
                kept[i, n] = (x, h[i, n])
                if y is not None:
                    leaf = h[i, n].detach().requires_grad_()
                    s, *g = torch.autograd.grad(mse(heads[i](leaf), y), [leaf, *head_steps[i].p])
                    head_steps[i].step(g)
                    delta = s * (1 - h[i, n] ** 2)
                    by_head[i].step([delta.T @ x, delta.sum(0)])
            n, rest = divmod(k - (2 * D - i), c)
            if rest == 0 and 0 <= n < len(items) and (m := message[i + 1, n]) is not None:
                x, out = kept.pop((i, n))
                delta = m * (1 - out**2)
                message[i, n] = delta @ blocks[i][0].weight.detach()
                by_message[i].step([delta.T @ x, delta.sum(0)])
            elif rest == 0 and 0 <= n < len(items):
                message[i, n] = None
        n, rest = divmod(k - D, c)
        if rest == 0 and 0 <= n < len(items):
            x, y = h[1, n], items[n][1]
            message[2, n] = None
            if y is not None:
                last = blocks[2][0]
                delta = (x @ last.weight.T + last.bias - y).detach() / len(x)
                message[2, n] = delta @ last.weight.detach()
                by_message[2].step([delta.T @ x, delta.sum(0)])
    return [p for b in blocks for p in b.parameters()]


def learned(items, level, *, c=1, **fields):
    config = settings(level, locality={"speed": c}, **fields)
    result = train(mlp(SIZES), from_iterable(items, outputs=2), config, loss=mse)
    return result, list(result.model.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("c", [1, 2, "inf"])
@pytest.mark.parametrize("step", ["auto", "autograd"])
def test_heads_alone(c, momentum, step):
    """Nothing is stale at any speed."""
    items = [(u, None if n % 5 == 3 else y) for n, (u, y) in enumerate(samples(30, 3, 4, 2))]
    result, found = learned(
        items, "heads", c=c, learning={"lr": 0.1, "momentum": momentum}, engine={"step": step}
    )
    assert relative(found, heads_alone(items, lr=0.1, momentum=momentum)) <= 1e-12
    assert result.staleness == 0
    assert all(block.updates == 30 for block in result.blocks.values())
    assert relative(found, heads_alone(items, lr=0.1, momentum=momentum, weights=(0, 0))) > 1e-3


@pytest.mark.parametrize(("c", "momentum"), [(1, 0.0), (1, 0.6), (2, 0.0), (5, 0.0)])
@pytest.mark.parametrize("step", ["auto", "autograd"])
def test_heads_beside_messages(c, momentum, step):
    items = [(u, None if n % 5 == 3 else y) for n, (u, y) in enumerate(samples(30, 3, 4, 2))]
    _, found = learned(
        items,
        "trace",
        c=c,
        learning={"lr": 0.1, "momentum": momentum, "heads": {"weight": 0.4}},
        engine={"step": step},
    )
    expected = beside_messages(items, c=c, lr=0.1, weight=0.4, momentum=momentum)
    assert relative(found, expected) <= 1e-12
    without = beside_messages(items, c=c, lr=0.1, weight=0.0, momentum=momentum)
    assert relative(without, expected) > 1e-3


def test_weights_by_block():
    items = samples(30, 3, 4, 2)
    own = {"block0": {"heads": 0.5}, "block[1-9]": {"heads": "off"}}
    _, found = learned(items, "heads", learning={"lr": 0.1, "blocks": own})
    assert relative(found, heads_alone(items, lr=0.1, weights=(0.5, 0.0))) <= 1e-12


def test_no_message_crosses_an_edge_and_labels_travel_along_them():
    items = samples(20, 3, 4, 2)
    result, _ = learned(items, "heads", learning={"lr": 0.1})
    label, states = 20 * 3 * 2 * 8, {"block0": 20 * 3 * 5 * 8, "block1": 20 * 3 * 6 * 8}
    assert result.bytes_per_edge == {
        "u->block0": 20 * 3 * 4 * 8,
        "u=>block0": label,
        "u=>block2": label,
        "block0->block1": states["block0"],
        "block0=>block1": label,
        "block1->block2": states["block1"],
    }


def test_the_exported_model_has_no_heads():
    items = samples(20, 3, 4, 2)
    for level, heads in (("heads", None), ("trace", {})):
        result, _ = learned(items, level, learning={"lr": 0.1, "heads": heads})
        assert result.model.state_dict().keys() == mlp(SIZES).state_dict().keys()


def test_a_graph_with_skips_and_two_readouts():
    """The labels are those of the readout that is named; each block has its own way to them."""

    def graph():
        return Graph(
            [
                BlockSpec("a", layer(4, 5, 0), ("u",)),
                BlockSpec("b", layer(5, 4, 1), ("a",), delays={"a": 2}),
                BlockSpec("c", layer(9, 4, 2), ("a", "b")),
                BlockSpec("y", linear(4, 2, 3), ("c",), loss=mse),
                BlockSpec("w", linear(5, 2, 4), ("a",), loss=mse),
            ]
        )

    items = [
        (u, {"y": y, "w": w})
        for (u, y), (_, w) in zip(samples(20, 3, 4, 2), samples(20, 3, 4, 2, 9), strict=True)
    ]
    for readout in ("y", "w"):
        config = settings("heads", learning={"lr": 0.1, "heads": {"readout": readout}})
        result = train(graph(), from_iterable(items), config)
        own = graph()
        blocks = {n: own.blocks[n].module for n in own.blocks}
        heads = {n: first_head(n, f) for n, f in (("a", 5), ("b", 4), ("c", 4))}
        steps = {n: Steps(m, 0.1) for n, m in blocks.items()}
        head_steps = {n: Steps(m, 0.1) for n, m in heads.items()}
        for u, target in items:
            h = {"u": u}
            for name, spec in own.blocks.items():
                out = blocks[name](torch.cat([h[p] for p in spec.parents], -1))
                label = target[name if name in "yw" else readout]
                wrt = [*steps[name].p, *(head_steps[name].p if name in heads else [])]
                guess = heads[name](out) if name in heads else out
                g = torch.autograd.grad(mse(guess, label), wrt)
                many = len(steps[name].p)
                steps[name].step(g[:many])
                if name in heads:
                    head_steps[name].step(g[many:])
                h[name] = out.detach()
        for name, module in blocks.items():
            expected = list(module.parameters())
            assert relative(result.blocks[name].theta.values(), expected) <= 1e-12, (readout, name)


@pytest.mark.parametrize(
    ("h", "prediction", "mean"),
    [
        ((3, 7), (3, 2), lambda x: x),
        ((3, 7, 4, 5), (3, 2), lambda x: x.mean((2, 3))),
        ((3, 6, 7), (3, 2), lambda x: x.mean(1)),
        ((3, 6, 7), (3, 6, 2), lambda x: x),
    ],
)
def test_what_a_head_computes(h, prediction, mean):
    head = make_head("b", (h, F64), prediction, norm=True, seed=3)
    x = noise(1, *h)
    over = tuple(range(1, len(h))) if len(h) == 4 else (-1,)
    centred = x - x.mean(over, keepdim=True)
    normed = centred / (centred.square().mean(over, keepdim=True) + 1e-3).sqrt()
    expected = mean(normed) @ head[-1].weight.T + head[-1].bias
    assert head(x).shape == prediction
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)
    plain = make_head("b", (h, F64), prediction, norm=False, seed=3)
    torch.testing.assert_close(plain(x), mean(x) @ head[-1].weight.T, rtol=1e-12, atol=1e-12)
    many = make_head("b", ((3, 400), F64), (3, 300), norm=True, seed=3)[-1]
    assert float(many.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.02)
    assert not many.bias.any()


def test_a_head_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    make_head("b", ((3, 7), F64), (3, 2), norm=True, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert Pooled(last=True)(noise(0, 2, 3, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    ("level", "fields", "named"),
    [
        ("local", {"learning": {"heads": {}}}, "learning.heads with presentation 'hold'"),
        ("heads", {"learning": {"heads": {"readout": "nobody"}}}, "'nobody' is no readout"),
        ("heads", {"learning": {"blocks": {"blok*": {"heads": 1}}}}, "no such block"),
        ("trace", {"locality": {"credit": "heads"}}, "credit 'heads' with presentation 'pulse'"),
        ("heads", {"locality": {"memory": "trace"}}, "memory 'trace'"),
        ("trace", {"locality": {"memory": "none"}}, "memory 'none'"),
    ],
)
def test_what_does_not_fit_is_refused(level, fields, named):
    with pytest.raises(LevelError, match=named):
        train(mlp(SIZES), from_iterable(samples(3, 3, 4, 2)), settings(level, **fields), loss=mse)


def test_a_state_that_no_linear_readout_takes():
    with pytest.raises(LevelError, match=r"block 'b'.*learning\.blocks\.b\.heads: off"):
        make_head("b", ((3, 6, 7), F64), (3, 5, 2), norm=True, seed=0)
    with pytest.raises(LevelError, match="int64"):
        make_head("b", ((3, 6), torch.int64), (3, 2), norm=True, seed=0)


def test_blocks_without_weights_pass_labels_on():
    model = nn.Sequential(nn.Tanh(), *mlp([4, 5, 2]))
    items = samples(20, 3, 4, 2)
    config = settings("heads", learning={"lr": 0.1}, partition={"cuts": ["1", "3"]})
    result = train(model, from_iterable(items, outputs=2), config, loss=mse)
    own = copy.deepcopy(model)
    head = first_head("block1", 5)
    steps = [Steps(own[1], 0.1), Steps(own[3], 0.1), Steps(head, 0.1)]
    for u, y in items:
        h = own[2](own[1](torch.tanh(u)))
        g = torch.autograd.grad(mse(head(h), y), [*steps[0].p, *steps[2].p])
        out = torch.autograd.grad(mse(own[3](h.detach()), y), steps[1].p)
        steps[0].step(g[:2])
        steps[2].step(g[2:])
        steps[1].step(out)
    assert relative(result.model.parameters(), own.parameters()) <= 1e-12
