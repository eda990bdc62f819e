"""Nodes: a block (or the stream) together with its schedule and its channels.

A node does one event at a time: it takes the signals that the schedule names, has the block do the
phase, and posts what comes out. The nodes of a process are stepped in the order of their ticks
(loop.py); what a node needs at tick k was sent at an earlier tick, so this order never waits in a
circle.

The end of a stream travels as a signal, too. A pulse block then finishes the messages of the
samples that it has passed. A held block stops when the end has come along all its ways from the
input, and is shown the last states of parents that stopped before it; in a graph with cycles it
stops when the end comes first along any edge, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hamdist.config import Memory
from hamdist.dynamics.block import HoldBlock, HoldReadout, PulseBlock, PulseReadout
from hamdist.dynamics.cell import Cell, block_seed, seeded_loss
from hamdist.dynamics.graph import OUTPUT_KEY
from hamdist.dynamics.weights import Weights
from hamdist.runtime.hold import HoldNode
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.plan import Plan
from hamdist.runtime.pulse import PulseNode


class Node(Protocol):
    """What loop.py steps. `tick`: of the next event, None when the node has finished."""

    name: str
    tick: int | None

    def start(self) -> None: ...

    def step(self) -> None: ...


def ticks_of(nodes: Sequence[PulseNode | HoldNode]) -> int:
    """How many ticks the nodes have come through."""
    return max((node.event.tick + 1 for node in nodes), default=0)


def make_node(plan: Plan, name: str, mail: Mailroom) -> PulseNode | HoldNode:
    """The node of block `name`, with its own random generator."""
    spec = plan.graph.blocks[name]
    stash = plan.knobs.memory is Memory.TRACE_WEIGHTS
    cell = Cell(spec.module, spec.combine, block_seed(plan.seed, name), stash=stash)
    order = plan.knobs.order
    weights = Weights(cell.theta, plan.dynamics, order)
    wanted = [not e.from_input for e in plan.graph.into[name]]

    loss = spec.loss and seeded_loss(spec.loss, block_seed(plan.seed, f"{name}/loss"))

    def scale(sample: int) -> float:
        return plan.scale(name, sample)

    if plan.knobs.pulse:
        if loss is not None:
            read = PulseReadout(cell, weights, wanted, plan.dynamics, scale, loss)
            return PulseNode(plan, spec, mail, read)
        return PulseNode(plan, spec, mail, PulseBlock(cell, weights, wanted, plan.dynamics, scale))
    if loss is not None and not spec.state:
        output_net = HoldReadout(cell, weights, wanted, plan.dynamics, scale, loss)
        return HoldNode(plan, spec, mail, output_net)
    output = output_weights = None
    if spec.output is not None:
        output = Cell(spec.output, spec.combine, block_seed(plan.seed, f"{name}/{OUTPUT_KEY}"))
        output_weights = Weights(output.theta, plan.dynamics, order)
    shape, dtype = plan.shapes[name]
    h = torch.zeros(shape, dtype=dtype)
    return HoldNode(
        plan,
        spec,
        mail,
        HoldBlock(
            cell,
            weights,
            wanted,
            plan.dynamics,
            order,
            scale,
            h,
            loss=loss,
            output=output,
            output_weights=output_weights,
        ),
    )
