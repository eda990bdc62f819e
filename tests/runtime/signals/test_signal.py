"""The wire: what goes in comes out, aligned; anything else is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.signals.packing import APART, HEADER, Packer
from hamdist.runtime.signals.signal import Channel, Signal, ready

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


def packed(*signals, channel=CHANNEL, run=RUN):
    """A message with all payloads inside."""
    packer = Packer(run, channel)
    message = b""
    for signal in signals:
        form = None if signal.payload is None else packer.form(signal.payload)
        message += packer.header(signal, form)
        if form is not None:
            message += bytes(form.bytes_of(signal.payload)) + form.fill
    return message


def nothing_apart(form, index):
    raise WireError(f"payload {index} is not here")


def unpacked(message, run=RUN, channel=CHANNEL, apart=nothing_apart):
    return Packer(run, channel).unpack(bytes(message), apart)


def through(signal):
    (back,) = unpacked(packed(signal))
    return back


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
        Packer(RUN, CHANNEL).form(torch.zeros(2, dtype=torch.complex64))


def test_only_contiguous_tensors_cross():
    with pytest.raises(WireError, match="contiguous"):
        Packer(RUN, CHANNEL).form(torch.zeros(3, 2).t())


def message():
    return bytearray(packed(Signal(STAMP, torch.ones(2, 3))))


def refused(data, run=RUN, channel=CHANNEL):
    """The words of the refusal: by a packer that sees this first, and by one that has seen a whole
    signal before, which it must not take for this."""
    texts = set()
    for earlier in ([], [bytes(message())]):
        packer = Packer(run, channel)
        for good in earlier if (run, channel) == (RUN, CHANNEL) else []:
            assert len(packer.unpack(good, nothing_apart)) == 1
        with pytest.raises(WireError) as caught:
            packer.unpack(bytes(data), nothing_apart)
        texts.add(str(caught.value))
    (text,) = texts
    return text


def test_what_is_refused():
    data = message()
    assert len(data) == HEADER.size + 2 * 8 + 2 * 3 * 4
    assert "of run" in refused(data, run=1)
    assert "kind 0 for channel 7" in refused(data, channel=CHANNEL._replace(number=8))
    assert "kind 0" in refused(data, channel=CHANNEL._replace(kind=Kind.MESSAGE))
    assert "bytes do not make shape" in refused(data[:-1])
    assert "header of 1 bytes" in refused(data + b"x")
    assert "header of 10" in refused(data[:10])
    assert "dimensions" in refused(data[: HEADER.size + 15])
    assert "header of 0" in refused(b"")
    data[0] = 0
    assert "not a signal" in refused(data)
    data = message()
    data[5] = 99  # the type
    assert "type 99" in refused(data)
    data = message()
    data[4] = 16  # the flags
    assert "flags 0x10" in refused(data)
    data = message()
    data[HEADER.size : HEADER.size + 8] = (-2).to_bytes(8, "little", signed=True)
    assert "shape (-2, 3)" in refused(data)
    data[HEADER.size : HEADER.size + 8] = (2**61).to_bytes(8, "little", signed=True)
    assert "do not make shape" in refused(data)
    empty = packed(Signal(STAMP))
    assert "header of 5 bytes" in refused(empty + b"xxxxx")


def test_a_bundle_keeps_its_order_and_each_signals_shape():
    tensors = [torch.arange(5), None, torch.ones(3, dtype=torch.int8), torch.tensor(2.0)]
    signals = [Signal(STAMP._replace(tick=n), t) for n, t in enumerate(tensors)]
    signals.append(Signal(STAMP, end=True))
    back = unpacked(packed(*signals))
    assert [s.stamp for s in back] == [s.stamp for s in signals]
    assert [s.end for s in back] == [False] * 4 + [True]
    for old, new in zip(signals, back, strict=True):
        assert (old.payload is None) == (new.payload is None)
        if old.payload is not None:
            assert torch.equal(old.payload, new.payload)
            assert old.payload.dtype == new.payload.dtype


def test_a_payload_that_goes_another_way_is_named():
    packer = Packer(RUN, CHANNEL)
    tensor = torch.rand(4, 5)
    asked = []

    def apart(form, index):
        asked.append((form.shape, form.dtype, form.nbytes, index))
        return tensor

    signal = Signal(STAMP, tensor)
    data = packer.header(signal, packer.form(tensor), 3) + packed(Signal(STAMP, torch.ones(1)))
    assert data[4] == APART
    first, second = unpacked(data, apart=apart)
    assert first.payload is tensor
    assert asked == [((4, 5), torch.float32, 80, 3)]
    assert torch.equal(second.payload, torch.ones(1))


def test_many_shapes_on_one_channel():
    """Forms are remembered, but not without bounds."""
    packer = Packer(RUN, CHANNEL)
    for n in range(300):
        tensor = torch.full((n % 150,), float(n))
        form = packer.form(tensor)
        data = packer.header(Signal(STAMP, tensor), form) + bytes(form.bytes_of(tensor)) + form.fill
        (back,) = packer.unpack(data, nothing_apart)
        assert torch.equal(back.payload, tensor)
    assert max(len(packer._forms), len(packer._seen), len(packer._templates)) <= 64


@given(st.binary(max_size=160))
@settings(max_examples=300, deadline=None)
def test_random_bytes_do_no_harm(data):
    with pytest.raises(WireError):
        unpacked(data)


@given(st.integers(0, HEADER.size + 15), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_an_altered_header_is_refused_or_changes_only_stamp_and_shape(position, value):
    data = message()
    data[position] = value
    try:
        (signal,) = unpacked(data)
    except WireError:
        return
    assert signal.payload is None or signal.payload.nbytes == 24


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
