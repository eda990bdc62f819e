"""`hamdist cluster start` and `stop`, and `hamdist doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from hamdist.cli.console import console, note, print_rows, report, say
from hamdist.errors import FAILED

if TYPE_CHECKING:
    from hamdist.launch.jobs_api import Jobs

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="FILE|ADDRESS",
        help="A cluster file, or http://HOST:PORT of Ray's Jobs API.",
        show_default="$HAMDIST_CLUSTER, or what `hamdist cluster start` started",
    ),
]
FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Where it lives.", show_default="~/.hamdist/cluster")
]


def cluster_start(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of Ray's head.")] = 6379,
    jobs_port: Annotated[
        int, typer.Option("--jobs-port", min=1, max=65535, help="Of its dashboard and Jobs API.")
    ] = 8265,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, help="That Ray may hand out.")
    ] = None,
    folder: FolderOption = None,
) -> None:
    """Start Ray on this machine, with a token, ready for `hamdist launch`."""
    from hamdist.launch import local_cluster as one_host
    from hamdist.launch.cluster_file import HOME

    note("Starting Ray (some 10 s)")
    home = HOME.expanduser() if folder is None else folder.absolute()
    file = one_host.start(home, port=port, jobs_port=jobs_port, cpus=cpus)
    report(file=str(file))
    say(f"Ray is up. Cluster file: {file}")
    hint = "" if folder is None else f" --cluster {file}"
    say(f"Next: hamdist launch digits{hint} --out results/digits")


def cluster_stop(folder: FolderOption = None) -> None:
    """End what `hamdist cluster start` has started, and no other Ray."""
    from hamdist.launch import local_cluster as one_host
    from hamdist.launch.cluster_file import HOME

    home = HOME.expanduser() if folder is None else folder.absolute()
    ended = one_host.stop(home)
    report(ended=ended)
    say("Ray has ended." if ended else f"No Ray of hamdist runs ({home}).")


def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="FILE|ADDRESS",
            help="Look at all hosts of a cluster ('mine': of `hamdist cluster start`).",
            show_default="this host alone",
        ),
    ] = None,
) -> None:
    """Check hosts: versions, threads, memory, clocks, storage, and the links between them."""
    from hamdist.launch.doctor import checkup

    jobs = None if cluster is None else jobs_of(None if cluster == "mine" else cluster)
    findings, checks = checkup(jobs, note)
    for title, rows in findings.tables().items():
        print_rows(title, rows)
    report(**findings.model_dump(mode="json"), checks=list(map(asdict, checks)))
    for check in checks:
        style = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}[check.verdict]
        line = Text.assemble((f"{check.verdict:8}", style), check.text)
        console().print(line, soft_wrap=True)
    if any(check.verdict == "FAIL" for check in checks):
        raise typer.Exit(FAILED)


def jobs_of(cluster: str | None) -> Jobs:
    """Return the Jobs API of the cluster that `--cluster` names. Raises SettingsError."""
    from hamdist.launch.cluster_file import find_cluster
    from hamdist.launch.jobs_api import Jobs

    return Jobs(find_cluster(cluster))
