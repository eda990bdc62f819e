"""The tutorial on results, as it was executed: its cells show a bar, a table and pictures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_cells_show_bar_table_and_plot():
    book = json.loads((DOCS / "tutorials" / "results.ipynb").read_text())
    shown = {}
    for number, cell in enumerate(book["cells"]):
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        shown[number] = ["".join(d.get("text/html", d.get("image/svg+xml", ""))) for d in data]
    bar, result = shown[1]
    assert '<progress value="400" max="400">' in bar
    assert "<table" in result
    assert "<svg" in result
    bar, comparison = shown[5]
    assert "[6/6] seed 1, local" in bar
    assert all(f"<td>{level}</td>" in comparison for level in ("centralised", "trace", "local"))
    assert "<svg" in comparison
    assert "3 ticks" in shown[9][0]
    assert "FAIL" not in shown[11][0]


def test_the_page_of_a_notebook_shows_its_pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    [text] = (
        importlib.import_module("notebooks").page(DOCS / "tutorials" / "results.ipynb").values()
    )
    assert text.count("<svg") == 3
    assert "<progress" in text
    sys.modules.pop("notebooks")
