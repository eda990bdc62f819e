"""Costs of the blocks' steps: a few steps of the whole network, in a child of the driver's process.

The run itself is not affected: weights, random numbers, thread counts and whatever a module changes
are the child's own, and the samples are synthetic. A child whose time is up is killed: unlike a
thread it cannot go on beside the run, and a module that never returns costs no more than the limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import signal
import statistics
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hamdist.config import Balance
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Event, Phase
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.errors import HamdistError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.placement.assign_blocks import Costs, by_parameters
from hamdist.runtime.plan.derived import sent_bytes
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.interrupts import interrupts_delayed
from hamdist.runtime.process.threads import cores, torch_threads
from hamdist.runtime.process.usage import keep_freed_memory
from hamdist.runtime.timing.cluster_model import LOCAL_SECONDS
from hamdist.runtime.timing.timed_graph import StepSeconds, TimingModel, signal_seconds
from hamdist.streams.sample import Sample, SampleSpec, TargetSpec, with_weights

ENOUGH_SECONDS = 0.3  # then FEWEST samples in a network that is full are enough
GIVE_UP_SECONDS = 3.0
PREDICTION_SECONDS = 1.0  # at most, where only the prediction of a run needs them
FEWEST, MOST = 3, 64
DEEPEST = 128  # samples that fill a network; a deeper one is measured by the first few samples
SEQUENCE = 4  # tokens of a made-up sequence
STAMP_SECONDS = 1e-3  # between two made-up samples


class Unmeasured(Exception):
    """Raised if the steps could not be measured; the text says why."""


def wants_costs(plan: Plan) -> bool:
    """Return True if the placement depends on the costs of the blocks."""
    engine = plan.engine
    blocks = len(plan.graph.blocks)
    if engine.placement is not None or engine.balance is not Balance.TIME or blocks == 1:
        return False
    if engine.actors == "auto":
        return in_flight(plan) > 1 and (engine.address is not None or cores() > engine.threads)
    return 1 < engine.actors < blocks


def predicts(plan: Plan) -> bool:
    """Return True if a run on Ray says beforehand how fast it will be: on processors (what a block
    takes on a GPU is not known before), by samples that come when they are drawn."""
    devices = {plan.engine.device, *(cast_plan.device for cast_plan in plan.cast_plans.values())}
    return plan.engine.balance is Balance.TIME and devices == {"cpu"} and not plan.spec.live


def measured_costs(plan: Plan, *, portable: bool, limit: float | None = None) -> Costs:
    """Measure the costs that `choose` needs. Raises Unmeasured.

    `portable` is true if an actor draws the stream; limit: as in `measure`.
    """
    seconds = measure(plan, limit=limit)
    return costs_of(TimingModel(plan, seconds, source_host(plan) if portable else None))


def costs_of(model: TimingModel) -> Costs:
    """Return the costs of one sample by a model."""
    plan, source = model.plan, model.source
    order = {name: i for i, name in enumerate(plan.graph.blocks)}
    seconds = [sum(model.seconds.get(name, {}).values()) for name in order]
    if source is not None:
        order[INPUT] = order[source]
        seconds[order[source]] += sum(model.seconds.get(INPUT, {}).values())
    crossings: dict[tuple[int, int], float] = defaultdict(float)
    for arc in model.steps.arcs:
        ends = [order.get(name) for name in (arc.channel.sender, arc.channel.receiver)]
        first, second = sorted(-1 if end is None else end for end in ends)
        if first >= 0 and first != second:
            spent = signal_seconds(arc.channel, sent_bytes(plan, arc.channel), LOCAL_SECONDS)
            crossings[first, second] += spent / model.steps.samples
    pairs = tuple((i, j, spent) for (i, j), spent in crossings.items())
    return Costs(tuple(seconds), pairs, in_flight(plan), model=model)


def unmeasured_costs(plan: Plan) -> Costs | None:
    """Return costs without a measurement, if the schedule lets only one actor work at a time."""
    if in_flight(plan) > 1 or plan.engine.balance is not Balance.TIME:
        return None
    return Costs(tuple(by_parameters(plan.graph)), (), in_flight(plan))


def in_flight(plan: Plan) -> float:
    """Return the samples (or micro-batches) that the schedule has in the network at once.

    A pulse takes 2D + 1 ticks (less where the first blocks are frozen), a token of a sequence D + 1
    in either direction, and one enters every c ticks. In presentation `hold` all blocks step in
    every tick.
    """
    schedule = plan.schedule
    if isinstance(schedule, HoldSchedule):
        return math.inf
    ticks = schedule.trip if isinstance(schedule, PulseSchedule) else plan.graph.depth + 1
    parts = schedule.parts if isinstance(schedule, PulseSchedule) else 1  # of a sample
    return max(1.0, parts * ticks / schedule.c)


def source_host(plan: Plan) -> str:
    """Return the first block that reads the stream, or else the first with a target."""
    readers = {e.child for e in plan.graph.out_of[INPUT]} or set(plan.graph.readouts)
    return next(name for name in plan.graph.blocks if name in readers)


def measure(
    plan: Plan, clock: Callable[[], float] | None = None, limit: float | None = None
) -> StepSeconds:
    """Return the seconds of work for one sample, by block (and 'u', the stream's checks) and phase.

    They are medians over the later samples in a network that is full (but see DEEPEST). `clock`
    replaces the processor's; limit: seconds that all of it may take, instead of GIVE_UP_SECONDS.
    Raises Unmeasured if a block fails, or takes too long.
    """
    spec = replace(plan.spec, patience=0, kept=False, live=False)  # (nobody talks to a trial)
    plan = replace(plan, spec=spec)
    answer = _in_child(_Trial(plan, clock).answer, limit or GIVE_UP_SECONDS)
    if isinstance(answer, str):
        raise Unmeasured(answer)
    return {
        name: {Phase(value): seconds for value, seconds in phases.items()}
        for name, phases in answer.items()
    }


_Answer: TypeAlias = dict[str, dict[str, float]] | str  # the seconds, or why there are none


def _in_child(work: Callable[[], _Answer], seconds: float) -> _Answer:
    """Return the result of `work` in a child of this process, which has ended when this returns."""
    if not hasattr(os, "fork"):
        return "this platform cannot copy a process"
    reader, writer = Pipe(duplex=False)
    children: list[int] = []

    def fork() -> None:
        with contextlib.suppress(OSError):
            child = os.fork()
            if child:
                children.append(child)
                return
            try:
                gc.freeze()  # handles of Ray's among the parent's garbage stay quiet (session.py)
                keep_freed_memory()  # as a run does
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(math.ceil(seconds) + 1)  # should its parent be lost meanwhile
                writer.send_bytes(json.dumps(work()).encode())
            finally:
                os._exit(0)

    with reader:
        try:
            with writer, warnings.catch_warnings(), interrupts_delayed():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
                # Out of a new thread: the child's first one then has no pool of OpenMP threads yet,
                # which it would wait for, as they were not copied.
                thread = threading.Thread(target=fork)
                thread.start()
                thread.join()
            if not reader.poll(seconds):
                return f"the first samples took more than {seconds:g} s"
            answer: _Answer = json.loads(reader.recv_bytes())
            return answer
        except (EOFError, OSError):
            return "its process ended before it had an answer, or could not be started"
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):  # somebody else waits for all
                    os.waitpid(child, 0)


class _Trial:
    """The network, stepped under a clock."""

    def __init__(self, plan: Plan, clock: Callable[[], float] | None) -> None:
        # Here, as this process may see no GPU. (What a block takes there is not known before.)
        cast_plans = {name: cast_plan.at("cpu") for name, cast_plan in plan.cast_plans.items()}
        self._plan = dataclasses.replace(plan, steps=None, cast_plans=cast_plans)
        trip = 1 if plan.knobs.sequence else 2 * plan.graph.depth // plan.schedule.c + 1
        self._deep = trip > DEEPEST or plan.knobs.own is not None  # (whose rounds may be uneven)
        # Samples until all blocks work
        self._full = SEQUENCE if plan.knobs.sequence else 1 if self._deep else trip
        self._samples = self._full + (FEWEST if self._deep else MOST)
        # The time of this thread alone, where all work is done in it: others may be busy.
        self._clock = clock or (time.perf_counter if plan.engine.threads > 1 else time.thread_time)

    def answer(self) -> _Answer:
        """Return the seconds by node, or the reason why there are none."""
        try:
            with torch_threads(self._plan.engine.threads):
                return self._seconds()
        except HamdistError as error:
            return str(error).splitlines()[0]

    def _seconds(self) -> dict[str, dict[str, float]]:
        plan = self._plan
        mailbox = Mailbox({INPUT, *plan.graph.blocks})
        source = SourceNode(plan, _Examples(plan.spec, self._samples), mailbox)
        nodes = [make_node(plan, name, mailbox) for name in plan.graph.blocks]
        timed = [_Timed(node, self._clock) for node in (source, *nodes)]
        begin, first = time.perf_counter(), self._clock()

        def between() -> None:
            late = time.perf_counter() - begin > ENOUGH_SECONDS
            if late and source.samples >= self._full + FEWEST:
                source.stop.set()

        run_loop(timed, between)
        # What the loop does around a step (heap, requests, measurements) counts as part of it.
        steps = [s for node in timed for _, s in node.spent]
        around = max(0.0, self._clock() - first - sum(steps)) / len(steps)
        seconds: dict[str, dict[str, float]] = {}
        c = plan.schedule.c
        # (what a process meets first, copied pages and code that is new to it, takes longer)
        warm = self._full + (source.samples - self._full) // 2
        steady = range(min(warm, source.samples - FEWEST), source.samples)
        parts = plan.schedule.parts if isinstance(plan.schedule, PulseSchedule) else 1
        for node in timed:
            periods: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
            for event, spent in node.spent:
                period = event.sample // parts if self._deep else event.tick // c
                periods[event.phase.value][period] += spent + around
            seconds[node.name] = {
                phase: sum(times.values()) / source.samples
                if plan.knobs.sequence
                else statistics.median(times[i] for i in steady)
                for phase, times in periods.items()
            }
        return seconds


class _Timed:
    """A node that records the time of its steps: (event, seconds)."""

    def __init__(self, node: Any, clock: Callable[[], float]) -> None:
        self._node = node
        self._clock = clock
        self.name = node.name
        self.late = node.late
        self.event, self.tick = node.event, node.tick
        self.spent: list[tuple[Event, float]] = []

    def start(self) -> None:
        self._node.start()
        self.event, self.tick = self._node.event, self._node.tick

    def step(self) -> None:
        begin = self._clock()
        self._node.step()
        self.spent.append((self.event, self._clock() - begin))
        self.event, self.tick = self._node.event, self._node.tick


class _Examples:
    """A stream of a given number of synthetic samples, in the stream's shapes and types."""

    portable = True

    def __init__(self, spec: SampleSpec, number: int) -> None:
        self.spec = spec
        self._number = number

    def samples(self) -> Iterator[Sample]:
        sample = example_sample(self.spec)
        for n in range(self._number):
            end = n % SEQUENCE == SEQUENCE - 1
            yield dataclasses.replace(sample, end=end, time=n * STAMP_SECONDS)


def example_sample(spec: SampleSpec) -> Sample:
    """Return a synthetic sample of the shapes and types of `spec`, with all its targets."""
    y = (
        _example_target(spec.target(""), spec.weighted)
        if spec.targets is None
        else {name: _example_target(spec.target(name), spec.weighted) for name in spec.targets}
    )
    inputs = example_inputs(spec)
    several = inputs if isinstance(inputs, dict) else None
    return Sample(example_input(spec), y, inputs=several)


def example_input(spec: SampleSpec) -> Tensor:
    """Return the (first) input of the shape and type of `spec`: a real one, if `spec` has one."""
    return _example(spec, next(iter(spec.parents)), spec.u_shape, spec.u_dtype)


def example_inputs(spec: SampleSpec) -> Tensor | dict[str, Tensor]:
    """Return what a model takes: its input, or several by name."""
    if spec.inputs is None:
        return example_input(spec)
    return {
        name: _example(spec, f"{INPUT}.{name}", u.shape, u.dtype) for name, u in spec.inputs.items()
    }


def _example(spec: SampleSpec, parent: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    real = (spec.example or {}).get(parent)
    if real is not None and real.shape == shape:
        return real.to(dtype, copy=True)
    if not dtype.is_floating_point:
        return (torch.arange(math.prod(shape)) % (spec.tokens or 1)).reshape(shape).to(dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=dtype, generator=generator)


def _example_target(spec: TargetSpec | None, weighted: bool) -> Tensor | None:
    y = None if spec is None else torch.zeros(spec.shape, dtype=spec.dtype)
    return with_weights(y, torch.ones(len(y))) if weighted and y is not None else y
