"""A self-contained HTML page about a comparison: no file beside it, no network."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class HtmlReport:
    """The content of the page.

    Attributes:
        when: a date.
        events: of the runs; they become the curves, and `figures` are drawn below.
    """

    settings: Settings
    table: Table
    figures: Sequence[PageFigure]
    command: str
    when: str
    interrupted: bool
    events: Sequence[RunEvent] = ()


def render(report: HtmlReport) -> str:
    """Return the page."""
    title = escape(f"hamdist compare: {report.settings.name}")
    parts = [
        f"<h1>{title}</h1>",
        facts(report.command, report.when),
        _interruption(report),
        f'<h2>Results</h2><div class="scroll">{html_table(report.table)}</div>',
        f"<p>{EXPLANATION}</p>",
        html_notes(report.table.notes),
        _words(report.events),
        sections() if report.events else "",
        FIGURES if report.figures else "",
        "<h2>Settings</h2><details><summary>All of them</summary>"
        f"<pre>{escape(to_yaml(report.settings))}</pre></details>",
    ]
    return page(title, parts, [baked(report.events, report.figures)])


def _words(events: Sequence[RunEvent]) -> str:
    """Return where the time of each run went, in words, as far as the events tell."""
    texts = {name: texts for name, texts in explain(events).items() if len(texts) > 1}
    items = "".join(
        f"<li><b>{escape(name)}</b>: {escape('; '.join(said))}</li>" for name, said in texts.items()
    )
    return (
        f'<h2>Where the time went</h2><div class="advice"><ul>{items}</ul></div>' if items else ""
    )


def versions() -> dict[str, str]:
    """Return the versions of the software that computed the numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def facts(command: str, when: str) -> str:
    """Return how, when and with which software the numbers were computed."""
    known = {
        "command": command,
        "date": when,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {text}" for name, text in versions().items()),
    }
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{escape(v)}</dd>' for k, v in known.items())}</dl>"


def _interruption(report: HtmlReport) -> str:
    if not report.interrupted:
        return ""
    return '<p class="interrupted">Ended early: only the runs that finished are shown.</p>'
