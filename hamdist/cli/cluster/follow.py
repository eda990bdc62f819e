"""Following a launched run until it ends: its events, its files, its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hamdist.cli.console import complain, note, print_facts, report, say_written, warn
from hamdist.cli.display import Display
from hamdist.errors import INTERRUPTED, ClusterError

if TYPE_CHECKING:
    from hamdist.launch.events import Ended, ResultValues
    from hamdist.launch.follow import Results
    from hamdist.launch.jobs_api import Jobs


def results_in(out: Path | None, overwrite: bool) -> Results:
    """Return the receiver of a run's files. Raises SettingsError if `out` cannot be written."""
    from hamdist.launch.follow import Results
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
    if ended.interrupted:
        complain(f"Stopped after {ended.samples} samples.")
    if ended.resume is not None:
        complain(f"Go on: hamdist launch SETTINGS --resume {ended.resume}")
    if ended.code and not (stopped and ended.interrupted):
        raise typer.Exit(ended.code)


def _watch(
    jobs: Jobs, name: str, results: Results, display: Display
) -> tuple[Ended | None, ResultValues | None]:
    """Show the run's events. Returns how it ended (None: without an event), and its facts."""
    from hamdist.launch.events import DriverLost, Ended, Listening, ResultValues
    from hamdist.launch.follow import follow
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
