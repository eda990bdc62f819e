"""Bytes from a socket are signals, or WireError; they take no more memory than they have bytes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest
import torch
from fuzz.budget import fuzz
from hypothesis import given
from hypothesis import strategies as st

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.signals.packing import APART, FORMAT, HEADER, MAGIC, Packer
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.transport import shared_memory
from hamdist.runtime.transport import shared_memory as shared
from hamdist.runtime.transport.endpoint import EndpointContext, socket_folder
from hamdist.runtime.transport.shared_receiver import SharedReceiver

RUN = 79
CHANNEL = Channel(3, Kind.STATE, "a", "b", "a->b", 4, slack=2, bundle=4)
AT = Stamp(0, 0, 0)

pytestmark = pytest.mark.timeout(3600)

integers = st.integers
byte = integers(0, 255)
quad = st.one_of(integers(-3, 9), integers(-(2**63), 2**63 - 1))


def mostly(usual, others):
    """The usual value nine times in ten: most of a header has to be right to get further."""
    return st.integers(0, 9).flatmap(lambda n: others if n == 0 else st.just(usual))


@st.composite
def headers(draw):
    """A header whose fields are right, or anything; with dimensions, and bytes behind it."""
    dims = draw(st.one_of(integers(0, 4), byte))
    fields = [
        draw(mostly(MAGIC, st.binary(min_size=2, max_size=2))),
        draw(mostly(FORMAT, byte)),
        draw(mostly(int(CHANNEL.kind), byte)),
        draw(mostly(0, byte) | integers(0, 15)),
        draw(integers(0, 12)),
        dims,
        draw(mostly(RUN, integers(0, 2**64 - 1))),
        draw(mostly(CHANNEL.number, integers(0, 2**32 - 1))),
        draw(integers(0, 2**32 - 1)),
        *draw(st.lists(integers(-(2**63), 2**63 - 1), min_size=3, max_size=3)),
    ]
    shape = draw(st.lists(quad, min_size=min(dims, 20), max_size=min(dims, 20)))
    tail = draw(st.binary(max_size=200))
    return (
        HEADER.pack(*fields) + b"".join(n.to_bytes(8, "little", signed=True) for n in shape) + tail
    )


@st.composite
def bundles(draw):
    """Signals as hamdist packs them: (the signals, their bytes)."""
    packer = Packer(RUN, CHANNEL)
    made, data = [], b""
    for _ in range(draw(integers(1, 3))):
        shape = draw(st.lists(integers(0, 4), max_size=3))
        kind = draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]))
        payload = None if draw(st.booleans()) else torch.ones(shape, dtype=kind)
        one = Signal(Stamp(draw(quad), draw(quad), draw(quad)), payload, draw(st.booleans()))
        form = None if payload is None else packer.form(payload)
        data += packer.header(one, form)
        if form is not None and payload is not None:
            data += bytes(form.bytes_of(payload)) + form.fill
        made.append(one)
    return made, data


@st.composite
def altered(draw):
    """Packed signals with bytes changed, left out, put in, or cut off."""
    data = bytearray(draw(bundles())[1])
    for _ in range(draw(integers(1, 4))):
        at = draw(integers(0, max(0, len(data) - 1)))
        how = draw(integers(0, 3))
        piece = draw(st.binary(min_size=1, max_size=9))
        if how == 0:
            data[at : at + 1] = piece[:1]
        elif how == 1:
            data[at:at] = piece
        elif how == 2:
            del data[at : at + len(piece)]
        else:
            del data[at:]
    return bytes(data)


def taker(form, index):
    """As in zeromq.py, where nothing came apart."""
    raise WireError("no such frame")


def taken(data):
    try:
        return Packer(RUN, CHANNEL).unpack(data, taker)
    except WireError:
        return None


@fuzz(60)
@given(st.one_of(st.binary(max_size=300), headers(), altered()))
def test_bytes_are_signals_or_refused(data):
    signals = taken(data)
    if signals is not None:
        held = sum(0 if s.payload is None else s.payload.nbytes for s in signals)
        assert held + len(signals) * HEADER.size <= len(data)


@fuzz(30)
@given(bundles())
def test_what_was_packed_comes_out(bundle):
    made, data = bundle
    for old, new in zip(made, taken(data), strict=True):
        assert (new.stamp, new.end) == (old.stamp, old.end)
        assert (new.payload is None) == (old.payload is None)
        if new.payload is not None:
            assert new.payload.dtype == old.payload.dtype
            assert torch.equal(new.payload, old.payload)


@st.composite
def rings(draw):
    """What announces a ring, and the memory that comes with it: bytes (None: no memory file)."""
    slots, slot_bytes = draw(mostly(2, integers(0, 2**32 - 1))), draw(mostly(64, quad))
    head = shared_memory.RING_HEADER.pack(
        shared_memory.RING_MAGIC,
        draw(mostly(shared_memory.RING_FORMAT, byte)),
        0,
        draw(mostly(CHANNEL.number, integers(0, 2**32 - 1))),
        draw(mostly(RUN, integers(0, 2**64 - 1))),
        slots,
        slot_bytes % 2**64,
    )
    cut = draw(mostly(len(head), integers(3, len(head))))
    size = draw(mostly(128, st.sampled_from([0, 64, 127, 4096])))
    return head[:cut], draw(mostly(size, st.none())), draw(mostly(True, st.just(False)))


@st.composite
def slotted(draw):
    """A signal whose payload lies in a slot."""
    packer = Packer(RUN, CHANNEL)
    made = Signal(AT, torch.zeros(draw(integers(1, 40))))
    header = packer.header(made, packer.form(made.payload), draw(integers(0, 5)))
    assert header[4] & APART
    return header


@pytest.mark.skipif(not shared.available(), reason="this platform has no such memory")
@fuzz(30)
@given(
    st.lists(st.one_of(rings(), slotted(), headers(), bundles().map(lambda b: b[1])), max_size=4)
)
def test_packets_are_signals_or_refused(packets):
    """To the receiving end by shared memory, from a process of the same user."""
    line = EndpointContext(RUN, threading.Event())
    before = len(os.listdir("/proc/self/fd"))
    receiver = SharedReceiver(line, CHANNEL)
    line.abort.set()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(receiver.address.removeprefix(shared_memory.SCHEME))
        stranger.setblocking(False)
        for packet in packets:
            with contextlib.suppress(BlockingIOError):
                send(stranger, packet)
    with contextlib.suppress(WireError, Aborted):
        while True:
            receiver.receive(AT)
    receiver.close()
    socket_folder(RUN).rmdir()
    assert len(os.listdir("/proc/self/fd")) == before


def send(stranger, packet):
    if isinstance(packet, bytes):
        stranger.send(packet)
        return
    head, size, sealed = packet
    stranger.send(head)
    if size is None:
        stranger.send(shared_memory.RING_MAGIC)
        return
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        shared_memory.fcntl.fcntl(fd, shared_memory.fcntl.F_ADD_SEALS, shared_memory.seals())  # type: ignore[attr-defined]
    socket.send_fds(stranger, [shared_memory.RING_MAGIC], [fd])
    os.close(fd)
