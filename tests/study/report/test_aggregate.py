"""The rows of a comparison against a table computed by hand."""

from __future__ import annotations

import math

import pytest
from study.builders import make_run

from hamdist.display.table import percent
from hamdist.dynamics.objective.prequential import Window
from hamdist.runtime.results.measured import Replaced
from hamdist.study.report.aggregate import aggregate
from hamdist.study.report.table import comparison_table

RUNS = [
    make_run("centralised", 0, accuracy=0.90, loss=0.5, seconds=1.0, engine="pytorch"),
    make_run(
        "trace",
        0,
        accuracy=0.88,
        loss=0.8,
        seconds=2.0,
        staleness=6,
        bytes_per_edge={"u->a": 9999, "a->b": 400, "b->c": 800, "u=>c": 77},
        peak_memory={"driver": 100, "actor 0": 300},
        warnings=("slow stream",),
    ),
    make_run("centralised", 1, accuracy=0.94, loss=0.3, seconds=3.0, engine="pytorch"),
    make_run(
        "trace",
        1,
        accuracy=0.94,
        loss=0.4,
        seconds=8.0,
        staleness=6,
        bytes_per_edge={"u->a": 9999, "a->b": 800, "b->c": 1600, "u=>c": 77},
        peak_memory={"driver": 250, "actor 0": 200},
        warnings=("slow stream",),
    ),
]


def test_rows_by_hand() -> None:
    central, trace = aggregate(RUNS)
    assert (central.level, central.engine, central.seeds) == ("centralised", "pytorch", 2)
    assert (trace.level, trace.engine, trace.seeds) == ("trace", "inprocess", 2)
    assert trace.held_out_accuracy == pytest.approx(0.91)
    # deviations -0.03, 0.03: variance 0.0018 / (2 - 1)
    assert trace.held_out_spread == pytest.approx(math.sqrt(0.0018))
    # 30 + 36 of 80 rows
    assert trace.prequential_accuracy == pytest.approx(66 / 80)
    assert trace.prequential_loss == pytest.approx(7 / 20)
    # gaps -0.02 and 0.00
    assert trace.gap_to_backprop == pytest.approx(-0.01)
    assert trace.gap_spread == pytest.approx(math.sqrt(2) * 0.01)
    assert (central.gap_to_backprop, central.gap_spread) == (0.0, 0.0)
    assert trace.held_out_loss == pytest.approx(0.6)
    # 0.8 - 0.5 and 0.4 - 0.3
    assert trace.loss_gap == pytest.approx(0.2)
    assert trace.loss_gap_spread == pytest.approx(math.sqrt(0.02))
    assert trace.wall_seconds == pytest.approx(5.0)
    assert trace.startup_seconds == pytest.approx(0.5)
    # 80 rows in 2 s and in 8 s
    assert trace.rows_per_second == pytest.approx((40 + 10) / 2)
    assert trace.peak_memory_by_process == {"driver": 250, "actor 0": 300}
    assert trace.peak_memory_bytes == 300
    # (400 + 800)/2 edges/20 samples = 30, and 60; inputs and targets do not count
    assert trace.bytes_per_edge == pytest.approx(45.0)
    assert central.bytes_per_edge == 0.0
    assert trace.staleness == 6


def test_rows_and_seconds_to_an_accuracy() -> None:
    # Windows end at 1, 2 and 3 s. The baseline's last ones: 36 and 38 of 40, 0.925 in the mean,
    # 95 % of which is 0.87 in whole per cent.
    def windows(*correct: int) -> tuple[Window, ...]:
        return tuple(Window(10 * i, 10 * i + 9, 10, 1.0, c, 40) for i, c in enumerate(correct))

    runs = [
        make_run("centralised", 0, windows=windows(35, 20, 36)),
        make_run("centralised", 1, windows=windows(20, 36, 38)),
        make_run("trace", 0, windows=windows(20, 30, 36)),
        make_run("trace", 1, windows=windows(20, 36, 30)),
        make_run("local", 0, windows=windows(36, 36, 36)),
        make_run("local", 1, windows=windows(20, 20, 34)),
    ]
    central, trace, local = aggregate(runs)
    batch = runs[0].batch
    assert central.goal == 0.87
    assert (central.rows_to_goal, central.seconds_to_goal) == (15 * batch, 1.5)
    assert (trace.rows_to_goal, trace.seconds_to_goal) == (25 * batch, 2.5)
    assert (local.rows_to_goal, local.seconds_to_goal) == (None, None)
    note = comparison_table([central, trace, local]).notes[-1]
    assert note == (
        "rows (and seconds) to a window of 87 %: "
        f"centralised {15 * batch} (1.5 s), trace {25 * batch} (2.5 s), local not at all"
    )


def test_notes() -> None:
    central, trace = aggregate(RUNS)
    assert central.notes == ()
    assert trace.notes == (
        "slow stream",
        "centralised training was 2.5 times as fast (2 s against 5 s a run)",
    )


def test_faster_than_centralised_is_not_warned_of() -> None:
    runs = [make_run("centralised", seconds=2.0), make_run("trace", seconds=1.0)]
    assert aggregate(runs)[1].notes == ()


def test_gap_is_paired_by_seed_and_leaves_interrupted_runs_out() -> None:
    runs = [
        make_run("centralised", 0, accuracy=0.9),
        make_run("trace", 0, accuracy=0.8),
        make_run("centralised", 1, accuracy=0.5),
        make_run("trace", 1, held_out=None, interrupted=True),
    ]
    central, trace = aggregate(runs)
    assert (central.seeds, trace.seeds) == (2, 1)
    assert trace.gap_to_backprop == pytest.approx(-0.1)
    assert trace.gap_spread is None
    assert trace.held_out_spread is None


def test_real_valued_targets_have_losses_only() -> None:
    windows = (Window(0, 19, 20, 8.0, 0, 0),)
    runs = [
        make_run("centralised", accuracy=None, loss=0.25, windows=windows),
        make_run("local", accuracy=None, loss=0.75, windows=windows),
    ]
    _, local = aggregate(runs)
    assert local.held_out_accuracy is None
    assert local.prequential_accuracy is None
    assert local.gap_to_backprop is None
    assert local.loss_gap == pytest.approx(0.5)
    assert local.prequential_loss == pytest.approx(0.4)
    table = comparison_table(aggregate(runs))
    assert table.rows[1][table.titles.index("loss gap")] == "0.5"


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (math.inf, -math.inf)])
def test_divergence_is_said(losses: tuple[float, float]) -> None:
    runs = [make_run("centralised", seed, loss=1.0) for seed in (0, 1)]
    runs += [make_run("trace", seed, loss=loss) for seed, loss in enumerate(losses)]
    _, trace = aggregate(runs)
    assert math.isnan(trace.held_out_loss or 0.0)
    assert math.isnan(trace.loss_gap_spread or 0.0)
    assert any(note.startswith("diverged") and "seed 0" in note for note in trace.notes)
    assert math.isnan(trace.held_out_accuracy or 0.0)  # that of numbers that mean nothing
    assert math.isnan(trace.gap_to_backprop or 0.0)
    assert trace.gap_test is None
    table = comparison_table(aggregate(runs))
    assert table.rows[1][table.titles.index("held-out, %")] == "not finite"


def test_a_seed_that_left_the_finite_range_leaves_no_mean() -> None:
    """What the others came to is no mean of all three; nor is a short run a fast one."""
    runs = [make_run("centralised", seed, accuracy=0.9, loss=0.3, seconds=1.0) for seed in range(3)]
    runs += [make_run("trace", seed, accuracy=0.8, loss=0.5, seconds=2.0) for seed in range(2)]
    runs.append(make_run("trace", 2, held_out=None, failure="left", seconds=0.1))
    _, trace = aggregate(runs)
    for score in ("held_out_accuracy", "held_out_loss", "gap_to_backprop", "loss_gap"):
        assert math.isnan(getattr(trace, score)), score
    assert (trace.gap_test, trace.loss_gap_test) == (None, None)
    assert any(note.startswith("diverged") and "seed 2" in note for note in trace.notes)
    assert any("2.0 times as fast (1 s against 2 s" in note for note in trace.notes)


def test_processor_time_that_went_with_an_actor_is_not_known() -> None:
    used = {"actor 0": {"cpu": 1.5}, "actor 1": {"cpu": 2.0}}
    lost = Replaced("actor 0", ["a"], 9, 5, 0.5, 3)
    assert make_run("trace", time_use=used).cpu_seconds == 3.5
    assert make_run("trace", time_use=used, replaced=[lost]).cpu_seconds is None


def test_nothing_measured() -> None:
    assert aggregate([]) == []
    row = aggregate([make_run("trace", windows=(), samples=0, seconds=0.0, peak_memory={})])[0]
    assert row.prequential_accuracy is None
    assert row.gap_to_backprop is None
    assert (row.rows_per_second, row.bytes_per_edge, row.peak_memory_bytes) == (0.0, 0.0, 0)


def test_table_by_hand() -> None:
    table = comparison_table(aggregate(RUNS))
    cells = dict(zip(table.titles, table.rows[1], strict=True))
    assert cells == {
        "level": "trace",
        "engine": "inprocess",
        "seeds": "2",
        "held-out, %": "91.0 ± 4.2",
        "prequential, %": "82.5",
        "gap, points": "-1.00 ± 1.41",
        "95 %": "-13.71 to +11.71",  # -+ 12.706 (t, one degree of freedom) times 1.41 / sqrt(2)
        "wall, s": "5.0",
        "rows/s": "25",
        "KiB per edge, sample": "0.0",
        "peak, MiB": "driver 0\nactor 0 0",
        "staleness": "6",
    }
    assert table.notes[0] == "trace: slow stream"


def test_table_of_many_processes_is_short() -> None:
    peaks = {"driver": 2**20, **{f"actor {i}": (i + 1) * 2**20 for i in range(8)}}
    rows = aggregate([make_run("trace", peak_memory=peaks, startup_seconds=4.0)])
    table = comparison_table(rows)
    assert table.rows[0][-2] == "driver 1\n8 others: at most 8"
    assert any("start-up: trace 4.0 s" in note for note in table.notes)
    assert any("one seed" in note for note in table.notes)
    failed = aggregate([make_run("trace", seed, held_out=None, failure="left") for seed in (0, 1)])
    assert not any("one seed" in note for note in comparison_table(failed).notes)


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.8774, 0.0012, "87.7 ± 0.1"),
        (0.5, None, "50.0"),
        (-0.0001, None, "0.0"),
        (-0.02, 0.01, "-2.0 ± 1.0"),
        (None, None, "–"),
        (math.nan, None, "not finite"),
    ],
)
def test_percent(value: float | None, spread: float | None, text: str) -> None:
    assert percent(value, spread) == text
