"""Documented contract: a run that fails ends with one error that says what and where, and leaves
no process, socket or thread. Ray here is the test session's; its actors are the run's."""

from __future__ import annotations

import os
import signal
import threading

import psutil
import pytest
import torch
from runtime.networks import (
    CLASSES,
    FEATURES,
    Broken,
    EndlessStream,
    PortableStream,
    Stuck,
    batches,
    chain,
    stream,
)
from torch import nn

from hamdist.config import EngineSettings, Level, Settings
from hamdist.errors import BlockError, ClusterError, SettingsError, StallError, StreamError
from hamdist.runtime.ray_engine import worker_group
from hamdist.runtime.ray_engine.worker_group import WorkerGroup
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

RAY = EngineSettings(kind="ray", actors=2)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(90)]


def with_module(module):
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Linear(8, 8), module, nn.Linear(8, 8), nn.Linear(8, CLASSES)
    )


def settings(snapshots=None, **engine):
    return Settings.model_validate(
        {
            "level": "trace",
            "steps": 200,
            "partition": {"cuts": ["1", "3", "4"]},
            "engine": {"kind": "ray", **({} if "kind" in engine else {"actors": 3}), **engine},
            **({} if snapshots is None else {"snapshots": snapshots}),
        }
    )


@pytest.fixture
def leaves_nothing(session, leaves_no_socket):
    """After the test no process is busy with a run, and no thread of the driver is left."""
    threads = threading.active_count()
    yield
    known = {actor._actor_id for _, actor in session.idle}
    alive = _alive_workers()
    assert len(alive) <= len(known), (alive, known)
    assert threading.active_count() <= threads + 1


def _alive_workers():
    """Ray's worker processes that host an actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::WorkerActor" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("kind", ["inprocess", "ray"])
def test_a_users_exception_names_the_block_and_carries_its_traceback(leaves_nothing, kind):
    with pytest.raises(BlockError) as caught:
        train(with_module(Broken(20)), PortableStream(200), settings(kind=kind))
    error = caught.value
    assert error.block == "block1"
    assert error.tick == 21  # sample 20 at depth 1
    assert "the user's own mistake" in str(error)
    assert "ArithmeticError" in error.details
    assert "forward" in error.details


@pytest.mark.parametrize("kind", ["inprocess", "ray"])
def test_a_failed_block_leaves_what_was_learned(leaves_nothing, kind):
    """Oracle: the run of the twenty samples before."""
    asked = settings(kind=kind).model_copy(update={"level": Level.BACKPROP})
    model = with_module(Broken(20))
    with pytest.raises(BlockError) as caught:
        train(model, PortableStream(200), asked)
    assert (caught.value.block, caught.value.tick) == ("block1", 20 * 7 + 1)
    left = caught.value.result
    assert str(caught.value) in left.warnings
    assert [block.updates for block in left.blocks.values()] == [20] * 4
    before = train(model, PortableStream(20), asked.model_copy(update={"steps": 20}))
    for name, weight in before.model.state_dict().items():
        assert torch.equal(left.model.state_dict()[name], weight)


@pytest.mark.parametrize("kind", ["inprocess", "ray"])
def test_a_bad_sample_is_named(leaves_nothing, kind):
    made = batches(50)
    made[17][0][2, 3] = float("nan")
    with pytest.raises(StreamError, match="sample 17.*nan"):
        train(chain(), from_iterable(made, classes=CLASSES), settings(kind=kind))


def test_a_failing_iterator_is_named(leaves_nothing):
    def samples():
        yield from batches(10)
        raise OSError("the disk is gone")

    with pytest.raises(StreamError, match="sample 10.*OSError: the disk is gone"):
        train(chain(), from_iterable(samples(), classes=CLASSES), settings(actors=2))


def _end_idle(session):
    """So that every worker that is there afterwards is one of the test's own run."""
    import ray

    workers = [p for p in map(_process, _alive_workers()) if p]
    while session.idle:
        ray.kill(session.idle.pop()[1])
    psutil.wait_procs(workers, timeout=10)


def test_a_killed_actor_is_named(session, leaves_nothing):
    _end_idle(session)
    seen = []

    def kill(progress):
        victim = _alive_workers()
        if progress.samples > 5 and not seen and victim:
            seen.append(victim[-1])
            os.kill(victim[-1], signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"actor \d \(blocks block.*died"):
        train(
            chain(),
            EndlessStream(),
            Settings.model_validate({"level": "trace", "engine": {"kind": "ray", "actors": 2}}),
            on_progress=kill,
        )
    assert seen


def test_the_watchdog_names_the_edge_that_blocks(leaves_nothing, tmp_path):
    with pytest.raises(StallError) as caught:
        train(
            with_module(Stuck(20)),
            PortableStream(200),
            settings(
                placement=[["block0"], ["block1"], ["block2", "block3"]],
                stall_warning=0.5,
                stall_limit=1.5,
                snapshots={"path": str(tmp_path / "kept"), "every": 5},
            ),
        )
    text = str(caught.value)
    assert text.endswith(f"go on from its latest snapshot: --resume {tmp_path / 'kept'}")
    assert "no block has moved" in text
    assert "'block2' has waited" in text
    assert "state on edge block1->block2" in text
    assert "sample 20" in text
    assert "'block1' is at tick 21" in text


@pytest.mark.slow
def test_the_watchdog_names_an_actor_that_does_not_answer(session, leaves_no_socket, monkeypatch):
    monkeypatch.setattr(worker_group, "ANSWER_SECONDS", 1.0)  # (5 s: nobody waits for it)
    monkeypatch.setattr(WorkerGroup.silent, "__defaults__", (1.0,))
    _end_idle(session)
    stopped = []

    def stop(progress):
        workers = _alive_workers()
        if progress.samples > 5 and not stopped and workers:
            stopped.append(workers[-1])
            os.kill(workers[-1], signal.SIGSTOP)

    with pytest.raises(StallError, match="does not answer"):
        train(
            chain(),
            EndlessStream(),
            Settings.model_validate(
                {
                    "level": "trace",
                    "engine": {"kind": "ray", "actors": 2, "stall_warning": 1, "stall_limit": 2},
                }
            ),
            on_progress=stop,
        )
    psutil.wait_procs([p for p in map(_process, stopped) if p], timeout=10)
    assert not any(psutil.pid_exists(pid) for pid in stopped)


def _process(pid):
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def test_a_slow_warning_is_no_error(session, leaves_no_socket):
    """A block that takes longer than stall_warning once is warned of, and the run goes on."""
    result = train(
        with_module(SlowOnce()), PortableStream(60), settings(stall_warning=0.3, stall_limit=60)
    )
    assert result.samples == 60
    assert any("no block has moved" in text for text in result.warnings)


class SlowOnce(nn.Module):
    """Waits 1 s in its tenth forward pass: a wait for an event that nobody sets."""

    calls = 0

    def forward(self, x):
        self.calls += x.device.type != "meta"
        if self.calls == 10:
            threading.Event().wait(1)
        return x


def test_more_actors_than_blocks_is_refused_before_anything_starts(session):
    with pytest.raises(SettingsError, match="9 actors for 5 blocks"):
        train(
            chain(),
            PortableStream(5),
            Settings.model_validate({"engine": {"kind": "ray", "actors": 9}}),
        )


class Locked(PortableStream):
    def __init__(self, items):
        super().__init__(items)
        self.lock = threading.Lock()


@pytest.mark.parametrize("what", ["the stream", "the loss of 'block3'", "the optimizer"])
def test_what_cannot_be_sent_to_an_actor_is_named(session, leaves_no_socket, what):
    lock = threading.Lock()

    def loss(prediction, target):
        with lock:
            return nn.functional.cross_entropy(prediction, target)

    def optimizer(parameters):
        with lock:
            return torch.optim.SGD(parameters, lr=0.1)

    more = {"the loss of 'block3'": {"loss": loss}, "the optimizer": {"optimizer": optimizer}}
    source = Locked(9) if what == "the stream" else PortableStream(9)
    with pytest.raises(SettingsError, match=rf"^{what} cannot be sent .*lock.* 'inprocess'"):
        train(chain(), source, settings(), **more.get(what, {}))


def test_an_error_outside_the_tree_of_a_loss_is_the_readouts(leaves_nothing):
    def loss(prediction, target):
        raise ZeroDivisionError("in the loss")

    with pytest.raises(BlockError, match="'block3' failed at tick 3: ZeroDivisionError"):
        train(with_module(nn.Identity()), stream(9), settings(), loss=loss)


def test_an_interrupted_run_keeps_what_it_has(leaves_nothing):
    """The first Ctrl-C ends the stream: every block finishes the samples that entered."""

    def interrupt(progress):
        if progress.samples > 50 and not sent:
            sent.append(progress.samples)
            signal.raise_signal(signal.SIGINT)

    for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2}):
        sent: list[int] = []
        result = train(
            chain(),
            EndlessStream(),
            Settings.model_validate({"level": "trace", "engine": engine}),
            on_progress=interrupt,
        )
        assert result.interrupted
        assert result.samples >= sent[0]
        assert all(block.updates == result.samples for block in result.blocks.values())
        assert sum(w.samples for w in result.windows["block4"]) == result.samples
        alone = train(chain(), EndlessStream(), Settings(level="trace", steps=result.samples))
        for key, tensor in alone.model.state_dict().items():
            assert torch.equal(tensor, result.model.state_dict()[key])


def test_an_idle_actor_that_died_is_replaced(session, leaves_no_socket):
    """The story of a bug: a run took over an idle actor of the session that had been killed."""
    first = train(chain(), PortableStream(20), Settings(level="trace", engine=RAY, steps=20))
    idle = _alive_workers()
    assert idle
    for pid in idle:
        os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([p for p in map(_process, idle) if p], timeout=10)
    again = train(chain(), PortableStream(20), Settings(level="trace", engine=RAY, steps=20))
    assert first.windows == again.windows


def test_a_call_that_comes_late_is_not_the_next_runs(leaves_nothing, monkeypatch):
    """Calls that nobody waits for are made when the actors have another run already."""
    before = WorkerGroup.start

    def start(self):
        before(self)
        for actor in self.actors:
            actor.ask("abort", run=self.plan.run - 1)
            actor.ask("stop_stream", run=self.plan.run - 1)

    monkeypatch.setattr(WorkerGroup, "start", start)
    assert train(chain(), PortableStream(200), settings()).samples == 200


def test_what_nobody_has_called_off_has_not_ended_well(leaves_nothing, monkeypatch):
    before = WorkerGroup.start

    def start(self):
        before(self)
        for actor in self.actors:
            actor.ask("abort", run=self.plan.run)

    monkeypatch.setattr(WorkerGroup, "start", start)
    with pytest.raises(ClusterError, match="ended before its time: it was called off by nobody"):
        train(chain(), EndlessStream(), settings(actors=3).model_copy(update={"steps": None}))
