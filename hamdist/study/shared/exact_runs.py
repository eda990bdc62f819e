"""Runs in float64 whose blocks are set before, and looked at between, their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.nodes.factory import make_node
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
