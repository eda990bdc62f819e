"""The live page: its server, what it says in words, and the page in a real browser."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runtime.ray_engine.test_recovery import in_an_actor
from torch import nn

import hamdist
from hamdist.display.network import NetworkActor, NetworkBlock, NetworkEdge, PlacedNetwork
from hamdist.dynamics.objective.prequential import Window
from hamdist.runtime.results.events import FolderStarted, RunBegun, RunProgressed, read_events
from hamdist.runtime.results.measured import EdgeCounts, Norms, ProcessSample, Replaced
from hamdist.runtime.results.result import BlockProgress, Progress
from hamdist.study.shared.result_folder import ResultFolder
from hamdist.study.view.explain import explain
from hamdist.study.view.page import FollowedRun, PageServer, data_script, events_from, is_alive

NAMES = ["block0", "block1", "block2"]
NETWORK = PlacedNetwork(
    [NetworkBlock(n, (4, 8), "float32", 72, i, 2 - i, i == 2) for i, n in enumerate(NAMES)],
    [
        NetworkEdge("u->block0", "u", "block0", 1),
        NetworkEdge("block0->block1", "block0", "block1", 1),
        NetworkEdge("block1->block2", "block1", "block2", 1),
    ],
    [NetworkActor("actor 0", "here", ["block0"]), NetworkActor("actor 1", "here", NAMES[1:])],
    4,
)
# actor 1 computes 80 % of its time, most of it in block1; actor 0 waits 75 % for its messages.
SAMPLES = {
    "actor 0": ProcessSample(
        {"total": 10.0, "step": 1.0, "packing": 0.5, "waiting": 7.5},
        2**20,
        {"block0": Norms(1.0, 0.5, 0.25, 2.0)},
        {"block0": 1.0},
        {"block0->block1": EdgeCounts(1000, 2, 7.5)},
    ),
    "actor 1": ProcessSample(
        {"total": 10.0, "step": 8.0, "packing": 0.5, "waiting": 0.5},
        2**21,
        {name: Norms(1.0, 0.5, 0.25, 2.0) for name in NAMES[1:]},
        {"block1": 7.0, "block2": 1.0},
        {"block1->block2": EdgeCounts(500)},
    ),
}


def progress(seconds, samples, **more):
    windows = [Window(i, i + 9, 10, 20.0 / (1 + i), 8, 10) for i in range(0, samples, 10)]
    blocks = [BlockProgress(name, samples, samples) for name in NAMES]
    return Progress(
        seconds, samples, 100, windows, blocks, readout="block2", actors=SAMPLES, network=NETWORK,
        **more,
    )  # fmt: skip


def begun(seed=0, **settings):
    title = "tiny <b>run</b>"
    return RunBegun(title=title, engine="ray", settings=settings, level="trace", seed=seed)


@pytest.fixture
def folder(tmp_path):
    with ResultFolder(tmp_path / "out", controls=True, say=lambda _: None) as own:
        yield own


def get(server, path, *, token=None, method="GET", **headers):
    address = server.address.split("?")[0] + path
    headers["X-Token"] = server.token if token is None else token
    request = urllib.request.Request(address, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def test_the_server_gives_events_and_passes_requests_on(folder):
    note = folder.watch(begun(), lambda _: None)
    assert note(progress(1.0, 20)) is None
    with PageServer([folder.path]) as server:
        page = urllib.request.urlopen(server.address, timeout=10).read().decode()
        assert "uPlot" in page
        assert "src=" not in page
        assert get(server, "folders") == [{"path": str(folder.path), "alive": True}]
        part = get(server, "events?folder=0&from=0")
        on_disk = list(read_events((folder.path / "events.jsonl").read_text().splitlines()))
        assert part["events"] == [event.as_json() for event in on_disk]
        assert get(server, f"events?folder=0&from={part['next']}")["events"] == []
        words = get(server, "explain?folder=0&level=trace&seed=0")
        assert any("block1" in text for text in words)
        get(server, "control?folder=0&action=snapshot", method="POST")
        assert note(progress(2.0, 30)) is hamdist.TakeSnapshot
        get(server, "control?folder=0&action=stop", method="POST")
        assert note(progress(3.0, 40)) is hamdist.Stop
        assert note(progress(4.0, 50)) is None  # each once


def test_strangers_get_nothing(folder):
    with PageServer([folder.path]) as server:
        bare = server.address.split("?")[0]
        refused = [
            lambda: urllib.request.urlopen(bare, timeout=10),
            lambda: urllib.request.urlopen(f"{bare}?token=wrong", timeout=10),
            lambda: get(server, "events?folder=0&from=0", token=""),
            lambda: get(server, "events?folder=0&from=0", Host="evil.example"),
            lambda: get(server, "control?folder=0&action=stop", token="é", method="POST"),
        ]
        for ask in refused:
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask()
            assert caught.value.code == 403
        wrong = {
            "events?folder=7&from=0": 404, "events?folder=../x&from=0": 404, "nothing": 404,
            "events?folder=0&from=-1": 404, "control?folder=0&action=stop": 404,  # (not by GET)
        }  # fmt: skip
        for path, code in wrong.items():
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(server, path)
            assert caught.value.code == code, path
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server, "control?folder=0&action=rm", method="POST")
        assert caught.value.code == 409
        with pytest.raises(hamdist.HamdistError, match="--port"):
            PageServer([folder.path], port=int(bare.rsplit(":", 1)[1].strip("/")))


def test_a_run_that_has_ended_takes_no_requests(tmp_path):
    with ResultFolder(tmp_path / "o", controls=True, say=lambda _: None) as own:
        own.watch(begun(), lambda _: None)(progress(1.0, 10))
        assert is_alive(own.path)
    assert not is_alive(own.path)
    with PageServer([own.path]) as server, pytest.raises(urllib.error.HTTPError) as caught:
        get(server, "control?folder=0&action=stop", method="POST")
    assert caught.value.code == 409
    assert not (own.path / "control.jsonl").exists()


def test_a_line_that_is_not_whole_waits(tmp_path):
    line = FolderStarted(process=1).to_line()
    (tmp_path / "events.jsonl").write_text(f"{line}\n{line[:20]}")
    part = events_from(tmp_path, 0)
    assert len(part["events"]) == 1
    assert part["next"] == len(line) + 1
    assert events_from(tmp_path / "none", 0) == {"events": [], "next": 0, "more": False}


def test_words_name_the_block_that_slows_the_run_down(folder):
    """The oracle is the table above: actor 1 and its block1."""
    folder.watch(begun(), lambda _: None)(progress(1.0, 20))
    events = list(read_events((folder.path / "events.jsonl").read_text().splitlines()))
    [(name, texts)] = explain(events).items()
    assert name == "trace, seed 0"
    assert texts[0] == (
        "block1 slows the run down: actor 1 spends 80% of its time in steps, 88% of them in "
        "block1: cut block1 earlier (partition.cuts), or slice it (partition.slices), or give it "
        "an actor alone (engine.placement)"
    )
    assert texts[1] == "actor 0 waits 75% of its time, most of all for block0->block1 (7.5 s)"
    assert explain(events, "local", 0) == {}


def test_an_actor_waits_for_edges_of_its_own(folder):
    """Most of all was waited for block0->block1, but not by actor 2, which has block2 alone."""
    hosts = [NetworkActor(f"actor {i}", "here", [name]) for i, name in enumerate(NAMES)]
    waits = {"total": 10.0, "step": 1.0, "waiting": 8.0}
    idle = ProcessSample(waits, edges={"block1->block2": EdgeCounts(500, 0, 3.0)})
    actors = {**SAMPLES, "actor 2": idle}
    report = replace(progress(1.0, 20), actors=actors, network=replace(NETWORK, actors=hosts))
    folder.watch(begun(), lambda _: None)(report)
    [texts] = explain(read_events((folder.path / "events.jsonl").read_text().splitlines())).values()
    assert texts[1] == "actor 2 waits 80% of its time, most of all for block1->block2 (3.0 s)"


def test_actors_that_were_lost_together_took_the_time_once(folder):
    lost = [Replaced(f"actor {i}", [], 5, 4, 2.0, 3) for i in (0, 1)]
    folder.watch(begun(), lambda _: None)(progress(1.0, 20, replaced=lost))
    [texts] = explain(read_events((folder.path / "events.jsonl").read_text().splitlines())).values()
    assert "2 actors were lost and replaced, which took 2.0 s" in texts


def test_text_cannot_leave_the_data_of_a_report():
    text = data_script([begun()])
    assert text.count("<") == 2  # of the element itself
    data = json.loads(text.split(">", 1)[1].rsplit("<", 1)[0])
    assert data["events"][0]["title"] == "tiny <b>run</b>"


# -- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


def until(browser, script, seconds=20):
    """Wait until `script` gives something true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = browser.execute_script(f"return {script}")
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{script} was not true within {seconds} s")


def by_id(browser, name):
    return browser.find_element("id", name)


def test_the_page_in_a_browser(folder, browser):
    settings = {"snapshots": {"path": "s"}}
    note = folder.watch(begun(**settings), lambda _: None)
    note(progress(1.0, 20))
    with PageServer([folder.path]) as server:
        browser.get(server.address)
        until(browser, "document.querySelectorAll('#network .node').length == 4")
        assert "tiny <b>run</b>" in by_id(browser, "status").text
        assert "sample 20 of 100" in by_id(browser, "status").text
        until(browser, "document.getElementById('advice').textContent.includes('block1')")
        browser.execute_script(  # a block, by the keyboard
            "const n = document.querySelector('[data-name=block1]'); n.focus();"
            "n.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))"
        )
        shown = by_id(browser, "block").text
        assert "4 × 8 (float32)" in shown
        assert "actor 1" in shown
        assert "78 %" in shown  # 7 of 9 seconds
        note(
            progress(
                2.5,
                40,
                replaced=[Replaced("actor 1", NAMES[1:], 30, 20, 1.5, 6)],
                snapshots=["s/tick-20"],
            )
        )
        until(browser, "document.getElementById('log').textContent.includes('actor 1 (block1')")
        assert "snapshot: s/tick-20" in by_id(browser, "log").text
        assert len(browser.find_elements("css selector", "#actors canvas")) == 2
        until(browser, "!document.getElementById('stop').disabled")
        by_id(browser, "snapshot").click()
        until(browser, "document.getElementById('asked').textContent.includes('snapshot')")
        assert note(progress(3.0, 50)) is hamdist.TakeSnapshot
        by_id(browser, "stop").click()
        until(browser, "document.getElementById('asked').textContent.includes('stop')")
        assert note(progress(3.5, 60)) is hamdist.Stop
        for width in (400, 1600):
            browser.set_window_size(width, 900)
            until(browser, "document.documentElement.scrollWidth <= window.innerWidth")
    until(browser, "!document.getElementById('gone').hidden")  # the server has ended
    assert [e for e in browser.get_log("browser") if "Failed to load" not in e["message"]] == []


class Dies(nn.Module):
    """Passes on what it gets; kills its process once, when the file `go` is there."""

    def __init__(self, folder):
        super().__init__()
        self.go, self.done = str(folder / "go"), str(folder / "done")

    def forward(self, x):
        if x.device.type != "meta" and in_an_actor() and os.path.exists(self.go):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.done, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return x


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_killed_actor_is_seen_on_the_page(session, folder, browser, tmp_path, monkeypatch):
    """A run on Ray goes on; its actor dies, and is seen to be replaced; a button ends the run."""
    monkeypatch.setenv("HAMDIST_TEST_DRIVER", str(os.getpid()))
    parts = [nn.Linear(6, 8), nn.Sequential(Dies(tmp_path), nn.Linear(8, 8)), nn.Linear(8, 3)]
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    note = folder.watch(begun(), lambda _: None)

    def look():
        with PageServer([folder.path]) as server:
            browser.get(server.address)
            until(browser, "!document.getElementById('stop').disabled", 90)
            assert len(browser.find_elements("css selector", "#network .node")) == 4
            (tmp_path / "go").touch()
            until(browser, "document.getElementById('log').textContent.includes('was lost at')", 60)
            until(browser, "document.getElementById('advice').textContent.includes('replaced')")
            tick = "hamdist.runs.values().next().value.progress.tick"
            until(browser, f"{tick} > {browser.execute_script(f'return {tick}')}", 60)
            by_id(browser, "stop").click()
            until(browser, "document.getElementById('asked').textContent.includes('stop')")

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(look)
        result = hamdist.train(
            nn.Sequential(*parts), itertools.repeat((batch, batch[:, :3].argmax(1))), level="trace",
            classes=3, partition={"cuts": ["1", "2"]}, engine={"kind": "ray", "actors": 2},
            snapshots={"path": str(tmp_path / "kept"), "every": 20},
            on_progress=lambda p: note(p) or (hamdist.Stop if seen.done() else None),
        )  # fmt: skip
        seen.result()
    assert result.stopped
    assert [one.blocks for one in result.replaced if one.lost]


def test_thousands_of_blocks_stay_usable(folder, browser):
    """Drawn by actors, quickly, and a group opens to its blocks."""
    blocks = [NetworkBlock(f"b{i}", (4, 8), "float32", 72, i, 0, i == 2999) for i in range(3000)]
    edges = [NetworkEdge(f"b{i}->b{i + 1}", f"b{i}", f"b{i + 1}", 1) for i in range(2999)]
    actors = [
        NetworkActor(f"actor {k}", "here", [f"b{i}" for i in range(100 * k, 100 * k + 100)])
        for k in range(30)
    ]
    network = PlacedNetwork(blocks, edges, actors)
    rows = [BlockProgress(b.name, 5, 5) for b in blocks]
    folder.watch(begun(), lambda _: None)(
        Progress(1.0, 5, 100, [], rows, actors=SAMPLES, network=network)
    )
    with PageServer([folder.path]) as server:
        browser.set_window_size(1400, 900)
        browser.get(server.address)
        until(browser, "document.querySelectorAll('#network .node').length == 30")
        took = browser.execute_script(
            "const t = performance.now(); hamdist.draw(); return performance.now() - t"
        )
        assert took < 500
        assert "3000 blocks, shown by actors" in by_id(browser, "network-says").text
        browser.execute_script(
            "document.querySelectorAll('.node')[1].dispatchEvent(new Event('click'))"
        )
        assert "b100" in by_id(browser, "block").text


def test_a_report_in_a_browser(tmp_path, browser):
    from study.builders import make_run

    from hamdist.config import Settings
    from hamdist.study.report.save import save_comparison

    windows = tuple(Window(10 * i, 10 * i + 9, 10, 10.0, i, 10) for i in range(8))
    runs = [
        make_run(level, 0, accuracy=a, windows=windows)
        for level, a in (("centralised", 0.9), ("trace", 0.8), ("local", 0.95))
    ]
    save_comparison(tmp_path, runs, Settings(steps=80), command="x", interrupted=False)
    browser.get_log("browser")  # of pages before
    browser.get(f"file://{tmp_path / 'report.html'}")
    until(browser, "document.querySelectorAll('#curves .u-legend .u-series').length == 4")

    def levels():
        cells = browser.find_elements("css selector", "table.sortable tbody td:first-child")
        return [cell.text for cell in cells]

    assert levels() == ["centralised", "trace", "local"]
    titles = browser.find_elements("css selector", "table.sortable th button")
    title = next(one for one in titles if "held" in one.text.lower())
    title.click()  # ascending
    assert levels() == ["trace", "centralised", "local"]
    title.click()
    assert levels() == ["local", "centralised", "trace"]
    until(browser, "document.querySelectorAll('#figures .u-legend .u-series').length == 3")
    for button in ("#svg", "#figures button"):
        browser.find_element("css selector", button).click()
    assert browser.get_log("browser") == []


def test_watch_shows_the_events_of_a_run_that_goes_on(folder, monkeypatch):
    """The oracle is the progress that the events were made of."""
    from typer.testing import CliRunner

    from hamdist.cli import app

    note = folder.watch(begun(), lambda _: None)
    steps = [
        lambda: note(progress(1.0, 20)),
        lambda: note(progress(2.5, 40, replaced=[Replaced("actor 1", NAMES[1:], 30, 20, 1.5, 6)])),
        lambda: folder.__exit__(None, None, None),
    ]
    monkeypatch.setattr("hamdist.study.view.page.time.sleep", lambda _: steps.pop(0)())
    monkeypatch.setattr("hamdist.display.progress.PLAIN_SECONDS", 0.0)
    done = CliRunner().invoke(app, ["watch", str(folder.path)])
    said = " ".join(done.stderr.split())
    assert done.exit_code == 0
    assert not steps  # it was there to the end
    line = "tiny <b>run</b>: sample {}, tick {}, "
    assert line.format("20/100", 20) in said
    assert line.format("40/100", 40) in said
    assert "accuracy 80.0 % (run 80.0 %)" in said
    assert "actor 1 was lost, and is back from tick 20 after 1.5 s" in said
    assert "block1 slows the run down" in done.stdout


def test_watch_follows_a_launched_run_to_its_end(monkeypatch):
    """Its log is the oracle. The folder that it is read from has to be there at once."""
    from typer.testing import CliRunner

    from hamdist.cli import app, view
    from hamdist.launch.events import Ended, to_line
    from hamdist.runtime.results.events import Warned
    from hamdist.runtime.results.run_events import ProgressEvents

    events = ProgressEvents("trace", 1)
    told = [
        RunBegun(title="far away", engine="ray", batch=4, **events.head),
        *events(progress(1.0, 20)),
        Warned(text="mind"),
        *events(progress(3.0, 40)),
        Ended(code=0),
    ]

    class Cluster:
        def find(self, name):
            return SimpleNamespace(id=f"digits-{name}")

        def lines(self, name):
            assert name == "digits-7"
            return (to_line(event) for event in told)

    monkeypatch.setattr(view, "jobs_of", lambda _: Cluster())
    monkeypatch.setattr("hamdist.display.progress.PLAIN_SECONDS", 0.0)
    done = CliRunner().invoke(app, ["watch", "7"])
    said = " ".join(done.stderr.split())
    assert done.exit_code == 0, done.output
    assert "far away: sample 40/100" in said
    assert "warning: mind" in said


def test_progress_comes_out_of_its_events_again(folder):
    seen = progress(1.0, 20)
    folder.watch(begun(), lambda _: None)(seen)
    run = FollowedRun(begun())
    lines = (folder.path / "events.jsonl").read_text().splitlines()
    found = [run.take(event) for event in read_events(lines)]
    last = run.take(RunProgressed(samples=20, steps=100, seconds=1.0, tick=20))
    for window, original in zip(last.windows, seen.windows, strict=True):
        assert window.loss == pytest.approx(original.loss)
        assert replace(window, loss=original.loss) == original
    assert last.blocks == seen.blocks
    assert (last.samples, last.seconds) == (20, 1.0)
    assert sum(one is not None for one in found) == 2  # (as measured, and its blocks)
