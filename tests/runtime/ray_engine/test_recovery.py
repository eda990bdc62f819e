"""Oracle: the in-process run. Processes die, hang or fail in the midst of a run; the others wait,
the lost ones are replaced, and the run ends with the same bits."""

from __future__ import annotations

import copy
import itertools
import os
import signal

import pytest
import torch
from runtime.engines.test_engines_equal import LEVELS, assert_equal, settings
from runtime.networks import FEATURES, Broken, EndlessStream, PortableStream, batches, seeded
from torch import nn

from hamdist.errors import BlockError, ClusterError
from hamdist.runtime.ray_engine import worker_actor
from hamdist.runtime.ray_engine.replacement import Replacement
from hamdist.runtime.ray_engine.session import Session
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train
from hamdist.streams import LateLabels, from_iterable
from hamdist.study.verify.oracles.networks import chain
from hamdist.study.verify.topics.late_labels import Keyed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(110)]

ITEMS = 60
ALONE = {"kind": "inprocess"}


def in_an_actor():
    """Neither the driver, nor its child that measures the network."""
    return os.environ.get("HAMDIST_TEST_DRIVER") not in (str(os.getpid()), str(os.getppid()))


class Once(nn.Module):
    """Does something to its process in forward pass number `at`, if nobody has done so yet: the
    file `mark` tells. It passes on what it gets."""

    def __init__(self, at, mark, what):
        super().__init__()
        self.at, self.mark, self.what = at, str(mark), what
        self.calls = 0

    def forward(self, x):
        if x.device.type == "meta":
            return x
        self.calls += 1
        if self.calls == self.at and in_an_actor():
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return x
            if self.what == "raise":
                raise OSError("bad luck")
            os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGSTOP)
        return x


class Always(nn.Module):
    """Kills every process but the driver's in its fifth forward pass. Passes on what it gets."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if x.device.type != "meta" and in_an_actor():
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        return x


@pytest.fixture
def driver(monkeypatch):
    """The driver only has the network measured: nothing happens there."""
    monkeypatch.setenv("HAMDIST_TEST_DRIVER", str(os.getpid()))


def net(*odd):
    """Five linear layers; odd: (number of the layer, module that comes behind it)."""

    def build():
        layers = []
        for i in range(5):
            layer = nn.Linear(FEATURES if i == 0 else 8, 3 if i == 4 else 8)
            behind = [module for number, module in odd if number == i]
            layers.append(nn.Sequential(layer, *behind, nn.Tanh() if i < 4 else nn.Identity()))
        return nn.Sequential(*layers)

    return seeded(build)


def cut():
    return {"cuts": ["1", "2", "3", "4"]}


def both(
    tmp_path,
    odd,
    source=PortableStream,
    items=ITEMS,
    engine=None,
    kept=None,
    functions=None,
    **fields,
):
    given = {"level": "trace", "partition": cut(), **fields}
    calm = copy.deepcopy(odd)
    for module in calm.modules():
        if isinstance(module, Once):
            module.at = None
    more = {k: v for k, v in (engine or {}).items() if k in ("compress", "feedback")}
    alone = train(
        calm, source(items), settings({**ALONE, **more}, items, **given), **(functions or {})
    )
    path = {"path": str(tmp_path / "kept"), "every": 10, **(kept or {})}
    spread = {"kind": "ray", "actors": 3, **(engine or {})}
    run = settings(spread, items, snapshots=path, **given)
    result = train(odd, source(items), run, **(functions or {}))
    assert_equal(alone, result)
    return result


@pytest.mark.parametrize(
    ("level", "where"),
    [
        ("local", 0),
        ("double-buffered", 2),
        ("pipeline, clipped", 4),
        pytest.param("trace", 0, marks=pytest.mark.slow),  # (the level of the tests below)
        pytest.param(
            "rotated", 2, marks=pytest.mark.slow
        ),  # (axes are asked for at 28, used at 35)
    ],
)
def test_a_killed_actor(session, driver, leaves_no_socket, tmp_path, level, where):
    """With the stream, in the middle, with the readout."""
    odd = net((where, Once(31, tmp_path / "mark", "kill")))
    rotated = {"adaptive": {}, "lr": 0.01, "inputs": {"rule": "rotated", "refresh": 14}}
    levels = {**LEVELS, "rotated": {"level": "trace", "learning": rotated}}
    given = levels.get(level, {"level": level})
    apart = {"engine": {"actors": 2, "interleave": 2}} if "pipeline" in level else {}
    result = both(tmp_path, odd, **given, **apart)
    assert len(result.replaced) == 1
    assert f"block{where}" in result.replaced[0].blocks


class Signed(torch.optim.Optimizer):
    """An optimiser of a user's: noise of its own, and a count that no state of a weight holds."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01, "shrink": 0.0})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                noise = torch.randn_like(p) / self.steps
                p.mul_(1 - group["shrink"]).sub_(group["lr"] * (p.grad.sign() + noise))


def signed(params):
    """Matrices shrink, biases do not."""
    matrices, vectors = ([p for p in params if (p.ndim > 1) == wide] for wide in (True, False))
    return Signed([{"params": matrices, "shrink": 0.01}, {"params": vectors}])


@pytest.mark.slow
@pytest.mark.parametrize("level", ["trace", "pipeline"])
def test_optimisers_and_schedulers_of_the_users(session, driver, leaves_no_socket, tmp_path, level):
    """They travel to the actors; their state comes back from the snapshot."""
    cycle = torch.optim.lr_scheduler.OneCycleLR
    functions = {
        "optimizer": signed,
        "scheduler": lambda optimiser: cycle(optimiser, 0.02, ITEMS, cycle_momentum=False),
    }
    odd = net((2, Once(31, tmp_path / "mark", "kill")))
    result = both(tmp_path, odd, functions=functions, **LEVELS[level])
    assert len(result.replaced) == 1


@pytest.mark.parametrize(
    ("level", "transport"),
    [("trace", "tcp"), pytest.param("pipeline", "ipc", marks=pytest.mark.slow)],
)
def test_other_transports_delays_and_codes(
    session, driver, leaves_no_socket, tmp_path, level, transport
):
    """Bundles are under way, encoders have errors to carry on, and both ends what deltas add to."""
    odd = net((2, Once(41, tmp_path / "mark", "kill")))
    compress = {"block0->*": "int8", "block1->*": "delta", "block2->*": "int4", "*": "codebook"}
    engine = {"transport": transport, "compress": compress, "feedback": "on"}
    partition = {**cut(), "delay": 4}
    result = both(tmp_path, odd, engine=engine, **{**LEVELS[level], "partition": partition})
    assert result.replaced


def test_a_killed_actor_behind_several_connections(session, driver, leaves_no_socket, tmp_path):
    """Signals of 4 x 4096 numbers, 44 of which may be under way: more than 1 MiB (zeromq.py)."""

    def build():
        widths = [FEATURES, 8, 4096, 8, 8, 3]
        layers = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(widths)]
        layers[2].append(Once(51, tmp_path / "mark", "kill"))
        return nn.Sequential(*layers)

    delays = {"block1->block2": 40}
    engine = {"transport": "tcp", "bundle": "off", "actors": 4}
    result = both(tmp_path, seeded(build), engine=engine, partition={**cut(), "delays": delays})
    assert result.replaced


def test_two_at_once_and_one_again(session, driver, leaves_no_socket, tmp_path):
    odd = net(
        (0, Once(25, tmp_path / "a", "kill")),
        (2, Once(25, tmp_path / "b", "kill")),
        (4, Once(8, tmp_path / "c", "kill")),
    )
    result = both(tmp_path, odd)
    assert len(result.replaced) == 3


def test_a_spare_takes_the_place_of_a_killed_actor(
    session, driver, leaves_no_socket, tmp_path, monkeypatch
):
    session.make_room()
    started, given = [], []
    start, actors = worker_actor.start_actor, Session.actors

    def noted(options):
        started.append(start(options))
        return started[-1]

    def handed(self, options_of_actors):
        given.append(actors(self, options_of_actors))
        return given[-1]

    monkeypatch.setattr(worker_actor, "start_actor", noted)
    monkeypatch.setattr(Session, "actors", handed)
    odd = net((2, Once(31, tmp_path / "mark", "kill")))
    result = both(tmp_path, odd, engine={"spares": 1})
    assert len(result.replaced) == 1
    first, replacing = given
    assert first == started[:3]
    assert replacing == [started[3]]  # the spare
    assert len(started) == 5  # and another one waits


def test_a_hung_actor(session, driver, leaves_no_socket, tmp_path):
    """Ray does not report it: it does not answer."""
    odd = net((2, Once(31, tmp_path / "mark", "stop")))
    result = both(tmp_path, odd, kept={"silence": 1.0})
    assert len(result.replaced) == 1


def test_a_block_that_fails_by_bad_luck(session, driver, leaves_no_socket, tmp_path):
    odd = net((2, Once(31, tmp_path / "mark", "raise")))
    result = both(tmp_path, odd)
    assert [r.tick for r in result.replaced] == [32]


def test_a_defect_ends_the_run(session, driver, leaves_no_socket, tmp_path):
    """Three times at the same tick: no bad luck."""
    odd = net((2, Broken(20)))
    run = settings(
        {"kind": "ray", "actors": 3},
        ITEMS,
        level="backprop",
        partition=cut(),
        snapshots={"path": str(tmp_path), "every": 1000},
    )
    with pytest.raises(BlockError, match="the user's own mistake") as caught:
        train(odd, PortableStream(ITEMS), run)
    assert caught.value.tick == 20 * 9 + 2
    assert "raise ArithmeticError" in caught.value.details
    twenty = settings(ALONE, 20, level="backprop", partition=cut())
    before = train(odd, PortableStream(20), twenty).model.state_dict()
    left = caught.value.result.model.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in left.items())


def test_a_stream_that_can_be_read_once(session, driver, leaves_no_socket, tmp_path):
    """It stays with the driver, whose log keeps what it gave."""
    odd = net((0, Once(31, tmp_path / "mark", "kill")))
    result = both(tmp_path, odd, lambda n: from_iterable(iter(batches(n)), classes=3))
    assert result.replaced
    assert result.time_use["driver"]["cpu"] > 0


def test_the_time_of_a_run_begins_with_its_first_actor(session, driver, leaves_no_socket, tmp_path):
    """The only actor is lost: the one in its place has seen none of the time before."""
    odd = net((0, Once(59, tmp_path / "mark", "kill")))
    seen = []
    note = {"on_progress": lambda progress: seen.append(progress.seconds)}
    result = both(tmp_path, odd, engine={"actors": 1}, functions=note)
    assert result.replaced
    assert result.seconds == pytest.approx(max(seen), rel=0.1)  # (by the driver's clock)


def test_a_short_run_leaves_the_snapshots_of_one_process(session, leaves_no_socket, tmp_path):
    """It is over before the driver, which draws its stream, has looked at it once."""
    small = lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    left = []
    for engine in (ALONE, {"kind": "ray", "actors": 2}):
        kept = {"path": str(tmp_path / engine["kind"]), "every": 10, "keep": 9}
        fields = {"level": "trace", "partition": {"blocks": 2}, "snapshots": kept}
        source = from_iterable(iter(batches(40)), classes=3)
        result = train(small(), source, settings(engine, 40, **fields))
        left.append([snapshot.rpartition("-")[2] for snapshot in result.snapshots])
    assert left[0] == left[1]
    assert [int(tick) for tick in left[0]] == [10, 20, 30, 39]


@pytest.mark.slow
def test_too_many_kept_signals_make_a_snapshot(session, driver, leaves_no_socket, tmp_path):
    """Some 40 KiB a tick: without snapshots a minute's work would be kept."""
    items = 2000
    wide = lambda: seeded(  # noqa: E731
        lambda: nn.Sequential(nn.Linear(FEATURES, 2500), nn.Tanh(), nn.Linear(2500, 3))
    )
    given = {"level": "trace", "partition": {"blocks": 2}}
    alone = train(wide(), PortableStream(items), settings(ALONE, items, **given))
    kept = {"path": str(tmp_path), "seconds": 1000.0, "memory": 10}
    run = settings({"kind": "ray", "actors": 2}, items, snapshots=kept, **given)
    result = train(wide(), PortableStream(items), run)
    assert_equal(alone, result)
    assert result.snapshots


def test_off(session, driver, leaves_no_socket, tmp_path):
    odd = net((2, Once(31, tmp_path / "mark", "kill")))
    kept = {"path": str(tmp_path / "kept"), "recover": False}
    run = settings({"kind": "ray", "actors": 3}, ITEMS, partition=cut(), snapshots=kept)
    with pytest.raises(ClusterError, match="died"):
        train(odd, PortableStream(ITEMS), run)


def test_on_ray_and_on_from_there_anywhere(session, leaves_no_socket, tmp_path):
    """Snapshots of three actors; on in one process, and in four over sockets."""
    given = {"level": "trace", "partition": cut()}
    alone = train(net(), PortableStream(ITEMS), settings(ALONE, ITEMS, **given))
    kept = {"path": str(tmp_path / "kept"), "every": 10, "keep": 100}
    run = settings({"kind": "ray", "actors": 3}, ITEMS, snapshots=kept, **given)
    assert_equal(alone, train(net(), PortableStream(ITEMS), run))
    folder = sorted((tmp_path / "kept").iterdir())[3]
    for engine in (ALONE, {"kind": "ray", "actors": 4, "transport": "tcp"}):
        on = settings(engine, ITEMS, snapshots={"path": str(tmp_path / "on")}, **given)
        assert_equal(alone, train(net(), PortableStream(ITEMS), on, resume=folder))


def test_a_process_that_dies_whenever_it_starts(session, driver, leaves_no_socket, tmp_path):
    """Nobody knows at which tick, as it dies before it is asked: it was replaced for ever."""
    odd = net((2, Always()))
    run = settings(
        {"kind": "ray", "actors": 3},
        ITEMS,
        level="trace",
        partition=cut(),
        snapshots={"path": str(tmp_path), "every": 1000, "attempts": 2},
    )
    with pytest.raises(ClusterError, match=r"died: .* lost 2 times without getting any further"):
        train(odd, PortableStream(ITEMS), run)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_a_lost_stream_is_replaced(
    session, driver, leaves_no_socket, tmp_path, monkeypatch, times
):
    """Once: it is replaced, a snapshot is taken, and the run ends in order; it can be gone on from.
    Twice: it ends as it is."""
    replace = Replacement.replace

    def interrupted(recovery, losses):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        replace(recovery, losses)

    monkeypatch.setattr(Replacement, "replace", interrupted)
    odd = net((0, Once(31, tmp_path / "mark", "kill")))
    given = {"level": "trace", "partition": cut()}
    kept = {"path": str(tmp_path / "kept"), "seconds": 100}
    run = settings({"kind": "ray", "actors": 3}, None, snapshots=kept, **given)
    result = train(odd, EndlessStream(), run)
    assert result.interrupted
    if times == 2:
        assert not result.replaced
        assert not result.snapshots
        return
    assert len(result.replaced) == 1
    assert result.snapshots, result.warnings  # (more where the kept signals needed the memory)
    items = latest(tmp_path / "kept", print).manifest.samples + 20
    calm = net((0, Once(None, tmp_path / "mark", "kill")))
    alone = train(calm, EndlessStream(), settings(ALONE, items, **given))
    run = settings(ALONE, items, snapshots=kept, **given)
    on = train(calm, EndlessStream(), run, resume=tmp_path / "kept")
    assert_equal(alone, on)


@pytest.mark.slow
def test_labels_by_key_with_weights_of_rows_and_kept_traces(
    session, driver, leaves_no_socket, tmp_path
):
    comes = {n: n + 1 + (7 * n) % 9 for n in range(ITEMS) if n % 7}

    def source(items):
        return LateLabels(Keyed(items, comes, weighed=True), patience=8, kept=True)

    odd = chain()
    odd[3] = nn.Sequential(nn.Tanh(), Once(31, tmp_path / "mark", "kill"))
    result = both(tmp_path, odd, source, partition={"blocks": 3}, dtype="float64")
    assert len(result.replaced) == 1
    assert result.samples == ITEMS
