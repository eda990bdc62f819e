"""The command `hamdist` and all below it, as typer runs them."""

from __future__ import annotations

import typer

from hamdist.cli import compare, diff, export, recipes, run, verify
from hamdist.cli.cluster import cluster, launch
from hamdist.cli.study import gradient_descent as recovery
from hamdist.cli.study import propagation as speed
from hamdist.cli.study import sweep as grid

__all__ = ["app"]

app = typer.Typer(
    name="hamdist",
    help="Networks of blocks that exchange only neighbour signals, from fully local to exactly "
    "backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    *(launch.launch, launch.attach, launch.stop, launch.runs, cluster.doctor),
    *(run.run, export.export, compare.compare, diff.diff, verify.verify, recipes.recipes),
):
    app.command()(_command)

_study = typer.Typer(
    name="study", help="Measure what the papers state, and print the table.", no_args_is_help=True
)
_study.command()(recovery.recovery)
for _name, _help in grid.GRIDS.items():
    _study.command(_name, help=_help)(grid.grid_command(_name))
_study.command()(speed.speed)
app.add_typer(_study)

_cluster = typer.Typer(
    name="cluster", help="A Ray cluster of this machine alone.", no_args_is_help=True
)
_cluster.command("start")(cluster.cluster_start)
_cluster.command("stop")(cluster.cluster_stop)
app.add_typer(_cluster)
