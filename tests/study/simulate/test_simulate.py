"""`hamdist simulate`. Oracles: the in-process run with the same delays, closed forms of a pace and
of a log-normal latency, hand-made files. Steps take what the tests say, not what a clock says."""

from __future__ import annotations

import json
import math
import os
import random
import signal

import pytest
import yaml
from runtime.ray_engine.test_failures import _alive_workers, _end_idle
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Settings, read_settings
from hamdist.dynamics.schedule.events import Phase
from hamdist.errors import SettingsError
from hamdist.study.run.run import run_level
from hamdist.study.simulate import host_plan, simulate
from hamdist.study.simulate.host_plan import MACHINES, read_host_plan
from hamdist.study.simulate.simulate import digest_of

TINY = """
name: tiny
level: trace
steps: 40
model: {width: 8, depth: 4}
stream: {batch: 4}
"""
TWO = """
hosts:
  - {name: a, cores: 1, memory: 2GiB}
  - {name: b, cores: 1, memory: 2GiB}
links: {latency: 0.02, bandwidth: 100Mbit/s, "a->b": {bandwidth: 10Mbit/s}}
"""


@pytest.fixture
def told(monkeypatch):
    """Every phase of every block takes 2 ms."""

    def measure(plan, limit):
        phases = dict.fromkeys((Phase.FORWARD, Phase.BACKWARD, Phase.READ, Phase.TICK), 2e-3)
        return dict.fromkeys(plan.graph.blocks, phases) | {"u": {Phase.EMIT: 0.0}}

    monkeypatch.setattr(simulate, "measure", measure)


@pytest.fixture
def simulated(tmp_path, told):
    def run(plan, *options, code=0, settings=TINY):
        (tmp_path / "s.yaml").write_text(settings)
        (tmp_path / "plan.yaml").write_text(plan)
        words = ["simulate", str(tmp_path / "s.yaml"), "--hosts", str(tmp_path / "plan.yaml")]
        found = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "o.json"), *options])
        assert found.exit_code == code, found.output
        return json.loads((tmp_path / "o.json").read_text()) if not code else found.output

    return run


# -- the file --------------------------------------------------------------------------------------


def read(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return read_host_plan(path)


def test_units_links_and_pairs(tmp_path):
    cluster, notes = read(tmp_path, TWO + "pace: 50\nfailures: {per_hour: 2, detection: 1}\n")
    assert [host.memory for host in cluster.hosts] == [2 * 2**30] * 2
    there, back = cluster.link(0, 1), cluster.link(1, 0)
    assert (there.bytes_per_second, back.bytes_per_second) == (1.25e6, 12.5e6)
    assert there.seconds == back.seconds == 0.02
    assert cluster.link(0, 0).seconds == 0
    assert (cluster.pace, cluster.failures.per_hour, cluster.failures.detection) == (50, 2, 1)
    assert notes == []


def test_outages_of_all_links_and_of_one(tmp_path):
    links = "links: {outages: {per_hour: 2, seconds: 20}, 'a->b': {outages: {per_hour: 9}}}"
    cluster, _ = read(tmp_path, f"hosts: [{{name: a}}, {{name: b}}]\n{links}\n")
    seen = [(link.outages_per_hour, link.outage_seconds) for link in cluster.links.values()]
    assert seen == [(9, 10), (2, 20)]


def test_links_change_at_their_times(tmp_path):
    """Of all links at 30 s, of a->b at 10 s instead; each change keeps what it does not name."""
    links = """
links:
  latency: 0.01
  bandwidth: 10Mbit/s
  changes: [{at: 30s, bandwidth: 5Mbit/s}]
  a->b: {changes: [{at: 10, loss: 0.1}, {at: 40, latency: 0.2}]}
"""
    cluster, _ = read(tmp_path, "hosts: [{name: a}, {name: b}]" + links)

    def seen(links):
        ways = links[0, 1], links[1, 0]
        return [(link.seconds, link.bytes_per_second * 8e-6, link.loss) for link in ways]

    assert seen(cluster.links) == [(0.01, 10, 0), (0.01, 10, 0)]
    assert [(at, seen(one)) for at, one in cluster.changes] == [
        (10, [(0.01, 10, 0.1), (0.01, 10, 0)]),
        (30, [(0.01, 10, 0.1), (0.01, 5, 0)]),
        (40, [(0.2, 10, 0.1), (0.01, 5, 0)]),
    ]


def test_a_run_takes_the_time_of_its_stages(simulated):
    """One sample at a time over a link of 10 ms, of 100 ms from 0.5 s on: by hand, from the rates
    of two plans that do not change."""
    level = ["--set", "engine.actors=2", "--level", "backprop", "--learn"]
    slow = TWO.replace("latency: 0.02", "latency: 0.1")
    first, second = (simulated(plan, *level)["samples_per_second"] for plan in (TWO, slow))
    found = simulated(
        TWO.replace("latency", "changes: [{at: 0.5s, latency: 0.1}], latency"), *level
    )
    assert [s["samples_per_second"] for s in found["stages"]] == pytest.approx([first, second])
    seconds = 0.5 + (40 - 0.5 * first) / second
    assert found["samples_per_second"] == pytest.approx(40 / seconds)
    assert found["curve"][-1]["seconds"] == pytest.approx(seconds)


def test_a_distribution_has_its_median_and_its_tail(tmp_path):
    """exp(mu + sigma g) with the mean `seconds`: half lies below mu, 95 % below + 1.645 sigma."""
    plan = "hosts: [{name: a}, {name: b}]\nlinks: {latency: {median: 0.05, p95: 0.1}}\n"
    link = read(tmp_path, plan)[0].link(0, 1)
    median = link.seconds * math.exp(-(link.sigma**2) / 2)
    assert median == pytest.approx(0.05)
    assert median * math.exp(1.6449 * link.sigma) == pytest.approx(0.1)
    jitter = "hosts: [{name: a}, {name: b}]\nlinks: {latency: 0.05, jitter: 0.2}\n"
    link = read(tmp_path, jitter)[0].link(0, 1)
    assert link.seconds == 0.05
    assert math.sqrt(math.expm1(link.sigma**2)) == pytest.approx(0.2)  # of a log-normal


def test_usual_machines_are_estimates_and_products_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(host_plan, "product_seconds", lambda: 1e-3)
    plan = "hosts: [{name: a, machine: laptop, cores: 2}, {name: b, product: 0.004}, {name: c}]\n"
    cluster, (note,) = read(tmp_path, plan)
    a, b, c = cluster.hosts
    assert a.speed == pytest.approx(1e-3 / MACHINES["laptop"]["product"])
    assert (a.cores, a.memory) == (2, 16 * 2**30)
    assert (b.speed, c.speed) == (0.25, 1.0)
    assert note.startswith("estimated, not measured: a (laptop);")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("hosts: []", "hosts: .*at least 1"),
        ("hosts: [{name: a}, {name: a}]", "two hosts are named 'a'"),
        ("", "'.*': is empty"),
        ("hosts: [{name: a, up: 2}]", r"^[^\n]*$"),
        ("hosts: [{name: a}, {name: b}]\nlinks: {latency: -1}", r"latency: Input[^\[]+-1\)$"),
        ("hosts: [{name: a, memory: 2}]", r"hosts.0.memory: write it with its unit, as 2GiB"),
        ("hosts: [{name: a, up: 10Mbit}]", r"hosts.0.up: write it with its unit, as 100Mbit/s"),
        ("hosts: [{name: a, machine: cray}]", "'cray' is none of raspberry-pi-4"),
        ("hosts: [{name: a, speed: 1, product: 1}]", "'speed' or 'product', not both"),
        ("hosts: [{name: a, cpus: 1}]", "hosts.0.cpus: no such setting"),
        ("hosts: [{name: a}]\nlinks: {'a->x': {}}", "'a->x' is no pair of the hosts a"),
        ("hosts: [{name: a}, {name: b}]\nlinks: {lag: 1}", "links: lag: no such setting"),
        ("hosts: [{name: a}, {name: b}]\nlinks: {'a->b': 3}", "links.a->b: .* not 3"),
        (
            "hosts: [{name: a}, {name: b}]\nlinks: {jitter: 0.1, latency: {median: 1, p95: 2}}",
            "'jitter', or a latency with 'median' and 'p95', not both",
        ),
        (
            "hosts: [{name: a}, {name: b}]\nlinks: {outages: {seconds: 0}}",
            "links: outages.seconds: .*greater than 0",
        ),
        (
            "hosts: [{name: a}, {name: b}]\nlinks: {changes: [{at: 3}, {at: 2}]}",
            "links.changes.1.at is 2; give times in order",
        ),
        (
            "hosts: [{name: a}, {name: b}]\nlinks: {changes: [{at: 3, lag: 1}]}",
            "links.changes.0: lag: no such setting",
        ),
        ("hosts: [{name: a}, {name: b}]\nlinks: {changes: 3}", "links.changes: a list such as"),
        ("pace: 3", "hosts: Field required"),
        ("hosts: [", "plan.yaml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, plan, words):
    with pytest.raises(SettingsError, match=words):
        read(tmp_path, plan)


def test_profile_prints_an_entry_that_a_plan_takes(tmp_path):
    found = CliRunner().invoke(app, ["profile"])
    assert found.exit_code == 0
    cluster, _ = read(tmp_path, f"hosts:\n  {found.output}")
    assert 0.05 < cluster.hosts[0].speed < 20  # (this host, measured twice)


# -- the command -----------------------------------------------------------------------------------


def test_weights_and_accuracy_are_those_of_the_run(simulated):
    """Two actors on two hosts, with the delays that the model chooses: an in-process run with
    these delays has the same weights, to the bit."""
    found = simulated(TWO, "--learn", "--set", "engine.actors=2", "--set", "partition.delays=auto")
    assert {*found["links"]} == {"a->b", "b->a"}
    assert max(found["delays"].values()) > 1
    given = yaml.safe_load(TINY)
    given |= {"partition": {"delays": found["delays"]}, "engine": {"digests": True}}
    run, _ = run_level(Settings.model_validate(given))
    assert run.held_out is not None
    weights = {name: track.last for name, track in run.digests["weights"].items()}
    assert found["digest"] == digest_of(weights)
    assert found["accuracy"] == run.held_out.accuracy
    assert found["curve"][-1]["seconds"] == pytest.approx(40 / found["samples_per_second"])


@pytest.mark.ray
def test_weights_are_those_of_a_run_on_ray(session, simulated):
    """Through sockets, in two processes, with messages that come late."""
    options = ["--set", "engine.actors=2", "--set", "partition.delays=auto"]
    found = simulated(TWO, *options, "--learn")
    engine = {"kind": "ray", "actors": 2, "link_delay": 0.003, "digests": True}
    given = yaml.safe_load(TINY) | {"partition": {"delays": found["delays"]}, "engine": engine}
    run, _ = run_level(Settings.model_validate(given))
    weights = {name: track.last for name, track in run.digests["weights"].items()}
    assert found["digest"] == digest_of(weights)
    assert run.predicted > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_plans_with_late_signals_and_kills(session, simulated, tmp_path, seed):
    """Level, actors, delays, codec and lateness at random; in each second one a kill."""
    draw = random.Random(seed)
    actors, level = draw.choice([2, 3]), draw.choice(["trace", "backprop", "local", "heads"])
    engine = {"compress": draw.choice(["none", "bf16", "int8"]), "actors": actors}
    given = yaml.safe_load(TINY) | {"level": level, "steps": 1500, "seed": seed}
    given["partition"] = {"delay": draw.randint(1, 3)}
    given["engine"] = engine
    found = simulated(TWO.replace("cores: 1", "cores: 2"), "--learn", settings=yaml.dump(given))
    given["engine"] = engine | {"kind": "ray", "digests": True, "transport": "tcp"}
    given["engine"]["link_delay"] = draw.uniform(1e-3, 3e-3)
    given["snapshots"] = {"path": str(tmp_path / "kept"), "every": 50}
    _end_idle(session)
    killed = []

    def kill(progress):
        workers = _alive_workers()
        if seed % 2 and progress.samples > 60 and workers and not killed:
            killed.append(draw.choice(workers))
            os.kill(killed[0], signal.SIGKILL)

    run, _ = run_level(Settings.model_validate(given), on_progress=kill)
    assert len(run.replaced) == seed % 2
    weights = {name: track.last for name, track in run.digests["weights"].items()}
    assert found["digest"] == digest_of(weights)


def test_auto_places_no_actor_behind_a_link_that_costs_more_than_it_brings(simulated):
    """At 2 s one way, with delays of 1, one actor alone is the fastest."""
    slow = TWO.replace("latency: 0.02", "latency: 2")
    alone = simulated(slow)
    assert len(alone["actors"]) == 1
    assert "work" in alone["critical"]
    both = simulated(slow, "--set", "engine.actors=2")
    assert "block1->block2: 100 % wire" in both["critical"]
    assert both["samples_per_second"] < alone["samples_per_second"]


def test_the_pace_is_what_comes_out(simulated, tmp_path):
    found = simulated(TWO + "pace: 5\n")
    files = [str(tmp_path / "s.yaml"), "--hosts", str(tmp_path / "plan.yaml")]
    alone = CliRunner().invoke(app, ["simulate", *files, "--json", "-"]).stdout
    assert json.loads(alone)["critical"] == found["critical"]
    assert found["samples_per_second"] == pytest.approx(5)
    assert found["critical"] == "limited by the stream's pace: 100 % work"


def test_jitter_spreads_the_percentiles_and_the_seed_repeats_them(simulated):
    plan = TWO.replace("latency: 0.02", "latency: 0.02, jitter: 0.5, loss: 0.01")
    one, again = (simulated(plan, "--set", "engine.actors=2") for _ in range(2))
    assert one == again
    p = one["percentiles"]
    assert p["p5"] < p["p50"] < p["p95"] <= 1.02 * one["undisturbed"]


def test_more_actors_than_cores_and_failures_with_snapshots(simulated, tmp_path):
    plan = "hosts: [{name: a, cores: 1}]\nfailures: {per_hour: 400, detection: 1, startup: 1}\n"
    options = ["--set", "engine.actors=2", "--set", "engine.blocks={'*': {cpus: 0.5}}"]
    found = simulated(plan, *options, "--set", f"snapshots={{path: {tmp_path}/k, every: 20}}")
    assert found["simulated_by"] == "events"
    assert "2 actors on 1 core(s) of a" in found["critical"]
    assert found["failures"] > 0
    assert found["lost_seconds_per_hour"]["failures"] > 0
    assert found["samples_per_second"] < found["undisturbed"]


def test_memory_is_a_limit(simulated):
    small = TWO.replace("2GiB", "64MiB")
    assert simulated(small)["memory"]["a"] > 64 * 2**20
    assert "needs about" in simulated(small, "--sweep", code=2)


def test_the_sweep_writes_settings_that_run(simulated, tmp_path):
    out = tmp_path / "sweep"
    found = simulated(TWO, "--sweep", "--levels", "local", "--out", str(out))
    first, *others = sorted(out.iterdir(), key=lambda path: path.name != "settings.yaml")
    assert first.name == "settings.yaml"
    assert others
    assert {path.name for path in others} <= {f"runner-up-{i}.yaml" for i in range(1, 5)}
    settings = read_settings(first.read_text(), str(first))
    assert settings.partition.delays == found["delays"]
    assert settings.engine.placement == tuple(tuple(a["blocks"]) for a in found["actors"])
    hosts = {name: b.host for name, b in settings.engine.blocks.items()}
    assert hosts == {name: a["host"] for a in found["actors"] for name in a["blocks"]}
    written = first.stat().st_mtime_ns
    simulated(TWO, "--sweep", "--out", str(out))
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "sweep-2" / "settings.yaml").exists()
    (out / "runner-up-9.yaml").write_text("")
    simulated(TWO, "--sweep", "--out", str(out), "--overwrite")
    assert not (out / "runner-up-9.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--levels", "trace"], "--levels, --out and --overwrite belong to --sweep"),
        (["--sweep", "--levels", "warp"], "--levels 'warp'"),
        (["--level", "auto"], "level 'auto' is chosen when a run starts"),
    ],
)
def test_wrong_options_are_named(simulated, options, words):
    assert words in simulated(TWO, *options, code=2).replace("\n", " ")


def test_a_cluster_without_room_is_refused(simulated):
    assert "4 actors ask for 4 CPUs" in simulated(TWO, "--set", "engine.actors=4", code=1)
