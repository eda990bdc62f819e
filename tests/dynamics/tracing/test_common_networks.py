"""Oracle: torch.optim.SGD on the uncut model, float64. What people's networks do beside arithmetic:
masks, constants, made-up inputs."""

from __future__ import annotations

import collections
import copy
import dataclasses
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
        parts = output
        if dataclasses.is_dataclass(output):
            parts = vars(output)
        elif isinstance(output, tuple):
            names = getattr(output, "_fields", [f"out{i}" for i in range(len(output))])
            parts = dict(zip(names, output, strict=True))
        return sum(by_class(parts[name], t) for name, t in y.items())
    return by_class(output, y)


def sgd(model, items):
    """Moves the model itself: not every one can be copied."""
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
    """A sample as large, a mask in a state, weights that never moved."""
    items = [rows(n) for n in range(STEPS)]
    items[5] = (items[5][0] * 1e20, items[5][1])
    deep = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    assert "h left the finite range" in diverged(made(lambda: deep), items)
    said = diverged(made(lambda: nn.Sequential(nn.Linear(6, CLASSES))), items)
    assert "loss left the finite range" in said
    assert "the stream's sample holds values up to" in said

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
        hamdist.train(
            net, from_iterable(items), settings("backprop", learning={"lr": 9}), loss="mse"
        )


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


@pytest.mark.parametrize("build", [Careful, Recurrent])
def test_models_are_tried_on_the_first_item(build):
    """Zeros are an empty text."""
    model, items = made(build), [padded(n) for n in range(STEPS)]
    own = hamdist.train(model, Texts(), settings("backprop", learning={"lr": LR}))
    result = check(model, items)
    for a, b in zip(result.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(a, b)


# -- rows that are no batch ------------------------------------------------------------------------


class Graphs(nn.Module):
    """Messages along the edges of a graph, whose nodes are the rows."""

    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.register_buffer("adjacency", torch.rand(BATCH, BATCH) / BATCH)

    def forward(self, x, edge_index=None, adjacency=None):
        h = torch.tanh(self.node(x))
        if edge_index is not None:
            source, target = edge_index
            return self.head(h + torch.zeros_like(h).index_add(0, target, h[source]))
        return self.head((self.adjacency if adjacency is None else adjacency) @ h)


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 3, 1]])
RELATIONS = {
    "a buffer": {},
    "an input": {"adjacency": torch.eye(BATCH, dtype=F64).roll(1, 0)},
    "edges": {"edge_index": EDGES},
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_that_are_nodes_of_a_graph(relation):
    """Three other nodes are another graph: the model stays whole, and says so."""
    several = RELATIONS[relation]
    items = [({"x": u, **several} if several else u, y) for u, y in map(rows, range(STEPS))]
    with pytest.warns(UserWarning, match="so its rows are no batch"):
        result = check(made(Graphs), items)
    assert list(result.blocks) == ["block0"]
    with pytest.raises(GraphError, match="the model cannot be cut into blocks"):
        trained(made(Graphs), items, 2)


# -- one module used twice, and models that stay whole with several outputs ------------------------


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, a, b):
        return self.encoder(a), self.encoder(b)


class Adversary(nn.Module):
    """A generator behind a net of its own, a discriminator for both kinds of samples."""

    def __init__(self):
        super().__init__()
        self.seed, self.generator = nn.Linear(6, 8), nn.Linear(8, 6)
        self.judge = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, noise, x):
        made_up = self.generator(torch.tanh(self.seed(noise)))
        return {"fake": self.judge(made_up), "real": self.judge(x)}


class Undecided(nn.Module):
    """Cannot be followed, takes two inputs by keyword, returns two outputs and a number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.a, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, *, x, gain):
        h = torch.tanh(self.a(x)) * self.scale * gain
        if h.sum() > 1e9:
            h = -h
        return {"left": self.left(h), "right": self.right(h), "norm": h.norm()}


def two(n):
    """Two inputs, the targets of two outputs."""
    (u, y), (v, w) = rows(n), rows(n + 50)
    return u, v, y, w


USED_TWICE = {
    "siamese": (Siamese, lambda u, v, y, w: ((u, v), {"out0": y, "out1": w})),
    "adversary": (
        Adversary,
        lambda u, v, y, w: ({"noise": u, "x": v}, {"fake": y, "real": w}),
    ),
    "whole": (
        Undecided,
        lambda u, v, y, w: ({"x": u, "gain": v[:, :1]}, {"left": y, "right": w}),
    ),
}


@pytest.mark.parametrize("kind", USED_TWICE)
def test_several_outputs_that_share_all_their_weights(kind):
    """One block has the weights; those that take the losses have none."""
    build, item = USED_TWICE[kind]
    items = [item(*two(n)) for n in range(STEPS)]
    classes = dict.fromkeys(items[0][1], CLASSES)
    blocks = None if kind == "whole" else 1
    result = trained(made(build), items, blocks, classes=classes)
    assert list(result.blocks) == ["block0", *classes]
    check(made(build), items, classes=classes)


def test_one_module_for_two_outputs_can_be_cut():
    """Where weights may be used by several blocks; else the message says what helps."""
    build, item = USED_TWICE["adversary"]
    items, classes = [item(*two(n)) for n in range(STEPS)], {"fake": CLASSES, "real": CLASSES}
    check(made(build), items, classes=classes, partition={"cuts": ["generator", "judge"]})
    stream = from_iterable(items, classes=classes)
    with pytest.raises(GraphError, match="call the module once, on both inputs joined"):
        hamdist.train(made(build), stream, level="local", partition={"blocks": 6})


# -- what a forward leaves behind, and what models bring -------------------------------------------


class Net(nn.Module):
    """Three layers, with something between the first and the second."""

    def __init__(self, between=None, attributes=()):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.between = between
        for name, value in dict(attributes).items():
            setattr(self, name, value)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = h if self.between is None else self.between(self, h)
        return self.c(torch.tanh(self.b(h)))


def keeps(net, h):
    net.features = h
    return h


def asserts(net, h):
    assert not torch.isnan(h).any()
    return h


def samples(net, h):
    return torch.distributions.Normal(h, 1.0).log_prob(h.detach() * 0.5)


def collects(net, h):
    net.seen.append(h)
    return h


def multiplies(net, h):
    return torch.sparse.mm(net.kernel, h.T).T


class Loads(dict):
    """As transformers' mappings: loads what it does not have, and cannot."""

    def items(self):
        raise ValueError("could not find it")

    keys = __iter__ = values = items


class Listed(Net):
    table = Loads(a=1)

    def forward(self, x):
        return super().forward(x) if self.table is not None else x


SPARSE = torch.eye(8, dtype=F64).to_sparse()
BETWEEN = {
    "an activation kept": (lambda: Net(keeps), 3),
    "activations collected": (lambda: Net(collects, {"seen": []}), None),
    "a mapping that loads": (Listed, 3),
    "assert not isnan": (lambda: Net(asserts), None),
    "torch.distributions": (lambda: Net(samples), None),
    "a sparse constant": (lambda: Net(multiplies, {"kernel": SPARSE}), None),
}


@pytest.mark.filterwarnings("ignore:the model .* stays whole")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", BETWEEN)
def test_what_a_forward_does_beside_arithmetic(kind, called):
    """called: once before, which leaves tensors with a history in the model."""
    build, blocks = BETWEEN[kind]
    model, items = made(build), [rows(n) for n in range(STEPS)]
    if called:
        model(items[0][0])
    result = check(model, items, blocks)
    if kind == "an activation kept" and not called:
        assert not hasattr(result.model, "features")


def normed(normalise, where="b"):
    def build():
        net = Net()
        normalise(getattr(net, where))
        return net

    return build


def plain_weights():
    """A user's own layer, so that what the norm does is followed step by step."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight

    net = Net()
    net.b = nn.utils.weight_norm(Own())
    return net


NORMS = {
    "weight_norm": normed(nn.utils.weight_norm),
    "weight_norm of the first layer": normed(nn.utils.weight_norm, "a"),
    "spectral_norm": normed(nn.utils.spectral_norm),
    "weight_norm of a layer of one's own": plain_weights,
    "parametrizations.weight_norm": normed(nn.utils.parametrizations.weight_norm),
    "parametrizations.spectral_norm": normed(nn.utils.parametrizations.spectral_norm),
    "parametrizations.orthogonal": normed(nn.utils.parametrizations.orthogonal),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
def test_normed_weights(kind):
    check(made(NORMS[kind]), [rows(n) for n in range(STEPS)], 3)


class Averages(nn.Module):
    """Subtracts a running mean that it assigns; counts in place; has a buffer from the first call
    on, whose shape follows the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", None)
        self.register_buffer("scale", torch.ones(8).expand(3, 8))

    def forward(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.calls += 1
        self.last = h.detach()[:2]
        return (h - self.mean) * self.scale[1]


def test_buffers_that_a_forward_assigns():
    """And one whose rows share memory."""
    items = [rows(n) for n in range(STEPS)]
    check(made(lambda: Net(lambda net, h: net.average(h), {"average": Averages()})), items, 3)
    chain = nn.Sequential(nn.Linear(6, 8), Averages(), nn.Linear(8, CLASSES))
    result = check(made(lambda: chain), items)
    assert result.model[1].calls == STEPS
    assert result.model[1].last.shape == (2, 8)


class Auxiliary(nn.Module):
    """A second output with a batch norm, as GoogLeNet's and DeepLab's, which nothing learns."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.aux = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return {"out": self.c(torch.tanh(self.b(h))), "aux": self.aux(h)}


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_statistics_behind_an_output_that_is_not_learned(blocks):
    """They follow the samples as in torch, where the whole forward pass is run."""
    items = [(x, {"out": y}) for x, y in (rows(n) for n in range(STEPS))]
    model = made(Auxiliary)
    expected = copy.deepcopy(model)
    optimiser = torch.optim.SGD(expected.parameters(), lr=LR)
    for x, y in items:
        optimiser.zero_grad()
        functional.cross_entropy(expected(x)["out"], y["out"]).backward()
        optimiser.step()
    result = hamdist.train(
        model, from_iterable(items, classes=CLASSES), level="backprop", learning={"lr": LR},
        partition={"blocks": blocks}, dtype="float64", engine={"kind": "inprocess"},
    )  # fmt: skip
    after = result.model.state_dict()
    assert after["aux.1.num_batches_tracked"] == STEPS
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=ROUND_OFF)


Pair = collections.namedtuple("Pair", "logits features")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor | None = None


class Layer(nn.Module):
    """Stays whole, and takes and gives only what is of `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(8, 8)

    def forward(self, given):
        assert type(given) is self.kind
        h = self.layer(given.logits)
        return self.kind(h if h.sum() < 1e9 else -h, given.features)


class Records(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.s, self.c = nn.Linear(6, 8), Layer(kind), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        found = self.s(self.kind(h, 2 * h))
        return self.kind(self.c(found.logits), found.logits + found.features)


@pytest.mark.parametrize("kind", [Pair, Output])
def test_namedtuples_and_dataclasses(kind):
    """As values between modules, and as outputs by the names of their fields."""
    items = [(u, {"logits": y}) for u, y in map(rows, range(STEPS))]
    check(made(lambda: Records(kind)), items, 3, classes={"logits": CLASSES})


class Everything(Records):
    """With a mask, a kept activation, an old weight norm and assigned buffers."""

    def __init__(self):
        super().__init__(Output)
        self.embed, self.average = nn.Embedding(20, 6), Averages()
        self.a = nn.utils.weight_norm(self.a)

    def forward(self, x):
        mask = torch.zeros(x.shape, dtype=F64).masked_fill_(x == 0, -math.inf)
        h = self.features = (self.embed(x) * mask.softmax(1)[:, :, None]).sum(1)
        found = self.s(Output(self.average(torch.tanh(self.a(h))), mask))
        return Output(self.c(found.logits * found.features.softmax(1).amax(1)[:, None]))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_all_of_it_in_actors():
    model = made(Everything)
    items = [(u, {"logits": y}) for u, y in map(padded, range(3))]
    model(items[0][0])
    engine = {"kind": "ray", "actors": 2}
    check(model, items, 3, engine=engine, classes={"logits": CLASSES})


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed, self.head = embedding, nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.embed(x)
        return self.head(h.mean(1) if h.dim() == 3 else h)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind):
    check(made(lambda: Words(kind(20, 8, sparse=True))), [padded(n) for n in range(STEPS)])


def test_quantisation_aware_modules():
    """Of float32, as torch's own are; fake quantisation moves its ranges with every batch."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    net = made(Net).float().train()
    net.qconfig = get_default_qat_qconfig("fbgemm")
    net = prepare_qat(net)
    items = [(u.float(), y) for u, y in map(rows, range(STEPS))]
    after = trained(net, items, 3, dtype="float32").model.state_dict()
    for name, tensor in sgd(net, items).state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def scripted(make):
    def build():
        net = Net()
        net.b = make(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double())
        return net

    return build


SCRIPTED = {
    "script": scripted(torch.jit.script),
    "trace": scripted(lambda m: torch.jit.trace(m, torch.ones(2, 8, dtype=F64))),
    "all of it": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES))),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", SCRIPTED)
def test_scripted_modules_stay_whole_alone(kind):
    model, items = made(SCRIPTED[kind]), [rows(n) for n in range(STEPS)]
    if kind == "all of it":
        with pytest.warns(UserWarning, match="the model .* stays whole, because it is compiled"):
            check(model, items)
    else:
        check(model, items, 3)
        with pytest.raises(GraphError, match="'b' .* stays whole, because it is compiled"):
            trained(model, items, partition={"cuts": ["b.1"]})
    with pytest.raises(GraphError, match="torch.jit.*cannot be sent to an actor"):
        trained(model, items, engine={"kind": "ray", "actors": 2})


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_what_stands_around_a_model_is_taken_off(wrap):
    net, items = made(Net), [rows(n) for n in range(STEPS)]
    with pytest.warns(UserWarning, match="the module inside, its .*, is cut and trained"):
        result = trained(wrap(net), items, 3)
    assert type(result.model) is Net
    expected = sgd(net, items).state_dict()
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=ROUND_OFF)
    net.b = wrap(net.b)
    with pytest.raises(GraphError, match="'b' is a .*: give the model the module inside"):
        trained(net, items)


def test_tensors_without_memory_of_their_own_are_refused_by_name():
    items = [rows(0)]
    sparse = made(Net)
    sparse.register_buffer("kernel", torch.eye(8).to_sparse())
    with pytest.raises(GraphError, match="'kernel' is a sparse tensor"):
        trained(sparse, items)
    shared = made(Net)
    shared.b.weight = nn.Parameter(torch.ones(1, 8, dtype=F64).expand(8, 8))
    with pytest.raises(GraphError, match=r"'b.weight' is a weight whose numbers share memory"):
        trained(shared, items)


class Dropped(nn.Module):
    """Leaves out layers by chance (LayerDrop)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if self.training and torch.rand([]) < self.rate:
                continue
            x = torch.tanh(layer(x))
        return self.last(x)


@pytest.mark.filterwarnings("ignore:the model .* stays whole")
@pytest.mark.parametrize("rate", [0.0, 1.0, 0.5])
def test_layers_left_out_by_chance(rate):
    """None, and all of them, as with SGD; else the same ones in every run of this seed."""
    model, items = made(lambda: Dropped(rate)), [rows(n) for n in range(STEPS)]
    if rate != 0.5:
        check(model, items)
        return
    a, b = (trained(model, items).model for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(
        torch.equal(p, q) for p, q in zip(a.parameters(), model.parameters(), strict=True)
    )


# -- slices ----------------------------------------------------------------------------------------


class Buffered(nn.Module):
    """Buffers of all kinds that nothing moves, and those of a batch norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        for i, (name, persistent) in enumerate((("gain", True), ("shift", False))):
            self.register_buffer(name, torch.linspace(0.5, 1 + i, 8), persistent=persistent)
            self.register_buffer(f"unread_{name}", torch.ones(3 + i), persistent=persistent)

    def forward(self, x):
        return torch.tanh(self.norm(self.layer(x)) * self.gain + self.shift)


def _sliced(chain):
    return {"cuts": ["1", "2"] if chain else ["b", "c"], "slices": {"block1": 2}}


@pytest.mark.parametrize("chain", [True, False])
def test_slices_keep_every_buffer(chain):
    def build():
        if chain:
            return nn.Sequential(nn.Linear(6, 8), Buffered(), nn.Linear(8, CLASSES))
        net = Net()
        net.b = Buffered()
        return net

    model, items = made(build), [rows(n) for n in range(STEPS)]
    sliced = trained(model, items, partition=_sliced(chain))
    assert "block1_1" in sliced.blocks
    after = {**dict(sliced.model.named_buffers()), **dict(sliced.model.named_parameters())}
    expected = sgd(model, items)
    for name, tensor in (*expected.named_buffers(), *expected.named_parameters()):
        torch.testing.assert_close(after.pop(name), tensor, rtol=0, atol=ROUND_OFF)
    assert not after


@pytest.mark.parametrize("chain", [True, False])
def test_slices_refuse_a_buffer_that_a_forward_moves(chain):
    """Every slice would have its own."""

    class Counts(Buffered):
        def forward(self, x):
            self.gain += 1
            return super().forward(x)

    def build():
        if chain:
            return nn.Sequential(nn.Linear(6, 8), Counts(), nn.Linear(8, CLASSES))
        net = Net()
        net.b = Counts()
        return net

    with pytest.raises(GraphError, match="cannot be sliced: its forward moves the buffer '.*gain'"):
        trained(made(build), [rows(0)], partition=_sliced(chain))
