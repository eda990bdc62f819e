"""Predictions without delay (HL Eq. 10): at tick k only layer (k mod nu) + 1 of nu moves, and the
input shows sample floor(k / nu).

In its literal form (simultaneous order) the loss of sample j compares what stands at the output,
the prediction of sample j - 1, until the last layer has moved. In the sequential order with phi =
1/tau only in the tick in which the last layer moves, prediction and target belong together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from hamdist.runtime.train.train import train
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, Difference, absolute
from hamdist.study.verify.oracles.golden import RTOL, Array, distance
from hamdist.study.verify.oracles.networks import Draws, chain
from hamdist.study.verify.oracles.tick_golden import compared, expected, read_ticks, run_ticks
from hamdist.study.verify.oracles.whole_network import NetworkCase, make_case, replay

LAYERS = (
    ("l1", ("u",), ((6, "tanh"),)),
    ("l2", ("l1",), ((5, "tanh"),)),
    ("l3", ("l2",), ((4, "tanh"),)),
    ("l4", ("l3",), ((2, "linear"),)),
)
NU = len(LAYERS)
TAU = 0.5
FORMS = (
    ("literal", "simultaneous", (1.0,)),
    ("second form", "sequential", (*[0.0] * (NU - 1), 1 / TAU)),
)


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks of both forms, and of the level."""
    samples = 40 if full else 12
    for form, order, phi in FORMS:
        case = _case(order, phi, samples)
        yield Check(
            f"Eq. 10, {form}: every tick (relative)",
            "autograd of H': h, z, ω, θ, y, L, H'",
            RTOL,
            partial(_trajectory, case),
        )
        yield Check(
            f"Eq. 10, {form}: h after every {NU} ticks (relative)",
            "the feed-forward pass of that sample",
            RTOL,
            partial(_feed_forward, case),
        )
    yield Check(
        f"Eq. 10, second form: L in the tick of the last layer, {samples} samples (relative)",
        "the loss of sample j's prediction and its own target",
        RTOL,
        partial(_own_target, _case("sequential", FORMS[1][2], samples)),
    )
    yield Check(
        f"level delay-free: predictions of {samples} samples",
        "the feed-forward pass with the same weights",
        1e-12,
        partial(_level, samples),
    )


def _case(order: str, phi: Sequence[float], samples: int) -> NetworkCase:
    ticks = NU * samples
    mask = np.equal.outer(np.arange(ticks) % NU, np.arange(NU)).astype(float)
    return make_case(
        LAYERS, (("l4",), ()), inputs=3, ticks=ticks, seed=11, order=order, held=NU, tau=(TAU,),
        c=1 / TAU, eta=0.1, phi=phi, beta=(0.05,), mask=mask,
    )  # fmt: skip


def _trajectory(case: NetworkCase) -> Difference:
    ticks = read_ticks(replay(case))
    return compared(run_ticks(ticks), expected(ticks))


def _passes(case: NetworkCase, ours: dict[str, Array]) -> Iterator[tuple[int, list[Array]]]:
    """Yield (j, the feed-forward pass of sample j), each layer with its weights of the tick in
    which it moves."""
    for j, start in enumerate(range(0, len(case["u"]), NU)):
        x, states = case["u"][start], []
        for i, (name, _, ((_, activation),)) in enumerate(LAYERS):
            weight, bias = (ours[f"th.{name}.0.{part}"][start + i] for part in "Wb")
            x = x @ weight.T + bias
            x = np.tanh(x) if activation == "tanh" else x
            states.append(x)
        yield j, states


def _feed_forward(case: NetworkCase) -> float:
    ours = run_ticks(read_ticks(replay(case)))
    return max(
        distance(ours[f"h.{name}"][(j + 1) * NU], state)
        for j, states in _passes(case, ours)
        for (name, _, _), state in zip(LAYERS, states, strict=True)
    )


def _own_target(case: NetworkCase) -> float:
    """Return the difference of phi L, which is all that is taken in the tick of the last layer."""
    ours = run_ticks(read_ticks(replay(case)))
    losses = [
        0.5 * np.square(states[-1] - case["yhat"][j * NU]).sum() / TAU
        for j, states in _passes(case, ours)
    ]
    return distance(ours["L"][NU - 1 :: NU], np.array(losses))


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
