"""Batches padded to their own longest row. Oracle: torch.optim.SGD on the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import hamdist
from hamdist.errors import StreamError
from hamdist.streams import from_iterable

V, B, D = 11, 3, 8
LENGTHS = [6, 9, 2, 6, 13, 1, 7, 4]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(D // 2) + mask
        mixed = scores.softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, D))


class Decoder(nn.Module):
    """With learned positions, a causal mask and a padding mask made in forward."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(16, D)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(D, V)

    def forward(self, ids, kept):
        length = ids.shape[1]
        at = torch.arange(length, device=ids.device)
        x = self.tokens(ids) + self.positions(at)
        mask = torch.full((length, length), -1e9).triu(1)[None, None]
        mask = mask + (1 - kept[:, None, None, :].to(x.dtype)) * -1e9
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


class Convolutions(nn.Module):
    """Flattens rows and positions, and pools over positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, D, 3, padding=1), nn.Conv1d(D, D, 3, padding=1)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x):
        batch, _, length = x.shape
        h = torch.relu(self.first(x))
        skip = self.second(h)
        flat = h.transpose(1, 2).reshape(batch * length, D)
        h = torch.tanh(self.mix(flat)).view(batch, length, D).transpose(1, 2) + skip
        return self.head(h.mean(2))


def decoder_item(length, draw):
    ids = torch.randint(1, V, (B, length), generator=draw)
    kept = torch.ones(B, length, dtype=torch.long)
    kept[0, (length + 1) // 2 :] = 0
    y = torch.randint(V, (B, length), generator=draw).masked_fill(kept == 0, -100)
    return {"ids": ids, "kept": kept, "labels": y}


def signal_item(length, draw):
    x = torch.randn(B, 2, length, generator=draw, dtype=torch.float64)
    return x, torch.randint(V, (B,), generator=draw)


def layers():
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V))


def chain_item(length, draw):
    return tuple(torch.randint(V, (2, B, length), generator=draw))


CASES = {
    "decoder": (Decoder, decoder_item, 4),
    "convolutions": (Convolutions, signal_item, 3),
    "chain": (layers, chain_item, 2),
}


def made(name):
    build, item, blocks = CASES[name]
    draw = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double(), [item(length, draw) for length in LENGTHS], blocks


def learned(name, **fields):
    net, items, blocks = made(name)
    given = {"level": "backprop", "partition": {"blocks": blocks}, **fields}
    given = {"engine": {"kind": "inprocess"}, "learning": {"lr": 0.2}, "dtype": "float64", **given}
    return hamdist.train(net, items, classes=V, **given)


@pytest.mark.parametrize("name", CASES)
def test_backprop_is_sgd(name):
    result = learned(name)
    net, items, _ = made(name)
    step = torch.optim.SGD(net.parameters(), 0.2)
    for item in items:
        if isinstance(item, dict):
            out, y = net(item["ids"], item["kept"]), item["labels"]
        else:
            out, y = net(item[0]), item[1]
        step.zero_grad()
        functional.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
        step.step()
    pairs = zip(result.model.parameters(), net.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["autograd", "closed"])
def test_trace_steps_alike(name, kind):
    auto = learned(name, level="trace")
    other = learned(name, level="trace", engine={"kind": "inprocess", "step": kind})
    pairs = zip(auto.model.parameters(), other.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.mark.parametrize("name", ["chain"])
def test_heads(name):
    assert learned(name, level="heads").samples == len(LENGTHS)


@pytest.mark.ray
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_both_engines(session, leaves_no_socket, name, transport):
    alone = learned(name, level="trace")
    spread = {"kind": "ray", "actors": 2, "transport": transport}
    assert_equal(alone, learned(name, level="trace", engine=spread))


def test_a_loader_with_its_own_collate_fn_may_pad():
    rows = [torch.arange(1, n + 2) % V for n in range(24)]

    def collate(batch):
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        return {"ids": ids, "labels": ids.masked_fill(ids == 0, -100)}

    loader = DataLoader(rows, batch_size=4, collate_fn=collate)
    net = layers()
    result = hamdist.train(net, loader, level="trace", engine={"kind": "inprocess"})
    assert result.samples == 6


class Fixed(nn.Module):
    """A number that is no multiple of the length plus something."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, ids):
        x = torch.tanh(self.embed(ids))
        pairs = (x @ x.mT).reshape(len(ids), ids.shape[1] ** 2)
        return self.head(x.mean(1) * pairs.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"level": "local"}, "'hold' carries states from one sample to the next; pad all of them"),
        ({"engine": {"kind": "inprocess", "compress": "bf16"}}, "engine.compress is laid out for"),
    ],
)
def test_refused(fields, words):
    with pytest.raises(StreamError, match=rf"sample 1: .* has shape \(3, 9\).*{words}"):
        learned("chain", **{"partition": {}, **fields})


def test_a_model_of_one_length():
    items = [(torch.randint(V, (B, n)), torch.randint(V, (B,))) for n in (5, 6)]
    with pytest.raises(
        StreamError, match=r"sample 1: .*followed with one length \(at another.*pad"
    ):
        hamdist.train(Fixed(), items, classes=V, level="trace", engine={"kind": "inprocess"})


def test_a_stream_that_nobody_looked_at():
    draw = torch.Generator().manual_seed(0)
    items = [chain_item(n, draw) for n in (5, 6)]
    given = {"level": "trace", "engine": {"kind": "inprocess"}}
    with pytest.raises(StreamError, match="lengths of their own, say ragged=True"):
        hamdist.train(layers(), from_iterable(iter(items), classes=V), **given)
    stream = from_iterable(iter(items), classes=V, ragged=True)
    assert hamdist.train(layers(), stream, **given).samples == 2
