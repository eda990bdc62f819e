"""Nodes: a block (or the stream) together with its schedule and its channels.

A node does one event at a time: it takes the signals that the schedule names, has the block do the
phase, and posts the results. The nodes of a process are stepped in the order of their ticks
(loop.py). What a node needs at tick k was sent at an earlier tick, so this order never waits in a
circle.

The end of a stream travels as a signal, too. A pulse block then finishes the messages of the
samples that have passed it. A sequence block has finished its sequences already, since the last
token of each is tagged as the last. A held block stops when the end has arrived along every path
from the input, and reads the last states of parents that stopped before it. In a graph with cycles
it stops when the end first arrives along any edge, in either direction.
"""

from __future__ import annotations

import pickle
import random
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.config import Compensation, Credit, Memory, StepKind
from hamdist.dynamics.blocks.block import BlockParts
from hamdist.dynamics.blocks.gate import RetrospectiveInput
from hamdist.dynamics.blocks.heads import FrozenBlock, Head, HeadBlock, HeadUpdate
from hamdist.dynamics.blocks.hold import HoldBlock, HoldReadout
from hamdist.dynamics.blocks.microbatch_reading import MicrobatchReading
from hamdist.dynamics.blocks.pulse import KeepingReadout, PulseBlock, PulseReadout, ReversibleBlock
from hamdist.dynamics.blocks.readout_loss import ReadoutLoss
from hamdist.dynamics.blocks.rule_block import AppliedRule, RelaxingBlock, RuleBlock, RuleReadout
from hamdist.dynamics.blocks.sequence import SequenceBlock, SequenceReadout
from hamdist.dynamics.finite import StepFactor, bounded
from hamdist.dynamics.graph.graph import INPUT, OUTPUT_KEY, Combine, Joining, combined
from hamdist.dynamics.native import rows
from hamdist.dynamics.objective.losses import LossFunction
from hamdist.dynamics.rules.rule import MEMORY, BlockView, Rule
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.updates.constants import Dynamics, constant_tau
from hamdist.dynamics.updates.optimizers import OptimizerWeights
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autocast import AutocastFunction
from hamdist.dynamics.vjp.autograd import AutogradFunction, may_write
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.dynamics.vjp.local_function import LocalFunction
from hamdist.dynamics.vjp.seeding import OwnGenerator, block_seed, draws, seeded_loss
from hamdist.dynamics.vjp.wrapping import JoinedFunction, TiedFunction
from hamdist.errors import ClusterError, GraphError, HamdistError, LevelError
from hamdist.loading import shortened
from hamdist.runtime.nodes.emissions import LiveBlock
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.pulse import PulseNode
from hamdist.runtime.nodes.sequence import SequenceNode
from hamdist.runtime.plan.checks import rules_by_block
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.cast import CastBorder


def ticks_of(nodes: Sequence[PulseNode | HoldNode | SequenceNode]) -> int:
    """Return how many ticks the nodes have completed."""
    return max((node.event.tick + 1 for node in nodes), default=0)


def make_node(plan: Plan, name: str, mailbox: Mailbox) -> PulseNode | HoldNode | SequenceNode:
    """Make the node of block `name`, with a random generator of its own."""
    parts = _Parts(plan, name)
    node: PulseNode | HoldNode | SequenceNode
    if plan.knobs.sequence:
        node = SequenceNode(plan, parts.spec, mailbox, _sequence_block(plan, parts))
    elif plan.knobs.pulse:
        node = PulseNode(plan, parts.spec, mailbox, _pulse_block(plan, parts))
    else:
        node = HoldNode(plan, parts.spec, mailbox, _hold_block(plan, parts))
    node.live = parts.live
    return node


class _Parts(BlockParts):
    """The parts of block `name`, with its loss."""

    def __init__(self, plan: Plan, name: str) -> None:
        self._plan = plan
        self.name = name
        self.spec = plan.graph.blocks[name]
        self.dynamics = plan.dynamics.of(name)
        self.guard = bounded(self.dynamics.limit, [e.from_input for e in plan.graph.into[name]])
        self.border = CastBorder(plan.cast_plans.get(name))
        for module in (self.spec.module, self.spec.output):
            if module is not None and self.border.device.type != "cpu":
                module.to(self.border.device)
        self.cell = self.make_function(self.spec.module, name)
        ties = [tie for tie in plan.graph.ties if name in (tie.owner, tie.user)]
        if ties:
            shared = [key for tie in ties if tie.user == name for key in tie.theirs]
            self.cell = TiedFunction(self.cell, shared)
        self.weights = self.make_weights(self.cell)
        parts = plan.knobs.microbatches
        self.microbatches = parts if isinstance(parts, int) else 1
        self.group, self.double_buffered = plan.knobs.accumulate, plan.knobs.double_buffered
        schedule = plan.schedule
        self.by_network = isinstance(schedule, PulseSchedule) and name in schedule.stepping
        self.live = LiveBlock(name, plan.spec.patience, self.microbatches)
        self.factor = self._scaled(self.weights, partial(plan.block_factor, name))
        self.wanted = [e.index in plan.channels.messages for e in plan.graph.into[name]]
        loss = self.spec.loss
        self.loss = None if loss is None else self.make_loss(loss, f"{name}/loss")

    def _scaled(self, weights: Weights, factor: StepFactor) -> StepFactor:
        """Return the scale of beta by sample: the run's course, and what a live run sets."""
        return self.live.scaled(weights.scaled_by(factor, self._plan.sample_of))

    def make_loss(self, loss: LossFunction, seed_name: str) -> ReadoutLoss:
        """Make the loss of a readout, with random numbers drawn from the seed of that name."""
        plan = self._plan
        loss = plan.row_weighted(loss, plan.label_readout if self.spec.loss is None else self.name)
        seeded = seeded_loss(loss, block_seed(plan.seed, seed_name), self.border.device)
        return ReadoutLoss(seeded, self.dynamics, self.guard, native=plan.native)

    def make_function(self, module: nn.Module, seed_name: str) -> LocalFunction:
        """Make the local function of the block's module, or of its output module."""
        combine, parents = self.spec.combine, len(self.spec.parents)
        if module is self.spec.output:
            combine, parents = Combine.ARGUMENTS, 1
        if isinstance(combine, Joining):
            inner = self._function_of(module, seed_name, combine.then, len(combine.joins))
            return JoinedFunction(inner, combine)
        return self._function_of(module, seed_name, combine, parents)

    def _function_of(
        self, module: nn.Module, seed_name: str, combine: Combine, parents: int
    ) -> LocalFunction:
        if self.spec.rule is not None:  # which linearises the module itself
            return AutogradFunction(module, combine, block_seed(self._plan.seed, seed_name))
        stash = self._plan.knobs.memory is Memory.TRACE_WEIGHTS
        watched = self.dynamics.inputs is not None  # (closed forms know what was read)
        seed = block_seed(self._plan.seed, seed_name)
        device = self.border.device
        native = self._plan.native
        if native and not rows.built():
            raise ClusterError(
                f"hamdist on host {socket.gethostname()!r} was installed without its C code, which "
                "the driver's has; install it again there, where a C compiler is at hand, or use "
                "engine.step 'closed'"
            )
        if self.border.autocast:
            return AutocastFunction(module, combine, seed, device, stash=stash, watched=watched)
        convolves = watched and any(isinstance(m, nn.Conv2d) for m in module.modules())
        if not stash and not convolves and self._plan.engine.step is not StepKind.AUTOGRAD:
            closed = make_closed(module, combine, seed, parents, native=native)
            if closed is not None:
                return closed
        return AutogradFunction(module, combine, seed, stash=stash, device=device, watched=watched)

    def make_weights(self, cell: LocalFunction, prefix: str = "") -> Weights:
        """Make the weights of a local function, with their costates."""
        names = [prefix + name for name in cell.names]
        return self._weights(cell.theta, self.dynamics, names)

    def _weights(
        self, theta: Sequence[Tensor], dynamics: Dynamics, names: Sequence[str]
    ) -> Weights:
        order, rule = self._plan.knobs.order, self._plan.optimizer
        if rule is None or not theta:
            return Weights(theta, dynamics, order, names)
        return OptimizerWeights(theta, dynamics, order, names, rule, self.name)

    def make_rule(self, rule: Rule) -> AppliedRule:
        """Make the block's rule, with weights for what it learns beside theta."""
        plan, spec, name = self._plan, self.spec, self.name
        shapes, h = {**plan.spec.parents, **plan.shapes}, self.border.moved(plan.start(name))
        stochastic = draws(spec.module)

        def seed(use: str) -> int:
            return block_seed(plan.seed, f"{name}/rule/{use}")

        view = BlockView(
            name=name,
            module=spec.module,
            theta=dict(zip(self.cell.names, self.cell.theta, strict=True)),
            shape=tuple(h.shape[1:]),
            inputs=spec.with_own([shapes[p][0][1:] for p in spec.parents], tuple(h.shape[1:])),
            outputs=shapes[plan.graph.readouts[0]][0][1:],
            depth=plan.graph.depths[name],
            readout=spec.loss is not None,
            wanted=spec.with_own(self.wanted, False),
            own=spec.own,
            join=partial(combined, spec.combine),
            seed=seed,
            random=lambda use: OwnGenerator(seed(use), h.device) if stochastic else nullcontext(),
            initial=h,
            copies=may_write(spec.module),
        )
        applied = AppliedRule(rule, view)
        dynamics = replace(self.dynamics, average=None, betas=())
        names = [MEMORY + key for key in applied.learned]
        weights = self._weights(list(applied.learned.values()), dynamics, names)
        applied.move_by(weights, self._scaled(weights, partial(plan.block_factor, name)))
        return applied

    def make_head_update(self) -> HeadUpdate | None:
        """Make the update of the block's local readout; None if the block has none."""
        plan = self._plan
        heads = plan.heads
        if heads is None or self.name not in heads.weights:
            return None
        module = heads.make(self.name, plan.shapes, plan.seed).to(self.border.device)
        seed_name = f"{self.name}/head"
        cell = self._function_of(module, seed_name, Combine.CONCAT, 1)
        dynamics = replace(self.dynamics, average=None, betas=())
        loss = plan.graph.blocks[heads.readout].loss
        if loss is None:  # (a readout has one)
            raise TypeError(f"{heads.readout!r} has no loss")
        readout_loss = self.make_loss(loss, f"{seed_name}/loss")
        order, weight = plan.knobs.order, heads.weights[self.name]
        weights = self._weights(cell.theta, dynamics, [f"head.{name}" for name in cell.names])
        factor = self._scaled(weights, plan.step_factor)
        head = Head(cell, weights, readout_loss, weight, factor, constant_tau(dynamics))
        weights = self.weights
        if plan.knobs.credit is Credit.MESSAGES:  # whose steps have an omega of their own
            beside = replace(self.dynamics, average=None, weight_cost=0.0, decay=0.0)
            weights = Weights(self.cell.theta, beside, order, self.cell.names)
        factor = self._scaled(weights, plan.step_factor)
        return HeadUpdate(head, self.cell, weights, self.dynamics, factor)


def _pulse_block(
    plan: Plan, p: _Parts
) -> PulseBlock | ReversibleBlock | HeadBlock | RuleBlock | PulseReadout:
    if p.name in plan.silent and p.loss is None:
        return FrozenBlock(p, None)
    if p.spec.rule is not None:
        rule = p.make_rule(p.spec.rule)
        if p.loss is not None:
            return RuleReadout(p, p.loss, rule)
        return RuleBlock(p, rule, constant_tau(p.dynamics))
    if p.loss is not None and plan.spec.kept:
        return KeepingReadout(p, p.loss)
    hands_back = [e.parent in plan.reversible for e in plan.graph.into[p.name]]
    if p.loss is not None:
        parts = p.microbatches
        reading = MicrobatchReading(parts, plan.ignore_index, p.loss) if parts > 1 else None
        return PulseReadout(p, p.loss, hands_back, reading)
    if p.name in plan.reversible:
        return ReversibleBlock(p, hands_back=any(hands_back))
    taught = p.make_head_update()
    if plan.knobs.credit is Credit.HEADS:
        return HeadBlock(p, taught)
    predicts = Compensation.WEIGHT_PREDICTION in plan.knobs.compensation
    return PulseBlock(p, taught, plan.delay(p.name) if predicts else None)


def _sequence_block(plan: Plan, p: _Parts) -> SequenceBlock | SequenceReadout:
    if p.loss is not None:
        return SequenceReadout(p, p.loss, plan.knobs.truncation)
    shape, dtype = plan.shapes[p.name]
    h = p.border.moved(torch.zeros(shape, dtype=dtype))
    return SequenceBlock(p, h, 0 if p.name in plan.silent else plan.knobs.truncation)


def _hold_block(plan: Plan, p: _Parts) -> HoldBlock | HoldReadout:
    if p.loss is not None and not p.spec.state:
        return HoldReadout(p, p.loss)
    h, knobs = p.border.moved(plan.start(p.name)), plan.knobs
    if p.spec.rule is not None:
        return RelaxingBlock(p, h, p.make_rule(p.spec.rule), plan.schedule.c)
    output = output_weights = None
    if p.spec.output is not None:
        output = p.make_function(p.spec.output, f"{p.name}/{OUTPUT_KEY}")
        output_weights = p.make_weights(output, OUTPUT_KEY)
    retrospect = None
    if Compensation.RETROSPECTIVE in knobs.compensation and isinstance(plan.schedule, HoldSchedule):
        wait = plan.schedule.wait(p.name)
        retrospect = RetrospectiveInput(wait, knobs.blend) if wait else None
    return HoldBlock(
        p,
        knobs.order,
        h,
        loss=p.loss,
        output=output,
        output_weights=output_weights,
        lead=knobs.lead if Compensation.PROSPECTIVE in knobs.compensation else 0.0,
        retrospect=retrospect,
    )


# -- a dry run of rules ----------------------------------------------------------------------------


def try_rules(plan: Plan) -> None:
    """Run every rule once, on a copy of its block and on zeros, so that its errors show early.

    Raises GraphError, which names the rule, the block and the method.
    """
    rules = rules_by_block(plan.graph)
    plan = replace(plan, graph=plan.graph.copy()) if rules else plan
    for name, rule in rules.items():
        who = f"rule {type(rule).__name__} of block {name!r}"
        if name in plan.cast_plans and plan.cast_plans[name].autocast:
            raise LevelError(f"{who}: it computes without autocast; switch that off for this block")
        if plan.spec.ragged:
            raise LevelError(f"{who}: rules know no samples of several lengths; pad them")
        if rule.presentation == "sequence" and plan.spec.patience and not plan.spec.kept:
            again = "samples with late labels would be shown again, out of their sequence"
            raise LevelError(f"{who}: {again}; use stream.relearn: trace")
        before = {key: _bytes_of(value) for key, value in vars(rule).items()}
        try:
            drawn = _shared_generators()
            block = make_node(plan, name, Mailbox({INPUT, *plan.graph.blocks})).block
            applied: AppliedRule = block.rule  # type: ignore[union-attr]  # it has one
            weights = {key: w.clone() for key, w in applied.view.theta.items()}
            _try(plan, name, applied)
        except HamdistError:
            raise
        except Exception as error:
            raise GraphError(f"{who}, in a dry run: {shortened(error)}") from error
        for key, value in vars(rule).items():
            initial = before.get(key, _bytes_of(getattr(type(rule), key, value)))
            if _bytes_of(value) != initial:
                raise GraphError(
                    f"{who}: it changes self.{key}, but `self` holds constants, of which each "
                    "process has a copy: keep it in block.memory, which `start` returns, and draw "
                    "from block.generator"
                )
        for key, w in applied.view.theta.items():
            if not torch.equal(w, weights[key]):
                raise GraphError(f"{who}: it changes the weight {key!r} itself; return an update")
        if drawn != _shared_generators():
            raise GraphError(
                f"{who}: it draws from the generator of torch, NumPy or Python, or seeds it, which "
                "every process has for itself: draw from block.generator, or by block.randn_like"
            )


def _bytes_of(value: object) -> bytes | int:
    """Return bytes that are others if a constant of a rule has changed; or which object it is."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return id(value)


def _shared_generators() -> bytes:
    """Return the states of the generators that all code of this process shares."""
    states = torch.random.get_rng_state().tolist(), np.random.get_state(), random.getstate()
    return pickle.dumps(states)


def _try(plan: Plan, name: str, applied: AppliedRule) -> None:
    spec, rule, h = plan.graph.blocks[name], applied.rule, applied.view.initial
    shapes, readout = {**plan.spec.parents, **plan.shapes}, plan.graph.readouts[0]
    inputs = [
        torch.zeros(s, dtype=h.dtype if t.is_floating_point else t, device=h.device)
        for s, t in map(shapes.__getitem__, spec.parents)
    ]
    if rule.presentation == "hold":
        nudges = rule.nudges(plan.schedule.c)
        if any(plan.dynamics.phi(k) != phi for k, phi in enumerate(nudges + nudges)):
            counts = ", then ".join(
                f"{len([*same])} times {phi:g}" for phi, same in groupby(nudges)
            )
            raise LevelError(
                f"block {name!r} with rule {type(rule).__name__}: it needs the loss scaled by tick "
                f"of a sample; set dynamics.phi to {{values: [...], cycle: true}} with {counts}"
            )
        applied.view.in_tick(h, 0, plan.schedule.c, learns=True)
        applied.gradients(applied.call("relax", 0, len(h), inputs, h)[2], 0, 1.0)
        applied.check_plain("relax", applied.view.memory)
        return
    h, kept = applied.forward(0, inputs)
    applied.check_plain("forward", kept)
    if applied.learns:
        y = plan.spec.target(plan.label_readout) if rule.signals.label else None
        label = None if y is None else torch.zeros(y.shape, dtype=y.dtype, device=h.device)
        applied.gradients(applied.call("learn", 0, len(h), kept, label), 0, 1.0)
    if applied.listens:
        like = shapes[readout][0] if spec.back == "error" and spec.loss is None else h.shape
        applied.back(kept, h.new_zeros(like), 0, 1.0)
    applied.check_plain("backward", applied.view.memory)
