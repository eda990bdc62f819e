"""Centralised backpropagation beside locality levels: same model, stream, order and seeds."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

from hamdist.config import EngineKind, Level, Settings, SignedCourseSettings, Update
from hamdist.dynamics.schedule.levels import PRESETS
from hamdist.errors import BlockError, SettingsError
from hamdist.runtime.plan.checks import PRESENTED
from hamdist.runtime.process.interrupts import OnProgress
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.train.prepare import make_level, make_rule, settings_at
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.export import starting_plan as plan_run
from hamdist.study.run.own_data import NO_FUNCTIONS, OwnFunctions
from hamdist.study.run.run import Run, run_level
from hamdist.study.shared.result_folder import Store

KEY_LENGTH = 20

ALIGNMENTS = 50
HELD = 20


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run that a comparison will make; `level` is None for the centralised baseline, and a name
    for a level of one's own.

    rule: the name of a rule of learning that all blocks have, if they have one.
    """

    level: Level | str | None
    seed: int
    rule: str | None = None

    @property
    def name(self) -> str:
        """Return the level's name, the rule's, or 'centralised'."""
        if self.rule is None and self.level is None:
            return CENTRALISED
        level = self.level.value if isinstance(self.level, Level) else self.level
        return str(self.rule or level).rpartition("/")[2]

    def of(self, settings: Settings) -> Settings:
        """Return the settings of this run (those of `backprop` for the baseline).

        A comparison of rules shows alignments at ALIGNMENTS samples, and holds a sample for HELD
        ticks where a rule needs that, unless the settings say otherwise.
        """
        shows, kind = bool(settings.compare.rules), None
        settings = settings_at(settings, self.level or Level.BACKPROP)
        locality = settings.locality
        changes: dict[str, Any] = {"learning": {}, "locality": {}, "dynamics": {}}
        if self.rule is not None:
            rule = make_rule("compare.rules", self.rule)
            kind = rule.presentation
            changes["learning"] = {"rules": {"*": self.rule}}
        if kind == "hold" and locality.speed is None and locality.update is None:
            changes["locality"] = {"speed": HELD, "update": Update.LAST}
            nudges = rule.nudges(HELD)
            if nudges and settings.dynamics.phi is None:
                phi = SignedCourseSettings(values=tuple(nudges), cycle=True)
                changes["dynamics"] = {"phi": phi}
        settings = settings.changed(seed=self.seed, **changes)
        shows = shows and self.level is not None
        return with_alignment(settings, ALIGNMENTS) if shows else settings


def with_alignment(settings: Settings, probes: int) -> Settings:
    """Return the settings with `metrics.alignment` for about so many probes of a run.

    As they are where they say it themselves, and where no update is of one sample alone (rules that
    carry traces from token to token among them).
    """
    parts = settings.locality.microbatches
    rules = [make_rule(f"rules.{name}", rule) for name, rule in settings.learning.rules.items()]
    whole = settings.level in (Level.AUTO, Level.BPTT, Level.PIPELINE) or parts not in (None, 1)
    whole = whole or any(rule.presentation == "sequence" for rule in rules)
    whole = whole or settings.stream.relearn == "trace"
    if whole or settings.metrics.alignment is not None:
        return settings
    every = max(1, (settings.steps or 0) // probes)
    return settings.changed(metrics={"alignment": every})


def plan(settings: Settings) -> list[PlannedRun]:
    """Return the runs of a comparison: the baseline with every seed, then the levels, seed by seed.

    So no baseline shares the machine with an idle Ray. Raises SettingsError if nothing bounds the
    runs.
    """
    if settings.steps is None:
        raise SettingsError(
            "steps: a comparison needs the number of samples of each run; set it in the settings "
            "or with --steps"
        )
    levels: list[tuple[Level | str, str | None]] = [
        (level, None) for level in settings.compare.levels
    ]
    if settings.compare.rules:
        levels = [_of_rule(name, settings.level) for name in settings.compare.rules]
    levels = list(dict.fromkeys(levels))
    for level, _ in levels:
        if not isinstance(level, Level):
            make_level("compare.levels", level)  # before anything runs
    names = [PlannedRun(level, 0, rule).name for level, rule in levels]
    if len({*names}) < len(names):
        raise SettingsError(f"compare: two have the same name: {', '.join(names)}")
    seeds = range(settings.seed, settings.seed + settings.compare.seeds)
    baselines = [PlannedRun(None, seed) for seed in seeds]
    return baselines + [PlannedRun(level, seed, rule) for seed in seeds for level, rule in levels]


def _of_rule(name: str, level: Level) -> tuple[Level, str | None]:
    """Return the level of an entry of `compare.rules`, `level` if it fits; and a rule's name."""
    levels = {level.value: level for level in Level}
    if name in levels:
        return levels[name], None
    presentation = make_rule("compare.rules", name).presentation
    fits = level is not Level.AUTO and PRESETS[level].presentation.value == PRESENTED.get(
        presentation
    )
    return level if fits else Level.LOCAL if presentation == "hold" else Level.TRACE, name


def compare(
    settings: Settings,
    planned: Sequence[PlannedRun],
    *,
    own: OwnFunctions = NO_FUNCTIONS,
    on_progress: Callable[[PlannedRun], OnProgress] | None = None,
    store: Store[Run] | None = None,
    made_of: str = "",
) -> Iterator[Run]:
    """Make the runs one after the other and yield each as it ends, if all of them can be planned.

    Each level has its own settings (`Settings.for_level`); the baseline has those of `backprop`.
    The runs on Ray share one session and its actors. An interrupted run is the last one. Raises
    HamdistError as the runs do.

    Args:
        store: stores the finished runs; stored ones are not made again.
        made_of: further dependencies of the runs, as text (the user's code).
    """
    runs = []
    for each in planned:
        run_settings = _with_own_snapshots(each.of(settings), each.name)
        key = run_key(run_settings, each.name, made_of)
        stored = None if store is None else store.find(key)
        runs.append((each, run_settings, key, stored))
    _check([r for each, r, _, stored in runs if each.level and not stored], own)
    with ExitStack() as stack:
        for each, run_settings, key, stored in runs:
            callback = None if on_progress is None else on_progress(each)
            if stored is not None:
                yield stored
                continue
            if each.level is not None and run_settings.engine.kind is EngineKind.RAY:
                stack.enter_context(ray_session(run_settings.engine))
            baseline = CENTRALISED if each.level is None else None
            try:
                run, _ = run_level(run_settings, baseline=baseline, own=own, on_progress=callback)
            except BlockError as error:
                if baseline is None or own.plain is None or error.tick:
                    raise
                raise SettingsError(f"--baseline-model, first sample: {error.message}") from error
            run.level = each.name
            if store is not None and not run.interrupted:
                store.keep(key, json.dumps({"key": key, **run.as_json()}))
            yield run
            if run.interrupted:
                return


def _check(runs: Sequence[Settings], own: OwnFunctions) -> None:
    """Plan the levels with their first seed: what cannot run is found before anything does."""
    own = own._replace(data=own.data and cache(own.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (the run says it again)
        for settings in runs:
            if settings.level is not Level.AUTO and settings.seed == runs[0].seed:
                plan_run(settings, own)


def run_key(settings: Settings, *made_of: object) -> str:
    """Return a hash of all that a run depends on: its settings, and `made_of`."""
    text = json.dumps([settings.model_dump(mode="json"), *made_of], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _with_own_snapshots(settings: Settings, name: str) -> Settings:
    """Return the settings with a folder of its own for the run's snapshots, if it takes any."""
    path = settings.snapshots.path
    if path is None:
        return settings
    return settings.changed(snapshots={"path": f"{path.rstrip('/')}/{name}-{settings.seed}"})
