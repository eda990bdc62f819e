"""The plan of a run: everything that an engine needs and that all processes must agree on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hamdist.config import (
    IGNORE_INDEX,
    Compensation,
    Credit,
    EngineKind,
    EngineSettings,
    Memory,
    MetricsSettings,
    Reset,
    Settings,
    SnapshotSettings,
    StepKind,
)
from hamdist.dynamics.graph.checks import check_parameters
from hamdist.dynamics.graph.graph import Graph, ShapeMap
from hamdist.dynamics.native import rows
from hamdist.dynamics.objective.losses import LossFunction, Weighted
from hamdist.dynamics.partition.reversible_blocks import reversible_blocks
from hamdist.dynamics.schedule.levels import Locality, make_locality
from hamdist.dynamics.schedule.make import AnySchedule, make_schedule
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.dynamics.updates.constants import Dynamics, TickSchedule, check_names, make_dynamics
from hamdist.dynamics.updates.learning_rate import StepCourse
from hamdist.dynamics.updates.optimizers import OptimizerRule
from hamdist.errors import LevelError, SettingsError
from hamdist.runtime.plan.checks import (
    check_output_nets,
    check_predictions,
    check_resets,
    check_rules,
    own_states,
    rules_by_block,
    why_one_length,
    with_classes,
)
from hamdist.runtime.plan.dtypes import received_dtypes, with_cast_plans
from hamdist.runtime.plan.learners import Heads, plan_heads, plan_optimizers
from hamdist.runtime.plan.microbatches import cut_batches
from hamdist.runtime.process.arithmetic import Arithmetic, arithmetic
from hamdist.runtime.process.switches import Switches, read_switches
from hamdist.runtime.signals.cast import CastPlan
from hamdist.runtime.signals.edge_codecs import compressed
from hamdist.runtime.signals.signal import Channels, make_channels
from hamdist.runtime.storage.snapshot_files import Snapshot
from hamdist.runtime.storage.store import storage
from hamdist.streams.sample import SampleSpec, split_weights

Replan: TypeAlias = "Callable[[Mapping[str, int]], Plan]"

SNAPSHOT_SECONDS = 30.0


@dataclass(frozen=True)
class SnapshotPolicy:
    """Policy of a run's snapshots.

    Attributes:
        section: the settings, `recover` only with actors, `seconds` a number unless `every` is.
        path: where they lie.
        settings: of the run, for the manifest.
        snapshot: the one that the run resumes from.
        stream: the identity of the stream (snapshots/resume.py).
        code: digests of the user's code by what it is (user_modules/code_digest.py).
        epoch: of the writing processes, which rises whenever one is replaced.
        last: one is taken before the end, from which a run of more steps can resume.
    """

    section: SnapshotSettings
    path: str
    settings: Mapping[str, Any]
    snapshot: Snapshot | None = None
    stream: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 1
    last: bool = True


@dataclass(frozen=True)
class Plan:
    """The plan of a run, equal in all its processes.

    Attributes:
        graph: with modules of its own (a run moves their weights).
        shapes: of every h, batch in front.
        steps: samples after which the stream ends, or None.
        run: a number that marks the signals of this run.
        switches: torch's, of the driver; arithmetic: its fingerprint.
        reversible: blocks that keep nothing of a sample (memory 'reversible').
        cast_plans: where blocks have types or devices of their own, of every block.
        rate: the step size by sample; follows_lr: beta comes from the learning rate.
        silent: blocks that get no messages, for nothing learns there or before them.
        heads: the blocks' local readouts, where labels travel with the signal.
        replan: where delays follow from the links, makes the plan with ticks by edge.
        native: chains of linear layers use the C code, in every process.
        snapshot_policy: how snapshots are taken, if they are.
        skip: samples of the stream that an earlier run has had; passed: that it passed over.
        memory_of: the memory that a process can share of a device (tests replace it).
        ignore_index: targets of this class have no loss.
        one_length: why all samples have the lengths of the first one; None: they need not.
        one_row: why no sample may have one row alone; None: it may.
        optimizer: torch's rule, instead of the equations of the weights.
    """

    graph: Graph
    knobs: Locality
    dynamics: Dynamics
    schedule: AnySchedule
    channels: Channels
    shapes: ShapeMap
    spec: SampleSpec
    engine: EngineSettings
    seed: int
    run: int
    steps: int | None
    course: StepCourse
    metrics: MetricsSettings
    switches: Switches
    arithmetic: Arithmetic
    follows_lr: bool
    reversible: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    native: bool = False
    replan: Replan | None = None
    snapshot_policy: SnapshotPolicy | None = None
    skip: int = 0
    passed: int = 0
    heads: Heads | None = None
    cast_plans: Mapping[str, CastPlan] = field(default_factory=dict)
    memory_of: Callable[[torch.device], Any] | None = None
    ignore_index: int = IGNORE_INDEX
    one_length: str | None = None
    one_row: str | None = None
    optimizer: OptimizerRule | None = None

    def block_factor(self, block: str, sample: int) -> float:
        """Return the factor of beta for the update of `block` on `sample`."""
        factor = self.step_factor(sample)
        if Compensation.DELAY_SCALED in self.knobs.compensation:
            factor *= float((1 + self.delay(block)) ** -self.knobs.delay_power)
        return factor

    def row_weighted(self, loss: LossFunction, readout: str) -> LossFunction:
        """Return the loss as the targets of a readout need it, with the weights of their rows."""
        target = self.spec.target(readout)
        if not self.spec.weighted or target is None:
            return loss
        return Weighted(loss, partial(split_weights, spec=target), self.ignore_index)

    def step_factor(self, sample: int) -> float:
        """Return the factor of the step size on `sample`, without the correction for a delay."""
        return self.course(self.sample_of(sample))

    def sample_of(self, sample: int) -> int:
        """Return the number of a sample, counted over resumed runs."""
        return sample + self.skip

    def delay(self, block: str) -> int:
        """Return the most steps of a block between its two passes of a sample, where known."""
        traced = self.spec.kept and self.spec.emissions is not None
        return self.schedule.delay(block) + (self.spec.patience if traced else 0)

    @property
    def staleness(self) -> int:
        """Return the most samples between the two passes of one, with those that a trace waits."""
        late = self.spec.patience if self.spec.kept else 0
        return -(-self.schedule.staleness // (self.spec.emissions or 1)) + late

    @property
    def resumed(self) -> int:
        """Return the samples that had entered before the snapshot that the run resumes from."""
        if self.snapshot_policy is None or self.snapshot_policy.snapshot is None:
            return 0
        manifest = self.snapshot_policy.snapshot.manifest
        return manifest.samples - manifest.skip

    @property
    def label_readout(self) -> str:
        """Return the readout whose labels travel with the signal."""
        return self.graph.readouts[0] if self.heads is None else self.heads.readout

    @property
    def last_tick(self) -> float:
        """Return the tick before which the last of `steps` samples has left the stream.

        A snapshot at that tick is one of a run of more steps, too, and a later one is not. Infinite
        if it is unknown (in sequences, where a sample is drawn ahead for its time, and where labels
        come by tags).
        """
        emissions, schedule = self.spec.emissions, self.schedule
        if self.steps is None or emissions is None or self.dynamics.tau is None:
            return math.inf
        if isinstance(schedule, SequenceSchedule):
            return math.inf
        return schedule.enters((self.steps - self.skip) * emissions) - 1

    def start(self, block: str) -> Tensor:
        """Return h_0 of a block, the batch in front."""
        shape, dtype = self.shapes[block]
        h = torch.zeros(shape, dtype=dtype)
        initial = self.graph.blocks[block].initial
        return h if initial is None else h + initial.to(dtype)

    def only(self, blocks: Iterable[str]) -> Plan:
        """Return the plan for the process of `blocks`: without the other blocks' weights."""
        mine = set(blocks)
        specs = [
            b if b.name in mine else dataclasses.replace(b, module=nn.Identity(), output=None)
            for b in self.graph.blocks.values()
        ]
        graph = Graph(specs, shared=self.graph.shared)
        spec = dataclasses.replace(self.spec, example=None)
        knobs = dataclasses.replace(self.knobs, own=None)  # whose class may not be there
        return dataclasses.replace(self, graph=graph, spec=spec, knobs=knobs, replan=None)


def make_plan(
    graph: Graph,
    settings: Settings,
    spec: SampleSpec,
    *,
    phi: TickSchedule | None = None,
    optimizer: OptimizerRule | None = None,
    level: OwnLevel | None = None,
) -> Plan:
    """Make the plan of `settings` (those of one level) for `graph` on a stream of `spec`.

    `phi` is a function of the tick, instead of `settings.dynamics.phi` (see `make_dynamics`);
    `optimizer` are the user's functions, instead of `settings.learning.optimizer`; `level` is the
    one that `settings.locality.level` names.
    Raises GraphError and LevelError for whatever cannot run.
    """
    check_parameters(graph.blocks, "a plan", frozen=True)
    knobs = dataclasses.replace(make_locality(settings.level, settings.locality), own=level)
    dynamics = make_dynamics(settings.dynamics, settings.learning, knobs, phi=phi)
    check_names(dynamics, graph.parameters())
    shapes = graph.shapes(spec.u_shape, spec.u_dtype, spec.parents)
    spec = with_classes(spec, graph, shapes)
    check_predictions(graph, shapes, spec, settings.ignore_index)
    knobs = cut_batches(knobs, graph, spec, settings)
    graph = own_states(graph, knobs)
    graph, shapes, cast_plans = with_cast_plans(graph, shapes, spec.parents, settings.engine, knobs)
    # (The end of a stream goes against the edges where there are cycles; energies need z.)
    whole = knobs.hold and (not graph.acyclic or settings.metrics.record is not None)
    silent = frozenset[str]() if whole else graph.silent()
    carries = dynamics.reset.h is Reset.NEVER
    schedule = make_schedule(graph, knobs, silent, carries=carries)
    check_resets(graph, schedule, dynamics, knobs)
    check_output_nets(graph, dynamics)
    check_rules(graph, knobs, dynamics, settings.metrics, weighted=spec.weighted)
    labelled = any(block_rule.signals.label for block_rule in rules_by_block(graph).values())
    rule = plan_optimizers(graph, knobs, settings, optimizer)
    rewinds = knobs.memory is Memory.REVERSIBLE
    _check_together(graph, spec, settings, knobs, stamped=dynamics.tau is None)
    course = StepCourse(settings.learning, settings.steps)
    heads = plan_heads(graph, shapes, knobs, settings.learning)
    clocked = (knobs.hold and dynamics.clocked) or spec.patience > 0
    reversible = reversible_blocks(graph, shapes) - silent if rewinds else frozenset()
    channels = make_channels(
        graph,
        schedule,
        settings.engine.queue,
        clocked=clocked,
        bundle=settings.engine.bundle,
        labels=heads is not None or labelled,
        messages=knobs.credit is Credit.MESSAGES,
        silent=silent,
    )
    signals = {**shapes, **spec.parents}
    native = _native(settings.engine)
    return Plan(
        graph=graph,
        knobs=knobs,
        dynamics=dynamics,
        schedule=schedule,
        channels=compressed(
            channels,
            graph,
            signals,
            settings.engine,
            reversible,
            received_dtypes(cast_plans),
            settings.seed,
        ),
        shapes=shapes,
        spec=spec,
        engine=settings.engine,
        seed=settings.seed,
        run=int.from_bytes(os.urandom(8), "little"),
        steps=settings.steps,
        course=course,
        metrics=settings.metrics,
        switches=read_switches(),
        arithmetic=arithmetic(settings.engine.threads, native=native),
        follows_lr=settings.dynamics.beta is None,
        optimizer=rule,
        cast_plans=cast_plans,
        reversible=reversible,
        silent=silent,
        heads=heads,
        native=native,
        ignore_index=settings.ignore_index,
        one_length=why_one_length(graph, spec, knobs, settings),
        one_row=graph.one_row,
    )


def _check_together(
    graph: Graph, spec: SampleSpec, settings: Settings, knobs: Locality, *, stamped: bool
) -> None:
    """Raise LevelError for what cannot go together. stamped: tau comes with the samples."""
    presented, metrics = knobs.presentation.value, settings.metrics
    started = [b.name for b in graph.blocks.values() if b.initial is not None]
    recorded = "" if metrics.record is None else metrics.record.value
    grouped = knobs.accumulate > 1 or knobs.double_buffered
    reasons: dict[str, object] = {
        f"block {''.join(started[:1])!r} has an initial state, but with presentation {presented!r} "
        "a state begins with a sample or a sequence; use a level of presentation "
        "'hold'": started and not knobs.hold,
        f"metrics.record {recorded!r} with presentation {presented!r}: the energies are sums over "
        "the blocks at one time, but there the blocks work on different samples; use a level of "
        "presentation 'hold'": recorded and not knobs.hold,
        "metrics.alignment: at level 'bptt', and with locality.microbatches, an update belongs to "
        "no sample alone; leave one of them out": metrics.alignment is not None
        and (knobs.sequence or knobs.microbatches != 1),
        f"labels that come up to {spec.patience} samples late with presentation {presented!r}, "
        "whose states go from one sample to the next: a sample cannot be shown again in between; "
        "use a level of presentation 'pulse' (trace, backprop, heads, reversible), or have samples "
        "wait for their labels (stream.relearn: wait, or hamdist.streams.Rejoin), whose scores "
        "know no delay": spec.patience and not spec.live and not knobs.pulse,
        "accumulated or double-buffered steps in a live run, or with late labels: they count "
        "samples in groups, and idle ticks and samples that are shown again would break these up; "
        "leave locality.accumulate and double_buffered out": spec.patience and grouped,
        "snapshots.every in a live run of sequences: it counts ticks, and a snapshot within a "
        "sequence would wait for tokens to come; give snapshots.seconds": spec.live
        and knobs.sequence
        and settings.snapshots.every is not None,
        "dynamics.tau 'stamps' in a live run, or with late labels: how long a sample lasts shows "
        "only when the next one comes, so its answer would wait for that; give dynamics.tau as a "
        "number": spec.patience and stamped,
    }
    for reason in (text for text, holds in reasons.items() if holds):
        raise LevelError(reason)


def make_snapshot_policy(
    settings: Settings, snapshot: Snapshot | None = None, *, last: bool = True
) -> SnapshotPolicy | None:
    """Make the policy of `settings.snapshots`; None if the run takes none."""
    section = settings.snapshots
    if section.path is None:
        return None
    recover = section.recover and settings.engine.kind is EngineKind.RAY
    seconds = section.seconds or (SNAPSHOT_SECONDS if section.every is None else None)
    return SnapshotPolicy(
        section.model_copy(update={"seconds": seconds, "recover": recover}),
        path=storage(section.path).where,  # actors may have another current folder
        settings=settings.model_dump(mode="json"),
        snapshot=snapshot,
        last=last,
    )


def _native(engine: EngineSettings) -> bool:
    """Return True if C code is used. Raises SettingsError if it is required and missing."""
    if engine.step is StepKind.NATIVE and not rows.built():
        raise SettingsError(
            "engine.step 'native': hamdist was installed without its C code; install it again "
            "where a C compiler is at hand, or use 'auto'"
        )
    return engine.step is StepKind.NATIVE or (
        engine.step is StepKind.AUTO and rows.built() and engine.threads == 1
    )
