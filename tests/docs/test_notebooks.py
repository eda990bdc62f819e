"""The tutorial on results, as it was executed: its cells show a bar, a table and pictures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

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
    notebooks = importlib.import_module("notebooks")
    [text] = notebooks.page(DOCS / "tutorials" / "results.ipynb").values()
    assert all(f'data-output="{name}"' in text for name in notebooks.RICH)
    rich = "".join(notebooks.RICH.values())
    assert rich.count("<svg") == 3
    assert "<progress" in rich
    sys.modules.pop("notebooks")


def executed(name, monkeypatch, **constants):
    """Execute the code cells of a notebook with other constants; return what they have named."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    book = json.loads((DOCS / "tutorials" / f"{name}.ipynb").read_text())
    codes = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, code in enumerate(codes):
        for constant in [one for one in constants if re.search(rf"(?m)^{one} = ", code)]:
            value = constants.pop(constant)
            code = re.sub(rf"(?m)^{constant} = .*", f"{constant} = {value!r}", code)
        exec(compile(code, f"{name}.ipynb, code cell {number}", "exec"), names)
    assert not constants
    return names


@pytest.mark.slow
def test_a_sensor_raises_alarms_where_it_breaks_down(monkeypatch):
    pytest.importorskip("river")
    names = executed("sensor", monkeypatch)
    assert names["seen"] == len(names["broken"])  # (a value in time, of two months)
    assert len(names["alarms"]) - names["seen"] < 25
    assert names["mean_error"](names["expected"]) < 0.36  # 0.38: as an hour ago


@pytest.mark.slow
def test_a_pole_is_balanced_in_a_closed_loop(monkeypatch):
    pytest.importorskip("gymnasium")
    names = executed("closed-loop", monkeypatch, SEEDS=1, LEVELS=("trace",), EPISODES=5)
    (lengths, _), *_ = names["runs"]["trace"]
    assert lengths[0] < 60
    assert lengths[-1] >= 475
    assert names["scores"]["trace"] == [500]  # alone, with new seeds


@pytest.mark.slow
def test_labels_of_a_video_come_a_second_late(monkeypatch):
    names = executed("video", monkeypatch, FRAMES=600)
    for shares, result in names["runs"].values():
        assert result.samples == 600
        assert sum(shares[300:]) / 300 > 0.25  # 0.1: by chance


def test_a_text_is_read_on(monkeypatch):
    names = executed("text", monkeypatch, SAMPLES=400)
    assert 200 <= names["fed"] < 210
    assert names["run"].result.samples == 400
    windows = names["windows"]
    assert windows[-1].mean_loss < 3.2 < windows[0].mean_loss
