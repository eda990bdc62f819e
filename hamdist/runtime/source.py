"""The stream as a node: it draws, checks and sends the samples."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event as Flag

from hamdist.dynamics.graph import INPUT
from hamdist.dynamics.schedule import emitted, source_events
from hamdist.errors import StreamError
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.plan import Plan
from hamdist.runtime.signal import Signal, ready
from hamdist.streams.check import Checker
from hamdist.streams.sample import Sample, Stream
from hamdist.streams.smoothness import Smoothness


class SourceNode:
    """The stream: draws, checks and sends one sample every c ticks."""

    name = INPUT

    def __init__(self, plan: Plan, stream: Stream, mail: Mailroom) -> None:
        self._plan = plan
        self._stream = stream
        self._mail = mail
        self._events = source_events(plan.schedule.c)
        self.event = next(self._events)
        self._inputs = [plan.channels.states[e.index] for e in plan.graph.out_of[INPUT]]
        self._targets = list(plan.channels.targets.values())
        self._check = Checker(plan.spec, equal_batches=not plan.knobs.pulse)
        self.smoothness = Smoothness()
        self.samples = 0
        self.stop = Flag()
        self.tick: int | None = self.event.tick
        self._drawn: Iterator[Sample] | None = None

    def start(self) -> None:
        self._drawn = iter(self._stream.samples())

    def step(self) -> None:
        stamp = emitted(self.event.sample, self._plan.schedule.c)
        sample = self._draw()
        if sample is None:
            for channel in (*self._inputs, *self._targets):
                self._mail.post(channel, Signal(stamp, end=True))
            self.tick = None
            return
        u = ready(sample.u)
        y = None if sample.y is None else ready(sample.y)
        for channel in self._inputs:
            self._mail.post(channel, Signal(stamp, u, sequence_end=sample.end))
        for channel in self._targets:
            self._mail.post(channel, Signal(stamp, y, sequence_end=sample.end))
        self.samples += 1
        self.event = next(self._events)
        self.tick = self.event.tick

    def _draw(self) -> Sample | None:
        """The next sample, checked; None at the end of the stream, or when the run is stopped."""
        n, steps = self.event.sample, self._plan.steps
        if self._drawn is None or self.stop.is_set() or (steps is not None and n >= steps):
            return None
        try:
            sample = next(self._drawn, None)
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(
                f"sample {n}: the stream raised {type(error).__name__}: {error}"
            ) from error
        if sample is None:
            return None
        sample = self._check.check(n, sample)
        self.smoothness.observe(sample.u)
        return sample
