"""scripts/zoo: rows and the page that they make. The networks themselves need the extra `zoo`."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo_networks import NETWORKS, Network
from zoo_networks.entry import CLASSES, classes, normal

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "zoo"


@pytest.fixture(scope="module")
def zoo():
    """The script as a module."""
    loader = SourceFileLoader("zoo_script", str(SCRIPT))
    made = module_from_spec(spec_from_loader("zoo_script", loader))
    loader.exec_module(made)
    return made


def layers():
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6), nn.Linear(6, CLASSES)
    )


class Sometimes(nn.Module):
    """Decides by the values of a tensor."""

    def __init__(self):
        super().__init__()
        self.layers = layers()

    def forward(self, u):
        return self.layers(u if u.sum() > 0 else -u)


def network(build):
    return Network("net", "torch", build, lambda n: (normal(n, 4, 5), classes(n)))


def test_a_network_that_is_cut_equals_sgd(zoo):
    row = zoo.tried(network(layers))
    assert (row["backprop"], row["trace"], row["why"]) == ("equal", "learns", "")
    assert row["gap"] <= 1e-12


def test_one_that_cannot_be_cut_is_refused_with_the_line(zoo):
    row = zoo.tried(network(Sometimes))
    assert row["backprop"] == "refused"
    assert "u.sum() > 0" in row["why"]


def test_other_weights_than_sgd_s_are_different(zoo, monkeypatch):
    moved = layers()
    monkeypatch.setattr(zoo, "by_sgd", lambda net, items: moved)
    assert zoo.tried(network(layers))["backprop"] == "different"


def test_an_error_of_another_kind_is_raw(zoo, monkeypatch):
    def fails(*_):
        raise KeyError("inside")

    monkeypatch.setattr(zoo, "learned", fails)
    row = zoo.tried(network(layers))
    assert row["backprop"] == "raw error"
    assert "KeyError: 'inside'" in row["why"]


def test_what_the_library_cannot_do_is_skipped(zoo):
    def missing():
        raise ImportError("no such module")

    assert "no such module" in zoo.tried(network(missing))["why"]


def test_the_page_names_every_network_and_no_place_of_this_machine(zoo):
    rows = [
        {"library": "a", "network": "One", "backprop": "equal", "trace": "learns", "gap": 3e-17,
         "why": ""},
        {"library": "b", "network": "Two", "backprop": "refused", "trace": "skipped", "gap": None,
         "why": "at /home/me/site-packages/b/two.py:3: if x | y"},
    ]  # fmt: skip
    page = zoo.table({"versions": {"torch": torch.__version__}, "networks": rows})
    assert "| One | equal | 3e-17 | learns |" in page
    assert "at b/two.py:3: if x / y" in page
    assert "/home" not in page


def test_every_network_has_a_name_of_its_own():
    names = [(network.library, network.name) for network in NETWORKS]
    assert len(set(names)) == len(names) >= 60
