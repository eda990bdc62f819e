"""Runs across three hosts, each with its own network stack. Oracle: the in-process engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hosts.namespaces import NET6, hosts, why_not

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "hosts can be made"),
    pytest.mark.timeout(300),
]

ACROSS = Path(__file__).with_name("across.py")
# One actor on each host, by the custom resource that each host has.
EACH = {
    "actors": 3,
    "blocks": {
        "block0": {"host": "host1"},
        "block[123]": {"host": "host0"},
        "block4": {"host": "host2"},
    },
}
LEVELS = ["local", "trace", "backprop"]
CASES = [
    *((level, EACH) for level in LEVELS),
    ("trace", {**EACH, "link_delay": 0.003}),
    ("trace", {**EACH, "transport": "ipc"}),
]


@pytest.fixture(scope="module")
def three():
    with hosts(3) as h:
        yield h


@pytest.fixture(scope="module")
def printed(three):
    """A line for each case."""
    paths = [str(ACROSS.parents[1]), *(path for path in sys.path if path)]
    command = [sys.executable, str(ACROSS), three.address, json.dumps(CASES)]
    text = three.run(0, command, seconds=240, PYTHONPATH=os.pathsep.join(paths))
    return [line for line in text.splitlines() if line.partition(":")[0] in LEVELS]


@pytest.mark.parametrize("level", LEVELS)
def test_equal_to_the_bit(printed, level):
    assert printed[LEVELS.index(level)] == f"{level}: equal on 3 actors"


def test_equal_with_links_that_delay(printed):
    assert printed[3] == "trace: equal on 3 actors"


def test_signals_do_cross_hosts(printed):
    assert "crosses hosts; use 'auto' or 'tcp'" in printed[4]


def test_hosts_keep_no_file_of_a_run(three, printed):
    for i in range(3):
        assert not list(three.home(i).glob("hd-*"))
        assert not [name for name in three.run(i, ["ls", "/dev/shm"]).split() if "hd" in name]


def test_equal_over_ipv6():
    """Ray's head, and the sockets of signals, on addresses of IPv6; ports of a range."""
    case = ("trace", {**EACH, "ports": "41000-41099"})
    with hosts(3, net=NET6) as h:
        command = [sys.executable, str(ACROSS), h.address, json.dumps([case])]
        paths = [str(ACROSS.parents[1]), *(path for path in sys.path if path)]
        text = h.run(0, command, seconds=240, PYTHONPATH=os.pathsep.join(paths))
    assert "trace: equal on 3 actors" in text


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, and none is shown"),
        ({"RAY_AUTH_TOKEN_PATH": "WRONG"}, "WRONG is not the cluster's"),
        ({}, "joined"),
    ],
)
def test_who_has_not_the_token_does_not_join(three, environment, words):
    wrong = three.folder / "WRONG"
    wrong.write_text("f" * 64)
    own = {k: str(wrong) if v == "WRONG" else v for k, v in environment.items()}
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(ACROSS.with_name("strangers.py")), three.address]
    assert words in three.run(0, command, PYTHONPATH=paths, **own)
