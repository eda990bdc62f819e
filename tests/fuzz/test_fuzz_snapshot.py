"""Whatever a file of a snapshot holds, reading it gives a state or one SnapshotError."""

from __future__ import annotations

import json
import math
from collections import deque

import pytest
import torch
from fuzz.budget import fuzz
from hypothesis import given
from hypothesis import strategies as st

from hamdist.dynamics.saved_state.stateful import Packing, unpacked
from hamdist.dynamics.schedule.events import Event, Phase, Stamp
from hamdist.dynamics.vjp.gradient import Outer
from hamdist.errors import SnapshotError
from hamdist.runtime.storage.snapshot_files import (
    Manifest,
    SnapshotFile,
    from_bytes,
    read_manifest,
    to_bytes,
)

STATE = {
    "h": torch.arange(6.0).view(2, 3).t(),
    "event": Event(4, Phase.FORWARD, 2),
    "queue": deque([1.5, math.inf], maxlen=3),
    "factors": [Outer(torch.ones(1, 2), torch.zeros(1, 3, dtype=torch.bfloat16))],
    "stamps": (Stamp(1, 2, 3), None, True),
    7: {"due": {"h", "z"}, "shape": torch.Size([2, 3]), "wide": torch.ones(1, 3).expand(4, 3)},
}


def file():
    packing = Packing()
    return to_bytes(packing.packed(STATE), packing.tensors)


FILE = file()
MANIFEST = Manifest(
    format=1,
    tick=8,
    run="a",
    parts={"block0": SnapshotFile(file="block-0.1.safetensors", nbytes=3, sha256="00")},
    settings={},
    network={},
    delays={},
    versions={},
).dumped()


def read(data):
    """The state, or the one line that refuses it."""
    try:
        return from_bytes(data, "the file"), ""
    except SnapshotError as error:
        return None, str(error)


def refused(data):
    state, why = read(data)
    return state is None and "the file" in why


def test_what_is_written_is_read():
    state, _ = read(FILE)
    assert state.keys() == STATE.keys()
    assert state["h"].stride() == STATE["h"].stride()  # type: ignore[attr-defined]
    assert torch.equal(state["h"], STATE["h"])
    assert state["event"] == STATE["event"]
    assert state["queue"] == STATE["queue"]
    assert state["queue"].maxlen == 3
    assert torch.equal(state["factors"][0].x, STATE["factors"][0].x)
    assert state["stamps"] == STATE["stamps"]
    assert state[7]["due"] == STATE[7]["due"]
    assert state[7]["shape"] == STATE[7]["shape"]
    assert torch.equal(state[7]["wide"], STATE[7]["wide"])


def test_cut_off_anywhere():
    for length in range(len(FILE)):
        assert refused(FILE[:length])
    for length in range(len(MANIFEST) - 1):  # (behind it is a line's end)
        with pytest.raises(SnapshotError):
            read_manifest(MANIFEST[:length], "manifest.json")


@fuzz(100)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    assert refused(data)
    with pytest.raises(SnapshotError):
        read_manifest(data, "manifest.json")


@fuzz(200)
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(1, 255)), min_size=1))
def test_altered_bytes(changes):
    """Without the checksum of the manifest, even."""
    data = bytearray(FILE)
    for place, by in changes:
        data[place] ^= by
    state, why = read(bytes(data))
    assert state is not None or "the file" in why


@fuzz(200)
@given(st.integers(0, len(MANIFEST) - 2), st.integers(1, 255))
def test_an_altered_manifest_is_refused(place, by):
    data = bytearray(MANIFEST)
    data[place] ^= by
    if bytes(data).split() == MANIFEST.split():
        return  # white space
    try:
        found = read_manifest(bytes(data), "manifest.json")
    except SnapshotError:
        return
    assert found.dumped() == MANIFEST  # (an escaped character, say)


NAMES = ["tensor", "is", "of", "map", "queue", "most", "tuple", "set", "enum", "name", "size"]
NAMES += ["dtype", "float", "shape", "strides", "gpu"]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@fuzz(200)
@given(plain)
def test_any_json(data):
    """Nothing comes out but data, and nothing but SnapshotError is raised."""
    try:
        unpacked(json.loads(json.dumps(data)), [torch.ones(2)])
    except SnapshotError:
        return
