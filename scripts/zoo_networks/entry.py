"""One public network: how it is built, and what it is fed with. B: batch, T: tokens."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, WORDS, CLASSES = 4, 7, 19, 3
IGNORED = -100  # a target that has no loss
ONLY = ""  # the name of the only output

Item = tuple[Any, Any]


@dataclass(frozen=True)
class Network:
    """name: as people call it. library: that it is imported from. build: makes it, with random
    weights and without dropout. item: the n-th batch (u, y). lr: step size of the comparison."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    item: Callable[[int], Item]
    lr: float = 0.05

    def model(self) -> nn.Module:
        """Return the network in float64, the same weights at every call, dropout off."""
        if importlib.util.find_spec("torchvision") is not None:
            vision_library()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = self.build().double()
        for part in model.modules():
            for key, value in list(vars(part).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
            if isinstance(part, nn.modules.dropout._DropoutNd) or "StochasticDepth" in str(
                type(part)
            ):
                part.p = 0.0  # type: ignore[assignment]
        return model.train()


def vision_library() -> Any:
    """Return torchvision. Its compiled operators belong to one build of torch; where they do not
    load, stand-ins without a kernel let the networks be imported, here and by other libraries."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", signature)
        return importlib.import_module("torchvision")


def _numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Return normally distributed numbers in float64."""
    return torch.randn(shape, generator=_numbers(seed), dtype=torch.float64)


def whole(seed: int, most: int, *shape: int) -> Tensor:
    """Return whole numbers below `most`."""
    return torch.randint(most, shape, generator=_numbers(seed))


def padding(seed: int, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    """Return a mask (B, T), 1 for tokens and 0 for what pads a text behind its end."""
    lengths = whole(seed + 7, tokens - 2, batch) + 3
    return (torch.arange(tokens) < lengths[:, None]).long()


def texts(seed: int) -> dict[str, Tensor]:
    """Return what a tokenizer gives: numbers of tokens, and which of them are there."""
    return {"input_ids": whole(seed, WORDS, BATCH, TOKENS), "attention_mask": padding(seed)}


def classes(seed: int) -> Tensor:
    """Return a class for each sample."""
    return whole(seed + 100, CLASSES, BATCH)


def next_words(seed: int) -> Item:
    """Return texts; at each place the word that follows, and nothing behind the end of a text."""
    u = texts(seed)
    following = u["input_ids"].roll(-1, 1)
    there = u["attention_mask"].roll(-1, 1).bool()
    there[:, -1] = False
    return u, {"logits": following.where(there, torch.tensor(IGNORED))}


def classed_texts(seed: int) -> Item:
    """Return texts and a class for each."""
    return texts(seed), {"logits": classes(seed)}


def tagged_texts(seed: int) -> Item:
    """Return texts and a class for each of their tokens."""
    u = texts(seed)
    tags = whole(seed + 100, CLASSES, BATCH, TOKENS)
    return u, {"logits": tags.where(u["attention_mask"].bool(), torch.tensor(IGNORED))}


def translated(seed: int) -> Item:
    """Return texts, what a decoder has been given, and what it says next."""
    u = texts(seed)
    return {**u, "decoder_input_ids": whole(seed + 50, WORDS, BATCH, TOKENS)}, {
        "logits": whole(seed + 60, WORDS, BATCH, TOKENS)
    }


def images(side: int, key: str | None = None, channels: int = 3) -> Callable[[int], Item]:
    """Return a maker of images (B, channels, side, side) and classes. key: name of the output."""

    def item(seed: int) -> Item:
        y = classes(seed)
        return normal(seed, BATCH, channels, side, side), (y if key is None else {key: y})

    return item


def maps(side: int, key: str | None = None, scale: int = 1) -> Callable[[int], Item]:
    """Return a maker of images and a class for each of their places."""

    def item(seed: int) -> Item:
        y = whole(seed + 100, CLASSES, BATCH, side // scale, side // scale)
        return normal(seed, BATCH, 3, side, side), (y if key is None else {key: y})

    return item
