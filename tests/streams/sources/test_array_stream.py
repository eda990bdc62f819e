"""ArrayStream against its definition: one long sequence of permutations, cut into batches."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamdist.errors import SettingsError, StreamError
from hamdist.streams import ArrayStream, Stream


def rows(stream: ArrayStream, items: int | None = None) -> list[list[int]]:
    """The row numbers of each sample; the tensors of these tests hold their own row numbers."""
    result = []
    for sample in islice(stream.samples(), items):
        assert sample.y is not None
        assert torch.equal(sample.u[:, 0].long(), sample.y)
        result.append(sample.y.tolist())
    return result


def numbered(n: int, batch: int, seed: int = 0, **options: bool) -> ArrayStream:
    x = torch.arange(n, dtype=torch.float32).unsqueeze(1).expand(n, 2)
    return ArrayStream(x, torch.arange(n), batch, seed, **options)


class TestOrder:
    def test_unshuffled_batches_run_on_across_the_epoch(self) -> None:
        expected = [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]
        assert rows(numbered(5, 2, shuffled=False), 6) == expected

    def test_uneven_ends_each_epoch_short(self) -> None:
        expected = [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]
        assert rows(numbered(5, 2, shuffled=False, uneven=True), 6) == expected

    def test_one_epoch_ends_short(self) -> None:
        assert rows(numbered(5, 2, shuffled=False, endless=False)) == [[0, 1], [2, 3], [4]]

    def test_batch_longer_than_an_epoch(self) -> None:
        expected = [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]
        assert rows(numbered(3, 5, shuffled=False), 2) == expected
        assert rows(numbered(3, 5, shuffled=False, endless=False)) == [[0, 1, 2]]
        assert rows(numbered(3, 5, shuffled=False, uneven=True), 2) == [[0, 1, 2]] * 2

    @settings(max_examples=40, deadline=None)
    @given(n=st.integers(1, 20), batch=st.integers(1, 25), seed=st.integers(0, 2**31))
    def test_each_epoch_is_a_permutation(self, n: int, batch: int, seed: int) -> None:
        items = -(-4 * n // batch)
        drawn = rows(numbered(n, batch, seed), items)
        assert all(len(item) == batch for item in drawn)
        sequence = [row for item in drawn for row in item]
        epochs = [sequence[start : start + n] for start in range(0, 4 * n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)

    def test_the_sequence_does_not_depend_on_the_batch(self) -> None:
        one = [row for item in rows(numbered(11, 1, 3), 44) for row in item]
        four = [row for item in rows(numbered(11, 4, 3), 11) for row in item]
        uneven = [row for item in rows(numbered(11, 4, 3, uneven=True), 12) for row in item]
        assert one == four == uneven

    def test_seed_and_epoch_both_count(self) -> None:
        # (seed 0, epoch 1) must not be (seed 1, epoch 0)
        orders = [tuple(item) for seed in range(3) for item in rows(numbered(50, 50, seed), 3)]
        assert len(set(orders)) == 9

    def test_asked_twice_gives_the_same(self) -> None:
        stream = numbered(9, 4, 7)
        assert rows(stream, 10) == rows(stream, 10) == rows(numbered(9, 4, 7), 10)

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.random.get_rng_state()
        rows(numbered(9, 4, 7), 10)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_every_row_comes_first_equally_often(self) -> None:
        firsts = torch.tensor([rows(numbered(4, 1, seed), 1)[0][0] for seed in range(800)])
        # 200 each expected, standard deviation 12
        assert (torch.bincount(firsts, minlength=4) - 200).abs().max() < 60


class TestItems:
    def test_spec(self) -> None:
        spec = ArrayStream(torch.zeros(9, 3, 2), torch.zeros(9, 4), 5, 0).spec
        assert (spec.u_shape, spec.u_dtype) == ((5, 3, 2), torch.float32)
        assert (spec.y_shape, spec.y_dtype, spec.classes) == ((5, 4), torch.float32, None)
        assert spec.batch == 5

    def test_spec_of_a_short_epoch(self) -> None:
        assert numbered(3, 5).spec.batch == 5
        assert numbered(3, 5, endless=False).spec.batch == 3
        assert numbered(3, 5, uneven=True).spec.batch == 3

    def test_classes(self) -> None:
        y = torch.tensor([0, 2, 1], dtype=torch.uint8)
        inferred = ArrayStream(torch.zeros(3, 1), y, 1, 0)
        assert (inferred.spec.classes, inferred.spec.y_dtype) == (3, torch.int64)
        assert ArrayStream(torch.zeros(3, 1), y, 1, 0, classes=5).spec.classes == 5

    def test_items_are_fresh_and_contiguous(self) -> None:
        x = torch.arange(12.0).reshape(3, 4).T  # not contiguous
        stream = ArrayStream(x, torch.arange(4), 4, 0, shuffled=False)
        sample = next(iter(stream.samples()))
        assert sample.u.is_contiguous()
        sample.u.fill_(-1.0)
        assert torch.equal(next(iter(stream.samples())).u, x)

    def test_is_a_portable_stream(self) -> None:
        stream = numbered(3, 1)
        assert isinstance(stream, Stream)
        assert stream.portable


class TestErrors:
    def test_batch(self) -> None:
        with pytest.raises(SettingsError, match="batch is 0"):
            numbered(3, 0)

    def test_no_tensor(self) -> None:
        with pytest.raises(StreamError, match=r"x is list; .*from_numpy"):
            ArrayStream([1.0], torch.zeros(1), 1, 0)
        with pytest.raises(StreamError, match="y is a tensor without dimensions"):
            ArrayStream(torch.zeros(1), torch.tensor(0), 1, 0)

    def test_lengths(self) -> None:
        with pytest.raises(StreamError, match="x has 3 rows and y has 2"):
            ArrayStream(torch.zeros(3, 1), torch.zeros(2, 1), 1, 0)

    def test_empty(self) -> None:
        with pytest.raises(StreamError, match="no rows"):
            ArrayStream(torch.zeros(0, 1), torch.zeros(0, 1), 1, 0)

    def test_classes_of_real_targets(self) -> None:
        with pytest.raises(SettingsError, match=r"classes=2 .*torch.float32"):
            ArrayStream(torch.zeros(3, 1), torch.zeros(3, 1), 1, 0, classes=2)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.zeros(2), r"shape \(2,\): real-valued targets are \(N, O\)"),
            (torch.zeros(2, 1, dtype=torch.int64), r"shape \(2, 1\): integer targets are classes"),
            (torch.zeros(2, dtype=torch.bool), "dtype torch.bool"),
            (torch.zeros(2, 1, dtype=torch.complex64), "dtype torch.complex64"),
            (torch.tensor([0, 4]), r"y\[1\] is 4; with 4 classes targets are 0 to 3"),
            (torch.tensor([-1, 0]), r"y\[0\] is -1; "),
        ],
    )
    def test_targets(self, y: torch.Tensor, message: str) -> None:
        classes = None if y.is_floating_point() else 4
        with pytest.raises(StreamError, match=message):
            ArrayStream(torch.zeros(2, 1), y, 1, 0, classes=classes)
