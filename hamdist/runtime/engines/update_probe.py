"""Watches single updates of blocks: how far they go, and whether backpropagation's go there, too.

Of an update U of block v by sample n, with the weights theta(T) of all blocks at the tick T in
which n enters:

    norm       |theta_{U+1} - theta_U|
    alignment  cos( theta_U - theta_{U+1}, dL_n/dtheta_v at theta(T) )

The alignment of plain gradient steps at level `backprop` is 1. It falls with the staleness of the
weights and activations that an update is made with, and with whatever else bends its direction:
momentum, Adam, a rule of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hamdist.dynamics.graph.graph import OUTPUT_KEY
from hamdist.dynamics.graph.merged import MergedGraph
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.vjp.gradient import norm_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.measured import Alignment, ProcessSample

WeightCopies: TypeAlias = Mapping[str, Tensor]  # of a block's weights, by name
KEPT = 4  # probes that wait to be fetched
PENDING = 8  # probes of which not all parts have come


class UpdateProbe(NamedTuple):
    """What the blocks of one process have made of one sample.

    Attributes:
        sample: its number.
        before: by block, the weights at the tick in which it entered.
        moved: by block, what its update added to them.
        samples: itself, with those that share its update, if the stream is drawn here.
    """

    sample: int
    before: Mapping[str, WeightCopies]
    moved: Mapping[str, WeightCopies]
    samples: Sequence[Any]


def _copies(node: Any) -> WeightCopies:
    parts = [part for part in node.contents().parts if part[2] is not None]
    return {
        prefix + name: theta.detach().clone()
        for prefix, function, weights in parts
        for name, theta in zip(function.names, weights.theta, strict=True)
    }


def _moved(node: Any, before: WeightCopies) -> WeightCopies:
    return {name: theta.sub_(before[name]) for name, theta in _copies(node).items()}


class UpdateNorms:
    """The norms of updates, of one block after the other, so that one is copied at a time.

    Attributes:
        latest: by block, of the latest update that was watched.
    """

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._nodes = nodes
        self._waiting: deque[Any] = deque()
        self._before: WeightCopies = {}
        self._next = math.inf  # number of updates behind which the first block is measured
        self.latest: dict[str, float] = {}

    @property
    def due(self) -> bool:
        """Return True if the watched block has moved."""
        return bool(self._waiting) and self._waiting[0].block.weights.updates >= self._next

    def begin(self) -> None:
        """Watch each block's next update, unless some of the last round are still to come."""
        if not self._waiting:
            self._waiting.extend(self._nodes)
            self._watch()

    def look(self) -> None:
        """Measure the update of the watched block, and watch the next one."""
        node = self._waiting.popleft()
        if node.block.weights.updates == self._next:
            self.latest[node.name] = norm_of(list(_moved(node, self._before).values()))
        self._watch()

    def _watch(self) -> None:
        self._before, self._next = {}, math.inf
        if self._waiting:
            node = self._waiting[0]
            self._before, self._next = _copies(node), node.block.weights.updates + 1


class UpdateProbes:
    """Takes probes of the blocks of one process, of every `metrics.alignment` samples."""

    def __init__(self, plan: Plan, nodes: Sequence[Any], source: Any) -> None:
        self._nodes, self._source, self._schedule = nodes, source, plan.schedule
        schedule, every = plan.schedule, plan.metrics.alignment or 1
        self._group = schedule.group if isinstance(schedule, PulseSchedule) else 1
        # A sample has left the network before the next one is watched, in every process.
        under_way = schedule.trip // schedule.c + 2 if isinstance(schedule, PulseSchedule) else 2
        every = math.lcm(every, self._group)
        self._every = every * -(-(under_way + self._group) // every)
        begun = max((one.tick or 0 for one in (*nodes, source) if one is not None), default=0)
        self._sample = (begun // schedule.c // self._every + 1) * self._every
        self.taken: deque[UpdateProbe] = deque(maxlen=KEPT)
        self._start()

    def _start(self) -> None:
        self._probe = UpdateProbe(self._sample, {}, {}, [])
        self._earlier: dict[str, WeightCopies] = {}
        self._open = list(self._nodes)

    @property
    def _update(self) -> int:
        """Return the number of updates before the (last) one by the sample."""
        if isinstance(self._schedule, HoldSchedule):
            return self._schedule.updates_before((self._sample + 1) * self._schedule.c) - 1
        return self._sample // self._group

    def look(self) -> None:
        """Look at all blocks, behind a step of any."""
        source, samples = self._source, self._probe.samples
        if source is not None and source.latest is not None and isinstance(samples, list):
            number, sample = source.latest
            if number - self._sample == len(samples) < self._group:
                samples.append(sample)
        self._open = [node for node in self._open if not self._ended(node)]
        if not self._open and (source is None or len(samples) == self._group):
            self.taken.append(self._probe)
            self._sample += self._every
            self._start()

    def _ended(self, node: Any) -> bool:
        name, updates, due = node.name, node.block.weights.updates, self._update
        probe: Any = self._probe
        if name not in probe.before and (node.tick or 0) >= self._sample * self._schedule.c:
            probe.before[name] = _copies(node)
        if updates == due and name not in self._earlier:
            self._earlier[name] = _copies(node)
        if updates <= due or name not in probe.before:
            return False
        earlier = self._earlier.get(name)
        probe.moved[name] = {} if earlier is None or updates > due + 1 else _moved(node, earlier)
        return True


class Alignments:
    """Compares updates with backpropagation, as the parts of a probe come from the processes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._parts: dict[int, list[UpdateProbe]] = {}
        self._latest: Alignment | None = None

    def of(self, samples: Mapping[str, ProcessSample]) -> Alignment | None:
        """Return the latest alignment, with what the processes have brought meanwhile."""
        for probe in [one for sample in samples.values() for one in sample.probes]:
            parts = self._parts.setdefault(probe.sample, [])
            if all(probe is not one for one in parts):
                parts.append(probe)
        for number in sorted(self._parts):
            parts = self._parts[number]
            there = {name for part in parts for name in part.moved}
            if self._latest is not None and number <= self._latest.sample:
                del self._parts[number]
            elif there == set(self._plan.graph.blocks) and any(part.samples for part in parts):
                self._latest = Alignment(number, dict(self._cosines(parts)))
        for number in sorted(self._parts)[:-PENDING]:
            del self._parts[number]
        return self._latest

    @torch.enable_grad()
    def _cosines(self, parts: Sequence[UpdateProbe]) -> Iterator[tuple[str, float]]:
        graph, model = self._plan.graph, MergedGraph(self._plan.graph)
        blocks: Any = model.blocks
        theta: dict[tuple[str, str], Tensor] = {}
        for name, weights in ((n, o) for part in parts for n, o in part.before.items()):
            for key, value in weights.items():
                module = blocks[name].output if key.startswith(OUTPUT_KEY) else blocks[name].module
                parameter = module.get_parameter(key.removeprefix(OUTPUT_KEY))
                parameter.data = value.to(parameter.device)
                theta[name, key] = parameter.requires_grad_(True)
        loss: Any = 0.0
        for sample in (one for part in parts for one in part.samples):
            predictions: Any = model(sample.u if sample.inputs is None else dict(sample.inputs))
            outputs = (
                predictions
                if isinstance(predictions, Mapping)
                else {graph.readouts[0]: predictions}
            )
            for name, output in outputs.items():
                target, function = sample.target(name), graph.blocks[name].loss
                if target is not None and function is not None:
                    loss = loss + function(output, target)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        slopes = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        exact = dict(zip(theta, slopes, strict=True))
        for name, moved in ((n, o) for part in parts for n, o in part.moved.items()):
            pairs = [(step, exact[name, key]) for key, step in moved.items()]
            both = [(step.to(slope.device), slope) for step, slope in pairs if slope is not None]
            lengths = norm_of([step for step, _ in both]) * norm_of([slope for _, slope in both])
            if lengths and math.isfinite(lengths):
                yield name, -sum(float((step * slope).sum()) for step, slope in both) / lengths
