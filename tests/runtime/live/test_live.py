"""A run that one can talk to: answers belong to their questions, labels may come late, and what was
said can be repeated to the bit."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults.talk import SAID, kill_an_actor, talk
from torch import nn

import hamdist
from hamdist.errors import SettingsError, StreamError
from hamdist.streams.live import LiveStream
from hamdist.streams.sample import Sample, SampleSpec

LEVELS = ["local", "group", "delay-free", "trace", "heads", "reversible", "backprop", "pipeline"]


def identity(level, n=4):
    layers = [nn.Linear(n, n) for _ in range(4)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(torch.eye(n))
            layer.bias.zero_()
    if level == "reversible":  # (a, b) -> (b, a), twice
        layers[1:3] = [hamdist.Coupling(nn.Linear(n // 2, n // 2), 0.0) for _ in range(2)]
    return nn.Sequential(*layers)


def network(level="trace", seed=0):
    torch.manual_seed(seed)
    if level == "reversible":
        middle = [hamdist.Coupling(nn.Linear(4, 4)) for _ in range(2)]
        return nn.Sequential(nn.Linear(4, 8), *middle, nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def samples(number, seed=1, batch=2):
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(number):
        u = torch.randn(batch, 4, generator=drawn)
        yield u, (u[:, :3].argmax(1))


def options(level, **more):
    return {"level": level, "learning": {"lr": 0.1}, "idle": None, **more}


def start(level, model=None, **more):
    example = next(iter(samples(1)))
    model = network(level) if model is None else model
    return hamdist.start(model, example=example, classes=3, **options(level, **more))


def equal(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("level", [*LEVELS, "bptt"])
def test_every_answer_belongs_to_its_question(level):
    x = torch.zeros(16, 4)
    settings = options(level, loss="mse")
    with hamdist.start(identity(level), example=(x, x), **settings) as run:
        for k in range(5):  # asked and answered
            u = torch.randn(16, 4)
            answer = run.predict(u, end=level == "bptt")
            assert answer.number == k
            assert torch.equal(answer.prediction, u)
        questions = {run.feed(u, end=level == "bptt"): u for u in torch.randn(4, 16, 4)}
        answers = dict(run.predictions())
        assert list(answers) == list(questions) == [5, 6, 7, 8]
        assert all(torch.equal(answers[n].prediction, u) for n, u in questions.items())
    assert run.result.samples == 9


@pytest.mark.parametrize("level", [*LEVELS, "bptt"])
def test_what_is_fed_is_learned_as_in_training(level):
    ends = level == "bptt"
    items = [{"u": u, "y": y, "end": ends and k % 3 == 2} for k, (u, y) in enumerate(samples(12))]
    settings = options(level)
    settings.pop("idle")
    trained = hamdist.train(network(level), items, classes=3, **settings)
    with start(level) as run:
        for item in items:
            run.feed(**item)
    assert equal(run.result, trained)
    assert run.result.windows == trained.windows


def test_a_label_that_comes_later_is_learned_then():
    """As progressive validation with delay: by hand, a sample is predicted when it comes, learned
    when its label comes, and scored by its prediction of then."""
    model, delay = network(), 3
    said = list(samples(20))
    by_hand = network()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    losses, right = [], 0
    predictions = []
    for n in range(20 + delay):
        if n < 20:
            predictions.append(by_hand(said[n][0]).detach())
        if n >= delay:
            u, y = said[n - delay]
            losses.append(nn.functional.cross_entropy(predictions[n - delay], y))
            right += int((predictions[n - delay].argmax(1) == y).sum())
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(u), y).backward()
            optimizer.step()
    with start("backprop", model, metrics={"window": 1000}) as run:
        for n in range(20 + delay):
            if n < 20:
                answer = run.predict(said[n][0]).prediction
                torch.testing.assert_close(answer, predictions[n])
            if n >= delay:
                run.teach(n - delay, said[n - delay][1])
    (window,) = run.result.windows[next(iter(run.result.windows))]
    assert (window.samples, window.correct, window.first, window.last) == (20, right, 0, 19)
    assert window.loss == pytest.approx(float(sum(losses)), rel=1e-5)
    for name, weight in run.result.model.state_dict().items():
        torch.testing.assert_close(weight, by_hand.state_dict()[name])


def test_labels_come_in_any_order_or_never():
    a, b, c = samples(3)
    with start("backprop") as run:
        numbers = [run.feed(u) for u, _ in (a, b, c)]
        run.teach(numbers[2], c[1])
        run.teach(numbers[0], a[1])
        with pytest.raises(StreamError, match="sample 0 waits for no label"):
            run.teach(0, a[1])
        with pytest.raises(StreamError, match="sample 7 waits for no label"):
            run.teach(7, a[1])
        with pytest.raises(StreamError, match="batch 1"):
            run.teach(1, b[1][:1])
    with start("backprop") as other:
        other.feed(*c)
        other.feed(*a)
    assert equal(run.result, other.result)
    with (
        start("local") as held,
        pytest.raises(StreamError, match="teach at level 'local'"),
    ):
        held.teach(held.feed(a[0]), a[1])


@pytest.mark.parametrize("level", ["backprop", "heads", "pipeline", "bptt"])
def test_asking_changes_nothing_that_is_learned(level):
    """At levels that have a sample alone in the network, or learn as it passes, to the bit."""
    said, ends = list(samples(6)), level == "bptt"
    with start(level) as run:
        for u, y in said:
            run.feed(u, y, end=ends)
            run.predict(u + 1, end=ends)
            run.evaluate(u, y)
            run.settle()
    with start(level) as quiet:
        for u, y in said:
            quiet.feed(u, y, end=ends)
    assert equal(run.result, quiet.result)


def test_a_question_after_a_silence_changes_nothing_either():
    said = list(samples(6))
    runs = []
    for asks in (True, False):
        with start("trace") as run:
            for u, y in said:
                run.feed(u, y)
                run.settle()
                if asks:
                    run.predict(u + 1)
                    run.settle()
        runs.append(run.result)
    assert equal(*runs)


def test_the_step_size_changes_from_the_next_sample_on():
    """At speed inf as by hand: whose gradient is whose sample's."""
    said = list(samples(8))
    by_hand = network()
    for n, (u, y) in enumerate(said):
        by_hand.zero_grad()
        nn.functional.cross_entropy(by_hand(u), y).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= (0.1 if n < 4 else 0.02) * p.grad
    with start("backprop") as run:
        for n, item in enumerate(said):
            if n == 4:
                run.set(learning={"lr": 0.02})
            run.feed(*item)
    for name, weight in run.result.model.state_dict().items():
        torch.testing.assert_close(weight, by_hand.state_dict()[name])


def test_weights_are_those_of_one_moment():
    said = list(samples(5))
    with start("trace") as run:
        for item in said:
            run.feed(*item)
        run.settle()
        weights, scores = run.weights(), run.evaluate(*said[0])
        snapshot_free = run.status()
    assert weights.keys() == network().state_dict().keys()
    assert all(torch.equal(w, run.result.model.state_dict()[k]) for k, w in weights.items())
    loss = nn.functional.cross_entropy(run.result.model(said[0][0]), said[0][1])
    assert scores.loss == pytest.approx(float(loss))
    assert (snapshot_free.fed, snapshot_free.answered, snapshot_free.waiting) == (5, 5, 0)


class Calls(nn.Module):
    """A loss that grows with its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, y, target):
        self.calls += 1
        return self.calls * nn.functional.cross_entropy(y, target)


def test_an_evaluation_leaves_the_loss_as_it_was():
    item, loss = next(iter(samples(1))), Calls()
    with start("trace", loss=loss) as run:
        assert run.evaluate(*item) == run.evaluate(*item)
    assert loss.calls == 0


def test_a_pause_holds_what_is_fed():
    said = list(samples(4))
    with start("trace") as run:
        run.feed(*said[0])
        run.pause()
        numbers = [run.feed(u) for u, _ in said[1:]]
        assert run.status().waiting == 3
        with pytest.raises(StreamError, match="paused"):
            run.predict(said[0][0])
        run.go_on()
        assert [n for n, _ in run.predictions()] == [0, *numbers]


def test_bad_input_is_refused_and_nothing_of_it_stays():
    u, y = next(iter(samples(1)))
    with start("trace") as run:
        for wrong, what in (
            (lambda: run.feed(u[:, :2], y), "shape"),
            (lambda: run.feed(u / 0, y), "u"),
            (lambda: run.feed(u, y + 7), "classes"),
            (lambda: run.feed([1, 2]), "list"),
            (lambda: run.feed(u.double()), "float64"),
        ):
            with pytest.raises(StreamError, match=what):
                wrong()
        for learning in ({}, {"lr": -1}, {"lr": "fast"}, {"momentum": 0.5}):
            with pytest.raises(SettingsError, match="lr"):
                run.set(learning=learning)
        with pytest.raises(SettingsError, match="give out="):
            run.snapshot()
        assert run.feed(u, y) == 0
    with pytest.raises(StreamError, match="stopped"):
        run.feed(u, y)
    with pytest.raises(SettingsError, match="level 'auto'"):
        start("auto")


def test_a_run_that_diverges_says_so_where_somebody_talks():
    u, y = next(iter(samples(1)))
    run = start("backprop")
    run.set(learning={"lr": 1e30})
    with pytest.raises(hamdist.HamdistError, match="finite"):
        [run.feed(u * 1e10, y) for _ in range(20)]
    with pytest.raises(hamdist.HamdistError, match="finite"):
        run.stop()


OFTEN = dict.fromkeys(SAID, 1)


def sizes():
    """Bytes of all that Python's collector knows, containers and tensors, and of what is where."""
    gc.collect()
    tracked = [one for one in gc.get_objects() if type(one) is not torch.TypedStorage]  # (warns)
    tensors = sum(
        t.nbytes for t in tracked if type(t) is torch.Tensor and t.layout == torch.strided
    )
    return sum(map(sys.getsizeof, tracked)) + tensors


SLOW = [pytest.param(level, marks=pytest.mark.slow) for level in ("heads", "local", "bptt")]


@pytest.mark.parametrize("level", ["trace", *SLOW])
@pytest.mark.slow
def test_an_endless_run_takes_constant_memory(level, tmp_path):
    """Whatever is said to it: 3,000 things more take less room than two pointers each."""
    more = {"patience": 8, "metrics": {"window": 2, "limit": 4}, "out": tmp_path}
    said = {n: one for n, one in SAID.items() if level != "local" or n != "teach"}

    def least(things):
        """Say so many things; return the least room at ten moments (up to 64 losses wait)."""
        rooms, seed = [], things
        talk(run, samples(things), seed, said=said, sequences=level == "bptt", most=8)
        for k in range(10):
            talk(run, samples(11), seed + k, said=said, sequences=level == "bptt", most=8)
            rooms.append(sizes())
        return min(rooms)

    with start(level, **more, snapshots={"seconds": 1e9}) as run:
        before, files = least(1000), len(os.listdir("/proc/self/fd"))
        assert least(3000) - before < 3000 * 16
        assert len(os.listdir("/proc/self/fd")) == files
    (windows,) = run.result.windows.values()
    assert len(windows) <= 4
    assert sum(w.samples for w in windows) > 1000
    assert windows[-2].samples == 2  # they roll: the latest are as short as they were


@pytest.mark.parametrize("level", ["trace", "pipeline"])
def test_a_run_is_repeated_from_its_journal_to_the_bit(level, tmp_path):
    with start(level, out=tmp_path / "live", idle=0.001) as run:
        assert min(talk(run, samples(60), said=OFTEN).values()) > 0
    again = hamdist.replay(tmp_path / "live", network(level, seed=7))
    assert equal(run.result, again)
    assert again.windows == run.result.windows
    assert again.samples == run.result.samples


def test_a_run_of_a_held_level_is_repeated_too(tmp_path):
    with start("local", out=tmp_path / "live") as run:
        for k, (u, y) in enumerate(samples(12)):
            run.feed(u, y) if k % 3 else run.predict(u)
    assert equal(run.result, hamdist.replay(tmp_path / "live", network(seed=7)))


def test_a_run_goes_on_behind_its_snapshot_and_loses_nothing_of_its_journal(tmp_path):
    """What was acknowledged is in the journal, whatever has become of the process."""
    where = tmp_path / "live"
    said = list(samples(12))
    with start("trace", out=tmp_path / "whole") as whole:
        for u, y in said:
            whole.feed(u, y)
    with start("trace", out=where) as run:
        for n, item in enumerate(said[:8]):
            run.feed(*item)
            if n == 4:
                run.snapshot()
    lines = (where / "journal.jsonl").read_bytes()
    (where / "journal.jsonl").write_bytes(lines + b'{"event": "feed", "num')  # cut off
    with start("trace", out=where, resume=where) as more:
        assert more.status().fed == 8
        for item in said[8:]:
            more.feed(*item)
    idle = [line for line in (where / "journal.jsonl").read_text().splitlines() if "idle" in line]
    assert idle  # of the snapshot
    assert equal(more.result, hamdist.replay(where, network(seed=7)))
    assert more.result.samples == whole.result.samples == 12


def test_without_a_snapshot_the_whole_journal_comes_first(tmp_path):
    said = list(samples(6))
    with start("backprop", out=tmp_path) as run:
        for item in said[:4]:
            run.feed(*item)
        n = run.feed(said[4][0])
    with pytest.raises(SettingsError, match="journal of an earlier run"):
        start("backprop", out=tmp_path)
    with start("backprop", network(seed=5), out=tmp_path, resume=tmp_path) as more:
        more.teach(n, said[4][1])
        more.feed(*said[5])
    with start("backprop") as whole:
        for item in said:
            whole.feed(*item)
    assert equal(more.result, whole.result)


def test_a_journal_is_checked(tmp_path):
    with start("trace", out=tmp_path) as run:
        run.feed(*next(iter(samples(1))))
        with pytest.raises(SettingsError, match="written by another run"):
            start("trace", out=tmp_path, resume=tmp_path)
    with pytest.raises(SettingsError, match="another model"):
        hamdist.replay(tmp_path, nn.Linear(4, 3))
    with pytest.raises(SettingsError, match="live run"):
        hamdist.replay(tmp_path / "none", network())
    (tmp_path / "journal.bin").write_bytes(b"x" * 100)
    with pytest.raises(hamdist.HamdistError, match="line 1"):
        hamdist.replay(tmp_path, network())


@pytest.mark.ray
def test_on_ray_answers_belong_to_their_questions_and_a_lost_actor_loses_nothing(session, tmp_path):
    ray = {"kind": "ray", "actors": 2}
    answers_belong_to_their_questions("trace", ray)

    session.make_room()  # or an idle actor of another test might be the one that is killed
    lose_one("trace", tmp_path, ray)
    with start("trace", out=tmp_path, resume=tmp_path, engine=ray) as run:
        run.feed(*next(iter(samples(1))))
    assert equal(run.result, hamdist.replay(tmp_path, network(seed=7), engine=ray))
    assert equal(run.result, hamdist.replay(tmp_path, network(seed=7)))


def answers_belong_to_their_questions(level, engine):
    """An identity network gives back what was asked: one after the other, and from two threads."""
    x, more = torch.zeros(16, 4), options(level, loss="mse", engine=engine)
    tokens = level == "bptt"

    def ask(seed):
        drawn = torch.Generator().manual_seed(seed)
        for k in range(6):
            u = torch.randn(16, 4, generator=drawn)
            right.append(torch.equal(run.predict(u, end=tokens and k % 3 == 2).prediction, u))

    right: list[bool] = []
    with hamdist.start(identity(level), example=(x, x), **more) as run:
        ask(0)
        both = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
        for one in both:
            one.start()
        for one in both:
            one.join(60)
        run.feed(x, end=tokens)  # (it ends a sequence)
        weights = run.weights()  # without steps: no label has come
        assert torch.equal(weights["0.weight"], torch.eye(4))
    assert right == [True] * 18


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_answers_belong_to_their_questions_at_every_level(session):
    for level in (*LEVELS, "bptt"):
        answers_belong_to_their_questions(level, {"kind": "ray", "actors": 2})


def lose_one(level, out, engine):
    """Say 120 things, kill an actor in between, and repeat all of it in one process."""
    with start(level, out=out, idle=0.001, engine=engine, snapshots={"seconds": 1}) as run:
        kill = lambda k: kill_an_actor(k) if k == 40 else None  # noqa: E731
        talk(run, samples(120), before=kill, said=OFTEN, sequences=level == "bptt")
    assert run.result.replaced
    again = hamdist.replay(out, network(seed=7))
    assert equal(run.result, again)
    assert again.windows == run.result.windows


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("level", ["bptt", "pipeline", "backprop"])
def test_a_lost_actor_loses_nothing_at_other_levels(level, session, tmp_path):
    session.make_room()  # (or an idle actor of another test might be the one that is killed)
    lose_one(level, tmp_path, {"kind": "ray", "actors": 2})


def test_a_snapshot_waits_for_the_end_of_a_sequence():
    """Blocks that stop at a tick within one would wait for tokens that have not been said."""
    for looks in (False, True):
        with tempfile.TemporaryDirectory() as out:
            often = {"snapshots": {"seconds": 1e-6}}
            with start("bptt", network(), out=out, **often) as run:
                for k, (u, _) in enumerate(samples(12)):
                    assert run.predict(u, end=k % 4 == 3).number == k
                    if looks and k % 4 == 3:
                        assert Path(run.snapshot()).parent == Path(out) / "snapshots"
            assert run.result.snapshots
            assert equal(run.result, hamdist.replay(out, network(seed=7)))
    with pytest.raises(hamdist.HamdistError, match=r"snapshots\.every"):
        start("bptt", snapshots={"path": out, "every": 5})


def test_each_who_looks_gets_what_was_asked_for():
    """Neither a snapshot by the clock nor a state of an earlier cut answers a question."""
    example = Sample(torch.zeros(1, 4), torch.tensor([0]))
    spec = SampleSpec((1, 4), torch.float32, (1,), torch.int64, 3, live=8)
    stream, found = LiveStream(spec, example, lockstep=False), []
    stream.blocks, stream.drain = 2, 4
    asks = threading.Thread(target=lambda: found.append(stream.request("cut")))
    asks.start()
    for drawn in stream.samples():
        if drawn.emission.snapshot:
            break
    stream.give("snapshot", "a place")
    for cut, block in ((0, "a"), (1, "a"), (0, "b"), (1, "b")):
        stream.handed(cut, block, f"{block} of cut {cut}")
    asks.join(10)
    assert found == [{"a": "a of cut 1", "b": "b of cut 1"}]


def test_a_pause_has_room_for_so_many(tmp_path):
    u, y = next(iter(samples(1)))
    with start("trace") as run:
        run.pause()
        assert [run.feed(u, y) for _ in range(64)] == [*range(64)]
        with pytest.raises(BlockingIOError, match="go_on"):
            run.feed(u, y)
        run.go_on()
        assert run.feed(u, y) == 64


DRIVER = """
import sys
from runtime.live.test_live import samples, start
run = start("trace", out=sys.argv[1], snapshots={"seconds": float(sys.argv[2])})
for item in samples(10**6):
    print(run.feed(*item), flush=True)
"""


@pytest.mark.parametrize("seconds", [0.05, 1000])  # (the second is killed in its first snapshot)
def test_a_killed_driver_loses_no_sample_that_was_acknowledged(tmp_path, seconds):
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(seconds)]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=path, text=True) as driver:
        heard = [int(driver.stdout.readline()) for _ in range(60)]
        driver.kill()
        heard += map(int, driver.stdout.read().splitlines())
    if seconds == 1000:
        unfinished = tmp_path / "snapshots" / "tick-000000000049"
        unfinished.mkdir(parents=True)
        (unfinished / "block-0.0123456789abcdef.0.safetensors").write_bytes(b"cut off")
    with start("trace", out=tmp_path, resume=tmp_path) as run:
        fed = run.status().fed  # (what was accepted may be one more than was told)
        assert fed in (len(heard), len(heard) + 1)
        for item in list(samples(fed + 5))[fed:]:
            run.feed(*item)
    assert run.result.samples == fed + 5
    again = hamdist.replay(tmp_path, network(seed=7))
    assert equal(run.result, again)
    assert again.windows == run.result.windows


class Told(hamdist.Callback):
    def __init__(self):
        self.told = []

    def on_start(self, run):
        self.told.append("start")

    def on_sample(self, run, answer):
        self.told.append(answer.number)

    def on_window(self, run, event):
        self.told.append("window")

    def on_evaluate(self, run, scores, model):
        self.told.append("evaluate")

    def on_snapshot(self, run, event):
        self.told.append("snapshot")

    def on_end(self, run, result):
        self.told.append("end")


def test_callbacks_are_told_what_happens(tmp_path):
    told, said = Told(), list(samples(6))
    evaluation = hamdist.Evaluation(*said[0], every=3)
    with start("backprop", callbacks=[told, evaluation], out=tmp_path) as run:
        for u, y in said:
            run.feed(u, y)
        run.snapshot()
        run.predict(said[0][0])
    order = [one for one in told.told if one not in ("window", "snapshot")]
    assert order == ["start", 0, 1, 2, "evaluate", 3, 4, 5, "evaluate", 6, "end"]


IN_PARTS = {"locality": {"microbatches": 2}, "partition": {"blocks": 3, "delay": 2}}


@pytest.mark.parametrize(("level", "more"), [("backprop", {}), ("pipeline", IN_PARTS)])
def test_training_stops_early_and_gives_back_the_best_weights(level, more):
    """By hand: the loss on held-out data after every second step, and where it was least."""
    said, held_out = list(samples(40, seed=5)), next(iter(samples(1, seed=9, batch=6)))
    by_hand, seen, stop = network(), [], None
    for n, (u, y) in enumerate(said):
        by_hand.zero_grad()
        nn.functional.cross_entropy(by_hand(u), y).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.8 * p.grad
        if n % 2:
            loss = float(nn.functional.cross_entropy(by_hand(held_out[0]), held_out[1]))
            seen.append((loss, {k: w.clone() for k, w in by_hand.state_dict().items()}))
            losses = [one[0] for one in seen]
            if len(seen) - 1 - losses.index(min(losses)) >= 3:
                stop = n + 1
                break
    assert stop is not None  # (else nothing is tested)
    best = hamdist.BestWeights()
    result = hamdist.train(
        network(),
        said,
        classes=3,
        level=level,
        learning={"lr": 0.8},
        callbacks=[hamdist.Evaluation(*held_out, every=2), hamdist.EarlyStopping(3), best],
        **more,
    )
    assert (result.samples, result.stopped) == (stop, True)
    loss, weights = min(seen, key=lambda one: one[0])
    assert best.best.loss == pytest.approx(loss)
    for name, weight in result.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


@pytest.mark.parametrize("how", ["a journal", "a pause"])
def test_samples_that_are_learned_at_once_are_evaluated_once(how, tmp_path):
    """Of the same weights there would be several evaluations, none of them better."""
    said, held_out, told = list(samples(12)), next(iter(samples(1, seed=9))), Told()
    calls = [hamdist.Evaluation(*held_out, every=2), hamdist.EarlyStopping(3), told]
    if how == "a journal":
        with start("backprop", out=tmp_path) as run:
            for item in said[:8]:
                run.feed(*item)
        again = {"out": tmp_path, "resume": tmp_path}
        with start("backprop", callbacks=calls, **again) as run:
            for item in said[8:]:
                run.feed(*item)
    else:
        with start("backprop", callbacks=calls) as run:
            run.pause()
            for item in said[:8]:
                run.feed(*item)
            run.go_on()
            for item in said[8:]:
                run.feed(*item)
    assert (run.result.samples, run.result.stopped) == (12, False)
    assert told.told.count("evaluate") == 3


def test_callbacks_begin_anew_with_each_run():
    """The second run learns nothing: its best weights are not those of the first one."""
    held_out, best = next(iter(samples(1, seed=9, batch=6))), hamdist.BestWeights()
    calls = [hamdist.Evaluation(*held_out, every=2), hamdist.EarlyStopping(3), best]
    given = {"classes": 3, "level": "backprop", "callbacks": calls}
    first = hamdist.train(network(), samples(8), learning={"lr": 0.1}, **given)
    assert best.best is not None
    assert not equal(first, SimpleNamespace(model=network()))
    second = hamdist.train(network(), samples(8), learning={"lr": 0.0}, **given)
    assert (second.samples, second.stopped) == (8, True)
    assert equal(second, SimpleNamespace(model=network()))


@pytest.mark.ray
def test_an_evaluation_on_ray_is_of_all_blocks_after_the_same_samples(session):
    """Oracle: the weights after each sample in one process, to the bit."""
    held_out, found = next(iter(samples(1, seed=9))), []

    class Noted(hamdist.Callback):
        def on_evaluate(self, run, scores, model):
            found[-1].append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    for every, engine in ((1, {"kind": "inprocess"}), (3, {"kind": "ray", "actors": 2})):
        found.append([torch.cat([p.detach().flatten() for p in network().parameters()])])
        hamdist.train(
            network(),
            samples(200),
            classes=3,
            level="pipeline",
            learning={"lr": 0.1},
            engine=engine,
            callbacks=[hamdist.Evaluation(*held_out, every=every), Noted()],
            **IN_PARTS,
        )
    after, seen = found
    assert len(after) == 201
    places = [next(n for n, w in enumerate(after) if torch.equal(w, one)) for one in seen]
    assert places == sorted(places)
    assert places[-1] > places[1]


@pytest.mark.ray
def test_an_evaluation_waits_for_the_end_of_a_sequence(session):
    held_out, losses = next(iter(samples(1, seed=9))), []

    class Noted(hamdist.Callback):
        def on_evaluate(self, run, scores, model):
            losses[-1].append(scores.loss)

    for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2}):
        losses.append([])
        calls = [hamdist.Evaluation(*held_out, every=2), Noted()]
        with start("bptt", callbacks=calls, engine=engine) as run:
            for k, (u, y) in enumerate(samples(16)):
                run.predict(u) if k % 4 == 1 else run.feed(u, y, end=k % 4 == 3)
    assert all(losses)


def test_a_stream_that_fails_beside_callbacks_leaves_what_was_learned():
    def failing():
        yield from samples(7)
        raise OSError("gone")

    given = {"classes": 3, "level": "backprop", "callbacks": [hamdist.Callback()]}
    with pytest.raises(StreamError, match="sample 7: the stream raised OSError: gone") as caught:
        hamdist.train(network(), failing(), **given)
    expected = hamdist.train(network(), samples(7), **given)
    left = zip(caught.value.result.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in left)


class Raises(hamdist.Callback):
    def __init__(self, error=None):
        self.error = error

    def on_sample(self, run, answer):
        if answer.number == 3 and self.error is not None:
            raise self.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_beside_callbacks_ends_the_stream(number):
    def signalled():
        for n, item in enumerate(samples(9)):
            if n == 4:
                signal.raise_signal(number)
            yield item

    given = {"classes": 3, "level": "trace", "callbacks": [hamdist.Callback()]}
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            hamdist.train(network(), signalled(), **given)
        result = ended.value.result  # type: ignore[attr-defined]
    else:
        result = hamdist.train(network(), signalled(), **given)
    assert (result.samples, result.interrupted, result.stopped) == (4, True, False)
    assert equal(result, hamdist.train(network(), samples(4), **given))


def test_a_callback_that_stops_or_fails_leaves_the_others_and_the_result():
    told = Told()
    given = {"classes": 3, "level": "backprop"}
    calls = [Raises(hamdist.Stop()), told]
    result = hamdist.train(network(), samples(9), callbacks=calls, **given)
    assert (result.samples, result.stopped) == (4, True)
    assert told.told == ["start", 0, 1, 2, 3, "window", "end"]
    with pytest.raises(KeyError) as caught:
        hamdist.train(network(), samples(9), callbacks=[Raises(KeyError("mine"))], **given)
    assert equal(getattr(caught.value, "result", None), result)


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (hamdist.Callback(), "callbacks is a Callback; give a list"),
        ([hamdist.EarlyStopping], "EarlyStopping'> is no hamdist.Callback; give one, made"),
        ([hamdist.EarlyStopping(3)], "EarlyStopping waits for evaluations, which nobody makes"),
        ([hamdist.BestWeights()], "BestWeights waits for evaluations, which nobody makes"),
    ],
)
def test_callbacks_that_hear_nothing(callbacks, said):
    with pytest.raises(SettingsError, match=said):
        hamdist.train(network(), samples(7), classes=3, level="backprop", callbacks=callbacks)
    with pytest.raises(SettingsError, match="EarlyStopping: patience is 0; at least 1"):
        hamdist.EarlyStopping(0)


def test_a_run_ends_when_its_condition_holds():
    with start("backprop", until=lambda status: status.answered >= 5) as run:
        for item in samples(100):
            run.feed(*item)
    assert run.result.samples == 5
    with pytest.raises(SettingsError, match="until is 5"):
        start("backprop", until=5)


def blocks_of_memory():
    """Of Python's objects. (gc.get_objects would take part in what another thread does.)"""
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize("level", ["trace", "local", "bptt"])
def test_an_endless_run_keeps_no_more_with_every_sample(level, tmp_path):
    with start(level, patience=4, out=tmp_path, metrics={"window": 120}) as run:
        counts = []
        for k, (u, y) in enumerate(samples(960)):
            n = run.feed(u, y if k % 2 else None, end=k % 3 == 2)
            if k % 4 == 2 and level == "trace":
                run.teach(n, y)
            if k % 240 == 239:
                run.settle()
                counts.append(blocks_of_memory())
        for _ in range(5):
            run.feed(u, y, end=True)
            run.snapshot()
    assert counts[3] - counts[1] < 480, counts  # less than an object a sample (windows are some)
    assert len([*(tmp_path / "snapshots").glob("tick*")]) <= 3  # the latest ones stay


def test_training_with_callbacks_is_training():
    said = list(samples(8))
    plain = hamdist.train(network(), said, classes=3, level="trace", steps=6)
    called = hamdist.train(
        network(), said, classes=3, level="trace", steps=6, callbacks=[hamdist.Callback()]
    )
    assert equal(plain, called)
    assert plain.samples == called.samples == 6


class AnyLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).mean(1)))


def lengths():
    return [(torch.full((2, 2 + k % 3), k), y) for k, (_, y) in enumerate(samples(8))]


STREAMS = {
    "weights": lambda: hamdist.streams.from_iterable(
        [(u, y, torch.rand(len(y))) for u, y in samples(8)],
        classes=3,
        names={0: "u", 1: "y", 2: "weight"},
    ),
    "lengths": lambda: hamdist.streams.from_iterable(lengths(), classes=3),
    "a real target is missing at first": lambda: hamdist.streams.from_iterable(
        [(u, u[:, :3] if k else None) for k, (u, _) in enumerate(samples(8))], outputs=3
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_callbacks_see_the_samples_of_any_stream(kind):
    options = {"level": "backprop", "loss": "mse" if "real" in kind else "cross-entropy"}
    runs = []
    for callbacks in ([], [hamdist.Callback()]):
        torch.manual_seed(0)
        model = AnyLength() if kind == "lengths" else network()
        runs.append(hamdist.train(model, STREAMS[kind](), callbacks=callbacks, **options))
    assert equal(*runs)
    assert runs[0].windows == runs[1].windows


def test_what_is_held_out_is_of_the_kind_that_is_learned():
    """Oracle: torch, on tensors of one shape."""
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    items = [(u, u[:, :1]) for u, _ in samples(4)]

    def scores(x, y, loss, items=items):
        torch.manual_seed(0)
        with hamdist.start(nn.Linear(4, 1), level="backprop", loss=loss, example=items[0]) as run:
            return run.evaluate(x, y).loss, run.model()

    def square(y, t):
        return (y - t).square().mean()

    for loss, factor in (("mse", 0.5), (square, 1.0)):
        value, model = scores(x.numpy(), y.numpy(), loss)
        assert value == pytest.approx(factor * square(model(x), y).item())
        with pytest.raises(StreamError, match=r"targets are torch.float32 \(30,\), .* learned"):
            scores(x, y[:, 0], loss)
    with start("backprop") as run:
        u, t = next(samples(1))
        assert run.evaluate(u, t.int()) == run.evaluate(u, t)


def test_weights_of_rows_are_not_for_live_runs():
    example = (torch.zeros(2, 4), torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(SettingsError, match="a live run has no weights of rows"):
        hamdist.start(network(), example=example, classes=3, names={0: "u", 1: "y", 2: "weight"})


def test_late_labels_are_not_for_callbacks():
    late = hamdist.streams.LateLabels(hamdist.streams.from_iterable(samples(8), classes=3), 2)
    with pytest.raises(SettingsError, match="callbacks: labels that come late"):
        hamdist.train(network(), late, level="backprop", callbacks=[hamdist.Callback()])


def test_what_a_run_cannot_know_is_refused(tmp_path):
    model, example = nn.Linear(4, 3), (torch.zeros(2, 4), torch.tensor([0, 1]))
    by_function = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
    out = tmp_path / "live"
    with hamdist.start(model, example=example, classes=3, out=out, **by_function) as run:
        with pytest.raises(SettingsError, match="optimizer= is a function"):
            run.set(learning={"lr": 0.05})
        run.stop()
    with pytest.raises(SettingsError, match="give it as well"):
        hamdist.replay(out, **by_function)


def test_a_model_that_the_settings_name_is_made_again_for_a_replay(tmp_path):
    """Another one of the same weights is not taken for it."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)]  # as models/build.py says of an mlp
    named = hamdist.Settings(level="backprop", model={"width": 8, "depth": 2}, dtype="float64")
    said = [(u.double(), y) for u, y in samples(4)]
    for layer, there in ((nn.ReLU(), True), (nn.Tanh(), False)):
        layers[1], where = layer, tmp_path / str(there)
        model = nn.Sequential(*layers).double()
        with hamdist.start(model, named, example=said[0], classes=3, out=where) as run:
            for item in said:
                run.feed(*item)
        if there:
            assert equal(hamdist.replay(where), run.result)
            with pytest.raises(SettingsError, match="'0.bias' is torch.float32"):
                hamdist.replay(where, nn.Sequential(*layers).float())
        else:
            with pytest.raises(SettingsError, match="not one that its settings name"):
                hamdist.replay(where)
