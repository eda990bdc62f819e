"""The command with a stand-in for the engines: output, files, every error path, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fashion_files import write_fashion
from torch import nn
from typer.testing import CliRunner, Result

import hamdist
from hamdist.cli import app
from hamdist.config import Settings
from hamdist.display import run_view as live
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import BlockError, ClusterError, GraphError, StreamError
from hamdist.runtime.results.result import BlockProgress, Progress, RunResult
from hamdist.streams.sample import Stream
from hamdist.streams.sources.images import ImageFiles
from hamdist.study.run import run as runs
from hamdist.study.shared.result_folder import results_of

TINY = """
name: tiny
steps: 6
model: {width: 8, depth: 2}
stream: {batch: 4}
compare: {levels: [backprop, trace]}
"""

PACKAGE = str(Path(hamdist.__file__).parent)


def finish(settings: Settings, model: nn.Module, *, interrupted: bool = False) -> RunResult:
    return RunResult(
        model=model,
        blocks={},
        windows={"block1": [Window(0, 5, 6, 6.0, 18, 24)]},
        samples=settings.steps or 0,
        ticks=8,
        seconds=1.5,
        startup_seconds=0.25,
        bytes_per_edge={"block0->block1": 6 * 2048},
        peak_memory={"driver": 50 * 2**20, "actor 0": 300 * 2**20},
        staleness=2,
        interrupted=interrupted,
        warnings=["[mind] the stream"],
    )


class FakeTrain:
    """Notes the settings; ends with `fault`, or interrupted, in call number `at`."""

    def __init__(self) -> None:
        self.asked: list[Settings] = []
        self.fault: BaseException | None = None
        self.interrupted = False
        self.at = 0

    def __call__(
        self,
        model: nn.Module,
        _: Stream,
        settings: Settings,
        *,
        on_progress: Callable[[Progress], None],
        resume: Path | None = None,
    ) -> RunResult:
        assert resume is None
        self.asked.append(settings)
        now = len(self.asked) - 1 == self.at
        on_progress(Progress(1.0, 3, settings.steps, [], [BlockProgress("block0", 3, 1)]))
        if now and self.fault is not None:
            raise self.fault
        return finish(settings, model, interrupted=now and self.interrupted)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr(runs, "train", fake)
    return fake


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def flat(text: str) -> str:
    """Without line breaks and borders, which depend on the width."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes() -> None:
    result = command("recipes")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("digits", "fashion-mnist", "smooth-digits"))


@pytest.mark.parametrize("there", [True, False])
def test_recipes_say_which_files_they_need(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFiles, "folders", property(lambda _: (tmp_path,)))
    monkeypatch.setenv("COLUMNS", "250")
    if there:
        write_fashion(tmp_path)
    printed = command("recipes").stdout
    needed = "Fashion-MNIST (in " if there else "sudo apt-get install dataset-fashion-mnist"
    lines = [line.split()[0] for line in printed.splitlines() if needed in line]
    assert lines == ["fashion-mnist", "resnet", "vit"]


def test_a_recipe_whose_files_are_missing_says_so_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFiles, "folders", property(lambda _: (tmp_path / "none",)))
    monkeypatch.setattr("hamdist.study.run.run.train", None)  # whatever would be called fails
    monkeypatch.setattr("hamdist.models.build.make_model", None)
    for what in ("run", "compare"):
        result = command(what, "resnet", "--out", str(tmp_path / what))
        assert result.exit_code == 1
        assert "sudo apt-get install dataset-fashion-mnist" in flat(result.stderr)
        assert not (tmp_path / what).exists() or not any((tmp_path / what).iterdir())


@pytest.mark.parametrize("what", ["run", "compare"])
def test_without_arguments_the_recipe_digits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):
        pass

    def load(source: str, *_: object) -> None:
        raise Loaded(source)

    monkeypatch.setattr("hamdist.study.shared.recipes.load_settings", load)
    result = command(what)
    assert isinstance(result.exception, Loaded)
    assert result.exception.args == ("digits",)


@pytest.mark.usefixtures("train")
def test_run_prints_what_was_reached(tiny: str) -> None:
    result = command("run", tiny)
    assert result.exit_code == 0, result.output
    text = flat(result.stdout)
    assert "tiny: trace on inprocess, seed 0" in text
    assert "prequential accuracy 75.0 %" in text
    assert "driver 50, actor 0 300" in text
    assert "block0->block1 2.0" in text
    assert "16 rows/s" in text
    assert "Warning: [mind] the stream" in result.stderr


def test_options_reach_the_run(train: FakeTrain, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "run"
    result = command(
        "run", tiny, "--level", "local", "--engine", "ray", "--seed", "9", "--steps", "4",
        "--set", "learning.lr=0.5", "--set", "steps=77", "--set", "stream.smooth={frames: 3}",
        "--out", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    asked = train.asked[0]
    assert (asked.level.value, asked.engine.kind.value, asked.seed) == ("local", "ray", 9)
    assert (asked.steps, asked.learning.lr) == (4, 0.5)
    assert asked.stream.smooth is not None
    assert asked.stream.smooth.frames == 3
    names = {item.name for item in out.iterdir()}
    own = {"metrics.jsonl", "summary.json", "settings.yaml", "settings-all.yaml"}
    assert names == {*own, "events.jsonl", "model.safetensors"}
    again = command("run", str(out / "settings.yaml"))
    assert again.exit_code == 0, again.output
    assert train.asked[1].model_dump() == asked.model_dump()


def test_settings_of_the_level_apply(train: FakeTrain, tiny: str) -> None:
    command("run", tiny, "--set", "levels={trace: {learning: {lr: 0.7}}}")
    command("run", tiny, "--set", "levels={trace: {learning: {lr: 0.7}}}", "--level", "local")
    assert [asked.learning.lr for asked in train.asked] == [0.7, 0.1]


def test_compare_prints_the_table_and_writes_the_report(
    train: FakeTrain, tiny: str, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    result = command("compare", tiny, "--seeds", "2", "--levels", "trace, local", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert [asked.level.value for asked in train.asked] == ["trace", "local"] * 2
    assert [asked.seed for asked in train.asked] == [0, 0, 1, 1]
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["level"] for row in rows] == ["centralised", "trace", "local"]
    assert [row["seeds"] for row in rows] == [2, 2, 2]
    assert rows[1]["bytes_per_edge"] == 2048
    assert rows[1]["peak_memory_bytes"] == 300 * 2**20
    assert rows[0]["gap_to_backprop"] == 0.0
    assert "trace: [mind] the stream" in flat(result.stdout)
    assert "actor 0 300" in flat(result.stdout)
    assert (out / "report.html").exists()


SETTINGS_ERRORS = [
    (
        ["run", "nowhere.yaml"],
        "no settings file 'nowhere.yaml'.*recipes: ahead, digits, fashion-mnist",
    ),
    (["run", "TINY", "--set", "steps"], "write it as key=value"),
    (["run", "TINY", "--set", "steps=-1"], r"steps: .*greater than or equal to 1.*-1"),
    (["run", "TINY", "--set", "stream.bach=8"], r"stream\.bach: .*; did you mean 'batch'\?"),
    (["run", "TINY", "--set", "lr=8"], r"lr: no such setting; did you mean 'learning.lr'\?"),
    (["run", "TINY", "--set", "metrics.xyz=8"], r"metrics.xyz: .*; known: window, limit, record"),
    (
        ["run", "TINY", "--set", "learning.blocks={a: {lrr: 1}}"],
        r"learning.blocks.a.lrr: .*; did you mean 'lr'\?",
    ),
    (["run", "TINY", "--set", "level=lokal"], "level: .*'local', 'group'.*'lokal'"),
    (["compare", "TINY", "--levels", "trace,lokal"], "lokal is no level; levels: local, group"),
    (["compare", "TINY", "--levels", ","], "nothing is no level"),
    (["compare", "TINY", "--set", "steps=null"], "--steps"),
    (["run", "TINY", "--model", "no_such_module_here:f"], "no module 'no_such_module_here'"),
    (["run", "TINY", "--out", "/proc/none"], "--out '/proc/none': cannot write there"),
    (["compare", "TINY", "--out", "/proc/none"], "--out '/proc/none': cannot write there"),
]


@pytest.mark.parametrize(("arguments", "message"), SETTINGS_ERRORS)
def test_wrong_settings_end_with_2_before_any_run(
    train: FakeTrain, tiny: str, arguments: list[str], message: str
) -> None:
    import re

    result = command(*[tiny if word == "TINY" else word for word in arguments])
    assert result.exit_code == 2
    assert re.search(message, flat(result.stderr)), result.stderr
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output
    assert train.asked == []


@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_partition_that_is_none_ends_with_2(train: FakeTrain, tiny: str, name: str) -> None:
    train.fault = GraphError("partition.slices.blok0: no such block")
    result = command(name, tiny)
    assert result.exit_code == 2
    assert "Error: partition.slices.blok0: no such block" in flat(result.stderr)


@pytest.mark.parametrize("content", ["steps: [1", "- 1\n- 2\n", "\x00"])
def test_a_settings_file_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    result = command("run", str(path))
    assert result.exit_code == 2
    assert str(path) in flat(result.stderr).replace(" ", "")
    folder = command("run", str(tmp_path))
    assert folder.exit_code == 2
    assert "cannot read settings" in folder.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run", "x", "--level", "lokal"], ["run", "x", "--steps", "0"], ["rum"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert command(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("name", "folder"), [("digits", "digits"), ("../../etc", "etc"), ("..", "run"), ("a b", "a-b")]
)
def test_a_comparison_is_written_below_results(name: str, folder: str) -> None:
    assert results_of(name) == Path("results") / folder


@pytest.mark.parametrize("name", ["run", "compare"])
@pytest.mark.parametrize(
    "fault",
    [StreamError("sample 3 [of] the stream is NaN"), ClusterError("gone")],
)
def test_a_failed_run_ends_with_1_and_one_message(
    train: FakeTrain, tiny: str, name: str, fault: Exception
) -> None:
    train.fault = fault
    result = command(name, tiny)
    assert result.exit_code == 1
    assert f"Error: {fault}" in flat(result.stderr)
    assert "Traceback" not in result.output


def test_a_failed_block_shows_the_traceback_of_the_users_module(
    train: FakeTrain, tiny: str
) -> None:
    train.fault = BlockError("block1", 7, "ValueError: odd", "Traceback [of]\n  the user's module")
    result = command("run", tiny)
    assert result.exit_code == 1
    assert "Traceback [of]\n  the user's module" in result.stderr
    assert result.stderr.rstrip().endswith(
        "Error: block 'block1' failed at tick 7: ValueError: odd"
    )
    assert "hamdist/cli" not in result.output


def test_interrupted_run_keeps_its_metrics(train: FakeTrain, tiny: str, tmp_path: Path) -> None:
    train.interrupted = True
    result = command("run", tiny, "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "prequential accuracy" in result.stdout
    assert "Interrupted after 6 samples" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("how", ["returned", "raised", "failed"])
def test_ended_comparison_keeps_the_runs_that_finished(
    train: FakeTrain, tiny: str, tmp_path: Path, how: str
) -> None:
    train.at = 1  # the level trace; centralised and backprop have finished
    train.interrupted = how == "returned"
    train.fault = {"raised": KeyboardInterrupt(), "failed": ClusterError("gone")}.get(how)
    result = command("compare", tiny, "--out", str(tmp_path / "out"))
    assert result.exit_code == (1 if how == "failed" else 130)
    assert "only the runs that finished are kept" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["level"] for row in summary["rows"]] == ["centralised", "backprop"]
    assert summary["interrupted"] is True


def test_interrupted_before_anything_ran(train: FakeTrain, tiny: str, tmp_path: Path) -> None:
    train.fault = KeyboardInterrupt()
    assert command("run", tiny, "--out", str(tmp_path / "out")).exit_code == 130
    lines = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["event"] for e in events if e["event"] != "phase"] == [
        "started",
        "run",
        "progress",
        "ended",
    ]
    assert events[-1]["error"] == "KeyboardInterrupt"


def test_a_model_of_ones_own(
    train: FakeTrain, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = command("run", tiny, "--model", "my_nets:make", "--out", "out")
    assert result.exit_code == 0, result.output
    from safetensors.torch import load_file

    assert load_file("out/model.safetensors")["0.weight"].shape == torch.Size([10, 64])
    assert len(train.asked) == 1


def test_settings_cannot_name_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("model: {kind: 'os:system'}\n")
    assert command("run", str(path)).exit_code == 2
    path.write_text("name: !!python/object/apply:os.system ['touch hacked']\n")
    assert command("run", str(path)).exit_code == 2


def test_plain_lines_now_and_then(
    train: FakeTrain, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hamdist.display.progress.PLAIN_SECONDS", 0.0)
    result = command("run", tiny)
    assert "tiny, trace: sample 3/6, tick 3, 12 rows/s, 0:01 left" in flat(result.stderr)
    assert len(train.asked) == 1


def test_live_view() -> None:
    from rich.console import Console

    view = live.RunView("digits [trace]", batch=8)
    console = Console(width=100, height=12, record=True, file=io.StringIO())
    console.print(view)
    windows = [Window(0, 9, 10, 5.0, 40, 80), Window(10, 19, 10, 5.0, 80, 80)]
    blocks = [BlockProgress(f"block{i}", 20 + i, i, "block[0]->x" if i else None) for i in range(9)]
    view.update(Progress(2.0, 20, 60, windows, blocks, note="edge a->b blocks"))
    console.print(view)
    text = console.export_text()
    assert "digits [trace]: starting" in text
    # 10 samples/s of 8 rows; 40 samples are left
    assert "sample 20/60 · tick 28 · 80 rows/s · accuracy 100.0 % (run 75.0 %) · 0:04 left" in text
    assert "edge a->b blocks" in text
    assert "waiting for block[0]->x" in text
    assert "computing" in text
    assert "and 4 more" in text
    view.update(Progress(2.0, 20, 60, windows, blocks, rows=100))
    assert "tick 28, 50 rows/s" in view.line  # of uneven batches, 5 in the mean


def test_help_needs_no_torch() -> None:
    """The command's own modules, in a package that imports nothing by itself."""
    code = (
        "import sys, types; sys.argv = ['hamdist', '--help']\n"
        f"package = types.ModuleType('hamdist'); package.__path__ = [{PACKAGE!r}]\n"
        "sys.modules['hamdist'] = package\n"
        "from hamdist.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'ray', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
