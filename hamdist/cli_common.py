"""What the commands share: their options, what they print with, what becomes an exit code.

Results go to standard output; progress, warnings and errors to standard error. Exit codes: 0 done,
1 a run failed, 2 wrong settings or usage, 130 ended by Ctrl-C.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hamdist.config import EngineKind, Settings, merge, parse_override
from hamdist.errors import BlockError, Choice, HamdistError, LevelError, SettingsError

if TYPE_CHECKING:
    from hamdist.runtime.result import Progress
    from hamdist.study.runs import OnProgress

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
PLAIN_SECONDS = 5.0
PLAIN_WIDTH = 132

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
    typer.Option(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="Makes the model (or PACKAGE.MODULE:FUNCTION).",
    ),
]
StabiliseOption = Annotated[
    bool | None,
    typer.Option("--stabilise", help="Normed inputs and scaled residuals for the model's layers."),
]
StreamOption = Annotated[
    str | None,
    typer.Option(
        "--stream",
        metavar="FILE.py:FUNCTION",
        help="Makes the stream; or the stream and what is held out.",
    ),
]


def load(source: str, set_: list[str] | None, options: dict[str, Any]) -> Settings:
    from hamdist.study.recipes import load_settings

    overrides = [parse_override(text) for text in set_ or []]
    return load_settings(source, [*overrides, merge({}, given(options))])


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


class Display:
    """Shows progress on standard error: live on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
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

    def note(self, text: str) -> None:
        """What is going on, where there is no run to watch yet."""
        if self._live is not None:
            self._live.update(Text(text, style="bold"), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def watch(self, title: str, batch: int | None) -> OnProgress:
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


@contextmanager
def warning_at_once(say: Callable[[str], None]) -> Iterator[list[str]]:
    """Inside, what Python is warned of is shown as our own warnings are. Yields what was shown."""
    said: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))
        say(f"{'Chosen' if isinstance(message, Choice) else 'Warning'}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield said


def console(*, stderr: bool = False) -> Console:
    """Made when needed, so that it writes to the stream of the moment."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """What a run reached, name by name."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = title
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console().print(table)


def complain(text: str) -> None:
    console(stderr=True).print(Text(text), soft_wrap=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what hamdist raises on purpose, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except (SettingsError, LevelError) as error:
        complain(f"Error: {error}")
        raise typer.Exit(WRONG_USAGE) from None
    except BlockError as error:
        if error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except HamdistError as error:
        complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
