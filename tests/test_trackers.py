"""Trackers: what they wrote is read back with their own libraries, offline."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import struct
import subprocess
import sys
import time
import urllib.request
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hamdist
from hamdist import errors
from hamdist.config import Settings
from hamdist.config.settings import SettingsFields
from hamdist.runtime.engines import inprocess, worker_report
from hamdist.runtime.results.events import (
    ActorReplaced,
    FolderEnded,
    RunBegun,
    RunFinished,
    WindowFull,
)
from hamdist.trackers import SpanTracker, open_trackers, scalars

ROOT = Path(hamdist.__file__).parents[1]


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        u = torch.randn(4, 6, generator=generator)
        yield u, u[:, :3].argmax(1)


def trained(*trackers, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return hamdist.train(
        model,
        list(batches()),
        level="trace",
        metrics={"window": 10, **fields.pop("metrics", {})},
        engine=fields.pop("engine", {"kind": "inprocess"}),
        trackers=trackers,
        **fields,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder():
        [path] = (tmp_path / "results").iterdir()
        return path

    return folder


def losses(result):
    [(readout, windows)] = result.windows.items()
    return readout, [(w.last + 1, w.mean_loss) for w in windows]


def test_csv(here):
    readout, expected = losses(trained("csv"))
    with (here() / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(int(r["samples"]), float(r["value"])) for r in rows if r["name"] == f"{readout}/loss"]
    assert found == expected
    assert {r["run"] for r in rows} == {"trace-0"}


def test_runs_of_one_second_have_folders_of_their_own(here, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for lr in (0.1, 0.2, 0.3):
        trained("csv", learning={"lr": lr})
    found = sorted(path.name for path in Path("results").iterdir())
    assert found == ["run-now", "run-now-2", "run-now-3"]
    files = [Path("results", name, "metrics.csv").read_text() for name in found]
    assert [text.count("/loss") for text in files] == [3, 3, 3]


class Wandb(ModuleType):
    """Stands for wandb, whose `init` gives the run that is open."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.run, self.logged, self.finished = None, [], 0

    def init(self, **_):
        self.run = self
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.run, self.finished = None, self.finished + 1


def test_a_tracker_that_fails_does_not_end_the_run(here, monkeypatch):
    fake, calls = Wandb(), []

    def log(values):
        calls.append(values)
        raise OSError("the server is gone")

    monkeypatch.setattr(fake, "log", log)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    told = "trackers: wandb has failed, and gets no more: OSError: the server is gone"
    with pytest.warns(errors.HamdistWarning, match=told):
        assert trained("wandb").samples == 30
    assert len(calls) == 1


@pytest.mark.parametrize("opened", [False, True])
def test_a_run_of_wandb_that_was_open_stays_open(opened, here, monkeypatch):
    fake = Wandb()
    fake.run = fake if opened else None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    readout, expected = losses(trained("wandb"))
    name = f"trace-0/{readout}/loss"
    assert [(v["samples"], v[name]) for v in fake.logged if name in v] == expected
    assert fake.finished == (not opened)


def test_tensorboard(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    readout, expected = losses(trained("tensorboard"))
    found = EventAccumulator(str(here() / "tensorboard")).Reload()
    scalars = [(s.step, s.value) for s in found.Scalars(f"trace-0/{readout}/loss")]
    assert scalars == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert "trace-0/settings/text_summary" in found.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what mlflow is built on
def test_mlflow(here, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy, for mlflow's files, is not installed")
    from mlflow import MlflowClient

    readout, expected = losses(trained("mlflow"))
    client = MlflowClient(f"sqlite:///{here() / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    history = client.get_metric_history(run.info.run_id, f"{readout}/loss")
    assert [(m.step, m.value) for m in history] == expected
    assert run.info.status == "FINISHED"
    text = Path(client.download_artifacts(run.info.run_id, "settings.yaml", str(tmp_path)))
    assert "level: trace" in text.read_text()


REPORTED = {"levels": ["trace"], "steps": 20, "classes": 3, "engine": {"kind": "inprocess"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_report_is_an_artefact_in_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy, for mlflow's files, is not installed")
    from mlflow import MlflowClient

    out = tmp_path / "o"
    hamdist.compare(
        nn.Linear(6, 3), list(batches()), out=out, trackers=["mlflow"], **REPORTED
    )  # fmt: skip
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert {run.info.run_name for run in runs} == {"centralised-0", "trace-0"}
    for run in runs:
        found = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
        assert Path(found).read_text() == (out / "report.html").read_text()
    assert not (Path.cwd() / "mlruns").exists()


def wandb_records(data):
    """Yield the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, part = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is empty
            at += 2**15 - at % 2**15
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_wandb(here, monkeypatch):
    """Its offline file is read with its own messages: the values, the step, the settings."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    readout, expected = losses(trained("wandb", metrics={"histograms": True}))
    [file] = here().glob("wandb/offline-run-*/run-*.wandb")
    found, end = [], time.monotonic() + 20
    while not found or not found[-1].HasField("exit"):  # (its own process writes it)
        assert time.monotonic() < end
        found = [wandb_internal_pb2.Record.FromString(d) for d in wandb_records(file.read_bytes())]
    rows = [
        {".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    name = f"trace-0/{readout}/loss"
    assert [(row["samples"], row[name]) for row in rows if name in row] == expected
    config = {i.key: i.value_json for r in found if r.HasField("run") for i in r.run.config.update}
    assert config["level"] == '"trace"'
    drawn = [v for row in rows for k, v in row.items() if k == "trace-0/block0/theta.values"]
    assert [sum(values) for values in drawn] == [6 * 8 + 8] * len(drawn)
    assert drawn


def test_histograms_are_those_of_the_weights(here, monkeypatch):
    """The oracle is numpy's own, of the weights in the end; the bits of the run stay."""
    heard = []
    monkeypatch.setattr(worker_report, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(worker_report, "SHARE", math.inf)
    monkeypatch.setattr(inprocess, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("hamdist.runtime.results.run_events.ProgressPace.due", lambda *_: True)
    result = trained(heard.append, metrics={"histograms": True})
    monkeypatch.undo()
    plain = trained()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, result.model.state_dict()[name])
    last = [event for event in heard if event.name == "blocks"][-1]
    for block, state in result.blocks.items():
        own = last.histograms[block]
        for kind, tensors in (("theta", state.theta), ("omega", state.omega)):
            flat = torch.cat([t.flatten() for t in tensors.values()]).numpy()
            counts, edges = np.histogram(flat, len(own[kind].counts))
            assert own[kind].low == pytest.approx(edges[0])
            assert own[kind].high == pytest.approx(edges[-1])
            off = np.abs(np.array(own[kind].counts) - counts).sum()
            assert off <= 2  # (a number on an edge)
            assert sum(own[kind].counts) == len(flat)


def test_histograms_in_tensorboard(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained("tensorboard", metrics={"histograms": True})
    found = EventAccumulator(str(here() / "tensorboard")).Reload()
    [first, *_] = found.Histograms("trace-0/block0/theta")
    assert first.histogram_value.num == 6 * 8 + 8


def test_prometheus(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    import socket

    from prometheus_client.parser import text_string_to_metric_families

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(trackers=["prometheus"], metrics={"prometheus_port": port})
    tracker: Any
    [tracker] = open_trackers(settings, tmp_path)
    head = {"level": "trace", "seed": 0, "readout": "out", "first": 0, "last": 9, "samples": 10}
    tracker(WindowFull(loss=0.5, accuracy=None, correct=0, rows=0, seconds=1.0, **head))
    shown = []
    for loss in (None, math.nan, math.inf):  # (the loss that was finite would be a wrong one)
        if loss is not None:
            tracker(WindowFull(loss=loss, accuracy=None, correct=0, rows=0, seconds=1.0, **head))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            [family] = text_string_to_metric_families(page.read().decode())
        shown += [(s.labels["run"], s.labels["name"], str(s.value)) for s in family.samples]
    assert shown == [("trace-0", "out/loss", loss) for loss in ("0.5", "nan", "inf")]
    with pytest.raises(hamdist.HamdistError, match="prometheus_port"):
        open_trackers(settings, tmp_path)
    tracker(FolderEnded())


def test_the_dashboard_asks_for_what_prometheus_gets(here):
    """Every panel of cluster-configs/grafana.json finds a metric of a run, and has a place."""
    heard = []
    trained(heard.append)
    names = {name for event in heard for name, _ in scalars(event)} | {"seconds/actor 0/waiting"}
    board = json.loads((ROOT / "cluster-configs" / "grafana.json").read_text())
    for panel in board["panels"]:
        [target] = panel["targets"]
        expression = r'\{__name__=~"\(ray_\)\?hamdist", name=(~?)"([^"]+)"\}'
        kind, pattern = re.search(expression, target["expr"]).groups()
        assert any(re.fullmatch(pattern, name) if kind else pattern == name for name in names)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len({*places}) == len({p["id"] for p in board["panels"]}) == len(board["panels"])


def test_the_dashboard_is_one_of_grafanas_schema():
    """What Grafana's own package reads is all that is there: no field is unknown or of another
    type."""
    sdk = "grafana_foundation_sdk"
    pytest.importorskip(sdk, reason="grafana-foundation-sdk is not installed")
    importlib.import_module(f"{sdk}.cog.plugins").register_default_plugins()
    raw = json.loads((ROOT / "cluster-configs" / "grafana.json").read_text())
    board = importlib.import_module(f"{sdk}.models.dashboard").Dashboard.from_json(raw)
    encoder = importlib.import_module(f"{sdk}.cog.encoder").JSONEncoder()
    written = json.loads(encoder.encode(board))

    def lost(ours, theirs, place):
        if isinstance(ours, dict):
            for name, value in ours.items():
                yield from lost(value, theirs.get(name), f"{place}.{name}")
        elif isinstance(ours, list):
            assert len(ours) == len(theirs), place
            for number, pair in enumerate(zip(ours, theirs, strict=True)):
                yield from lost(*pair, f"{place}[{number}]")
        elif ours != theirs:
            yield place, ours, theirs

    assert not list(lost(raw, written, ""))


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_metrics_of_a_ray_cluster(session):
    """They are read from the agent of the host, as Prometheus does: the loss of the last window."""
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    parser = pytest.importorskip("prometheus_client.parser", reason="for its format")
    import ray

    result = trained("ray", engine={"kind": "ray", "actors": 2})
    [(readout, windows)] = result.windows.items()
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    end, found = time.monotonic() + 60, {}
    while f"{readout}/loss" not in found:
        assert time.monotonic() < end, found
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        families = parser.text_string_to_metric_families(text)
        found = {
            s.labels["name"]: s.value
            for one in families
            for s in one.samples
            if s.name == "ray_hamdist" and s.labels["run"] == "trace-0"
        }
    assert found[f"{readout}/loss"] == pytest.approx(windows[-1].mean_loss)


def test_metrics_of_ray_need_ray(monkeypatch, tmp_path):
    monkeypatch.setattr("hamdist.errors.find_spec", lambda _: True)
    settings = Settings(trackers=["ray"], engine={"kind": "inprocess"})
    with pytest.raises(hamdist.HamdistError, match=r"engine\.kind ray"):
        open_trackers(settings, tmp_path)


def test_spans_of_opentelemetry(tmp_path):
    """The phases of the start and a recovery lie inside the run; what fails is an error."""
    sdk = "opentelemetry.sdk.trace"
    pytest.importorskip(sdk, reason="opentelemetry-sdk is not installed")
    provider: Any = importlib.import_module(sdk).TracerProvider()
    export: Any = importlib.import_module(f"{sdk}.export")
    memory: Any = importlib.import_module(f"{sdk}.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    tracker = SpanTracker(provider.get_tracer("hamdist"))
    trained(tracker, snapshots={"path": str(tmp_path / "s"), "every": 10})
    *phases, run = exporter.get_finished_spans()
    assert run.name == "run"
    assert run.status.is_ok or run.status.is_unset
    assert dict(run.attributes) == {
        "hamdist.level": "trace",
        "hamdist.seed": 0,
        "hamdist.engine": "inprocess",
        "samples": 30,
    }
    assert {event.name for event in run.events} >= {"snapshot"}
    assert "start: plan" in [span.name for span in phases]
    for before, after in pairwise(phases):  # one after the other
        assert before.end_time <= after.start_time
    assert all(span.parent.span_id == run.context.span_id for span in phases)
    assert run.start_time <= phases[0].start_time <= phases[-1].end_time <= run.end_time

    exporter.clear()
    lost: dict[str, Any] = {"actor": "actor 0", "blocks": ["a"], "tick": 9, "since": 5}
    tracker(RunBegun(time=100.0, level="trace", title="t", engine="ray"))
    tracker(ActorReplaced(time=110.0, **lost, seconds=2.5, replayed=7))
    tracker(RunFinished(time=120.0, samples=3, seconds=20.0, failure="no host is left"))
    recovery, run = exporter.get_finished_spans()
    assert (recovery.name, recovery.start_time, recovery.end_time) == ("recovery", 1075e8, 11e10)
    assert recovery.attributes["hamdist.replayed"] == 7
    assert (run.status.is_ok, run.status.description) == (False, "no host is left")


def test_spans_without_a_provider_warn(monkeypatch, tmp_path):
    pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
    from opentelemetry import trace

    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    with pytest.warns(errors.HamdistWarning, match="tracer provider"):
        open_trackers(Settings(trackers=["opentelemetry"]), tmp_path)


def test_functions_hear_every_event(here):
    heard = []
    result = trained(heard.append)
    names = [event.name for event in heard]
    assert (names[0], names[-1]) == ("run", "ended")
    windows = [event.loss for event in heard if event.name == "window"]
    assert windows == [loss for _, loss in losses(result)[1]]


def test_unknown_and_missing_trackers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(hamdist.HamdistError, match="trackers"):
        trained("tensorbord")
    monkeypatch.setattr("hamdist.errors.find_spec", lambda _: None)
    for name in ("tensorboard", "mlflow", "wandb", "prometheus", "ray", "opentelemetry"):
        with pytest.raises(hamdist.HamdistError, match=f"trackers: {name}.*pip install"):
            open_trackers(Settings(trackers=[name]), tmp_path)


def test_keywords_of_train_are_the_settings():
    own = {"model", "stream", "loss", "trackers"}  # arguments of train
    assert set(SettingsFields.__annotations__) == set(Settings.model_fields) - own


@pytest.mark.slow  # (without a cache mypy reads all of torch)
@pytest.mark.timeout(300)
def test_a_misspelt_keyword_is_a_type_error(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    calls = ['level="trace", steps=3', 'levl="trace"']
    (tmp_path / "calls.py").write_text(
        "import hamdist\nfrom torch import nn\n"
        + "".join(f"hamdist.train(nn.Linear(2, 2), [], {call})\n" for call in calls)
    )
    checked = [sys.executable, "-m", "mypy", "--no-pretty", str(tmp_path / "calls.py")]
    done = subprocess.run(checked, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["4"], done.stdout
    assert 'Unexpected keyword argument "levl" for "train"; did you mean "level"?' in errors[0]


@pytest.mark.parametrize("trackers", [3, "csv", [3], None])
def test_what_is_no_tracker_is_named(trackers: Any) -> None:
    with pytest.raises(
        errors.SettingsError, match="trackers: .*" + re.escape(repr(trackers).strip("[]"))
    ):
        hamdist.train(nn.Linear(2, 2), [], trackers=trackers)


def test_trackers_of_a_live_run_have_its_folder_and_go_on_behind_a_line_that_was_cut_off(tmp_path):
    out, (example, *_) = tmp_path / "new" / "o", list(batches())
    given: dict[str, Any] = {"example": example, "classes": 3, "level": "trace", "out": out}
    lines = []
    for resume in (None, out):
        with hamdist.start(nn.Linear(6, 3), trackers=["csv"], resume=resume, **given) as run:
            run.feed(*example)
        lines += [(out / "metrics.csv").read_text().splitlines()]
        (out / "metrics.csv").write_text("\n".join(lines[-1])[:-1])  # killed within a line
    assert lines[1][: len(lines[0]) - 1] == lines[0][:-1]
    assert all(line.count(",") == 3 for line in lines[1])
    assert {line.split(",")[0] for line in lines[1]} == {"run", "trace-0"}


def test_a_folder_that_trackers_cannot_write_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.SettingsError, match="trackers: .*file/o': Not a directory"):
        hamdist.start(
            nn.Linear(6, 3), example=next(batches()), out=tmp_path / "file" / "o", trackers=["csv"]
        )
