"""Targets by readout: what is learned of them, checked, and refused. Runs: test_in_a_run.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from hamdist.errors import SettingsError, StreamError
from hamdist.streams import Checker, Sample, SampleSpec, TargetSpec, from_iterable, from_loader

U = torch.zeros(3, 2)
DIGIT = torch.tensor([0, 4, 1])
ANGLE = torch.tensor([[0.5], [1.5], [2.5]])
SPEC = SampleSpec.several(
    (3, 2),
    torch.float32,
    {"digit": TargetSpec((3,), torch.int64, 5), "angle": TargetSpec((3, 1), torch.float32)},
)


def test_target_of_a_readout() -> None:
    one = Sample(U, DIGIT)
    assert one.target("digit") is DIGIT
    assert one.target("anything") is DIGIT
    assert Sample(U).target("digit") is None
    both = Sample(U, {"digit": DIGIT, "angle": None})
    assert both.target("digit") is DIGIT
    assert both.target("angle") is None
    assert both.target("left out") is None


def test_spec_of_a_readout() -> None:
    single = SampleSpec((3, 2), torch.float32, (3,), torch.int64, 5)
    assert single.target("any") == TargetSpec((3,), torch.int64, 5)
    assert SPEC.target("angle") == TargetSpec((3, 1), torch.float32)
    assert SPEC.target("other") is None


class TestIterable:
    @pytest.mark.parametrize(
        ("y", "sizes"),
        [
            ({"digit": DIGIT, "angle": ANGLE}, {"classes": {"digit": 5}}),
            ({"digit": DIGIT.numpy().astype(np.int16), "angle": ANGLE.numpy()}, {"classes": 5}),
            ({"digit": DIGIT}, {"classes": {"digit": 5}, "outputs": {"angle": 1}}),
            (
                {"digit": None, "angle": None},
                {"classes": {"digit": 5}, "outputs": {"angle": 1}},
            ),
            (None, {"classes": {"digit": 5}, "outputs": {"angle": 1}}),
        ],
    )
    def test_learned(self, y: Any, sizes: Mapping[str, Any]) -> None:
        if sizes == {"classes": 5}:
            y = {"digit": y["digit"]}
        items: list[Any] = [(U, y), Sample(U, {"angle": ANGLE, "digit": DIGIT})]
        stream = from_iterable(items, **sizes)
        expected = dict(SPEC.targets or {})
        if sizes == {"classes": 5}:
            del expected["angle"]
        assert stream.spec.targets == expected
        first, second = stream.samples()
        for name, value in (y or {}).items():
            if value is None:
                assert first.target(name) is None
            else:
                assert torch.equal(first.target(name), torch.as_tensor(value))
                assert first.target(name).dtype == expected[name].dtype
        assert torch.equal(second.target("digit"), DIGIT)
        assert torch.equal(second.target("angle"), ANGLE)

    def test_targets_are_copied(self) -> None:
        buffer = ANGLE.clone()
        (sample,) = from_iterable([(U, {"angle": buffer})]).samples()
        buffer.zero_()
        assert torch.equal(sample.target("angle"), ANGLE)

    def test_a_loader_that_collates_dicts(self) -> None:
        rows = [(U[i], {"digit": DIGIT[i], "angle": ANGLE[i]}) for i in range(3)]
        loader = torch.utils.data.DataLoader(rows, batch_size=3)
        stream = from_loader(loader, classes={"digit": 5})
        assert stream.spec == SPEC
        (sample,) = stream.samples()
        assert torch.equal(sample.target("digit"), DIGIT)

    @pytest.mark.parametrize(
        ("y", "sizes", "words"),
        [
            ({"digit": DIGIT > 1}, {}, r"y\['digit'\] has dtype torch.bool: convert .* y.long"),
            ({"angle": ANGLE}, {"classes": {"angle": 2}}, r"y\['angle'\] has dtype torch.float32"),
            ({"digit": None}, {}, r"no target as y\['digit'\]"),
            (DIGIT, {"classes": {"digit": 5}}, "give y as a dict"),
            ({}, {}, "y is an empty dict"),
        ],
    )
    def test_open(self, y: Any, sizes: Mapping[str, Any], words: str) -> None:
        with pytest.raises(StreamError, match=words):
            from_iterable([(U, y)], **sizes)

    @pytest.mark.parametrize(
        ("sizes", "words"),
        [
            ({"classes": {"a": 0}}, r"classes\['a'\] is 0"),
            ({"outputs": {"a": -1}}, r"outputs\['a'\] is -1"),
            ({"classes": {"a": 2}, "outputs": {"a": 2}}, "'a' is in classes"),
            ({"classes": {"a": 2}, "outputs": 2}, "not both"),
        ],
    )
    def test_sizes_that_contradict(self, sizes: Mapping[str, Any], words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            from_iterable([(U, None)], **sizes)


class TestChecker:
    def test_passes_unchanged(self) -> None:
        for y in ({"digit": DIGIT.clone(), "angle": ANGLE.clone()}, {"digit": None}, {}, None):
            sample = Sample(U.clone(), y)
            assert Checker(SPEC, equal_batches=True).check(0, sample) is sample

    def test_copies_where_it_must(self) -> None:
        wide = torch.arange(6.0).reshape(3, 2)
        angle = wide[:, :1]
        sample = Sample(U.clone(), {"angle": angle, "digit": None})
        checked = Checker(SPEC, equal_batches=True).check(0, sample)
        assert checked.target("angle").is_contiguous()
        assert torch.equal(checked.target("angle"), angle)
        assert checked.target("digit") is None

    @pytest.mark.parametrize(
        ("y", "words"),
        [
            (DIGIT, "y is one target, but .* give a dict of 'digit', 'angle'"),
            ({"weight": ANGLE}, "y has a target for 'weight', but .* 'digit', 'angle'"),
            ({"digit": torch.tensor([0, 5, 1])}, r"y\['digit'\]\[1\] is 5"),
            ({"digit": DIGIT[:2]}, r"y\['digit'\] has batch 2"),
            ({"angle": ANGLE.double()}, r"y\['angle'\] has dtype torch.float64"),
            ({"angle": ANGLE.expand(3, 2)}, r"y\['angle'\] has shape \(3, 2\), expected \(B, 1\)"),
            ({"angle": ANGLE / 0}, r"y\['angle'\]\[0, 0\] is inf"),
        ],
    )
    def test_refused(self, y: Any, words: str) -> None:
        with pytest.raises(StreamError, match=f"sample 7: {words}"):
            Checker(SPEC, equal_batches=False).check(7, Sample(U, y))

    def test_a_dict_where_there_is_one_target(self) -> None:
        single = SampleSpec((3, 2), torch.float32, (3,), torch.int64, 5)
        with pytest.raises(StreamError, match="sample 2: y is a dict"):
            Checker(single, equal_batches=False).check(2, Sample(U, {"digit": DIGIT}))


class TestTimeStamps:
    def check(self, times: list[float | None], *, stamped: bool = True) -> None:
        check = Checker(SPEC, equal_batches=True, stamped=stamped)
        for n, time in enumerate(times):
            check.check(n, Sample(U, time=time))

    def test_increasing(self) -> None:
        self.check([-1.0, 0.0, 0.25, 1e9])

    def test_of_no_use(self) -> None:
        self.check([3.0, None, 1.0, 1.0], stamped=False)

    @pytest.mark.parametrize(
        ("times", "words"),
        [
            ([0.0, None], "sample 1 has no time stamp"),
            ([0.0, 1.0, 1.0], "sample 2 has time stamp 1 s, the one before 1 s"),
            ([0.0, 2.0, 1.0], "sample 2 has time stamp 1 s, the one before 2 s"),
            ([0.0, float("nan")], "sample 1 has time stamp nan"),
            ([float("inf")], "sample 0 has time stamp inf"),
        ],
    )
    def test_refused(self, times: list[float | None], words: str) -> None:
        with pytest.raises(StreamError, match=words):
            self.check(times)
