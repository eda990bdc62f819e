"""The measure of drifts against windows written by hand, and in a run."""

from __future__ import annotations

import pytest

from hamdist.config import Settings
from hamdist.dynamics.objective.prequential import Window
from hamdist.study.report.table import run_facts
from hamdist.study.run.measures import DriftRecovery, drift_fact, recoveries
from hamdist.study.run.run import run_level


def windows(*percents: int, size: int = 10) -> list[Window]:
    """Of `size` samples and 100 rows each, with so many per cent right."""
    return [
        Window(i * size, (i + 1) * size - 1, size, 0.0, right, 100)
        for i, right in enumerate(percents)
    ]


def test_fall_and_recovery() -> None:
    found = recoveries(windows(50, 70, 90, 94, 30, 60, 91, 95, 20, 40, 50), (40, 80))
    # before the first drift: the last of 4 windows; before the second: of 4
    assert found == (
        DriftRecovery(40, pytest.approx(0.94), pytest.approx(0.3), 40),
        DriftRecovery(80, pytest.approx(0.95), pytest.approx(0.2), None),
    )
    words = "recovered from 1 of 2 within 40 samples (at most 40); accuracy fell by 69.5 points on"
    assert drift_fact(found) == f"{words} average"


def test_it_is_back_within_two_points() -> None:
    (one,) = recoveries(windows(80, 80, 80, 40, 77, 78, 90), (30,))
    assert one == DriftRecovery(30, pytest.approx(0.8), pytest.approx(0.4), 30)


def test_accuracy_that_never_fell_is_back_at_once() -> None:
    (one,) = recoveries(windows(80, 80, 80, 81, 82), (30,))
    assert (one.lowest, one.samples) == (pytest.approx(0.81), 10)


def test_windows_of_two_concepts_belong_to_neither() -> None:
    (one,) = recoveries(windows(80, 80, 10, 80, 80), (25,))
    assert one.before == pytest.approx(0.8)
    assert one.lowest == pytest.approx(0.8)


def test_nothing_to_measure() -> None:
    assert recoveries([], (10,)) == ()
    assert recoveries(windows(50, 50), ()) == ()
    assert recoveries(windows(50, 50, size=100), (60,)) == ()  # no whole window behind the drift
    assert drift_fact(()) == ""


def test_a_run_recovers_after_each_labelled_drift() -> None:
    settings = Settings.model_validate(
        {
            "level": "trace",
            "steps": 900,
            "model": {"kind": "mlp", "width": 32, "depth": 2},
            "stream": {"source": "drift", "batch": 16, "drift": {"period": 300, "noise": 0.3}},
            "learning": {"lr": 0.2},
            "metrics": {"window": 3},
        }
    )
    run, _ = run_level(settings)
    assert [one.sample for one in run.drifts] == [300, 600]
    for one in run.drifts:
        assert one.before > 0.95
        assert one.lowest < 0.7 < one.before
        assert one.samples is not None
        assert one.samples < 300
    assert run_facts(run)["drifts"].startswith("recovered from 2 of 2")
