"""The files: parsed back, whole or not there, and wrong folders found early."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from study.builders import make_run
from torch import nn

from hamdist.config import Settings, read_settings
from hamdist.display.table import Table
from hamdist.display.windows import joined
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import SettingsError
from hamdist.study.report import files as results
from hamdist.study.report.aggregate import aggregate
from hamdist.study.report.files import render
from hamdist.study.report.save import gap_figures, save_comparison, save_run
from hamdist.study.shared import result_folder as folder

RUNS = [
    make_run("centralised", 0, accuracy=0.9),
    make_run("trace", 0, accuracy=0.8, warnings=("mind <b>&</b>",)),
    make_run("local", 0, accuracy=0.1, loss=math.nan),
]
ASKED = {
    "level", "engine", "seeds", "held_out_accuracy", "held_out_spread", "prequential_accuracy",
    "gap_to_backprop", "wall_seconds", "rows_per_second", "peak_memory_bytes", "bytes_per_edge",
    "staleness",
}  # fmt: skip


def test_summary_is_strict_json_with_the_promised_keys() -> None:
    text = results.to_json(results.comparison_summary(aggregate(RUNS), interrupted=False))
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["level"] for row in summary["rows"]] == ["centralised", "trace", "local"]
    assert all(row.keys() >= ASKED for row in summary["rows"])
    assert summary["rows"][1]["gap_to_backprop"] == pytest.approx(-0.1)
    assert summary["rows"][2]["held_out_loss"] is None
    assert summary["interrupted"] is False


def test_run_lines() -> None:
    lines = [json.loads(line) for line in results.run_lines(RUNS).splitlines()]
    assert [line["event"] for line in lines] == ["window", "window", "run"] * 3
    assert lines[1] == {
        "event": "window",
        "level": "centralised",
        "engine": "inprocess",
        "seed": 0,
        "first": 10,
        "last": 19,
        "samples": 10,
        "loss": 2.0,
        "correct": 36,
        "rows": 40,
        "mean_loss": 0.2,
        "accuracy": 0.9,
        "seconds": 2.0,
    }
    assert lines[5]["held_out"] == {"loss": 1.0, "accuracy": 0.8}
    assert lines[5]["rows_per_second"] == 40.0
    assert "windows" not in lines[5]


def test_csv_has_one_line_per_row() -> None:
    rows = aggregate(RUNS)
    read = list(csv.DictReader(io.StringIO(results.rows_csv(rows))))
    assert [line["level"] for line in read] == ["centralised", "trace", "local"]
    assert float(read[1]["held_out_accuracy"]) == 0.8
    assert read[1]["held_out_spread"] == ""
    assert read[1]["peak_memory_by_process"] == "driver=100"
    assert read[1]["notes"] == "mind <b>&</b>"
    tests = {"low", "high", "p", "seeds_to_tell"}
    expected = {field.name for field in dataclasses.fields(rows[0])} - {"gap_test", "loss_gap_test"}
    assert set(read[0]) == expected | {f"{gap}_{t}" for gap in ("gap", "loss_gap") for t in tests}


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    folder.write_file(path, "old")
    folder.write_file(path, "new")
    assert path.read_text() == "new"

    def full(_: Path, __: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SettingsError, match=r"summary\.json.*No space left"):
        folder.write_file(path, "broken")
    assert path.read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_folder_is_made_and_tried(tmp_path: Path) -> None:
    folder.prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(SettingsError, match=r"--out .*cannot write there"):
            folder.prepare_folder(wrong)


def test_comparison_folder(tmp_path: Path) -> None:
    settings = Settings(name="try <this>", steps=20)
    save_comparison(tmp_path, RUNS, settings, command="hamdist compare x", interrupted=True)
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "report.html",
        "results.csv",
        "results.tex",
        "runs.jsonl",
        "settings-all.yaml",
        "settings.yaml",
        "summary.json",
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] is True
    assert read_settings((tmp_path / "settings.yaml").read_text(), "x").name == "try <this>"
    page = (tmp_path / "report.html").read_text()
    assert "Ended early" in page
    assert "try &lt;this&gt;" in page
    assert "mind &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "hamdist compare x" in page
    assert not re.search(r"""<(script|img|link)\b[^>]*(src|href)=["'](?!data:)""", page)
    data = page.split('id="data">')[1].split("</script>")[0]
    events = json.loads(data)["events"]
    assert len(json.loads(data)["figures"]) == 1
    assert next(e["event"] for e in events if e["level"] == "trace") == "run"
    windows = [e for e in events if e["event"] == "window" and e["level"] == "trace"]
    assert [w["last"] for w in windows] == [w.last for w in RUNS[1].windows]


def test_interrupted_before_any_run_finished(tmp_path: Path) -> None:
    runs = [make_run("centralised", held_out=None, interrupted=True)]
    save_comparison(tmp_path, runs, Settings(steps=20), command="x", interrupted=True)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == []
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


def test_run_folder(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied: safetensors refuses shared memory as it is
    save_run(tmp_path, RUNS[1], model, Settings(steps=20))
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "model.safetensors",
        "settings-all.yaml",
        "settings.yaml",
        "summary.json",
    ]
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert json.loads((tmp_path / "summary.json").read_text())["level"] == "trace"


@pytest.mark.parametrize("real_valued", [False, True])
def test_gaps_are_paired_by_seed(real_valued: bool) -> None:
    """Oracle: by hand. Seed 0 lacks 0.1 (loss 0.1 more), seed 1 lacks 0.3 (0.3 more)."""
    runs = [
        make_run(level, seed, accuracy=None if real_valued else accuracy, loss=1.0 - accuracy)
        for level, accuracies in (("centralised", (0.9, 0.8)), ("trace", (0.8, 0.5)))
        for seed, accuracy in enumerate(accuracies)
    ]
    [figure] = gap_figures(aggregate(runs))
    [curve] = figure.curves
    assert (curve.label, list(figure.ticks)) == ("trace", ["trace"])
    mean, spread = (0.2, 0.02**0.5) if real_valued else (-20.0, 100 * 0.02**0.5)
    assert list(curve.y) == [pytest.approx(mean)]
    assert list(curve.spread) == [pytest.approx(spread)]
    assert gap_figures(aggregate(runs[:2])) == []
    gone = make_run("trace", 1, held_out=None, failure="left the finite range")
    assert gap_figures(aggregate([*runs[:3], gone])) == []  # as the table has it


def test_joined_windows_cover_the_same_items() -> None:
    windows = [Window(i, i, 1, 1.0, 1, 2) for i in range(7)]
    few = joined(windows, 3)
    assert [(w.first, w.last, w.samples) for w in few] == [(0, 2, 3), (3, 5, 3), (6, 6, 1)]
    assert joined(windows, 100) == windows


def test_report_without_plots_or_notes() -> None:
    page = render(Settings(), Table(["level"], [["a & b"]], []), [], "x")
    assert "<td>a &amp; b</td>" in page
    assert "Notes and warnings" not in page
    assert "Ended early" not in page
