"""What a command leaves on disk, whoever reads along: the real command, and every level once.

Oracles: the files that a run with an open terminal leaves; the weights of the run itself; closed
forms of speeds and gaps.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runtime.engines.test_engines_equal import settings
from runtime.networks import PortableStream, chain
from runtime.storage.test_stores import disk_free, small_disk
from safetensors.torch import load_file
from study.builders import make_run
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.cli.process import SteadyFile, replaced
from hamdist.config import Level, Settings, read_settings
from hamdist.display.run_view import RunView
from hamdist.dynamics.objective.prequential import Window
from hamdist.launch import driver
from hamdist.launch.events import Ended, Results, ResultValues, follow
from hamdist.launch.package import JobSpec, packed
from hamdist.runtime.results.result import BlockProgress, Progress
from hamdist.runtime.results.scores import Scores
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train
from hamdist.study.report.files import EXPLANATION, run_summary
from hamdist.study.run.measures import Tracking
from hamdist.study.run.run import Run

TINY = """
name: tiny
steps: 12
level: trace
model: {kind: residual-mlp, width: 8, depth: 2}
stream: {batch: 4}
engine: {kind: inprocess}
"""
OF_A_RUN = {
    *("metrics.jsonl", "model.safetensors", "settings-all.yaml", "settings.yaml", "summary.json")
}
OF_A_COMPARISON = {
    *("report.html", "results.csv", "results.tex"),
    *("runs.jsonl", "settings-all.yaml", "settings.yaml", "summary.json"),
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def names(folder):
    return {item.name for item in folder.iterdir()}


# -- whoever reads along ---------------------------------------------------------------------------

STREAMS = {  # by what is wrong: the command, its environment, standard output and error
    "closed before": ("run", {}, "closed", "closed"),
    "full, no UTF-8, a notebook's backend, no home": (
        "compare",
        {
            "PYTHONIOENCODING": "latin-1",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            **dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"), "/proc/none"),
        },
        "file",
        "full",
    ),
}


def opened(kind, path, stack):
    return stack.enter_context(open("/dev/full" if kind == "full" else path, "wb"))


@pytest.mark.timeout(300)
def test_no_stream_of_the_terminal_takes_results_away(tiny, tmp_path):
    """All of them at once: they wait for the imports mostly."""
    with ExitStack() as stack:
        started = {}
        for n, (name, (command, environment, out, err)) in enumerate(STREAMS.items()):
            own = [sys.executable, "-m", "hamdist", command, tiny, "--out", f"out{n}"]
            own += ["--levels", "trace"] if command == "compare" else []
            if out == "closed":
                own = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *own]
            started[name] = subprocess.Popen(
                own,
                stdout=opened(out, tmp_path / f"{n}.out", stack),
                stderr=opened(err, tmp_path / f"{n}.err", stack),
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        codes = {name: process.wait(280) for name, process in started.items()}
    assert codes == dict.fromkeys(STREAMS, 0)
    for n, (command, *_) in enumerate(STREAMS.values()):
        wanted = OF_A_COMPARISON if command == "compare" else OF_A_RUN
        assert wanted <= names(tmp_path / f"out{n}")
    assert "\n* one seed" in (tmp_path / "1.out").read_text("latin-1")


def test_a_stream_that_is_full_or_closed_by_its_reader_takes_all():
    read, broken = os.pipe()
    os.close(read)
    for number in (broken, os.open("/dev/full", os.O_WRONLY)):
        with SteadyFile(number, "w") as stream:
            assert stream.write(b"seven by") == 8


def test_what_a_terminal_cannot_show_becomes_ascii():
    codecs.register_error("hamdist", replaced)
    assert "• c τ ≤ 1 → ±2 ẞ".encode("ascii", "hamdist") == b"* c tau <= 1 -> +-2 ?"
    assert "• ±".encode("latin-1", "hamdist") == b"* \xb1"


ENDING = """
import contextlib, os, signal
from torch import nn

def SIGTERM():
    os.kill(os.getpid(), signal.SIGTERM)

def SIGHUP():
    os.kill(os.getpid(), signal.SIGHUP)

def lost():
    with contextlib.suppress(BaseException):  # as some imports do
        SIGTERM()
    return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
"""


def test_a_command_that_is_ended_before_its_run_leaves_nothing(tiny, tmp_path):
    """By SIGTERM, or by a terminal that closes."""
    (tmp_path / "ending.py").write_text(ENDING)
    started = {}
    for name in ("SIGTERM", "SIGHUP", "lost"):
        words = ["run", tiny, "--model", f"ending.py:{name}", "--out", name]
        own = [sys.executable, "-m", "hamdist", *words]
        started[name] = subprocess.Popen(own, stderr=subprocess.PIPE, text=True)
    for name, process in started.items():
        said = process.communicate(timeout=100)[1]
        assert (process.returncode, said.splitlines()[-1]) == (130, "Interrupted."), said
        assert not (tmp_path / name).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_schema_that_cannot_be_printed_is_an_error():
    """A file that is cut off is no schema; a reader that has had enough (`| head`) is no fault."""
    own = [sys.executable, "-m", "hamdist", "schema"]
    for words in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run([*own, *words], stdout=full, stderr=-1, text=True, timeout=100)
        wanted = "Error: standard output cannot be written: No space left on device\n"
        assert (ended.returncode, ended.stderr) == (1, wanted)
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run(own, stdout=writing, timeout=100).returncode == 0
    os.close(writing)


DEAF = """
import os, signal, sys
from hamdist.cli.process import main

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

last, sys.argv = Last(), ["hamdist", "recipes"]
main()
"""


def test_a_signal_while_python_ends_changes_no_exit_code(tmp_path):
    """All was written by then."""
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_ctrl_c_in_the_held_out_evaluation_keeps_what_was_learned(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hamdist.study.run.run._score", interrupted)
    result = CliRunner().invoke(app, ["run", tiny, "--out", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} > OF_A_RUN
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["interrupted"]


# -- every level -----------------------------------------------------------------------------------

OF_LEVEL = {
    Level.REVERSIBLE: "model: {kind: reversible-mlp, width: 8, depth: 4}\n",
    Level.BPTT: "model: {kind: rnn, width: 8, depth: 1}\n"
    "stream: {source: sequences, batch: 4, sequences: {view: tokens, count: 8, length: 5}}\n",
}


def settings_of(level, tmp_path):
    text = TINY
    for line in OF_LEVEL.get(level, "").splitlines():
        section = line.partition(":")[0]
        kept = [own for own in text.splitlines() if not own.startswith(f"{section}:")]
        text = "\n".join([*kept, line, ""])
    path = tmp_path / "level.yaml"
    path.write_text(text.replace("level: trace", f"level: {level.value}"))
    return str(path)


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def checked_run(folder, level):
    """The files of a run of `level`; with the level that it chose, its settings make it again."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["level"] == level.value
    weights = load_file(folder / "model.safetensors")
    ran = read_settings((folder / "settings.yaml").read_text(), "settings.yaml")
    assert (ran.level is level) == (level is not Level.AUTO)
    if level is Level.AUTO:
        assert summary["chosen"]["level"] == ran.level.value
        assert summary["why"][0].startswith(f"level {ran.level.value!r}")
    return weights


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.filterwarnings("ignore")
def test_every_level_is_written_by_every_command(level, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = settings_of(level, tmp_path)
    done = command("run", path, "--out", "run")
    assert done.exit_code == 0, done.output
    weights = checked_run(tmp_path / "run", level)
    if level is Level.AUTO:
        again = command("run", "run/settings.yaml", "--out", "again")
        assert again.exit_code == 0, again.output
        repeated = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(weights[key], value) for key, value in repeated.items())

    launched = launch(path, capfd)
    assert all(torch.equal(weights[k], v) for k, v in checked_run(launched, level).items())

    done = command("compare", path, "--levels", level.value, "--out", "compare")
    assert done.exit_code == 0, done.output
    assert names(tmp_path / "compare") >= OF_A_COMPARISON
    lines = (tmp_path / "compare/runs.jsonl").read_text().splitlines()
    runs = [one for one in map(json.loads, lines) if one["event"] == "run"]
    assert [one["level"] for one in runs] == ["centralised", level.value]
    assert (runs[1]["chosen"] is not None) == (level is Level.AUTO)


def launch(path, capfd):
    """The driver of a launched run in this process, and the terminal that follows its log."""
    order = JobSpec(id="tiny-1", model=None, storage=None, most=2**20)
    own = read_settings(Path(path).read_text(), path)
    capfd.readouterr()
    with packed(own.for_level(own.level), order) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.signal, "signal", lambda *_: None)  # type: ignore[attr-defined]
        ended = driver._run(folder, None)
    driver.tell(ended)  # type: ignore[attr-defined]
    results = Results(Path(path).parent / "launched")
    events = list(follow(capfd.readouterr().out.splitlines(), results, lambda _: None))
    assert isinstance(events[-1], Ended)
    assert events[-1].code == 0
    [reached] = [event for event in events if isinstance(event, ResultValues)]
    assert reached.facts["samples"].startswith("12 of 4 rows")
    return results.out


# -- facts -----------------------------------------------------------------------------------------


def test_facts_come_back_from_json():
    run = make_run(
        "auto",
        loss=math.nan,
        chosen=Settings(steps=3),
        why=["so"],
        tracking=Tracking(1.0, 0.5, 0.2, math.inf, None, 0),
        held_out_plain=Scores(1.0, 0.5, {"a": Scores(2.0, None)}, "a"),
        prequential={"a": Window(0, 1, 2, 3.0, 0, 0)},
    )
    text = json.dumps(run.as_json())
    again = Run.from_json(json.loads(text))
    assert json.dumps(again.as_json()) == text
    assert (again.chosen, again.windows) == (run.chosen, list(run.windows))
    assert math.isnan(again.held_out.loss)
    assert again.tracking == run.tracking
    assert again.held_out_plain == run.held_out_plain
    assert "plain" not in run_summary(run)
    with pytest.raises(ValueError, match="samples"):
        Run.from_json({**run.as_json(), "samples": "many"})


def test_the_legend_has_the_sign_of_the_table():
    assert "<b>Gap</b>: level minus centralised" in " ".join(EXPLANATION.split())


# -- speed and progress ----------------------------------------------------------------------------


def test_a_resumed_run_counts_its_own_items(tmp_path):
    """Speed and times are of the samples behind those that the snapshot had seen; bytes of all."""
    kept = {"path": str(tmp_path), "every": 20, "keep": 9}
    seen = []
    whole = train(chain(), PortableStream(40), settings({"kind": "inprocess"}, 40, level="trace"))
    train(chain(), PortableStream(40), settings({"kind": "inprocess"}, 40, snapshots=kept))
    first = sorted(tmp_path.iterdir())[0]
    on = train(
        chain(),
        PortableStream(40),
        settings({"kind": "inprocess"}, 40, snapshots=kept),
        resume=first,
        on_progress=seen.append,
    )
    before = latest(first, pytest.fail).manifest.samples
    assert 20 <= before < 40
    assert (on.samples, on.resumed, on.new_samples) == (40, before, 40 - before)
    assert {p.resumed for p in seen if p.phase is None} == {before}
    into = next(edge for edge in whole.bytes_per_edge if edge.startswith("u->"))
    assert on.bytes_per_edge[into] == whole.bytes_per_edge[into]


def test_speed_after_a_resume_and_with_it_the_rest_of_the_time():
    view = RunView("run", batch=8)
    view.update(Progress(2.0, 1020, 1060, [], [BlockProgress("a", 1, 1)], resumed=1000))
    assert "sample 1020/1060, tick 1, 80 rows/s, 0:04 left" in view.line
    run = make_run("trace", samples=1020, resumed=1000)
    assert run.rows_per_second == 20 * 4 / 2.0


def test_progress_does_not_fall_while_an_actor_is_replaced(monkeypatch):
    """The source's actor is new and knows of no samples; the readout's has no windows yet."""
    pytest.importorskip("ray")
    from hamdist.runtime.ray_engine import engine
    from hamdist.runtime.ray_engine.worker_group import Entered

    monkeypatch.setattr(engine, "network_of", lambda *_: None)
    window = Window(0, 9, 10, 1.0, 1, 10)
    actor = SimpleNamespace(name="actor 0", address="", blocks=["a"], status=None)
    reached, windows = iter([120, 0, 130]), {"a": [window]}
    worker_group = SimpleNamespace(
        actors=[actor],
        entered=lambda: Entered(n := next(reached), 4 * n),
        windows=lambda: windows,
        samples_of_processes=dict,
    )
    limits = SimpleNamespace(stall_warning=1.0, stall_limit=2.0)
    graph = SimpleNamespace(readouts=["a"])
    plan = SimpleNamespace(engine=limits, snapshot_policy=None, steps=200, resumed=0, graph=graph)
    seen = []
    watch = engine._Watch(plan, worker_group, seen.append)
    watch._report_progress()
    windows = {}
    watch._report_progress()
    watch._report_progress()
    told = [(progress.samples, progress.rows) for progress in seen]
    assert told == [(120, 480), (120, 480), (130, 520)]
    assert [list(progress.windows) for progress in seen] == [[window]] * 3


@pytest.mark.parametrize("size", ["4k", "8k", "16k"])
@pytest.mark.parametrize("command", ["run", "compare", "init"])
def test_a_full_disk_is_no_wrong_setting(command, size, tmp_path):
    """A run that was made fails (exit code 1), and no output says that it was written."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("steps: 12", "steps: 2"))
    with small_disk(tmp_path / "disk", size) as disk:
        words = [command, tmp_path / "tiny.yaml", "--out", disk / "out"]
        if command == "init":
            (disk / "other").write_bytes(bytes(disk_free(disk)))
            words = ["init", disk / "out"]
        done = CliRunner().invoke(app, [str(word) for word in words])
        left = [path.name for path in disk.rglob("*.part")]
    said = " ".join(done.output.split())
    assert done.exit_code == (2 if command == "init" else 1), said
    assert "No space left on device" in said
    assert "Written to" not in said
    assert "Report:" not in said
    assert left == []


def test_a_disk_to_read_alone(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=20)
        for words in (["init", disk / "s.yaml"], ["draw", "digits", "--out", disk / "s.svg"]):
            done = CliRunner().invoke(app, [str(word) for word in words])
            assert done.exit_code == 2, done.output
            assert "Read-only file system" in " ".join(done.output.split())


FAILING = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

def good(seed):
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(7):
        yield torch.randn(4, 6, generator=drawn), torch.randint(0, 4, (4,), generator=drawn)

def failing(seed):
    yield from good(seed)
    raise OSError("the disk went away")

def bad(seed):
    yield from good(seed)
    yield torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64)
"""


@pytest.mark.filterwarnings("ignore:the stream ended after")
@pytest.mark.parametrize("engine", ["inprocess", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_stream_that_fails_leaves_what_was_learned(engine, tiny, user_file, request):
    """Oracle: the run of a stream that ends there."""
    if engine == "ray":
        request.getfixturevalue("session")
    file, left = user_file(FAILING), {}
    for stream, code, text in (
        ("good", 0, "samples"),
        ("failing", 1, "Error: sample 7: the stream raised OSError: the disk went away"),
        ("bad", 1, "Error: sample 7: "),
    ):
        words = ["run", tiny, "--model", f"{file}:net", "--stream", f"{file}:{stream}"]
        out = Path(f"out-{stream}")
        done = CliRunner().invoke(app, [*words, "--engine", engine, "--out", str(out)])
        said = " ".join(done.output.split())
        assert done.exit_code == code, said
        assert text in said
        left[stream] = load_file(out / "model.safetensors")
        assert json.loads((out / "summary.json").read_text())["samples"] == 7
    for stream in ("failing", "bad"):
        assert all(torch.equal(left["good"][key], t) for key, t in left[stream].items())
    words = ["compare", tiny, "--model", f"{file}:net", "--stream", f"{file}:failing"]
    done = CliRunner().invoke(app, words)
    assert "Error: sample 7: the stream raised OSError" in " ".join(done.output.split())


RULE = """
import hamdist

class Fails(hamdist.Rule):
    def backward(self, block, kept, message):
        if block.sample == 5:
            raise ValueError("an odd sample")
        return block.vjp(kept, message)
"""


def test_a_rule_that_fails_leaves_what_was_learned(tiny, user_file):
    """Oracle: the samples that entered before block 0 heard of sample 5, two blocks away."""
    rule = f"{user_file(RULE)}:Fails"
    words = ["run", tiny, "--set", f'learning.rules={{"block0": "{rule}"}}', "--out", "out"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "raise ValueError" in done.output, "the user's traceback"
    assert "ValueError: an odd sample" in done.output.splitlines()[-1]
    summary = json.loads(Path("out/summary.json").read_text())
    blocks = len(summary["placement"][0])
    assert summary["samples"] == 5 + 2 * (blocks - 1) + 1
    assert "an odd sample" in summary["failure"]
    assert load_file("out/model.safetensors")
    ended = json.loads(Path("out/events.jsonl").read_text().splitlines()[-1])
    assert "an odd sample" in ended["error"]
    done = CliRunner().invoke(app, ["compare", tiny, "--rules", rule, "--out", "both"])
    assert done.exit_code == 1
    assert "an odd sample" in done.output.splitlines()[-1]
    runs = Path("both/runs.jsonl").read_text().splitlines()
    assert {json.loads(run)["level"] for run in runs} == {"centralised"}, "half a run is no result"
