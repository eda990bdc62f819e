"""`hamdist verify`: rows, topics, JSON, exit codes, Ctrl-C, with checks made up for the purpose."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading

import numpy as np
import pytest
from study.verify.oracles import CHAIN, make_case, replay
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.errors import GraphError, SettingsError
from hamdist.runtime.process.interrupts import RunInterrupts
from hamdist.study.verify import runner
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.runner import TOPICS, Topic, run, to_json, topics


def raising(error):
    def measure():
        raise error

    return measure


def topic(*checks, name="made-up", answers=False):
    def all_checks(full):
        yield from checks

    return Topic(name, "made up", all_checks, answers)


def rows_of(*checks, **options):
    return list(run([topic(*checks, **options)], False, lambda *_: None))


def command(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--input-shape", "3"), "--input-shape belongs to --model"),
        (("--batch", "4"), "--batch belongs to --model"),
        (("--model", "torch.nn:Identity", "--only", "order"), "--only chooses among"),
        (("--model", "torch.nn:Identity", "--golden", "here"), "--golden chooses among"),
    ],
)
def test_no_option_is_passed_over(words, option):
    result = command(*words)
    assert result.exit_code == 2
    assert option in flat(result.stderr)


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("measure", "bound", "passed"),
    [
        (lambda: 1e-13, 1e-12, True),
        (lambda: 1e-12, 1e-12, True),
        (lambda: 2e-12, 1e-12, False),
        (lambda: 0.0, 0.0, True),
        (lambda: 5e-324, 0.0, False),
        (lambda: math.nan, 1.0, False),
        (lambda: math.inf, 1.0, False),
        (lambda: Difference(0.5, "there"), 1.0, True),
        (lambda: Difference(1.5, "there"), 1.0, False),
    ],
)
def test_a_row_passes_within_its_bound(measure, bound, passed):
    (row,) = rows_of(Check("what", "oracle", bound, measure))
    assert row.passed is passed
    assert (row.topic, row.name, row.oracle, row.bound) == ("made-up", "what", "oracle", bound)


def test_where_a_difference_is_is_told_of_failures_and_of_answers():
    good, bad = (Check("what", "", 1.0, lambda d=d: Difference(d, "there")) for d in (0.5, 1.5))
    assert [row.note for row in rows_of(good, bad)] == ["", "there"]
    assert [row.note for row in rows_of(good, bad, answers=True)] == ["there", "there"]


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (GraphError("no path\nand more"), "no path"),
        (ZeroDivisionError("division"), "ZeroDivisionError: division"),
        (RuntimeError("mat1 and mat2"), "RuntimeError: mat1 and mat2"),
        (ValueError(), "ValueError"),
        (KeyError("phi"), "KeyError: 'phi'"),
    ],
)
def test_an_error_fails_its_row_alone(error, note):
    rows = rows_of(
        Check("broken", "oracle", 1.0, raising(error)), Check("next", "oracle", 1.0, lambda: 0.0)
    )
    assert [row.passed for row in rows] == [False, True]
    assert rows[0].note == note
    assert math.isnan(rows[0].difference)


def test_a_topic_that_cannot_make_its_checks_fails_one_row():
    def checks(full):
        yield Check("first", "", 0.0, lambda: 0.0)
        raise OSError("no room")

    rows = list(run([Topic("made-up", "made up", checks)], False, lambda *_: None))
    assert [row.passed for row in rows] == [True, False]
    assert rows[1].name == "made up: the checks can be made"
    assert rows[1].note == "OSError: no room"


def test_what_a_topic_opened_is_closed_when_the_run_ends_early():
    closed = []

    def checks(full):
        try:
            yield Check("first", "", 0.0, lambda: 0.0)
            yield Check("stopped", "", 0.0, raising(KeyboardInterrupt()))
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        list(run([Topic("made-up", "made up", checks)], False, lambda *_: None))
    assert closed == [True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_also_when_a_run_inside_a_check_takes_it_for_itself(number):
    def measure():
        with RunInterrupts(lambda: None, None) as ending:
            os.kill(os.getpid(), number)
            assert ending.interrupted
        return 0.0

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        rows_of(Check("interrupted", "", 0.0, measure))
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_in_another_thread():
    found = []
    check = Check("what", "", 0.0, lambda: 0.0)
    thread = threading.Thread(target=lambda: found.extend(rows_of(check)))
    thread.start()
    thread.join()
    assert [row.passed for row in found] == [True]


def test_full_reaches_the_topics():
    seen = []

    def checks(full):
        seen.append(full)
        yield Check("what", "", 0.0, lambda: 0.0)

    for full in (False, True):
        list(run([Topic("made-up", "", checks)], full, lambda *_: None))
    assert seen == [False, True]


def test_json_holds_exactly_the_rows():
    rows = rows_of(
        Check("a", "x", 0.5, lambda: 0.25),
        Check("b", "y", 0.5, lambda: math.nan),
        Check("c", "z", 0.5, lambda: math.inf),
        Check("d", "z", 0.5, raising(ValueError("odd"))),
    )
    made = json.loads(to_json(rows))["rows"]
    assert made[0] == {
        "name": "made-up: a", "oracle": "x", "difference": 0.25, "bound": 0.5, "passed": True
    }  # fmt: skip
    assert [row["difference"] for row in made] == [0.25, None, None, None]
    assert [row["passed"] for row in made] == [True, False, False, False]
    assert made[3]["note"] == "ValueError: odd"


def test_topics_by_name():
    assert [t.name for t in topics([], None)] == list(TOPICS)
    assert [t.name for t in topics(["speed", "golden"], None)] == ["golden", "speed"]
    with pytest.raises(SettingsError, match=r"'sped' is no topic of verify; topics: golden, ham"):
        topics(["sped"], None)


def test_every_topic_has_checks_with_a_name_of_their_own():
    for name in TOPICS:
        if name == "engines":  # needs Ray
            continue
        (one,) = topics([name], None)
        names = [check.name for check in one.checks(False)]
        assert names, name
        assert len(set(names)) == len(names), name


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two golden files that are right."""
    made = tmp_path / "golden"
    made.mkdir()
    for i, order in enumerate(("simultaneous", "sequential")):
        case = make_case(CHAIN, (("l3",), ()), inputs=3, ticks=5, seed=i, order=order)
        np.savez(made / f"unseen{i}.npz", **replay(case))
    return made


def test_the_command_prints_a_row_for_every_check(folder, tmp_path):
    out = tmp_path / "rows.json"
    result = command("--only", "golden", "--golden", str(folder), "--json", str(out))
    assert result.exit_code == 0, result.output
    text = flat(result.stdout)
    assert "golden files (golden)" in text
    oracle = "golden file: h, z, ω, θ, y, L, H'"
    row = rf"pass unseen0.npz: every tick \(relative\) {oracle} [\de.-]+ <= 1e-09 \d+\.\d s"
    assert re.search(row, text), text
    assert re.search(r"2 passed, 0 failed, \d+ s$", text), text
    rows = json.loads(out.read_text())["rows"]
    assert [set(row) for row in rows] == [{"name", "oracle", "difference", "bound", "passed"}] * 2
    assert [row["name"].split(":")[1] for row in rows] == [" unseen0.npz", " unseen1.npz"]
    assert all(row["passed"] and row["difference"] <= row["bound"] == 1e-9 for row in rows)


def test_a_failed_row_ends_with_1_and_is_written(folder, tmp_path):
    (folder / "torn.npz").write_bytes(b"no archive")
    out = tmp_path / "rows.json"
    result = command("--only", "golden", "--golden", str(folder), "--json", str(out))
    assert result.exit_code == 1
    text = flat(result.stdout)
    assert "FAIL torn.npz: not understood" in text
    assert "2 passed, 1 failed" in text
    assert "Traceback" not in result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, True, True]
    assert rows[0]["difference"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--golden", "EMPTY"], "no .npz file in this folder"),
        (["--golden", "nowhere"], "cannot read this folder"),
        (["--only", "sped"], "'sped' is no topic of verify"),
        (["--json", "EMPTY"], "cannot write there"),
        (["--json", "nowhere/rows.json"], "cannot write there"),
        (["--model", "torch.nn:Tanh"], "--input-shape 3,28,28"),
        (["--model", "torch.nn:Tanh", "--input-shape", "3,x"], "give whole numbers above 0"),
        (["--model", "torch.nn:Tanh", "--input-shape", "3,0"], "give whole numbers above 0"),
        (["--model", "torch.nn:Nothing", "--input-shape", "3"], "has no 'Nothing'"),
        (["--model", "no_such:f", "--input-shape", "3"], "no module 'no_such'"),
    ],
)
def test_wrong_usage_ends_with_2_before_any_check(tmp_path, monkeypatch, arguments, message):
    def never(*_):
        raise AssertionError("a check ran")

    monkeypatch.setattr(runner, "run", never)
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    result = command(*[str(empty) if word == "EMPTY" else word for word in arguments])
    assert result.exit_code == 2, result.output
    assert message in flat(result.stderr)
    assert "Traceback" not in result.output


def test_ctrl_c_ends_with_130_and_keeps_the_rows(folder, tmp_path, monkeypatch):
    def checks(full, paths):
        yield Check("first", "oracle", 0.0, lambda: 0.0)
        yield Check("stopped", "oracle", 0.0, raising(KeyboardInterrupt()))

    monkeypatch.setattr(golden, "checks", checks)
    out = tmp_path / "rows.json"
    result = command("--only", "golden", "--golden", str(folder), "--json", str(out))
    assert result.exit_code == 130
    assert "1 passed, 0 failed" in flat(result.stdout)
    assert len(json.loads(out.read_text())["rows"]) == 1
