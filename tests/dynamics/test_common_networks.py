"""Oracle: torch.optim.SGD on the uncut model, float64. What people's networks do beside arithmetic:
masks, constants, made-up inputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dynamics.helpers import F64, settings
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.errors import DivergedError, GraphError
from hamdist.streams import from_iterable
from hamdist.streams.sample import Sample, SampleSpec

ROUND_OFF = 1e-12
STEPS, BATCH, LR, CLASSES = 8, 5, 0.1, 4


def made(build):
    """A float64 model with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().double()


def numbers(seed):
    return torch.Generator().manual_seed(seed)


def rows(n):
    u = torch.randn((BATCH, 6), generator=numbers(n), dtype=F64)
    return u, torch.randint(CLASSES, (BATCH,), generator=numbers(n + 100))


def padded(n):
    """Texts of tokens 1 to 19, but for the first row padded with 0."""
    u = torch.randint(1, 20, (BATCH, 7), generator=numbers(n))
    u[1:, 3 + n % 3 :] = 0
    return u, torch.randint(CLASSES, (BATCH,), generator=numbers(n + 100))


def by_class(prediction, target):
    if prediction.dim() == 3:
        prediction = prediction.transpose(1, 2)
    return functional.cross_entropy(prediction, target)


def loss_of(output, y):
    """The sum of the losses of outputs and targets, by name or one of each."""
    if isinstance(y, dict):
        parts = output if isinstance(output, dict) else {f"out{i}": o for i, o in enumerate(output)}
        return sum(by_class(parts[name], t) for name, t in y.items())
    return by_class(output, y)


def sgd(model, items):
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for u, y in items:
        optimiser.zero_grad()
        output = (
            model(**u) if isinstance(u, dict) else model(*u) if isinstance(u, tuple) else model(u)
        )
        loss_of(output, y).backward()
        optimiser.step()
    return model


def trained(model, items, blocks=None, classes=CLASSES, engine=None, **fields):
    if blocks is not None:
        fields["partition"] = {"blocks": blocks}
    config = settings("backprop", learning={"lr": LR}, **({"engine": engine} if engine else {}))
    return hamdist.train(model, from_iterable(items, classes=classes), config, **fields)


def check(model, items, blocks=None, **fields):
    """Learned as by torch.optim.SGD, buffers too; the run."""
    result = trained(model, items, blocks, **fields)
    expected, after = sgd(model, items).state_dict(), result.model.state_dict()
    assert list(after) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=ROUND_OFF)
    assert blocks is None or len(result.blocks) == blocks
    return result


# -- masks and constants ---------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, fill):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fill = fill

    def forward(self, x, mask):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        scores = scores.masked_fill(mask, self.fill) if mask.dtype == torch.bool else scores + mask
        return x + self.o(scores.softmax(-1) @ self.v(x))


class Reader(nn.Module):
    """mask: how the mask that all layers share is made from the tokens."""

    def __init__(self, mask, fill=-math.inf):
        super().__init__()
        self.mask, self.fill = mask, fill
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Attention(8, fill) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("causal", torch.ones(9, 9).triu(1).bool(), persistent=False)
        self.register_buffer("place", torch.randn(1, 9, 8))

    def forward(self, x):
        t = x.shape[1]
        mask = getattr(self, self.mask)(x)
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h + self.place[:, :t], mask)
        return self.head(h.mean(1))

    def padding(self, x):
        return (x == 0)[:, None, :]

    def added(self, x):
        return torch.zeros(x.shape, dtype=F64).masked_fill_(x == 0, self.fill)[:, None, :]

    def subtracted(self, x):
        return (1 - (x != 0).to(F64))[:, None, :] * -1e9

    def written(self, x):
        mask = torch.zeros(x.shape, dtype=F64)
        mask[x == 0] = self.fill
        mask = mask[:, None, :].expand(-1, x.shape[1], -1).clone()
        mask[:, :, 0] = 0
        return mask

    def once(self, x):
        return torch.full((x.shape[1],) * 2, self.fill, dtype=F64).triu(1)

    def registered(self, x):
        return self.causal[: x.shape[1], : x.shape[1]]


MASKS = {
    "padding, -inf": ("padding", -math.inf),
    "padding, finfo.min": ("padding", torch.finfo(F64).min),
    "added, written in place": ("added", -math.inf),
    "added, by arithmetic": ("subtracted", 0.0),
    "written by index": ("written", torch.finfo(F64).min),
    "causal, made once": ("once", -math.inf),
    "causal, a buffer": ("registered", -math.inf),
}


@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_no_state(kind, blocks):
    """Each block makes the mask again, so that -inf is in no signal."""
    mask, fill = MASKS[kind]
    model, items = made(lambda: Reader(mask, fill)), [padded(n) for n in range(STEPS)]
    result = check(model, items, blocks)
    assert len(result.blocks) == (blocks or 10)


class Encoder(nn.Module):
    """torch's own encoder: masks are made ahead of the layers, inside it."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.layers = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layers(self.embed(x), src_key_padding_mask=x == 0).mean(1))


def test_masks_in_actors():
    engine = {"kind": "ray", "actors": 2}
    check(made(Encoder), [padded(n) for n in range(3)], 3, engine=engine)


def test_no_block_begins_where_a_mask_would_travel():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            scores = self.score(x).masked_fill(x > 0.5, -math.inf)
            return self.value(x) * scores.softmax(-1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s, self.b = nn.Linear(6, 8), Scores(), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.b(self.s(torch.tanh(self.a(x))))

    items = [rows(n) for n in range(STEPS)]
    check(made(Model), items)
    with pytest.raises(GraphError, match="values with the -inf of a mask go from .*masked_fill"):
        trained(made(Model), items, partition={"cuts": ["s.value"]})


def diverged(model, items, **fields):
    with pytest.raises(DivergedError) as caught:
        trained(model, items, **fields)
    assert "steps are too large" not in str(caught.value)
    return str(caught.value)


def test_the_finite_range_and_what_is_not_the_steps_fault():
    """An item as large, a mask in a state, weights that never moved."""
    items = [rows(n) for n in range(STEPS)]
    items[5] = (items[5][0] * 1e20, items[5][1])
    deep = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    assert "h left the finite range" in diverged(made(lambda: deep), items)
    said = diverged(made(lambda: nn.Sequential(nn.Linear(6, CLASSES))), items)
    assert "loss left the finite range" in said
    assert "the stream's item holds values up to" in said

    class Masks(nn.Module):  # one module, so that its signal holds what it returns
        def forward(self, x):
            return x.masked_fill(x.detach() > 0, -math.inf)

    net = nn.Sequential(nn.Linear(6, 8), Masks(), nn.Linear(8, CLASSES))
    assert "it holds -inf as a mask does" in diverged(made(lambda: net), items[:3])

    huge = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)))
    huge[0].weight.data *= 1e15
    assert "the weights have not moved" in diverged(huge, items[:3])


def test_steps_that_are_too_large_are_still_blamed():
    net = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)))
    items = [(u, u[:, :1]) for u, _ in map(rows, range(STEPS * 4))]
    with pytest.raises(DivergedError, match="steps are too large"):
        hamdist.train(net, from_iterable(items), settings("backprop", learning={"lr": 9}), loss="mse")


# -- inputs on which a model is tried --------------------------------------------------------------


class Careful(nn.Module):
    """Takes no text without a token."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x):
        lengths = (x != 0).sum(1)
        if isinstance(self.head.weight, nn.Parameter):  # (not while it is given to torch.func)
            assert bool((lengths > 0).all()), "an empty text"
        h = torch.tanh(self.mid(self.embed(x)))
        return self.head(h.sum(1) / lengths[:, None])


class Recurrent(nn.Module):
    """Packs texts by their lengths."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 8, padding_idx=0), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        lengths = (x != 0).sum(1)
        seen = nn.utils.rnn.pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(seen)[1][-1])


class Texts:
    """A user's own stream."""

    portable = True
    spec = SampleSpec((BATCH, 7), torch.int64, (BATCH,), torch.int64, CLASSES)

    def samples(self):
        return (Sample(*padded(n)) for n in range(STEPS))


@pytest.mark.parametrize("build", [Careful])
def test_models_are_tried_on_the_first_item(build):
    """Zeros are an empty text."""
    model, items = made(build), [padded(n) for n in range(STEPS)]
    result = check(model, items)
    own = hamdist.train(model, Texts(), settings("backprop", learning={"lr": LR}))
    for a, b in zip(result.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(a, b)
