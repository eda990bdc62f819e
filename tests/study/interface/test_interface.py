"""`hamdist.compare`, `verify`, `study` and what results show, in Python."""

from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.display import progress, run_view
from hamdist.display.figure import FigureCurve, PageFigure, figure_svg
from hamdist.display.table import frame
from hamdist.runtime.results.result import Progress

ALONE = {"engine": {"kind": "inprocess"}, "learning": {"lr": 0.1}, "metrics": {"window": 10}}


def rows(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        u = torch.randn(4, 6, generator=generator)
        yield u, u[:, :3].argmax(1)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return network()


def test_compare_runs_what_train_runs(model):
    """The oracle is `train`, and the merged model's accuracy by hand."""
    held_out = next(rows(1, seed=2))
    found = hamdist.compare(
        model, list(rows(40)), levels=["trace"], steps=40, classes=3, held_out=held_out, **ALONE
    )
    alone = hamdist.train(model, list(rows(40)), level="trace", steps=40, classes=3, **ALONE)
    base, trace = found.rows
    assert (base.level, trace.level, found.interrupted) == ("centralised", "trace", False)
    metrics = {name: list(values) for name, values in found.metrics.items()}
    those = [i for i, level in enumerate(metrics["level"]) if level == "trace"]
    for name in ("first", "last", "loss", "accuracy"):
        assert [metrics[name][i] for i in those] == list(alone.metrics[name]), name
    right = (alone.model(held_out[0]).argmax(1) == held_out[1]).float().mean().item()
    assert trace.held_out_accuracy == right
    page = found._repr_html_()
    assert "<table" in page
    assert "trace" in page
    assert "<svg" in page


def test_compare_writes(tmp_path):
    def compared(data, **more):
        return hamdist.compare(
            network, data, levels=["trace"], steps=10, classes=3, out=tmp_path / "o", **ALONE,
            **more,
        )  # fmt: skip

    data, heard = list(rows(10)), []
    first = compared(data, trackers=[heard.append])
    assert (first.folder / "report.html").is_file()
    assert [e.level for e in heard if e.name == "run"] == ["centralised", "trace"]
    (first.folder / "summary.json").unlink()  # as of one that was ended
    assert compared(data).folder != first.folder  # (who knows whether it is the same data)


def test_compare_by_settings_alone_goes_on(tmp_path):
    def compared():
        settings = hamdist.Settings(steps=10, stream={"source": "digits"}, **ALONE)
        return hamdist.compare(settings=settings, levels=["trace"], out=tmp_path / "o")

    first = compared()
    (first.folder / "summary.json").unlink()  # as of one that was ended
    again = compared()
    assert again.folder == first.folder
    assert [run.seconds for run in again.runs] == [run.seconds for run in first.runs]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stream": iter([])}, "can be drawn once"),
        ({"levels": ["trace"], "rules": ["dfa"]}, "levels and rules: give one"),
        ({"seeds": 2}, "the same for every seed"),
        ({"model": 3}, "model is int"),
        ({"trackers": [print]}, "give out, too"),
        ({"levels": ["tace"]}, "compare.levels"),
        ({"steps": None}, "steps"),
    ],
)
def test_compare_refuses(model, arguments, words):
    given = {"model": model, "stream": list(rows(3)), "classes": 3, "steps": 3, **arguments}
    with pytest.raises(hamdist.HamdistError, match=words):
        hamdist.compare(**given)


def test_a_comparison_that_fails_keeps_what_ended(model):
    def data():
        calls.append(1)
        if len(calls) == 4:  # (the first one is only looked at)
            raise ValueError("the disk is gone")
        return list(rows(8))

    calls = []
    with pytest.raises(hamdist.HamdistError, match="the disk is gone") as caught:
        hamdist.compare(model, data, levels=["trace", "local"], steps=8, classes=3, **ALONE)
    found = caught.value.result
    assert found.interrupted
    assert [run.level for run in found.runs] == ["centralised", "trace"]


def test_a_level_that_cannot_run_is_found_before_anything_runs(model, user_file, tmp_path):
    name = user_file(
        "import hamdist\n"
        "class Backwards(hamdist.OwnLevel):\n"
        "    def ticks(self, graph):\n"
        "        return 2 * graph.depth + 2\n"
        "    def events(self, graph):\n"
        "        for block, depth in graph.depths.items():\n"
        "            yield graph.depth - depth, block, 'F', 0\n"
    )
    levels = ["trace", f"{name}:Backwards"]
    with pytest.raises(hamdist.HamdistError, match="Backwards|round") as caught:
        hamdist.compare(model, list(rows(8)), levels=levels, classes=3, steps=8, **ALONE)
    assert caught.value.result.runs == []


def test_verify(model):
    seen = []
    found = hamdist.verify(model, input_shape=[6], classes=3, on_row=seen.append)
    assert found.passed
    assert found.rows == seen
    assert "autograd and torch.optim.SGD" in found._repr_html_()
    for wrong in ({"batch": 2}, {"model": model}, {"only": ["x"]}, {"rule": "a:b", "only": ["x"]}):
        with pytest.raises(hamdist.HamdistError):
            hamdist.verify(**wrong)


def test_study_is_a_function_though_a_package_has_its_name(tmp_path):
    import hamdist.study.run.run  # (Python makes the package the attribute)

    with pytest.raises(hamdist.HamdistError, match="nothing-of-that-name"):
        hamdist.study("nothing-of-that-name", out=tmp_path)
    with pytest.raises(hamdist.HamdistError, match="axis 'width'"):
        hamdist.study("drift", "width", out=tmp_path)


def test_frame_needs_no_pandas(monkeypatch):
    monkeypatch.setattr("hamdist.display.table.find_spec", lambda _: None)
    assert frame({"loss": [0.5]}) == {"loss": [0.5]}


def test_a_figure_is_drawn_where_its_values_are():
    """The oracle is the axes' own text: a value lies at the height of its tick."""
    curves = [
        FigureCurve("a<b", [0, 50, 100], [1.0, None, 3.0]),
        FigureCurve("base", [0, 100], [1.0, 3.0], style=None),
    ]
    root = ElementTree.fromstring(figure_svg(PageFigure("t", "x", "y", curves)).svg)
    texts = {e.text: e for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "a<b" in texts
    at = {n: (float(texts[n].get("x")), float(texts[n].get("y"))) for n in ("0", "100", "1", "3")}
    path = f"M{at['0'][0]},{at['1'][1] - 4:.1f} {at['100'][0]},{at['3'][1] - 4:.1f}"
    lines = [e.get("d") for e in root.iter("{http://www.w3.org/2000/svg}path")]
    assert lines.count(path) == 2


def test_the_time_left_is_judged_by_the_runs_that_ended(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hamdist.study.interface.compare.TimeLeft.__setattr__",
        lambda self, name, value: (object.__setattr__(self, name, value), seen.append(self))[0],
    )
    found = hamdist.compare(model, list(rows(6)), levels=["trace"], steps=6, classes=3, **ALONE)
    assert seen[0].ended == [run.startup_seconds + run.seconds for run in found.runs]
    assert seen[0].more == 0  # none after the last


# -- progress -----------------------------------------------------------------------------------


def test_no_bar_where_nobody_looks(model, capsys):
    hamdist.train(model, list(rows(5)), level="trace", classes=3, **ALONE)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_unless_it_is_off(model, monkeypatch):
    def written(**metrics):
        file = io.StringIO()
        file.isatty = lambda: True
        terminal = Console(file=file, force_terminal=True, width=100)
        monkeypatch.setattr(progress, "Console", lambda **_: terminal)
        hamdist.train(
            model, list(rows(5)), steps=5, level="trace", classes=3, **{**ALONE, "metrics": metrics}
        )  # fmt: skip
        return file.getvalue()

    assert "sample 5/5" in written()
    assert not written(progress=False)


def test_lines_where_they_are_asked_for(model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    hamdist.train(model, list(rows(5)), level="trace", classes=3, metrics={"progress": True})
    assert "run, trace: sample 5" in capsys.readouterr().err


def test_a_bar_in_a_notebook(model, monkeypatch):
    shown = []

    class Shell:
        kernel = object()

    class Cell:
        update = staticmethod(lambda view: shown.append(view._repr_html_()))

    class IPython:
        get_ipython = Shell
        display = staticmethod(lambda *_, **__: Cell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    monkeypatch.setitem(sys.modules, "IPython.display", IPython)
    hamdist.train(model, list(rows(5)), level="trace", classes=3, steps=9, **ALONE)
    assert 'value="5" max="5"' in shown[-1]  # (the stream ended early: done all the same)
    assert "sample 5/9" in shown[-1]


def test_time_left_of_all_runs():
    """10 samples a second of 100: 8 s left of this run of 10 s, then two of 20 s each."""
    left = run_view.TimeLeft(2)
    view = run_view.RunView("x", 1, left)
    view.update(Progress(2.0, 20, 100, [], []))
    assert "0:08 left, 0:28 with the 2 runs to come" in view.line
    left.ended += [20.0, 20.0]
    assert "0:48 with the 2 runs to come" in view.line


# -- the network as a picture -------------------------------------------------------------------


def test_a_graph_is_drawn(model, tmp_path):
    blocks = [
        hamdist.BlockSpec("a<b", nn.Linear(6, 8), ["u"]),
        hamdist.BlockSpec("c", nn.Linear(8, 3), ["a<b"], loss="mse", delays={"a<b": 3}),
    ]
    graph = hamdist.Graph(blocks)
    picture = graph.draw()
    root = ElementTree.fromstring(picture.svg)
    shown = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert shown == [
        "2 blocks",
        "3 ticks",
        "u",
        "input",
        "a<b",
        "56 weights",
        "c (loss)",
        "27 weights",
    ]
    dot = picture.save(tmp_path / "n.dot").read_text()
    assert '"a<b" -> "c" [label="3 ticks"];' in dot
    assert dot.count("{") == dot.count("}")
    assert picture.save(tmp_path / "n.svg").read_text() == graph._repr_svg_()


def test_draw_draws_what_runs(tmp_path, monkeypatch):
    """The picture of settings is that of the run's own events, at a level that is late."""
    from hamdist.study.run.export import network_of_folder, network_of_settings

    monkeypatch.chdir(tmp_path)
    run = ["--engine", "inprocess", "--steps", "3", "--out", "o", "-q"]
    assert CliRunner().invoke(app, ["run", "digits", *run]).exit_code == 0
    placed, title = network_of_folder(tmp_path / "o" / "events.jsonl")
    assert title == "o, trace"
    assert [block.delay for block in placed.blocks] == [6, 4, 2, 0]
    from hamdist.study.shared.recipes import load_settings

    planned, _ = network_of_settings(load_settings("digits", [{"engine": {"kind": "inprocess"}}]))
    read = [replace(block, shape=tuple(block.shape)) for block in placed.blocks]
    assert (planned.blocks, planned.staleness) == (read, placed.staleness)
    assert planned.edges == placed.edges
    for arguments, words in (
        (["draw", "o", "--out", "p.png"], "ends in .svg or .dot"),
        (["draw", "digits", "--level", "auto"], "name one"),
        (["draw", "results"], "no settings file"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, words in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert CliRunner().invoke(app, ["draw", "o", "--out", "p.svg"]).exit_code == 0
    colours = [
        e.get("fill") for e in ElementTree.parse("p.svg").iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(set(colours[2:6])) == 4  # four blocks, four latenesses
