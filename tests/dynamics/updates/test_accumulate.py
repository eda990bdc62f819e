"""One step for several samples (`locality.accumulate`), and two versions of the weights
(`double_buffered`) against torch.optim and autograd; tables written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import Network, bare_chain, edge, knobs, mlp, relative, samples, settings

from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Event, Phase, Stamp
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.errors import LevelError
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]


def run(model, items, level="trace", resume=None, **fields):
    learning = {"lr": 0.1, **fields.pop("learning", {})}
    config = settings(level, learning=learning, metrics={"window": 1}, **fields)
    return train(model, from_iterable(items, outputs=2), config, loss=mse)


def sgd(model, items, group, **options):
    """torch.optim.SGD on the mean loss of every `group` samples; what is left at the end is not
    learned."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for n, (u, y) in enumerate(items):
        if y is not None:
            (mse(model(u), y) / group).backward()
        if (n + 1) % group == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("level", ["backprop", "pipeline"])
@pytest.mark.parametrize("optimizer", [None, {"name": "sgd", "nesterov": True}])
@pytest.mark.parametrize(("group", "missing"), [(3, ()), (4, (2, 7))])
def test_without_delay_it_is_gradient_accumulation(level, optimizer, group, missing):
    items = [(u, None if n in missing else y) for n, (u, y) in enumerate(samples(14, 4, 4, 2))]
    locality = {"accumulate": group, **({"microbatches": 2} if level == "pipeline" else {})}
    learning = {"momentum": 0.6}
    if optimizer is not None:
        learning = {"optimizer": {**optimizer, "momentum": 0.6}}
    result = run(mlp(SIZES), items, level, locality=locality, learning=learning)
    nesterov = optimizer is not None
    expected = sgd(mlp(SIZES), items, group, momentum=0.6, nesterov=nesterov)
    assert relative(result.model.parameters(), list(expected.parameters())) <= 1e-12


def two_versions(model, items, group):
    """theta_(g+1) = theta_g - lr mean of the gradients of group g at theta_(g-1)."""
    latest, before = copy.deepcopy(model), copy.deepcopy(model)
    losses = []
    for first in range(0, len(items), group):
        used = before if first else latest
        used.zero_grad()
        for u, y in items[first : first + group]:
            loss = mse(used(u), y)
            losses.append(float(loss))
            (loss / group).backward()
        if first + group > len(items):
            break
        moved = copy.deepcopy(latest)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), used.parameters(), strict=True):
                p -= 0.1 * q.grad
        before, latest = latest, moved
    return latest, losses


@pytest.mark.parametrize(("c", "group", "count"), [(1, 4, 30), (1, 6, 30), (2, 2, 31), (1, 4, 3)])
def test_double_buffered(c, group, count):
    """Every block is one step behind, at any depth: the gradient is that of one network."""
    items = samples(count, 3, 4, 2)
    locality = {"speed": c, "accumulate": group, "double_buffered": True}
    result = run(mlp(SIZES), items, locality=locality)
    expected, losses = two_versions(mlp(SIZES), items, group)
    assert relative(result.model.parameters(), list(expected.parameters())) <= 1e-12
    assert [w.mean_loss for w in result.windows["block2"]] == pytest.approx(losses, rel=1e-12)
    if count > 2 * group:
        plain = sgd(mlp(SIZES), items, group)
        assert relative(plain.parameters(), list(expected.parameters())) > 1e-4


CHAIN = bare_chain(3)  # b0, b1, b2


def schedule(**overrides):
    return PulseSchedule(CHAIN, knobs("trace", **overrides))


def test_table_of_versions():
    """Three blocks, speed 1: messages of sample n come to b0 in tick n + 4, to b1 in n + 3."""
    made = schedule(accumulate=2)
    first = edge(CHAIN, "b0->b1")
    seen = [made.state(first, Event(n + 1, Phase.FORWARD, n)) for n in range(10)]
    #                samples 0 ... n - 5 have come back in a tick before n: steps of two
    assert [s.version for s in seen] == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    back = [made.message(first, Event(n + 4, Phase.BACKWARD, n)) for n in range(5)]
    assert back == [Stamp(n + 3, n, n // 2) for n in range(5)]
    assert [made.delay(f"b{i}") for i in range(3)] == [2, 1, 0]
    assert made.staleness == 4


def test_table_of_two_versions():
    made = schedule(accumulate=4, double_buffered=True)
    first = edge(CHAIN, "b0->b1")
    seen = [made.state(first, Event(n + 1, Phase.FORWARD, n)).version for n in range(13)]
    assert seen == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert [made.delay(f"b{i}") for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("level", "fields", "reason"),
    [
        ("trace", {"locality": {"accumulate": 3, "double_buffered": True}}, "use accumulate 4 or"),
        ("local", {"locality": {"accumulate": 2}}, "accumulate 2 with presentation 'hold'"),
        ("heads", {"locality": {"accumulate": 2}}, "credit 'heads'"),
        (
            "trace",
            {"locality": {"accumulate": 4, "double_buffered": True, "memory": "trace"}},
            r"use memory 'trace\+weights'",
        ),
        (
            "trace",
            {"locality": {"accumulate": 2}, "learning": {"heads": {"weight": 0.3}}},
            "learning.heads",
        ),
        ("trace", {"locality": {"accumulate": 2}, "learning": {"inputs": "whitened"}}, "inputs"),
    ],
)
def test_refused(level, fields, reason):
    with pytest.raises(LevelError, match=reason):
        run(mlp(SIZES), samples(4, 3, 4, 2), level, **fields)


def test_two_versions_are_all_that_a_block_keeps():
    """However many samples are under way: those of a group share their weights."""
    config = settings("trace", locality={"accumulate": 4, "double_buffered": True})
    kept = []

    def after(node, _):
        if node.name == "block0":
            weights = {id(t) for record in node.block.trace.values() for t in record.theta}
            kept.append((len(node.block.trace), len(weights) // 2))

    items = samples(30, 3, 4, 2)
    graph = as_graph(mlp(SIZES), config, from_iterable(items).spec, mse)
    Network(graph, config, items).run(after=after)
    assert max(under_way for under_way, _ in kept) == 5
    assert max(versions for _, versions in kept) == 2
