"""Documented contract: one run writes into a folder of snapshots; a resumed one says from what."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream, chain, seeded
from runtime.networks import skip_graph as skips
from torch import nn

from hamdist.dynamics.graph.merged import merged_module
from hamdist.errors import ChoiceWarning, SnapshotError
from hamdist.runtime.storage import store
from hamdist.runtime.storage.store import CLAIM, claimed
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

pytestmark = pytest.mark.timeout(90)
ALONE = {"kind": "inprocess"}
HOLDS = (
    "import sys; from hamdist.runtime.storage.store import claimed\n"
    "with claimed(sys.argv[1], 7): print('claimed', flush=True); input()"
)


def run(path, steps=16, resume=None, stream=None, model=chain, **fields):
    kept = {"path": str(path), "every": 8}
    chosen = settings(ALONE, steps, level="trace", snapshots=kept, **fields)
    return train(model(), stream or PortableStream(steps), chosen, resume=resume)


def test_a_second_run_is_refused_and_a_killed_one_taken_over(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout.readline() == "claimed\n"
        said = (
            rf"run 0+7 writes there \(process {first.pid} on .*, since 20..-.*give another folder"
        )
        with pytest.raises(SnapshotError, match=said):
            run(tmp_path)
        assert not list(tmp_path.glob("tick-*"))
        first.kill()
        first.wait(20)
    assert run(tmp_path).snapshots
    assert not (tmp_path / CLAIM).exists()


@pytest.mark.parametrize("renewed", [0.0, 1000.0])
def test_a_claim_of_another_host_counts_while_it_is_renewed(tmp_path, renewed):
    with claimed(str(tmp_path), 7):
        claim = json.loads((tmp_path / CLAIM).read_text())
    claim |= {"host": "elsewhere", "renewed": time.time() - renewed}
    (tmp_path / CLAIM).write_text(json.dumps(claim))
    if renewed > store.STALE_SECONDS:
        assert run(tmp_path).snapshots
        return
    with pytest.raises(SnapshotError, match="on elsewhere"):
        run(tmp_path)
    assert (tmp_path / CLAIM).exists()


def test_a_claim_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RENEWAL_SECONDS", 0.01)
    with claimed(str(tmp_path), 7):
        first = (tmp_path / CLAIM).read_bytes()
        give_up = time.monotonic() + 30
        while (tmp_path / CLAIM).read_bytes() == first:
            assert time.monotonic() < give_up
    assert not (tmp_path / CLAIM).exists()


def test_what_is_no_claim_is_overwritten(tmp_path):
    (tmp_path / CLAIM).write_text("?")
    assert run(tmp_path).snapshots


def test_a_run_that_goes_on_says_from_what(tmp_path):
    first = run(tmp_path / "a")
    with pytest.warns(
        ChoiceWarning, match=r"going on from .*tick-\d{12}: run [0-9a-f]{16}, .* at 20..-"
    ):
        on = run(tmp_path / "b", resume=tmp_path / "a")
    assert_equal(first, on)


def items(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(3, 4, generator=generator).double(), torch.tensor([0, 1, 2]))
        for _ in range(16)
    ]


class Portable:
    """A user's own stream."""

    portable = True

    def __init__(self, seed):
        self._inner = from_iterable(items(seed), classes=3)
        self.spec = self._inner.spec

    def samples(self):
        return self._inner.samples()


@pytest.mark.filterwarnings("ignore::hamdist.errors.ChoiceWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_another_stream_is_warned_of(tmp_path, seed):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    run(tmp_path / "a", stream=Portable(0), model=model)
    on = run(tmp_path / "b", resume=tmp_path / "a", stream=Portable(seed), model=model)
    told = [text for text in on.warnings if "the stream is not that of" in text]
    assert len(told) == seed
    assert all("first sample" in text for text in told)


@pytest.mark.filterwarnings("ignore::hamdist.errors.ChoiceWarning")
@pytest.mark.parametrize(("name", "warned"), [("Portable", 0), ("Another", 1)])
def test_a_stream_whose_class_has_moved_to_another_module_is_the_same(tmp_path, name, warned):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    run(tmp_path / "a", stream=Portable(0), model=model)
    moved = type(name, (Portable,), {"__module__": "elsewhere"})
    on = run(tmp_path / "b", resume=tmp_path / "a", stream=moved(0), model=model)
    assert sum("the stream is not that of" in text for text in on.warnings) == warned


@pytest.mark.filterwarnings("ignore")
def test_a_graph_takes_over_the_weights_of_another_level(tmp_path):
    """Oracle: the weights that the snapshot's run had when nothing is learned any more."""
    graph = seeded(skips)
    first = run(tmp_path / "a", model=lambda: graph)
    on = train(
        graph,
        PortableStream(16),
        settings(ALONE, 17, level="backprop", learning={"lr": 0}),
        resume=tmp_path / "a" / first.snapshots[-1].rpartition("/")[2],
    )
    assert any("its weights and its place" in text for text in on.warnings)
    learned = dict(first.model.state_dict())
    assert all(torch.allclose(t, learned[k], atol=0.5) for k, t in on.model.state_dict().items())
    fresh = merged_module(graph, {n: b.module.state_dict() for n, b in graph.blocks.items()}, None)
    assert any(not torch.equal(t, fresh.state_dict()[k]) for k, t in on.model.state_dict().items())


class Counting(nn.Module):
    """Changes with the number of its calls, which no snapshot holds."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return torch.tanh(x) * (1 + 0.01 * self.calls[0])


@pytest.mark.filterwarnings("ignore")
def test_python_state_that_begins_anew_is_said(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 3)).double()

    first = run(tmp_path / "a", stream=Portable(0), model=model)
    on = run(tmp_path / "b", resume=tmp_path / "a", stream=Portable(0), model=model)
    words = "is in no snapshot and begins anew"
    assert not any(words in text for text in first.warnings)
    assert any(words in text for text in on.warnings)


def test_a_folder_that_cannot_be_written_says_how_to_go_on(tmp_path):
    """As one that is mounted read-only, from which a run is resumed."""
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match=r"Not a directory; .* \(--snapshots\) names another"):
        _claim(tmp_path / "file" / "folder")


def _claim(folder):
    with claimed(str(folder), 7):
        pass
