"""Documented contract: a run that is called off keeps what it has learned, on both engines."""

from __future__ import annotations

import os
import signal
import threading
from itertools import islice

import pytest
import torch
from runtime.networks import EndlessStream, chain

import hamdist
from hamdist import Stop
from hamdist.config import Settings
from hamdist.runtime.process.interrupts import interrupts_delayed, signal_handlers_kept
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train

pytestmark = pytest.mark.timeout(90)
RAY = {"kind": "ray", "actors": 2}
ENGINES = [
    {"kind": "inprocess"},
    pytest.param(RAY, marks=pytest.mark.ray),
]


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Enough(Exception):
    pass


@pytest.fixture(autouse=True)
def _progress_often(monkeypatch):
    """A run that is ended by its fourth sample is not thousands long, nor is its oracle."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr("hamdist.runtime.ray_engine.engine.POLL_SECONDS", 0.01)


def returned(progress):
    return Stop if progress.samples > 3 else None


def returned_an_instance(progress):
    return Stop("enough") if progress.samples > 3 else None


def raised(progress):
    if progress.samples > 3:
        raise Stop


def interrupted(progress):
    if progress.samples > 3:
        raise KeyboardInterrupt


def signalled(number):
    def look(progress):
        if progress.samples > 3:
            os.kill(os.getpid(), number)

    return look


def failed(progress):
    if progress.samples > 3:
        raise Enough("no more")


def settings(engine, folder):
    fields = {"level": "trace", "engine": engine, "snapshots": {"path": folder, "seconds": 1000}}
    return Settings.model_validate(fields)


def run(engine, folder, look):
    return train(chain(), EndlessStream(), settings(engine, folder), on_progress=look)


def check(result, folder):
    """The weights are those of the in-process engine after as many samples; a snapshot is there."""
    again = train(
        chain(),
        EndlessStream(),
        Settings.model_validate({"level": "trace", "steps": result.samples}),
    )
    for one, other in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert latest(folder, lambda _: None).manifest.samples <= result.samples
    assert result.snapshots


LOOKS = [
    (returned, "stopped"),
    (interrupted, "interrupted"),
    (signalled(signal.SIGINT), "interrupted"),
    (returned_an_instance, "stopped"),
    (raised, "stopped"),
    (signalled(signal.SIGTERM), "interrupted"),
    (signalled(signal.SIGHUP), "interrupted"),
]
ON_RAY = [pytest.mark.ray], [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize(  # (the last four are the first three before an engine sees them)
    ("engine", "look", "word"),
    [(ENGINES[0], *look) for look in LOOKS]
    + [pytest.param(RAY, *look, marks=ON_RAY[n > 2]) for n, look in enumerate(LOOKS)],
)
def test_a_run_that_is_called_off_has_a_result(engine, look, word, tmp_path):
    before = [signal.getsignal(n) for n in ENDING]
    once = []

    def first(progress):  # (a second signal would not wait for what is under way)
        if progress.samples > 3 and not once:
            once.append(progress)
            return look(progress)
        return None

    result = run(engine, tmp_path, first)
    assert {w for w in ("stopped", "interrupted") if getattr(result, w)} == {word}
    check(result, tmp_path)
    assert [signal.getsignal(n) for n in ENDING] == before


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_of_on_progress_carries_the_result(engine, tmp_path):
    with pytest.raises(Enough, match="no more") as caught:
        run(engine, tmp_path, failed)
    assert not caught.value.result.interrupted  # type: ignore[attr-defined]
    check(caught.value.result, tmp_path)  # type: ignore[attr-defined]


def test_a_second_interrupt_in_one_process_keeps_the_weights():
    class Twice(EndlessStream):
        """Interrupts twice at its tenth sample."""

        def samples(self):
            for n, sample in enumerate(super().samples()):
                yield sample
                if n == 10:
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)

    result = train(chain(), Twice(), Settings.model_validate({"level": "trace"}))
    assert result.interrupted
    assert 0 < result.samples < 20


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *_: None])
def test_a_terminal_that_closes_does_what_the_program_says(own):
    """Nothing under `nohup`, which ignores it, nor where it means something else to a program."""
    reports = []

    def look(progress):
        os.kill(os.getpid(), signal.SIGHUP)
        reports.append(progress)
        return Stop if len(reports) > 8 else None

    before = signal.signal(signal.SIGHUP, own)
    try:
        settings = Settings.model_validate({"level": "trace"})
        result = train(chain(), EndlessStream(), settings, on_progress=look)
        assert signal.getsignal(signal.SIGHUP) is own
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.stopped
    assert not result.interrupted


def test_sigterm_before_the_first_tick_is_an_interrupt():
    def look(progress):
        if progress.phase == "plan":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(
            chain(), EndlessStream(), Settings.model_validate({"level": "trace"}), on_progress=look
        )
    assert signal.getsignal(signal.SIGTERM) is before


def _change_handlers():
    """As Ray does while it starts."""
    with signal_handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(15)


def test_handlers_are_set_again_whoever_changes_them():
    def mine(_number, _frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(KeyboardInterrupt):
            _change_handlers()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone():
    results = []

    def work():
        results.append(
            train(
                chain(),
                EndlessStream(),
                Settings.model_validate({"level": "trace"}),
                on_progress=returned,
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert results[0].stopped


# -- the program around a run ----------------------------------------------------------------------


def program(*numbers, callbacks=(), phase=None):
    """Train as a program does, which gets signals `numbers` at its tenth sample, or in a phase."""

    class Signalled(EndlessStream):
        def samples(self):
            for n, sample in enumerate(super().samples()):
                for number in numbers if n == 10 else ():
                    signal.raise_signal(number)
                yield sample

    def look(progress):
        if progress.phase == phase is not None:
            signal.raise_signal(numbers[0])

    more = {"callbacks": callbacks} if callbacks else {"on_progress": look}
    stream = EndlessStream() if phase else Signalled()
    return hamdist.train(chain(), stream, level="trace", steps=100_000, **more)


@pytest.mark.parametrize("callbacks", [(), (hamdist.Callback(),)])
@pytest.mark.parametrize(
    ("numbers", "error", "code"),
    [
        ((signal.SIGTERM,), SystemExit, 143),
        ((signal.SIGHUP,), SystemExit, 129),
        ((signal.SIGINT, signal.SIGINT), KeyboardInterrupt, None),
    ],
)
def test_a_signal_that_ends_a_program_does_so_behind_its_run(numbers, error, code, callbacks):
    """As the system says (128 + n), with what was learned; a loop over seeds does not go on."""
    before = [signal.getsignal(n) for n in ENDING]
    with pytest.raises(error) as caught:
        program(*numbers, callbacks=callbacks)
    assert getattr(caught.value, "code", None) == code
    if len(numbers) == 1:
        assert caught.value.result.interrupted
        assert 9 <= caught.value.result.samples <= 11
    assert [signal.getsignal(n) for n in ENDING] == before


def test_the_first_ctrl_c_returns_the_result():
    result = program(signal.SIGINT)
    assert (result.interrupted, result.samples) == (True, 11)
    assert result.warnings == []


def test_sigterm_before_the_first_tick_ends_the_program():
    with pytest.raises(SystemExit) as caught:
        program(signal.SIGTERM, phase="plan")
    assert caught.value.code == 143


def test_an_interrupt_of_the_users_own_code_comes_out_as_it_is():
    def look(_):
        raise KeyboardInterrupt("enough")

    settings = Settings.model_validate({"level": "trace"})
    with pytest.raises(KeyboardInterrupt, match="enough"):
        hamdist.train(chain(), EndlessStream(), settings, on_progress=look)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_of_the_program_is_called_behind_the_run(number):
    calls = []
    before = signal.signal(number, lambda n, _: calls.append(n))
    try:
        result = program(number)
    finally:
        signal.signal(number, before)
    assert (calls, result.interrupted) == ([number], True)


def test_a_program_that_ignores_sigterm_is_not_ended():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        settings = Settings.model_validate({"level": "trace", "steps": 30})
        result = train(chain(), EndlessStream(), settings, on_progress=signalled(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.interrupted, result.samples) == (False, 30)


@pytest.mark.parametrize("callbacks", [False, True])
def test_a_run_that_was_stopped_is_not_told_of_a_short_stream(callbacks):
    """Oracle: one whose stream is short is."""

    class Stops(hamdist.Callback):
        def on_sample(self, run, answer):
            if answer.number == 5:
                raise Stop

    more = {"callbacks": [Stops()]} if callbacks else {"on_progress": returned}
    result = hamdist.train(chain(), EndlessStream(), level="trace", steps=10_000, **more)
    assert (result.stopped, result.warnings) == (True, [])
    samples = islice(EndlessStream().samples(), 3)
    batches = [(sample.u, sample.y) for sample in samples]
    short = hamdist.train(
        chain(),
        batches,
        level="trace",
        steps=9,
        **{"callbacks": [hamdist.Callback()]} if callbacks else {},
    )
    assert "the stream ended after 3 of 9 samples" in short.warnings[0]


def _write(files):
    with interrupts_delayed():
        signal.raise_signal(signal.SIGINT)
        files.append("whole")


def test_signals_that_come_while_files_are_written_wait():
    files: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _write(files)
    assert files == ["whole"]
