"""Oracle: torch.optim.SGD on the uncut model, float64. Level `backprop` is centralised gradient
descent for networks as people write them (architectures.py), cut anywhere."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import combinations, pairwise

import pytest
import torch
from dynamics.architectures import GPT, Config, Encoder, ResNet, Tagger, TwoByTwo, UNet, ViT
from dynamics.helpers import F64, relative, settings
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.errors import GraphError
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams import from_iterable

ROUND_OFF = 1e-12
STEPS, BATCH, LR = 8, 4, 0.1


def made(build):
    """A float64 model with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().double()


def numbers(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=numbers(seed), dtype=F64)


def whole(seed, most, *shape):
    return torch.randint(most, shape, generator=numbers(seed))


def images(n):
    return normal(n, BATCH, 1, 8, 8), whole(n + 100, 3, BATCH)


def maps(n):
    return normal(n, BATCH, 1, 8, 8), whole(n + 100, 2, BATCH, 8, 8)


def tokens(n):
    return whole(n, 7, BATCH, 5), whole(n + 100, 3, BATCH)


def text(n):
    ids = whole(n, 11, BATCH, 7)
    return ids[:, :-1], ids[:, 1:]


def masked(n):
    mask = (torch.rand((BATCH, 5), generator=numbers(n + 200)) < 0.8).long()
    inputs = {"input_ids": whole(n, 11, BATCH, 5), "attention_mask": mask}
    return inputs, {"logits": whole(n + 100, 3, BATCH)}


def pairs(n):
    inputs = {"image": normal(n, BATCH, 1, 6, 6), "vector": normal(n + 50, BATCH, 5)}
    return inputs, {"kind": whole(n + 100, 3, BATCH), "angle": normal(n + 150, BATCH, 1)}


def by_class(prediction, target):
    """Cross-entropy, the classes on axis 1 or, of texts, on the last one."""
    if prediction.dim() == 3:
        prediction = prediction.transpose(1, 2)
    return functional.cross_entropy(prediction, target)


def half_square(prediction, target):
    return 0.5 * (prediction - target).square().sum() / len(target)


def torch_encoder():
    """Torch's own layers, which step in closed form."""
    layers = (nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(3))
    return nn.Sequential(nn.Embedding(11, 8), *layers, nn.Flatten(), nn.Linear(40, 3))


NETWORKS = {
    "resnet": (ResNet, images, 3),
    "unet": (UNet, maps, 2),
    "vit": (lambda: ViT(Config()), images, 3),
    "gpt": (lambda: GPT(Config()), text, 11),
    "lstm": (Tagger, tokens, 3),
    "encoder": (lambda: Encoder(Config()), masked, {"logits": 3}),
    "torch's encoder": (torch_encoder, tokens, 3),
    "two by two": (TwoByTwo, pairs, {"kind": 3}),
}


def sgd(model, items):
    """What plain PyTorch makes of the model; a loss for each output, one after the other."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for u, y in items:
        optimiser.zero_grad()
        found = model(**u) if isinstance(u, dict) else model(u)
        if isinstance(y, dict):
            value = sum(
                (half_square if t.is_floating_point() else by_class)(found[k], t)
                for k, t in y.items()
            )
        else:
            value = by_class(found, y)
        value.backward()
        optimiser.step()
    return model


def learned(name, **fields):
    """The weights and buffers before, after hamdist's run, and after SGD's; and the run."""
    build, item, classes = NETWORKS[name]
    model, items = made(build), [item(n) for n in range(STEPS)]
    loss = {"kind": "cross-entropy", "angle": "mse"} if name == "two by two" else None
    result = hamdist.train(
        model,
        from_iterable(items, classes=classes),
        settings("backprop", learning={"lr": LR}),
        loss=loss,
        **fields,
    )
    expected = sgd(model, items)
    before, after = model.state_dict(), result.model.state_dict()
    assert list(after) == list(before)
    moved = [k for k, p in expected.named_parameters() if not torch.equal(p, before[k])]
    assert relative([before[k] for k in moved], [expected.state_dict()[k] for k in moved]) > 1e-3
    return result, relative(after.values(), expected.state_dict().values())


@pytest.mark.parametrize("blocks", [2, 3, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_backprop_is_sgd(name, blocks):
    result, apart = learned(name, partition={"blocks": blocks})
    heads = 1 if name == "two by two" else 0
    assert len(result.blocks) == blocks + heads
    assert apart <= ROUND_OFF
    assert not [w for w in result.warnings if "stays whole" in w]


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet", ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.bn2"]),  # inside each branch
        ("resnet", ["layer2.0.relu", "layer2.0.downsample"]),  # before a relu in place; on the skip
        ("unet", ["downs.1.3", "middle", "ups.0", "ups.1.3"]),
        ("vit", ["blocks.0.attention.key", "blocks.1.output"]),
        ("gpt", ["transformer.h.0.intermediate", "transformer.h.1", "lm_head"]),
        ("encoder", ["layer.0", "layer.1.attention.value"]),
        ("two by two", ["vector", "deep", "kind.2"]),
    ],
)
def test_cuts_by_name(name, cuts):
    result, apart = learned(name, partition={"cuts": cuts})
    assert len(result.blocks) == len(cuts) + 1 + (2 if name == "two by two" else 0)
    assert apart <= ROUND_OFF


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_by_layer(name):
    """Without a partition every module with weights is a block, as in an nn.Sequential."""
    result, apart = learned(name)
    assert len(result.blocks) >= 4
    assert apart <= ROUND_OFF


@pytest.mark.parametrize("balance", ["time", "activations"])
def test_balances(balance):
    result, apart = learned("resnet", partition={"blocks": 4, "balance": balance})
    assert len(result.blocks) == 4
    assert apart <= ROUND_OFF


# -- what cannot be cut ----------------------------------------------------------------------------


def refused(model, item=images, classes=3, **fields):
    with pytest.raises(GraphError) as caught:
        hamdist.train(
            made(lambda: model),
            from_iterable([item(0)] * 2, classes=classes),
            settings("backprop"),
            **fields,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("layer2.0.con2", "cut 'layer2.0.con2' is no module of the model; did you mean "),
        ("layer9", "cut 'layer9' is no module of the model; did you mean 'layer3' or"),
        ("xyz", "cut 'xyz' is no module of the model; known: conv1, bn1, relu, maxpool, layer1"),
        ("layer1.0.downsample", "is no module of the model"),
    ],
)
def test_a_wrong_cut_name(cut, said):
    assert said in refused(ResNet(), partition={"cuts": ["layer2", cut]})


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, z):
        return z * 3


def decides(x):
    return x if x.sum() > 0 else -x


def by_row(x):
    return torch.stack([row * 2 for row in x])


def by_a_number(x):
    return x * float(x.mean())


HARD = {
    "a float of a tensor": (by_a_number, "values of a tensor (__float__)", "float(x.mean())"),
    "a value decides": (decides, "values of a tensor (__bool__)", "if x.sum() > 0"),
    "a number of a tensor": (lambda x: x * x.max().item(), "values of a tensor (item)", "x.max()"),
    "autograd.Function": (Twice.apply, "autograd.Function", ""),
    "a loop over the batch": (by_row, "at another batch", "row * 2"),
    "numpy": (lambda x: x + torch.from_numpy(x.detach().numpy()), "(numpy)", "numpy()"),
}


class Hard(nn.Module):
    """Does something that cannot be followed, itself or in its submodule `inner`."""

    def __init__(self, act, inner):
        super().__init__()
        self.act = act
        self.first = nn.Linear(5, 5)
        self.inner = Hard(act, False) if inner else nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.outer = inner

    def forward(self, x):
        x = self.inner(torch.tanh(self.first(x)))
        if not self.outer:
            x = self.act(x)
            return x + 0 * self.last(x).sum()
        return self.last(x)


def rows(n):
    return normal(n, BATCH, 5), whole(n + 100, 3, BATCH)


@pytest.mark.parametrize("why", HARD)
def test_a_model_that_cannot_be_followed(why):
    act, reason, line = HARD[why]
    said = refused(Hard(act, False), rows, partition={"blocks": 2})
    assert said.startswith("the model cannot be cut into blocks: the model (a Hard) stays whole,")
    assert reason in said
    assert line in said
    assert "\n" not in said


@pytest.fixture
def torch_warns_again():
    """What torch otherwise says once a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("torch_warns_again")
@pytest.mark.parametrize("why", HARD)
def test_a_submodule_that_cannot_be_followed_stays_whole(why):
    act, reason, line = HARD[why]
    model = made(lambda: Hard(act, True))
    items = [rows(n) for n in range(STEPS)]
    config = settings("backprop", learning={"lr": LR})
    with pytest.warns(UserWarning, match="'inner' .a Hard. stays whole, because") as told:
        result = hamdist.train(model, from_iterable(items, classes=3), config)
    assert reason in str(told[0].message)
    assert line in str(told[0].message)
    # what torch says of the user's own line it says of that line, and of no line of hamdist's
    torches = [w for w in told if "Converting a tensor" in str(w.message)]
    assert {w.filename for w in torches} <= {__file__}
    assert len(result.blocks) == 3
    expected = sgd(model, items).state_dict()
    assert relative(result.model.state_dict().values(), expected.values()) <= ROUND_OFF
    said = refused(Hard(act, True), rows, partition={"cuts": ["inner.last"]})
    assert said.startswith("no block can begin at 'inner.last': 'inner' (a Hard) stays whole")


class Held:
    def __init__(self, prediction):
        self.prediction = prediction


def test_what_a_model_may_not_return():
    """No line of hamdist's own is blamed."""
    said = refused(Hard(Held, False), rows, partition={"blocks": 2})
    assert said.startswith("the model cannot be cut into blocks: the model (a Hard) stays whole")

    class Wrapped(Layers):
        def forward(self, x):
            return Held(super().forward(x))

    said = refused(Wrapped(), rows, partition={"blocks": 2})
    assert "because the model returns a Held; return tensors, or a tuple or dict of them; " in said


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyBatchNorm1d()])
def test_lazy_modules_are_made_first(lazy):
    model = nn.Sequential(nn.Linear(5, 4).double(), lazy, nn.Linear(4, 3).double())
    said = refused(model, rows)
    assert said.startswith("'1.")
    assert "(a lazy module): call the model once on an example" in said


class Counts(nn.Module):
    """Keeps count of its calls, and is another function from the sixth on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = torch.tanh(self.a(x))
        return self.b(x if self.calls < 6 else -x)


def test_a_module_that_keeps_something_stays_whole():
    model = made(lambda: nn.Sequential(OrderedDict(count=Counts(), last=nn.Linear(5, 3).double())))
    items = [rows(n) for n in range(STEPS)]
    config = settings("backprop", learning={"lr": LR})
    with pytest.warns(UserWarning, match="'count' .a Counts. stays whole, because its forward ch"):
        result = hamdist.train(
            model, from_iterable(items, classes=3), config, partition=lambda where: ["last"]
        )
    expected = sgd(model, items).state_dict()
    assert relative(result.model.state_dict().values(), expected.values()) <= ROUND_OFF


# -- choosing the places ---------------------------------------------------------------------------


def test_a_policy_sees_every_place_and_names_the_cuts():
    seen = []

    def before_each_stage(where):
        seen.extend(where)
        return [place.names[0] for place in where if place.names[0] in ("layer2", "layer3", "fc")]

    result, apart = learned("resnet", partition=before_each_stage)
    assert apart <= ROUND_OFF
    assert len(result.blocks) == 4
    model = ResNet()
    assert sum(place.parameters for place in seen) == sum(p.numel() for p in model.parameters())
    by_name = {name: place for place in seen for name in place.names}
    assert by_name["layer2"].names == ("layer2", "layer2.0", "layer2.0.conv1")
    assert by_name["layer2"].crossing == 4 * 4 * 4  # what layer1 made
    assert by_name["layer2.0.conv2"].crossing == 8 * 2 * 2 + 4 * 4 * 4  # ... and the skip
    assert by_name["fc"].parameters == 8 * 3 + 3
    assert by_name["conv1"].activations == 4 * 8 * 8


def test_a_policy_that_names_nothing_known():
    assert "cut 'x' is no module" in refused(ResNet(), partition=lambda where: ["x"])
    assert "return the names of the modules" in refused(ResNet(), partition=lambda where: None)


class Layers(nn.Module):
    """Five layers of different cost; one loss."""

    def __init__(self):
        super().__init__()
        self.sizes = [5, 2, 30, 3, 9, 3]
        for i, (a, b) in enumerate(pairwise(self.sizes)):
            setattr(self, f"l{i}", nn.Linear(a, b))

    def forward(self, x):
        for i in range(5):
            x = torch.tanh(getattr(self, f"l{i}")(x))
        return x


@pytest.mark.parametrize("balance", ["parameters", "activations"])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_balance_against_brute_force(blocks, balance):
    model = Layers()
    parameters = [sum(p.numel() for p in getattr(model, f"l{i}").parameters()) for i in range(5)]
    costs = parameters if balance == "parameters" else [2 * n for n in model.sizes[1:]]  # and tanh
    result = hamdist.train(
        made(Layers),
        from_iterable([rows(0)], classes=3),
        settings("backprop", partition={"blocks": blocks, "balance": balance}),
    )
    found = [[int(k[1]) for k in b.theta if "weight" in k] for b in result.blocks.values()]

    def largest(starts):
        ends = [*starts[1:], 5]
        return max(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True))

    best = min(largest([0, *cuts]) for cuts in combinations(range(1, 5), blocks - 1))
    assert largest([run[0] for run in found]) == best
    assert sorted(i for run in found for i in run) == list(range(5))


# -- the rest of the contract ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "two by two"])
def test_shorter_batches(name):
    """A block takes any batch, whatever the one that was shown."""
    build, item, classes = NETWORKS[name]

    def cut(value, rows):
        if isinstance(value, dict):
            return {k: v[:rows] for k, v in value.items()}
        return value[:rows]

    items = [item(n) for n in range(6)]
    items += [tuple(cut(part, rows) for part in item(n)) for n, rows in ((7, 2), (8, 3))]
    model = made(build)
    result = hamdist.train(
        model,
        from_iterable(items, classes=classes),
        settings("backprop", learning={"lr": LR}, partition={"blocks": 3}),
        loss={"kind": "cross-entropy", "angle": "mse"} if name == "two by two" else None,
    )
    expected = sgd(model, items).state_dict().values()
    assert relative(result.model.state_dict().values(), expected) <= ROUND_OFF


def test_eval_of_the_merged_module():
    """Batch statistics come back: the merged module predicts as SGD's does, in evaluation."""
    result, _ = learned("resnet", partition={"blocks": 5})
    build, item, _ = NETWORKS["resnet"]
    expected = sgd(made(build), [item(n) for n in range(STEPS)])
    u = images(999)[0]
    apart = result.model.eval()(u) - expected.eval()(u)
    assert apart.abs().max() < 1e-12
    assert int(result.model.bn1.num_batches_tracked) == STEPS


def test_the_users_model_and_the_generator_stay_as_they_are():
    model = made(ResNet)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kinds = [type(part) for part in model.modules()]
    stream = from_iterable([images(0)], classes=3)
    hamdist.train(model, stream, settings("backprop", partition={"blocks": 3}))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert [type(part) for part in model.modules()] == kinds


@pytest.mark.parametrize("name", ["unet", "gpt"])
def test_held_presentation_at_infinite_speed(name):
    """A network that relaxes on each sample, and moves its weights then, is gradient descent. (No
    batch norm here: it would see the states on their way, too.)"""
    build, item, classes = NETWORKS[name]
    model, items = made(build), [item(n) for n in range(6)]
    held = {"speed": "inf", "update": "last-tick"}
    config = settings("local", locality=held, learning={"lr": LR}, partition={"blocks": 3})
    result = hamdist.train(model, from_iterable(items, classes=classes), config)
    expected = sgd(model, items).state_dict().values()
    assert relative(result.model.state_dict().values(), expected) <= ROUND_OFF


class Mixed(nn.Module):
    """What a cut meets: an integer and a mask from the input, a real value without weights, a
    constant, a buffer that moves, an unused layer, time in front, and a no-grad branch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.ones(6))
        self.unused = nn.Linear(2, 2)
        self.scale = torch.linspace(0.5, 1.5, 6, dtype=F64)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        size = x.abs().mean(1, keepdim=True)
        order = x.argmax(1)
        mask = (size > 0.7) & (order > 0)[:, None]
        h = torch.tanh(self.a(x)) * self.scale
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        table = torch.sigmoid(self.shift)
        folded = h.view(-1, 2, 3).permute(1, 0, 2)
        with torch.no_grad():
            gate = torch.sigmoid(h.sum(1, keepdim=True))
        h = self.b(torch.where(mask, h, -h)) * table
        h = h + folded.permute(1, 0, 2).reshape(x.shape[0], 6) * gate
        h[:, 0] = 0
        one = nn.functional.one_hot(order, 5).to(h.dtype).sum(1, keepdim=True)
        return self.c(h + size * one) + table.sum()


@pytest.mark.parametrize("partition", [{"blocks": 2}, {"blocks": 3}, {"cuts": ["b", "c"]}, {}])
def test_what_a_cut_meets(partition):
    model, items = made(Mixed), [rows(n) for n in range(STEPS)]
    result = hamdist.train(
        model,
        from_iterable(items, classes=3),
        settings("backprop", learning={"lr": LR}, partition=partition),
    )
    expected = sgd(model, items).state_dict()
    assert len(result.blocks) == partition.get("blocks", 3)
    assert list(result.model.state_dict()) == list(expected)
    assert relative(result.model.state_dict().values(), expected.values()) <= ROUND_OFF


def test_blocks_without_autograd():
    """Closed-form steps are found in what was cut out of a user's class."""
    graph = as_graph(
        made(Layers),
        settings("backprop", partition={"blocks": 3}),
        from_iterable([rows(0)], classes=3).spec,
        cross_entropy,
    )
    cells = [make_closed(b.module, b.combine, 0, len(b.parents)) for b in graph.blocks.values()]
    assert all(cells)
