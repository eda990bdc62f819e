"""One page for a run that goes on and for reports: HTML with its style, its script and its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files

from hamdist.display.figure import PageFigure
from hamdist.runtime.results.events import RunEvent, plain


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


def baked(events: Iterable[RunEvent] = (), figures: Iterable[PageFigure] = ()) -> str:
    """Return the script element that holds the events and the figures of a report."""
    data = {
        "events": [event.as_json() for event in events],
        "figures": [plain(dataclasses.asdict(figure)) for figure in figures],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c")  # (no text can end the element)
    return f'<script type="application/json" id="data">{safe}</script>'


def live_page() -> str:
    """Return the page of `hamdist view`, which asks its server for events."""
    return page("hamdist view", [asset("live.html").replace("<!-- sections -->", sections())])
