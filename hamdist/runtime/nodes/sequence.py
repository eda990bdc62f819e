"""The node of a block through which sequences travel forward and in reverse."""

from __future__ import annotations

from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from hamdist.dynamics.blocks.sequence import SequenceBlock, SequenceReadout
from hamdist.dynamics.graph.graph import BlockSpec
from hamdist.dynamics.schedule.events import Event, Phase, Stamp
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.node import BlockContents, BlockNode, block_state, record
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.signal import ready


class SequenceNode(BlockNode):
    """A block that learns from whole sequences.

    The last token of a sequence carries a tag, which the node passes on with its state.
    """

    def __init__(
        self, plan: Plan, spec: BlockSpec, mailbox: Mailbox, block: SequenceBlock | SequenceReadout
    ) -> None:
        if not isinstance(plan.schedule, SequenceSchedule):
            raise TypeError("a SequenceNode needs a SequenceSchedule")
        super().__init__(plan, spec, mailbox)
        self.block = block
        self._schedule = plan.schedule
        self._back_into = [e for e in self._ports.into if plan.schedule.recurrent(e)]
        self._back_out = [e for e in self._ports.out_of if plan.schedule.recurrent(e)]
        shapes = {e.index: plan.shapes[e.parent] for e in self._back_into}
        self._zeros = {
            i: self._ports.border.state(i, torch.zeros(shape, dtype=dtype))
            for i, (shape, dtype) in shapes.items()
        }
        self._silent = spec.name in plan.silent and spec.loss is None
        self._over = False
        self.event = plan.schedule.forward(spec.name, plan.schedule.opening(), 0)
        self.tick: int | None = self.event.tick

    STATE = ("block", "metrics", "seconds", "_over", "event", "tick", "live")

    def start(self) -> None:
        """Post the state before the first sequence to recurrent children."""
        if self._schedule.carries and isinstance(self.block, SequenceBlock):
            onward = [e for e in self._ports.out_of if e not in self._back_out]
            stamp = self._schedule.before(self.name)
            self._ports.to_children(stamp, ready(self.block.h), leaving_out=onward)

    def step(self) -> None:
        """Do one token, forward or in reverse."""
        if self.event.phase is Phase.FORWARD:
            self._forward(self.event)
        else:
            self._backward(self.event)
        if self._over:
            self.tick = None
            return
        self.event = self._schedule.after(self.name, self.event)
        self.tick = self.event.tick

    def _forward(self, event: Event) -> None:
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        inputs, last = self._inputs(event)
        if self._over:
            self._ports.to_children(stamp, None, end=True, leaving_out=self._back_out)
            return
        if last:
            self.event = self._schedule.closed(event)
        block = self.block
        emission = self.live.receive(event.sample, partial(self._ports.clock, event), self.state)
        idle = self.live.idle(event.sample)
        if isinstance(block, SequenceBlock):
            stays = self._back_out if last and not self._schedule.carries else ()
            begin = perf_counter()
            h = ready(block.h if idle else block.forward(inputs))
            self.seconds += perf_counter() - begin
            self._ports.to_children(stamp, h, sequence_end=last, leaving_out=stays)
        elif self.metrics is not None:
            target = self._ports.target(event)
            label = None if target is None else target.payload
            if idle:
                return
            begin = perf_counter()
            reading = block.forward(self.live.number(event.sample), inputs, label)
            self.seconds += perf_counter() - begin
            record(self.metrics, event.sample if emission is None else emission.number, reading)
            if emission is not None and block.prediction is not None:
                self.live.answer(emission, block.prediction, stamp.version, event)

    def _inputs(self, event: Event) -> tuple[list[Tensor], bool]:
        """Return the parents' states, and True if this token is the last one of its sequence. The
        token's own signal carries that tag, and the end of the stream."""
        inputs, last = [], False
        for edge in self._ports.into:
            signal = self._ports.state(edge, event)
            if signal is None:
                inputs.append(self._zeros[edge.index])
                continue
            self._over = self._over or signal.end
            if edge not in self._back_into:
                last = signal.sequence_end
            if signal.payload is not None:
                inputs.append(signal.payload)
        return inputs, last

    def _backward(self, event: Event) -> None:
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        signals = [self._ports.message(edge, event) for edge in self._ports.out_of]
        messages = [None if s is None else s.payload for s in signals]
        begin = perf_counter()
        idle = self.live.idle(event.sample)
        if self._schedule.begins(event) and not idle:
            self.block.begin()
        to_parents: list[Tensor | None] = [None] * len(self._ports.into)
        if self._silent or idle:
            pass  # it keeps no tokens, and nobody waits for what it would say
        elif isinstance(self.block, SequenceBlock):
            to_parents = self.block.backward(messages)
        else:
            to_parents = self.block.backward(self.live.number(event.sample))
        self.seconds += perf_counter() - begin
        ends = self._schedule.ends(event)
        self._ports.to_parents(stamp, to_parents, leaving_out=self._back_into if ends else ())
        last = self._schedule.last(event)
        if ends and idle:
            self.block.weights.rest()
        elif ends:
            self.block.end(self.live.number(last))
        if ends:
            self.live.forget(last)

    def contents(self) -> BlockContents:
        block = self.block
        h, z = (block.h, block.z) if isinstance(block, SequenceBlock) else (None, None)
        return BlockContents([("", block.cell, block.weights)], h, z)

    def state(self) -> BlockState:
        """Return a copy of the block's state, and of how many tokens it stored."""
        return block_state(self.contents(), self.block.stored)
