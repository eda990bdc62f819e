"""The files of a run or a comparison, each written whole or not at all; its self-contained page."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hamdist.config import Settings, to_yaml
from hamdist.display.figure import PageFigure
from hamdist.display.table import Table, csv_text, html_notes, html_table
from hamdist.display.windows import joined
from hamdist.runtime.results.events import (
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    Evaluated,
    NetworkPlaced,
    RunBegun,
    RunEvent,
    RunFinished,
    WindowFull,
    plain,
    read_events,
)
from hamdist.runtime.results.run_events import EVENTS
from hamdist.runtime.results.scores import Scores
from hamdist.study.report.aggregate import AggregateRow
from hamdist.study.report.paired_test import PairedTest
from hamdist.study.run.run import Run
from hamdist.study.view.explain import explain
from hamdist.study.view.page import FIGURES, data_script, page, sections

MOST_WINDOWS = 400  # of a run, on the page
MEASUREMENTS = 60  # of a kind, the latest


def run_lines(runs: Iterable[Run]) -> str:
    """Return JSON lines: one per window ("event": "window"), one per run ("event": "run")."""
    return "".join(f"{to_json(record)}\n" for run in runs for record in _records(run))


def _records(run: Run) -> Iterator[dict[str, Any]]:
    head = {"level": run.level, "engine": run.engine, "seed": run.seed}
    for window, seconds in zip(run.windows, run.window_seconds, strict=True):
        yield {
            "event": "window",
            **head,
            **dataclasses.asdict(window),
            "mean_loss": window.mean_loss,
            "accuracy": window.accuracy,
            "seconds": seconds,
        }
    yield {"event": "run", **run_summary(run)}


def run_summary(run: Run) -> dict[str, Any]:
    """Return a run without its windows, as plain values."""
    record = run.as_json()
    for apart in ("windows", "window_seconds"):
        del record[apart]
    record["held_out"] = None if run.held_out is None else _scores(run.held_out)
    record["rows_per_second"] = run.rows_per_second
    return record


def _scores(scores: Scores) -> dict[str, Any]:
    """Return the scores; with several outputs those of each, and the main one's name."""
    record: dict[str, Any] = {"loss": scores.loss, "accuracy": scores.accuracy}
    if scores.outputs:
        record["main"] = scores.main
        record["outputs"] = {name: _scores(output) for name, output in scores.outputs.items()}
    return record


def final_events(run: Run) -> list[RunEvent]:
    """Return the events of a run's end: its scores, if there are some, and its figures."""
    head: dict[str, Any] = {"level": run.level, "seed": run.seed}
    events: list[RunEvent] = []
    if run.held_out is not None:
        events.append(Evaluated.of(run.held_out, run.samples, **head))
    events.append(RunFinished.of(run, run.failure, **head))
    return events


def report_events(runs: Sequence[Run], folder: Path) -> list[RunEvent]:
    """Return what the page of a comparison shows: of each run its windows, its scores and figures,
    and, where `folder` has the events of the run, its network and the times of its actors.
    """
    events: list[RunEvent] = []
    for run in runs:
        head: dict[str, Any] = {"level": run.level, "seed": run.seed}
        events.append(RunBegun(title=f"{run.level}, seed {run.seed}", engine=run.engine, **head))
        at = {w.last: seconds for w, seconds in zip(run.windows, run.window_seconds, strict=True)}
        windows = joined(run.windows, MOST_WINDOWS)
        events += [WindowFull.of(window, "", at[window.last], **head) for window in windows]
        events += final_events(run)
    shown = {(run.level, run.seed) for run in runs}
    kinds = (NetworkPlaced, BlocksMeasured, ActorsMeasured, EdgesMeasured)
    latest: dict[tuple[str | None, int | None, str], list[RunEvent]] = {}
    for event in recorded(folder):
        if isinstance(event, kinds) and (event.level, event.seed) in shown:
            latest.setdefault((event.level, event.seed, event.name), []).append(event)
    return events + [
        event for kind_events in latest.values() for event in kind_events[-MEASUREMENTS:]
    ]


def recorded(folder: Path) -> list[RunEvent]:
    """Return the events of a folder, of each run those of the last time that it was made; none of
    runs that were made without one.
    """
    try:
        events = list(read_events((folder / EVENTS).read_text("utf-8").splitlines()))
    except OSError:
        return []
    begun, made = dict[Any, int](), dict[Any, int]()
    for place, event in enumerate(events):
        head = event.level, event.seed
        if isinstance(event, RunBegun):
            begun[head] = place
        elif isinstance(event, NetworkPlaced):  # (a run that is stored is only told again)
            made[head] = begun.get(head, 0)
    return [e for place, e in enumerate(events) if place >= made.get((e.level, e.seed), 0)]


def comparison_summary(rows: Sequence[AggregateRow], *, interrupted: bool) -> dict[str, Any]:
    """Return the content of a comparison's summary.json: {"rows": [...], "interrupted": ...}."""
    return {"rows": [dataclasses.asdict(row) for row in rows], "interrupted": interrupted}


def rows_csv(rows: Sequence[AggregateRow]) -> str:
    """Return a line per row; processes as 'name=bytes' and notes joined by '; '."""
    records = []
    for row in rows:
        peaks = (f"{name}={size}" for name, size in row.peak_memory_by_process.items())
        texts = {"peak_memory_by_process": "; ".join(peaks), "notes": "; ".join(row.notes)}
        records.append(flat_tests({**dataclasses.asdict(row), **texts}))
    fields = dataclasses.fields(AggregateRow)
    return csv_text(records, list(flat_tests({field.name: None for field in fields})))


def flat_tests(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with a column for each part of its paired tests."""
    flat = {name: value for name, value in record.items() if not name.endswith("_test")}
    for name in [name for name in record if name not in flat]:
        parts = record[name] or {}
        for part in dataclasses.fields(PairedTest):
            flat[f"{name.removesuffix('_test')}_{part.name}"] = parts.get(part.name)
    return flat


def to_json(value: object, indent: int | None = None) -> str:
    """Return JSON, with null for numbers that are not finite (`indent`: for a file of its own)."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text if indent is None else text + "\n"


# -- pages -----------------------------------------------------------------------------------------


PACKAGES = ("hamdist", "torch", "ray", "numpy", "pyzmq")

EXPLANATION = """
Every run starts from the same weights (per seed) and sees the same samples in the same order.
<b>Held-out</b>: the merged model on data that it was not trained on. <b>Prequential</b>: every
sample is predicted before it is learned from; over the whole run. <b>Gap</b>: level minus
centralised, paired by seed, ± the standard deviation over seeds. <b>Wall</b>: first to last tick,
without start-up. <b>KiB per edge, sample</b>: what a child and its parent exchange about one,
both directions. <b>Staleness</b>: the most samples that lie between the activations of a message
and those that it meets. Peak memory counts everything resident in a process, Python and torch
included.
"""
INTERRUPTED = '<p class="interrupted">Ended early: only the runs that finished are shown.</p>'


def render(
    settings: Settings,
    table: Table,
    figures: Sequence[PageFigure],
    command: str,
    *,
    interrupted: bool = False,
    events: Sequence[RunEvent] = (),
    blocks: Table | None = None,
) -> str:
    """Return the page.

    Args:
        settings, table: of the comparison.
        figures: drawn below the curves.
        command: by which it was made.
        interrupted: not all runs were made.
        events: of the runs; they become the curves.
        blocks: by level and block; None without measurements.
    """
    title = escape(f"hamdist compare: {settings.name}")
    parts = [
        f"<h1>{title}</h1>",
        facts(command),
        INTERRUPTED if interrupted else "",
        f'<h2>Results</h2><div class="scroll">{html_table(table)}</div>',
        f"<p>{EXPLANATION}</p>",
        html_notes(table.notes),
        "" if blocks is None else f'<h2>Blocks</h2><div class="scroll">{html_table(blocks)}</div>',
        _words(events),
        sections() if events else "",
        FIGURES if figures else "",
        "<h2>Settings</h2><details><summary>All of them</summary>"
        f"<pre>{escape(to_yaml(settings))}</pre></details>",
    ]
    return page(title, parts, [data_script(events, figures)])


def _words(events: Sequence[RunEvent]) -> str:
    """Return where the time of each run went, in words, as far as the events tell."""
    texts = {name: texts for name, texts in explain(events).items() if len(texts) > 1}
    entries = "".join(
        f"<li><b>{escape(name)}</b>: {escape('; '.join(lines))}</li>"
        for name, lines in texts.items()
    )
    return (
        f'<h2>Where the time went</h2><div class="advice"><ul>{entries}</ul></div>'
        if entries
        else ""
    )


def versions() -> dict[str, str]:
    """Return the versions of the software that computed the numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def facts(command: str) -> str:
    """Return how, when (now) and with which software the numbers were computed."""
    by_name = {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {text}" for name, text in versions().items()),
    }
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{escape(v)}</dd>' for k, v in by_name.items())}</dl>"
