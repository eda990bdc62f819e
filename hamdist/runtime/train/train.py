"""From a model, a stream and settings to a trained model: the one entrance to both engines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hamdist.config import Bits, EngineKind, Level, Readout, Settings
from hamdist.dynamics.graph.checks import check_parameters, check_shared_modules
from hamdist.dynamics.graph.graph import OUTPUT_KEY, Graph
from hamdist.dynamics.graph.inputs import by_parent
from hamdist.dynamics.graph.merged import MergedSequence, merged_module
from hamdist.dynamics.objective.losses import Losses, make_losses
from hamdist.dynamics.partition.apply_settings import arranged
from hamdist.dynamics.partition.reversible_blocks import drift_warnings
from hamdist.dynamics.partition.split import (
    Policy,
    check_made,
    is_chain,
    split_module,
    split_sequential,
)
from hamdist.dynamics.schedule.levels import Locality, make_locality
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.user_modules.copies import copied, unwrapped
from hamdist.dynamics.user_modules.hooks import check_hooks
from hamdist.dynamics.user_modules.python_state import check_apart, unchanged
from hamdist.errors import ChoiceWarning, DivergedError, HamdistWarning, SettingsError
from hamdist.runtime.advice.advice import after, before, end_of_stream, of_resumed
from hamdist.runtime.advice.divergence import explained
from hamdist.runtime.engines.inprocess import InProcessEngine
from hamdist.runtime.nodes.ties import against_ties, weight_lags
from hamdist.runtime.placement.step_costs import example_input, example_inputs
from hamdist.runtime.plan.plan import Plan, least_bytes, make_plan, make_snapshot_policy
from hamdist.runtime.plan.replan import replannable
from hamdist.runtime.process.arithmetic import check_portable
from hamdist.runtime.process.interrupts import OnProgress, terminated_as_interrupted
from hamdist.runtime.process.portable import is_pinned
from hamdist.runtime.process.startup import Startup, phases_to
from hamdist.runtime.ray_engine.session import ray_environment
from hamdist.runtime.results.result import Outcome, RunResult
from hamdist.runtime.signals.edge_codecs import in_edge_order
from hamdist.runtime.snapshots.resume import (
    bent_course,
    changed,
    differences,
    earlier,
    ended,
    graph_with_weights,
    identity,
    origin,
    other_bits_than,
    other_stream,
    weights_of,
    with_weights,
)
from hamdist.runtime.storage.claims import claimed
from hamdist.runtime.storage.snapshot_files import Snapshot, check_usable, latest
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.choose_level import resolved
from hamdist.streams.sample import SampleSpec, Stream, with_example
from hamdist.streams.wrappers.chosen_targets import with_targets_of
from hamdist.streams.wrappers.dtype import in_dtype

OWN = "hamdist."  # streams of this package, which know what they give


class Engine(Protocol):
    def run(self, plan: Plan, stream: Stream, on_progress: OnProgress | None = None) -> Outcome: ...


def train(
    model: nn.Module | Graph,
    stream: Stream,
    settings: Settings,
    *,
    loss: Losses | None = None,
    policy: Policy | None = None,
    phi: TickSchedule | None = None,
    on_progress: OnProgress | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """Learns `model` on `stream` as `settings` say (those of one level: `Settings.for_level`).

    model: stays as it is; a copy is cut into blocks and trained. A `Graph` brings its own blocks
    and losses. loss: (prediction, target) -> scalar mean over the batch, instead of
    `settings.loss`, or one for each output of a model that has several. policy: where blocks begin,
    instead of `settings.partition`. phi: the scale of the loss by tick (by sample, in levels of
    presentation 'pulse'), instead of `settings.dynamics.phi`. on_progress: called about four times
    a second, and for every phase of the start (`Progress.phase`), in the calling thread; it may end
    the run (`Stop`: the result then says `stopped`), and what else it raises does so, too, with
    what was learned so far as its `result`. The first Ctrl-C or SIGTERM ends the stream; the result
    then says `interrupted`. resume: a folder of snapshots, or
    one of them: the run goes on from it as if it had never stopped; a network that is cut in
    another way, or another level, takes over the weights and the place in the stream.

    Raises SettingsError, GraphError, LevelError before anything starts; StreamError, BlockError,
    StallError, ClusterError when a run fails (everything it started has ended by then);
    SnapshotError for a snapshot that cannot be gone on from, before anything starts. A
    DivergedError brings what came before as its `result`.
    """
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise SettingsError(
            "train() was called inside torch.autocast, which would go on with the weights as they "
            "were when it first cast them: call it outside, with engine.blocks {'*': {autocast: "
            "bf16}}"
        )
    with (
        terminated_as_interrupted(),
        torch.inference_mode(False),
    ):  # whatever the caller's mode: this is learning
        startup = Startup(phases_to(on_progress, settings.steps))
        with startup.phase("plan"):
            model, stream = in_dtype_of(settings, model, stream)
            losses = make_losses(settings.loss, settings.ignore_index) if loss is None else loss
            if isinstance(losses, Mapping):
                stream = with_targets_of(stream, losses)
            why: list[str] = []
            spec = _spec_with_example(stream)
            if settings.level is Level.AUTO:
                cut = partial(_cut, model, spec, losses, policy)
                settings, stream, why = resolved(settings, stream, cut)
                spec = replace(stream.spec, example=spec.example)
            known_by = identity(stream, spec.example)
            work = _Work(model, spec, settings, losses, policy, phi, known_by)
            told: list[str] = []
            if resume is None:
                graph, plan = work.planned()
            else:
                graph, plan, told = work.resumed(resume)
                told += of_resumed(stream)
            told += drift_warnings(plan.graph, plan.reversible, example_input(spec))
            told += [*graph.notes, *before(plan, settings)]
        for text in told:
            warnings.warn(text, HamdistWarning, stacklevel=3)
        alone = settings.engine.kind is EngineKind.INPROCESS  # (on Ray the actors show it)
        if alone and settings.engine.bits is Bits.PORTABLE and not is_pinned():
            check_portable(plan.arithmetic, plan.switches, native=plan.native)
        kept_at = None if plan.snapshot_policy is None else plan.snapshot_policy.path
        try:
            with claimed(kept_at, plan.run):
                outcome = make_engine(settings).run(plan, stream, on_progress)
            if plan.replan is not None and outcome.delays:
                plan = plan.replan(outcome.delays)
        except DivergedError as error:
            failure = explained(error, plan)
            if error.outcome is not None:
                error.outcome.warnings[:0] = told
                error.outcome.warnings.insert(0, str(failure))
                failure.result = _result(graph, plan, error.outcome, startup, settings, why)
            raise failure from None
        outcome.warnings[:0] = [*told, *end_of_stream(plan, outcome)]
        result = _result(graph, plan, outcome, startup, settings, why)
        if outcome.error is not None:
            outcome.error.result = result  # type: ignore[attr-defined]
            raise outcome.error
        return result


def _spec_with_example(stream: Stream) -> SampleSpec:
    """The stream's spec, with the first item's inputs where a user's stream can be asked twice."""
    spec, first = stream.spec, None
    if spec.example is None and stream.portable and not type(stream).__module__.startswith(OWN):
        first = next(iter(stream.samples()), None)
    return spec if first is None else with_example(spec, first)


@dataclass(frozen=True)
class _Work:
    """What `train` was given. known_by: the stream's identity (resume.py). keeps: where snapshots
    lie was said, or there are none."""

    model: nn.Module | Graph
    spec: SampleSpec
    settings: Settings
    loss: Losses | None
    policy: Policy | None
    phi: TickSchedule | None
    known_by: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = True

    def graph(self) -> Graph:
        own = self.settings
        loss = make_losses(own.loss, own.ignore_index) if self.loss is None else self.loss
        return _cut(self.model, self.spec, loss, self.policy, own)

    def planned(self, snapshot: Snapshot | None = None) -> tuple[Graph, Plan]:
        with unchanged(_modules(self.model)):
            graph = self.graph()
            blocks = graph.unsliced.blocks
            check_apart({n: [m for m in (b.module, b.output) if m] for n, b in blocks.items()})
            plan = make_plan(graph, self.settings, self.spec, phi=self.phi)
        if graph.state:
            graph.notes.append(
                f"the model's forward changes {', '.join(sorted(graph.state))}: Python state, "
                "which neither snapshots nor result.model hold; a buffer, or get_extra_state and "
                "set_extra_state, would be kept"
            )
        snapshot_policy = make_snapshot_policy(self.settings, snapshot, last=self.keeps)
        if snapshot_policy is not None and snapshot is None:
            check_usable(snapshot_policy.path, least_bytes(graph, self.settings))
        if snapshot_policy is not None:
            snapshot_policy = replace(snapshot_policy, stream=self.known_by)
        plan = replace(plan, snapshot_policy=snapshot_policy)
        if self.settings.partition.delays == "auto":
            plan = replannable(plan, graph, self.settings, self.phi)
        return graph, plan

    def resumed(self, where: str | Path) -> tuple[Graph, Plan, list[str]]:
        """Goes on from the latest snapshot at `where`; with what there is to say about it."""
        told: list[str] = []
        snapshot = latest(where, told.append)
        warnings.warn(ChoiceWarning(origin(snapshot)), stacklevel=4)
        told += other_stream(snapshot, self.known_by)
        own = self._kept_at(snapshot)
        graph, plan = own.planned(snapshot)
        other = differences(snapshot, plan, own.settings)
        if not other and ended(snapshot, own.settings):
            other = ["its steps were over, and steps"]
        if not other:
            names = changed(snapshot, own.settings)
            if names:
                told.append(f"the run goes on with other settings than before: {', '.join(names)}")
            if graph.state:
                told.append(
                    f"Python state of the model's forward ({', '.join(sorted(graph.state))}) is in "
                    "no snapshot and begins anew: the numbers are not those of a run that was "
                    "never stopped"
                )
            told += bent_course(snapshot, own.settings)
            told += other_bits_than(snapshot, plan)
            plan = replace(plan, skip=snapshot.manifest.skip)
            if plan.engine.digests and not snapshot.digests:
                told.append(
                    f"engine.digests: {snapshot} was taken without them, so this run has none: "
                    "they would begin in its midst"
                )
                plan = replace(plan, engine=plan.engine.model_copy(update={"digests": False}))
            return graph, plan, told
        model: nn.Module | Graph
        if isinstance(self.model, Graph):
            model = graph_with_weights(self.model, snapshot)
        else:
            before = replace(own, settings=earlier(snapshot), policy=None)
            model = with_weights(self.model, weights_of(snapshot, before.graph()))
        own = replace(own, model=model)
        graph, plan = own.in_folder_of_its_own(snapshot).planned()
        told.append(
            f"{snapshot} was taken of another run ({', '.join(other)} differ): its weights and its "
            f"place in the stream ({snapshot.manifest.samples} items) are taken over; states, "
            "costates, traces, signals under way and metrics begin anew"
        )
        then = snapshot.manifest
        return graph, replace(plan, skip=then.samples, passed=then.passed), told

    def in_folder_of_its_own(self, snapshot: Snapshot) -> _Work:
        """A run that begins its ticks anew does not write among those of the snapshot's run."""
        kept = self.settings.snapshots
        if kept.path is None or storage(kept.path).where != snapshot.where:
            return self
        kept = kept.model_copy(update={"path": f"{snapshot.where}/from-{snapshot.folder}"})
        return replace(self, settings=self.settings.model_copy(update={"snapshots": kept}))

    def _kept_at(self, snapshot: Snapshot) -> _Work:
        """New snapshots lie beside the one that the run goes on from, unless settings say so; and
        delays that were measured are used again."""
        settings, keeps = self.settings, True
        if settings.snapshots.path is None:
            kept = settings.snapshots.model_copy(update={"path": snapshot.where})
            settings = settings.model_copy(update={"snapshots": kept})
            keeps = False
        if settings.partition.delays == "auto":
            given = {"delays": snapshot.manifest.delays}
            partition = settings.partition.model_copy(update=given)
            settings = settings.model_copy(update={"partition": partition})
        return replace(self, settings=settings, keeps=keeps)


def in_dtype_of(settings: Settings, model: nn.Module | Graph, stream: Stream) -> tuple[Any, Stream]:
    """Return model and stream in `settings.dtype`, where it was set; copies, where they were not.

    Raises:
        SettingsError: The model is a Graph of another type, which brings its own, or a module
            without weights.
    """
    if isinstance(model, nn.Module) and next(model.parameters(), None) is None:
        raise SettingsError("the model has no weights: there is nothing to learn")
    if "dtype" not in settings.model_fields_set:
        return model, stream
    dtype = getattr(torch, settings.dtype.value)
    tensors = [t for m in _modules(model) for t in (*m.parameters(), *m.buffers())]
    if any(t.is_floating_point() and t.dtype != dtype for t in tensors):
        if isinstance(model, Graph):
            raise SettingsError(
                f"dtype {settings.dtype.value!r}: the Graph has weights of another type; make its "
                "modules in that type, or leave dtype out"
            )
        model = copied(model).to(dtype)
    return model, in_dtype(stream, dtype)


def _modules(model: nn.Module | Graph) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    return [m for b in model.blocks.values() for m in (b.module, b.output) if m is not None]


def plan_of(model: nn.Module | Graph, settings: Settings, spec: SampleSpec) -> Plan:
    """The plan with which `train` would begin. Raises what `train` raises before that."""
    return _Work(model, spec, settings, None, None, None).planned()[1]


def snapshot_model(
    snapshot: Snapshot, model: nn.Module | Graph, spec: SampleSpec, settings: Settings
) -> nn.Module:
    """The plain module with the weights of a snapshot of a run of `settings` on `model`, or with
    their averages where `learning.average` asks for them: as `RunResult.model`.

    Raises SnapshotError where they do not fit.
    """
    graph = _Work(model, spec, settings, None, None, None).graph()
    return weights_of(snapshot, graph, averaged=True)


def _cut(
    model: nn.Module | Graph,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None,
    settings: Settings,
) -> Graph:
    """The graph of blocks, with its slices and delays."""
    graph = as_graph(model, settings, spec, loss, policy)
    knobs = make_locality(settings.level, settings.locality)
    return arranged(graph, settings.partition, knobs, spec.u_shape, spec.u_dtype, spec.parents)


def _result(
    graph: Graph,
    plan: Plan,
    outcome: Outcome,
    startup: Startup,
    settings: Settings,
    why: list[str],
) -> RunResult:
    startup.add(outcome.startup)
    lost = [name for name in graph.blocks if name not in outcome.blocks]
    if lost:
        outcome.warnings.append(
            f"the run was called off before {', '.join(lost)} could hand over their weights; the "
            "model has their initial ones"
        )
    weights = {name: {**b.theta, **b.buffers} for name, b in outcome.blocks.items()}
    for name in lost:
        weights[name] = dict(graph.blocks[name].module.state_dict())
        output = graph.blocks[name].output
        if output is not None:
            own = output.state_dict()
            weights[name] |= {OUTPUT_KEY + key: tensor for key, tensor in own.items()}
    averages = {name: b.average for name, b in outcome.blocks.items() if b.average}
    averaged = {name: {**own, **averages.get(name, {})} for name, own in weights.items()}
    facts = {
        **outcome.shared(),
        "startup": startup.seconds,
        "startup_seconds": sum(startup.seconds.values()),
        "compression": in_edge_order(outcome.compression, graph),
        "rounding": {n: b.rounding for n, b in outcome.blocks.items() if b.rounding is not None},
        "staleness": -(-plan.schedule.staleness // plan.spec.passes),
        "resumed": plan.resumed,
        "delays": {e.name: e.delay for e in plan.graph.edges if not e.from_input},
        "weight_lags": weight_lags(plan),
        "stored": {
            name: outcome.blocks[name].stored
            for name in graph.blocks
            if plan.knobs.sequence and name in outcome.blocks
        },
        "chosen": settings if why else None,
        "why": why,
        "warnings": [*outcome.warnings, *after(plan, outcome)],
    }
    return RunResult(
        model=merged_module(graph, averaged, _whole(graph, plan)),
        plain=merged_module(graph, weights, _whole(graph, plan)) if averages else None,
        blocks=outcome.blocks,
        windows=outcome.windows,
        records={name: outcome.records[name] for name in graph.blocks if name in outcome.records},
        **facts,
    )


def _whole(graph: Graph, plan: Plan) -> MergedSequence | None:
    """What the weights of a sequence's blocks go into."""
    if not plan.knobs.sequence:
        return None
    before, spec = graph.unsliced, plan.spec
    shapes = before.shapes(spec.u_shape, spec.u_dtype, spec.parents)
    return MergedSequence(before, shapes)


def make_engine(settings: Settings) -> Engine:
    if settings.engine.kind is EngineKind.INPROCESS:
        return InProcessEngine()
    with ray_environment(settings.engine):
        from hamdist.runtime.ray_engine.engine import RayEngine  # Ray takes seconds to import

    return RayEngine()


def as_graph(
    model: nn.Module | Graph,
    settings: Settings,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None = None,
) -> Graph:
    """A graph over copies of the model's modules, cut as `policy`, or else `settings`, say.

    Raises GraphError for a model that cannot be cut in that way.
    """
    check_hooks(_modules(model))
    knobs = make_locality(settings.level, settings.locality)
    together = against_ties(settings.level.value, knobs, settings.learning)
    graph = _graph(model, settings, knobs, together, spec, loss, policy)
    check_parameters(graph.blocks, together)
    return graph.apart()


def _graph(
    model: nn.Module | Graph,
    settings: Settings,
    knobs: Locality,
    together: str | None,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None,
) -> Graph:
    """`as_graph`, in which blocks may share weights."""
    if isinstance(model, Graph):
        check_shared_modules(model.blocks)
        return model.copy()
    model, notes = unwrapped(model)
    check_made(model, sent=settings.engine.kind is not EngineKind.INPROCESS)
    own = copied(model)
    state = knobs.readout is Readout.STATE
    example = example_input(spec) if spec.inputs is None else example_inputs(spec)
    if policy is None and callable(loss) and is_chain(own, settings.partition):
        graph = split_sequential(
            own,
            loss,
            settings.partition,
            knobs.grouping,
            example=example_input(spec),
            state_readout=state,
        )
    else:
        graph = split_module(
            own,
            loss,
            settings.partition,
            knobs.grouping,
            example=example,
            targets=spec.targets,
            policy=policy,
            state_readout=state,
            together=together,
            ragged=spec.ragged and knobs.pulse,
        )
    graph.original = model  # what its forward has left behind stays with the blocks
    graph.example = by_parent(example)
    graph.notes[:0] = notes
    return graph
