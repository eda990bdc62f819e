"""The parts of a launch, without Ray. Oracles: the files as they were; closed forms; tables."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hamdist.config import Level, Settings
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import ClusterError, SettingsError
from hamdist.launch import local_cluster as one_host
from hamdist.launch.cluster_file import ClusterSettings, find_cluster
from hamdist.launch.doctor import Findings, LinkFacts, host_facts, storage_fault, verdicts
from hamdist.launch.doctor_job import HostProbe
from hamdist.launch.driver import _as_given
from hamdist.launch.events import (
    PART_BYTES,
    DriverLost,
    Ended,
    FilesStay,
    Results,
    file_events,
    follow,
    from_line,
    to_line,
)
from hamdist.launch.jobs_api import Jobs
from hamdist.launch.package import (
    JobSpec,
    in_package,
    named_there,
    on_ray,
    own_code,
    packed,
    read_spec,
)
from hamdist.launch.submit import dry_run, make_id, resumed_from, snapshots_path
from hamdist.models.build import load_factory
from hamdist.runtime.placement.assign_hosts import HostInfo
from hamdist.runtime.placement.links import Probe
from hamdist.runtime.results.events import RunBegun, Warned
from hamdist.runtime.results.result import BlockProgress, Progress
from hamdist.runtime.results.run_events import ProgressEvents, ProgressPace
from hamdist.study.run.own_data import OwnFunctions, load_stream
from hamdist.study.shared.recipes import load_settings

# -- the cluster file ------------------------------------------------------------------------------


@pytest.fixture
def cluster_file(tmp_path):
    def write(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("given", "jobs"),
    [
        ("head", "http://head:8265"),
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("https://ray.example/", "https://ray.example:8265"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_an_address_alone(given, jobs):
    assert find_cluster(given) == ClusterSettings(jobs=jobs)


def test_the_jobs_api_is_beside_the_head(cluster_file):
    found = find_cluster(cluster_file("address: 10.0.0.7:6379\n"))
    assert (found.jobs, found.address) == ("http://10.0.0.7:8265", "10.0.0.7:6379")


def test_which_cluster_if_none_is_named(cluster_file, tmp_path, monkeypatch):
    monkeypatch.delenv("HAMDIST_CLUSTER", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SettingsError, match="which cluster.*HAMDIST_CLUSTER.*cluster start"):
        find_cluster(None)
    own = tmp_path / ".hamdist/cluster/cluster.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("jobs: http://own:1\n")
    assert find_cluster(None).jobs == "http://own:1"
    monkeypatch.setenv("HAMDIST_CLUSTER", "http://variable:2")
    assert find_cluster(None).jobs == "http://variable:2"
    assert find_cluster("http://given:3").jobs == "http://given:3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs: ftp://x\n", "jobs: write it as http://HOST:PORT"),
        ("jobs: http://x/path\n", "nothing behind it"),
        ("jobs: http://x:99999\n", "jobs: write it as http://HOST:PORT"),
        ("address: 10.0.0.1\n", "address: write it as HOST:PORT"),
        ("storage: here\n", "storage: write the whole path"),
        ("python: 'python; rm x'\n", "python: String should match"),
        ("env: {'A B': x}\n", "env"),
        ("stop_seconds: 0\n", "stop_seconds: .*greater than or equal to 1"),
        ("tokens: x\n", "tokens: no such setting"),
        ("token: /no/such\n", "token: '/no/such' cannot be read"),
        ("[1]\n", "a mapping of names to values"),
        ("a: [\n", "line 2: no valid YAML"),
    ],
)
def test_a_wrong_cluster_file_is_one_clear_error(cluster_file, text, words):
    with pytest.raises(SettingsError, match=words):
        find_cluster(cluster_file(text))


def test_a_token_is_its_owners_alone(cluster_file, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    path = cluster_file(f"token: {token}\n")
    with pytest.raises(SettingsError, match="others can read .*mode 644.*chmod 600"):
        find_cluster(path)
    token.chmod(0o600)
    assert find_cluster(path).token == str(token)
    token.write_text(" \n")
    with pytest.raises(SettingsError, match="holds no token"):
        find_cluster(path)


def test_no_such_file():
    with pytest.raises(SettingsError, match=r"'nowhere.yaml': cannot be read"):
        find_cluster("nowhere.yaml")


# -- what a run tells ------------------------------------------------------------------------------

WINDOWS = [Window(0, 4, 5, 5.0, 1, 20), Window(5, 9, 5, 2.5, 9, 20), Window(10, 14, 5, 1.0, 18, 20)]
PROGRESS = Progress(
    2.5, 14, 100, WINDOWS, [BlockProgress("b0", 3, 2, "b0->b1"), BlockProgress("b1", 2, 2)], "note"
)


def test_events_survive_the_log():
    events = [
        RunBegun(title="a [b]: é", engine="ray", batch=8),
        *ProgressEvents("trace", 1)(PROGRESS),
        *ProgressEvents()(Progress(0.0, 0, None, [], [], phase="ray")),
        Warned(text="line\nline"),
        Ended(code=1, error="e", details="d\nd"),
    ]
    for event in events:
        line = to_line(event)
        assert line.isascii()
        assert "\n" not in line
        assert from_line("text" + line) == ("text", event)


@pytest.mark.parametrize(
    "line", ["plain", "#hamdist {}", "#hamdist [1", '#hamdist {"event": "rm"}', "#hamdist null", ""]
)
def test_what_is_no_event_is_text(line):
    assert from_line(line) == (line, None)


@pytest.mark.parametrize("name", ["../x", "/x", ".x", "a/b", "", "a\n", "a b"])
def test_a_file_has_a_plain_name(name):
    line = '#hamdist {"event": "file", "name": %s, "size": 1, "sha256": "x"}' % json.dumps(name)  # noqa: UP031
    assert from_line(line)[1] is None


def test_a_log_stays_small():
    """Two days of progress, asked four times a second: at most 2000 (1 + ln(T / 2000)) lines."""
    pace = ProgressPace()
    told = [n / 4 for n in range(4 * 48 * 3600) if pace.due(n / 4)]
    assert 2000 < len(told) < 2000 * (1 + 4.5)
    assert told[:4] == [0, 1, 2, 3]


def lines_of(*paths, most=10**9):
    return [to_line(event) for path in paths for event in file_events(path, most)]


@pytest.fixture
def result(tmp_path):
    """Two files, one of them of several parts, and what they become."""
    one, two = tmp_path / "a.bin", tmp_path / "b.txt"
    one.write_bytes(os.urandom(2 * PART_BYTES + 17))
    two.write_bytes(b"")
    return one, two, tmp_path / "out"


def test_files_arrive_as_they_were(result):
    one, two, out = result
    results = Results(out)
    said: list[str] = []
    end = to_line(Ended(code=0))
    lines = ["text", *lines_of(one, two), to_line(FilesStay(host="h", folder="/f")), end, "unread"]
    assert list(follow(lines, results, said.append)) == [Ended(code=0)]
    assert said == ["text"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        "a.bin": one.read_bytes(),
        "b.txt": b"",
    }
    assert results.written == ["a.bin", "b.txt"]
    assert results.files_stay == FilesStay(host="h", folder="/f")


def test_files_that_nobody_wants_pass(result):
    one, two, _ = result
    results = Results(None)
    assert list(follow(lines_of(one, two), results, print)) == []
    assert results.written == []


def test_a_file_comes_again_from_the_next_driver(result):
    """The first one was lost in the midst of it, half a line written."""
    one, _, out = result
    once = lines_of(one)
    lost = DriverLost(signal="SIGKILL", tick=7)
    lines = [*once[:-1], once[-1][:40], "", to_line(lost), *once, to_line(Ended(code=0))]
    results = Results(out)
    assert list(follow(lines, results, print)) == [lost, Ended(code=0)]
    assert (out / "a.bin").read_bytes() == one.read_bytes()
    assert results.written == ["a.bin"]


def test_a_large_file_stays(result):
    one, two, out = result
    results = Results(out)
    list(follow(lines_of(one, two, most=1000), results, print))
    assert [file.name for file in results.left] == ["a.bin"]
    assert [p.name for p in out.iterdir()] == ["b.txt"]


def broken(line, **changes):
    return "#hamdist " + json.dumps({**json.loads(line.removeprefix("#hamdist ")), **changes})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda ls: ls[:-1], "a.bin did not arrive whole"),
        (lambda ls: [*ls[:-1], to_line(Ended(code=0))], "a.bin did not arrive whole"),
        (lambda ls: [ls[0], ls[2], ls[2], ls[3]], "a.bin arrived damaged"),
        (lambda ls: [*ls, ls[1]], "a part of no file"),
        (lambda ls: [ls[0], broken(ls[1], data="*"), *ls[2:]], "did not arrive whole"),
        (lambda ls: [broken(ls[0], size=9), *ls[1:]], "did not arrive whole|damaged"),
        (lambda ls: [*ls[:2], ls[0], *ls[1:]], "did not arrive whole"),
    ],
)
def test_a_damaged_log_gives_no_file(result, spoil, words):
    one, _, out = result
    with pytest.raises(ClusterError, match=words):
        list(follow(spoil(lines_of(one)), Results(out), print))
    assert {p.name for p in out.iterdir()} <= {"a.bin"}
    for path in out.iterdir():
        assert path.read_bytes() == one.read_bytes()


# -- snapshots -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "path", "kept"),
    [
        (None, None, None),
        ("/mnt/s", None, "/mnt/s/x-1/snapshots"),
        ("/mnt/s", "/own", "/own"),
        (None, "s3://bucket/own", "s3://bucket/own"),
    ],
)
def test_where_a_launched_run_keeps_snapshots(storage, path, kept):
    settings = Settings.model_validate({"snapshots": {"path": path}})
    assert snapshots_path(settings, ClusterSettings(storage=storage), "x-1") == kept


def test_a_relative_folder_for_snapshots_is_refused():
    settings = Settings.model_validate({"snapshots": {"path": "own"}})
    with pytest.raises(SettingsError, match="'own'.*the whole path, or a URL"):
        snapshots_path(settings, ClusterSettings(storage="/mnt/s"), "x-1")


def test_what_a_run_goes_on_from():
    stored = ClusterSettings(storage="/mnt/s")
    assert resumed_from("x-1", stored) == "/mnt/s/x-1/snapshots"
    assert resumed_from("/own/x", ClusterSettings()) == "/own/x"
    with pytest.raises(SettingsError, match="'x-1'.*no storage"):
        resumed_from("x-1", ClusterSettings())


def test_what_goes_on_from_a_run():
    own = JobSpec(id="x", model=None, storage="/s", most=5, snapshots="/s/x/snapshots")
    assert (own.own_snapshots, own.called) == (True, "x")
    other = own.model_copy(update={"snapshots": "/other"})
    assert (other.own_snapshots, other.called) == (False, "/other")


# -- the job and its driver ------------------------------------------------------------------------

GUARDED = """
import signal, sys
from hamdist.launch.guardian import Guardian
driver = "import os, signal, sys, time; lost = sys.argv[1:]; " + sys.argv[1]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a job of Ray
sys.exit(Guardian((sys.executable, "-c", driver), sys.argv[2] == "kept").run())
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def guarded(driver, kept="kept"):
    return subprocess.Popen(
        [sys.executable, "-c", GUARDED, driver, kept],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told_by(job):
    out, err = job.communicate(timeout=60)
    return job.returncode, [from_line(line) for line in out.splitlines() if line], err


def test_a_driver_that_ends_by_itself_is_not_started_again():
    code, told, err = told_by(guarded("print('once', lost); sys.exit(3)"))
    assert (code, told) == (3, [("once []", None)]), err


def test_a_lost_driver_is_started_again_and_told_why():
    code, told, err = told_by(guarded(f"print(lost, flush=True); lost or {KILLED}"))
    assert (code, told) == (0, [("[]", None), ("['SIGKILL']", None)]), err


def test_a_driver_that_is_always_lost_ends_the_job():
    code, told, err = told_by(guarded(f"print('one', end='', flush=True); {KILLED}"))
    *before, (_, end) = told
    assert (code, before) == (1, [("one", None)] * 4), err
    assert (end.code, "was lost 4 times (SIGKILL)" in end.error) == (1, True)


def test_without_snapshots_a_lost_driver_ends_the_job():
    code, [(_, end)], err = told_by(guarded(KILLED, "nothing"))
    assert (code, "keeps no snapshots" in end.error) == (1, True), err


HEARS = (
    "heard = []; "
    "signal.signal(signal.SIGINT, lambda *_: heard.append('SIGINT')); "
    "signal.signal(signal.SIGTERM, lambda *_: heard.append('SIGTERM')); "  # as Ray does
    "print(os.getpid(), flush=True); "
    "all(iter(lambda: time.sleep(0.01) or not heard, False)); "
    "print(heard, signal.SIGTERM in signal.sigpending()); sys.exit(130)"
)


def test_the_driver_hears_of_the_end_once():
    job = guarded(HEARS)
    driver = int(job.stdout.readline())
    for pid in (driver, job.pid):  # as the Jobs API does: to all of them
        os.kill(pid, signal.SIGTERM)
    code, told, err = told_by(job)
    assert (code, told) == (130, [("['SIGINT'] True", None)]), err


def test_a_driver_that_is_stopped_before_it_says_a_word():
    job = guarded(
        "print(1, flush=True); signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(60)"
    )
    job.stdout.readline()
    os.kill(job.pid, signal.SIGTERM)
    code, [(_, end)], err = told_by(job)
    assert (code, end.interrupted, end.error) == (130, True, "stopped before its first tick"), err


# -- the package -----------------------------------------------------------------------------------

SPEC = JobSpec(id="x", model=None, storage=None, most=5)


def test_a_package_holds_the_settings_and_the_users_code(tmp_path, monkeypatch):
    package = tmp_path / "mine_to_ship"
    (package / "deep/__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "deep/__init__.py", ".secret", "deep/__pycache__/x.pyc"):
        (package / name).write_text("")
    (package / "deep/models.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "mine_to_ship.deep.models:make"
    load_factory(name)
    settings = on_ray(load_settings("digits", [{"steps": 7}]).for_level(Level.LOCAL))
    with packed(settings, SPEC.model_copy(update={"model": name})) as folder:
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == {
            *("settings.yaml", "spec.json"),
            *("mine_to_ship/__init__.py", "mine_to_ship/deep/__init__.py"),
            "mine_to_ship/deep/models.py",
        }
        assert load_settings(str(folder / "settings.yaml")) == settings
        assert read_spec(folder).model == name
    assert not folder.exists()


def test_a_package_holds_the_code_of_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "import torch\ndef net(): return torch.nn.Linear(2, 2)\ndef data(): return [(1, 2)]\n"
    for module in ("shipped_both", "shipped_other"):
        (tmp_path / f"{module}.py").write_text(text)
    settings = load_settings("digits")
    for stream, files in (
        ("shipped_both", {"shipped_both.py"}),  # one file for both travels once
        ("shipped_other", {"shipped_both.py", "shipped_other.py"}),
    ):
        load_factory(f"{tmp_path}/shipped_both.py:net")
        load_stream(f"{tmp_path}/{stream}.py:data")
        named = {"model": "shipped_both:net", "stream": f"{stream}:data"}
        with packed(settings, SPEC.model_copy(update=named)) as folder:
            assert {p.name for p in folder.iterdir()} == {"settings.yaml", "spec.json", *files}
            assert read_spec(folder).stream == f"{stream}:data"


def test_a_dry_run_with_a_stream_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shipped_data.py").write_text(
        "import torch\nfrom hamdist.streams import from_iterable\n"
        "def data():\n"
        "    return from_iterable([(torch.zeros(8, 20), torch.zeros(8).long())], classes=3)\n"
    )
    name = f"{tmp_path}/shipped_data.py:data"
    settings = load_settings("digits", [{"engine": {"actors": 1}}])
    own = on_ray(settings.for_level(settings.level))
    data = load_stream(name)
    found = dry_run(own, {"--stream": name}, OwnFunctions(None, data), ClusterSettings(), [host(1)])
    # theta and omega, float32: 20 inputs and 3 outputs, where digits has 64 and 10
    weights = (20 * 64 + 64) + 2 * (64 * 64 + 64) + (64 * 3 + 3)
    assert [round(size * 2**20) for *_, size in found.actors] == [2 * 4 * weights]
    assert f"--stream: {tmp_path}/shipped_data.py travels along" in found.notes


def test_a_file_travels_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "nets/shipped_net.py"
    file.parent.mkdir()
    file.write_text("import torch\ndef make(): return torch.nn.Linear(2, 2)\n")
    name = f"{file}:make"
    load_factory(name)
    assert own_code(name) == file
    there = named_there(name)
    assert (there, own_code(there)) == ("shipped_net:make", file)


def test_what_a_file_imports_from_its_folder_travels(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    files = {
        "net_of_parts.py": "import torch\nimport part_of_net, parts_of_net.deep\n"
        "def make(): return torch.nn.Linear(2, part_of_net.WIDTH)\n",
        "part_of_net.py": "WIDTH = 3\n",
        "parts_of_net/__init__.py": "",
        "parts_of_net/deep.py": "",
        "not_imported.py": "",
    }
    for name, text in files.items():
        file = tmp_path / "nets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    model = f"{tmp_path}/nets/net_of_parts.py:make"
    load_factory(model)
    spec = JobSpec(id="x", model=model, storage=None, most=1)
    with packed(Settings(), spec) as folder:
        sent = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    for name in ("net_of_parts", "part_of_net", "parts_of_net", "parts_of_net.deep"):
        del sys.modules[name]
    assert sent == {"settings.yaml", "spec.json", *files} - {"not_imported.py"}


def test_installed_code_does_not_travel():
    load_factory("torch.nn:Identity")
    assert own_code("torch.nn:Identity") is None
    assert own_code("json:loads") is None


def test_files_of_rules_levels_and_optimisers_travel(tmp_path, monkeypatch):
    """The settings of the job name them as modules, which lie beside them."""
    file = tmp_path / "shipped_rules.py"
    file.write_text("import hamdist\nclass Mine(hamdist.Rule):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = f"{file}:Mine"
    rules = {"a": mine, "b": {"name": mine, "gain": 2}, "c": "kolen-pollack"}
    level = tmp_path / "shipped_levels.py"
    level.write_text("import hamdist\nclass Own(hamdist.OwnLevel):\n    pass\n")
    steps = tmp_path / "shipped_steps.py"
    steps.write_text("import torch\nclass Steps(torch.optim.SGD):\n    pass\n")
    learning = {"rules": rules, "lr": 0.1, "optimizer": f"{steps}:Steps"}
    own = {"learning": learning, "locality": {"level": f"{level}:Own"}}
    settings = Settings.model_validate(own)
    with packed(settings, JobSpec(id="x", model=None, storage=None, most=1)) as folder:
        sent = load_settings(str(folder / "settings.yaml"), [])
        loaded = in_package(sent)
        there = loaded.learning.rules
        assert (folder / file.name).read_text() == file.read_text()
        assert (folder / level.name).read_text() == level.read_text()
        assert (folder / steps.name).read_text() == steps.read_text()
        assert loaded.locality.level == "shipped_levels:Own"
        assert loaded.learning.optimizer.name == "shipped_steps:Steps"
    renamed = "shipped_rules:Mine"
    assert there["a"] == renamed
    assert there["b"] == {"name": renamed, "gain": 2}
    assert there["c"] == "kolen-pollack"
    assert _as_given(loaded, sent) == settings  # what comes back is named as here
    gone = Settings.model_validate({"learning": {"rules": {"a": "gone.py:Mine"}}})
    spec = JobSpec(id="x", model=None, storage=None, most=1)
    with (
        pytest.raises(SettingsError, match=r"learning.rules.a 'gone.py:Mine'"),
        packed(gone, spec),
    ):
        pass


def test_one_place_to_go():
    elsewhere = Settings.model_validate({"engine": {"kind": "ray", "address": "h:1"}})
    with pytest.raises(SettingsError, match="engine.address 'h:1': --cluster says where"):
        on_ray(elsewhere)
    with pytest.raises(SettingsError, match="hamdist launch makes it"):
        read_spec(Path("/proc"))


@pytest.mark.parametrize("name", ["digits-trace", "ä ö/../x", "", "x" * 99])
def test_ids_are_plain_and_new(name):
    one, other = make_id(name), make_id(name)
    assert one != other
    assert len(one) < 60
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in one)


# -- dry run ---------------------------------------------------------------------------------------


def host(number, cpus=2.0, **resources):
    return HostInfo(f"id{number}", f"10.0.0.{number}", f"h{number}", cpus, 0.0, resources)


def work_out(hosts, **engine):
    settings = load_settings("digits", [{"engine": engine}])
    own = on_ray(settings.for_level(settings.level))
    return dry_run(own, {}, OwnFunctions(), ClusterSettings(), hosts)


def test_a_dry_run_says_who_goes_where():
    found = work_out([host(1), host(2)], actors=2, spread="spread")
    assert [(list(blocks), actor_options.node) for blocks, actor_options, _ in found.actors] == [
        (["block0", "block1"], "id1"),
        (["block2", "block3"], "id2"),
    ]
    assert found.missing == []
    # theta and omega, float32: 64 x 64 + 64, three times, then 64 x 10 + 10
    sizes = [2 * 2 * (64 * 64 + 64) * 4, 2 * (64 * 64 + 64 + 64 * 10 + 10) * 4]
    assert [round(size * 2**20) for *_, size in found.actors] == sizes
    assert any(note.startswith("1 edge(s) cross actors") for note in found.notes)


@pytest.mark.parametrize(
    ("hosts", "engine", "words"),
    [
        ([host(1)], {"actors": 4}, "4 actors ask for 4 CPUs, the Ray cluster has 2"),
        ([host(1)], {"blocks": {"block0": {"host": "h9"}}}, "host 'h9' is unknown"),
        ([host(1)], {"blocks": {"block0": {"gpus": 1}}}, "asks for 1 CPU.*1 GPU"),
        ([], {}, "no host that is alive"),
    ],
)
def test_a_dry_run_says_what_is_missing(hosts, engine, words):
    found = work_out(hosts, **engine)
    assert any(re.search(words, line) for line in found.missing)
    assert all(actor_options is None for _, actor_options, _ in found.actors)


# -- doctor ----------------------------------------------------------------------------------------

GOOD = host_facts().model_copy(
    update={
        "name": "h",
        "versions": {"hamdist": "1", "torch": "2", "ray": "3", "python": "4"},
        "processors": 4,
        "promised": 4.0,
        "free": 2**33,
        "shared": 2**30,
        "files": 4096,
        "native": True,
        "token": True,
        "platform": "Linux x",
    }
)


def findings(*changes, **more):
    hosts = [GOOD.model_copy(update=change) for change in changes]
    return Findings(hosts=hosts, clocks=[(0.0, 0.001)] * len(hosts), **more)


def test_hosts_that_are_well():
    link = LinkFacts(first=0, second=1, seconds=0.001, bytes_per_second=1e8)
    found = findings({"storage": ""}, {"storage": ""}, links=[link])
    assert {check.verdict for check in verdicts(found, GOOD.versions)} == {"ok"}


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (findings({}, {"versions": {**GOOD.versions, "ray": "9"}}), "FAIL", "ray differs (3: h; 9"),
        (findings({}, unreached={"h2": "no answer"}), "FAIL", "h2: no answer"),
        (findings({"promised": 9.0}), "warning", "hands out 9 CPUs, but there are 4"),
        (findings({"free": 2**29}), "warning", "512 MiB of memory are free"),
        (findings({"shared": 2**26}), "warning", "/dev/shm has 64 MiB left"),
        (findings({"files": 256}), "warning", "may open 256 files"),
        (findings({"native": False}), "warning", "C code was not built"),
        (findings({"token": False}), "warning", "asks for no token"),
        (findings({"storage": "missing"}), "FAIL", "storage: missing"),
        (
            findings({}, {"arithmetic": GOOD.arithmetic.model_copy(update={"machine": "arm"})}),
            "warning",
            "other bits than h on",
        ),
        (
            findings({}, {}, links=[LinkFacts(first=0, second=1, error="nothing")]),
            "FAIL",
            "h - h: no signal came through (nothing)",
        ),
        (
            findings({}, {}, links=[LinkFacts(first=0, second=1, seconds=0.5)]),
            "warning",
            "500 ms a signal",
        ),
        (
            findings({}, {}).model_copy(update={"clocks": [(0.0, 0.0), (-3.0, 0.5)]}),
            "warning",
            "its clock is -3.0 s from the head's",
        ),
    ],
)
def test_what_is_wrong_with_hosts(found, verdict, words):
    checks = verdicts(found)
    assert [c.text for c in checks if c.verdict == verdict and words in c.text], checks
    assert {c.verdict for c in checks} <= {verdict, "ok"}
    assert found.tables()["Hosts"][0][0] == "host"


@pytest.mark.timeout(60)
def test_links_are_measured_encrypted():
    mine, other = HostProbe(), HostProbe()
    there, back = Probe.channels(0)
    my_key, others_key = (probe.new_key(7) for probe in (mine, other))
    addresses = other.call("open", {there.number: f"tcp://127.0.0.1 {my_key}"})
    addresses |= mine.call("open", {back.number: f"tcp://127.0.0.1 {others_key}"})
    keys = {n: address.partition(" ")[2] for n, address in addresses.items()}
    assert keys == {there.number: others_key, back.number: my_key}
    for probe in (mine, other):
        probe.call("join", addresses)
    thread = threading.Thread(target=other.call, args=("answer", 0))
    thread.start()
    link = mine.call("measure", 0)
    thread.join()
    for probe in (mine, other):
        probe.call("close")
    assert link.seconds > 0


def test_no_proxy_stands_before_the_cluster(monkeypatch):
    """Of a loopback address, as a tunnel has it, a proxy knows nothing."""
    requests = pytest.importorskip("requests")
    pytest.importorskip("ray")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    jobs = object.__new__(Jobs)
    with socket.create_server(("127.0.0.1", 0)) as there:
        jobs.cluster = ClusterSettings(jobs=f"http://127.0.0.1:{there.getsockname()[1]}")
        with jobs._asking():
            assert requests.utils.get_environ_proxies(jobs.cluster.jobs) == {}
    assert requests.utils.get_environ_proxies(jobs.cluster.jobs)
    assert os.environ["no_proxy"] == "example.org"


def test_another_hamdist_in_this_terminal():
    checks = verdicts(findings({}), {**GOOD.versions, "hamdist": "0"})
    assert any("0: this terminal; 1: h" in c.text and c.verdict == "FAIL" for c in checks)


def test_storage_is_written_and_is_the_same_folder(tmp_path):
    assert storage_fault(tmp_path / "new", None) == ""
    assert "not the same folder" in storage_fault(tmp_path, "mark")
    (tmp_path / "mark").write_text("")
    assert storage_fault(tmp_path, "mark") == ""
    assert list(tmp_path.glob(".hamdist-*")) == []
    assert "cannot be written" in storage_fault(Path("/proc/none"), None)


# -- one host --------------------------------------------------------------------------------------


@pytest.fixture
def bystander():
    """A process that is none of ours."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def test_stop_ends_the_process_that_start_has_noted_and_no_other(tmp_path, bystander):
    assert not one_host.stop(tmp_path)
    ray_folder = tmp_path / "r"
    head = {"pid": bystander.pid, "born": time.time() - 900, "folder": str(ray_folder)}
    (tmp_path / "head.json").write_text(json.dumps(head))  # the number is another's by now
    assert not one_host.stop(tmp_path)
    assert bystander.is_running()
    ray_folder.mkdir()
    head["born"] = bystander.create_time()
    (tmp_path / "head.json").write_text(json.dumps(head))
    assert one_host.stop(tmp_path)
    assert not bystander.is_running() or bystander.status() == psutil.STATUS_ZOMBIE
    assert list(tmp_path.iterdir()) == []


def test_no_second_one_and_no_port_of_others(tmp_path, bystander, monkeypatch):
    monkeypatch.setattr(one_host, "need_extras", lambda: None)
    head = {"pid": bystander.pid, "born": bystander.create_time(), "folder": "x"}
    (tmp_path / "head.json").write_text(json.dumps(head))
    with pytest.raises(ClusterError, match="it runs already .*hamdist cluster stop"):
        one_host.start(tmp_path, port=6379, jobs_port=8265, cpus=None)
    (tmp_path / "head.json").write_text("{}")
    with pytest.raises(ClusterError, match="does not say which process it is"):
        one_host.stop(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} is not free.*--jobs-port"):
            one_host.start(tmp_path / "n", port=one_host._any_port(), jobs_port=port, cpus=None)
    assert not (tmp_path / "n").exists()


def test_the_log_of_a_launched_run_becomes_events():
    """`hamdist view ID`: the run's events as they are, and the end."""
    from hamdist.launch.events import mirror_events

    told = [
        RunBegun(title="t", engine="ray", batch=4, level="trace", seed=1),
        *ProgressEvents("trace", 1)(PROGRESS),
        Warned(text="mind"),
        DriverLost(signal="SIGKILL", tick=7),
    ]
    found = []
    lines = [*map(to_line, [*told, Ended(code=1, error="e")]), "a print of the model"]
    mirror_events(lines, found.append)
    assert found[:-1] == told[:-1]
    assert (found[-1].name, found[-1].error) == ("ended", "e")
