"""The memory of blocks against counts by hand: float32, 16 rows, layers 64-32-24-10."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hamdist
from hamdist.dynamics.saved_state.block_memory import bytes_of

W0, W1, W2 = 4 * (64 * 32 + 32), 4 * (32 * 24 + 24), 4 * (24 * 10 + 10)
U, H0, H1 = 4 * 16 * 64, 4 * 16 * 32, 4 * 16 * 24  # of a sample: the input, both states
ADAM = {"adaptive": {}}  # v beside omega


@pytest.mark.parametrize(
    ("level", "fields", "optimiser", "kept"),
    [
        # D = 2: five and three samples under way; a layer and its relu keep input and output.
        ("trace", {}, 1, (5 * (U + H0), 3 * (H0 + H1), 0)),
        ("trace", {"learning": ADAM}, 2, (5 * (U + H0), 3 * (H0 + H1), 0)),
        (
            "trace",
            {"locality": {"memory": "trace+weights"}},
            1,
            (5 * (U + H0 + W0), 3 * (H0 + H1 + W1), 0),
        ),
        ("backprop", {}, 1, (U + H0, H0 + H1, 0)),
        # 1F1B: of eight micro-batches D - l + 1 at most, of two rows each.
        (
            "pipeline",
            {"locality": {"microbatches": 8}},
            1,
            (3 * (U + H0) // 8, 2 * (H0 + H1) // 8, 0),
        ),
        ("heads", {}, 1, (0, 0, 0)),
    ],
)
def test_weights_optimiser_and_samples_under_way(level, fields, optimiser, kept):
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    )
    stream = hamdist.streams.digits(batch=16, seed=0, dtype=torch.float32).train
    result = hamdist.train(
        model,
        stream,
        level=level,
        steps=12,
        engine={"kind": "inprocess", "step": "autograd"},
        **fields,
    )
    memory = list(result.block_memory.values())
    assert [one.weights for one in memory] == [W0, W1, W2]
    assert tuple(one.samples for one in memory) == kept
    if level == "trace":  # omega (and v), h and z; a readout has no state
        assert [one.state for one in memory] == [
            optimiser * W0 + 2 * H0,
            optimiser * W1 + 2 * H1,
            optimiser * W2,
        ]
    assert all(one.total == sum(one) for one in memory)


class Differentiating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.func.grad(lambda t: (t * t).sum() / 2)(x))


def test_of_code_that_is_not_looked_into_nothing_is_claimed():
    """torch.func forbids the hooks that would tell what autograd saves."""
    model = nn.Sequential(Differentiating(), nn.Linear(10, 10))
    stream = hamdist.streams.digits(batch=4, seed=0, dtype=torch.float32).train
    result = hamdist.train(model, stream, level="trace", steps=3, engine={"kind": "inprocess"})
    first, last = result.block_memory.values()
    assert (first.samples, first.total) == (None, None)
    assert last.samples == 0


def test_each_memory_once_and_of_views_their_part():
    whole = torch.zeros(100)
    assert bytes_of([whole, whole[:10], {"same": whole}]) == 400
    assert bytes_of([whole[:10], (whole[:10], whole[20:30])]) == 80
    assert bytes_of(torch.zeros(1).expand(1000)) == 4
    assert bytes_of([whole, torch.zeros(2)], {whole.untyped_storage().data_ptr()}) == 8
