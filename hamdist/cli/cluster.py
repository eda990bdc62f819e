"""`hamdist cluster start` and `stop`, `doctor`; `launch`, `attach`, `stop`, `runs`: runs on a
cluster, each followed until it ends: its events, its files, its exit code.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import (
    Display,
    complain,
    console,
    note,
    print_facts,
    print_notes,
    print_rows,
    report,
    say,
    say_written,
    warn,
)
from hamdist.cli.options import (
    OutOption,
    OverwriteOption,
    RunOptions,
    SettingsArgument,
    argument,
    option,
)
from hamdist.errors import FAILED, INTERRUPTED, ClusterError, SettingsError

if TYPE_CHECKING:
    from hamdist.launch.events import Ended, Results, ResultValues
    from hamdist.launch.jobs_api import Jobs, RayJob
    from hamdist.launch.submit import DryRun

ClusterOption = Annotated[
    str | None,
    option(
        "A cluster file, or http://HOST:PORT of Ray's Jobs API.",
        "FILE|ADDRESS",
        shown="$HAMDIST_CLUSTER, or what `hamdist cluster start` started",
    ),
]
FolderOption = Annotated[Path | None, option("Where it lives.", shown="~/.hamdist/cluster")]


def cluster_start(
    port: Annotated[int, option("Of Ray's head.", min=1, max=65535)] = 6379,
    jobs_port: Annotated[int, option("Of its dashboard and Jobs API.", min=1, max=65535)] = 8265,
    cpus: Annotated[int | None, option("That Ray may hand out.", min=1)] = None,
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
        option(
            "Look at all hosts of a cluster ('mine': of `hamdist cluster start`).",
            "FILE|ADDRESS",
            shown="this host alone",
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


# -- launched runs ---------------------------------------------------------------------------------


def results_in(out: Path | None, overwrite: bool) -> Results:
    """Return the receiver of a run's files. Raises SettingsError if `out` cannot be written."""
    from hamdist.launch.events import Results
    from hamdist.study.shared.result_folder import free_folder

    return Results(None if out is None else free_folder(out, overwrite=overwrite, say=note))


def follow_run(jobs: Jobs, name: str, results: Results, *, stopped: bool = False) -> None:
    """Show a run until it ends, receive its results, and end with its exit code."""
    try:
        with Display() as display:
            ended, reached = _watch(jobs, name, results, display)
    except KeyboardInterrupt:
        complain(f"{name} goes on without this terminal; again: hamdist attach {name}")
        raise typer.Exit(INTERRUPTED) from None
    if reached is not None:
        report(id=name, title=reached.title, facts=dict(reached.facts))
        print_facts(reached.title, reached.facts)
    _print_results(results)
    if ended is None:
        raise ClusterError(jobs.find(name).unfinished())
    if ended.details:
        complain(ended.details.rstrip())
    if ended.error is not None:
        report(error=ended.error)
        complain(f"Error: {ended.error}")
    if ended.interrupted or (ended.error is not None and ended.samples):
        complain(f"Stopped after {ended.samples} samples.")
    if ended.resume is not None:
        complain(f"Go on: hamdist launch SETTINGS --resume {ended.resume}")
    if ended.code and not (stopped and ended.interrupted):
        raise typer.Exit(ended.code)


def _watch(
    jobs: Jobs, name: str, results: Results, display: Display
) -> tuple[Ended | None, ResultValues | None]:
    """Show the run's events. Returns how it ended (None: without an event), and its facts."""
    from hamdist.launch.events import DriverLost, Ended, Listening, ResultValues, follow
    from hamdist.runtime.results.events import RunEvent, Warned

    display.note(f"{name}: waiting for the cluster")
    reached: ResultValues | None = None
    early: list[str] = []  # Ray's own words, which matter where nothing of ours follows

    def say(text: str) -> None:
        if display.follows:
            display.say(text)
        else:
            early.append(text)

    for event in follow(jobs.lines(name), results, say):
        if isinstance(event, Warned):
            warn(event.text)
        elif isinstance(event, RunEvent):
            display.take(event)
        elif isinstance(event, Listening):
            note(f"Served at {event.address}: hamdist.attach({name!r}) talks to it")
        elif isinstance(event, DriverLost):
            place = f"goes on from tick {event.tick}" if event.tick else "begins again"
            warn(f"the driver was lost ({event.signal}); the run {place}")
        elif isinstance(event, ResultValues):
            reached = event
            display.note(f"{event.title}: fetching the results")
        elif isinstance(event, Ended):
            return event, reached
    for text in [] if display.follows else early:
        display.say(text)
    return None, reached


def _print_results(results: Results) -> None:
    if results.out is not None and results.written:
        say_written(results.out)
    for file in results.left:
        complain(
            f"{file.name} has {file.size / 2**20:.1f} MiB, more than fetch_mib of the cluster file "
            "lets through"
        )
    if results.files_stay is not None:
        complain(f"The files are on {results.files_stay.host}: {results.files_stay.folder}")


IdArgument = Annotated[str, argument("See `hamdist runs`.", "ID")]


def launch(
    settings: SettingsArgument,
    cluster: ClusterOption = None,
    *,
    options: Annotated[RunOptions, "level seed steps set_ model stream"],
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        str | None, option("Go on from the latest snapshot of a run.", "ID|PATH")
    ] = None,
    detach: Annotated[bool, option("Print the run's id and do not follow it.")] = False,
    live: Annotated[bool, option("Learn from what hamdist.attach(ID) says, not a stream.")] = False,
    host: Annotated[str, option("With --live: the head's interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("With --live; 0: any free one.", min=0, max=65535)] = 0,
    dry_run: Annotated[bool, option("Print who would go where, and what is missing.")] = False,
) -> None:
    """Run on a cluster, as a Ray job: it goes on when this terminal is closed."""
    if detach and out is not None:
        raise SettingsError("--out with --detach: fetch the results with hamdist attach --out")
    if live and options.stream is not None:
        raise SettingsError("--stream with --live: a live run has no stream but its clients")
    from hamdist.launch.cluster_file import find_cluster
    from hamdist.launch.package import on_ray
    from hamdist.launch.submit import NOTHING_KEPT, resumed_from, snapshots_path, submit_run

    where = find_cluster(cluster)
    begin = None if resume is None else resumed_from(resume, where)
    loaded = options.load(settings)
    run_settings = on_ray(loaded.for_level(loaded.level))
    keeps_snapshots = snapshots_path(run_settings, where, "") is not None
    results = results_in(None if dry_run else out, overwrite)
    own = options.functions(run_settings)

    from hamdist.launch.jobs_api import Jobs

    jobs = Jobs(where)
    if dry_run:
        from hamdist.launch.submit import dry_run as work_out

        named = {"--model": options.model, "--stream": options.stream}
        _print_plan(work_out(run_settings, named, own, where, jobs.hosts()))
        return

    if not keeps_snapshots:
        warn(NOTHING_KEPT)
    live_at = (host, port) if live else None
    name = submit_run(jobs, run_settings, options.model, begin, options.stream, live_at)
    report(id=name)
    say(name)
    if not detach:
        note(f"Ctrl-C leaves it running; to end it: hamdist stop {name}")
        follow_run(jobs, name, results)


def attach(
    id_: Annotated[
        str | None, argument("See `hamdist runs`; none: the one that runs.", "[ID]")
    ] = None,
    cluster: ClusterOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Follow a launched run, and fetch its results."""
    jobs = jobs_of(cluster)
    results = results_in(out, overwrite)
    name = _latest(jobs) if id_ is None else jobs.find(id_).id
    follow_run(jobs, name, results)


def stop(
    id_: IdArgument,
    cluster: ClusterOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """End a launched run, behind a last snapshot; what it has reached is its result."""
    jobs = jobs_of(cluster)
    results = results_in(out, overwrite)
    name = jobs.find(id_).id
    if jobs.stop(name):
        note(f"Asked it to end; it has {jobs.cluster.stop_seconds} s for that")
    else:
        note(f"{name} had ended before.")
    follow_run(jobs, name, results, stopped=True)


def runs(cluster: ClusterOption = None) -> None:
    """List the launched runs of a cluster, the latest first."""
    table = Table("id", "state", "level", "samples", "began", "took", box=None, pad_edge=False)
    jobs = [job for job in jobs_of(cluster).all() if job.metadata.get("kind") == "run"]
    report(runs=[{**asdict(job), "metadata": dict(job.metadata)} for job in jobs])
    for job in jobs:
        table.add_row(*(Text(cell) for cell in _cells(job)))
    if table.rows:
        console().print(table)
    else:
        complain("No run has been launched there.")


def _latest(jobs: Jobs) -> str:
    """Return the run that is under way, else the last one."""
    runs = [job for job in jobs.all() if job.metadata.get("kind") == "run"]
    running = [job.id for job in runs if not job.over]
    if len(running) > 1:
        raise SettingsError(f"several runs are under way: {', '.join(running)}; name one")
    if not runs:
        raise ClusterError(f"{jobs.cluster.jobs}: no run has been launched there")
    return running[0] if running else runs[0].id


def _cells(job: RayJob) -> list[str]:
    began = "" if job.began is None else time.strftime("%m-%d %H:%M", time.localtime(job.began))
    end = job.ended or time.time()
    took = "" if job.began is None else f"{end - job.began:.0f} s"
    metadata = job.metadata
    return [job.id, job.state, metadata.get("level", ""), metadata.get("steps", ""), began, took]


def _print_plan(work: DryRun) -> None:
    for title, rows in work.tables().items():
        print_rows(title, rows)
    report(notes=list(work.notes), missing=list(work.missing))
    print_notes(work.notes)
    for line in work.missing:
        complain(f"Missing: {line}")
    if work.missing:
        raise typer.Exit(FAILED)
