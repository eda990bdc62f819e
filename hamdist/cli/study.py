"""`hamdist study levels`, `depth`, `smoothness`, `batch`: studies of a grid of runs; `speed`: from
local to backpropagation by the speed c; `recovery`: gradient descent recovered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hamdist.cli.console import note, print_table, report, say, say_written
from hamdist.cli.options import (
    OutOption,
    OverwriteOption,
    RunOptions,
    argument,
    command_line,
    names,
    option,
    without_none,
)
from hamdist.display.progress import PLAIN_SECONDS
from hamdist.errors import FAILED, SettingsError
from hamdist.study.shared.result_folder import free_folder

if TYPE_CHECKING:
    from hamdist.study.grid.run import RunRecord
    from hamdist.study.propagation.study import SpeedRow

StudyArgument = Annotated[str, argument("A study's YAML file, or a shipped one.", "SETTINGS")]
StudySetOption = Annotated[list[str] | None, option("Change the study, e.g. seeds=5.", "KEY=VALUE")]
StudyOutOption = Annotated[
    Path | None,
    option(
        "Folder for runs and report; a study that was ended goes on there.", shown="results/NAME"
    ),
]
ChosenOption = Annotated[bool, option("Tune nothing: take what the file names as `best`.")]
WorkersOption = Annotated[int | None, option("Runs at a time.", min=1, shown="one per core")]
GRIDS = {  # by command: its help
    "levels": "Levels beside centralised backpropagation, each side tuned on a validation part.",
    "depth": "The same, against the number of layers (axes.depth).",
    "smoothness": "The same, against the samples that a sample takes to fade into the next "
    "(axes.smoothness).",
    "batch": "The same, against the rows of a sample (axes.batch), of equally many samples.",
}


def grid_command(name: str) -> Callable[..., None]:
    """Return the command `hamdist study NAME`, of GRIDS."""
    axis = None if name == "levels" else name

    def command(
        settings: StudyArgument,
        set_: StudySetOption = None,
        chosen: ChosenOption = False,
        workers: WorkersOption = None,
        out: StudyOutOption = None,
    ) -> None:
        run_grid(settings, axis, set_, chosen, workers, out)

    return command


def run_grid(
    source: str,
    axis_name: str | None,
    set_: list[str] | None,
    chosen: bool,
    workers: int | None,
    out: Path | None,
) -> None:
    """Run a study's runs that are not on disk yet, print the tables, and write the report."""
    from hamdist.study.interface.study import study

    result = study(
        source,
        axis_name,
        out=out,
        chosen=chosen,
        workers=workers,
        changes=set_ or [],
        on_record=_say_record,
        command=command_line(),
        say=note,
    )
    for title, table in result.tables.items():
        print_table(table, title)
    report(out=str(result.folder))
    say(f"Report: {result.folder / 'study.html'}")


def _say_record(phase: str, done: int, total: int, record: RunRecord) -> None:
    """Print a finished run on one line."""
    from hamdist.display.table import number, percent

    level = record.settings["level"] if record.trains == "level" else record.trains
    rules = record.settings.get("learning", {}).get("rules") or {}
    for rule in dict.fromkeys(r if isinstance(r, str) else r["name"] for r in rules.values()):
        level += f" with {rule}"
    score = f"{percent(record.accuracy, digits=2)} %"
    if record.accuracy is None:
        score = f"loss {number(record.loss)}"
    outcome = record.failure or f"{score}, {record.seconds:.1f} s"
    note(f"[{phase} {done}/{total}] {level}, seed {record.seed}: {outcome}")


# -- speed -----------------------------------------------------------------------------------------


SEEDS = 2


def speed(
    settings: Annotated[
        str | None,
        argument(
            "A study's YAML file, or a shipped one: accuracy against c (axes.speed).", "[SETTINGS]"
        ),
    ] = None,
    *,
    speeds: Annotated[str | None, option("c, hops per second.", "C,...", shown="10..1000")] = None,
    steps_ratio: Annotated[str | None, option("c tau.", "A,...", shown="1,.5,.1")] = None,
    streams: Annotated[str | None, option("static, smooth, random.", "A,B")] = None,
    seeds: Annotated[int | None, option("How many seeds.", min=1, shown="2")] = None,
    depth: Annotated[int | None, option("Layers of the tanh network.", min=1, shown="3")] = None,
    width: Annotated[int | None, option("Of its layers.", min=1, shown="16")] = None,
    options: Annotated[RunOptions, "model"],
    input_shape: Annotated[
        str | None, option("Of the model's input, without batch.", "N,...")
    ] = None,
    set_: StudySetOption = None,
    chosen: ChosenOption = False,
    workers: WorkersOption = None,
    out: Annotated[
        Path | None, option("Folder for the result's files.", shown="results/speed")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """From local to backpropagation: local gradients against backpropagation's, by speed c; with
    SETTINGS the accuracy that is learned, against c."""
    sizes = without_none({"speeds": speeds, "steps-ratio": steps_ratio, "streams": streams})
    if settings is not None:
        others = {"depth": depth, "width": width, "model": options.model, "seeds": seeds}
        others["overwrite"] = overwrite or None
        of_gradients = {**sizes, **without_none({**others, "input-shape": input_shape})}
        if of_gradients:
            raise SettingsError(
                f"--{next(iter(of_gradients))} belongs to the study of gradients, without "
                "SETTINGS; what a grid varies stands in its file"
            )
        run_grid(settings, "speed", set_, chosen, workers, out)
        return
    if set_ or chosen or workers is not None:
        raise SettingsError(
            "--set, --chosen and --workers belong to a grid: name its SETTINGS, too"
        )
    out = Path("results/speed") if out is None else out
    _speed(sizes, seeds or SEEDS, (depth, width), options, input_shape, out, overwrite)


def _speed(
    sizes_by_name: dict[str, str],
    seeds: int,
    sizes: tuple[int | None, int | None],
    options: RunOptions,
    input_shape: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    factory = options.factory()

    from hamdist.study.propagation.report import save_speed, speed_tables
    from hamdist.study.propagation.study import own_network, parse_study, run_study, tanh_network
    from hamdist.study.verify.topics.own_model import parse_shape

    study = parse_study(sizes_by_name, seeds)
    subject = tanh_network(*sizes)
    if factory is not None and options.model is not None:
        if input_shape is None or sizes != (None, None):
            raise SettingsError(
                "--model goes with --input-shape; --depth and --width belong to the tanh network"
            )
        subject = own_network(factory, options.model, parse_shape(input_shape))
    elif input_shape is not None:
        raise SettingsError("--input-shape belongs to --model; the tanh network has its own")
    out = free_folder(out, overwrite=overwrite, say=note)
    printed = time.monotonic()

    def show(done: int, total: int, row: SpeedRow) -> None:
        nonlocal printed
        if done == total or time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            note(
                f"[{done}/{total}] seed {row.seed}, {row.stream}, c tau {row.c_tau:g}, "
                f"c {row.c:g}: error {row.error:.2g}"
            )

    result = run_study(study, subject, command_line(), show)
    save_speed(out, result)
    for title, table in speed_tables(result).items():
        print_table(table, title)
    say_written(out)


# -- recovery --------------------------------------------------------------------------------------


def recovery(
    full: Annotated[bool, option("The paper's epochs: 40, for sequences 80.")] = False,
    epochs: Annotated[int | None, option("Epochs.", min=1, shown="1")] = None,
    models: Annotated[str | None, option("linear, mlp, resnet, vit, rnn, lstm.", "A,B")] = None,
    paper: Annotated[bool, option("Dampen the first momentum step, too (HL App. E).")] = False,
    images: Annotated[Path | None, option("Folder of IDX files, instead.")] = None,
    texts: Annotated[Path | None, option("Texts of two classes (pos, neg), instead.")] = None,
    glove: Annotated[Path | None, option("Word vectors of 50 numbers to begin with.")] = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Gradient descent recovered: six networks against torch.optim.SGD, in float64."""
    if full and epochs is not None:
        raise SettingsError(f"--epochs {epochs} with --full, which has its own: give one of them")
    from hamdist.config import FirstStep
    from hamdist.study.gradient_descent.models import MODELS, Paths
    from hamdist.study.gradient_descent.report import (
        in_order,
        recovery_line,
        recovery_table,
        save_recovery,
    )
    from hamdist.study.gradient_descent.scenarios import RowWorkers, jobs

    rows_to_make = jobs(
        tuple(MODELS) if models is None else names(models),
        epochs=None if full else epochs or 1,
        first_step=FirstStep.DAMPENED if paper else FirstStep.UNDAMPENED,
        paths=Paths(images, texts, glove),
    )
    if out is not None:
        out = free_folder(out, overwrite=overwrite, say=note)
    finished = []
    with RowWorkers(rows_to_make) as rows:
        for row in rows.finished():
            finished.append(row)
            note(f"[{len(finished)}/{len(rows_to_make)}] {recovery_line(row)}")
    finished = in_order(finished)
    if out is not None:
        save_recovery(out, finished, command_line())
    print_table(recovery_table(finished), "Gradient descent recovered")
    if out is not None:
        say_written(out)
    if not all(row.passed for row in finished):
        raise typer.Exit(FAILED)
