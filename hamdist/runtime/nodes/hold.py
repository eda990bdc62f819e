"""The node of a block that steps in every tick (presentation hold)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hamdist.config import Reset, ResetSettings
from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.blocks.gate import Gate
from hamdist.dynamics.blocks.hold import HoldBlock, HoldReadout, Tick
from hamdist.dynamics.graph.graph import OUTPUT_KEY, BlockSpec, Edge
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.schedule.events import Event, Stamp
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.local_function import LocalFunction
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.node import BlockContents, BlockNode, events_from, make_recorder, record
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Signal, ready
from hamdist.streams.sample import Emission, Emits


class HoldNode(BlockNode):
    """A block that steps in every tick."""

    def __init__(
        self, plan: Plan, spec: BlockSpec, mailbox: Mailbox, block: HoldBlock | HoldReadout
    ) -> None:
        if not isinstance(plan.schedule, HoldSchedule):
            raise TypeError("a HoldNode needs a HoldSchedule")
        super().__init__(plan, spec, mailbox)
        self.late = plan.schedule.late(spec.name)
        self.block = block
        tolerance = plan.knobs.gate
        wait = plan.schedule.wait(spec.name)
        self._gate = None if tolerance is None else Gate(wait, tolerance)
        self._recorder = make_recorder(plan.metrics)
        self._schedule = plan.schedule
        self._clock = _Clock(plan.dynamics.reset, plan.dynamics.tau)
        self._acyclic = plan.graph.acyclic
        # Without a way from the input it is the targets that tell of the end.
        self._adrift = spec.name in plan.graph.adrift
        self.ended: list[int] = []  # indices of edges
        # What an edge shows until the first signal has come along it.
        shapes = {**plan.spec.parents, **plan.shapes}
        self.shown = {
            e.index: self._ports.border.state(
                e.index, torch.zeros(shapes[e.parent][0], dtype=shapes[e.parent][1])
            )
            for e in self._ports.into
        }
        # What a state that was cleared on its way is replaced by.
        self._starts = {
            e.parent: self._ports.border.state(e.index, plan.start(e.parent))
            for e in self._ports.into
            if not e.from_input
        }
        self._target: Tensor | None = None
        self._no_more_targets = False
        self._events = plan.schedule.events(spec.name)
        self.event = next(self._events)
        self.tick: int | None = self.event.tick

    STATE = (
        *("block", "metrics", "seconds", "_recorder", "_clock"),
        *("_target", "_no_more_targets", "_gate", "live", "shown", "event", "tick", "ended"),
    )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._events = events_from(self._schedule, self.name, self.event)

    def start(self) -> None:
        """Post h_0 and zero messages."""
        h = ready(self.block.h) if isinstance(self.block, HoldBlock) else None
        self._ports.before_start(h, self._schedule)

    def _stamp(self, tick: int, version: int) -> Stamp:
        return Stamp(tick, tick // self._schedule.c, version)

    def step(self) -> None:
        """Do one tick."""
        event = self.event
        clock = None if self._clock.stopped else self._ports.clock(event)
        if self.live.patience and clock is not None and not clock.end:
            self.live.receive(event.sample, lambda: clock, self.state)
            self.live.forget(event.sample - self._schedule.idle)
            clock = replace(clock, payload=None)  # (what is left concerns the clock)
        self._clock.advance(event.tick, event.tick % self._schedule.c == 0, clock)
        inputs = [self._input(edge, event) for edge in self._ports.into]
        messages = [self._message(edge, event) for edge in self._ports.out_of]
        if self._has_ended():
            self._end(event, messages)
            return
        if self.metrics is not None and not self._no_more_targets:
            signal = self._ports.target(event)
            if signal is not None:
                self._target = signal.payload
                self._no_more_targets = signal.end
                if signal.end and self._adrift:
                    self._end(event, messages)
                    return
        self._do(event, inputs, messages)
        self.event = next(self._events)
        self.tick = self.event.tick

    def _input(self, edge: Edge, event: Event) -> Tensor:
        """Return the state that the edge shows in this tick. That is the state that arrived in this
        tick, or the latest one where the input shows a sample for several ticks or where the stream
        has ended."""
        signal = None if edge.index in self.ended else self._ports.state(edge, event)
        if signal is not None and signal.end:
            self.ended.append(edge.index)
        elif signal is not None and signal.payload is not None:
            cleared = not edge.from_input and signal.stamp.tick < self._clock.h_since
            self.shown[edge.index] = self._starts[edge.parent] if cleared else signal.payload
        return self.shown[edge.index]

    def _message(self, edge: Edge, event: Event) -> Tensor | None:
        signal = self._ports.message(edge, event)
        if signal is None:
            return None
        if signal.end:
            self.ended.append(edge.index)
        return None if signal.stamp.tick < self._clock.z_since else signal.payload

    def _has_ended(self) -> bool:
        """Return True if the end of the stream has reached this block. In an acyclic graph the end
        has to arrive along every edge, so that the last samples reach the readouts. Around a cycle
        no block could be the first to stop, so there the first end counts."""
        if not self._acyclic:
            return bool(self.ended)
        return all(edge.index in self.ended for edge in self._ports.into)

    def _end(self, event: Event, messages: list[Tensor | None]) -> None:
        if isinstance(self.block, HoldBlock):
            self.block.complete(messages)
        stamp = self._stamp(event.tick, self._schedule.updates_before(event.tick))
        self._ports.to_children(stamp, None, end=True)
        if not self._acyclic:
            self._ports.to_parents(stamp, [None] * len(self._ports.into), end=True)
        self.tick = None

    def _do(self, event: Event, inputs: list[Tensor], messages: list[Tensor | None]) -> None:
        k, block = event.tick, self.block
        if isinstance(block, HoldBlock):
            begin = perf_counter()
            block.complete(messages)
            self.seconds += perf_counter() - begin
        self._clear(k)
        due = self._schedule.updates(k)
        updates = due and (self._gate is None or self._gate.open(inputs))
        answered = self._answered(k)
        tick = Tick(
            k=k,
            sample=self.live.number(event.sample),
            tau=self._clock.tau(k),
            moves=self._schedule.moves(self.name, k),
            updates=updates,
            target=self._target if self._compares(k) else None,
            measures=self._recorder is not None and self._recorder.due(k),
            answers=answered is not None,
        )
        h, z = (block.h, block.z) if isinstance(block, HoldBlock) else (None, None)
        stamp = self._stamp(k, block.weights.updates)
        if due and not updates:
            block.weights.rest()

        def send(new: Tensor) -> Tensor:
            new = ready(new)
            begin = perf_counter()
            self._ports.to_children(stamp, new)
            self.seconds -= perf_counter() - begin
            return new

        begin = perf_counter()
        to_parents, reading = block.tick(inputs, tick, send)
        self.seconds += perf_counter() - begin
        ended = [edge for edge in self._ports.into if edge.index in self.ended]
        self._ports.to_parents(stamp, to_parents, leaving_out=ended)
        if self._recorder is not None and block.energy is not None:
            self._recorder.add(k, block.energy, reading, h, z)
        if self.metrics is not None:
            if answered is not None and block.prediction is not None:
                self.live.answer(answered, block.prediction, stamp.version, event)
            sample = self._schedule.records(self.name, k)
            if sample is not None:
                emission = self.live.of(sample)
                record(self.metrics, sample if emission is None else emission.number, reading)

    def _answered(self, k: int) -> Emission | None:
        """Return the emission of the sample whose prediction a live run gets in this tick."""
        slot = self._schedule.answers(self.name, k) if self.live.patience and self.metrics else None
        emission = None if slot is None else self.live.of(slot)
        return emission if emission is not None and emission.kind is Emits.SAMPLE else None

    def _clear(self, k: int) -> None:
        due = self._clock.due
        if due and isinstance(self.block, HoldBlock):
            self.block.clear(h="h" in due, z="z" in due, omega="omega" in due)
        elif "omega" in due:
            self.block.weights.clear()
        if "z" in due:
            self._clock.z_since = k

    def _compares(self, k: int) -> bool:
        """Return True if tick k takes a loss: not of a sample shown before a clearing."""
        if self.metrics is None or not self._schedule.compares(self.name, k):
            return False
        return k - self._schedule.target_lag(self.name) >= self._clock.h_since

    def records(self) -> Records | None:
        return None if self._recorder is None else self._recorder.records()

    def contents(self) -> BlockContents:
        """Return the tensors of the block and of its output module."""
        block = self.block
        if isinstance(block, HoldReadout):
            return BlockContents([("", block.cell, block.weights)], None, None)
        parts: list[tuple[str, LocalFunction, Weights | None]] = [("", block.cell, block.weights)]
        if block.output is not None:
            parts.append((OUTPUT_KEY, block.output, block.output_weights))
        return BlockContents(parts, block.h, block.z)


class _Clock(Stateful):
    """The step of integration tau of each tick, and the ticks at which states are cleared.

    Attributes:
        due: what is cleared before the present tick's work ('h', 'z', 'omega').
        h_since, z_since: states and messages sent in earlier ticks than these count as cleared.
            Messages that arrive in the tick of the clearing still complete the tick before.
        stopped: True once the stream has ended.
    """

    def __init__(self, reset: ResetSettings, tau: TickSchedule | None) -> None:
        self.due: set[str] = set()
        self.h_since = -math.inf
        self.z_since = -math.inf
        self.stopped = False
        self._reset = {name: when for name, when in reset if when is not Reset.NEVER}
        self._course = tau
        self._told_tau = math.nan
        self._sequence_over = False

    STATE = ("due", "h_since", "z_since", "stopped", "_told_tau", "_sequence_over")

    def advance(self, k: int, first: bool, signal: Signal | None) -> None:
        """Move to tick k, `first` of a sample or not, with the stream's clock signal about it."""
        if not self._reset and signal is None:
            return
        new_sequence = False
        if signal is not None and signal.end:
            self.stopped = True
        elif signal is not None:
            new_sequence, self._sequence_over = self._sequence_over, signal.sequence_end
            if signal.payload is not None:
                self._told_tau = float(signal.payload)
        now = {Reset.SAMPLE: first and k > 0, Reset.SEQUENCE: new_sequence}
        self.due = {name for name, when in self._reset.items() if now[when]}
        if "h" in self.due:
            self.h_since = k

    def tau(self, k: int) -> float:
        """Return the seconds that tick k takes."""
        return self._told_tau if self._course is None else self._course(k)
