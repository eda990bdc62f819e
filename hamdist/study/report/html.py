"""A self-contained HTML page about a comparison: no script, no file beside it, no network."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version

from hamdist.config import Settings, to_yaml
from hamdist.study.report.table import Table

PACKAGES = ("hamdist", "torch", "ray", "numpy", "pyzmq")

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: top; white-space: pre-line; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td { white-space: pre; }
thead th { border-bottom: 2px solid #1c1c1c; }
tbody tr + tr td { border-top: 1px solid #ddd; }
.notes, .interrupted { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem 1rem; }
.notes ul { margin: .2rem 0; padding-left: 1.1rem; }
figure { margin: 1rem 0; }
img { width: 46rem; max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""

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
    """The content of the page: `plots` are PNG by file name, in order, `when` is a date."""

    settings: Settings
    table: Table
    plots: Mapping[str, bytes]
    command: str
    when: str
    interrupted: bool


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
        "<h2>Plots</h2>",
        *[html_figure(name, png) for name, png in report.plots.items()],
        f"<h2>Settings</h2><pre>{escape(to_yaml(report.settings))}</pre>",
    ]
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of `parts`, all of them HTML as `title` is."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
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


def html_table(table: Table) -> str:
    """Return the table, without its notes."""
    head = "".join(f"<th>{escape(title)}</th>" for title in table.titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_notes(notes: Sequence[str]) -> str:
    """Return a box of notes; empty if there are none."""
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><b>Notes and warnings</b><ul>{items}</ul></div>'


def html_figure(name: str, png: bytes) -> str:
    """Return a picture inside the page; `name` is that of its file, which describes it."""
    data = base64.b64encode(png).decode("ascii")
    words = name.removesuffix(".png").replace("-", " against ")
    return f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}"></figure>'
