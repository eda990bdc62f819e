"""Predictions without delay (HL Eq. 10): at tick k only layer (k mod nu) + 1 of nu moves, and the
input shows sample floor(k / nu).

In its literal form (simultaneous order) the loss of sample j compares what stands at the output,
the prediction of sample j - 1, until the last layer has moved. In the sequential order with phi =
1/tau only in the tick in which the last layer moves, prediction and target belong together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from hamdist.runtime.train.train import train
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, absolute
from hamdist.study.verify.oracles.golden import RTOL, Array
from hamdist.study.verify.oracles.networks import Draws, chain
from hamdist.study.verify.oracles.tick_golden import Ticks, read_ticks, run_ticks

FORMS = {
    "literal": "delayfree_eq10_literal.npz",
    "second form": "autograd/delay-free-second-form.npz",
}


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks of both forms, beyond those of their golden files, and of the level."""
    for form, name in FORMS.items():
        ticks = read_ticks(golden.read(golden.shipped() / name))
        yield Check(
            f"Eq. 10, {form}: h after every {len(ticks.nodes)} ticks (relative)",
            "the feed-forward pass of that sample",
            RTOL,
            partial(_feed_forward, ticks),
        )
    yield Check(
        f"Eq. 10, {form}: L in the tick of the last layer (relative)",
        "the loss of sample j's prediction and its own target",
        RTOL,
        partial(_own_target, ticks),
    )
    samples = 40 if full else 12
    yield Check(
        f"level delay-free: predictions of {samples} samples",
        "the feed-forward pass with the same weights",
        1e-12,
        partial(_level, samples),
    )


def _passes(ticks: Ticks, ours: dict[str, Array]) -> Iterator[tuple[int, list[Array]]]:
    """Yield (first tick of sample j, its feed-forward pass), each layer with its weights of the
    tick in which it moves."""
    for start in range(0, ticks.K, len(ticks.nodes)):
        x, states = ticks.data["u"][start], []
        for i, node in enumerate(ticks.nodes):
            weight, bias = (ours[f"th.{key}"][start + i] for key in node.keys)
            x = x @ weight.T + bias
            x = np.tanh(x) if node.layers[0][1] == "tanh" else x
            states.append(x)
        yield start, states


def _feed_forward(ticks: Ticks) -> float:
    ours = run_ticks(ticks)
    return max(
        golden.distance(ours[f"h.{node.name}"][start + len(ticks.nodes)], state)
        for start, states in _passes(ticks, ours)
        for node, state in zip(ticks.nodes, states, strict=True)
    )


def _own_target(ticks: Ticks) -> float:
    """Return the difference of phi L, which is all that is taken in the tick of the last layer."""
    ours, phi, nu = run_ticks(ticks), ticks.data["phi"].max(), len(ticks.nodes)
    losses = [
        0.5 * np.square(states[-1] - ticks.data["yhat"][start]).sum() * phi
        for start, states in _passes(ticks, ours)
    ]
    return golden.distance(ours["L"][nu - 1 :: nu], np.array(losses))


def _level(samples: int) -> float:
    """Compare the level's predictions, with weights that do not move."""
    model = chain()
    metrics = {"record": "trajectory"}
    settings = float64_settings("delay-free", learning={"lr": 0.0}, metrics=metrics)
    result = train(model, Draws(samples), settings)
    readout = next(reversed(result.records.values()))
    if readout.prediction is None:
        raise ValueError("the readout recorded no prediction")
    predictions = [p for p in readout.prediction if not torch.isnan(p).any()]
    with torch.no_grad():
        exact = torch.stack([model(sample.u) for sample in Draws(samples).samples()])
    return absolute(torch.stack(predictions), exact)
