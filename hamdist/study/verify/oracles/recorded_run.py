"""Nodes whose weights and weight costates are kept at every t_k, while a loop steps them."""

from __future__ import annotations

from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.updates.weights import Weights
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import Plan
from hamdist.streams.sample import Stream


class ModuleRecord:
    """omega and theta of one module at every t_k. late: they move when z_{k+1} is complete, which
    is at the start of tick k + 1 (a state block in the sequential order)."""

    def __init__(self, weights: Weights, *, late: bool) -> None:
        self.weights = weights
        self.late = late
        self.omega: list[list[Tensor]] = []
        self.theta: list[list[Tensor]] = []

    def keep(self) -> None:
        self.omega.append([o.clone() for o in self.weights.omega])
        self.theta.append([t.clone() for t in self.weights.theta])


class NodeRecord:
    """A node, and the weights of its module and of its output module at every t_k."""

    def __init__(self, node: HoldNode, *, sequential: bool) -> None:
        self.node = node
        self.name = node.name
        self.late = node.late
        self.tick = node.tick
        block = node.block
        self.own = ModuleRecord(block.weights, late=sequential and isinstance(block, HoldBlock))
        self.output: ModuleRecord | None = None
        if isinstance(block, HoldBlock) and block.output_weights is not None:
            self.output = ModuleRecord(block.output_weights, late=False)

    @property
    def omega(self) -> list[list[Tensor]]:
        """Return omega of the block's own module."""
        return self.own.omega

    @property
    def theta(self) -> list[list[Tensor]]:
        """Return theta of the block's own module."""
        return self.own.theta

    def start(self) -> None:
        self.node.start()

    def step(self) -> None:
        parts = [self.own] if self.output is None else [self.own, self.output]
        for part in parts:
            if not part.late:
                part.keep()
        self.node.step()
        self.tick = self.node.tick
        for part in parts:
            if part.late:
                part.keep()


class RecordedNodes:
    """The nodes of a plan (`watches`, in the graph's order), to be set before they are run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._mailbox = Mailbox({INPUT, *plan.graph.blocks})
        self.watches = [_watch(plan, name, self._mailbox) for name in plan.graph.blocks]

    def run(self, stream: Stream) -> None:
        """Run the whole stream, as the engine in one process does."""
        run_loop([SourceNode(self._plan, stream, self._mailbox), *self.watches])


def _watch(plan: Plan, name: str, mailbox: Mailbox) -> NodeRecord:
    node = make_node(plan, name, mailbox)
    if not isinstance(node, HoldNode):
        raise TypeError(f"block {name!r} is not one that steps in every tick")
    return NodeRecord(node, sequential=plan.knobs.order is Order.SEQUENTIAL)
