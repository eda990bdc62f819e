"""`hamdist run`: one network on a stream, at one level."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hamdist.cli.console import (
    Display,
    complain,
    print_facts,
    report,
    say_written,
    warn,
    warning_at_once,
)
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    OverwriteOption,
    RunOptions,
    SettingsArgument,
    option,
)
from hamdist.config import Settings
from hamdist.errors import INTERRUPTED, SettingsError
from hamdist.runtime.results.events import RunBegun
from hamdist.study.shared.result_folder import (
    ResultFolder,
    results_of,
    write_file,
    written_at_the_end,
)

if TYPE_CHECKING:
    from hamdist.study.run.run import Run

TRACED_TICKS = 500  # the last ones


def run(
    context: typer.Context,
    settings: SettingsArgument = DEFAULT_SETTINGS,
    *,
    options: Annotated[RunOptions, "level engine seed steps set_ model stream stabilise"],
    out: Annotated[
        Path | None, option("Folder for the result's files.", shown="results/NAME-TIME")
    ] = None,
    overwrite: OverwriteOption = False,
    snapshots: Annotated[str | None, option("Where to keep snapshots.", "DIR|URL")] = None,
    resume: Annotated[
        str | None, option("Go on from the latest snapshot there.", "DIR|URL")
    ] = None,
    weights: Annotated[Path | None, option("Begin with a safetensors state_dict.", "FILE")] = None,
    trace: Annotated[
        Path | None, option("Write a trace of its ticks, for Perfetto.", "FILE")
    ] = None,
    view: Annotated[bool, option("Show the run on a local page (see `hamdist view`).")] = False,
) -> None:
    """Train one network on a stream, at one level of locality."""
    changes: dict[str, Any] = {}
    if snapshots is not None:
        changes["snapshots"] = {"path": snapshots}
    if trace is not None:
        changes["metrics"] = {"trace": TRACED_TICKS}
    loaded = options.load(settings, **changes)
    where = out or results_of(f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    begin, seen = (resume, weights), (view, trace)
    run_settings(loaded, options, where, overwrite, begin, seen, began=context.obj)


def run_settings(
    settings: Settings,
    options: RunOptions,
    out: Path,
    overwrite: bool,
    begin: tuple[str | None, Path | None],
    seen: tuple[bool, Path | None] = (False, None),
    *,
    began: float | None = None,
    without: int | None = None,
    forks: bool = False,
) -> None:
    """Run, write and show the result.

    Args:
        settings, options: what is run.
        out: the folder, or the first of those numbered behind it that is free, unless `overwrite`.
        begin: snapshots, or weights.
        seen: on a page; the file of a trace.
        began: when the process did (`time.perf_counter`), where it did so for this run alone.
        without: the number of a sample that the stream leaves out.
        forks: snapshots lie in the folder, not beside those of the run that is resumed.
    """
    (resume, weights), (shown, trace) = begin, seen
    if resume is not None and weights is not None:
        raise SettingsError("--resume and --weights: a run begins with one of them")
    at_level = settings.for_level(settings.level)
    title = f"{at_level.name}, {at_level.level_name}"
    with Display(at_level) as display, warning_at_once() as shown_warnings, ExitStack() as stack:
        display.note(f"{title}: starting (imports)")
        own = options.functions(at_level)
        folder = stack.enter_context(
            ResultFolder(out, overwrite=overwrite, controls=True, say=display.say)
        )
        if forks:
            at_level = at_level.changed(snapshots={"path": str(folder.path / "snapshots")})

        from hamdist.runtime.results.measured import chrome_trace
        from hamdist.study.report.files import final_events
        from hamdist.study.report.save import save_run
        from hamdist.study.run.run import run_level
        from hamdist.trackers import open_trackers

        for tracker in open_trackers(at_level, folder.path):
            folder.listen(tracker)
        if shown:
            from hamdist.cli.view import show_page
            from hamdist.study.view.page import PageServer

            show_page(stack.enter_context(PageServer([folder.path])), browser=True)
        if trace is not None:
            write_file(trace, chrome_trace({}))  # (it can be written)
        display.say(f"Results go to {folder.path}")
        imports = {} if began is None else {"imports": time.perf_counter() - began}
        batch = at_level.stream.batch if own.data is None else None
        show = display.watch(title, batch)
        result, model = run_level(
            at_level,
            own=own,
            on_progress=folder.watch(RunBegun.of(at_level, title, batch), show),
            before=imports,
            resume=resume,
            weights=weights,
            without=without,
            partial=True,
        )
        for event in final_events(result):
            folder.emit(event)
        try:
            with written_at_the_end():
                save_run(folder.path, result, model, at_level)
                if trace is not None:
                    write_file(trace, chrome_trace(result.trace))
        finally:
            display.close()
            _print_run(result, at_level, shown_warnings)
        say_written(folder.path)
        if result.error is not None:
            complain(f"Stopped after {result.samples} samples; what was learned so far is kept.")
            raise result.error
    if result.interrupted:
        complain(f"Interrupted after {result.samples} samples; the metrics so far are above.")
        if result.snapshots:
            complain(f"Go on with --resume {result.snapshots[-1].rpartition('/')[0]}")
        raise typer.Exit(INTERRUPTED)


def _print_run(result: Run, settings: Settings, shown_warnings: list[str]) -> None:
    """Print the result; the warnings in `shown_warnings` have been shown already."""
    from hamdist.study.report.files import run_summary
    from hamdist.study.report.table import run_facts, run_title

    report(**run_summary(result))
    print_facts(run_title(result, settings.name), run_facts(result))
    for warning in dict.fromkeys(result.warnings):
        if warning != result.failure and warning not in shown_warnings:
            warn(warning)
