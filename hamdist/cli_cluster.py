"""The commands for clusters: cluster start and stop, launch, attach, stop, runs, doctor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hamdist.cli_common import (
    FAILED,
    INTERRUPTED,
    Display,
    ModelOption,
    OutOption,
    SeedOption,
    SetOption,
    SettingsArgument,
    StepsOption,
    complain,
    console,
    exit_codes,
    load,
    print_facts,
)
from hamdist.config import Level
from hamdist.errors import ClusterError, SettingsError

if TYPE_CHECKING:
    from hamdist.launch.dry import DryRun
    from hamdist.launch.events import Ended, Reached
    from hamdist.launch.follow import Results
    from hamdist.launch.jobs import Job, Jobs
    from hamdist.study.runs import OnProgress

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="FILE|ADDRESS",
        help="A cluster file, or http://HOST:PORT of Ray's Jobs API.",
        show_default="$HAMDIST_CLUSTER, or what `hamdist cluster start` started",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="See `hamdist runs`.")]
FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help="Where it lives.", show_default="~/.hamdist/cluster"),
]

cluster_app = typer.Typer(
    name="cluster", help="A Ray cluster of this machine alone.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    for command in (launch, attach, stop, runs, doctor):
        app.command()(command)
    app.add_typer(cluster_app)


@cluster_app.command("start")
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
    with exit_codes():
        from hamdist.launch import one_host
        from hamdist.launch.cluster_file import HOME

        complain("Starting Ray (some 10 s)")
        own = HOME.expanduser() if folder is None else folder.absolute()
        file = one_host.start(own, port=port, jobs_port=jobs_port, cpus=cpus)
        console().print(Text(f"Ray is up. Cluster file: {file}"), soft_wrap=True)
        hint = "" if folder is None else f" --cluster {file}"
        console().print(Text(f"Next: hamdist launch digits{hint} --out results/digits"))


@cluster_app.command("stop")
def cluster_stop(folder: FolderOption = None) -> None:
    """End what `hamdist cluster start` has started, and no other Ray."""
    with exit_codes():
        from hamdist.launch import one_host
        from hamdist.launch.cluster_file import HOME

        own = HOME.expanduser() if folder is None else folder.absolute()
        ended = one_host.stop(own)
        console().print(Text("Ray has ended." if ended else f"No Ray of hamdist runs ({own})."))


def launch(
    settings: SettingsArgument,
    cluster: ClusterOption = None,
    level: Annotated[Level | None, typer.Option("--level", help="Level of locality.")] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    out: OutOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="ID|PATH", help="Go on from the latest snapshot of a run."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the run's id and do not follow it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print who would go where, and what is missing.")
    ] = False,
) -> None:
    """Run on a cluster, as a Ray job: it goes on when this terminal is closed."""
    with exit_codes():
        if detach and out is not None:
            raise SettingsError("--out with --detach: fetch the results with hamdist attach --out")
        from hamdist.launch.cluster_file import find_cluster
        from hamdist.launch.parcel import on_ray
        from hamdist.launch.submit import NOTHING_KEPT, kept_at, resumed_from, submit_run

        where = find_cluster(cluster)
        begin = None if resume is None else resumed_from(resume, where)
        options = {
            "level": None if level is None else level.value,
            "seed": seed,
            "steps": steps,
        }
        loaded = load(settings, set_, options)
        own = on_ray(loaded.for_level(loaded.level))
        kept = kept_at(own, where, "") is not None
        results = _results(None if dry_run else out)
        factory = None
        if model is not None:
            from hamdist.models import load_factory

            factory = load_factory(model)

        from hamdist.launch.jobs import Jobs

        jobs = Jobs(where)
        if dry_run:
            from hamdist.launch.dry import dry_run as work_out

            _print_plan(work_out(own, model, factory, where, jobs.hosts()))
            return

        if not kept:
            complain(f"Warning: {NOTHING_KEPT}")
        name = submit_run(jobs, own, model, begin)
        console().print(Text(name))
        if not detach:
            complain("Ctrl-C leaves it running. Again: hamdist attach; to end it: hamdist stop")
            _follow(jobs, name, results)


def attach(
    id_: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="See `hamdist runs`; none: the one that runs."),
    ] = None,
    cluster: ClusterOption = None,
    out: OutOption = None,
) -> None:
    """Follow a launched run, and fetch its results."""
    with exit_codes():
        jobs = _jobs(cluster)
        results = _results(out)
        name = _latest(jobs) if id_ is None else jobs.find(id_).id
        _follow(jobs, name, results)


def stop(id_: IdArgument, cluster: ClusterOption = None, out: OutOption = None) -> None:
    """End a launched run, behind a last snapshot; what it has reached is its result."""
    with exit_codes():
        jobs = _jobs(cluster)
        results = _results(out)
        name = jobs.find(id_).id
        if jobs.stop(name):
            complain(f"Asked it to end; it has {jobs.cluster.stop_seconds} s for that")
        else:
            complain(f"{name} had ended before.")
        _follow(jobs, name, results, stopped=True)


def runs(cluster: ClusterOption = None) -> None:
    """List the launched runs of a cluster, the latest first."""
    with exit_codes():
        table = Table("id", "state", "level", "items", "began", "took", box=None, pad_edge=False)
        for job in _jobs(cluster).all():
            if job.metadata.get("kind") == "run":
                table.add_row(*(Text(cell) for cell in _cells(job)))
        if table.rows:
            console().print(table)
        else:
            complain("No run has been launched there.")


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
    with exit_codes():
        from hamdist.launch.checkup import checkup

        report, checks = checkup(None if cluster is None else _jobs(_named(cluster)), complain)
        for title, rows in report.tables().items():
            _print_rows(title, rows)
        for check in checks:
            style = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}[check.verdict]
            line = Text.assemble((f"{check.verdict:8}", style), check.text)
            console().print(line, soft_wrap=True)
        if any(check.verdict == "FAIL" for check in checks):
            raise typer.Exit(FAILED)


def _named(cluster: str) -> str | None:
    return None if cluster == "mine" else cluster


def _jobs(cluster: str | None) -> Jobs:
    from hamdist.launch.cluster_file import find_cluster
    from hamdist.launch.jobs import Jobs

    return Jobs(find_cluster(cluster))


def _results(out: Path | None) -> Results:
    from hamdist.launch.follow import Results

    return Results(out)


def _latest(jobs: Jobs) -> str:
    """The run that is under way, else the last one."""
    known = [job for job in jobs.all() if job.metadata.get("kind") == "run"]
    running = [job.id for job in known if not job.over]
    if len(running) > 1:
        raise SettingsError(f"several runs are under way: {', '.join(running)}; name one")
    if not known:
        raise ClusterError(f"{jobs.cluster.jobs}: no run has been launched there")
    return running[0] if running else known[0].id


def _follow(jobs: Jobs, name: str, results: Results, *, stopped: bool = False) -> None:
    """Shows a run until it ends, takes its results, and ends with its exit code."""
    try:
        with Display() as display:
            ended, reached = _watch(jobs, name, results, display)
    except KeyboardInterrupt:
        complain(f"{name} goes on without this terminal; again: hamdist attach {name}")
        raise typer.Exit(INTERRUPTED) from None
    if reached is not None:
        print_facts(reached.title, reached.facts)
    _print_results(results)
    if ended is None:
        raise ClusterError(jobs.find(name).unfinished())
    if ended.details:
        complain(ended.details.rstrip())
    if ended.error is not None:
        complain(f"Error: {ended.error}")
    if ended.interrupted:
        complain(f"Stopped after {ended.samples} items.")
    if ended.resume is not None:
        complain(f"Go on: hamdist launch SETTINGS --resume {ended.resume}")
    if ended.code and not (stopped and ended.interrupted):
        raise typer.Exit(ended.code)


def _watch(
    jobs: Jobs, name: str, results: Results, display: Display
) -> tuple[Ended | None, Reached | None]:
    """Shows what the run tells. Returns how it ended (None where it never said so), and what it
    reached."""
    from hamdist.launch.events import Ended, Lost, Moved, Reached, Said, Started
    from hamdist.launch.follow import follow

    display.note(f"{name}: waiting for the cluster")
    show: OnProgress | None = None
    reached: Reached | None = None
    early: list[str] = []  # Ray's own words, which matter where nothing of ours follows

    def say(text: str) -> None:
        if show is None:
            early.append(text)
        else:
            display.say(text)

    for event in follow(jobs.lines(name), results, say):
        if isinstance(event, Started):
            show = display.watch(event.title, event.batch)
        elif isinstance(event, Lost):
            place = f"goes on from tick {event.tick}" if event.tick else "begins again"
            display.say(f"Warning: the driver was lost ({event.signal}); the run {place}")
        elif isinstance(event, Moved) and show is not None:
            show(event.progress)
        elif isinstance(event, Said):
            display.say(f"Warning: {event.warning}")
        elif isinstance(event, Reached):
            reached = event
            display.note(f"{event.title}: fetching the results")
        elif isinstance(event, Ended):
            return event, reached
    for text in early if show is None else []:
        display.say(text)
    return None, reached


def _print_results(results: Results) -> None:
    if results.written:
        console().print(Text(f"Written to {results.out}"), soft_wrap=True)
    for file in results.left:
        complain(
            f"{file.name} has {file.size / 2**20:.1f} MiB, more than fetch_mib of the cluster file "
            "lets through"
        )
    if results.kept is not None:
        complain(f"The files are on {results.kept.host}: {results.kept.folder}")


def _cells(job: Job) -> list[str]:
    began = "" if job.began is None else time.strftime("%m-%d %H:%M", time.localtime(job.began))
    end = job.ended or time.time()
    took = "" if job.began is None else f"{end - job.began:.0f} s"
    known = job.metadata
    return [job.id, job.state, known.get("level", ""), known.get("steps", ""), began, took]


def _print_plan(work: DryRun) -> None:
    for title, rows in work.tables().items():
        _print_rows(title, rows)
    for line in work.notes:
        console().print(Text(f"• {line}"), soft_wrap=True)
    for line in work.missing:
        complain(f"Missing: {line}")
    if work.missing:
        raise typer.Exit(FAILED)


def _print_rows(title: str, rows: Sequence[Sequence[str]]) -> None:
    """The first row has the columns' names."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)
