"""The Python interface in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hamdist.config import Settings, lay_over
from hamdist.display.progress import shown
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.objective.losses import LossFunction
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.optimizers import OptimizerFunction, SchedulerFunction
from hamdist.errors import HamdistError, SettingsError
from hamdist.models.build import make_from_settings
from hamdist.runtime.live.begin import (
    COMPUTES,
    check_repeatable,
    layers_of,
    live_run,
    read_beginning,
    with_first_weights,
)
from hamdist.runtime.live.callbacks import (
    Callback,
    EarlyStopping,
    EndsWhen,
    LiveStatus,
    check_callbacks,
)
from hamdist.runtime.live.run import LiveRun
from hamdist.runtime.process.interrupts import ProgramSignals, RunInterrupts
from hamdist.runtime.results.events import EventListener
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.results.run_events import RunEvents
from hamdist.runtime.train.arguments import check_arguments, functions_of, prepared
from hamdist.runtime.train.prepare import NamedRule
from hamdist.streams import Stream, from_iterable, make_stream
from hamdist.streams.batch_names import Names
from hamdist.streams.iterable import IterableStream
from hamdist.streams.replay import next_sample
from hamdist.trackers import listeners_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hamdist.config.settings import SettingsFields


def train(
    model: nn.Module | Graph,
    stream: Stream | Iterable[Any],
    settings: Settings | None = None,
    *,
    loss: LossFunction | str | Mapping[str, LossFunction | str] | None = None,
    phi: TickSchedule | None = None,
    optimizer: OptimizerFunction | None = None,
    scheduler: SchedulerFunction | None = None,
    rules: Mapping[str, NamedRule] | None = None,
    classes: int | Mapping[str, int] | None = None,
    names: Names | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    trackers: Sequence[str | EventListener] = (),
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **fields: Unpack[SettingsFields],
) -> RunResult:
    """Train `model` on `stream`; `result.model` is a plain module with the learned weights.

        result = hamdist.train(model, stream, level="trace", steps=2000, learning={"lr": 0.1})

    Args:
        model: any `nn.Module`, which is cut into blocks as the level or `partition` say; a `Graph`
            brings its own blocks. A copy is trained: `model` itself does not change. A model with
            several inputs takes u as a dict by argument, or as a tuple; one with several outputs
            takes y as a dict by output (the keys of the dict that it returns, or `out0`, `out1`,
            ...).
        stream: a `hamdist.streams.Stream`, a DataLoader, or any iterable of (u, y), with the batch
            in front of u and y, or of dicts.
        settings: the settings of the run; None for the defaults.
        loss: (prediction, target) -> scalar mean over the batch, or the name of one (`Loss`),
            instead of `settings.loss`; or a dict of these by output, whose other outputs are not
            learned. 'model' learns the output `loss` of a model that computes it from targets
            among its inputs.
        phi: the scale of the loss by tick (by sample at levels such as `trace`), instead of a
            number.
        optimizer: makes the optimiser of each block from the list of its parameters, at levels
            whose weights move when a message arrives:
            `lambda params: torch.optim.AdamW(params, lr=1e-3)`; or a list of optimisers.
        scheduler: makes the scheduler of an optimiser, which is stepped once per sample:
            `lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)`.
        rules: how blocks learn, by name or pattern of the block: a `hamdist.Rule`, the name of a
            built-in one (`hamdist rules`), or a mapping with its name and arguments:
            `{"block*": MyRule(), "block3": "kolen-pollack"}`; other blocks learn as the level says.
        classes: number of classes of the class targets of a DataLoader or iterable; None for as
            many as the model predicts.
        names: the meaning of the keys of its batches (see `streams.from_iterable`), instead of
            `settings.stream.names`.
        on_progress: called with a `Progress` one to four times a second, and at every phase of the
            start. By returning or raising `hamdist.Stop` it ends the run (`result.stopped`); any
            other exception ends the run, too, and gets the weights learned so far as its `result`.
        trackers: names (`settings.trackers`), whose files go to `results/NAME-TIME`, and functions
            of a `RunEvent`, called with each event of the run.
        resume: a folder of snapshots (`snapshots.path` of an earlier run), or one of them: the run
            continues from it.
        callbacks: called as things happen (`hamdist.Callback`); the stream is then drawn in this
            process, and fed to a run of `start`.
        **fields: fields of `Settings` by name, which take precedence over `settings`. `partition`
            may be a function, too: from the places where a block can begin (`CutPlace`) to the
            names of the modules that begin one; `level` a `hamdist.OwnLevel`.

    Returns:
        The learned model with the figures, warnings and settings of the run.

    Raises:
        HamdistError: before anything starts a SettingsError, GraphError or LevelError; from a run,
            whose processes have ended by then, a StreamError, BlockError, StallError or
            ClusterError. Of a run that had got its first sample, `error.result` is the result up
            to there.
        SystemExit: SIGTERM has ended the run, and ends the program, which has no handler of its
            own; KeyboardInterrupt: Ctrl-C came a second time. Both have the `result`, too.
    """
    functions = {"phi": phi, "optimizer": optimizer, "scheduler": scheduler}
    check_arguments(model, settings, functions, on_progress)
    code, changes = {**functions, "rules": rules}, dict[str, Any](fields)
    changes |= _named(trackers)
    work, read = prepared(model, stream, settings, loss, classes, names, code, changes)
    if callbacks and (on_progress is not None or resume is not None):
        raise SettingsError("callbacks: leave on_progress and resume out (start has resume)")
    with ProgramSignals() as program:
        if callbacks:
            result = _called_back(work, model, read, callbacks, trackers)
            return program.passed(result, result.signals)
        own_settings, batch = work.keywords["settings"], read.spec.batch
        with (
            shown(own_settings, batch, on_progress) as show,
            RunEvents(own_settings, listeners_of(own_settings, trackers), batch) as events,
        ):
            result = work(stream=read, on_progress=events.over(show), resume=resume)
            events.finish(result)
        return program.passed(result, result.signals)


def _named(trackers: Sequence[str | EventListener]) -> dict[str, Any]:
    """Return the names among trackers as the field of settings; nothing if there are none.

    Raises SettingsError for what is neither a name nor a function.
    """
    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        raise SettingsError(f"trackers: give a list of names and functions, not {trackers!r}")
    for tracker in trackers:
        if not (isinstance(tracker, str) or callable(tracker)):
            raise SettingsError(
                f"trackers: {tracker!r} is neither a name nor a function of an event"
            )
    names = [tracker for tracker in trackers if isinstance(tracker, str)]
    return {"trackers": names} if names else {}


def start(
    model: nn.Module | Graph,
    settings: Settings | None = None,
    *,
    example: Any,
    idle: float | None = 0.01,
    patience: int = 1024,
    out: str | Path | None = None,
    loss: LossFunction | str | Mapping[str, LossFunction | str] | None = None,
    classes: int | Mapping[str, int] | None = None,
    names: Names | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    until: Callable[[LiveStatus], bool] | None = None,
    trackers: Sequence[str | EventListener] = (),
    **fields: Any,
) -> LiveRun:
    """Start a run that learns from what is said to it; `stop` gives the result of `train`.

        with hamdist.start(model, level="trace", example=(x, y), classes=10) as run:
            answer = run.predict(x).prediction
            n = run.feed(x)
            run.teach(n, y)

    Args:
        example: (u, y) of the kind that will be fed, for the shapes; nothing is learned of it.
        idle: seconds of silence after which idle ticks let the samples under way come to their
            ends; None: only while somebody waits for an answer.
        patience: the most unlabelled samples that wait for a label, and answers for a reader.
        out: a folder for the journal, with which `replay` repeats the run, and for snapshots.
        resume: `out` of an earlier run, whose journal goes on: from its latest snapshot, or from
            the beginning; or one of its snapshots.
        callbacks: called as things happen (`hamdist.Callback`).
        until: called with `run.status()` behind every answer; the run ends when it returns True:
            the call that talks raises `hamdist.Stop`, which the run as a context takes for its end.
        trackers: as of `train`; their files lie in `out`, if there is one.
        model, settings, loss, classes, names, **fields: as of `train`, all of whose other arguments
            but `stream` and `on_progress` are taken, too.

    Returns:
        The run; as a context it ends with the block.

    Raises:
        HamdistError: as of `train`, before the run starts (SettingsError: an argument is wrong).
    """
    functions = functions_of(model, settings, fields)
    if patience < 1 or (idle is not None and idle < 0):
        raise SettingsError(f"patience is {patience}, idle {idle}; at least 1, and 0 or None")
    if out is not None and (settings is None or settings.snapshots.path is None):
        fields = lay_over({"snapshots": {"path": f"{out}/snapshots"}}, fields)
    if out is not None and resume is not None and Path(resume) == Path(out):
        model = with_first_weights(model, read_beginning(out)[2])
    fields |= _named(trackers)
    work, reader = prepared(model, [example], settings, loss, classes, names, functions, fields)
    if reader.spec.weighted:
        raise SettingsError("names: a live run has no weights of rows, which feed does not take")
    own_settings = work.keywords["settings"]
    listeners = listeners_of(own_settings, trackers, None if out is None else Path(out))
    begin: dict[str, Any] = {
        "classes": classes,
        "idle": idle,
        "patience": patience,
        "out": out,
        "resume": resume,
    }
    ends = [] if until is None else [EndsWhen(until)]
    hooks: dict[str, Any] = {"callbacks": [*callbacks, *ends], "listeners": listeners}
    return live_run(work, model, reader, **hooks, **begin)


def _called_back(
    work: partial[RunResult],
    model: Any,
    stream: Stream,
    callbacks: Sequence[Callback],
    trackers: Sequence[str | EventListener],
) -> RunResult:
    """Return the result of a live run that is fed all of the stream, or until a signal comes."""
    check_callbacks(callbacks)
    samples = iter(stream.samples())
    first, spec = next(samples), stream.spec
    if spec.patience:
        raise SettingsError(
            "callbacks: labels that come late reach a run with callbacks by `teach` alone "
            "(hamdist.start); leave LateLabels out, or take Rejoin, or no callbacks"
        )
    reader = IterableStream([first], classes=None, outputs=None, copied=False, spec=spec)
    settings = work.keywords["settings"]
    if all(isinstance(callback, EarlyStopping) for callback in callbacks):
        raise SettingsError(
            f"callbacks: {type(callbacks[0]).__name__} waits for evaluations, which nobody makes: "
            "add hamdist.Evaluation(x, y, every=...)"
        )
    hooks: Any = {"callbacks": callbacks, "listeners": listeners_of(settings, trackers)}
    run = live_run(work, model, reader, patience=1, **hooks)
    ending = RunInterrupts(lambda: None, None)
    try:
        with ending, run:
            for n in count() if settings.steps is None else range(settings.steps):
                sample = next_sample(samples, n) if n else first
                run.interrupted = ending.interrupted
                if run.interrupted:
                    break
                if sample is None:
                    run.ran_out()
                    break
                u = sample.u if sample.inputs is None else sample.inputs
                run.feed(u, sample.y, end=sample.end)
    except BaseException as error:
        error.result = getattr(error, "result", None) or run.result  # type: ignore[attr-defined]
        raise
    result = run.stop()
    result.signals = ending.signals
    return result


def replay(
    out: str | Path,
    model: nn.Module | Graph | None = None,
    settings: Settings | None = None,
    **fields: Any,
) -> RunResult:
    """Return the result of a live run, repeated from its journal: equal to the bit, in any engine.

    Args:
        out: the folder that `start` was given.
        model: of the same layers; its weights are replaced by those that the run began with. None
            for the one that the run's settings name (`hamdist serve recipe`).
        settings, **fields: of `start`, where they are no plain settings (`loss`, `optimizer`), or
            are to differ (`engine`).

    Raises:
        HamdistError: the journal is missing or damaged, the model is missing or another one, code
            of the run's program is missing, or the run went on with other settings.
    """
    facts, example, weights = read_beginning(out)
    check_repeatable(out, facts, fields)
    model = _settings_model(out, facts, example) if model is None else model
    functions = functions_of(model, settings, fields)
    loss, names = fields.pop("loss", None), fields.pop("names", None)
    stored = facts["settings"]
    computes = {n: v for n, v in stored.pop("engine", {}).items() if n in COMPUTES}
    began = lay_over({**stored, "engine": computes}, {"snapshots": {"path": None}})
    if settings is not None:
        began = lay_over(began, settings.model_dump(mode="json", exclude_unset=True))
    model, classes = with_first_weights(model, weights), facts["classes"]
    base = Settings.model_validate(began)
    work, reader = prepared(model, [example], base, loss, classes, names, functions, fields)
    patience = facts["patience"]
    return live_run(work, model, reader, patience=patience, out=out, repeats=True).stop()


def _settings_model(out: str | Path, facts: Mapping[str, Any], example: Any) -> nn.Module | Graph:
    """Return the model that the settings of a live run name, if it was that. Raises SettingsError.

    Its layers say whether it was; weights of the same shapes may be those of another one.
    """
    settings = Settings.model_validate(facts["settings"])
    dtype = getattr(torch, settings.dtype.value)
    model: nn.Module | Graph | None = None
    try:
        stream: Stream = from_iterable([example], classes=facts["classes"])
        if "stream" in settings.model_fields_set:
            stream = make_stream(settings.stream, seed=settings.seed, dtype=dtype)
        model = make_from_settings(settings, stream.spec, None, dtype)
    except HamdistError:
        pass  # there is none
    if model is None or layers_of(model) != facts["layers"]:
        raise SettingsError(
            f"replay({str(out)!r}): the run's model is not one that its settings name, and a "
            "journal holds weights, but no code: give it as well, as in replay(out, model), or "
            "`hamdist replay DIR --model file.py:function`"
        )
    return model
