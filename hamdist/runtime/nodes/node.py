"""What the nodes of blocks have in common, and the interface through which loop.py steps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.graph.graph import BlockSpec
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.runtime.nodes.emissions import LiveBlock
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.ports import BlockContents, Ports, block_state, make_metrics
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.result import BlockState


class Node(Protocol):
    """The interface through which loop.py steps a block or the stream.

    Attributes:
        tick: the tick of the next event; None when the node has finished.
        late: True if the node comes after the others of the same tick.
    """

    name: str
    late: bool
    tick: int | None

    def start(self) -> None:
        """Post what neighbours read before the first tick."""

    def step(self) -> None:
        """Do the next event."""


class BlockNode(Stateful, ABC):
    """The node of a block.

    Attributes:
        metrics: of a readout.
        seconds: time spent in the block's own steps.
        live: what the stream tells of its emissions.
    """

    late = False
    ADDED: ClassVar[Mapping[str, Any]] = {"live": None}

    def __init__(self, plan: Plan, spec: BlockSpec, mailbox: Mailbox) -> None:
        self.name = spec.name
        self.metrics = None if spec.loss is None else make_metrics(plan)
        self.seconds = 0.0
        self.live = LiveBlock(spec.name, plan.spec.patience)
        self._ports = Ports(plan, spec.name, mailbox)

    @property
    def device(self) -> torch.device:
        """Return the device on which the block computes."""
        return self._ports.border.device

    def records(self) -> Records | None:
        """Return the recorded energies; None if recording is off, or there are none at one time."""
        return None

    @abstractmethod
    def contents(self) -> BlockContents:
        """Return the tensors of the block, as they lie in it."""

    def state(self) -> BlockState:
        """Return a copy of the block's state in host memory."""
        return block_state(self.contents())
