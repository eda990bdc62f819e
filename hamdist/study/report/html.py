"""A self-contained HTML page about a comparison: no file beside it, no network."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version

from hamdist.config import Settings, to_yaml
from hamdist.display.figure import PageFigure
from hamdist.display.table import Table, html_notes, html_table
from hamdist.runtime.results.events import RunEvent
from hamdist.study.view.explain import explain
from hamdist.study.view.page import FIGURES, baked, page, sections

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
    return page(title, parts, [baked(events, figures)])


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
