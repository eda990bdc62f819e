"""Levels `backprop` and `pipeline` equal centralised backpropagation, however the network is cut
into blocks, and its batches into micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.config import LearningSettings, Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.objective.losses import LossFunction
from hamdist.runtime.train.train import train
from hamdist.streams.sample import Stream
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, absolute
from hamdist.study.verify.oracles.networks import (
    BATCH,
    F64,
    Draws,
    Masked,
    Reversing,
    Skips,
    Switching,
    chain,
    hooked_chain,
    seeded,
    skip_graph,
    tied,
    with_activation,
)

BOUND = 1e-12
PARTS = 3
GROUP = 4  # samples of a step
BEHIND = 8  # the same with two versions: as many as the messages of a chain of 5 are late
ORACLE = "autograd on the whole network and torch.optim"
PLAIN = {"lr": 0.1}
MOMENTUM = {"lr": 0.05, "momentum": 0.5, "dampening": 0.3}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {"betas": [0.8, 0.95], "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"lr_decay": 0.1},
    "Adafactor": {"weight_decay": 0.1},
    "Muon": {"weight_decay": 0.1},
}
ADAMW = {"lr": 0.01, "optimizer": {"name": "adamw", **OPTIMISERS["AdamW"]}}
CLIPPED = {"lr": 0.05, "momentum": 0.5, "clip": {"norm": 0.3, "of": "network"}}


def checks(full: bool) -> Iterator[Check]:
    """Yield a check per network, rule of the weights and grouping."""
    samples = 600 if full else 60
    for name, learning, tau, partition in (
        ("one layer a block", PLAIN, 1.0, {}),
        ("two blocks", PLAIN, 1.0, {"blocks": 2}),
        ("one block", PLAIN, 1.0, {"blocks": 1}),
        ("momentum, tau = 0.25", MOMENTUM, 0.25, {}),
        ("edges of 3 ticks", PLAIN, 1.0, {"delay": 3}),
    ):
        yield _check(f"a chain of 5, {name}", chain, samples, learning, tau, partition)
    for name, learning, tau in (("plain", PLAIN, 1.0), ("momentum, tau = 0.25", MOMENTUM, 0.25)):
        title = f"two skips, two readouts, {name}"
        yield _check(title, lambda: seeded(Skips), samples, learning, tau, {})
        title = f"tied weights, a layer in two blocks, {name}"
        yield _check(title, tied, samples, learning, tau, {})
    yield _check("three frozen blocks of five", lambda: tied(2), samples, MOMENTUM, 1.0, {})
    for title, build in (
        ("hooks on a layer", hooked_chain),
        ("an autograd.Function", lambda: with_activation(Reversing())),
        ("Python state", lambda: with_activation(Switching())),
        ("masks of -inf, used in two blocks", lambda: seeded(Masked)),
    ):
        yield _check(title, build, samples, PLAIN, 1.0, {})
    for kind, options in OPTIMISERS.items():
        if hasattr(torch.optim, kind):
            named: dict[str, Any] = {"name": kind.lower(), **options}
            learning_by = {"lr": 0.01, "optimizer": named}
            yield _check(f"a chain of 5, {kind}", chain, samples, learning_by, 1.0, {})
    title = "a chain of 5, clipped by the norm of all gradients"
    yield _check(title, chain, samples, CLIPPED, 1.0, {})
    yield from _in_parts(samples)
    yield from _in_groups(samples)


def _in_parts(samples: int) -> Iterator[Check]:
    """Yield checks of level `pipeline`: the last of the micro-batches has fewer rows."""
    cases: list[tuple[str, Callable[[], nn.Module], Mapping[str, Any], Mapping[str, int]]] = [
        ("a chain of 5", chain, MOMENTUM, {}),
        ("a chain of 5, two blocks", chain, PLAIN, {"blocks": 2}),
        ("a chain of 5, edges of 3 ticks", chain, PLAIN, {"delay": 3}),
        ("a chain of 5, AdamW", chain, ADAMW, {}),
        ("two skips, two readouts", lambda: seeded(Skips), PLAIN, {}),
        ("tied weights, a layer in two blocks", tied, MOMENTUM, {}),
        ("tied weights, clipped by the norm of all gradients", tied, CLIPPED, {}),
    ]
    for name, build, learning, partition in cases:
        title = f"{PARTS} micro-batches of {BATCH} rows, {name}"
        in_parts = {"microbatches": PARTS}
        yield _check(title, build, samples, learning, 1.0, partition, in_parts, "pipeline")


def _in_groups(samples: int) -> Iterator[Check]:
    """Yield checks of a step for several samples; with two versions each block is a step behind."""
    for rule, learning in (("momentum", MOMENTUM), ("AdamW", ADAMW)):
        name = f"a chain of 5, a step for {GROUP} samples, {rule}"
        yield _check(name, chain, samples, learning, 1.0, {}, {"accumulate": GROUP})
    buffered = {"accumulate": BEHIND, "double_buffered": True}
    name = f"a chain of 5, two versions of the weights, a step for {BEHIND} samples"
    yield _check(name, chain, samples, PLAIN, 1.0, {}, buffered, "trace")


def _check(
    name: str,
    build: Callable[[], nn.Module],
    samples: int,
    learning: Mapping[str, Any],
    tau: float,
    partition: Mapping[str, int],
    locality: Mapping[str, Any] | None = None,
    level: str = "backprop",
) -> Check:
    settings = float64_settings(
        level,
        locality=locality or {},
        learning=learning,
        dynamics={"tau": tau},
        partition=partition,
        metrics={"window": 1},
    )
    title = f"{name}: losses and weights of {samples} steps"
    return Check(title, ORACLE, BOUND, partial(apart_from_sgd, build, samples, settings))


def apart_from_sgd(build: Callable[[], nn.Module], samples: int, settings: Settings) -> float:
    """Return the largest difference between losses, and between weights at the end."""
    module = build()
    model = skip_graph(module) if isinstance(module, Skips) else module
    result = train(model, Draws(samples), settings)
    plain = build()
    group, behind = settings.locality.accumulate or 1, bool(settings.locality.double_buffered)
    curves = sgd(plain, Draws(samples), settings.learning, group, behind=behind)
    losses = [torch.tensor([w.mean_loss for w in ws], dtype=F64) for ws in result.windows.values()]
    pairs = list(zip(losses, curves, strict=True))
    if isinstance(model, Graph):
        weights = {f"{b}.{k}": t for b, s in result.blocks.items() for k, t in s.theta.items()}
    else:
        weights = dict(result.model.named_parameters())
    pairs += [(weights[key], p) for key, p in plain.named_parameters()]
    return max(absolute(a, b) for a, b in pairs)


def _torchs(weights: list[nn.Parameter], learning: LearningSettings) -> list[Any]:
    """Return the optimisers that `learning` asks for, on the whole network."""
    if learning.optimizer is None:
        return [torch.optim.SGD(weights, learning.lr, learning.momentum, learning.dampening)]
    kind = next(k for k in OPTIMISERS if k.lower() == learning.optimizer.name)
    matrices = [w for w in weights if w.ndim == 2 or kind != "Muon"]
    others = [w for w in weights if w.ndim != 2 and kind == "Muon"]
    optimisers = [getattr(torch.optim, kind)(matrices, lr=learning.lr, **OPTIMISERS[kind])]
    if others:
        optimisers.append(torch.optim.AdamW(others, learning.lr, weight_decay=0.1))
    return optimisers


def sgd(
    model: nn.Module,
    stream: Stream,
    learning: LearningSettings,
    group: int = 1,
    *,
    behind: bool = False,
    loss: LossFunction = functional.cross_entropy,
) -> list[Tensor]:
    """Move the weights of `model` once for `group` samples; return each prediction's loss curve.

    behind: by gradients at the weights before the latest step (PipeDream-2BW).
    """
    optimisers = _torchs(list(model.parameters()), learning)
    used = copy.deepcopy(model) if behind else model  # the network that predicts
    curves: list[Sequence[float]] = []
    for n, sample in enumerate(stream.samples()):
        if isinstance(sample.y, Tensor):
            predicted = used(sample.u)
            predictions = predicted if isinstance(predicted, tuple) else (predicted,)
            losses = torch.stack([loss(p, sample.y) for p in predictions])
            (losses.sum() / group).backward()  # type: ignore[no-untyped-call]  # (of torch)
            curves.append(losses.tolist())
        elif group == 1:
            continue
        if (n + 1) % group:
            continue
        before = copy.deepcopy(model.state_dict())
        gradients = [p.grad for p in used.parameters()]
        used.zero_grad()
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        if learning.network_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), learning.network_clip)
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()
        if behind:
            used.load_state_dict(before)
    return list(torch.tensor(curves, dtype=F64).T)
