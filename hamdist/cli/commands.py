"""The command `hamdist` and all below it, as typer runs them."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, cast, get_type_hints

import typer
from typer.models import OptionInfo

from hamdist.cli import (
    cluster,
    compare,
    results,
    run,
    serve,
    settings,
    simulate,
    study,
    verify,
    view,
)
from hamdist.cli.console import console, exit_codes, output, warning_at_once
from hamdist.cli.options import RunOptions

__all__ = ["app"]

OUTPUT_OPTIONS = {  # of every command
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what it is doing, phase by phase.")
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but results, warnings and errors.")
    ],
    "as_json": Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")
    ],
}


_HINTS = get_type_hints(RunOptions, include_extras=True)
RUN_OPTIONS = {
    name: p.replace(annotation=_HINTS[name], kind=p.KEYWORD_ONLY)
    for name, p in inspect.signature(RunOptions).parameters.items()
}


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with the options that all have (-v, -q, --json), errors as exit codes.

    Its parameters of type RunOptions become the options that they name. An option has the name of
    its parameter; a flag that is not set by itself has no `--no-...`.
    """
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    outputs = {
        name: hint.__metadata__[0].split()
        for name, hint in hints.items()
        if getattr(hint, "__origin__", None) is RunOptions
    }
    parameters = []
    for name, p in signature.parameters.items():
        if name in outputs:
            parameters += [RUN_OPTIONS[option] for option in outputs[name]]
        else:
            parameters.append(p.replace(annotation=hints[name], kind=p.KEYWORD_ONLY))
    for p in parameters:
        for info in getattr(p.annotation, "__metadata__", ()):
            if isinstance(info, OptionInfo) and p.default is not True:
                info.param_decls = (f"--{p.name.strip('_').replace('_', '-')}",)
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in OUTPUT_OPTIONS.items()
        if not (name == "as_json" and "json_" in signature.parameters)
    ]

    @functools.wraps(command)
    def printing(*, verbose: bool, quiet: bool, as_json: bool = False, **options: Any) -> None:
        if verbose and quiet:
            raise typer.BadParameter("--verbose and --quiet: give one of them")
        level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        for name, names in outputs.items():
            options[name] = RunOptions(**{option: options.pop(option) for option in names})
        with output(as_json=as_json, level=level), exit_codes(), warning_at_once():
            command(**options)

    described = cast(Any, printing)  # as typer reads it
    described.__signature__ = signature.replace(parameters=parameters)
    described.__annotations__ = {p.name: p.annotation for p in parameters}
    return printing


def _version(wanted: bool) -> None:
    if wanted:
        console().print(f"hamdist {import_module('hamdist').__version__}")
        raise typer.Exit


app = typer.Typer(
    name="hamdist",
    help="Networks of blocks that exchange only neighbour signals, from fully local to exactly "
    "backpropagation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options of the command itself."""


for _command in (  # in the order of use
    *(settings.init, settings.recipes, settings.rules, run.run, compare.compare),
    *(view.view, view.watch, view.explain, view.draw, serve.serve, serve.replay),
    *(results.export, results.diff, results.bisect, results.rewind, results.fork),
    *(simulate.simulate, simulate.profile),
    *(verify.verify, cluster.doctor, cluster.launch, cluster.attach, cluster.stop, cluster.runs),
    settings.schema,
):
    app.command()(with_output(_command))

_study = typer.Typer(
    name="study", help="Measure what the papers state, and print the table.", no_args_is_help=True
)
_study.command()(with_output(study.recovery))
for _name, _help in study.GRIDS.items():
    _study.command(_name, help=_help)(with_output(study.grid_command(_name)))
_study.command()(with_output(study.speed))
app.add_typer(_study)

_cluster = typer.Typer(
    name="cluster", help="A Ray cluster of this machine alone.", no_args_is_help=True
)
_cluster.command("start")(with_output(cluster.cluster_start))
_cluster.command("stop")(with_output(cluster.cluster_stop))
app.add_typer(_cluster)
