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

from hamdist.config import Bits, EngineKind, Level, Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.objective.losses import Losses, make_losses
from hamdist.dynamics.partition.reversible_blocks import drift_warnings
from hamdist.dynamics.partition.split import Policy
from hamdist.dynamics.rules.rule import Rule
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.optimizers import OptimizerFunction, OptimizerRule, SchedulerFunction
from hamdist.dynamics.user_modules.code_digest import code_digests
from hamdist.dynamics.user_modules.python_state import check_apart, unchanged
from hamdist.errors import (
    ChoiceWarning,
    DivergedError,
    HamdistError,
    HamdistWarning,
    SettingsError,
    SnapshotError,
)
from hamdist.runtime.advice.advice import after, before, end_of_stream, of_resumed
from hamdist.runtime.engines.inprocess import InProcessEngine
from hamdist.runtime.nodes.factory import try_rules
from hamdist.runtime.placement.step_costs import example_input
from hamdist.runtime.plan.checks import least_bytes
from hamdist.runtime.plan.derived import replannable
from hamdist.runtime.plan.learners import own_optimizer
from hamdist.runtime.plan.plan import Plan, make_plan, make_snapshot_policy
from hamdist.runtime.process.arithmetic import check_portable
from hamdist.runtime.process.interrupts import OnProgress, terminated_as_interrupted
from hamdist.runtime.process.portable import is_pinned
from hamdist.runtime.process.startup import Startup, phases_to
from hamdist.runtime.ray_engine.local_ray import ray_environment
from hamdist.runtime.results.result import Outcome, RunResult
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
    other_code,
    other_stream,
    outside,
    weights_of,
    with_weights,
)
from hamdist.runtime.storage.snapshot_files import Snapshot, check_usable, latest
from hamdist.runtime.storage.store import claimed, storage
from hamdist.runtime.train.choose_level import resolved
from hamdist.runtime.train.outcome import make_result, with_cause
from hamdist.runtime.train.prepare import (
    NamedRule,
    graph_in_blocks,
    in_dtype_of,
    make_level,
    make_rule,
    modules_of,
)
from hamdist.streams.live import live_of
from hamdist.streams.sample import SampleSpec, Stream, with_example
from hamdist.streams.wrappers.derived import with_targets_of

OWN = "hamdist."  # streams of this package, which know what they give


class Engine(Protocol):
    """Moves the signals of a run between its blocks, in one process or several."""

    def run(self, plan: Plan, stream: Stream, on_progress: OnProgress | None = None) -> Outcome:
        """Run a plan to its end, and return what came of it."""


def train(
    model: nn.Module | Graph,
    stream: Stream,
    settings: Settings,
    *,
    loss: Losses | None = None,
    policy: Policy | None = None,
    phi: TickSchedule | None = None,
    optimizer: OptimizerFunction | None = None,
    scheduler: SchedulerFunction | None = None,
    rules: Mapping[str, NamedRule] | None = None,
    level: OwnLevel | None = None,
    on_progress: OnProgress | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """Train `model` on `stream` by `settings` (those of one level: `Settings.for_level`).

    The first Ctrl-C or SIGTERM ends the stream; the result then says `interrupted`.

    Args:
        model: is not changed; a copy is cut into blocks and trained.
        stream, phi, optimizer, scheduler, rules, resume: as of `hamdist.train`.
        settings: of the run.
        loss: instead of `settings.loss`; by output for a model that has several.
        policy: where blocks begin, instead of `settings.partition`.
        level: that `settings.locality.level` names.
        on_progress: called one to four times a second, and for every phase of the start, in the
            calling thread; it may end the run, as that of `hamdist.train`.

    Raises:
        HamdistError: as `hamdist.train`.
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
                build = partial(graph_in_blocks, model, spec, losses, policy)
                own_steps = any(choice is not None for choice in (optimizer, scheduler, rules))
                settings, stream, why = resolved(settings, stream, build, own_steps=own_steps)
                spec = replace(stream.spec, example=spec.example)
            known_by = identity(stream, spec.example)
            rule = OptimizerRule(function=optimizer, scheduler=scheduler)
            named = {**(rules or {}), **settings.learning.rules, **(rules or {})}
            by_name = {p: make_rule(f"rules.{p}", r) for p, r in named.items()}
            more: dict[str, Any] = {"rules": by_name, "level": level or _named_level(settings)}
            work = _Arguments(
                model, spec, settings, losses, policy, phi, known_by, optimizer=rule, **more
            )
            notes: list[str] = []
            if resume is None:
                graph, plan = work.planned()
            else:
                graph, plan, notes = work.resumed(resume, stream)
                notes += of_resumed(stream)
            notes += drift_warnings(plan.graph, plan.reversible, example_input(spec))
            notes += [*graph.notes, *before(plan, settings)]
        for text in notes:
            warnings.warn(text, HamdistWarning, stacklevel=3)
        alone = settings.engine.kind is EngineKind.INPROCESS  # (on Ray the actors show it)
        if alone and settings.engine.bits is Bits.PORTABLE and not is_pinned():
            check_portable(plan.arithmetic, plan.switches, native=plan.native)
        live = live_of(stream)
        if live is not None:
            live.started(stream, graph, plan)
        kept_at = None if plan.snapshot_policy is None else plan.snapshot_policy.path
        functions = work.functions()
        with claimed(kept_at, plan.run):
            outcome = make_engine(settings).run(plan, stream, on_progress)
        if plan.replan is not None and outcome.delays:
            plan = plan.replan(outcome.delays)
        error = outcome.error
        if isinstance(error, DivergedError):
            error = with_cause(error, plan)
        messages = [str(error)] if isinstance(error, HamdistError) else []
        ended = [] if error is not None else end_of_stream(plan, outcome, stream)
        outcome.warnings[:0] = [*messages, *notes, *ended]
        if messages and outcome.samples == 0 and error is not None:
            raise error  # nothing was learned
        behind = [*after(plan, outcome), *outside(functions, work.functions())]
        outcome.warnings += behind
        result = make_result(graph, plan, outcome, startup, settings, why)
        if error is not None:
            error.result = result  # type: ignore[attr-defined]
            raise error
        for text in [*ended, *behind]:
            warnings.warn(text, HamdistWarning, stacklevel=3)
        return result


def _spec_with_example(stream: Stream) -> SampleSpec:
    """Return the stream's spec, with the first sample's inputs if it gives that one twice."""
    spec, first = stream.spec, None
    if spec.example is None and stream.portable and not type(stream).__module__.startswith(OWN):
        first = next(iter(stream.samples()), None)
    return spec if first is None else with_example(spec, first)


def _named_level(settings: Settings) -> OwnLevel | None:
    name = settings.locality.level
    return None if name is None else make_level("locality.level", name)


@dataclass(frozen=True)
class _Arguments:
    """Arguments of `train`, and the stream's identity (`known_by`, snapshots/resume.py). `keeps`:
    the folder of snapshots was given, or there is none."""

    model: nn.Module | Graph
    spec: SampleSpec
    settings: Settings
    loss: Losses | None
    policy: Policy | None
    phi: TickSchedule | None
    known_by: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = True
    optimizer: OptimizerRule | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    level: OwnLevel | None = None

    def graph(self) -> Graph:
        settings = self.settings
        loss = make_losses(settings.loss, settings.ignore_index) if self.loss is None else self.loss
        return graph_in_blocks(self.model, self.spec, loss, self.policy, settings, self.rules)

    def code(self) -> dict[str, str]:
        """Return digests of the user's code."""
        model: Any = self.model
        if isinstance(model, Graph):
            model = {n: (b.module, b.output, b.loss) for n, b in model.blocks.items()}
        return {**code_digests({"the model": model}), **self.functions()}

    def functions(self) -> dict[str, str]:
        """Return those of all but the model."""
        steps = self.optimizer and (self.optimizer.function, self.optimizer.scheduler)
        rules = {f"the rule of {pattern}": rule for pattern, rule in self.rules.items()}
        several: dict[str, Any] = {"the loss": self.loss, "phi": self.phi, "the optimizer": steps}
        own = own_optimizer(self.settings.learning.optimizer)
        several |= {"learning.optimizer": own, "the level": self.level}
        return code_digests({**several, **rules})

    def planned(self, snapshot: Snapshot | None = None) -> tuple[Graph, Plan]:
        with unchanged(modules_of(self.model)):
            graph = self.graph()
            blocks = graph.unsliced.blocks
            check_apart({n: [m for m in (b.module, b.output) if m] for n, b in blocks.items()})
            functions: dict[str, Any] = {
                "phi": self.phi,
                "optimizer": self.optimizer,
                "level": self.level,
            }
            plan = make_plan(graph, self.settings, self.spec, **functions)
            try_rules(plan)
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
            snapshot_policy = replace(snapshot_policy, stream=self.known_by, code=self.code())
        plan = replace(plan, snapshot_policy=snapshot_policy)
        if self.settings.partition.delays == "auto":
            plan = replannable(plan, graph, self.settings, self.phi, self.optimizer)
        return graph, plan

    def resumed(self, where: str | Path, stream: Stream) -> tuple[Graph, Plan, list[str]]:
        """Resume from the latest snapshot at `where`; also returns warnings."""
        notes: list[str] = []
        snapshot = latest(where, notes.append)
        warnings.warn(ChoiceWarning(origin(snapshot)), stacklevel=4)
        notes += other_stream(snapshot, self.known_by)
        settings = self._kept_at(snapshot)
        graph, plan = settings.planned(snapshot)
        other = differences(snapshot, plan, settings.settings)
        if not other and (over := ended(snapshot, settings.settings, stream)):
            other = [over]
        if not other:
            names = changed(snapshot, settings.settings)
            if names:
                notes.append(f"the run goes on with other settings than before: {', '.join(names)}")
            if graph.state:
                notes.append(
                    f"Python state of the model's forward ({', '.join(sorted(graph.state))}) is in "
                    "no snapshot and begins anew: the numbers are not those of a run that was "
                    "never stopped"
                )
            notes += [*other_code(snapshot, self.code()), *bent_course(snapshot, settings.settings)]
            notes += other_bits_than(snapshot, plan)
            plan = replace(plan, skip=snapshot.manifest.skip)
            if plan.engine.digests and not snapshot.digests:
                notes.append(
                    f"engine.digests: {snapshot} was taken without them, so this run has none: "
                    "they would begin in its midst"
                )
                plan = replace(plan, engine=plan.engine.model_copy(update={"digests": False}))
            return graph, plan, notes
        model: nn.Module | Graph
        if isinstance(self.model, Graph):
            model = graph_with_weights(self.model, snapshot)
        else:
            before = replace(settings, settings=earlier(snapshot), policy=None, rules={})
            model = with_weights(self.model, weights_of(snapshot, before.graph()))
        settings = replace(settings, model=model)
        graph, plan = settings.in_folder_of_its_own(snapshot).planned()
        notes.append(
            f"{snapshot} was taken of another run ({', '.join(other)} differ): its weights and its "
            f"place in the stream ({snapshot.manifest.samples} samples) are taken over; states, "
            "costates, traces, signals under way and metrics begin anew"
        )
        then = snapshot.manifest
        return graph, replace(plan, skip=then.samples, passed=then.passed), notes

    def in_folder_of_its_own(self, snapshot: Snapshot) -> _Arguments:
        """Keep a run that begins its ticks anew from writing among those of the snapshot's run."""
        snapshots = self.settings.snapshots
        if snapshots.path is None or storage(snapshots.path).where != snapshot.where:
            return self
        path = f"{snapshot.where}/from-{snapshot.folder}"
        return replace(self, settings=self.settings.changed(snapshots={"path": path}))

    def _kept_at(self, snapshot: Snapshot) -> _Arguments:
        """Put new snapshots beside the one that the run goes on from, unless settings say so,
        and use measured delays again."""
        settings, keeps = self.settings, True
        if settings.snapshots.path is None:
            settings, keeps = settings.changed(snapshots={"path": snapshot.where}), False
        if settings.partition.delays == "auto":
            settings = settings.changed(partition={"delays": snapshot.manifest.delays})
        return replace(self, settings=settings, keeps=keeps)


def plan_of(
    model: nn.Module | Graph, settings: Settings, spec: SampleSpec, snapshot: Snapshot | None = None
) -> Plan:
    """Return the plan with which `train` would begin. Raises what `train` raises before that.

    With a snapshot it is that of the same run, which goes on from there and takes no further ones;
    raises SnapshotError if the snapshot is of another one.
    """
    rules = {p: make_rule(f"rules.{p}", rule) for p, rule in settings.learning.rules.items()}
    level = _named_level(settings)
    work = _Arguments(model, spec, settings, None, None, None, rules=rules, level=level)
    if snapshot is None:
        return work.planned()[1]
    work = work._kept_at(snapshot)
    plan = replace(work.planned(snapshot)[1], skip=snapshot.manifest.skip)
    other = differences(snapshot, plan, work.settings)
    policy = plan.snapshot_policy
    if other or policy is None:
        raise SnapshotError(f"{snapshot} is of another run: {', '.join(other)} differ")
    section = policy.section.model_copy(update={"every": None, "seconds": None})
    return replace(plan, snapshot_policy=replace(policy, section=section, last=False))


def snapshot_model(
    snapshot: Snapshot, model: nn.Module | Graph, spec: SampleSpec, settings: Settings
) -> nn.Module:
    """Return the plain module with the weights of a snapshot of a run of `settings` on `model`.

    They are averages where `learning.average` asks for them, as in `RunResult.model`. Raises
    SnapshotError if they do not fit.
    """
    graph = _Arguments(model, spec, settings, None, None, None).graph()
    return weights_of(snapshot, graph, averaged=True)


def make_engine(settings: Settings) -> Engine:
    """Return the engine that the settings name."""
    if settings.engine.kind is EngineKind.INPROCESS:
        return InProcessEngine()
    with ray_environment(settings.engine):
        from hamdist.runtime.ray_engine.engine import RayEngine  # Ray takes seconds to import

    return RayEngine()
