"""`hamdist.compare`, and what `hamdist compare` does: runs, their folder, their table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hamdist.config import Settings, settings_with
from hamdist.display.figure import draw_figure
from hamdist.display.progress import RunDisplay, display_of
from hamdist.display.run_view import TimeLeft
from hamdist.display.table import Table, frame
from hamdist.display.windows import columns, windows_figure
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import HamdistError, SettingsError
from hamdist.models.build import ModelFactory
from hamdist.runtime.process.interrupts import OnProgress, ProgramSignals
from hamdist.runtime.results.events import EventListener, RunBegun
from hamdist.study.report.aggregate import AggregateRow, aggregate
from hamdist.study.report.files import final_events
from hamdist.study.report.save import save_comparison
from hamdist.study.report.table import comparison_table, finished_line
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.comparison import PlannedRun, plan, run_key
from hamdist.study.run.comparison import compare as runs_of
from hamdist.study.run.own_data import NO_FUNCTIONS, OwnFunctions, data_of
from hamdist.study.run.run import Run
from hamdist.study.shared.named_code import code_of
from hamdist.study.shared.recipes import load_settings
from hamdist.study.shared.result_folder import RUNS, ResultFolder, Store, written_at_the_end
from hamdist.trackers import open_trackers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hamdist.config.settings import RunFields
    from hamdist.streams.batch_names import Names


@dataclass(slots=True, kw_only=True, repr=False)
class Comparison:
    """The runs of a comparison that have ended; a notebook shows its table and its curves.

    Attributes:
        settings: of all runs together.
        runs: in the order in which they were made.
        folder: of their files, if there is one.
        interrupted: not all runs were made.
    """

    settings: Settings
    runs: list[Run] = field(default_factory=list)
    folder: Path | None = None
    interrupted: bool = True

    @property
    def rows(self) -> list[AggregateRow]:
        """Return a row per level: means over the seeds, and the gap to centralised training."""
        return aggregate(self.runs)

    @property
    def table(self) -> Table:
        """Return the rows as text, as `hamdist compare` prints them."""
        return comparison_table(self.rows)

    @property
    def metrics(self) -> Any:
        """Return the windows of all runs by column: `level`, `seed`, and as `RunResult.metrics`."""
        heads = [({"level": run.level, "seed": run.seed}, run) for run in self.runs]
        return frame(columns([(head, window) for head, run in heads for window in run.windows]))

    def plot(self, ax: Any = None) -> Any:
        """Return the curves by level, over all seeds, as a picture.

        Args:
            ax: as of `RunResult.plot`.
        """
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.level, []).append(run)
        curves = {
            level: [
                merge_windows(windows) for windows in zip(*(r.windows for r in runs), strict=False)
            ]
            for level, runs in groups.items()
        }
        return draw_figure(windows_figure(self.settings.name, curves, baseline=CENTRALISED), ax)

    def __repr__(self) -> str:
        whole = ", interrupted" if self.interrupted else ""
        return f"Comparison({self.settings.name}: {len(self.runs)} runs{whole})"

    def _repr_html_(self) -> str:
        picture: str = self.plot().svg
        return self.table._repr_html_() + picture

    def save(self, command: str) -> None:
        """Write the report and its data into the folder, if there is one and a run has ended.

        Args:
            command: what the report says of its origin.

        Raises:
            HamdistError: a file cannot be written.
        """
        if self.folder is not None and self.runs:
            ended = self.interrupted
            with written_at_the_end():
                save_comparison(
                    self.folder, self.runs, self.settings, command=command, interrupted=ended
                )


def make_runs(
    comparison: Comparison,
    display: RunDisplay,
    *,
    own: OwnFunctions = NO_FUNCTIONS,
    code: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    listeners: Sequence[EventListener] = (),
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Make the runs of a comparison, which holds those that have ended, whatever ends it.

    Args:
        comparison: without runs.
        display: shows the progress.
        own: a user's functions, instead of what the settings name.
        code: what tells these functions from others; an earlier comparison of the same settings
            and code that was ended goes on in `out`. None: nothing does, and it begins anew.
        out: a folder for files.
        overwrite: write into it, though it is not empty.
        command: what the report says of its origin.
        listeners: called with the events; they need `out`.
        say: called with lines about runs that have ended.

    Raises:
        HamdistError: of the settings, or of a run.
    """
    settings, store, folder = comparison.settings, None, None
    key = None if code is None else run_key(settings, code)
    planned = plan(settings)
    with ExitStack() as stack:
        if out is not None:
            folder = stack.enter_context(ResultFolder(out, overwrite=overwrite, key=key, say=say))
            for tracker in open_trackers(settings, folder.path):
                folder.listen(tracker)
            for listener in listeners:
                folder.listen(listener)
            store = Store(folder.path / RUNS, Run.from_json)
            comparison.folder = folder.path
        elif settings.trackers or listeners:
            raise SettingsError("trackers: a comparison has them for its folder; give out, too")
        left, batch = TimeLeft(), None if own.data else settings.stream.batch
        watch = _watches(display, folder, planned, settings, batch, left)
        try:
            for run in runs_of(
                settings, planned, own=own, on_progress=watch, store=store, made_of=code or ""
            ):
                comparison.runs.append(run)
                left.ended.append(run.startup_seconds + run.seconds)
                say(finished_line(run))
                if folder is not None:
                    for event in final_events(run):
                        folder.emit(event)
                comparison.save(command)
            comparison.interrupted = comparison.runs[-1].interrupted
        finally:
            display.close()
            comparison.save(command)


def _watches(
    display: RunDisplay,
    folder: ResultFolder | None,
    planned: Sequence[PlannedRun],
    settings: Settings,
    batch: int | None,
    left: TimeLeft,
) -> Callable[[PlannedRun], OnProgress]:
    """Return a function that makes the progress display of a planned run."""
    numbers = {run: number for number, run in enumerate(planned, start=1)}

    def watch(run: PlannedRun) -> OnProgress:
        left.more = len(planned) - numbers[run]
        title = f"[{numbers[run]}/{len(planned)}] seed {run.seed}, {run.name}"
        show = display.watch(title, batch, left)
        if folder is None:
            return show
        event = RunBegun.of(settings.changed(seed=run.seed), title, batch)
        engine = event.engine if run.level is not None else "pytorch"
        return folder.watch(replace(event, level=run.name, engine=engine), show)

    return watch


def compare(
    model: nn.Module | Callable[[], nn.Module] | None = None,
    stream: Iterable[Any] | Callable[..., Any] | None = None,
    settings: Settings | str | Path | None = None,
    *,
    levels: Sequence[str] = (),
    rules: Sequence[str] = (),
    seeds: int | None = None,
    baseline_model: Callable[[], nn.Module] | None = None,
    held_out: Any = None,
    classes: int | Mapping[str, int] | None = None,
    names: Names | None = None,
    loss: str | Mapping[str, str] | None = None,
    trackers: Sequence[str | EventListener] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    **fields: Unpack[RunFields],
) -> Comparison:
    """Compare levels with centralised backpropagation on the same stream.

        found = hamdist.compare(model, stream, levels=["trace", "local"], seeds=3, steps=500)
        found.rows, found.metrics, found.plot()

    Args:
        model: a module, of which every run trains a copy; or a function that makes it, called for
            every run with torch's generator seeded; None: that of the settings.
        stream: what `train` takes, drawn anew for every run; or a function that makes it, called
            with `seed=` if it takes one, which may return what is held out as well; None: that of
            the settings.
        settings: of all runs; a recipe's name (`hamdist recipes`) or the path of a file will do.
        levels, rules: what is compared, as of `hamdist compare`; none: as the settings say.
        seeds: runs of each, with seeds from `seed` on.
        baseline_model: makes the module of centralised training, where it is another one.
        held_out: (u, y), or a stream that ends, for the scores; None: none, or as `stream` says.
        classes, names: as of `train`.
        loss: its name, or names by output.
        trackers: names, and functions of a `RunEvent`; they need `out`.
        out: a folder for the report and its data; a comparison by settings alone that was ended
            goes on there. None: nothing is written.
        overwrite: write into it, though it is not empty.
        **fields: fields of `Settings` by name.

    Returns:
        The runs with their table and curves. The first Ctrl-C during a run ends the comparison
        (`interrupted`); SIGTERM, and a second Ctrl-C, as of `train`.

    Raises:
        HamdistError: as of `train`; `error.result` is the comparison up to there.
    """
    if isinstance(settings, (str, Path)):
        settings = load_settings(str(settings))
    if levels and rules:
        raise SettingsError("levels and rules: give one; rules names levels, too")
    compared = {"levels": list(levels), "rules": list(rules), "seeds": seeds}
    changed: dict[str, Any] = {**fields, "compare": {n: v for n, v in compared.items() if v}}
    changed |= {} if loss is None else {"loss": loss}
    chosen = [v for v in trackers if isinstance(v, str)]
    whole = settings_with(settings, changed | ({"trackers": chosen} if chosen else {}))
    comparison = Comparison(settings=whole)
    if stream is None and held_out is not None:
        raise SettingsError("held_out belongs to stream: give both")
    fixed = isinstance(model, nn.Module) and stream is not None and not callable(stream)
    if fixed and whole.compare.seeds > 1:
        raise SettingsError(
            f"seeds is {whole.compare.seeds}, but the model and the stream are the same for every "
            "seed, so that a spread over them says nothing: give functions that make them"
        )
    factory = None if model is None else _factory("model", model)
    plain = None if baseline_model is None else _factory("baseline_model", baseline_model)
    data = None
    if stream is not None:
        data = data_of(stream, held_out, names or whole.stream.names, whole.model_loss, classes)
    try:
        with ProgramSignals() as program, display_of(whole) as display:
            make_runs(
                comparison,
                display,
                own=OwnFunctions(factory, data, plain),
                code=None if model or stream or baseline_model else code_of(whole),
                out=None if out is None else Path(out),
                overwrite=overwrite,
                command=f"hamdist.compare(..., out={str(out)!r})",
                listeners=[v for v in trackers if not isinstance(v, str)],
            )
    except HamdistError as error:
        error.result = comparison
        raise
    signals = comparison.runs[-1].signals if comparison.runs else []
    return program.passed(comparison, signals)


def _factory(name: str, model: object) -> ModelFactory:
    """Return a function that makes the model. Raises SettingsError."""
    if isinstance(model, nn.Module):
        return lambda: copied(model)
    if callable(model):
        return model
    raise SettingsError(f"{name} is {type(model).__name__}; give an nn.Module, or what makes one")
