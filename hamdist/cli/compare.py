"""`hamdist compare`: levels beside centralised backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import LABELS, complain, console, exit_codes, report
from hamdist.cli.display import Display
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    EngineOption,
    ModelOption,
    OverwriteOption,
    SeedOption,
    SetOption,
    SettingsArgument,
    StabiliseOption,
    StepsOption,
    StreamOption,
    changes,
    given,
    load,
)
from hamdist.cli.prepare import (
    code_of,
    command_line,
    own_stream,
    prepare,
    results_of,
)
from hamdist.config import Level, Settings, did_you_mean
from hamdist.errors import HamdistError, SettingsError
from hamdist.runtime.results.events import RunBegun

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from hamdist.runtime.process.interrupts import OnProgress
    from hamdist.study.report.table import Table as StudyTable
    from hamdist.study.run.compare import PlannedRun
    from hamdist.study.run.run import Run
    from hamdist.study.shared.result_folder import ResultFolder

# A narrower terminal gets the comparison as two tables: how well (so many columns), at what cost.
WIDE = 110
QUALITY = 6


def compare(
    settings: SettingsArgument = DEFAULT_SETTINGS,
    levels: Annotated[
        str | None, typer.Option("--levels", metavar="A,B", help="Levels to compare.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            metavar="A,B",
            help="Levels and rules of learning to compare (hamdist rules, or FILE.py:NAME).",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds.")] = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    stream: StreamOption = None,
    stabilise: StabiliseOption = None,
    baseline_model: Annotated[
        str | None,
        typer.Option(
            "--baseline-model",
            metavar="FILE.py:FUNCTION",
            help="Makes the module of centralised training, where it is another one; it begins "
            "with the model's weights where names and shapes fit.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the result's files; a comparison that was ended goes on there.",
            show_default="results/NAME",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare levels with centralised backpropagation on the same stream."""
    with exit_codes():
        if levels is not None and rules is not None:
            raise SettingsError("--levels and --rules: give one; --rules names levels, too")
        named = None if rules is None else _split(rules) or _split_levels(rules)
        levels_of = None if levels is None else _split_levels(levels)
        asked = {"levels": levels_of, "rules": named, "seeds": seeds}
        options = changes(engine=engine, seed=seed, steps=steps, stabilise=stabilise)
        loaded = load(settings, set_, {**options, **given({"compare": given(asked) or None})})
        folder = results_of(loaded.name) if out is None else out
        _compare(loaded, model, stream, baseline_model, folder, overwrite)


def _split_levels(text: str) -> list[str]:
    """Split a list of levels. Raises SettingsError for an unknown level, or an empty list."""
    known = [level.value for level in Level]
    names = _split(text)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    return names


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _compare(
    settings: Settings,
    model_name: str | None,
    stream_name: str | None,
    baseline: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    factory = prepare(None, model_name)
    data = own_stream(stream_name, settings)
    plain = prepare(None, baseline, "--baseline-model")

    from hamdist.study.report.files import final_events
    from hamdist.study.report.save import save_comparison
    from hamdist.study.report.table import finished_line
    from hamdist.study.run.compare import compare as runs_of
    from hamdist.study.run.compare import plan, run_key
    from hamdist.study.run.run import Run
    from hamdist.study.shared.result_folder import RUNS, ResultFolder
    from hamdist.study.shared.store import Store
    from hamdist.trackers import open_trackers

    planned = plan(settings)
    files = [name for name in settings.compare.rules if ":" in name]
    code = code_of(model_name, stream_name, baseline, *files)
    finished: list[Run] = []
    key = run_key(settings, code)
    with (
        Display() as display,
        ResultFolder(out, overwrite=overwrite, key=key, say=display.say) as own,
    ):
        for tracker in open_trackers(settings, own.path):
            own.listen(tracker)
        store = Store(own.path / RUNS, Run.from_json)
        batch = settings.stream.batch if data is None else None
        watch = _titles(display, own, planned, settings, batch)
        save = partial(save_comparison, own.path, finished, settings, command=command_line())
        try:
            for result in runs_of(
                settings,
                planned,
                factory=factory,
                data=data,
                plain=plain,
                on_progress=watch,
                store=store,
                made_of=code,
            ):
                finished.append(result)
                display.say(finished_line(result))
                for event in final_events(result):
                    own.emit(event)
                save(interrupted=True)
        except (HamdistError, KeyboardInterrupt):
            display.close()
            _conclude(finished, settings, own.path, partial(save, interrupted=True))
            raise
        display.close()
        interrupted = finished[-1].interrupted
        _conclude(finished, settings, own.path, partial(save, interrupted=interrupted), interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _titles(
    display: Display,
    folder: ResultFolder,
    planned: list[PlannedRun],
    settings: Settings,
    batch: int | None,
) -> Callable[[PlannedRun], OnProgress]:
    """Return a function that makes the progress display of a planned run."""
    numbers = {item: number for number, item in enumerate(planned, start=1)}

    def watch(item: PlannedRun) -> OnProgress:
        title = f"[{numbers[item]}/{len(planned)}] seed {item.seed}, {item.name}"
        begun = RunBegun.of(settings.model_copy(update={"seed": item.seed}), title, batch)
        engine = begun.engine if item.level is not None else "pytorch"
        begun = replace(begun, level=item.name, engine=engine)
        return folder.watch(begun, display.watch(title, batch))

    return watch


def _conclude(
    finished: list[Run],
    settings: Settings,
    out: Path,
    save: Callable[[], None],
    interrupted: bool = True,
) -> None:
    """Write the runs that finished to `out`, and print their table."""
    from hamdist.study.report.aggregate import aggregate
    from hamdist.study.report.files import comparison_summary
    from hamdist.study.report.table import comparison_table

    rows = aggregate(finished)
    try:
        if finished:
            save()
    finally:
        if rows:
            report(**comparison_summary(rows, interrupted=interrupted), out=str(out))
            _print_comparison(comparison_table(rows), settings.name)
        if interrupted:
            complain(
                f"Ended early: only the runs that finished are kept, in {out}; the same command "
                "goes on from there."
                if rows
                else "No run finished."
            )
    if finished:
        console().print(Text(f"Report: {out / 'report.html'}"))


def _print_comparison(cells: StudyTable, title: str) -> None:
    screen = console()
    columns = range(len(cells.titles))
    split = [columns] if screen.width >= WIDE else [columns[:QUALITY], [0, *columns[QUALITY:]]]
    for part in split:
        table = Table(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            show_lines=any("\n" in row[i] for row in cells.rows for i in part),
        )
        for i in part:
            side: JustifyMethod = "left" if i < LABELS else "right"
            table.add_column(cells.titles[i], justify=side, overflow="fold")
        for row in cells.rows:
            table.add_row(*(Text(row[i]) for i in part))
        screen.print(table)
    for note in cells.notes:
        screen.print(Text(f"• {note}"), soft_wrap=True)
