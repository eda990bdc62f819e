"""`hamdist view`, `watch`, `explain`, `draw`: runs as a page, live text, words, a picture."""

from __future__ import annotations

import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from hamdist.cli.cluster import ClusterOption, jobs_of
from hamdist.cli.console import Display, complain, console, note, print_notes, report, say
from hamdist.cli.options import DEFAULT_SETTINGS, RunOptions, argument, option
from hamdist.errors import HamdistError, SettingsError
from hamdist.runtime.results.run_events import EVENTS, EventFile, line_of
from hamdist.study.shared.result_folder import results_of, write_file

if TYPE_CHECKING:
    from hamdist.launch.jobs_api import Jobs
    from hamdist.study.view.page import PageServer


def view(
    names: Annotated[
        list[str] | None, argument("Folders of results, or a launched run.", "[DIR|ID]...")
    ] = None,
    latest: Annotated[bool, option("The latest folder of results/ (as without DIR).")] = False,
    port: Annotated[int, option("Of the page; 0: any that is free.", min=0, max=65535)] = 0,
    browser: Annotated[bool, option("Open the page in the browser.")] = True,
    cluster: ClusterOption = None,
) -> None:
    """Show runs while they go on, or afterwards, on a local page; Ctrl-C ends it."""
    from hamdist.study.view.page import PageServer

    if latest and names:
        raise SettingsError("--latest with a DIR: name the folders, or leave --latest out")
    with (
        _folders(names or [str(latest_results())], cluster) as folders,
        PageServer(folders, port) as server,
    ):
        show_page(server, browser=browser)
        server.wait()


def show_page(server: PageServer, *, browser: bool) -> None:
    """Print the page's address, and open it."""
    report(address=server.address)
    say(server.address)
    if browser and not webbrowser.open(server.address):
        note("No browser was found: open the address yourself.")


def watch(
    name: Annotated[
        str | None,
        argument(
            "Folder of results, or a launched run.", "[DIR|ID]", shown="the latest of results/"
        ),
    ] = None,
    cluster: ClusterOption = None,
) -> None:
    """Show runs while they go on, or afterwards, in this terminal; Ctrl-C ends it, not the run."""
    with _folders([name or str(latest_results())], cluster) as [folder]:
        from hamdist.study.view.page import follow_events

        with Display() as display:
            for event in follow_events(folder):
                line = line_of(event)
                if line is not None:
                    display.say(line)
                display.take(event)
        _explain(folder)


def explain(
    folder: Annotated[
        Path | None, argument("Folder of results.", "[DIR]", shown="the latest of results/")
    ] = None,
) -> None:
    """Say in words where the time of runs went, and what to change."""
    _explain(latest_results() if folder is None else _with_events(folder))


def _explain(folder: Path) -> None:
    from hamdist.runtime.results.events import read_events
    from hamdist.study.view.explain import explain as in_words

    with (folder / EVENTS).open(encoding="utf-8") as file:
        runs = in_words(read_events(file))
    report(runs=runs)
    for name, texts in runs.items():
        console().print(Text(name, style="bold"))
        print_notes(texts)
    if not runs:
        complain(f"{folder}: no run has begun there")


def draw(
    settings: Annotated[
        str, argument("A YAML file, a recipe, a folder of results.", "SETTINGS|DIR")
    ] = DEFAULT_SETTINGS,
    *,
    options: Annotated[RunOptions, "level engine set_ model stream"],
    out: Annotated[Path | None, option("File, .svg or .dot.", shown="NAME.svg")] = None,
) -> None:
    """Draw the network of a run: blocks, shapes, edges, delays, actors; colour: late messages."""
    from hamdist.display.network import network_picture
    from hamdist.study.run.export import network_of_folder, network_of_settings

    if Path(settings).is_dir():
        network, name = network_of_folder(_with_events(Path(settings)) / EVENTS)
    else:
        loaded = options.load(settings)
        network, name = network_of_settings(loaded, options.functions(loaded))
    file = out or Path(f"{results_of(name).name}.svg")
    if file.suffix not in (".svg", ".dot"):
        raise SettingsError(f"--out {str(file)!r}: name a file that ends in .svg or .dot")
    picture = network_picture(network, name)
    write_file(file, picture.dot if file.suffix == ".dot" else picture.svg)
    report(file=str(file))
    say(f"Written to {file}")


def latest_results() -> Path:
    """Return the folder of results/ whose events are the latest. Raises SettingsError if none."""
    folder = results_of("x").parent
    paths = sorted(folder.glob(f"*/{EVENTS}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise SettingsError(f"{folder}: no folder there has {EVENTS}; name one")
    return paths[-1].parent


def _with_events(folder: Path) -> Path:
    if not (folder / EVENTS).is_file():
        raise SettingsError(
            f"{str(folder)!r} has no {EVENTS}; give a folder of `hamdist run --out`"
        )
    return folder


@contextmanager
def _folders(names: list[str], cluster: str | None) -> Iterator[list[Path]]:
    """Yield the folders to show; a launched run gets a temporary one that follows it."""
    with tempfile.TemporaryDirectory(prefix="hamdist-view-") as scratch:
        folders = []
        for name in names:
            if Path(name).exists():
                folders.append(_with_events(Path(name)))
                continue
            try:
                jobs = jobs_of(cluster)
                job = jobs.find(name).id
            except HamdistError as error:
                text = f"{name!r} is no folder of results, and no launched run: {error}"
                raise SettingsError(text) from None
            folders.append(Path(scratch) / job)
            folders[-1].mkdir()
            file = EventFile(folders[-1], complain)  # (there, and locked, before it is read)
            threading.Thread(target=_follow, args=(jobs, job, file), daemon=True).start()
        yield folders


def _follow(jobs: Jobs, name: str, file: EventFile) -> None:
    """Write the events of a launched run, from its log, until it ends."""
    from hamdist.launch.events import mirror_events

    try:
        mirror_events(jobs.lines(name), file)
    except HamdistError as error:
        complain(f"{name}: {error}")
    finally:
        file.close()
