"""Watches single updates of blocks: how far they go, and whether backpropagation's go there, too.

Of an update U of block v by sample n, with the weights theta(T) of all blocks at the tick T in
which n enters:

    norm       |theta_{U+1} - theta_U|
    alignment  cos( theta_U - theta_{U+1}, dL_n/dtheta_v at theta(T) )
    feedback   cos( B, W at theta(T) ), of the matrices B of a rule that stand for weights W

The alignment of plain gradient steps at level `backprop` is 1. It falls with the staleness of the
weights and activations that an update is made with, and with whatever else bends its direction:
momentum, Adam, a rule of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hamdist.dynamics.blocks.rule_block import AppliedRule
from hamdist.dynamics.graph.merged import MergedGraph, name_in_merged_graph
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.dynamics.vjp.gradient import norm_of
from hamdist.runtime.nodes.loop import guarded
from hamdist.runtime.nodes.pulse import PulseNode
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.measured import Alignment, ProcessSample

WeightCopies: TypeAlias = dict[str, Tensor]  # of a block, by name
PENDING = 8  # probes of which not all parts have come


class UpdateProbe(NamedTuple):
    """Updates and directions that blocks have computed for one sample.

    Attributes:
        sample: its number.
        before: by block, the weights at the tick in which it entered.
        moved: by block, what its update added to them.
        samples: itself, and those that share its update, by number; empty in other processes than
            the one that draws them.
        feedback: by block whose rule has such matrices, their cosine with its weights.
    """

    sample: int
    before: dict[str, WeightCopies]
    moved: dict[str, WeightCopies]
    samples: dict[int, Any]
    feedback: dict[str, float]


def _weights(node: Any) -> Iterator[tuple[str, Tensor]]:
    for prefix, function, weights in node.contents().parts:
        if weights is not None:
            for name, theta in zip(function.names, weights.theta, strict=True):
                yield prefix + name, theta.detach()


def _copies(node: Any) -> WeightCopies:
    return {name: theta.clone() for name, theta in _weights(node)}


# The following are resumed behind every step of the process, and yield while there is more to see.


def _moved_by(node: Any, update: int) -> Generator[None, None, WeightCopies]:
    """Return what an update (by its number) adds to the weights; nothing if it was missed."""
    while node.block.weights.updates < update:
        yield
    moved = _copies(node) if node.block.weights.updates == update else {}
    while node.block.weights.updates <= update:
        yield
    for name, theta in _weights(node) if moved else ():
        torch.sub(theta, moved[name], out=moved[name])  # in the place of the weights of before
    return moved


def update_norms(nodes: Sequence[Any], norms: dict[str, float]) -> Iterator[None]:
    """Note in `norms` that of each block's next update, one by one, so that one copy is held."""
    for node in nodes:
        moved = yield from _moved_by(node, node.block.weights.updates)
        norms[node.name] = norm_of(list(moved.values()))


def update_probes(
    plan: Plan, nodes: Sequence[Any], source: Any, probes: deque[UpdateProbe]
) -> Iterator[None]:
    """Take probes of one process, of every `metrics.alignment` samples, into `probes`.

    A sample has left the network before the next one is watched, so that all processes watch the
    same ones. `nodes` are as restored; `source` is that of the stream, if it is drawn here.
    """
    schedule, group, under_way = plan.schedule, 1, 0
    if isinstance(schedule, SequenceSchedule):
        raise TypeError("an update of sequences belongs to no sample alone")
    if isinstance(schedule, PulseSchedule):
        group, under_way = schedule.group, schedule.trip // schedule.c
    every = math.lcm(plan.metrics.alignment or 1, group)
    every *= -(-(under_way + 2 + group) // every)
    tick = max(n.tick or 0 for n in (*nodes, *filter(None, [source])))
    for sample in count((schedule.entered(tick) // every + 1) * every, every):
        update = sample // group  # the number of updates before the (last) one by the sample
        if isinstance(schedule, HoldSchedule):
            update = schedule.updates_before(schedule.enters(sample + 1)) - 1
        probe = UpdateProbe(sample, {}, {}, {}, {})
        watched = [_watch(node, schedule.enters(sample), probe) for node in nodes]
        watched += [_note(node, update, probe, node.name in plan.silent) for node in nodes]
        watched += [] if source is None else [_catch(source, sample, group, probe)]
        while watched:
            watched = [n for n in watched if next(n, probe) is None]
            yield
        probes.append(probe)


def _watch(node: Any, tick: int, probe: UpdateProbe) -> Iterator[None]:
    while (node.tick or 0) < tick:
        yield
    if isinstance(node, PulseNode):
        guarded(node, node.take_step)  # (by the samples before, if nothing has waited for it yet)
    probe.before[node.name] = _copies(node)
    rule = getattr(node.block, "rule", None)
    cosine = rule.feedback_cosine() if isinstance(rule, AppliedRule) else None
    if cosine is not None:
        probe.feedback[node.name] = cosine


def _note(node: Any, update: int, probe: UpdateProbe, silent: bool) -> Iterator[None]:
    probe.moved[node.name] = {} if silent else (yield from _moved_by(node, update))


def _catch(source: Any, sample: int, group: int, probe: UpdateProbe) -> Iterator[None]:
    while (source.latest or (-1,))[0] < sample + group - 1:
        yield
        number, caught = source.latest or (-1, None)
        if sample <= number < sample + group:
            probe.samples[number] = caught


class Alignments:
    """Compares updates with backpropagation, as the parts of a probe come from the processes."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._graph = plan, plan.graph
        self._parts: dict[int, UpdateProbe] = {}
        self._latest: Alignment | None = None

    def of(self, processes: Mapping[str, ProcessSample]) -> Alignment | None:
        """Return the latest alignment, with what the processes have brought meanwhile."""
        latest = -1 if self._latest is None else self._latest.sample
        for part in [probe for process in processes.values() for probe in process.probes]:
            if part.sample > latest:
                whole = self._parts.setdefault(
                    part.sample, UpdateProbe(part.sample, {}, {}, {}, {})
                )
                whole.before.update(part.before)
                whole.moved.update(part.moved)
                whole.samples.update(part.samples)
                whole.feedback.update(part.feedback)
        for number, whole in sorted(self._parts.items()):
            if whole.moved.keys() == self._graph.blocks.keys() and whole.samples:
                latest, cosines = number, dict(self._cosines(whole))
                self._latest = Alignment(number, cosines, whole.feedback)
        waiting = [number for number in sorted(self._parts) if number > latest][-PENDING:]
        self._parts = {number: self._parts[number] for number in waiting}
        return self._latest

    @torch.enable_grad()
    def _cosines(self, probe: UpdateProbe) -> Iterator[tuple[str, float]]:
        model, theta, loss = MergedGraph(self._graph), dict[tuple[str, str], Tensor](), None
        for name, key in ((name, key) for name, weights in probe.before.items() for key in weights):
            parameter = model.get_parameter(name_in_merged_graph(name, key))
            parameter.data = probe.before[name][key].to(parameter.device)
            theta[name, key] = parameter.requires_grad_(True)
        for sample in probe.samples.values():
            y: Any = model(sample.u if sample.inputs is None else dict(sample.inputs))
            outputs = y if isinstance(y, Mapping) else {self._graph.readouts[0]: y}
            for name, output in outputs.items():
                target, function = sample.target(name), self._graph.blocks[name].loss
                if target is not None and function is not None:
                    function = self._plan.row_weighted(function, name)
                    loss = function(output, target) + (0 if loss is None else loss)
        if loss is None or not loss.requires_grad:
            return
        slopes = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        exact = dict(zip(theta, slopes, strict=True))
        for name, moved in probe.moved.items():
            pairs = [(step, exact[name, key]) for key, step in moved.items()]
            both = [(step.to(slope.device), slope) for step, slope in pairs if slope is not None]
            lengths = norm_of([step for step, _ in both]) * norm_of([slope for _, slope in both])
            if lengths and math.isfinite(lengths):
                yield name, -sum(float((step * slope).sum()) for step, slope in both) / lengths
