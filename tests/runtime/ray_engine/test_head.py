"""Documented contract: a cluster whose head is gone ends a run with an error, and with its result.
That the rest of a run goes on meanwhile is Ray's; tests/hosts tries it with a real head."""

from __future__ import annotations

import socket

import pytest

from hamdist.runtime.ray_engine.cluster_hosts import HEAD_SECONDS, HeadWatch


@pytest.fixture
def head():
    """A socket that listens, as a head does, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_answers_is_not_lost(head):
    watch, (_, address) = HeadWatch(), head
    began = watch._sent
    assert not any(watch.lost(address, began + seconds) for seconds in range(100))


def test_a_head_is_lost_when_it_has_not_answered_for_a_while(head):
    watch, (server, address) = HeadWatch(), head
    began = watch._sent
    assert not watch.lost(address, began + 20)
    server.close()
    silent = [watch.lost(address, began + 20 + seconds) for seconds in range(20)]
    assert silent == [seconds >= HEAD_SECONDS for seconds in range(20)]


def test_a_head_that_comes_back_is_not_lost(head):
    watch, (server, address) = HeadWatch(), head
    began = watch._sent
    server.close()
    assert not watch.lost(address, began + HEAD_SECONDS - 1)
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        assert not watch.lost(address, began + HEAD_SECONDS + 2)
