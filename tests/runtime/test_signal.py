"""The wire: what goes in comes out, aligned; anything else is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamdist.dynamics.schedule import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.signal import HEADER, Channel, Signal, decode, encode, ready

CHANNEL = Channel(7, Kind.STATE, "a", "b", "a->b", 4)
RUN = 2**63 + 5
STAMP = Stamp(-3, 2**40, 9)
TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def through(signal, channel=CHANNEL):
    header, payload = encode(signal, RUN, channel)
    return decode(bytes(header), memoryview(bytes(payload)), RUN, channel)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), (2, 1, 3, 4)])
def test_round_trip(dtype, shape):
    tensor = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
    back = through(Signal(STAMP, tensor, sequence_end=True))
    assert back.payload.dtype == dtype
    assert back.payload.shape == shape
    assert torch.equal(back.payload, tensor)
    assert back.payload.data_ptr() % 64 == 0
    assert (back.stamp, back.end, back.sequence_end) == (STAMP, False, True)


def test_special_values_cross_bit_for_bit():
    tensor = torch.tensor([float("inf"), -0.0, 1e-45, 3.4e38])
    bits = through(Signal(STAMP, tensor)).payload.view(torch.int32)
    assert torch.equal(bits, tensor.view(torch.int32))


def test_an_empty_signal_and_the_end():
    assert through(Signal(STAMP)).payload is None
    back = through(Signal(STAMP, end=True))
    assert back.payload is None
    assert back.end


def test_a_type_that_cannot_cross():
    with pytest.raises(WireError, match="complex64"):
        encode(Signal(STAMP, torch.zeros(2, dtype=torch.complex64)), RUN, CHANNEL)


def frames():
    header, payload = encode(Signal(STAMP, torch.ones(2, 3)), RUN, CHANNEL)
    return bytearray(header), bytes(payload)


def refused(header, payload, run=RUN, channel=CHANNEL):
    with pytest.raises(WireError) as caught:
        decode(bytes(header), memoryview(payload), run, channel)
    return str(caught.value)


def test_what_is_refused():
    header, payload = frames()
    assert "of run" in refused(header, payload, run=1)
    assert "kind 0 for channel 7" in refused(header, payload, channel=CHANNEL._replace(number=8))
    assert "kind 0" in refused(header, payload, channel=CHANNEL._replace(kind=Kind.MESSAGE))
    assert "bytes do not make shape" in refused(header, payload[:-1])
    assert "bytes do not make shape" in refused(header, payload + b"x")
    assert "header of" in refused(header[:10], payload)
    assert "dimensions" in refused(header[:-1], payload)
    header[0] = 0
    assert "not a signal" in refused(header, payload)
    header, payload = frames()
    header[5] = 99  # the type
    assert "type 99" in refused(header, payload)
    header, payload = frames()
    header[HEADER.size : HEADER.size + 8] = (-2).to_bytes(8, "little", signed=True)
    assert "shape (-2, 3)" in refused(header, payload)


@given(st.binary(max_size=120), st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_random_bytes_do_no_harm(header, payload):
    with pytest.raises(WireError):
        decode(header, memoryview(payload), RUN, CHANNEL)


@given(st.integers(0, 59), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_an_altered_header_is_refused_or_changes_only_stamp_and_shape(position, value):
    header, payload = frames()
    header[position] = value
    try:
        signal = decode(bytes(header), memoryview(payload), RUN, CHANNEL)
    except WireError:
        return
    assert signal.payload is None or signal.payload.nbytes == len(payload)


def test_ready_makes_tensors_the_same_to_every_kernel():
    base = torch.arange(24.0)
    odd = base[1:13].view(3, 4)
    assert ready(odd).data_ptr() % 64 == 0
    assert torch.equal(ready(odd), odd)
    strided = base.view(4, 6).t()
    assert ready(strided).is_contiguous()
    assert ready(torch.ones(1).expand(3, 5)).stride() == (5, 1)
    one_row = torch.empty(8).as_strided((1, 4), (99, 1))
    assert ready(one_row).stride() == (4, 1)
    leaf = torch.ones(3, requires_grad=True)
    assert not ready(leaf * 2).requires_grad
    plain = torch.ones(3, 4)
    assert ready(plain).data_ptr() == plain.data_ptr()
