"""The C code for rotations against their matrices, and its 4-bit form against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from dynamics.helpers import F64, noise
from torch import Tensor

from hamdist.dynamics.modules.subspace import rotated, rotated_back, signs_of
from hamdist.dynamics.native import rows
from hamdist.dynamics.native.rotation import from_nibbles, rotate, to_nibbles
from hamdist.runtime.signals.codes import NibbleCode

pytestmark = pytest.mark.skipif(not rows.built(), reason="hamdist was installed without its C code")

F32 = torch.float32
SIZES = [1, 2, 3, 8, 16, 31, 32, 63, 64, 100, 127, 128, 300, 1024]
LOOSE = {F64: {"rtol": 0, "atol": 1e-13}, F32: {"rtol": 0, "atol": 1e-5}}


def signs(n: int, dtype: torch.dtype = F64) -> Tensor:
    return signs_of(n, 3, dtype, torch.device("cpu"))


def matrix(n: int) -> Tensor:
    """R by its definition: signs, the transform of the first m numbers, that of the last m."""
    m = 1 << (n.bit_length() - 1)
    small = [[(-1.0) ** (i & j).bit_count() for j in range(m)] for i in range(m)]
    first, last = torch.eye(n, dtype=F64), torch.eye(n, dtype=F64)
    first[:m, :m] = last[-m:, -m:] = torch.tensor(small, dtype=F64) / math.sqrt(m)
    return (last @ first if m < n else first) * signs(n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_equals_the_matrix(n, dtype):
    x = noise(n, 5, n)
    r, s = matrix(n), signs(n, dtype)
    there, back = (rotate(x.to(dtype), s, back=b) for b in (False, True))
    torch.testing.assert_close(there.double(), x @ r.T, **LOOSE[dtype])
    torch.testing.assert_close(back.double(), x @ r, **LOOSE[dtype])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_row_has_the_same_bits_alone_and_anywhere_in_memory(n, dtype):
    x = noise(n, 7, n).to(dtype)
    s = signs(n, dtype)
    whole, (sent,) = rotate(x, s, back=False), to_nibbles(x, s)
    decoded = from_nibbles(sent, s, n)
    for b in range(7):
        moved = torch.empty(n + 1, dtype=dtype)[1:].view(1, n).copy_(x[b : b + 1])
        assert torch.equal(rotate(moved, s, back=False)[0], whole[b])
        (alone,) = to_nibbles(moved, s)
        assert torch.equal(alone[0], sent[b])
        assert torch.equal(from_nibbles(alone, s, n)[0], decoded[b])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_as_without_the_c_code(n, dtype, monkeypatch):
    x = noise(n, 6, n).to(dtype) * 10.0 ** torch.arange(-15, 15, 5, dtype=dtype).view(-1, 1)
    x[2] = 0
    code = NibbleCode(3)
    found = [rotated(x, 3), rotated_back(x, 3), code.encode(x)]
    found.append(code.decode(found[2], n, dtype))
    monkeypatch.setattr(rows, "library", None)
    expected = [rotated(x, 3), rotated_back(x, 3), code.encode(x)]
    expected.append(code.decode(found[2], n, dtype))
    assert torch.equal(found[2], expected[2])
    for i in (0, 1, 3):
        scale = x.double().norm(dim=1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(found[i] / scale, expected[i] / scale, **LOOSE[F32])


def test_by_hand():
    """One number: its scale is |x| / 7 in 8 bits of mantissa. Two: y = R x is on the levels 2, 7
    and between them, where 2.5 goes to 2 and 3.5 to 4.
    """
    (sent,) = to_nibbles(torch.tensor([[7.0], [-7.0], [7.014], [0.0]]), torch.ones(1))
    assert sent[:, 0].tolist() == [15, 1, 15, 8]
    scales = sent[:, 1:].contiguous().view(torch.bfloat16).flatten()
    assert scales.tolist() == [1.0, 1.0, 1.0, 0.0]
    y = torch.zeros(4, 4)
    y[:, 0], y[:, 1] = 7.0, torch.tensor([2.5, 3.5, -0.5, -6.4])
    x = torch.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]] * 2, 1) / 2  # H_4 y, exact
    (sent,) = to_nibbles(x, torch.ones(4))
    assert sent[:, 0].tolist() == [15 | q + 8 << 4 for q in (2, 4, 0, -6)]
    assert sent[:, 1].tolist() == [8 | 8 << 4] * 4


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(odd):
    x = torch.ones(2, 64)
    x[1, 3] = odd
    assert to_nibbles(x, signs(64, F32)) == (None,)
    assert NibbleCode(3).encode(x) is None
    assert to_nibbles(torch.full((1, 1), 1e300, dtype=F64), signs(1)) == (None,)  # in 16 bits


def test_other_bytes_are_left_to_torch():
    s = signs(64, F32)
    sent = torch.zeros(2, 34, dtype=torch.uint8)
    assert from_nibbles(sent, s, 64) is not None
    assert from_nibbles(sent[:, :33].contiguous(), s, 64) is None
    assert from_nibbles(sent.to(torch.int8), s, 64) is None
    assert from_nibbles(sent[:, ::2], s, 32) is None
    assert rotate(torch.ones(2, 64, dtype=torch.bfloat16), s, back=False) is None
