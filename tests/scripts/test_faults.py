"""scripts/chaos, scripts/soak and scripts/stress: their choices and figures against numbers made by
hand, and each of them once, tiny."""

from __future__ import annotations

import json
import os
import re
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
from faults.drive import metrics, undisturbed
from faults.events import (
    ALONE,
    BLOCKS,
    DRIVER,
    HANG,
    HOST,
    HOSTS,
    KILL,
    LINK,
    RAYLET,
    Event,
    chosen,
)
from faults.gauges import Gauge
from faults.net import Numbered, network
from faults.numbered import NEXT, SEEN, WRONG, Counted
from faults.scenarios import SCENARIOS
from faults.trial import Trial, _wrong, trial
from faults.watch import lost_seconds
from safetensors.torch import save_file

from hamdist.runtime.nodes.mailbox import Mailbox

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    return runpy.run_path(str(SCRIPTS / name))


def test_events_follow_from_the_seed():
    first = chosen(len(ALONE) * 3, 4, 3000)
    assert first == chosen(len(ALONE) * 3, 4, 3000)
    assert first != chosen(len(ALONE) * 3, 5, 3000)
    passes = [event.passes for event in first]
    assert passes == sorted(passes)
    assert passes[0] > 0
    assert passes[-1] < 3000
    assert {event.what for event in first} == {KILL, HANG, DRIVER}
    assert {event.block for event in first} <= set(range(BLOCKS))
    assert sum(event.what == DRIVER for event in first) == 3 * ALONE.count(DRIVER)


def test_events_on_hosts():
    events = chosen(len(HOSTS) * 2, 4, 3000, (1, 2))
    assert {event.what for event in events} == {KILL, HANG, DRIVER, RAYLET, HOST, LINK}
    for event in events:
        assert (event.host in (1, 2)) == (event.what in (RAYLET, HOST, LINK))
        assert (event.seconds >= 1) == (event.what == LINK)


def beats(folder, *times):
    (folder / "marks").mkdir()
    (folder / "marks" / "beats").write_bytes(struct.pack(f"{len(times)}d", *times))


def test_lost_seconds(tmp_path):
    """Something happens at 2.5 and at 8.5 s, and at 13 s."""
    beats(tmp_path, 0, 1, 2, 2.6, 7, 8, 8.4, 12)
    found = lost_seconds({3: 2.5, 5: 8.5, 8: 13.0}, {}, tmp_path)
    assert found == pytest.approx({3: 4.4, 5: 3.5, 8: float("inf")})


def test_a_silence_is_the_next_events(tmp_path):
    """After a short one of its own, an event is over long before the next one: at 9 s."""
    beats(tmp_path, 0, 1, 3, 4, 5, 6, 7, 8, 8.9, 20)
    assert lost_seconds({0: 1.0, 1: 9.0}, {}, tmp_path) == pytest.approx({0: 2.0, 1: 11.0})


def test_two_in_one_silence(tmp_path):
    """The first is still being mended when the second happens, at 4 s."""
    beats(tmp_path, 0, 1, 9)
    assert lost_seconds({0: 1.0, 1: 4.0}, {}, tmp_path) == {0: 8.0, 1: 5.0}


def test_a_lost_driver_is_blamed_for_its_own_seconds(tmp_path):
    """At 3 s, the next driver starts at 3.1 s and has its first result at 20 s. An actor was killed
    at 2 s, which nobody could mend in time; another one at 3.02 s, and one at 21 s."""
    beats(tmp_path, 0, 1, 2, 3.01, 3.05, 20, 20.5, 21, 24, 24.5)
    found = lost_seconds({1: 2.0, 2: 3.0, 3: 3.02, 4: 21.0}, {2: 3.1}, tmp_path)
    assert found == pytest.approx({1: 1.0, 2: 16.95, 3: 0.0, 4: 3.0})


def test_what_a_lost_driver_has_started_goes_on_for_a_while(tmp_path):
    """Up to 3.9 s, though the next driver is started at 3.1 s; at 3.5 s an actor is killed."""
    beats(tmp_path, 2, 2.9, 3.05, 3.2, 3.5, 3.9, 18, 18.2, 18.4)
    found = lost_seconds({1: 3.0, 2: 3.5}, {1: 3.1}, tmp_path)
    assert found == pytest.approx({1: 14.1, 2: 0.0})


def test_a_driver_that_is_lost_while_an_actor_is_replaced(tmp_path):
    beats(tmp_path, 0, 1, 20, 21)
    found = lost_seconds({7: 1.0, 2: 3.5}, {2: 3.6}, tmp_path)
    assert found == pytest.approx({7: 2.5, 2: 16.5})


def test_no_result_after_another_driver(tmp_path):
    beats(tmp_path, 0, 1)
    assert lost_seconds({2: 0.5}, {2: 3.6}, tmp_path) == {2: float("inf")}


def test_seconds_by_kind():
    events = [Event(0, KILL, 1, 5, 0.1), Event(1, HANG, 1, 9, 0.1), Event(2, KILL, 0, 20, 0.1)]
    row = Trial("trace", events, {0: 3.0, 2: 2.5}, 2, 0, 7, "")
    assert script("chaos")["_by_kind"]([row, row]) == {KILL: [3.0, 2.5, 3.0, 2.5]}


def test_gauges():
    """A line: 3 MiB per 10^5 ticks, looked at every hundred of a thousand ticks."""
    ticks = list(range(0, 1000, 100))
    gauge = Gauge("p", ticks, [5 + 3e-5 * k for k in ticks], [7] * 10, [1] * 10, [2] * 10)
    assert gauge.slope(gauge.memory, 1000) == pytest.approx(3)
    # The looks at 100 and at 500; between 950 and 1000 there is none: the one at 900.
    points = [gauge.at(gauge.memory, 1000, share) for share in (0.1, 0.5, 1.0)]
    assert points == pytest.approx([5 + 3e-5 * k for k in (100, 500, 900)])
    # Of a run of 2000 ticks those at 400 and at 500 stand for a quarter.
    assert gauge.at(gauge.memory, 2000, 0.25) == pytest.approx(5 + 3e-5 * 450)
    assert gauge.slope(gauge.files, 1000) == 0
    assert gauge.at(gauge.threads, 1000, 0.5) == 2
    gauge.end_at(700)
    assert gauge.ticks == [0, 100, 200, 300, 400, 500, 600, 700]
    assert gauge.at(gauge.memory, 1000, 1.0) == pytest.approx(5 + 3e-5 * 700)


@pytest.mark.parametrize("what", ["memory", "files", "sockets", "threads"])
def test_what_grows_is_seen(what):
    """From 50 % to 100 % of a run of a hundred ticks, which are looked at one by one."""
    grows = script("soak")["_grows"]
    ticks = list(range(101))
    flat = {name: [10] * 101 for name in ("memory", "files", "sockets", "threads")}
    assert not grows(Gauge("p", ticks, **flat), 100)
    early = [0 if k < 45 else 10 for k in ticks]  # before that half
    assert not grows(Gauge("p", ticks, **{**flat, what: early}), 100)
    assert grows(Gauge("p", ticks, **{**flat, what: [k / 10 for k in ticks]}), 100)


def test_samples_are_counted():
    """0, 1, then 1 again, then 3 in place of 2."""
    counted = Counted(slow=False)
    for number in (0, 1, 1, 3):
        counted(torch.tensor([[float(number), 9.0]]))
    counts = counted.counts.tolist()
    assert (counts[SEEN], counts[NEXT], counts[WRONG]) == (4, 4, 2)


def test_the_stream_begins_anywhere():
    all_of_them = list(Numbered(6).samples())
    for sample, other in zip(all_of_them[4:], Numbered(6).samples_from(4), strict=True):
        assert torch.equal(sample.u, other.u)
        assert torch.equal(sample.y, other.y)


def test_what_differs_is_said(tmp_path):
    calm = undisturbed("trace", 12)
    state = {k: v.clone() for k, v in calm.model.state_dict().items()}
    told = metrics(calm)
    save_file(state, tmp_path / "result.safetensors")
    (tmp_path / "result.json").write_text(json.dumps(told))
    assert _wrong(tmp_path, 0, calm, "") == ""
    assert "ended with 1" in _wrong(tmp_path, 1, calm, "")
    told[0][1][0]["loss"] += 1e-15 * max(1, told[0][1][0]["loss"])
    (tmp_path / "result.json").write_text(json.dumps(told))
    assert _wrong(tmp_path, 0, calm, "") == "metrics differ"
    state["3.1.passes"] += 1
    save_file(state, tmp_path / "result.safetensors")
    assert _wrong(tmp_path, 0, calm, "") == "weights differ: 3.1.passes"


def test_the_network_learns():
    calm = undisturbed("trace", 12)
    before = network((), None).state_dict()
    after = calm.model.state_dict()
    assert not torch.equal(before["0.0.weight"], after["0.0.weight"])
    assert int(after["4.1.passes"]) == 12


def test_kills_are_shared_by_the_levels():
    shares = script("chaos")["_shares"]
    assert shares(20, ["a", "b", "c"]) == [("a", 7), ("b", 7), ("c", 6)]
    assert shares(2, ["a", "b", "c"]) == [("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("chaos", ["--levels", "trace,nonsense"], "nonsense unknown; known: local, trace"),
        ("chaos", ["--kills", "0"], "at least 1"),
        ("soak", ["--engines", "x"], "x unknown; known: inprocess, ray"),
        ("stress", ["--runs", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(name, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as caught:
        script(name)["main"]()
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("HAMDIST_FORKED_WORKERS") == "", reason="coverage itself grows")
def test_soak(monkeypatch, capsys, tmp_path):
    file = tmp_path / "soak.json"
    arguments = ["--ticks", "300", "--engines", "inprocess", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    assert script("soak")["main"]() == 0
    found = json.loads(file.read_text())
    counts = {"given": 300, "compared": 300, "lost": 0, "doubled": 0, "astray": 0}
    assert found["inprocess"]["samples"] == counts
    assert "no sample lost or doubled" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(110)
def test_a_kill():
    found = trial("trace", 150, [Event(0, KILL, block=1, passes=60, seconds=0.001)])
    assert found.wrong == ""
    assert found.replaced == 1
    assert list(found.seconds) == [0]
    assert found.seconds[0] < float("inf")


def test_stress_follows_from_the_seed():
    case_of = script("stress")["case_of"]
    cases = [case_of(3, n) for n in range(300)]
    assert cases == [case_of(3, n) for n in range(300)]
    assert cases != [case_of(4, n) for n in range(300)]
    assert {case["net"] for case in cases} == {"conv1d", "attention", "lstm", "mlp", "conv2d"}
    levels = {case["fields"]["level"] for case in cases}
    assert levels == {"trace", "local", "heads", "backprop"}
    assert {case["engine"]["transport"] for case in cases} == {"auto", "shm", "ipc", "tcp"}
    assert min(case["items"] for case in cases) == 1
    assert 150 < max(case["items"] for case in cases) <= 200
    assert 0 < sum(case["killed"] for case in cases) < 40


@pytest.mark.ray
@pytest.mark.timeout(110)
def test_stress_names_the_first_signal_that_differs(session, monkeypatch, capsys, tmp_path):
    """Of two runs, in the second of which the in-process engine's network gets another second
    sample. (Its streams are drawn by actors: what is patched here is this process's alone.)"""
    file = tmp_path / "stress.json"
    before, runs = Mailbox.post, []

    def post(self, channel, signal):
        if channel.key.startswith("state u"):
            runs.extend([signal] if signal.stamp.sample == 0 else [])
            if len(runs) == 2 and signal.stamp.sample == 1:
                signal.payload = signal.payload + 1.0
        before(self, channel, signal)

    monkeypatch.setattr(Mailbox, "post", post)
    arguments = ["--runs", "2", "--load", "0", "--seed", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["stress", *arguments])
    assert script("stress")["main"]() == 1
    found = json.loads(file.read_text())
    assert (found["runs"], found["different"]) == (2, 1)
    first = found["first"]
    assert (first["run"], first["kind"], first["direction"]) == (1, "sent", "state")
    assert first["edge"].startswith("u->")
    assert first["equal"] == -1 < first["tick"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_names_tests_that_there_are(name):
    tests = Path(__file__).parents[1]
    _, named = SCENARIOS[name]
    files = [tests / word for word in named.split() if "/" in word]
    assert all(file.is_file() for file in files)
    functions = " ".join(
        re.findall(r"^def (test_\w+)", "".join(f.read_text() for f in files), re.M)
    )
    chosen = named.partition(" -k ")[2].strip("'").split(" or ")
    assert all(word in functions for word in chosen)
