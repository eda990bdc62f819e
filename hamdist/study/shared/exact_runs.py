"""Runs in float64 whose blocks are set before, and looked at between, their steps; their weights
and weight costates at every t_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hamdist.config import Order, Settings
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.updates.weights import Weights
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import Plan
from hamdist.streams.sample import Stream


def float64_settings(level: str, **sections: Any) -> Settings:
    """Return the settings of a run at `level` in float64."""
    return Settings.model_validate({"level": level, "dtype": "float64", **sections})


class PlanNodes:
    """The nodes of a plan, by block in the graph's order."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._mailbox = plan, Mailbox({INPUT, *plan.graph.blocks})
        self.nodes = {name: make_node(plan, name, self._mailbox) for name in plan.graph.blocks}

    def run(self, stream: Stream, after_step: Callable[[Node, int], None] | None = None) -> None:
        """Run the whole stream, as the engine in one process does."""
        source = SourceNode(self._plan, stream, self._mailbox)
        run_loop([source, *self.nodes.values()], after_step=after_step)


@dataclass
class ModuleRecord:
    """omega and theta of one module at every t_k.

    late: the weights move when z_{k+1} is complete, which is at the start of tick k + 1 (a state
    block in the sequential order): those of t_k stand there after tick k, others before it.
    """

    weights: Weights
    late: bool = False
    omega: list[list[Tensor]] = field(default_factory=list)
    theta: list[list[Tensor]] = field(default_factory=list)

    def copy_weights(self) -> None:
        """Add copies of omega and theta as they are now."""
        self.omega.append([o.clone() for o in self.weights.omega])
        self.theta.append([t.clone() for t in self.weights.theta])


class NodeRecord(NamedTuple):
    """A node of a held block, with the records of its module and of its output module, if any."""

    node: HoldNode
    modules: list[ModuleRecord]


class RecordedNodes(PlanNodes):
    """The nodes of a plan whose blocks are held, with a record of each (`records`)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.records: dict[str, NodeRecord] = {}
        for name, node in self.nodes.items():
            if not isinstance(node, HoldNode):
                raise TypeError(f"block {name!r} is not one that steps in every tick")
            block, late = node.block, plan.knobs.order is Order.SEQUENTIAL
            modules = [ModuleRecord(block.weights, late and isinstance(block, HoldBlock))]
            if isinstance(block, HoldBlock) and block.output_weights is not None:
                modules.append(ModuleRecord(block.output_weights))
            self.records[name] = NodeRecord(node, modules)

    def record(self, stream: Stream) -> None:
        """Run the whole stream, and record."""
        for record in self.records.values():
            for module in record.modules:
                if not module.late:
                    module.copy_weights()

        def copy_weights(node: Node, _tick: int) -> None:
            for module in self.records[node.name].modules if node.name in self.records else ():
                module.copy_weights()

        self.run(stream, copy_weights)
