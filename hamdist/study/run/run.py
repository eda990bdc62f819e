"""One run of a study: builds the model and the stream that settings name, trains, evaluates.

Everything that a comparison needs of a run is in a `Run`; the trained model comes beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hamdist.config import DType, Settings
from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedSequence
from hamdist.dynamics.modules.prenorm import stabilised
from hamdist.dynamics.objective.losses import main_output, make_losses
from hamdist.dynamics.objective.prequential import Window, merge_windows
from hamdist.dynamics.user_modules.python_state import functions_of
from hamdist.errors import (
    ChoiceWarning,
    DivergedError,
    HamdistError,
    HamdistWarning,
    SettingsError,
    StreamError,
)
from hamdist.models.build import (
    BASELINE_OPTION,
    CELLS,
    ModelFactory,
    make_from_factory,
    make_from_settings,
    only_loss,
)
from hamdist.runtime.placement.step_costs import example_inputs
from hamdist.runtime.process.interrupts import OnProgress
from hamdist.runtime.process.startup import Startup, phases_to
from hamdist.runtime.process.usage import joules_from_now, keep_freed_memory
from hamdist.runtime.results.result import APART, Progress, RunFacts, RunResult
from hamdist.runtime.results.scores import Scores, evaluate, evaluate_samples, evaluate_sequences
from hamdist.runtime.train.train import train
from hamdist.streams import drifts, held_out, held_out_tokens, make_stream
from hamdist.streams.sample import SampleSpec, Stream
from hamdist.streams.wrappers.derived import WithoutSample
from hamdist.study.run.baseline import CENTRALISED, FROZEN, baseline_warnings, train_centralised
from hamdist.study.run.measures import DriftRecovery, Tracking, advice, recoveries, tracking
from hamdist.study.run.own_data import (
    NO_FUNCTIONS,
    OwnData,
    OwnFunctions,
    check_held_out,
    load_matching,
    with_saved_weights,
)
from hamdist.study.shared.machine import check_size, check_time

PYTORCH = "pytorch"
TIMELINE_LIMIT = 4096


@dataclass(slots=True, kw_only=True)
class Run(RunFacts):
    """A run's numbers.

    level: a level's name, 'centralised' or 'frozen'. engine: an engine's name, or 'pytorch'.
    batch: rows of a sample, in the mean.
    startup_seconds, startup: with what came before the engine.
    windows: prequential, of the (last) readout; of a model of several outputs, of the one that
    `held_out` names as the main one. prequential: of such a model, all windows in one by output.
    window_seconds: when each window's last sample had entered, counted as `seconds` is (0 for those
    before `resumed`).
    held_out: None after an interruption or a failure, and for streams without held-out part; of
    averaged weights (`learning.average`), where there are some; held_out_plain: then of the weights
    as they were in the end, which plain has.
    failure: how the run left the finite range, or what else ended it before its time, if it did;
    its model has the weights from before. error: the same as the exception.
    tracking: how well a real-valued target was followed, where its course was recorded.
    drifts: what the prequential accuracy did after each labelled drift of the stream.
    joules: of this machine's processors from the start of the actors to the end, whoever used them;
    None where the kernel does not count them.
    The rest is as in RunFacts.
    """

    level: str
    engine: str
    seed: int
    batch: int | float
    windows: Sequence[Window]
    window_seconds: Sequence[float]
    held_out: Scores | None
    failure: str | None = None
    tracking: Tracking | None = None
    prequential: dict[str, Window] = field(default_factory=dict)
    drifts: Sequence[DriftRecovery] = field(default_factory=tuple)
    held_out_plain: Scores | None = None
    joules: float | None = None
    records: dict[str, Records] = field(default_factory=dict, metadata=APART)
    plain: nn.Module | None = field(default=None, metadata=APART)
    error: HamdistError | None = field(default=None, metadata=APART)

    @property
    def cpu_seconds(self) -> float | None:
        """Return the seconds of processors of all processes, while samples entered; None where they
        are not known, as of an actor that was lost."""
        spent = [use["cpu"] for use in self.time_use.values() if "cpu" in use]
        return sum(spent) if spent and not self.replaced else None

    @property
    def rows_per_second(self) -> float:
        """Return the rows (samples times batch) per second."""
        return self.new_samples * self.batch / self.seconds if self.seconds > 0 else 0.0


class Timeline:
    """Times at which samples entered, from a run's progress; in constant memory."""

    def __init__(self, then: OnProgress | None = None) -> None:
        self._points: list[tuple[int, float]] = [(0, 0.0)]
        self._then = then

    def __call__(self, progress: Progress) -> object:
        if progress.phase is None:
            self._points.append((progress.samples, progress.seconds))
        if len(self._points) > TIMELINE_LIMIT:
            self._points = self._points[::2]
        return None if self._then is None else self._then(progress)

    def at(self, numbers: Sequence[int], end: tuple[int, float], resumed: int = 0) -> list[float]:
        """Return the seconds at which each of `numbers` samples had entered: 0 up to `resumed`.

        `end`: samples and seconds in all.
        """
        between = {point for point in self._points if resumed < point[0] < end[0]}
        points = sorted(between | {(min(resumed, end[0]), 0.0), end})
        samples, seconds = zip(*points, strict=True)
        return [float(s) for s in np.interp(numbers, samples, seconds)]


def run_level(
    settings: Settings,
    *,
    baseline: str | None = None,
    own: OwnFunctions = NO_FUNCTIONS,
    on_progress: OnProgress | None = None,
    before: Mapping[str, float] | None = None,
    resume: str | Path | None = None,
    weights: Path | None = None,
    without: int | None = None,
    partial: bool = False,
) -> tuple[Run, nn.Module]:
    """Train with `settings` (made for one level by `for_level`) and evaluate on held-out data.

    A run that left the finite range is returned, too, with its `failure`.

    Args:
        baseline: trains centralised instead (baseline.py): CENTRALISED, or FROZEN, the last layer
            alone.
        own: makes the model and the stream, instead of those that the settings name.
        before: what came before this call and belongs to the run's start (seconds by phase).
        resume: a folder of snapshots that the run goes on from.
        weights: a safetensors file that it begins with.
        without: the number of a sample that the stream leaves out.
        partial: return a run that another error ended behind its first sample, too.

    Raises:
        HamdistError: of the settings, or of the run.
    """
    level, engine = settings.level_name, settings.engine.kind.value
    if baseline is not None:
        level, engine = baseline, PYTORCH
    dtype = torch_dtype(settings.dtype)
    startup = Startup(phases_to(on_progress, settings.steps))
    startup.add(before or {})
    with startup.phase("data"):
        check_size(settings, own_model=own.model is not None, own_data=own.data is not None)
        notes = [] if own.model is not None or own.data is not None else check_time(settings)
        own_data = None if own.data is None else own.data(settings.seed).in_dtype(dtype)
        stream = stream_of(settings, own_data)
        if without is not None:
            stream = WithoutSample(stream, without, settings.steps)
        model = build(settings, stream.spec, own.model, dtype)
        if weights is not None:
            model = with_saved_weights(model, weights)
        notes += advice(settings)
        rules = [] if isinstance(model, Graph) else functions_of(model)
        if baseline is not None and own.plain is not None:
            seed, option = settings.seed, BASELINE_OPTION
            plain_model = make_from_factory(own.plain, seed=seed, dtype=dtype, option=option)
            notes.append(load_matching(plain_model, model))
            model = plain_model
        elif engine == PYTORCH and rules:
            notes.append(
                f"the model has a rule of its own ({', '.join(rules)}, an autograd.Function), "
                "which centralised training follows too: the gap to it says nothing of that rule; "
                "compare with a module without it, --baseline-model FILE.py:FUNCTION"
            )
        if own_data is not None and isinstance(model, nn.Module):
            check_held_out(model, own_data)
    prepared = sum(startup.seconds.values())
    if engine == PYTORCH:
        notes += baseline_warnings(settings)
    for text in notes:
        warnings.warn(text, HamdistWarning, stacklevel=2)
    timeline = Timeline(on_progress)
    error: HamdistError | None = None
    joules = joules_from_now()
    try:
        result = _trained(level, model, stream, settings, timeline, resume)
    except HamdistError as caught:
        if caught.result is None or not (partial or isinstance(caught, DivergedError)):
            raise
        result, error = caught.result, caught
    used = joules()
    startup.add(result.startup)
    whole = not result.interrupted and error is None
    scores = plain_scores = None
    try:
        if whole:
            scores = _score(result.model, result, settings, own_data)
            if result.plain is not None:
                plain_scores = _score(result.plain, result, settings, own_data)
    except KeyboardInterrupt:  # what was learned is not lost with it
        result.interrupted, scores = True, None
    except StreamError as wrong:  # of a user's own data; what was learned is not lost with it
        notes.append(f"no held-out score: {wrong}")
        warnings.warn(notes[-1], HamdistWarning, stacklevel=2)
    windows = _main_windows(result, scores)
    entered = [window.last + 1 for window in windows]
    facts = {
        **result.shared(),
        "startup": startup.seconds,
        "startup_seconds": prepared + result.startup_seconds,
        "warnings": [*notes, *result.warnings],
    }
    run = Run(
        level=level,
        engine=engine,
        seed=settings.seed,
        batch=_mean_batch(result, stream.spec),
        windows=windows,
        window_seconds=timeline.at(entered, (result.samples, result.seconds), result.resumed),
        held_out=scores,
        held_out_plain=plain_scores,
        plain=result.plain,
        joules=used,
        prequential=_by_output(result) if len(result.windows) > 1 else {},
        failure=None if error is None else str(error),
        error=error,
        tracking=tracking(result.records, settings),
        records=result.records,
        drifts=recoveries(windows, drifts(settings.stream, result.samples)),
        **facts,
    )
    return run, result.model


def _trained(
    level: str,
    model: nn.Module | Graph,
    stream: Stream,
    settings: Settings,
    timeline: Timeline,
    resume: str | Path | None = None,
) -> RunResult:
    if level not in (CENTRALISED, FROZEN):
        return train(model, stream, settings, on_progress=timeline, resume=resume)
    if isinstance(model, Graph) and settings.model.kind in CELLS:
        spec = stream.spec
        model = MergedSequence(model, model.shapes(spec.u_shape, spec.u_dtype, spec.parents))
    if isinstance(model, Graph):
        raise SettingsError(
            f"model.kind: there is no centralised training of a {settings.model.kind.value} to "
            "compare with; use `hamdist run` (`hamdist verify --only tracking` proves it)"
        )
    frozen = level == FROZEN
    keep_freed_memory()  # as the engines do
    return train_centralised(model, stream, settings, frozen=frozen, on_progress=timeline)


def stream_of(settings: Settings, own_data: OwnData | None) -> Stream:
    """Return the user's stream, else that of the settings."""
    if own_data is not None:
        return own_data.train
    return make_stream(settings.stream, seed=settings.seed, dtype=torch_dtype(settings.dtype))


def build(
    settings: Settings, spec: SampleSpec, factory: ModelFactory | None, dtype: torch.dtype
) -> nn.Module | Graph:
    """Return the model that the settings name, or that `factory` makes. Raises SettingsError."""
    model = make_from_settings(settings, spec, factory, dtype)
    if not settings.model.stabilise:
        return model
    if isinstance(model, Graph):
        raise SettingsError(
            f"model.stabilise: a {settings.model.kind.value} is no chain of layers; leave it out"
        )
    normed, notes = stabilised(model, example_inputs(spec))
    for text in notes:
        warnings.warn(ChoiceWarning(text), stacklevel=4)
    return normed


def _score(
    model: nn.Module, result: RunResult, settings: Settings, own_data: OwnData | None
) -> Scores | None:
    """Return the held-out scores; None if nothing is held out."""
    ignored, losses = settings.ignore_index, make_losses(settings.loss, settings.ignore_index)
    drawn: dict[str, Any] = {"seed": settings.seed, "dtype": torch_dtype(settings.dtype)}
    if own_data is not None:
        held = own_data.held_out
    elif isinstance(model, MergedSequence):
        held = held_out_tokens(settings.stream, **drawn)
    else:
        samples = result.samples + result.stream.get("dropped", 0)
        part = held_out(settings.stream, samples=samples, **drawn)
        return None if part is None else evaluate(model, *part, losses, ignore_index=ignored)
    if held is None:
        return None
    if isinstance(model, MergedSequence):
        return evaluate_sequences(model, held, only_loss(settings), ignore_index=ignored)
    spec = None if own_data is None else own_data.train.spec
    targets = None if spec is None else spec.targets
    return evaluate_samples(model, held.samples(), losses, targets, ignore_index=ignored, spec=spec)


def _main_windows(result: RunResult, scores: Scores | None) -> list[Window]:
    """Return the windows of the main output."""
    windows = result.windows
    if scores is not None and scores.main in windows:
        return windows[scores.main]
    totals = _by_output(result)
    return windows[main_output({n: w.accuracy for n, w in totals.items()})] if totals else []


def _mean_batch(result: RunResult, spec: SampleSpec) -> int | float:
    """Return the rows of a sample in the mean: batches may be uneven."""
    if result.rows in (0, result.samples * spec.batch):
        return spec.batch
    return result.rows / result.samples


def _by_output(result: RunResult) -> dict[str, Window]:
    """Return all windows merged into one, by readout."""
    return {name: merge_windows(windows) for name, windows in result.windows.items() if windows}


def torch_dtype(name: DType) -> torch.dtype:
    """Return the type of torch's that settings name."""
    return {DType.FLOAT32: torch.float32, DType.FLOAT64: torch.float64}[name]
