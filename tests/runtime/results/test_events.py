"""Events of a run: the same from both engines, complete, readable again, and cheap."""

from __future__ import annotations

import json
import logging
import math
import time

import pytest
import torch
from torch import nn

import hamdist
from hamdist.config import Settings
from hamdist.dynamics.objective.prequential import Window
from hamdist.runtime.results.events import (
    NetworkPlaced,
    RunEvent,
    RunFinished,
    WindowFull,
    from_values,
    read_events,
)
from hamdist.runtime.results.measured import EdgeCounts, ProcessSample, summed
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.results.run_events import ProgressEvents, ProgressPace, RunEvents, line_of
from hamdist.runtime.results.scores import evaluate
from hamdist.study.report.save import alignment_figures


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        u = torch.randn(4, 6, generator=generator)
        yield u, u[:, :3].argmax(1)


def events_of_run(level, **engine):
    reports, turn = [], ProgressEvents(level, 3)

    def note(progress):
        assert progress.rows == 4 * progress.samples
        reports.extend(turn(progress))

    result = hamdist.train(
        make(),
        list(batches()),
        level=level,
        metrics={"window": 10, "alignment": 20},
        learning={"lr": 0.1},
        partition={"blocks": 3} if level != "group" else {},
        engine=engine,
        on_progress=note,
    )
    return reports, result


def by_name(events, name):
    return [event for event in events if event.name == name]


@pytest.mark.parametrize("level", ["trace", "local", "heads", "backprop"])
def test_events_say_what_the_result_says(level):
    events, result = events_of_run(level, kind="inprocess")
    [network] = by_name(events, "network")
    assert [b.name for b in network.blocks] == list(result.blocks)
    assert sum(b.parameters for b in network.blocks) == sum(p.numel() for p in make().parameters())
    windows = by_name(events, "window")
    [readout] = result.windows
    expected = [(w.first, w.last, w.mean_loss, w.accuracy) for w in result.windows[readout]]
    assert [(w.first, w.last, w.loss, w.accuracy) for w in windows] == expected
    assert {w.readout for w in windows} == {readout}


def test_norms_and_counts_are_those_of_the_final_state():
    """Oracle: the tensors of the result; the counts of signals by the schedule (4 a sample)."""
    from hamdist.runtime.engines import worker_report

    last = {}

    def note(progress):
        last.update(progress.actors)

    pause, worker_report.PAUSE_SECONDS = worker_report.PAUSE_SECONDS, 0.0
    try:
        share, worker_report.SHARE = worker_report.SHARE, math.inf
        result = hamdist.train(
            make(), list(batches()), level="trace", engine={"kind": "inprocess"}, on_progress=note
        )
    finally:
        worker_report.PAUSE_SECONDS, worker_report.SHARE = pause, share
    edges = summed(list(last.values()))
    assert {name: e.bytes for name, e in edges.items() if e.bytes} == result.bytes_per_edge
    assert all(e.queued <= 2 for e in edges.values())  # the run is over: the stream's end is left


@pytest.mark.parametrize("level", ["trace", "local"])
def test_omega_norms_do_not_change_a_bit(level):
    """A norm is read in every step here, and in none there."""
    from hamdist.runtime.engines import inprocess, worker_report

    def weights(on_progress):
        result = hamdist.train(
            make(),
            list(batches()),
            level=level,
            learning={"lr": 0.1, "momentum": 0.5},
            locality={"order": "simultaneous"} if level == "local" else {},
            engine={"kind": "inprocess"},
            on_progress=on_progress,
        )
        return result, [p.detach().clone() for p in result.model.parameters()]

    seen = []
    old = worker_report.PAUSE_SECONDS, worker_report.SHARE, inprocess.PROGRESS_SECONDS
    worker_report.PAUSE_SECONDS, worker_report.SHARE, inprocess.PROGRESS_SECONDS = (
        0.0,
        math.inf,
        0.0,
    )
    try:
        result, watched = weights(lambda progress: seen.append(progress))
    finally:
        worker_report.PAUSE_SECONDS, worker_report.SHARE, inprocess.PROGRESS_SECONDS = old
    _, plain = weights(None)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    norms = seen[-1].actors["driver"].norms
    for name, block in result.blocks.items():
        for what, tensors in (("omega", block.omega), ("theta", block.theta)):
            flat = [t.double().flatten() for t in tensors.values()]
            expected = float(torch.cat(flat).norm()) if flat else 0.0
            assert getattr(norms[name], what) == pytest.approx(expected, rel=1e-5), (name, what)
        if block.h is not None:
            assert norms[name].h == pytest.approx(float(block.h.norm()), rel=1e-5)
            assert norms[name].z == pytest.approx(float(block.z.norm()), rel=1e-5)
            zeros = [not any(row[i] for row in block.h) for i in range(block.h.shape[1])]
            assert norms[name].dead == pytest.approx(sum(zeros) / len(zeros))


@pytest.mark.parametrize(("level", "lr", "least", "most"), [
    ("backprop", 0.5, 1 - 1e-5, 1.0), ("trace", 1e-4, 1 - 1e-5, 1.0), ("trace", 0.5, 0.0, 0.999),
])  # fmt: skip
def test_updates_are_compared_with_backpropagation(level, lr, least, most, monkeypatch):
    """The oracle: at level `backprop` both are equal, and where the weights hardly move."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    seen = []
    hamdist.train(
        make(),
        list(batches()),
        level=level,
        learning={"lr": lr},
        metrics={"alignment": 5},
        engine={"kind": "inprocess"},
        trackers=[seen.append],
    )
    events = by_name(seen, "alignment")
    assert [event.sample for event in events] == list(range(*{
        "backprop": (5, 40, 5), "trace": (10, 35, 10)}[level]))  # fmt: skip
    cosines = [value for event in events for value in event.cosines.values()]
    assert len(cosines) == 3 * len(events)
    assert least <= min(cosines) <= most + 1e-6, cosines
    again = [from_values(json.loads(event.to_line())) for event in events]
    assert again == events


def test_the_last_measurement_is_of_the_end():
    """Of a run of less than a second, too. Oracles: the weights of the result, and all samples."""
    seen, own = [], {"level": "trace", "learning": {"lr": 0.1}, "engine": {"kind": "inprocess"}}
    result = hamdist.train(make(), list(batches()), trackers=[seen.append], **own)
    last = by_name(seen, "blocks")[-1]
    for name, block in result.blocks.items():
        theta = math.sqrt(sum(float(t.square().sum()) for t in block.theta.values()))
        assert last.norms[name].theta == pytest.approx(theta, rel=1e-6), name
    assert sum(last.staleness["block0"].values()) == 40
    assert by_name(seen, "progress")[-1].samples == 40


def test_updates_by_several_samples_are_compared_at_the_weights_that_these_met(monkeypatch):
    """Oracle: at level `backprop` both are equal; the step before may still wait for its turn."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    own = {"locality": {"accumulate": 4}, "learning": {"lr": 0.5}, "engine": {"kind": "inprocess"}}
    given = {"metrics": {"alignment": 4}, "dtype": "float64", **own}
    seen = []
    hamdist.train(make(), list(batches()), level="backprop", trackers=[seen.append], **given)
    cosines = [c for event in by_name(seen, "alignment") for c in event.cosines.values()]
    assert len(cosines) > 3
    assert min(cosines) > 1 - 1e-12


def test_frozen_blocks_have_no_alignment_and_hold_up_none(monkeypatch):
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    seen, model = [], make()
    model[0].requires_grad_(False)
    own = {"learning": {"lr": 1e-4}, "metrics": {"alignment": 10}, "engine": {"kind": "inprocess"}}
    hamdist.train(model, list(batches()), level="trace", trackers=[seen.append], **own)
    events = by_name(seen, "alignment")
    assert [event.sample for event in events] == [10, 20, 30]
    assert {name for event in events for name in event.cosines} == {"block1", "block2"}
    learned = {block.name: block.parameters for block in by_name(seen, "network")[0].blocks}
    assert learned == {"block0": 0, "block1": 72, "block2": 27}
    assert min(min(event.cosines.values()) for event in events) > 1 - 1e-5


def test_shared_weights_are_parameters_of_their_owner_alone():
    model, seen = make(), []
    model[2].weight = nn.Parameter(model[2].weight[:, :6].clone())
    model[2].in_features, model[0].weight = 6, model[2].weight
    chain = nn.Sequential(model[0], nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), model[2], model[4])
    own = {"partition": {"blocks": 3}, "engine": {"kind": "inprocess"}, "trackers": [seen.append]}
    result = hamdist.train(chain, list(batches()), level="trace", **own)
    blocks = by_name(seen, "network")[0].blocks
    assert sum(b.parameters for b in blocks) == sum(p.numel() for p in result.model.parameters())
    assert len(blocks) == 3


def test_feedback_matrices_are_compared_with_weights(monkeypatch):
    """The oracle: B = b sign(W) of every layer but the first, so cos = sum |W| / (|W| sqrt(N))."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    seen, model = [], make()
    own = {"learning": {"lr": 0.0}, "metrics": {"alignment": 10}, "engine": {"kind": "inprocess"}}
    rules = {"*": {"name": "sign-symmetry", "magnitude": "uniform"}}
    result = hamdist.train(
        model, list(batches()), level="trace", rules=rules, trackers=[seen.append], **own
    )
    events = by_name(seen, "alignment")
    for name in ("block1", "block2"):
        (W,) = [w for w in result.blocks[name].theta.values() if w.dim() > 1]
        expected = float(W.abs().sum() / W.norm()) / W.numel() ** 0.5
        assert [event.feedback[name] for event in events] == pytest.approx([expected] * len(events))
    assert len(events) > 1
    assert all("block0" not in event.feedback for event in events)
    figures = alignment_figures(events, {(events[0].level, events[0].seed)})
    assert [figure.title.partition(":")[0] for figure in figures] == [
        "Feedback matrices and weights"
    ]
    assert [curve.label for curve in figures[0].curves] == ["block1", "block2"]
    assert list(figures[0].curves[0].x) == [event.sample for event in events]


def test_alignment_of_sequences_is_refused():
    with pytest.raises(hamdist.HamdistError, match=r"metrics\.alignment"):
        hamdist.train(
            make(), list(batches()), level="pipeline", metrics={"alignment": 5},
            locality={"microbatches": 2},
        )  # fmt: skip


def test_staleness_and_updates_are_measured(monkeypatch):
    """Oracles: 2 (D - l) updates by the schedule (semantics.md), fewer at first; and lr |g|, which
    stays nearly the same for one batch and small steps."""
    from hamdist.runtime.engines import inprocess, worker_report

    monkeypatch.setattr(inprocess, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(worker_report, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(worker_report, "SHARE", math.inf)
    monkeypatch.setattr("hamdist.runtime.results.run_events.ProgressPace.due", lambda *_: True)
    seen, lr = [], 1e-3
    hamdist.train(
        make(),
        [next(batches())] * 40,
        level="trace",
        learning={"lr": lr},
        engine={"kind": "inprocess"},
        trackers=[seen.append],
    )
    last = by_name(seen, "blocks")[-1]
    assert last.staleness == {
        "block0": {0: 1, 1: 1, 2: 1, 3: 1, 4: 36}, "block1": {0: 1, 1: 1, 2: 38}
    }  # fmt: skip
    assert from_values(json.loads(last.to_line())).staleness == last.staleness
    for name, norms in last.norms.items():
        assert norms.update == pytest.approx(lr * norms.omega, rel=0.05), name


@pytest.mark.ray
def test_both_engines_tell_the_same(session, monkeypatch):
    monkeypatch.setattr("hamdist.runtime.results.run_events.ProgressPace.due", lambda *_: True)
    alone, _ = events_of_run("trace", kind="inprocess")
    apart, result = events_of_run("trace", kind="ray", actors=2)
    told = [(w.readout, w.first, w.last, w.loss, w.accuracy) for w in by_name(alone, "window")]
    assert told == [
        (w.readout, w.first, w.last, w.loss, w.accuracy) for w in by_name(apart, "window")
    ]
    [one], [two] = by_name(alone, "network"), by_name(apart, "network")
    assert (one.blocks, one.edges, one.staleness) == (two.blocks, two.edges, two.staleness)
    assert [actor.blocks for actor in two.actors] == result.placement
    [exact], [same] = by_name(alone, "alignment"), by_name(apart, "alignment")
    assert (exact.sample, set(exact.cosines)) == (20, {"block0", "block1", "block2"})
    assert (same.sample, same.cosines) == (20, exact.cosines)
    ends = [by_name(events, "blocks")[-1].norms for events in (alone, apart)]
    norms = [{name: n._replace(update=None) for name, n in end.items()} for end in ends]
    assert norms[0] == norms[1]
    edges = by_name(apart, "edges")[-1].edges
    assert {name: e.bytes for name, e in edges.items() if e.bytes} == result.bytes_per_edge
    assert any(e.waited > 0 for e in edges.values())
    last = by_name(apart, "actors")[-1]
    assert set(last.seconds) == {"actor 0", "actor 1", "driver"}  # (a list is drawn in the driver)
    assert all(s["total"] >= s["step"] + s["waiting"] for s in last.seconds.values())


def test_every_event_is_read_back_and_strange_lines_are_passed_over():
    events, _ = events_of_run("trace", kind="inprocess")
    lines = [event.to_line() for event in events]
    again = list(read_events([*lines, "{cut", "[]", '{"event": "of-tomorrow"}', ""]))
    assert [event.to_line() for event in again] == lines
    assert isinstance(again[-1], RunEvent.by_name[again[-1].name])
    assert any(isinstance(event, NetworkPlaced) for event in again)
    more = {**events[-1].as_json(), "of_tomorrow": 1}
    assert from_values(more).to_line() == lines[-1]


def test_numbers_that_are_not_finite_are_null():
    window = Window(0, 9, 10, math.inf, 0, 0)
    values = WindowFull.of(window, "out", 1.0).as_json()
    assert values["loss"] is None
    assert values["accuracy"] is None


def test_signals_under_way_are_never_negative():
    samples = [ProcessSample(edges={"a->b": EdgeCounts(8, n, 0.5)}) for n in (3, -5)]
    assert summed(samples) == {"a->b": EdgeCounts(16, 0, 1.0)}
    assert summed(samples[:1]) == {"a->b": EdgeCounts(8, 3, 0.5)}


def test_warnings_snapshots_and_losses_are_told_once():
    turn = ProgressEvents("trace", 0)
    first = Progress(0.1, 1, None, [], [], warnings=["slow"], snapshots=["s/1"])
    second = Progress(0.2, 1, None, [], [], warnings=["slow", "full"], snapshots=["s/1", "s/2"])
    assert [e.name for e in turn(first)] == ["warning", "snapshot", "progress"]
    assert [e.as_json().get("text", e.as_json().get("path")) for e in turn(second)] == [
        "full",
        "s/2",
    ]


def test_pace_is_slower_for_many_blocks():
    few, many = ProgressPace(), ProgressPace()
    seconds = range(4000)
    assert sum(few.due(float(s), 10) for s in seconds) > 2500
    assert 240 < sum(many.due(float(s), 1000) for s in seconds) < 400


@pytest.mark.slow
def test_events_cost_less_than_a_hundredth(tmp_path):
    """Same run with and without an events file, by turns; the least of four each."""
    from hamdist.runtime.results.events import RunBegun
    from hamdist.study.shared.result_folder import ResultFolder

    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)), nn.Linear(128, 10))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(32, 128, generator=generator) for _ in range(50)]
    data = [(u, u[:, :10].argmax(1)) for u in rows] * 30

    def seconds(on_progress):
        begin = time.process_time()
        hamdist.train(
            model,
            data,
            level="trace",
            metrics={"window": 50},
            learning={"lr": 0.001},
            engine={"kind": "inprocess"},
            on_progress=on_progress,
        )
        return time.process_time() - begin

    with ResultFolder(tmp_path / "out", say=print) as folder:
        note = folder.watch(RunBegun(title="", engine="inprocess"), lambda _: None)
        pairs = [(seconds(None), seconds(note)) for _ in range(4)]
    plain, watched = (min(times) for times in zip(*pairs, strict=True))
    told = f"plain {plain:.3f} s, with events {watched:.3f} s: {watched / plain - 1:+.2%}"
    assert watched < 1.03 * plain, told  # (a hundredth, and the noise of a shared machine)


def test_a_live_run_tells_changes_and_evaluations(tmp_path):
    """What was said to the run is the oracle, and its own result."""
    model, heard = nn.Linear(6, 3), []
    rows = [(u, u[:, :3].argmax(1)) for u in torch.randn(6, 4, 6, generator=torch.Generator())]
    x, y = rows[0]
    begin = {
        "level": "trace",
        "classes": 3,
        "engine": {"kind": "inprocess"},
        "metrics": {"window": 2},
    }
    with hamdist.start(
        model, example=rows[0], out=tmp_path / "o", trackers=[heard.append], **begin
    ) as run:
        for u, target in rows[:4]:
            run.feed(u, target)
        run.set(learning={"lr": 0.5})
        run.settle()
        scores = run.evaluate(x, y)
    on_disk = list(read_events((tmp_path / "o" / "events.jsonl").read_text().splitlines()))
    assert [e.as_json() for e in on_disk[1:]] == [e.as_json() for e in heard]
    assert [e.name for e in (on_disk[0], heard[0], *heard[-2:])] == [
        "started", "run", "finished", "ended",
    ]  # fmt: skip
    [change], [evaluation] = by_name(heard, "settings"), by_name(heard, "evaluation")
    assert (change.changed, change.sample) == ({"learning.lr": 0.5}, 4)
    assert (evaluation.samples, evaluation.loss) == (4, scores.loss)
    assert evaluation.accuracy == scores.accuracy
    assert sum(window.samples for window in by_name(heard, "window")) == 4
    assert by_name(heard, "finished")[0].samples == run.result.samples


def test_an_evaluation_is_told_of_the_samples_that_its_weights_had_seen(monkeypatch):
    """Others feed the run while it is scored."""
    heard, u, y = [], torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    own = {"level": "backprop", "engine": {"kind": "inprocess"}, "trackers": [heard.append]}
    with hamdist.start(nn.Linear(6, 3), example=(u, y), classes=3, **own) as run:
        run.feed(u, y)

        def meanwhile(*arguments, **more):
            run.feed(u, y)
            return evaluate(*arguments, **more)

        monkeypatch.setattr("hamdist.runtime.live.run.evaluate", meanwhile)
        run.evaluate(u, y)
        assert run.status().answered == 2
    assert [event.samples for event in by_name(heard, "evaluation")] == [1]


def test_callbacks_and_trackers_of_train_hear_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = []
    x = torch.randn(8, 6, generator=torch.Generator())
    callback = hamdist.Evaluation(x, x[:, :3].argmax(1), every=2)
    more = {"callbacks": [callback], "trackers": [heard.append, "csv"]}
    data = [(x, x[:, :3].argmax(1))] * 4
    hamdist.train(
        nn.Linear(6, 3), data, level="trace", classes=3, engine={"kind": "inprocess"}, **more
    )
    found = [event.loss for event in by_name(heard, "evaluation")]
    assert len(found) == 2  # after the second sample and, behind the last feed, the fourth
    [file] = tmp_path.glob("results/*/metrics.csv")
    lines = [line.split(",") for line in file.read_text().splitlines()]
    scored = [line for line in lines if line[1] == "held_out/loss"]
    assert [float(line[2]) for line in scored] == found
    at = [event.samples for event in by_name(heard, "evaluation")]
    assert [int(line[3]) for line in scored] == at
    assert at[-1] == 4


def test_a_run_that_went_on_tells_what_it_has_done_itself():
    facts = {"ticks": 0, "seconds": 2.0, "bytes_per_edge": {}, "peak_memory": {}}
    result = RunResult(model=nn.Identity(), blocks={}, windows={}, samples=40, resumed=30, **facts)
    assert repr(result) == "RunResult(10 samples in 2 s; gone on from sample 30)"
    assert line_of(RunFinished.of(result, None)) == "finished: 10 samples in 2.0 s"


def test_a_sample_in_micro_batches_counts_once(monkeypatch):
    monkeypatch.setattr("hamdist.runtime.results.run_events.ProgressPace.due", lambda *_: True)
    seen, parts = [], {"microbatches": 2}
    own = {"level": "pipeline", "locality": parts, "engine": {"kind": "inprocess"}}
    hamdist.train(make(), list(batches()), trackers=[seen.append], **own)
    assert by_name(seen, "blocks")[-1].staleness == {"block0": {0: 40}, "block1": {0: 40}}


def test_the_end_of_train_is_told_and_why():
    heard = []
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))] * 3
    own = {
        "level": "trace",
        "classes": 3,
        "engine": {"kind": "inprocess"},
        "trackers": [heard.append],
    }
    result = hamdist.train(nn.Linear(6, 3), data, **own)
    assert [e.name for e in heard[-2:]] == ["finished", "ended"]
    assert heard[-2].seconds == result.seconds
    with pytest.raises(hamdist.HamdistError, match="finite") as caught:
        hamdist.train(
            nn.Linear(6, 3), [(u * 1e20, y) for u, y in data], learning={"lr": 1e20}, **own
        )
    assert heard[-1].error == str(caught.value)
    assert heard[-2].failure == heard[-1].error


def test_what_happens_is_logged_with_levels(caplog):
    settings = Settings(level="trace", name="tiny")
    logger = logging.getLogger("hamdist.run")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "hamdist.run"):
            note = RunEvents(settings, [], 4).over(None)
            note(Progress(0.1, 1, None, [], [], warnings=["slow"], snapshots=["s/1"]))
        with caplog.at_level(logging.WARNING, "hamdist.run"):
            assert RunEvents(settings, [], 4).over(None) is None  # (nothing is worked out)
    finally:
        logger.removeHandler(caplog.handler)
    logged = {(record.levelname, record.message) for record in caplog.records}
    assert logged == {
        ("INFO", "run: tiny"),
        ("WARNING", "warning: slow"),
        ("INFO", "snapshot: s/1"),
    }


def test_drops_of_the_stream_are_told():
    sample = ProcessSample(stream={"dropped": 3})
    progress = Progress(0.1, 1, None, [], [], actors={"driver": sample})
    assert ProgressEvents("trace", 0)(progress)[0].as_json()["stream"] == {"dropped": 3}
