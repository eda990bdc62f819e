"""Checker: every unusable sample is refused, and the message says which and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hamdist.errors import StreamError
from hamdist.streams import Checker, Sample, SampleSpec

CLASSES = SampleSpec((4, 3), torch.float32, (4,), torch.int64, 5)
VALUES = SampleSpec((4, 3), torch.float32, (4, 2), torch.float32)


def equal(spec: SampleSpec = CLASSES) -> Checker:
    return Checker(spec, equal_batches=True)


def free(spec: SampleSpec = CLASSES) -> Checker:
    return Checker(spec, equal_batches=False)


def holding(value: float, at: tuple[int, ...], shape: tuple[int, ...] = (4, 3)) -> Tensor:
    tensor = torch.zeros(shape)
    tensor[at] = value
    return tensor


GOOD_U = torch.zeros(4, 3)
GOOD_Y = torch.tensor([0, 4, 1, 2])


class TestGood:
    def test_passes_unchanged(self) -> None:
        sample = Sample(GOOD_U.clone(), GOOD_Y.clone(), True, 2.5)
        assert equal().check(0, sample) is sample
        missing = Sample(GOOD_U.clone())
        assert equal().check(0, missing) is missing

    def test_other_batch(self) -> None:
        sample = Sample(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        assert free().check(0, sample) is sample

    def test_finite_values_whose_sum_overflows(self) -> None:
        large = torch.full((4, 3), 3e38)
        assert not large.sum().isfinite()
        assert torch.equal(equal().check(0, Sample(large)).u, large)

    def test_integer_inputs(self) -> None:
        spec = SampleSpec((4, 3), torch.int64, (4,), torch.int64, 5)
        u = torch.ones(4, 3, dtype=torch.int64)
        assert torch.equal(equal(spec).check(0, Sample(u)).u, u)


BIG = torch.arange(200, dtype=torch.float32)


@pytest.mark.parametrize(
    "u",
    [
        BIG[:12].reshape(3, 4).T,  # not contiguous
        BIG[1:13].reshape(4, 3),  # offset, and misaligned
        BIG[16:28].reshape(4, 3),  # aligned, but at an offset
        BIG[:12].reshape(4, 3),  # the head of a larger storage
        torch.from_numpy(np.arange(13, dtype=np.float32)[1:].reshape(4, 3)),  # misaligned alone
        torch.ones(1, 3).expand(4, 3),
        torch.ones(4, 3, requires_grad=True),
    ],
)
def test_result_is_contiguous_aligned_and_alone(u: Tensor) -> None:
    sample = Sample(u, torch.arange(8)[1:5], True, 2.5)
    checked = equal().check(0, sample)
    assert checked.y is not None
    for before, after in ((u, checked.u), (sample.y, checked.y)):
        assert before is not None
        assert torch.equal(before, after)
        assert after.is_contiguous()
        assert after.data_ptr() % 64 == 0
        assert after.storage_offset() == 0
        assert after.untyped_storage().nbytes() == after.nbytes
        assert after.data_ptr() != before.data_ptr()
        assert not after.requires_grad
    assert (checked.end, checked.time) == (True, 2.5)


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (GOOD_U.double(), r"u has dtype torch.float64, expected torch.float32: .*\.to\("),
        (GOOD_U.tolist(), "u is a list, not a torch tensor"),
        (GOOD_U.to_sparse(), "u has another kind of tensor"),
        (torch.zeros(4, 2), r"u has shape \(4, 2\), earlier ones had \(B, 3\)"),
        (torch.zeros(3), r"u has shape \(3,\)"),
        (torch.zeros(4, 3, 1), r"u has shape \(4, 3, 1\)"),
        (torch.tensor(1.0), r"u has shape \(\)"),
        (torch.zeros(2, 3), r" has batch 2, earlier ones had 4: .*drop_last=True.*pulse"),
        (holding(float("nan"), (2, 1)), r"u\[2, 1\] is nan \(1 such values\)"),
        (holding(float("inf"), (0, 0)), r"u\[0, 0\] is inf"),
        (holding(float("-inf"), (3, 2)), r"u\[3, 2\] is -inf"),
    ],
)
def test_inputs(u: Tensor, message: str) -> None:
    with pytest.raises(StreamError, match=f"^sample 17:? ?{message}"):
        equal().check(17, Sample(u, GOOD_Y))


def test_opposite_infinities() -> None:
    u = holding(float("inf"), (0, 0))
    u[1, 1] = float("-inf")
    with pytest.raises(StreamError, match=r"u\[0, 0\] is inf \(2 such values\)"):
        equal().check(0, Sample(u))


def test_empty_batch() -> None:
    with pytest.raises(StreamError, match="sample 3: u has batch 0"):
        free().check(3, Sample(torch.zeros(0, 3)))


@pytest.mark.parametrize(
    ("spec", "y", "message"),
    [
        (CLASSES, GOOD_Y.int(), "y has dtype torch.int32, expected torch.int64"),
        (CLASSES, GOOD_Y.float(), "y has dtype torch.float32, expected torch.int64"),
        (CLASSES, [0, 1, 2, 3], "y is a list"),
        (CLASSES, GOOD_Y.unsqueeze(1), r"y has shape \(4, 1\), expected \(B,\)"),
        (CLASSES, torch.tensor(1), r"y has shape \(\)"),
        (CLASSES, GOOD_Y[:3], "y has batch 3, but u has batch 4"),
        (CLASSES, torch.tensor([0, 1, 5, 2]), r"y\[2\] is 5, but with 5 classes .* 0 to 4"),
        (CLASSES, torch.tensor([0, -99, 1, 2]), r"y\[1\] is -99, but with 5 .*ignore_index"),
        (VALUES, torch.zeros(4, 3), r"y has shape \(4, 3\), expected \(B, 2\)"),
        (VALUES, torch.zeros(4), r"y has shape \(4,\), expected \(B, 2\)"),
        (VALUES, torch.zeros(5, 2), "y has batch 5, but u has batch 4"),
        (VALUES, holding(float("nan"), (3, 1), (4, 2)), r"y\[3, 1\] is nan"),
        (VALUES, torch.zeros(4, 2).double(), "y has dtype torch.float64"),
    ],
)
def test_targets(spec: SampleSpec, y: Tensor, message: str) -> None:
    for checker in (equal(spec), free(spec)):
        with pytest.raises(StreamError, match=f"^sample 9: {message}"):
            checker.check(9, Sample(GOOD_U, y))
