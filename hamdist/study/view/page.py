"""One page for a run that goes on and for reports: HTML with its style, its script and its data.

Its server: on this machine alone, with a token, from folders of results. It reads `events.jsonl`
and, for a button, writes a line into `control.jsonl`, which the process of the run looks for
(study/shared/result_folder.py).
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from hamdist.display.figure import PageFigure
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import SettingsError
from hamdist.runtime.results.events import (
    BlocksMeasured,
    PhaseBegun,
    RunBegun,
    RunEvent,
    RunFinished,
    RunProgressed,
    WindowFull,
    from_values,
    plain,
    read_events,
)
from hamdist.runtime.results.result import BlockProgress, Progress
from hamdist.runtime.results.run_events import EVENTS
from hamdist.study.shared.result_folder import REQUESTS, ask_of
from hamdist.study.view.explain import explain


@cache
def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return (files("hamdist.study.view") / "assets" / name).read_text("utf-8")


def page(title: str, parts: Sequence[str], script: Sequence[str] = ()) -> str:
    """Return a whole page of `parts` and `script`, all of them HTML as `title` is.

    It needs no file beside it and no network.
    """
    style = asset("uPlot.min.css") + asset("page.css")
    code = "\n".join(
        [
            *script,
            f"<script>{asset('uPlot.iife.min.js')}</script><script>{asset('page.js')}</script>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n{code}\n</body>\n</html>\n"
    )


FIGURES = '<section><h2>Figures</h2><div id="figures"></div></section>'


def sections(unit: str = "samples") -> str:
    """Return the parts that show a run: curves (against `unit`), network, actors, edges."""
    return asset("sections.html").replace("{unit}", unit)


def data_script(events: Iterable[RunEvent] = (), figures: Iterable[PageFigure] = ()) -> str:
    """Return the script element that holds the events and the figures of a report."""
    data = {
        "events": [event.as_json() for event in events],
        "figures": [plain(dataclasses.asdict(figure)) for figure in figures],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c")  # (no text can end the element)
    return f'<script type="application/json" id="data">{safe}</script>'


# -- its server ------------------------------------------------------------------------------------


HOST = "127.0.0.1"
CHUNK = 2**20
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Reply(NamedTuple):
    """An answer to a request."""

    body: str
    status: HTTPStatus = HTTPStatus.OK
    kind: str = "application/json"


class PageServer:
    """Serves the live page of folders of results; as a context it ends with the block.

    Args:
        folders: of runs, each with an `events.jsonl` (or one to come).
        port: 0 for any that is free.

    Attributes:
        address: of the page, with its token.

    Raises:
        SettingsError: the port is taken.
    """

    def __init__(self, folders: Sequence[Path], port: int = 0) -> None:
        self.folders = list(folders)
        self.token = secrets.token_urlsafe(16)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        try:
            self._http = ThreadingHTTPServer((HOST, port), Handler)
        except OSError as error:
            raise SettingsError(
                f"--port {port}: {error.strerror or error}; leave it out for a free one"
            ) from None
        self._http.daemon_threads = True
        self._hosts = {f"{name}:{self._http.server_port}" for name in (HOST, "localhost")}
        self.address = f"http://{HOST}:{self._http.server_port}/?token={self.token}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="hamdist-view", daemon=True
        )

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        url = urlsplit(request.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        reply = self._reply(request, url.path, query)
        body = reply.body.encode("utf-8")
        request.send_response(reply.status)
        kind = {"Content-Type": f"{reply.kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**kind, **HEADERS}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def _reply(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> Reply:
        # (another Host: a page of another site whose name was bent to this address)
        token = query.get("token", "") if path == "/" else request.headers.get("X-Token", "")
        has_token = secrets.compare_digest(token.encode(), self.token.encode())
        if request.headers.get("Host", "") not in self._hosts or not has_token:
            text = "not allowed: open the address that hamdist has printed, with its token"
            return Reply(text, HTTPStatus.FORBIDDEN, "text/plain")
        if path == "/":
            body = asset("live.html").replace("<!-- sections -->", sections())
            return Reply(page("hamdist view", [body]), kind="text/html")
        if path == "/folders":
            folders = [{"path": str(folder), "alive": is_alive(folder)} for folder in self.folders]
            return Reply(json.dumps(folders))
        number = query.get("folder", "")
        if not number.isdecimal() or int(number) >= len(self.folders):
            return Reply(f"no folder {number!r}", HTTPStatus.NOT_FOUND, "text/plain")
        folder = self.folders[int(number)]
        if path == "/events" and query.get("from", "").isdecimal():
            return Reply(json.dumps(events_from(folder, int(query["from"]))))
        if path == "/explain":
            return Reply(json.dumps(_explained(folder, query)))
        if path == "/control" and request.command == "POST":
            return _control(folder, query.get("action", ""))
        return Reply(f"no such page: {path}", HTTPStatus.NOT_FOUND, "text/plain")


def events_from(folder: Path, start: int) -> dict[str, Any]:
    """Return whole lines of a folder's events from byte `start` on, as values.

    Returns:
        'events'; 'next': the byte to go on from; 'more': whether there are more at once.
    """
    try:
        with (folder / EVENTS).open("rb") as file:
            file.seek(start)
            data = file.read(CHUNK)
            while data and b"\n" not in data and (rest := file.read(CHUNK)):
                data += rest  # (a line of a large network)
    except OSError:
        data = b""
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").splitlines()
    events = [event.as_json() for event in read_events(lines)]
    return {"events": events, "next": start + len(whole), "more": len(data) >= CHUNK}


def is_alive(folder: Path) -> bool:
    """Return True if a process writes the folder's events: it holds their lock."""
    try:
        with (folder / EVENTS).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _explained(folder: Path, query: dict[str, str]) -> list[str]:
    seed = int(query["seed"]) if query.get("seed", "").isdecimal() else None
    try:
        with (folder / EVENTS).open(encoding="utf-8") as file:
            runs = explain(read_events(file), query.get("level"), seed)
    except OSError:
        return []
    return [text for texts in runs.values() for text in texts]


def _control(folder: Path, action: str) -> Reply:
    if action not in REQUESTS or not is_alive(folder):
        text = "the run has ended" if action in REQUESTS else f"no such request: {action!r}"
        return Reply(text, HTTPStatus.CONFLICT, "text/plain")
    try:
        ask_of(folder, action)
    except SettingsError as error:
        return Reply(str(error), HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain")
    return Reply(json.dumps({"asked": action}))


# -- the events as they come, and as the progress of runs ------------------------------------------


PAUSE = 0.25  # seconds between two looks into the file


def follow_events(folder: Path) -> Iterator[RunEvent]:
    """Yield the events of a folder, also those to come, until no process writes it any more."""
    start, alive = 0, True
    while alive:
        alive = is_alive(folder)  # (asked before the read: what is written in between is read)
        part = events_from(folder, start)
        start = part["next"]
        yield from (event for event in map(from_values, part["events"]) if event is not None)
        if part["more"]:
            alive = True
        elif alive:
            time.sleep(PAUSE)


class FollowedRun:
    """The progress of a run, put together from its events again."""

    def __init__(self, event: RunBegun) -> None:
        self._last = Progress(0.0, 0, event.steps, [], [])
        self._readout = ""
        self._windows: list[Window] = []

    def take(self, event: RunEvent) -> Progress | None:
        """Return the progress after `event`, if that has changed it."""
        if isinstance(event, PhaseBegun):
            return replace(self._last, phase=event.phase)
        if isinstance(event, WindowFull):
            self._readout = self._readout or event.readout
            if event.readout == self._readout:
                sums = event.samples, event.loss * event.samples, event.correct, event.rows
                self._windows.append(Window(event.first, event.last, *sums))
        if isinstance(event, BlocksMeasured):
            names = event.tick
            blocks = [
                BlockProgress(n, names[n], event.updates[n], event.waiting.get(n)) for n in names
            ]
            self._last = replace(self._last, blocks=blocks)
        if isinstance(event, (RunProgressed, RunFinished)):
            self._last = replace(
                self._last, seconds=event.seconds, samples=event.samples, windows=[*self._windows]
            )
        if isinstance(event, RunProgressed):
            self._last = replace(
                self._last, steps=event.steps, resumed=event.resumed, note=event.note
            )
        moved = isinstance(event, (RunProgressed, BlocksMeasured, RunFinished))
        return self._last if moved else None
