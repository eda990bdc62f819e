"""The benchmarks' pure parts against numbers made by hand, their arithmetic against autograd, and
their processes. No timing is asserted."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from harness import learning, works
from harness.arithmetic import Share
from harness.configurations import compiled, eager, schedules
from harness.contest import (
    ALONE,
    ARITHMETIC,
    BACKPROP,
    CENTRALISED,
    EAGER,
    EXCHANGE,
    LOCAL,
    PIPELINE,
    PIPELINING,
    TRACE,
    Contest,
)
from harness.explain import parts, sentence
from harness.figures import Row, Spread, Target, faster, missing, spread, worst
from harness.footprint import Footprint, claim
from harness.inprocess import InProcess
from harness.ours import Configuration, Ours, fresh_actors
from harness.output import figure, targets, write
from harness.pipelining import half
from harness.processes import Remote, RemoteError, together
from harness.turns import in_turns
from harness.verdicts import activation_rows, backprop_rows, exchange_row, memory_row, rows
from harness.works import Cycled, chain, mlp, pace
from torch.nn.functional import cross_entropy

from hamdist.dynamics.native.rows import built, gemm
from hamdist.runtime.placement.assign_hosts import ActorOptions
from hamdist.runtime.ray_engine.session import Session
from hamdist.study.grid import run as grid_run
from hamdist.study.grid.run import RunRecord, check
from hamdist.study.grid.settings import Trains, load_study
from hamdist.study.grid.summary import SummaryLine
from hamdist.study.report.paired_test import PairedTest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def one(seconds):
    return Spread(seconds, seconds, seconds, 1)


class TestFigures:
    def test_the_spread_is_that_of_the_quartiles(self):
        assert spread([5, 1, 4, 2, 3]) == Spread(3, 2, 4, 5)
        assert spread([1, 2]) == Spread(1.5, 1.25, 1.75, 2)
        assert spread([7.0]) == one(7.0)
        with pytest.raises(ValueError, match="no value"):
            spread([])

    @pytest.mark.parametrize(
        ("bound", "at_least", "ratio", "reached"),
        [
            (2, True, 2.0, True),
            (2, True, 1.99, False),
            (2, False, 2.0, True),
            (2, False, 2.01, False),
            (2, True, None, False),
            (2, False, None, False),
            (2, False, float("nan"), False),
        ],
    )
    def test_a_target_is_a_bound_from_below_or_from_above(self, bound, at_least, ratio, reached):
        assert Target(bound, at_least).reached(ratio) is reached

    def test_twice_as_fast_is_half_the_time(self):
        row = faster("a", one(2e-3), one(4e-3), Target(2))
        assert row.ratio == 2
        assert row.reached is True
        assert faster("a", one(4e-3), one(2e-3), Target(2)).ratio == 0.5

    def test_what_was_not_run_is_not_missed(self):
        row = missing("a", Target(1), "no reason")
        assert (row.ratio, row.reached, row.verdict) == (None, None, "not run")
        failed = Row("a", None, Target(1), profile="weights differ")
        assert (failed.reached, failed.verdict) == (False, "missed")
        assert "no reason" in row.profile
        assert Row("b", 3.0).reached is None

    def test_the_worst_of_several_decides(self):
        low, high = Row("low", 0.5, profile="why"), Row("high", 3.0)
        assert worst("all", [low, high], Target(0.85)).ratio == 0.5
        assert worst("all", [low, high], Target(0.85)).profile == "low: why"
        assert worst("all", [low, high], Target(2, at_least=False)).ratio == 3.0
        assert worst("all", [low, high], Target(0.5)).reached is True
        unknown = worst("all", [high, missing("x", Target(1), "gone")], Target(1))
        assert (unknown.ratio, unknown.reached) == (None, None)
        bad = worst("all", [low, missing("x", Target(1), "gone")], Target(1))
        assert (bad.ratio, bad.reached) == (0.5, False)

    def test_the_file_says_what_was_missed(self, tmp_path):
        found = [
            faster("good", one(1.0), Spread(2.0, 1.5, 2.5, 3), Target(2)),
            missing("bad", Target(1.1, at_least=False), "gone"),
        ]
        write(tmp_path / "f.json", found, {"cores": 2})
        read = json.loads((tmp_path / "f.json").read_text())
        good, bad = read["rows"]
        assert (good["ratio"], good["target"], good["reached"]) == (2, 2, True)
        assert good["spread"]["theirs"] == [1.5, 2.5]
        assert (good["medians"], good["unit"]) == ({"ours": 1, "theirs": 2}, "seconds")
        assert (bad["ratio"], bad["reached"], bad["at_least"]) == (None, None, False)
        assert read["environment"] == {"cores": 2}
        assert "| not run |" in targets(found)
        assert "reached" in targets(found)

    def test_figures_are_microseconds(self):
        assert figure(Spread(1.158e-3, 1.1e-3, 1.2e-3, 5)) == "1,158 (1,100–1,200)"
        assert figure(one(12.34e-6)) == "12.3"


class TestExplain:
    USE = {  # noqa: RUF012
        "actor 0": {"step": 2.0, "packing": 0.5, "waiting": 6.0, "total": 10.0},
        "actor 1": {"step": 5.0, "packing": 1.0, "waiting": 2.0, "total": 10.0},
    }

    def test_the_busiest_actor_is_looked_at(self):
        assert parts(10.0, 3.0, self.USE) == {
            "arithmetic": 3.0,
            "autograd or Python": 2.0,
            "pack/unpack": 1.0,
            "waiting": 2.0,
            "rest": 2.0,
        }
        assert sum(parts(10.0, None, self.USE).values()) == 10.0

    def test_without_its_report_only_the_arithmetic_is_known(self):
        assert parts(10.0, 3.0, {}) == {"arithmetic": 3.0, "everything else": 7.0}
        assert parts(10.0, None, {}) == {"everything else": 10.0}

    def test_the_longest_part_comes_first(self):
        said = sentence(10e-6, {"a": 1e-6, "b": 9e-6})
        assert said == "tick 10 µs: b 9, a 1"


def contest(work, **seconds):
    """seconds: by side, a tick."""
    names = {"alone": ALONE, "exchange": EXCHANGE}
    found = Contest(work)
    for side, value in seconds.items():
        name = names.get(side, side)
        found.turns[name] = one(value)
        found.configurations[name] = "a configuration"
        found.parts[name] = {"everything": value}
    return found


class TestVerdicts:
    def test_every_row_of_the_table_is_there(self):
        contests = {
            (1024, 1): contest(
                mlp(1024, 1), trace=1, local=1, centralised=4, arithmetic=0.9, pipelining=5.9
            ),
            (256, 1): contest(mlp(256, 1), trace=1, local=1.1, centralised=2.4, arithmetic=0.5),
            (256, 32): contest(mlp(256, 32), trace=1, local=1.2, centralised=2.3, arithmetic=0.5),
        }
        found = {row.name: row for row in rows(contests)}

        def verdict(start):
            (row,) = [row for name, row in found.items() if name.startswith(start)]
            return row.ratio, row.reached

        best = "against the best centralised"
        assert verdict(f"trace, 2 actors, W=1024 batch 1, {best}") == (4, True)
        assert verdict(f"trace, 2 actors, W=256 batch 1, {best}") == (2.4, False)
        assert verdict(f"trace, 2 actors, W=256 batch 32, {best}") == (2.3, True)
        assert verdict(f"trace, 2 actors, W=1024 batch 32, {best}") == (None, None)
        assert verdict("trace, 2 actors, W=1024 batch 1, against torch") == (5.9, False)
        assert verdict("local against trace, W=256 batch 1") == (pytest.approx(1 / 1.1), True)
        assert verdict("local against trace, all") == (pytest.approx(1 / 1.2), False)
        missed = found[f"trace, 2 actors, W=256 batch 1, {best} configuration"]
        assert "everything" in missed.profile
        assert "arithmetic alone would make 4.80" in missed.profile
        assert {CENTRALISED, PIPELINING, LOCAL, TRACE, ARITHMETIC} >= contests[1024, 1].turns.keys()

    def test_the_best_eager_configuration_is_told_beside_a_compiled_one(self):
        key = (256, 1)
        found = contest(mlp(*key), trace=1, local=1, centralised=2, arithmetic=0.5)
        found.turns[EAGER], found.configurations[EAGER] = one(3), "eager"
        (row,) = [r for r in rows({key: found}) if "best" in r.name and "256 batch 1," in r.name]
        assert (row.ratio, row.reached) == (2, False)
        assert row.configuration["ratio to eager"] == 3
        assert "best eager configuration 3.00" in row.profile

    def test_local_misses_with_one_work_that_misses(self):
        works = {
            key: contest(mlp(*key), trace=1, local=1, centralised=9, pipelining=9, arithmetic=1)
            for key in ((1024, 1), (256, 1), (256, 32), (1024, 32))
        }
        works[256, 32].turns[LOCAL] = one(1.25)
        row = rows(works)[-1]
        assert (row.ratio, row.reached) == (0.8, False)

    def test_the_exchange_is_what_is_not_arithmetic(self):
        found = contest(mlp(128, 32), trace=6, arithmetic=3, exchange=1)
        row = exchange_row(found, 16384)
        assert (row.ratio, row.reached) == (3, True)
        assert "16 KiB" in row.name
        found.turns[TRACE] = one(6.01)
        assert exchange_row(found, 16384).reached is False

    def test_a_step_that_is_faster_than_the_arithmetic_by_hand_is_the_arithmetic(self):
        found = contest(mlp(128, 32), trace=5, arithmetic=6, exchange=1)
        found.parts[TRACE] = {"arithmetic": 6.0, "autograd or Python": -4.0, "waiting": 3.0}
        assert exchange_row(found, 16384).ratio == pytest.approx(3)  # 5 - (6 - 4)
        found.parts[TRACE] = {"arithmetic": 3.0, "autograd or Python": 1.0, "waiting": 1.0}
        found.turns[ARITHMETIC] = one(3)
        assert exchange_row(found, 16384).ratio == 2

    def test_unequal_weights_miss_however_fast(self):
        contests = {
            key: contest(mlp(*key), backprop=1, centralised=2, alone=0.5)
            for key in ((256, 1), (1024, 1))
        }
        equal = {"difference": 1e-15, "moved": 0.1}
        apart = {"difference": 1e-9, "moved": 0.1}
        still = {"difference": 0.0, "moved": 0.0}
        *both, together_ = backprop_rows(contests, dict.fromkeys(contests, equal))
        assert [row.ratio for row in both] == [2, 2]
        assert together_.reached is True
        for wrong in (apart, still):
            found = backprop_rows(contests, {(256, 1): equal, (1024, 1): wrong})
            assert [row.reached for row in found] == [True, False, False]
            assert "differ by" in found[1].profile
        assert BACKPROP in contests[256, 1].turns

    def test_memory_is_that_of_the_worst_actor(self):
        share = claim(chain("c", 2, 3, 4, 5), (0, 1), 1, 0)
        good = Footprint("actor 0", 0, share.total, 0, share)
        bad = Footprint("actor 1", 0, 2 * share.total, 0, share)
        row = memory_row("c", [good, bad])
        assert (row.ratio, row.reached) == (2, False)
        assert memory_row("c", [good]).reached is True

    def test_activations_are_those_of_the_worst_actor(self):
        made = Contest(mlp(8, 4), configurations={PIPELINE: "two blocks"})
        made.activations = [(300, 400.0), (90, 80.0), (0, 0.0)]
        (row,) = activation_rows({"MLP": made})
        assert (row.ratio, row.reached) == (1.125, False)

    def test_the_claim_counted_by_hand(self):
        """3-4-5, batch 2: block 0 (3-4) keeps 3 samples, block 1 (4-5) one; 4 bytes a number."""
        work = chain("c", 2, 3, 4, 5)
        first, last = claim(work, (0, 1), 1, 0), claim(work, (1, 2), 1, 1)
        assert first.weights == first.omega == 4 * (3 * 4 + 4)
        assert first.states == 4 * 2 * (2 * 4)
        assert first.trace == 3 * 4 * 2 * (3 + 4)
        assert (last.in_flight, last.trace) == (1, 4 * 2 * (4 + 5))
        assert first.total == first.without_omega + first.omega


class TestSides:
    def test_they_take_turns(self):
        order = []

        def side(name, values):
            return lambda seconds: (order.append((name, seconds)), next(values))[1]

        found = in_turns({"a": side("a", count(1)), "b": side("b", count(5))}, 3, 0.5)
        assert order == [("a", 0.5), ("b", 0.5)] * 3
        assert found == {"a": Spread(2, 1.5, 2.5, 3), "b": Spread(6, 5.5, 6.5, 3)}

    def test_the_stream_measures_what_follows_its_warm_up(self, monkeypatch):
        """A clock that goes on by a second a look: one look a sample, and one at the start."""
        ticks = count()
        monkeypatch.setattr(works.time, "perf_counter", lambda: float(next(ticks)))
        stream = Cycled(chain("c", 1, 2, 2), seconds=10, warm_up=20)
        drawn = list(stream.samples())
        assert stream.report() == {"timed": 10, "nanoseconds": 10_000_000_000}
        assert pace(stream.report()) == 1.0
        assert len(drawn) == 19 + 10
        assert drawn[0].u is drawn[works.ITEMS].u

    def test_a_stream_that_was_not_read_has_no_pace(self):
        with pytest.raises(ValueError, match="no pace"):
            pace(Cycled(chain("c", 1, 2, 2), 1, 1).report())

    def test_work_crosses_a_pipe_as_json(self):
        work = mlp(8, 2, "float64")
        again = works.Work.of(json.loads(json.dumps(work.plain())))
        assert again == work
        pairs = zip(again.model().parameters(), work.model().parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(again.items()[3][0], work.items()[3][0])

    def test_configurations(self):
        assert len(set(map(str, [*eager(2), *compiled(2)]))) == 8
        assert len(eager(1)) == 3
        assert [str(c) for c in schedules(1, "plain")] == ["GPipe, 1 micro-batch, plain SGD"]
        numbers = [(c.schedule, c.micro_batches) for c in schedules(4, "plain")]
        assert numbers == [("GPipe", 1), ("GPipe", 2), ("GPipe", 4), ("1F1B", 2), ("1F1B", 4)]

    def test_idle_actors_end(self, monkeypatch):
        session, ended = Session(), []
        session.idle = [(ActorOptions(), "a"), (ActorOptions(cpus=2), "b")]
        monkeypatch.setattr("ray.kill", ended.append)
        fresh_actors(session)
        assert (session.idle, sorted(ended)) == ([], ["a", "b"])

    def test_stages_have_three_layers_each(self):
        model = mlp(8, 1).model()
        halves = [half(model, rank) for rank in (0, 1)]
        assert [m for part in halves for m in part] == list(model)
        assert [sum(isinstance(m, torch.nn.Linear) for m in part) for part in halves] == [3, 3]


@pytest.mark.parametrize(
    ("batch", "way"),
    [(1, "matrices"), (1, "vectors"), (3, "matrices"), (1, "C code"), (3, "C code")],
)
def test_the_arithmetic_is_that_of_gradient_descent(batch, way):
    """Steps by hand against autograd and torch.optim.SGD."""
    work = works.Work("c", "chain", batch, (5, 7, 6, 4), "float64")
    model = work.model()
    if way == "C code" and not (built() and gemm(torch.float64)):
        pytest.skip("no C code, or torch's library hides its BLAS")
    moved = copy.deepcopy(model)
    share = Share(work, moved, 0, 3, way=way)
    optimiser = torch.optim.SGD(model.parameters(), works.LR)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.inference_mode():
        for _ in range(5):
            share.step()
    for u, y in work.items()[:5]:
        optimiser.zero_grad()
        cross_entropy(model(u), y).backward()
        optimiser.step()
    for mine, theirs, start in zip(moved.parameters(), model.parameters(), before, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0, atol=1e-14)
        assert (theirs - start).abs().max() > 1e-6


def test_backprop_in_process_equals_sgd():
    found = InProcess().difference(chain("c", 3, 5, 7, 4).plain() | {"dtype": "float64"}, 20)
    assert found["difference"] <= 1e-10
    assert found["moved"] > 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_activations_of_a_pipeline_by_hand(parts):
    """Of 8 rows of float32, block l of three keeps x and relu(W x) of 3 - l parts at most, and a
    number with each."""
    made = Ours(
        chain("a chain", 8, 6, 5, 4, 3),
        Configuration("pipeline", 3, kind="inprocess", microbatches=parts),
    )
    made.run(0.05)
    [(kept, promised)] = made.activations()
    few, rows_of_part = min(3, parts), 8 // parts
    assert kept == 4 * few * (rows_of_part * (6 + 5) + 1) + 4 * 2 * (rows_of_part * (5 + 4) + 1)
    assert promised == 4 * (few * (8 * (6 + 5) + 1) + 2 * (8 * (5 + 4) + 1)) / parts


class TestProcesses:
    @pytest.mark.timeout(60)
    @pytest.mark.slow
    def test_two_peers_exchange_signals_and_end(self, tmp_path):
        peers = [Remote(), Remote()]
        try:
            calls = [{"folder": str(tmp_path), "me": me} for me in (0, 1)]
            together(peers, "exchange.open", calls)
            call = {"size": 64, "ticks": 5, "copy": True}
            assert all(s > 0 for s in together(peers, "exchange.run", [call, call]))
        finally:
            for peer in peers:
                peer.close()
        assert all(peer.ended for peer in peers)

    @pytest.mark.timeout(60)
    def test_they_are_forked_from_one_process_of_one_thread(self):
        remotes = [Remote(), Remote()]
        try:
            assert [remote.call("arithmetic.clear") for remote in remotes] == [None, None]
            parents = {psutil.Process(remote.pid).parent() for remote in remotes}
            (server,) = parents
            assert server.parent() == psutil.Process()
            assert server.num_threads() == 1
        finally:
            for remote in remotes:
                remote.close()

    @pytest.mark.timeout(60)
    def test_a_side_that_fails_is_named(self, capfd):
        remote = Remote()
        try:
            with pytest.raises(RemoteError, match=r"exchange\.open failed"):
                remote.call("exchange.open", folder="/nowhere", me=0)
        finally:
            remote.close()
        assert "ZMQError" in capfd.readouterr().err


@pytest.mark.parametrize("script", ["throughput", "latency", "scaling", "memory"])
class TestArguments:
    def run(self, script, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(BENCH / script), run_name="__main__")
        return exit_.value.code

    def test_help(self, script, monkeypatch, capsys):
        assert self.run(script, monkeypatch, "--help") == 0
        said = capsys.readouterr().out
        assert "--quick" in said
        assert "--json FILE" in said

    @pytest.mark.parametrize("wrong", [("--repeats", "0"), ("--seconds", "-1"), ("--fast",)])
    def test_wrong_arguments(self, script, wrong, monkeypatch, capsys):
        assert self.run(script, monkeypatch, *wrong) == 2
        assert "error" in capsys.readouterr().err


class TestLearning:
    def line(self, side, accuracy, gap, **more):
        kind = {"centralised": Trains.CENTRALISED, "frozen": Trains.FROZEN}
        blank = SummaryLine(
            side=side,
            trains=kind.get(side, Trains.LEVEL),
            memoryless=side in ("local", "heads"),
            point=(),
            seeds=3,
            accuracy=accuracy,
            spread=0.001,
            loss=0.4,
            loss_spread=0.01,
            gap=gap,
            gap_spread=0.002,
            prequential=0.8,
            seconds=1.0,
            chosen={"learning.lr": 0.3},
            tuned=0.88,
        )
        return replace(blank, **more)

    def test_each_condition_is_a_row(self):
        lines = [
            self.line("centralised", 0.877, 0.0),
            self.line("trace", 0.8751, -0.0019, gap_test=PairedTest(-0.0025, -0.0013, 0.01, 3)),
            self.line("heads", 0.8735, -0.0035, gap_test=PairedTest(-0.009, 0.002, 0.2, 20)),
            self.line("frozen", 0.80, -0.077),
        ]
        found = {row.name: row for row in learning.rows({"fashion-5": lines})}
        assert len(found) == 13
        gap = found["Fashion-MNIST, L = 5, batch 32, trace: against backpropagation"]
        assert (gap.ratio, gap.target, gap.reached) == (-0.19, Target(-0.2), True)
        assert gap.configuration["settings"] == "hamdist/recipes/studies/fashion-5.yaml"
        assert gap.configuration["accuracies"]["frozen"] == 0.80
        accuracy = found["Fashion-MNIST, L = 5, batch 32, trace: accuracy"]
        assert (accuracy.ratio, accuracy.reached) == (87.51, True)
        heads = found["random order, heads: against backpropagation"]
        assert (heads.ratio, heads.reached) == (-0.35, False)
        unknown = found["convnet, trace: against backpropagation"]
        assert (unknown.ratio, unknown.reached) == (None, None)
        assert "side 'trace' of study convnet has not run" in unknown.profile
        text = learning.targets(list(found.values()))
        assert "| -0.19 | -0.25 to -0.13 | ≥ -0.2 | reached, not proved |" in text
        assert "| 87.51 % |  | ≥ 87.4 % | reached |" in text
        assert "| -0.35 | -0.90 to +0.20 | ≥ -0.3 | **missed**, within the noise |" in text
        assert "| – |  | ≥ -0.5 | not run |" in text
        assert found["random order, heads: against backpropagation"].configuration[
            "95 % interval"
        ] == pytest.approx([-0.9, 0.2])
        test = PairedTest(-0.001, 0.003, 0.1, 9)
        sure = learning.rows({"fading-20": [self.line("local", 0.8, 0.001, gap_test=test)]})[6]
        assert "| +0.10 | -0.10 to +0.30 | ≥ -0.3 | reached |" in learning.targets([sure])

    def test_a_failed_seed_is_a_missed_target(self):
        failed = self.line("local", None, None, notes=("seed 2: it blew up",))
        row = next(r for r in learning.rows({"fading-20": [failed]}) if "S = 20" in r.name)
        assert (row.ratio, row.reached, row.profile) == (None, False, "seed 2: it blew up")
        assert "**missed**" in learning.targets([row])

    def test_the_targets_are_those_of_shipped_studies(self):
        for wanted in learning.WANTED:
            study = load_study(wanted.study)
            assert study.seeds >= (learning.MANY if wanted.gap >= -learning.CLOSE else 3)
            assert wanted.side in study.sides
            check(study, chosen=True)
        assert {*learning.quick("fading-10", load_study("fading-10")).sides} == {
            "centralised",
            "local, retrospective",
            "heads",
            "frozen",
        }
        assert set(learning.STUDIES) == {wanted.study for wanted in learning.WANTED}

    def test_frozen_stands_beside_what_keeps_nothing(self):
        local, frozen = self.line("local", 0.8, 0.0), self.line("frozen", 0.7, -0.1)
        assert learning.frozen_is_there([local, frozen])
        assert not learning.frozen_is_there([local])
        assert learning.frozen_is_there([self.line("trace", 0.8, 0.0)])

    @pytest.mark.parametrize("how", ["--quick", "--full"])
    def test_the_script(self, how, tmp_path, monkeypatch, capsys):
        """With made-up runs: 87.6 % for centralised training, 87.5 % for all else."""

        def work(job):
            accuracy = 0.876 if job.trains is Trains.CENTRALISED else 0.875
            return RunRecord(
                key=job.key,
                trains=job.trains.value,
                seed=job.settings.seed,
                rows=1,
                accuracy=accuracy,
                loss=1.0,
                prequential=0.8,
                seconds=1.0,
                smoothness=None,
                staleness=0,
                failure=None,
                warnings=(),
                curve=(),
                drifts=(),
                settings={},
            )

        monkeypatch.setattr(grid_run, "work", work)
        out = tmp_path / "json"
        given = [how, "--json", str(out), "--out", str(tmp_path), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["learning", *given])
        runpy.run_path(str(BENCH / "learning"), run_name="__main__")
        read = json.loads(out.read_text())
        assert len(read["rows"]) == 13
        reached = [row["reached"] for row in read["rows"]]
        assert reached.count(True) == (11 if how == "--quick" else 13)
        assert set(read["rows"][0]) >= {"name", "ratio", "target", "reached"}
        assert read["rows"][0]["ratio"] == pytest.approx(-0.1)
        assert "| what | found | 95 % | target |" in capsys.readouterr().out
        text = (tmp_path / "learning.md").read_text()
        assert "| frozen | 87.50 ± 0.00 | -0.10 ± 0.00 | -0.10 to -0.10 |" in text
        assert (tmp_path / "fading-20" / "study.html").is_file()
