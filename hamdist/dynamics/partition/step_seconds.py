"""Measures what a step of each block takes, for cuts that balance time.

A step is what a run computes for a sample: the forward pass, the message to the parents, and the
update of the weights, in the form that `engine.step: auto` takes, with one thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph, combined
from hamdist.dynamics.native import rows
from hamdist.dynamics.updates.constants import Constant, Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.dynamics.vjp.autograd import AutogradFunction
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.dynamics.vjp.local_function import LocalFunction

REPEATS = 7
_ALWAYS = Constant(1.0)
# Plain gradient descent, by steps that leave the copied weights about as they are.
_DESCENT = Dynamics(tau=_ALWAYS, c=1.0, eta_z=0.0, eta_omega=1.0, beta=1e-12, phi=_ALWAYS)


def step_seconds(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the seconds of a step of each block, on examples: the lower quartile of some steps.

    The modules' weights and buffers are written to: `graph` is a copy.
    """
    h = dict(inputs)
    seconds = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with generator_kept():
            for name, block in graph.blocks.items():
                learned = [p not in inputs and h[p].is_floating_point() for p in block.parents]
                arguments = combined(block.combine, [h[p] for p in block.parents])
                h[name], seconds[name] = _timed(block, arguments, wanted=any(learned))
    finally:
        torch.set_num_threads(threads)
    return seconds


def _timed(block: BlockSpec, arguments: list[Tensor], *, wanted: bool) -> tuple[Tensor, float]:
    """Return the block's state, and the seconds of its step.

    wanted: parents learn by its messages.
    """
    module, joined = block.module, Combine.ARGUMENTS
    closed = make_closed(module, joined, 0, len(arguments), native=rows.built())
    function: LocalFunction = closed or AutogradFunction(module, joined, 0)
    weights = Weights(function.theta, _DESCENT, Order.OMEGA_FIRST, function.names)
    messages = [wanted and x.is_floating_point() for x in arguments]
    spent = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        record = function.forward(arguments, messages)
        y = record.output
        if y.is_floating_point():
            at_once = weights.at_once(1.0, 1.0)
            _, g = function.pull(record, torch.ones_like(y), inputs=wanted, at_once=at_once)
            weights.move(g, 1.0, 1.0)
        spent.append(time.perf_counter() - begin)
    return y.detach(), sorted(spent[1:])[REPEATS // 4]
