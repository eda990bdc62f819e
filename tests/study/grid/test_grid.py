"""Studies: cells and keys against tables written by hand, the choice against made-up accuracies,
whole studies against runs made one by one."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Level, Settings, Split
from hamdist.display.table import MISSING
from hamdist.errors import ClusterError, SettingsError
from hamdist.study.grid import run as grid_run
from hamdist.study.grid.points import TUNING_SEEDS, GridJob, cells, final_jobs, tuning_jobs
from hamdist.study.grid.run import RunRecord, StudyOutcome, TuningResult, check, run_study, work
from hamdist.study.grid.settings import (
    STUDIES,
    Axis,
    SideSettings,
    StudySettings,
    Trains,
    load_study,
    read_study,
    study_yaml,
)
from hamdist.study.grid.summary import summary
from hamdist.study.grid.tables import save_study, study_figures, study_tables
from hamdist.study.run.run import run_level
from hamdist.study.shared.result_folder import Store

TINY = """
name: tiny
rows: 64
seeds: 2
run:
  model: {kind: residual-mlp, width: 6, depth: 2}
  stream: {source: digits, batch: 4}
sides:
  centralised: {tune: {learning.lr: [0.05, 0.1, 0.2]}}
  trace: {tune: {learning.lr: [0.05, 0.1, 0.2]}}
"""


def tiny(**changes: Any) -> StudySettings:
    return read_study(TINY, "tiny", [{"workers": 1, **changes}])


def side(level: str | None = None, *lrs: float, **more: Any) -> dict[str, Any]:
    return {"level": level, "tune": {"learning.lr": list(lrs)} if lrs else {}, **more}


def record(job: GridJob, accuracy: float | None, **more: Any) -> RunRecord:
    blank = RunRecord(
        key=job.key,
        trains=job.trains.value,
        seed=job.settings.seed,
        rows=64,
        accuracy=accuracy,
        loss=None if accuracy is None else 1 - accuracy,
        prequential=accuracy,
        seconds=1.0,
        smoothness=None,
        staleness=0,
        failure="it blew up" if accuracy is None else None,
        warnings=(),
        curve=((32, 0.5, 0.25, 2.0), (64, 1.0, 0.5, 1.0)),
        drifts=(),
        settings=job.settings.model_dump(mode="json"),
    )
    return dataclasses.replace(blank, **more)


class Made:
    """Stands in for `work`: notes the jobs; the accuracy is what `of` says of one."""

    def __init__(self, of: Callable[[GridJob], float | None]) -> None:
        self.of = of
        self.jobs: list[GridJob] = []

    def __call__(self, job: GridJob) -> RunRecord:
        self.jobs.append(job)
        return record(job, self.of(job))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Accuracy 1 - |lr - 0.1| for centralised training, |lr - 0.1| for a level, + seed/1000."""

    def accuracy(job: GridJob) -> float:
        away = abs(job.settings.learning.lr - 0.1)
        own = away if job.trains is Trains.LEVEL else 1 - away
        return own + job.settings.seed % 1000 / 1000

    stand_in = Made(accuracy)
    monkeypatch.setattr(grid_run, "work", stand_in)
    return stand_in


class TestSettings:
    def test_they_survive_being_written(self) -> None:
        study = tiny(axes={"depth": [2, 3]})
        assert read_study(study_yaml(study), "again") == study

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"sides": {"trace": side(None, 0.1, 0.2)}},
                "candidates in 'tune' are centralised 3, trace 2: give each as many",
            ),
            ({"sides": {"fast": side(None, 1, 2, 3)}}, "'sides.fast': the name is no level"),
            ({"axes": {"depth": [2, 2]}}, "'depth' has a value twice"),
            ({"axes": {"width": [2]}}, "axes.width: no such setting"),
            ({"seds": 2}, r"seds: no such setting; did you mean 'seeds'\?"),
            ({"rows": 0}, "rows: Input should be greater than or equal to 1"),
            ({"address": "here:1"}, "'address' belongs to 'parallel: ray'"),
            ({"sides": {"trace": side("tarce")}}, "sides.trace.level"),
            ({"sides": {"trace": {"tune": {"learning.lr": []}}}}, "sides.trace.tune.learning.lr"),
        ],
    )
    def test_what_is_wrong_is_named(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            tiny(**changes)

    def test_a_baseline_is_needed(self) -> None:
        with pytest.raises(SettingsError, match="none is 'centralised'"):
            read_study("rows: 8\nsides: {trace: {}}", "x")

    @pytest.mark.parametrize(
        ("text", "words"),
        [("a: [", "x, line 1: no valid YAML"), ("[1]", "x: a study's settings are a mapping")],
    )
    def test_what_is_no_mapping(self, text: str, words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            read_study(text, "x")

    def test_shipped_studies_hold(self) -> None:
        assert STUDIES.descriptions()
        for name, words in STUDIES.descriptions().items():
            assert words
            assert check(load_study(name), chosen=False)
        with pytest.raises(SettingsError, match=r"no settings file 'nothing'.*studies: "):
            load_study("nothing")

    @pytest.mark.parametrize(
        ("run", "words"),
        [
            ({"seed": 1}, "run.seed: a study sets it itself"),
            ({"steps": 10}, "run.steps: a study sets it itself"),
            ({"engine": {"kind": "ray"}}, "run.engine.kind: the runs of a study are in-process"),
            ({"model": {"depht": 3}}, "in 'run': model.depht: no such setting"),
            ({"stream": {"batch": 65}}, "rows is 64, less than a batch of 65 .centralised."),
        ],
    )
    def test_settings_of_runs_are_checked_before_any_starts(
        self, run: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(SettingsError, match=words):
            check(tiny(run=run), chosen=False)

    def test_what_a_side_lays_over_them_is_named_with_the_side(self) -> None:
        wrong = {"trace": {"set": {"model": {"depht": 3}}}}
        with pytest.raises(SettingsError, match=r"^trace: model.depht: no such setting"):
            check(tiny(sides=wrong), chosen=False)


class TestCells:
    def test_every_side_at_every_point(self) -> None:
        found = cells(tiny(axes={"batch": [1, 4], "depth": [2, 3]}))
        assert [cell.label for cell in found] == [
            f"{name}, depth {depth}, batch {batch}"
            for depth in (2, 3)
            for batch in (1, 4)
            for name in ("centralised", "trace")
        ]

    def test_all_axes_reach_the_runs(self) -> None:
        axes = {"depth": [3], "speed": [2], "smoothness": [5], "batch": [8]}
        local = side("local", 0.3, 0.4, 0.5, set={"locality": {"delay_power": 1.0}})
        study = tiny(axes=axes, sides={"slow": local})
        slow = next(cell for cell in cells(study) if cell.name == "slow")
        settings = tuning_jobs(study, slow)[0][1][0].settings
        assert settings.level is Level.LOCAL
        assert (settings.model.depth, settings.model.width) == (3, 6)
        assert settings.locality.speed == 2
        assert settings.locality.delay_power == 1.0
        assert settings.stream.smooth is not None
        assert (settings.stream.smooth.frames, settings.stream.batch) == (5, 8)
        assert settings.learning.lr == 0.3
        assert settings.steps == 64 // 8

    def test_frozen_stands_beside_what_keeps_nothing(self) -> None:
        lrs = (0.05, 0.1, 0.2)
        assert [c.name for c in cells(tiny())] == ["centralised", "trace"]
        for level in ("local", "group", "delay-free", "heads"):
            found = cells(tiny(sides={level: side(None, *lrs)}))
            assert [c.name for c in found] == ["centralised", "trace", level, "frozen"]
            assert [c.memoryless for c in found] == [False, False, True, False]
            assert found[-1].trains is Trains.FROZEN
            assert found[-1].side.tune == found[0].side.tune
        own = cells(tiny(sides={"local": side(None, *lrs), "hidden": side("frozen", *lrs)}))
        assert [c.name for c in own] == ["centralised", "trace", "local", "hidden"]
        clash = {"frozen": side("trace", *lrs), "local": side(None, *lrs)}
        with pytest.raises(SettingsError, match=r"sides.frozen: the name is that of the side"):
            cells(tiny(sides=clash))

    def test_tuning_is_on_the_validation_part_with_seeds_of_its_own(self) -> None:
        study = tiny(tune={"seeds": 2, "rows": 32})
        cell = cells(study)[1]
        asked = tuning_jobs(study, cell)
        assert [candidate for candidate, _ in asked] == [
            {"learning.lr": lr} for lr in (0.05, 0.1, 0.2)
        ]
        for candidate, jobs in asked:
            assert [job.settings.seed for job in jobs] == [TUNING_SEEDS, TUNING_SEEDS + 1]
            for job in jobs:
                assert job.settings.stream.evaluate is Split.VALIDATION
                assert job.settings.learning.lr == candidate["learning.lr"]
                assert job.settings.steps == 8
        finals = final_jobs(study, cell, {"learning.lr": 0.1})
        assert [job.settings.seed for job in finals] == [0, 1]
        assert {job.settings.stream.evaluate for job in finals} == {Split.TEST}
        assert {job.settings.steps for job in finals} == {16}


class TestKeys:
    def key(self, trains: Trains, **fields: Any) -> str:
        return GridJob(trains, Settings.model_validate(fields)).key

    @pytest.mark.parametrize(
        ("fields", "same_for_levels", "same_for_centralised"),
        [
            ({"name": "other"}, True, True),
            ({"learning": {"lr": 0.1, "momentum": 0.0}}, True, True),  # both are defaults
            ({"locality": {"speed": 3}}, False, True),
            ({"locality": {"accumulate": 3}}, False, False),
            ({"locality": {"truncation": 3}}, False, False),
            ({"dynamics": {"reset": {"h": "never"}}}, False, False),
            ({"level": "local"}, False, True),
            ({"seed": 1}, False, False),
            ({"steps": 7}, False, False),
            ({"learning": {"lr": 0.2}}, False, False),
            ({"stream": {"evaluate": "validation"}}, False, False),
        ],
    )
    def test_what_the_result_depends_on(
        self, fields: dict[str, Any], same_for_levels: bool, same_for_centralised: bool
    ) -> None:
        for trains, same in (
            (Trains.LEVEL, same_for_levels),
            (Trains.CENTRALISED, same_for_centralised),
            (Trains.FROZEN, same_for_centralised),
        ):
            assert (self.key(trains, **fields) == self.key(trains)) is same, trains
        assert len({self.key(trains) for trains in Trains}) == 3


class TestChoice:
    def test_the_best_on_validation_is_run_on_the_test_part(
        self, made: Made, tmp_path: Path
    ) -> None:
        central, trace = run_study(tiny(), tmp_path)
        assert central.choice == TuningResult({"learning.lr": 0.1}, 1.0)
        assert trace.choice == TuningResult(
            {"learning.lr": 0.2}, pytest.approx(0.1), ("learning.lr",)
        )
        assert [r.accuracy for r in central.records] == [1.0, 1.001]
        assert [r.seed for r in trace.records] == [0, 1]
        parts = [job.settings.stream.evaluate.value for job in made.jobs]
        assert parts == ["validation"] * 6 + ["test"] * 4

    def test_a_failed_candidate_is_not_chosen(self, made: Made, tmp_path: Path) -> None:
        made.of = lambda job: None if job.settings.learning.lr > 0.1 else job.settings.learning.lr
        found = run_study(tiny(), tmp_path)
        assert {o.choice.chosen["learning.lr"] for o in found} == {0.1}

    @pytest.mark.parametrize("gone", ["centralised", "trace"])
    def test_a_side_whose_candidates_all_diverge(
        self, made: Made, tmp_path: Path, gone: str
    ) -> None:
        """It is said to have diverged, the others are run; without a baseline there is no gap."""
        level = Trains.LEVEL if gone == "trace" else Trains.CENTRALISED
        made.of = lambda job: None if job.trains is level else 0.5
        study = tiny(goal=0.5)
        found = run_study(study, tmp_path)
        assert len(made.jobs) == 6 + 2
        (table,) = save_study(tmp_path, study, found, command="x").values()
        shown = {row[0]: dict(zip(table.titles, row, strict=True)) for row in table.rows}
        other = ({"centralised", "trace"} - {gone}).pop()
        scores = {name: row["held-out, %"] for name, row in shown.items()}
        assert scores == {gone: "diverged", other: "50.00 ± 0.00"}
        assert shown["trace"]["gap, points"] == MISSING
        assert (shown[gone]["rows to 50 %"], shown[other]["rows to 50 %"]) == ("not reached", "64")
        assert any(note.startswith(f"{gone}: every candidate of 'tune'") for note in table.notes)
        rows = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert {r["side"]: (r["diverged"], r["seeds"]) for r in rows} == {
            gone: (True, 0),
            other: (False, 2),
        }

    def test_what_was_chosen_before(self, made: Made, tmp_path: Path) -> None:
        best = {name: {"best": {"learning.lr": 0.2}} for name in ("centralised", "trace")}
        found = run_study(tiny(sides=best), tmp_path, chosen=True)
        assert [o.choice for o in found] == [TuningResult({"learning.lr": 0.2}, None)] * 2
        assert len(made.jobs) == 4
        with pytest.raises(SettingsError, match=r"sides.trace.best: names nothing, but 'tune' has"):
            run_study(tiny(sides={"centralised": best["trace"]}), tmp_path, chosen=True)

    def test_losses_where_there_are_no_accuracies(self) -> None:
        job = GridJob(Trains.LEVEL, Settings())
        losses = [record(job, None, loss=loss, failure=None) for loss in (1.0, 3.0)]
        assert grid_run.score(losses) == -2.0
        assert grid_run.score([record(job, 0.5), record(job, None)]) == -math.inf


class TestResume:
    def test_only_what_is_missing_is_run(self, made: Made, tmp_path: Path) -> None:
        def stop(phase: str, done: int, total: int, found: RunRecord) -> None:
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(tiny(), tmp_path, on_record=stop)
        assert len(made.jobs) == 4
        told: list[tuple[str, int, int]] = []
        whole = run_study(tiny(), tmp_path, on_record=lambda p, n, m, r: told.append((p, n, m)))
        assert len(made.jobs) == 10  # 6 tuning, 4 final
        assert told[:2] == [("tuning", 5, 6), ("tuning", 6, 6)]
        again = run_study(tiny(), tmp_path)
        assert len(made.jobs) == 10
        assert [o.choice for o in again] == [o.choice for o in whole]
        values = [[r.accuracy for r in o.records] for o in again]
        assert values == [[r.accuracy for r in o.records] for o in whole]
        run_study(tiny(seeds=3), tmp_path)
        assert len(made.jobs) == 12

    def test_two_cells_share_a_run(self, made: Made, tmp_path: Path) -> None:
        run_study(tiny(axes={"speed": [1, 2]}), tmp_path)
        centralised = [j for j in made.jobs if j.trains is Trains.CENTRALISED]
        assert len(centralised) == 3 + 2
        assert len(made.jobs) - len(centralised) == 2 * (3 + 2)

    def test_files_that_are_no_records(self, tmp_path: Path) -> None:
        job = GridJob(Trains.LEVEL, Settings(steps=3))
        store = Store(tmp_path, lambda values: RunRecord(**values))
        assert store.find(job.key) is None
        store.keep(job.key, json.dumps(dataclasses.asdict(record(job, 0.5))))
        found = store.find(job.key)
        assert found is not None
        assert found.accuracy == 0.5
        path = tmp_path / f"{job.key}.json"
        for text, words in (("{", "cannot be read"), ("{}", "cannot be read"), ("3", "cannot be")):
            path.write_text(text)
            with pytest.raises(SettingsError, match=words):
                store.find(job.key)
        other = record(job, 0.5, key="other")
        path.write_text(json.dumps(dataclasses.asdict(other)))
        with pytest.raises(SettingsError, match="holds the record of run other"):
            store.find(job.key)


def killed(job: GridJob) -> RunRecord:
    os._exit(1)


def plain(found: RunRecord) -> RunRecord:
    """Without what a clock says."""
    curve = [(row[0], *row[2:]) for row in found.curve]
    return dataclasses.replace(
        found,
        seconds=0.0,
        cpu_seconds=0.0,
        joules=None,
        curve=curve,
        warnings=tuple(found.warnings),
        blocks={},
    )


class TestWhole:
    def test_against_runs_made_one_by_one(self, tmp_path: Path) -> None:
        local = {"local": side(None, 0.05, 0.1, 0.2)}
        outcomes = run_study(tiny(sides=local, seeds=1, axes={"depth": [3]}), tmp_path)
        by_name = {o.cell.name: o for o in outcomes}
        raw = {
            "model": {"kind": "residual-mlp", "width": 6, "depth": 3},
            "stream": {"source": "digits", "batch": 4},
            "engine": {"actors": 1},
            "steps": 16,
        }
        for name, outcome in by_name.items():
            lr = outcome.choice.chosen["learning.lr"]
            level = name if name in ("trace", "local") else "backprop"
            own = Settings.model_validate({**raw, "level": level, "learning": {"lr": lr}})
            if level == "backprop":
                run, _ = run_level(own, baseline=name)
            else:
                run, _ = run_level(own)
            (found,) = outcome.records
            assert run.held_out is not None
            assert (found.accuracy, found.loss) == (run.held_out.accuracy, run.held_out.loss)
            assert found.rows == 64
            assert found.curve[-1][0] == 64
        accuracies = {name: o.records[0].accuracy for name, o in by_name.items()}
        assert len(set(accuracies.values())) > 1
        # Each final run of a level has its blocks: at depth D - l messages are 2 (D - l) late.
        (traced,) = by_name["trace"].records
        late = [dict(block["late"]) for block in traced.blocks.values()]
        assert [max(one, default=0) for one in late] == [4, 2, 0]
        assert all(block["last"] is not None for block in traced.blocks.values())
        assert not by_name["frozen"].records[0].blocks

    @pytest.mark.parametrize("trains", [Trains.LEVEL, Trains.CENTRALISED])
    def test_a_run_that_diverges_is_a_record(self, trains: Trains) -> None:
        raw = {
            "level": "trace",
            "steps": 60,
            "model": {"kind": "mlp", "width": 8, "depth": 4},
            "stream": {"source": "digits", "batch": 4},
            "learning": {"lr": 1e6},
            "engine": {"actors": 1},
        }
        found = work(GridJob(trains, Settings.model_validate(raw)))
        assert found.failure
        assert found.accuracy is None

    def test_a_final_run_of_a_rule_that_carries_traces(self) -> None:
        """It is made without probes of the alignment, for no update is of one sample alone."""
        raw = {
            "level": "trace",
            "steps": 40,
            "model": {"kind": "gru", "width": 4, "depth": 1},
            "stream": {"source": "memory", "batch": 4, "memory": {"task": "recall", "length": 5}},
            "learning": {"rules": {"cell0": "snap-1"}},
            "engine": {"actors": 1},
        }
        found = work(GridJob(Trains.LEVEL, Settings.model_validate(raw)))
        assert found.accuracy is not None
        assert {block["first"] for block in found.blocks.values()} == {None}

    @pytest.mark.parametrize("trains", [Trains.LEVEL, Trains.CENTRALISED])
    def test_of_a_signal_the_loss_is_that_of_the_whole_run(self, trains: Trains) -> None:
        """Nothing of it is held out. Oracle: the windows, all of one length."""
        raw = {
            "level": "local",
            "loss": "mse",
            "steps": 60,
            "model": {"kind": "rnn", "width": 4, "depth": 1},
            "stream": {"source": "signal", "signal": {"kind": "sinusoid", "lead": 0.2}},
            "metrics": {"window": 1},
            "engine": {"actors": 1},
        }
        found = work(GridJob(trains, Settings.model_validate(raw)))
        assert found.accuracy is None
        losses = [loss for *_, loss in found.curve]
        assert found.loss == pytest.approx(sum(losses) / len(losses))

    def test_half_a_run_is_no_record(self) -> None:
        """A polite request to end, in the midst of a run: the study ends, and keeps nothing."""
        raw = {
            "level": "trace",
            "steps": 1_000_000,
            "model": {"kind": "mlp", "width": 8, "depth": 2},
            "stream": {"source": "digits", "batch": 4},
            "engine": {"actors": 1},
        }
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                work(GridJob(Trains.LEVEL, Settings.model_validate(raw)))
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)

    @pytest.mark.timeout(120)
    @pytest.mark.slow
    def test_in_two_processes(self, tmp_path: Path) -> None:
        before = set(multiprocessing.active_children())
        two = {name: side(None, 0.05, 0.1) for name in ("centralised", "trace")}
        study = tiny(seeds=1, sides=two)
        alone = run_study(study, tmp_path / "alone")
        beside = run_study(study.model_copy(update={"workers": 2}), tmp_path / "beside")
        for one, other in zip(alone, beside, strict=True):
            assert one.choice == other.choice
            assert [plain(r) for r in one.records] == [plain(r) for r in other.records]
        assert set(multiprocessing.active_children()) <= before

    @pytest.mark.timeout(120)
    def test_a_process_that_dies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grid_run, "work", killed)
        before = set(multiprocessing.active_children())
        with pytest.raises(ClusterError, match="a process of the study ended by itself"):
            run_study(tiny(workers=2), tmp_path)
        assert set(multiprocessing.active_children()) <= before

    @pytest.mark.ray
    @pytest.mark.timeout(120)
    def test_as_tasks_of_ray(self, session: object, tmp_path: Path) -> None:
        untuned = tiny(seeds=1).model_copy(
            update={"sides": {n: SideSettings() for n in ("centralised", "trace")}}
        )
        alone = run_study(untuned, tmp_path / "alone")
        beside = run_study(untuned.model_copy(update={"parallel": "ray"}), tmp_path / "beside")
        for one, other in zip(alone, beside, strict=True):
            assert [plain(r) for r in one.records] == [plain(r) for r in other.records]


def outcomes(study: StudySettings, *accuracies: list[float | None]) -> list[StudyOutcome]:
    """Of the cells in order, with these accuracies by seed."""
    found = []
    for cell, own in zip(cells(study), accuracies, strict=True):
        choice = TuningResult(cell.side.candidates[0], 0.5)
        jobs = final_jobs(study, cell, choice.chosen)
        records = [record(job, a) for job, a in zip(jobs, own, strict=True)]
        found.append(StudyOutcome(cell, choice, records))
    return found


class TestReport:
    def test_gaps_are_paired_by_seed(self) -> None:
        central, trace = summary(outcomes(tiny(), [0.8, 0.9], [0.79, 0.87]))
        assert central.accuracy == pytest.approx(0.85)
        assert central.spread == pytest.approx(0.1 / math.sqrt(2))
        assert (central.gap, central.gap_spread) == (0, 0)
        assert trace.gap == pytest.approx(-0.02)
        assert trace.gap_spread == pytest.approx(0.02 / math.sqrt(2))

    def test_a_failed_seed_leaves_no_mean(self) -> None:
        _, trace = summary(outcomes(tiny(), [0.8, 0.9], [0.79, None]))
        assert (trace.accuracy, trace.gap) == (None, None)
        assert (trace.spread, trace.prequential, trace.seconds) == (None, None, None)
        assert trace.notes == ("trace: seed 1: it blew up",)

    def test_a_gap_of_losses_has_the_sign_of_compare(self) -> None:
        """Its own minus the centralised one: 1.5 - 1 and 2.5 - 2, so above 0 it is worse."""
        found = [
            dataclasses.replace(
                outcome,
                records=[
                    dataclasses.replace(r, accuracy=None, loss=loss)
                    for r, loss in zip(outcome.records, losses, strict=True)
                ],
            )
            for outcome, losses in zip(
                outcomes(tiny(), [0.8, 0.9], [0.8, 0.9]), ([1.0, 2.0], [1.5, 2.5]), strict=True
            )
        ]
        lines = summary(found)
        assert lines[1].gap == 0.5
        (table,) = study_tables(tiny(), lines).values()
        assert table.rows[1][table.titles.index("loss gap")] == "0.5 ± 0"
        assert "gap: loss minus that of centralised" in table.notes[0]

    def test_published_figures_and_rows_to_a_goal_stand_beside(self, tmp_path: Path) -> None:
        """The curves of `record` reach 50 % with their second point, and never 60 %."""
        published = {"accuracy": 91.5, "source": "somebody, 2021"}
        study = tiny(goal=0.5, sides={"trace": {"published": published}})
        found = outcomes(study, [0.8, 0.9], [0.79, 0.87])
        (table,) = save_study(tmp_path, study, found, command="x").values()
        shown = [dict(zip(table.titles, row, strict=True)) for row in table.rows]
        assert [row["published, %"] for row in shown] == [MISSING, "91.5"]
        assert [row["rows to 50 %"] for row in shown] == ["64", "64"]
        assert [row["s to 50 %"] for row in shown] == ["1.0", "1.0"]
        assert "published, trace: somebody, 2021" in table.notes
        rows = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert [(row["published"], row["rows_to_goal"]) for row in rows] == [(None, 64), (91.5, 64)]
        assert [line.rows_to_goal for line in summary(found, 0.6)] == [None, None]

    def test_what_a_reviewer_asks_of_each_side(self, tmp_path: Path) -> None:
        """Of 40 blocks 12 rows are shown, the first and the last among them; all are in the CSV.
        Joules of runs that were not alone are missing, so their column is."""
        study = tiny()
        central, trace = outcomes(study, [0.8, 0.9], [0.79, 0.87])
        blocks = {f"b{i}": {"late": [[i, 3]], "memory": 1024 * (i + 1)} for i in range(40)}
        seen = [dataclasses.replace(r, cpu_seconds=2.0, blocks=blocks) for r in trace.records]
        found = [central, dataclasses.replace(trace, records=seen)]
        tables = save_study(tmp_path, study, found, command="x")
        whole = tables["All sides"]
        assert [row[whole.titles.index("CPU s")] for row in whole.rows] == [MISSING, "2"]
        assert not any("whole machine" in title for title in whole.titles)
        assert any(note.startswith("trace: not told apart from the base") for note in whole.notes)
        rows = tables["Blocks"].rows
        assert len(rows) == 12
        assert [rows[0][1], rows[-1][1]] == ["b0", "b39"]
        assert (rows[-1][4], rows[-1][-1]) == ("39", "40.0")
        assert len(list(csv.DictReader((tmp_path / "blocks.csv").open()))) == 40
        assert r"\begin{tabular}" in (tmp_path / "blocks.tex").read_text()
        assert r"\|theta\|" in (tmp_path / "study.md").read_text()

    def test_joules_belong_to_runs_that_were_alone(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = record(final_jobs(tiny(), cells(tiny())[0], {})[0], 0.5, joules=3.0)
        assert grid_run._beside_others(alone).joules is None
        monkeypatch.setattr(grid_run, "work", lambda job: record(job, 0.5, joules=3.0))
        found = run_study(tiny(), tmp_path)
        assert summary(found)[1].joules == 3.0

    def test_drifts_are_told(self) -> None:
        study = tiny()
        central, trace = outcomes(study, [0.8, 0.9], [0.7, 0.8])
        drifted = dataclasses.replace(
            trace,
            records=[dataclasses.replace(r, drifts=[[9, 0.9, 0.5, 20]]) for r in trace.records],
        )
        (note,) = summary([central, drifted])[1].notes
        assert note == (
            "trace: of the drifts of all seeds recovered from 2 of 2 within 20 samples (at most "
            "20); accuracy fell by 40.0 points on average"
        )

    def test_tables(self) -> None:
        study = tiny(axes={"depth": [2, 3]})
        found = outcomes(study, [0.8, 0.9], [0.79, 0.87], [0.6, 0.6], [0.61, 0.61])
        tables = study_tables(study, summary(found), Axis.DEPTH)
        along, whole = tables.values()
        assert next(iter(tables)).startswith("Held-out accuracy, %, against depth")
        assert along.titles == ["side", "L = 2", "L = 3"]
        assert along.rows == [
            ["centralised", "85.00 ± 7.07", "60.00 ± 0.00"],
            ["trace", "83.00 ± 5.66", "61.00 ± 0.00"],
        ]
        assert [row[:4] for row in whole.rows] == [
            ["centralised", "2", "85.00 ± 7.07", "–"],
            ["trace", "2", "83.00 ± 5.66", "-2.00 ± 1.41"],
            ["centralised", "3", "60.00 ± 0.00", "–"],
            ["trace", "3", "61.00 ± 0.00", "+1.00 ± 0.00"],
        ]
        assert whole.rows[0][-1] == "lr 0.05"
        assert "2 seeds on the test part" in whole.notes[0]
        assert "3 candidates" in whole.notes[1]
        assert not any("frozen" in note for note in whole.notes)

    def test_files(self, tmp_path: Path) -> None:
        study = tiny(axes={"speed": [1, 2]}, sides={"local": side(None, 0.05, 0.1, 0.2)})
        found = outcomes(study, *([[0.8, 0.9]] * 8))
        save_study(tmp_path, study, found, command="hamdist study speed x", first=Axis.SPEED)
        names = {path.name for path in tmp_path.iterdir()}
        texts = {f"study.{kind}" for kind in ("yaml", "json", "csv", "md", "tex", "html")}
        assert names == texts
        [figure] = study_figures(study, found)
        assert [c.label for c in figure.curves] == ["centralised", "trace", "local", "frozen"]
        assert all(list(c.y) == [pytest.approx(85.0)] * 2 for c in figure.curves)
        rows = json.loads((tmp_path / "study.json").read_text())["rows"]
        assert [row["side"] for row in rows[:4]] == ["centralised", "trace", "local", "frozen"]
        assert rows[0]["point"] == {"speed": 1}
        table = list(csv.DictReader((tmp_path / "study.csv").open()))
        assert [float(row["accuracy"]) for row in table] == [pytest.approx(0.85)] * 8
        assert read_study((tmp_path / "study.yaml").read_text(), "x") == study
        page = (tmp_path / "study.html").read_text()
        assert '"figures": [{"title": "Held-out accuracy against' in page
        assert "frozen: the last block alone" in page
        assert "<h2>All sides</h2>" in page
        text = (tmp_path / "study.md").read_text()
        assert "| side | c = 1 | c = 2 |" in text
        assert "hamdist study speed x" in text


class TestCommand:
    def call(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["study", *arguments])

    def file(self, folder: Path, **changes: Any) -> str:
        path = folder / "tiny.yaml"
        path.write_text(study_yaml(tiny(**changes)))
        return str(path)

    def test_prints_the_tables_and_writes_the_report(self, made: Made, tmp_path: Path) -> None:
        own = self.file(tmp_path, axes={"depth": [2, 3]})
        done = self.call("depth", own, "--out", str(tmp_path / "out"), "--set", "seeds=1")
        assert done.exit_code == 0, done.output
        assert "L = 2" in done.output
        assert (tmp_path / "out" / "study.html").is_file()
        ran = len(made.jobs)
        assert ran == 2 * 2 * (3 + 1)
        assert self.call("levels", own, "--out", str(tmp_path / "out")).exit_code == 0
        assert len(made.jobs) == ran + 4  # the second seed

    def test_a_study_of_an_axis_needs_values(self, made: Made, tmp_path: Path) -> None:
        own = self.file(tmp_path)
        for kind in ("depth", "speed", "smoothness", "batch"):
            done = self.call(kind, own, "--out", str(tmp_path / "out"))
            assert done.exit_code == 2
            assert f"axes.{kind}: a study of it needs several values" in done.output
        assert not made.jobs

    def test_options_of_the_study_of_gradients(self, tmp_path: Path) -> None:
        own = self.file(tmp_path, axes={"speed": [1, 2]})
        for option, value in (("--depth", "3"), ("--seeds", "2"), ("--input-shape", "3")):
            done = self.call("speed", own, option, value)
            assert done.exit_code == 2
            assert f"{option} belongs to the study of gradients" in done.output
        done = self.call("speed", "--chosen")
        assert done.exit_code == 2
        assert "belong to a grid" in done.output


def test_a_side_has_one_colour_and_its_curves_other_dashes() -> None:
    from hamdist.study.grid.tables import _styles

    study = tiny(axes={"depth": [2, 3]})
    curves = {f"{cell.name}, {cell.point}": cell for cell in cells(study)}
    styles = _styles(curves)
    by_side: dict[str, list[str]] = {}
    for label, cell in curves.items():
        by_side.setdefault(cell.name, []).append(label)
    colours = [{(styles[one] or [None])[0] for one in labels} for labels in by_side.values()]
    assert all(len(own) == 1 for own in colours)
    assert len({own.pop() for own in colours}) == len(by_side) > 1
    for labels in (own for side, own in by_side.items() if side != "centralised"):
        assert len({str(styles[label][1]) for label in labels}) == len(labels) == 2
