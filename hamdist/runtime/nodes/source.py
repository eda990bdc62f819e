"""The stream as a node: it draws, checks and sends the samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from threading import Event as Flag
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hamdist.dynamics.graph.inputs import INPUT, by_parent, rows_of
from hamdist.dynamics.saved_state.stateful import check_names
from hamdist.dynamics.schedule.events import Event, Stamp
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.dynamics.updates.constants import TOLERANCE
from hamdist.errors import SnapshotError, StreamError
from hamdist.runtime.nodes.emissions import emission_of
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.checks import carries
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.cast import CPU
from hamdist.runtime.signals.signal import Aborted, Signal, ready
from hamdist.streams.check import Checker
from hamdist.streams.live import live_of
from hamdist.streams.replay import next_sample, passed_over, replays, samples_from
from hamdist.streams.sample import Emission, Emits, Sample, Stream, report_of
from hamdist.streams.smoothness import Smoothness

ADDED = ("emission", "rows", "counts")  # what files of earlier formats lack


class SourceNode:
    """The stream: draws, checks and sends one sample every c ticks.

    Where time stamps give the step of integration, or where sequences have to end, it draws one
    sample ahead: how long a sample lasts, and that it was the last, shows only then.
    """

    name = INPUT
    late = False

    def __init__(self, plan: Plan, stream: Stream, mailbox: Mailbox) -> None:
        self._plan = plan
        self._stream = stream
        self._mailbox = mailbox
        parts = plan.knobs.microbatches
        self._parts = parts if isinstance(parts, int) else 1
        self._batched = {
            name for name, u in plan.spec.parents.items() if u[0][0] == plan.spec.batch
        }
        self._events: Iterator[Event] = iter(())
        if isinstance(plan.schedule, SequenceSchedule):
            self.event = plan.schedule.emission(plan.schedule.opening(), 0)
        else:
            self._events = plan.schedule.emissions()
            self.event = next(self._events)
        into = plan.graph.out_of[INPUT]
        self._inputs = [plan.channels.states[e.index] for e in into]
        self._names = [e.parent for e in into]
        self._targets = plan.channels.targets
        self._clocks = list(plan.channels.clocks.values())
        self._live = live_of(stream)
        if self._live is not None:
            self._live.drain, self._live.whole = plan.schedule.idle, plan.knobs.sequence
        self._emission: Emission | None = None  # of the latest sample
        self._labels = [c for c in plan.channels.labels.values() if c.sender == INPUT]
        sequences = plan.knobs.sequence and not plan.spec.live  # (whose ends are fed)
        self._ahead = plan.dynamics.tau is None or sequences
        self._next: Sample | None = None  # drawn ahead, or not yet sent in all its parts
        self._tau = math.nan
        self._check = checker_of(plan)
        self.smoothness = Smoothness()
        self._before = 0  # emissions that were not idle, of an earlier run
        self._sent = self.rows = 0  # of the samples sent
        self.latest: tuple[int, Sample] | None = None
        self.stop = Flag()
        self.tick: int | None = self.event.tick
        self._drawn: Iterator[Sample] | None = None
        self._count_drawn = 0  # drawn
        self.failure: StreamError | None = None  # of the stream, behind its first sample
        self.seconds = 0.0  # of drawing samples
        self._counts: dict[str, int] | None = None  # of a stream that was over, and is not drawn

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts of the stream, such as dropped samples."""
        return report_of(self._stream) if self._counts is None else self._counts

    @property
    def samples(self) -> int:
        """Return the number of samples sent; each counts once, though it may pass twice."""
        return self._sent

    @property
    def passed(self) -> int:
        """Return the number of samples that the stream has passed over."""
        return passed_over(self._stream)

    def waits_with(self, serve: Callable[[], None]) -> None:
        """Have `serve` called while a live stream has nothing to emit."""

        def look() -> None:
            serve()
            if self._live is not None and self.stop.is_set():
                self._live.close()

        if self._live is not None:
            self._live.serve = look

    def start(self) -> None:
        self._drawn = self._behind(0, self._plan.passed)
        if self._ahead:
            self._next = self._draw(0)

    def _behind(self, samples: int, passed: int) -> Iterator[Sample]:
        """Return what the stream gives behind the samples of an earlier run and `samples` more."""
        skip = self._plan.skip
        if not self._plan.spec.patience or not skip or not replays(self._stream):
            return samples_from(self._stream, skip + samples, passed)
        drawn = samples_from(self._stream, 0, passed)
        for emission in (sample.emission for sample in drawn):
            self._before += emission is not None and emission.kind is not Emits.IDLE
            if (
                emission is not None
                and emission.kind is Emits.SAMPLE
                and emission.number == skip - 1
            ):
                break
        return itertools.islice(drawn, samples, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the statistics of it so far."""
        ahead = self._next
        return {
            "event": self.event,
            "tick": self.tick,
            "samples": self._sent,
            "rows": self.rows,
            "counts": self.counts,
            "drawn": self._count_drawn,
            "passed": self.passed,
            "next": None if ahead is None else _fields(ahead),
            "tau": self._tau,
            "time": self._check.last,
            "smoothness": self.smoothness.state_dict(),
            "emission": None if self._emission is None else [float(n) for n in self._emission],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, instead of `start`: the stream is drawn again up to there."""
        names = ("event", "tick", "samples", "drawn", "passed", "next", "tau", "time", "smoothness")
        emission = state.get("emission")
        check_names("stream", {n: v for n, v in state.items() if n not in ADDED}, names)
        if self._plan.spec.patience and emission is None and state["drawn"]:
            raise SnapshotError(
                "the state of a stream with late labels was saved by an earlier version of "
                "hamdist, which counted their samples in another way: begin anew with its weights"
            )
        self._emission = None if emission is None else emission_of(emission)
        self.event, self.tick, self._sent = state["event"], state["tick"], state["samples"]
        self.rows = state.get("rows", self._sent * self._plan.spec.batch)
        self._tau, self._check.last = state["tau"], state["time"]
        self.smoothness.load_state_dict(state["smoothness"])
        self._count_drawn = state["drawn"]
        self._next = None if state["next"] is None else _heard(state["next"])
        if not isinstance(self._plan.schedule, SequenceSchedule):
            self._events = self._plan.schedule.emissions(self.event.sample + 1)
        if self.tick is not None:
            self._drawn = self._behind(self._count_drawn, state["passed"])
        else:
            self._counts = state.get("counts")

    def step(self) -> None:
        stamp = Stamp(self.event.tick, self.event.sample, 0)
        part = self.event.sample % self._parts
        sample = self._take()
        if sample is None:
            ways = (*self._inputs, *self._targets.values(), *self._clocks, *self._labels)
            for channel in ways:
                self._mailbox.post(channel, Signal(stamp, end=True))
            self.tick = None
            return
        idle = self._emission is not None and self._emission.kind is Emits.IDLE
        end = sample.end or (self._ahead and self._next is None)
        end = end or (idle and self._plan.knobs.sequence)  # (an empty sequence)
        inputs_of = {INPUT: sample.u} if sample.inputs is None else by_parent(sample.inputs)
        emission = self._emission
        is_label = self._plan.spec.kept and emission is not None and emission.kind is Emits.AGAIN
        nothing = self._plan.knobs.pulse and (idle or is_label)
        inputs = {n: None if nothing else self._part(n, u, part) for n, u in inputs_of.items()}
        for name, channel in zip(self._names, self._inputs, strict=True):
            self._mailbox.post(channel, Signal(stamp, inputs[name], sequence_end=end))
        if not part:
            self._post_targets(sample, stamp, end=end)
        self.latest = None if idle or is_label else (self.event.sample, sample)
        self.event = self._following(last=end)
        self.tick = self.event.tick

    def _part(self, name: str, u: Tensor, part: int) -> Tensor | None:
        """Return the part of an input to send; None if a batch has fewer rows than parts."""
        if self._parts == 1 or name not in self._batched:
            return ready(u)
        rows = rows_of(len(u), self._parts, part)
        return ready(u[rows.start : rows.stop]) if rows else None

    def _post_targets(self, sample: Sample, stamp: Stamp, *, end: bool) -> None:
        """Send what else belongs to a sample, which then has been sent."""
        for readout, channel in self._targets.items():
            y = sample.target(readout)
            payload = None if y is None else ready(y)
            self._mailbox.post(channel, Signal(stamp, payload, sequence_end=end))
        if self._labels:
            y = sample.target(self._plan.label_readout)
            label = None if y is None else ready(y)
            for channel in self._labels:
                self._mailbox.post(channel, Signal(stamp, label, sequence_end=end))
        if self._clocks:
            clock = self._time(sample)
            if self._emission is not None:
                clock = torch.tensor(self._emission, dtype=torch.float64)
            for channel in self._clocks:
                self._mailbox.post(channel, Signal(stamp, clock, sequence_end=end))
        if self._emission is None or self._emission.kind is Emits.SAMPLE:
            self._sent, self.rows = self._sent + 1, self.rows + len(sample.u)

    def _following(self, *, last: bool) -> Event:
        """Return the next event. last: the sample was the last one of its sequence."""
        schedule = self._plan.schedule
        if isinstance(schedule, SequenceSchedule):
            return schedule.after_emission(schedule.closed(self.event) if last else self.event)
        return next(self._events)

    def _take(self) -> Sample | None:
        """Return the sample to send; None at the end of the stream."""
        n, part = divmod(self.event.sample, self._parts)
        if self._parts > 1:
            sample = self._next if part else self._draw(n)
            self._next = None if part == self._parts - 1 else sample
            return sample
        if not self._ahead:
            return self._draw(n)
        sample = self._next
        self._next = None if sample is None else self._draw(n + 1)
        if self.stop.is_set() and n == 0 and self._next is None and self._plan.dynamics.tau is None:
            return None  # called off before there was a second time stamp
        return sample

    def _time(self, sample: Sample) -> Tensor | None:
        """tau of the ticks in which `sample` is shown: its time until the next one, in equal parts
        (of the last one: as before)."""
        if self._plan.dynamics.tau is not None:
            return None
        n, c = self.event.sample, self._plan.schedule.c
        after = self._next
        if after is not None and after.time is not None and sample.time is not None:  # (checked)
            self._tau = (after.time - sample.time) / c
        largest = max(self._plan.dynamics.speeds())
        if not 0 < self._tau * largest <= 1 + TOLERANCE:
            raise StreamError(
                f"sample {n}: a step of tau = {self._tau:g} s until the next sample makes c tau = "
                f"{self._tau * largest:g}, which has to lie in (0, 1]: use a smaller dynamics.c, "
                "or a higher locality.speed (ticks per sample); a stream of one sample has no step"
            )
        return torch.tensor(self._tau, dtype=torch.float64)

    def _draw(self, n: int) -> Sample | None:
        """Return sample n, checked; None at the end of the stream, or when the run is stopped."""
        steps = self._plan.steps
        n = (self._sent if self._plan.spec.patience else n) + self._plan.skip
        if self._live is not None:
            self._live.tick = self.event.tick
        if self._drawn is None or self.stop.is_set() or (steps is not None and n >= steps):
            return None
        begin = perf_counter()
        try:
            sample = next_sample(self._drawn, n, Aborted)
            if sample is None:
                return None
            emission = sample.emission
            n = emission.number if emission is not None and emission.kind is Emits.AGAIN else n
            sample = self._check.check(n, sample)
        except StreamError as error:
            if not self._count_drawn:
                raise
            self.failure, self._drawn = error, None  # the run ends, and says so with its result
            return None
        finally:
            self.seconds += perf_counter() - begin
        self._count_drawn += 1
        if emission is not None and self._live is None:  # (counted in this run)
            shown, number = emission.shown - self._before, emission.number - self._plan.skip
            emission = emission._replace(shown=shown, number=number)
        self._emission = emission
        if emission is None or emission.kind is Emits.SAMPLE:
            self.smoothness.observe(sample.u)
        return sample


def checker_of(plan: Plan) -> Checker:
    """Return the gate that all samples of a run pass."""
    return Checker(
        plan.spec,
        equal_batches=not plan.knobs.pulse or carries(plan.graph),
        stamped=plan.dynamics.tau is None,
        ignore_index=plan.ignore_index,
        one_length=plan.one_length,
        one_row=plan.one_row,
    )


def _fields(sample: Sample) -> dict[str, Any]:
    """Return a checked sample as plain data."""
    inputs = None if sample.inputs is None else dict(sample.inputs)
    y = dict(sample.y) if isinstance(sample.y, Mapping) else sample.y
    return {"u": sample.u, "y": y, "end": sample.end, "time": sample.time, "inputs": inputs}


def _heard(values: Mapping[str, Any]) -> Sample:
    check_names("sample", values, ("u", "y", "end", "time", "inputs"))
    return Sample(values["u"], values["y"], values["end"], values["time"], inputs=values["inputs"])
