"""Oracle: torch.optim.SGD on the uncut model, float64. Level `backprop` is centralised gradient
descent for networks as people write them (architectures.py), cut anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.architectures import GPT, Config, Encoder, ResNet, Tagger, TwoByTwo, UNet, ViT
from dynamics.helpers import F64, relative, settings
from torch.nn import functional

import hamdist
from hamdist.streams import from_iterable

ROUND_OFF = 1e-12
STEPS, BATCH, LR = 20, 4, 0.1


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


NETWORKS = {
    "resnet": (ResNet, images, 3),
    "unet": (UNet, maps, 2),
    "vit": (lambda: ViT(Config()), images, 3),
    "gpt": (lambda: GPT(Config()), text, 11),
    "lstm": (Tagger, tokens, 3),
    "encoder": (lambda: Encoder(Config()), masked, {"logits": 3}),
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
