"""Convolutions by the C code against torch's in float64, and both widths of vectors to the bit."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from dynamics.helpers import noise
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.native import rows
from hamdist.dynamics.native.convolution import Convolution
from hamdist.dynamics.vjp.closed import make_closed

F64 = torch.float64
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, F64: {"rtol": 1e-12, "atol": 1e-12}}

pytestmark = pytest.mark.skipif(
    not rows.has_products(300), reason="products of many rows are a BLAS's on this processor"
)


class Case(NamedTuple):
    images: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


def drawn(seed: int) -> Case:
    """A case in which the kernel fits the image."""
    draw = random.Random(seed)

    def pair(low, high):
        return draw.randint(low, high), draw.randint(low, high)

    kernel, padding, dilation = pair(1, 5), pair(0, 3), pair(1, 2)
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = (max(1, least[0]) + draw.randint(0, 9), max(1, least[1]) + draw.randint(0, 40))
    numbers = draw.randint(1, 9), draw.randint(1, 5), draw.randint(2, 19)
    return Case(*numbers, size, kernel, pair(1, 3), padding, dilation)


CASES = [
    Case(4, 1, 6, (28, 28), (5, 5), padding=(2, 2)),
    Case(3, 32, 32, (28, 28), (3, 3), (2, 2), (1, 1)),
    Case(2, 8, 16, (7, 7), (1, 1), (2, 2)),
    Case(1, 3, 4, (9, 70), (7, 7), (2, 3), (3, 3)),
    Case(2, 2, 3, (5, 5), (2, 2), (4, 5)),  # places that no sum reads
    *map(drawn, range(60)),
]


def values(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b, z."""
    x = noise(1, case.images, case.channels, *case.size)
    w = noise(2, case.outputs, case.channels, *case.kernel)
    b = noise(3, case.outputs)
    z = noise(4, *torch.conv2d(x, w, b, *case[5:]).shape)
    return x.to(dtype), w.to(dtype), b.to(dtype), z.to(dtype)


def by_c(case: Case, x: Tensor, w: Tensor, b: Tensor, z: Tensor) -> list[Tensor]:
    """y, and the gradients of x, W and b."""
    made = Convolution(x.shape, w.shape, *case[5:])
    y = made.forward(x, w, b)
    to, g = made.pull(x, w, z, message=True, gradients=True)
    assert to is not None
    assert g is not None
    return [y, to, g[:, :-1].reshape(w.shape), g[:, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, dtype):
    x, w, b, z = values(case, dtype)
    exact_x, exact_w, exact_b = (t.double().requires_grad_() for t in (x, w, b))
    y = torch.conv2d(exact_x, exact_w, exact_b, *case[5:])
    y.backward(z.double())
    expected = [y.detach(), exact_x.grad, exact_w.grad, exact_b.grad]
    for mine, its in zip(by_c(case, x, w, b, z), expected, strict=True):
        torch.testing.assert_close(mine.double(), its, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", CASES[:20])
def test_vectors_of_both_widths_give_the_same_bits(case, dtype):
    given = values(case, dtype)
    wide = by_c(case, *given)
    before = rows.library.use_wide_vectors(0)
    try:
        assert all(map(torch.equal, wide, by_c(case, *given)))
    finally:
        rows.library.use_wide_vectors(before)


def test_an_image_has_the_same_bits_among_any_others():
    x, w, b, z = values(CASES[1], torch.float32)
    y, to, _, _ = by_c(CASES[1], x, w, b, z)
    alone = CASES[1]._replace(images=1)
    one = by_c(alone, x[1:2].clone(), w, b, z[1:2].clone())
    assert torch.equal(y[1:2], one[0])
    assert torch.equal(to[1:2], one[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_layer_of_a_block(bias, frozen, wanted, layout):
    """(images of any layout in memory)"""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 8, 3, padding=1, bias=bias, dtype=F64)
    module.weight.requires_grad_(not frozen)
    x = noise(1, 2, 3, 12, 12).to(memory_format=layout)
    z = noise(2, 2, 8, 12, 12).to(memory_format=layout)
    made, torchs = (make_closed(module, Combine.CONCAT, 0, 1, native=n) for n in (True, False))
    kernel = made._steps[0].kernel
    assert kernel.convolution(x) is not None
    found = []
    for cell in (made, torchs):
        record = cell.forward([x], [wanted])
        to, g = cell.pull(record, z)
        found.append([record.output, *to, *g])
    assert len(found[0]) == 2 + (not frozen) + bias
    for mine, its in zip(*found, strict=True):
        assert (mine is None) == (its is None) == (not wanted and mine is found[0][1])
        if mine is not None:
            torch.testing.assert_close(mine, its, **CLOSE[F64])


def test_where_torch_is_faster_it_makes_them(monkeypatch):
    def pays(images, channels, outputs, size):
        shapes = (images, channels, size, size), (outputs, channels, 3, 3)
        return Convolution(*shapes, (1, 1), (1, 1), (1, 1)).pays

    assert pays(32, 3, 64, 32)
    assert pays(1, 32, 64, 7)  # little work
    assert not pays(32, 32, 32, 28)  # long sums
    assert not pays(32, 3, 64, 7)  # small images
    assert not pays(2, 64, 64, 2)  # hardly any place
    assert not pays(32, 16, 500, 28)  # many weights
    assert not pays(0, 3, 8, 28)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not pays(32, 3, 64, 32)
