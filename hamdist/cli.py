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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.cli_cluster import register
from hamdist.cli_common import (
    FAILED,
    INTERRUPTED,
    PLAIN_SECONDS,
    EngineOption,
    ModelOption,
    OutOption,
    SeedOption,
    SetOption,
    SettingsArgument,
    StabiliseOption,
    StepsOption,
    StreamOption,
    print_facts,
)
from hamdist.cli_common import Display as _Display
from hamdist.cli_common import complain as _complain
from hamdist.cli_common import console as _console
from hamdist.cli_common import exit_codes as _exit_codes
from hamdist.cli_common import given as _given
from hamdist.cli_common import load as _load
from hamdist.cli_common import warning_at_once as _warning_at_once
from hamdist.config import Level, Settings, parse_override
from hamdist.errors import HamdistError, SettingsError

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from torch import nn

    from hamdist.models import ModelFactory
    from hamdist.study.compare import Planned
    from hamdist.study.grid.settings import Axis, StudySettings
    from hamdist.study.grid.work import Record
    from hamdist.study.runs import DataFactory, OnProgress, Run
    from hamdist.study.speed.study import SpeedRow
    from hamdist.study.table import Table as ComparisonTable
    from hamdist.study.verify.check import Check
    from hamdist.study.verify.runner import Row, Topic

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
study_app = typer.Typer(
    name="study", help="Measure what the papers state, and print the table.", no_args_is_help=True
)
app.add_typer(study_app)
register(app)

StudyArgument = Annotated[
    str,
    typer.Argument(metavar="SETTINGS", help="A study's YAML file, or a shipped one."),
]
StudySetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the study, e.g. seeds=5."),
]
StudyOutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for runs and report; a study that was ended goes on there.",
        show_default="results/NAME",
    ),
]
ChosenOption = Annotated[
    bool, typer.Option("--chosen", help="Tune nothing: take what the file names as `best`.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Runs at a time.", show_default="one per core"),
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
    with _exit_codes():
        options = {
            "snapshots": None if snapshots is None else {"path": snapshots},
            "level": None if level is None else level.value,
            "engine": None if engine is None else {"kind": engine.value},
            "seed": seed,
            "steps": steps,
            "model": None if stabilise is None else {"stabilise": stabilise},
        }
        _run(_load(settings, set_, options), model, stream, out, resume, weights)


@app.command()
def export(
    snapshots: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="Snapshots of a run, or one.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file to write.")],
    model: ModelOption = None,
) -> None:
    """Write the weights at the latest snapshot of a run as a plain state_dict."""
    with _exit_codes():
        from hamdist.models import load_factory
        from hamdist.study.export import exported
        from hamdist.study.save import save_weights

        factory = None if model is None else load_factory(model)
        state, name = exported(snapshots, factory, _complain)
        save_weights(file, state)
        _console().print(Text(f"{name} written to {file}"))


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
    stream: StreamOption = None,
    stabilise: StabiliseOption = None,
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
            "model": None if stabilise is None else {"stabilise": stabilise},
        }
        loaded = _load(settings, set_, options)
        _compare(loaded, model, stream, _results_of(loaded.name) if out is None else out)


@app.command()
def verify(
    full: Annotated[bool, typer.Option("--full", help="The papers' sizes (half an hour).")] = False,
    golden: Annotated[
        Path | None,
        typer.Option("--golden", metavar="DIR", help="Folder of golden files (.npz), instead."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="TOPIC", help="One topic (repeatable).")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the rows there.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FILE.py:FUNCTION",
            help="Verify the module that this function makes, and nothing else.",
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="3,28,28", help="Of --model, without the batch."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="Of --model: targets are classes.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Of --model: rows.")] = 4,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Of --model: into how many blocks.")
    ] = None,
) -> None:
    """Prove it: every statement of the papers against an oracle of its own."""
    with _exit_codes():
        _prepare_file(json_)
        if model is None:
            chosen = _topics(only or [], golden)
        else:
            chosen = [_own_model(model, input_shape, classes, batch, blocks)]
        _verify(chosen, full, json_)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from hamdist.study.recipes import recipes as shipped

    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, description in shipped().items():
        table.add_row(name, Text(description))
    _console().print(table)


@study_app.command()
def recovery(
    full: Annotated[
        bool, typer.Option("--full", help="The paper's epochs: 40, for sequences 80.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs.", show_default="1")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="A,B", help="linear, mlp, resnet, vit, rnn, lstm."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Dampen the first momentum step, too (HL App. E).")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of IDX files, instead.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Texts of two classes (pos, neg), instead.")
    ] = None,
    glove: Annotated[
        Path | None, typer.Option("--glove", help="Word vectors of 50 numbers to begin with.")
    ] = None,
    out: OutOption = None,
) -> None:
    """Gradient descent recovered: six networks against torch.optim.SGD, in float64."""
    with _exit_codes():
        _recovery(full, epochs, models, paper, (images, texts, glove), out)


GRIDS = {  # by command: its help
    "levels": "Levels beside centralised backpropagation, each side tuned on a validation part.",
    "depth": "The same, against the number of layers (axes.depth).",
    "smoothness": "The same, against the items that a sample takes to fade into the next "
    "(axes.smoothness).",
    "batch": "The same, against the rows of an item (axes.batch), of equally many samples.",
}


def _grid_command(axis: str | None) -> Callable[..., None]:
    def command(
        settings: StudyArgument,
        set_: StudySetOption = None,
        chosen: ChosenOption = False,
        workers: WorkersOption = None,
        out: StudyOutOption = None,
    ) -> None:
        with _exit_codes():
            _grid(settings, axis, set_, chosen, workers, out)

    return command


for _name, _help in GRIDS.items():
    study_app.command(_name, help=_help)(_grid_command(None if _name == "levels" else _name))


@study_app.command()
def speed(
    settings: Annotated[
        str | None,
        typer.Argument(
            metavar="[SETTINGS]",
            help="A study's YAML file, or a shipped one: accuracy against c (axes.speed).",
        ),
    ] = None,
    speeds: Annotated[
        str | None,
        typer.Option(
            "--speeds", metavar="C,...", help="c, hops per second.", show_default="10..1000"
        ),
    ] = None,
    steps_ratio: Annotated[
        str | None,
        typer.Option("--steps-ratio", metavar="A,...", help="c tau.", show_default="1,.5,.1"),
    ] = None,
    streams: Annotated[
        str | None, typer.Option("--streams", metavar="A,B", help="static, smooth, random.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 2,
    depth: Annotated[
        int | None,
        typer.Option("--depth", min=1, help="Layers of the tanh network.", show_default="3"),
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", min=1, help="Of its layers.", show_default="16")
    ] = None,
    model: ModelOption = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="N,...", help="Of the model's input, without batch."),
    ] = None,
    set_: StudySetOption = None,
    chosen: ChosenOption = False,
    workers: WorkersOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the result's files.", show_default="results/speed"),
    ] = None,
) -> None:
    """From local to backpropagation: local gradients against backpropagation's, by speed c; with
    SETTINGS the accuracy that is learned, against c."""
    with _exit_codes():
        asked = _given({"speeds": speeds, "steps-ratio": steps_ratio, "streams": streams})
        if settings is not None:
            of_gradients = {**asked, **_given({"depth": depth, "width": width, "model": model})}
            if of_gradients:
                raise SettingsError(
                    f"--{next(iter(of_gradients))} belongs to the study of gradients, without "
                    "SETTINGS; what a grid varies stands in its file"
                )
            _grid(settings, "speed", set_, chosen, workers, out)
            return
        if set_ or chosen or workers is not None:
            raise SettingsError(
                "--set, --chosen and --workers belong to a grid: name its SETTINGS, too"
            )
        out = Path("results/speed") if out is None else out
        _speed(asked, seeds, (depth, width), model, input_shape, out)


_began: float | None = None


def main() -> None:
    """Entry point of the command: its start-up counts from the start of the process."""
    global _began
    _began = time.perf_counter() - (time.time() - psutil.Process().create_time())
    app()


def _run(
    settings: Settings,
    model_name: str | None,
    stream_name: str | None,
    out: Path | None,
    resume: str | None = None,
    weights: Path | None = None,
) -> None:
    if resume is not None and weights is not None:
        raise SettingsError("--resume and --weights: a run begins with one of them")
    own = settings.for_level(settings.level)
    title = f"{own.name}, {own.level.value}"
    with _Display() as display, _warning_at_once(display.say) as said:
        display.note(f"{title}: starting (imports)")
        factory = _prepare(out, model_name)
        data = _data(stream_name)

        from hamdist.study.runs import run_level

        imports = {} if _began is None else {"imports": time.perf_counter() - _began}
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
    _print_run(result, own, said)
    if out is not None:
        _save_run(out, result, model, own)
    if result.failure is not None:
        _complain(f"Error: {result.failure}")
        _complain(f"Stopped after {result.samples} items; the metrics so far are above.")
        raise typer.Exit(FAILED)
    if result.interrupted:
        _complain(f"Interrupted after {result.samples} items; the metrics so far are above.")
        if result.snapshots:
            _complain(f"Go on with --resume {result.snapshots[-1].rpartition('/')[0]}")
        raise typer.Exit(INTERRUPTED)


def _compare(
    settings: Settings, model_name: str | None, stream_name: str | None, out: Path
) -> None:
    factory = _prepare(out, model_name)
    data = _data(stream_name)

    from hamdist.study.compare import compare as runs_of
    from hamdist.study.compare import plan
    from hamdist.study.table import finished_line

    planned = plan(settings)
    finished: list[Run] = []
    try:
        with _Display() as display:
            watch = _titles(display, planned, settings.stream.batch if data is None else None)
            runs = runs_of(settings, planned, factory=factory, data=data, on_progress=watch)
            for result in runs:
                finished.append(result)
                display.say(finished_line(result))
    except (HamdistError, KeyboardInterrupt):
        _conclude(finished, settings, out, interrupted=True)
        raise
    interrupted = finished[-1].interrupted
    _conclude(finished, settings, out, interrupted=interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _recovery(
    full: bool,
    epochs: int | None,
    models: str | None,
    paper: bool,
    paths: tuple[Path | None, Path | None, Path | None],
    out: Path | None,
) -> None:
    if full and epochs is not None:
        raise SettingsError(f"--epochs {epochs} with --full, which has its own: give one of them")
    _prepare(out, None)

    from hamdist.config import FirstStep
    from hamdist.study.recovery.data import Paths
    from hamdist.study.recovery.models import MODELS
    from hamdist.study.recovery.report import in_order, recovery_line, recovery_table, save_recovery
    from hamdist.study.recovery.rows import Rows, jobs

    wanted = jobs(
        tuple(MODELS) if models is None else [m.strip() for m in models.split(",") if m.strip()],
        epochs=None if full else epochs or 1,
        first_step=FirstStep.DAMPENED if paper else FirstStep.UNDAMPENED,
        paths=Paths(*paths),
    )
    finished = []
    with Rows(wanted) as rows:
        for row in rows.finished():
            finished.append(row)
            _complain(f"[{len(finished)}/{len(wanted)}] {recovery_line(row)}")
    finished = in_order(finished)
    _print_table(recovery_table(finished), "Gradient descent recovered")
    if out is not None:
        save_recovery(out, finished, shlex.join(["hamdist", *sys.argv[1:]]))
        _console().print(Text(f"Written to {out}"))
    if not all(row.passed for row in finished):
        raise typer.Exit(FAILED)


def _speed(
    asked: dict[str, str],
    seeds: int,
    sizes: tuple[int | None, int | None],
    model: str | None,
    input_shape: str | None,
    out: Path,
) -> None:
    factory = _prepare(out, model)

    from hamdist.study.speed.report import save_speed, speed_tables
    from hamdist.study.speed.study import own_network, parse_study, run_study, tanh_network
    from hamdist.study.verify.own_model import parse_shape

    study = parse_study(asked, seeds)
    subject = tanh_network(*sizes)
    if factory is not None and model is not None:
        if input_shape is None or sizes != (None, None):
            raise SettingsError(
                "--model goes with --input-shape; --depth and --width belong to the tanh network"
            )
        subject = own_network(factory, model, parse_shape(input_shape))
    elif input_shape is not None:
        raise SettingsError("--input-shape belongs to --model; the tanh network has its own")
    printed = time.monotonic()

    def show(done: int, total: int, row: SpeedRow) -> None:
        nonlocal printed
        if done == total or time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            _complain(
                f"[{done}/{total}] seed {row.seed}, {row.stream}, c tau {row.c_tau:g}, "
                f"c {row.c:g}: error {row.error:.2g}"
            )

    result = run_study(study, subject, shlex.join(["hamdist", *sys.argv[1:]]), show)
    for title, table in speed_tables(result).items():
        _print_table(table, title)
    save_speed(out, result)
    _console().print(Text(f"Written to {out}"))


def _grid(
    source: str,
    axis_name: str | None,
    set_: list[str] | None,
    chosen: bool,
    workers: int | None,
    out: Path | None,
) -> None:
    """A study of a grid: runs what is not on disk yet, prints the tables, writes the report."""
    from hamdist.study.grid.report import save_study
    from hamdist.study.grid.run import check, run_study
    from hamdist.study.grid.settings import Axis, load_study

    overrides = [parse_override(text) for text in set_ or []]
    study = load_study(source, [*overrides, _given({"workers": workers})])
    axis = None if axis_name is None else Axis(axis_name)
    _check_axis(study, axis)
    folder = _results_of(study.name) if out is None else out
    check(study, chosen=chosen)
    _prepare(folder, None)
    _complain(f"{study.name}: runs are kept in {folder / 'runs'}; start it again to go on there")
    outcomes = run_study(study, folder, chosen=chosen, on_record=_say_record)
    command = shlex.join(["hamdist", *sys.argv[1:]])
    for title, table in save_study(folder, study, outcomes, command=command, first=axis).items():
        _print_table(table, title)
    _console().print(Text(f"Report: {folder / 'study.html'}"))


def _check_axis(study: StudySettings, axis: Axis | None) -> None:
    """Raises SettingsError where there is nothing to show along an axis."""
    if axis is not None and len(study.axes.of(axis)) < 2:
        raise SettingsError(
            f"axes.{axis.value}: a study of it needs several values "
            f"(received {list(study.axes.of(axis))}); `hamdist study levels` needs none"
        )


def _say_record(phase: str, done: int, total: int, record: Record) -> None:
    """A finished run on one line."""
    from hamdist.study.table import percent

    level = record.settings["level"] if record.trains == "level" else record.trains
    found = record.failure or f"{percent(record.accuracy, digits=2)} %, {record.seconds:.1f} s"
    _complain(f"[{phase} {done}/{total}] {level}, seed {record.seed}: {found}")


def _print_table(cells: ComparisonTable, title: str) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(cells.titles):
        table.add_column(name, justify="left" if i < LABELS else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*(Text(cell) for cell in row))
    console = _console()
    console.print(table)
    for note in cells.notes:
        console.print(Text(f"• {note}"), soft_wrap=True)


def _titles(
    display: _Display, planned: list[Planned], batch: int | None
) -> Callable[[Planned], OnProgress]:
    """For each planned run, what shows its progress."""
    numbers = {item: number for number, item in enumerate(planned, start=1)}

    def watch(item: Planned) -> OnProgress:
        title = f"[{numbers[item]}/{len(planned)}] seed {item.seed}, {item.name}"
        return display.watch(title, batch)

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


def _print_run(result: Run, settings: Settings, said: list[str]) -> None:
    """said: warnings that have been shown already."""
    from hamdist.study.table import run_facts

    title = f"{settings.name}: {result.level} on {result.engine}, seed {result.seed}"
    print_facts(title, run_facts(result))
    for warning in dict.fromkeys(result.warnings):
        if warning != result.failure and warning not in said:
            _complain(f"Warning: {warning}")


def _topics(only: list[str], golden: Path | None) -> list[Topic]:
    from hamdist.study.verify.runner import topics

    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    return topics(names, golden)


def _own_model(
    name: str, input_shape: str | None, classes: int | None, batch: int, blocks: int | None
) -> Topic:
    from hamdist.models import load_factory
    from hamdist.study.verify.own_model import Own, parse_shape
    from hamdist.study.verify.runner import own_model_topic

    if input_shape is None:
        raise SettingsError(
            f"--model {name!r}: say what it takes as well, without the batch: --input-shape 3,28,28"
        )
    shape = parse_shape(input_shape)
    return own_model_topic(Own(load_factory(name), name, shape, classes, batch, blocks))


def _prepare_file(path: Path | None) -> None:
    """Raises SettingsError where `path` cannot be written, before anything is computed."""
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise SettingsError(f"--json '{path}': cannot write there: {error.strerror}") from None


def _verify(chosen: list[Topic], full: bool, json_: Path | None) -> None:
    """Prints a row for every check as soon as it has run; exit code 1 where one failed."""
    from hamdist.study.verify.runner import run as run_checks
    from hamdist.study.verify.runner import to_json

    begin = time.monotonic()
    console = _console()
    rows: list[Row] = []
    status = console.status("") if console.is_terminal else None
    told = ""

    def starting(topic: Topic, check: Check) -> None:
        nonlocal told
        if told != topic.name:
            console.print(Text(f"\n{topic.title} ({topic.name})", style="bold"))
        told = topic.name
        if status is not None:
            status.update(Text(check.name))

    try:
        with status or nullcontext():
            for row in run_checks(chosen, full, starting):
                rows.append(row)
                _print_row(console, row)
    finally:
        failed = sum(not row.passed for row in rows)
        seconds = time.monotonic() - begin
        console.print(f"\n{len(rows) - failed} passed, {failed} failed, {seconds:.0f} s")
        if json_ is not None:
            json_.write_text(to_json(rows) + "\n")
    if failed or not rows:
        raise typer.Exit(FAILED)


def _print_row(console: Console, row: Row) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=4)
    table.add_column(ratio=3)
    table.add_column(ratio=2, style="dim")
    for width in (8, 10, 7):
        table.add_column(width=width, justify="right")
    what = Text(row.name) if not row.note else Text(f"{row.name}\n→ {row.note}")
    table.add_row(
        Text("pass", style="green") if row.passed else Text("FAIL", style="bold red"),
        what,
        Text(row.oracle),
        f"{row.difference:.2g}",
        f"<= {row.bound:.2g}",
        f"{row.seconds:.1f} s",
    )
    console.print(table)


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


def _results_of(name: str) -> Path:
    """Where a comparison or a study is written when nobody says where: no name leads out of
    `results`."""
    return Path("results") / (re.sub(r"[^\w-]+", "-", name).strip("-") or "run")


def _prepare(out: Path | None, model_name: str | None) -> ModelFactory | None:
    """What can be wrong before anything is computed: the folder and the model's function."""
    if out is not None:
        from hamdist.study.results import prepare_folder

        prepare_folder(out)
    if model_name is None:
        return None
    from hamdist.models import load_factory

    return load_factory(model_name)


def _data(name: str | None) -> DataFactory | None:
    if name is None:
        return None
    from hamdist.study.own_data import load_stream

    return load_stream(name)


if __name__ == "__main__":
    main()
