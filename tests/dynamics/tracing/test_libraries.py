"""What models of other people's libraries need to be followed. Oracle: torch.optim.SGD.

The libraries themselves are in no test run by default: test_transformers.py has them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import relative
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.tracing.recorded_calls import masks_stay

# A mask is left out where it hides nothing, unless somebody traces.
MASKS = """
import torch

def mask_of(there):
    if not torch.jit.is_tracing() and there.all():
        return None
    return there.bool()[:, None, None, :]
"""


def masking(file):
    """The functions of MASKS, as if they were written in that file."""
    functions = {}
    exec(compile(MASKS, file, "exec"), functions)
    return functions["mask_of"]


TRANSFORMERS = "/site-packages/transformers/masking_utils.py"


class Cache:
    """As in transformers: holds what a decoder has seen."""

    def __init__(self, seen):
        self.seen = seen


class Attention(nn.Module):
    """Two layers of attention; returns a cache beside its logits."""

    def __init__(self, file=TRANSFORMERS):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mixed = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.mask_of = masking(file)

    def forward(self, input_ids, attention_mask):
        h, mask, seen = self.words(input_ids), self.mask_of(attention_mask), []
        for layer in self.mixed:
            q, k, v = layer(h)[:, None].chunk(3, -1)
            seen.append(k)
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = h + attended[:, 0]
        return {"logits": self.head(h.mean(1)), "cache": Cache(seen)}


def item(n, *, padded):
    random = torch.Generator().manual_seed(n)
    there = torch.ones(4, 6, dtype=torch.long)
    if padded:
        there[1:, 4:] = 0
    u = {"input_ids": torch.randint(11, (4, 6), generator=random), "attention_mask": there}
    return u, {"logits": torch.randint(3, (4,), generator=random)}


def test_masks_that_sometimes_hide_nothing_and_caches_equal_sgd():
    torch.manual_seed(0)
    model = Attention().double()
    items = [item(n, padded=n % 2 == 0) for n in range(6)]
    result = hamdist.train(
        model, hamdist.streams.from_iterable(items, classes=3), level="backprop", dtype="float64",
        learning={"lr": 0.1}, engine={"kind": "inprocess"}, partition={"blocks": 3},
    )  # fmt: skip
    plain = copy.deepcopy(model)
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    for u, y in items:
        optimiser.zero_grad()
        functional.cross_entropy(plain(**u)["logits"], y["logits"]).backward()
        optimiser.step()
    assert len(result.blocks) == 3
    assert not [w for w in result.warnings if "stays whole" in w]
    assert relative(result.model.state_dict().values(), plain.state_dict().values()) <= 1e-12


def test_only_masks_of_transformers_are_told():
    there = torch.ones(2, 3, dtype=torch.long)
    with masks_stay():
        assert masking(TRANSFORMERS)(there) is not None
        assert masking("/site-packages/other/masking_utils.py")(there) is None
        assert not torch.jit.is_tracing()
    assert masking(TRANSFORMERS)(there) is None


def test_a_model_of_caches_alone_is_refused():
    class Nothing(nn.Linear):
        def forward(self, u):
            return Cache([super().forward(u)])

    items = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    stream = hamdist.streams.from_iterable(items, classes=2)
    with pytest.raises(hamdist.HamdistError, match="returns a Cache"):
        hamdist.train(Nothing(3, 2), stream, level="backprop", partition={"blocks": 2})


def test_a_closure_variable_that_is_none_is_no_missing_bias():
    def decorated(forward):
        message = None  # as the decorators of libraries have it

        def wrapped(self, u):
            return forward(self, u) if message is None else None

        return wrapped

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

        @decorated
        def forward(self, u):
            return self.b(torch.tanh(self.a(u)))

    stream = hamdist.streams.from_iterable(
        [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))], classes=2
    )
    result = hamdist.train(Net(), stream, level="backprop", partition={"blocks": 2})
    assert len(result.blocks) == 2


def test_modules_that_ask_for_the_version_of_their_format_get_it():
    class Versioned(nn.Sequential):
        _version = 2

        def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
            if local_metadata.get("version") != 2:  # as torchvision's MNASNet
                raise ValueError("no version")
            super()._load_from_state_dict(state, prefix, local_metadata, *rest)

    model = Versioned(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    stream = hamdist.streams.from_iterable(
        [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))], classes=2
    )
    result = hamdist.train(model, stream, level="backprop", partition={"blocks": 2})
    assert not torch.equal(result.model[0].weight, model[0].weight)
