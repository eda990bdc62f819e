"""Trackers: what they wrote is read back with their own libraries, offline."""

from __future__ import annotations

import csv
import math
import urllib.request

import pytest
import torch
from torch import nn

import hamdist
from hamdist.config import Settings
from hamdist.config.fields import SettingsFields
from hamdist.runtime.results.events import WindowFull
from hamdist.trackers import open_trackers


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
        engine={"kind": "inprocess"},
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


def test_tensorboard(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    readout, expected = losses(trained("tensorboard"))
    found = EventAccumulator(str(here() / "tensorboard")).Reload()
    scalars = [(s.step, s.value) for s in found.Scalars(f"trace-0/{readout}/loss")]
    assert scalars == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert "trace-0/settings/text_summary" in found.Tags()["tensors"]


def test_mlflow(here):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy, for mlflow's files, is not installed")
    from mlflow import MlflowClient

    readout, expected = losses(trained("mlflow"))
    client = MlflowClient(f"sqlite:///{here() / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    history = client.get_metric_history(run.info.run_id, f"{readout}/loss")
    assert [(m.step, m.value) for m in history] == expected
    assert run.info.status == "FINISHED"


def test_prometheus(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    import socket

    from prometheus_client.parser import text_string_to_metric_families

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(trackers=["prometheus"], metrics={"prometheus_port": port})
    [tracker] = open_trackers(settings, tmp_path)
    head = {"level": "trace", "seed": 0, "readout": "out", "first": 0, "last": 9, "samples": 10}
    tracker(WindowFull(loss=0.5, accuracy=None, correct=0, rows=0, seconds=1.0, **head))
    tracker(WindowFull(loss=math.nan, accuracy=None, correct=0, rows=0, seconds=1.0, **head))
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    [family] = text_string_to_metric_families(text)
    labels = {"run": "trace-0", "name": "out/loss"}
    assert [(s.labels, s.value) for s in family.samples] == [(labels, 0.5)]
    with pytest.raises(hamdist.HamdistError, match="prometheus_port"):
        open_trackers(settings, tmp_path)
    tracker.close()


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
    for name in ("tensorboard", "mlflow", "wandb", "prometheus"):
        with pytest.raises(hamdist.HamdistError, match=f"trackers: {name}.*pip install"):
            open_trackers(Settings(trackers=[name]), tmp_path)


def test_keywords_of_train_are_the_settings():
    own = {"model", "stream", "loss", "trackers"}  # arguments of train
    assert set(SettingsFields.__annotations__) == set(Settings.model_fields) - own
