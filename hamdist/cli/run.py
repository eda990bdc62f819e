"""`hamdist run`: one network on a stream, at one level."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from hamdist.cli.console import complain, console, print_facts
from hamdist.cli.display import Display, warning_at_once
from hamdist.cli.exits import exit_codes
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    EngineOption,
    LevelOption,
    ModelOption,
    OutOption,
    SeedOption,
    SetOption,
    SettingsArgument,
    StabiliseOption,
    StepsOption,
    StreamOption,
    changes,
    load,
)
from hamdist.cli.prepare import own_stream, prepare
from hamdist.config import Settings
from hamdist.errors import FAILED, INTERRUPTED, SettingsError

if TYPE_CHECKING:
    from hamdist.study.runs import Run


def run(
    context: typer.Context,
    settings: SettingsArgument = DEFAULT_SETTINGS,
    level: LevelOption = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    stream: StreamOption = None,
    stabilise: StabiliseOption = None,
    out: OutOption = None,
    snapshots: Annotated[
        str | None,
        typer.Option("--snapshots", metavar="DIR|URL", help="Where to keep snapshots."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="DIR|URL", help="Go on from the latest snapshot there."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Begin with a safetensors state_dict."),
    ] = None,
) -> None:
    """Train one network on a stream, at one level of locality."""
    with exit_codes():
        options = changes(level=level, engine=engine, seed=seed, steps=steps, stabilise=stabilise)
        if snapshots is not None:
            options["snapshots"] = {"path": snapshots}
        loaded = load(settings, set_, options)
        _run(loaded, model, stream, out, resume, weights, began=context.obj)


def _run(
    settings: Settings,
    model_name: str | None,
    stream_name: str | None,
    out: Path | None,
    resume: str | None,
    weights: Path | None,
    *,
    began: float | None,
) -> None:
    """began: when the process did (`time.perf_counter`), where it did so for this run alone."""
    if resume is not None and weights is not None:
        raise SettingsError("--resume and --weights: a run begins with one of them")
    own = settings.for_level(settings.level)
    title = f"{own.name}, {own.level.value}"
    with Display() as display, warning_at_once(display.say) as said:
        display.note(f"{title}: starting (imports)")
        factory = prepare(out, model_name)
        data = own_stream(stream_name, own)

        from hamdist.study.runs import run_level
        from hamdist.study.save import save_run

        imports = {} if began is None else {"imports": time.perf_counter() - began}
        show = display.watch(title, own.stream.batch if data is None else None)
        result, model = run_level(
            own,
            factory=factory,
            data=data,
            on_progress=show,
            before=imports,
            resume=resume,
            weights=weights,
        )
    try:
        if out is not None:
            save_run(out, result, model, own)
    finally:
        _print_run(result, own, said, out)
    if result.failure is not None:
        complain(f"Error: {result.failure}")
        complain(f"Stopped after {result.samples} items; the metrics so far are above.")
        raise typer.Exit(FAILED)
    if result.interrupted:
        complain(f"Interrupted after {result.samples} items; the metrics so far are above.")
        if result.snapshots:
            complain(f"Go on with --resume {result.snapshots[-1].rpartition('/')[0]}")
        raise typer.Exit(INTERRUPTED)


def _print_run(result: Run, settings: Settings, said: list[str], out: Path | None) -> None:
    """said: warnings that have been shown already."""
    from hamdist.study.table import run_facts, run_title

    print_facts(run_title(result, settings.name), run_facts(result))
    for warning in dict.fromkeys(result.warnings):
        if warning != result.failure and warning not in said:
            complain(f"Warning: {warning}")
    if out is not None:
        console().print(Text(f"Written to {out}"))
