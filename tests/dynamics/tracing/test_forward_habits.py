"""What people write into `forward`. Oracle: torch.optim.SGD on the whole model in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import relative
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.errors import BlockError, GraphError, StreamError

F, C, LR = 6, 3, 0.1


class Habit(nn.Module):
    """Three layers, and a way of calling the second one."""

    def __init__(self, second):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(F, 8), nn.Linear(8, 8), nn.Linear(8, C)
        self.second = second

    def forward(self, x):
        return self.h(torch.tanh(self.second(self, torch.tanh(self.a(x)))))


def habit(second):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return Habit(second).double()


def batches(*rows):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, F, generator=draw, dtype=torch.float64),
         torch.randint(C, (n,), generator=draw))
        for n in rows
    ]  # fmt: skip


def learned(model, data, **partition):
    return hamdist.train(
        model, data, level="backprop", learning={"lr": LR}, dtype="float64",
        partition=partition, engine={"kind": "inprocess"},
    )  # fmt: skip


def apart_from_sgd(model, data, **partition):
    plain = copy.deepcopy(model)
    step = torch.optim.SGD(plain.parameters(), LR)
    for u, y in data:
        step.zero_grad()
        functional.cross_entropy(plain(u), y).backward()
        step.step()
    result = learned(model, data, **partition)
    return relative(result.model.parameters(), plain.parameters()), result


def twice_its_weight(model, h):
    changed = {"weight": model.b.weight * 2, "bias": model.b.bias}
    return torch.func.functional_call(model.b, changed, (h,))


def its_own_weights(model, h):
    return torch.func.functional_call(model.b, dict(model.b.named_parameters()), (h,))


def learns_anyway(model, h):
    return model.b.requires_grad_(True)(h)


def by_the_batch(more):
    return lambda model, h: model.b(h) * (2 if h.shape[0] > more else 1)


@pytest.mark.parametrize(
    ("second", "rows", "blocks"),
    [
        (twice_its_weight, (4,), 1),
        (its_own_weights, (4,), 3),
        (learns_anyway, (4,), 3),
        (by_the_batch(12), (16,), 1),  # more rows than the small batches of a trace have
        (by_the_batch(1), (4, 3), 3),
        (by_the_batch(1), (1,), 1),
    ],
)
def test_it_is_sgd(second, rows, blocks):
    apart, result = apart_from_sgd(habit(second), batches(*rows * 5))
    assert apart <= 1e-12
    assert len(result.blocks) == blocks


def test_one_row_where_the_model_does_something_else_then():
    with pytest.raises(StreamError, match=r"sample 2: u has batch 1, .*something else .*drop_last"):
        learned(habit(by_the_batch(1)), batches(4, 4, 1))


def frozen(model, h):
    return model.b.requires_grad_(False)(h)


def later_frozen(model, h):
    model.calls = getattr(model, "calls", 0) + 1
    model.b.weight.requires_grad = model.calls < 8
    return model.b(h)


def test_weights_that_a_forward_freezes():
    with pytest.raises(GraphError, match=r"forward sets requires_grad of its weight 'b.bias'"):
        learned(habit(frozen), batches(4))
    with pytest.raises(BlockError, match=r"forward sets requires_grad of its weight 'b.weight'"):
        learned(habit(later_frozen), batches(*[4] * 12))


def less_the_mean(model, h):
    return model.b(h - h.mean(0))


def over_the_rows(model, h):
    return model.b(h) / len(h)


@pytest.mark.parametrize(
    ("second", "warned"), [(less_the_mean, True), (over_the_rows, True), (its_own_weights, False)]
)
def test_rows_that_depend_on_others_in_micro_batches(second, warned):
    """Oracle: SGD on the whole batch, from which such a run departs."""
    plain, data = habit(second), batches(4, 4, 4)
    sgd = apart_from_sgd(plain, data)[1].model
    result = hamdist.train(
        habit(second), data, level="pipeline", learning={"lr": LR}, dtype="float64",
        locality={"microbatches": 2}, engine={"kind": "inprocess"},
    )  # fmt: skip
    apart = relative(result.model.parameters(), sgd.parameters())
    assert ("depends on the other rows of the batch" in str(result.warnings)) == warned
    assert (apart > 1e-6) == warned
