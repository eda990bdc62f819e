"""The command `hamdist`: the only place that prints, reads argv, or decides an exit code.

Results go to standard output; progress, warnings and errors to standard error. Exit codes: 0 done,
1 a run failed, 2 wrong settings or usage, 130 ended by Ctrl-C. torch and all that needs it are
imported when a command runs, so that `hamdist --help` is quick.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hamdist.config import EngineKind, Level, Settings, merge, parse_override
from hamdist.errors import BlockError, HamdistError, LevelError, SettingsError

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from torch import nn

    from hamdist.models import ModelFactory
    from hamdist.runtime.result import Progress
    from hamdist.study.compare import Planned
    from hamdist.study.runs import OnProgress, Run
    from hamdist.study.table import Table as ComparisonTable

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
PLAIN_SECONDS = 5.0
PLAIN_WIDTH = 132
# A narrower terminal gets the comparison as two tables: how well, and at what cost.
WIDE = 110
QUALITY = 6
LABELS = 2

app = typer.Typer(
    name="hamdist",
    help="Networks of blocks that exchange only neighbour signals, from fully local to exactly "
    "backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SettingsArgument = Annotated[
    str, typer.Argument(metavar="SETTINGS", help="A YAML file, or a recipe (`hamdist recipes`).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. stream.batch=8."),
]
EngineOption = Annotated[
    EngineKind | None, typer.Option("--engine", help="One process, or Ray actors.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="The (first) seed.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Items of the stream.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the result's files.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="PACKAGE.MODULE:FUNCTION", help="Makes the model."),
]


@app.command()
def run(
    settings: SettingsArgument,
    level: Annotated[Level | None, typer.Option("--level", help="Level of locality.")] = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    out: OutOption = None,
) -> None:
    """Train one network on a stream, at one level of locality."""
    with _exit_codes():
        options = {
            "level": None if level is None else level.value,
            "engine": None if engine is None else {"kind": engine.value},
            "seed": seed,
            "steps": steps,
        }
        _run(_load(settings, set_, options), model, out)


@app.command()
def compare(
    settings: SettingsArgument,
    levels: Annotated[
        str | None, typer.Option("--levels", metavar="A,B", help="Levels to compare.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds.")] = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the result's files.", show_default="results/NAME"),
    ] = None,
) -> None:
    """Compare levels with centralised backpropagation on the same stream."""
    with _exit_codes():
        asked = {"levels": None if levels is None else _split_levels(levels), "seeds": seeds}
        options = {
            "compare": _given(asked) or None,
            "engine": None if engine is None else {"kind": engine.value},
            "seed": seed,
            "steps": steps,
        }
        loaded = _load(settings, set_, options)
        _compare(loaded, model, _results_of(loaded) if out is None else out)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from hamdist.study.recipes import recipes as shipped

    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, description in shipped().items():
        table.add_row(name, Text(description))
    _console().print(table)


def main() -> None:
    """Entry point of the command."""
    app()


def _run(settings: Settings, model_name: str | None, out: Path | None) -> None:
    own = settings.for_level(settings.level)
    factory = _prepare(out, model_name)

    from hamdist.study.runs import run_level

    with _Display() as display:
        show = display.watch(f"{own.name}, {own.level.value}", own.stream.batch)
        result, model = run_level(own, factory=factory, on_progress=show)
    _print_run(result, own)
    if out is not None:
        _save_run(out, result, model, own)
    if result.interrupted:
        _complain(f"Interrupted after {result.samples} items; the metrics so far are above.")
        raise typer.Exit(INTERRUPTED)


def _compare(settings: Settings, model_name: str | None, out: Path) -> None:
    factory = _prepare(out, model_name)

    from hamdist.study.compare import compare as runs_of
    from hamdist.study.compare import plan
    from hamdist.study.table import finished_line

    planned = plan(settings)
    finished: list[Run] = []
    try:
        with _Display() as display:
            watch = _titles(display, planned, settings)
            for result in runs_of(settings, planned, factory=factory, on_progress=watch):
                finished.append(result)
                display.say(finished_line(result))
    except (HamdistError, KeyboardInterrupt):
        _conclude(finished, settings, out, interrupted=True)
        raise
    interrupted = finished[-1].interrupted
    _conclude(finished, settings, out, interrupted=interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _titles(
    display: _Display, planned: list[Planned], settings: Settings
) -> Callable[[Planned], OnProgress]:
    """For each planned run, what shows its progress."""
    numbers = {item: number for number, item in enumerate(planned, start=1)}

    def watch(item: Planned) -> OnProgress:
        title = f"[{numbers[item]}/{len(planned)}] seed {item.seed}, {item.name}"
        return display.watch(title, settings.stream.batch)

    return watch


def _conclude(finished: list[Run], settings: Settings, out: Path, *, interrupted: bool) -> None:
    """Print the table of the runs that finished, and write them to `out`."""
    from hamdist.study.aggregate import aggregate
    from hamdist.study.table import comparison_table

    rows = aggregate(finished)
    if rows:
        _print_comparison(comparison_table(rows), settings.name)
    if interrupted:
        _complain(
            "Ended early: only the runs that finished are kept." if rows else "No run finished."
        )
    if not finished:
        return

    from hamdist.study.save import save_comparison

    command = shlex.join(["hamdist", *sys.argv[1:]])
    save_comparison(out, finished, settings, command=command, interrupted=interrupted)
    _console().print(Text(f"Report: {out / 'report.html'}"))


def _print_comparison(cells: ComparisonTable, title: str) -> None:
    console = _console()
    columns = range(len(cells.titles))
    split = [columns] if console.width >= WIDE else [columns[:QUALITY], [0, *columns[QUALITY:]]]
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
        console.print(table)
    for note in cells.notes:
        console.print(Text(f"• {note}"), soft_wrap=True)


def _save_run(out: Path, result: Run, model: nn.Module, settings: Settings) -> None:
    from hamdist.study.save import save_run

    save_run(out, result, model, settings)
    _console().print(Text(f"Written to {out}"))


def _print_run(result: Run, settings: Settings) -> None:
    from hamdist.study.table import run_facts

    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = f"{settings.name}: {result.level} on {result.engine}, seed {result.seed}"
    for name, value in run_facts(result).items():
        table.add_row(name, Text(value))
    _console().print(table)
    for warning in dict.fromkeys(result.warnings):
        _complain(f"Warning: {warning}")


def _load(source: str, set_: list[str] | None, options: dict[str, Any]) -> Settings:
    from hamdist.study.recipes import load_settings

    overrides = [parse_override(text) for text in set_ or []]
    return load_settings(source, [*overrides, merge({}, _given(options))])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _split_levels(text: str) -> list[str]:
    known = [level.value for level in Level]
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}"
        )
    return names


def _results_of(settings: Settings) -> Path:
    """Where a comparison is written when nobody says where: a name is no way out of `results`."""
    return Path("results") / (re.sub(r"[^\w-]+", "-", settings.name).strip("-") or "run")


def _prepare(out: Path | None, model_name: str | None) -> ModelFactory | None:
    """What can be wrong before anything is computed: the folder and the model's function."""
    if out is not None:
        from hamdist.study.results import prepare_folder

        prepare_folder(out)
    if model_name is None:
        return None
    from hamdist.models import load_factory

    return load_factory(model_name)


class _Display:
    """Shows progress on standard error: live on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def watch(self, title: str, batch: int) -> OnProgress:
        """What to call with the progress of the run `title`."""
        from hamdist.study.live import RunView

        view = RunView(title, batch)
        if self._live is not None:
            self._live.update(view, refresh=True)
        printed = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal printed
            view.update(progress)
            if self._live is not None:
                self._live.update(view, refresh=True)
            elif time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                self.say(view.line)

        return show


def _console(*, stderr: bool = False) -> Console:
    """Made when needed, so that it writes to the stream of the moment."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def _complain(text: str) -> None:
    _console(stderr=True).print(Text(text), soft_wrap=True)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns what hamdist raises on purpose, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except (SettingsError, LevelError) as error:
        _complain(f"Error: {error}")
        raise typer.Exit(WRONG_USAGE) from None
    except BlockError as error:
        if error.details:
            _complain(error.details.rstrip())
        _complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except HamdistError as error:
        _complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        _complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
