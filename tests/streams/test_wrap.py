"""Foreign sources: every form of sample, what may be asked twice, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from hamdist.errors import SettingsError, StreamError
from hamdist.streams import IterableStream, Sample, Stream, from_iterable, from_loader

U = torch.arange(6.0).reshape(3, 2)
Y = torch.tensor([0, 2, 1])


def only(stream: IterableStream) -> Sample:
    (sample,) = stream.samples()
    return sample


class TestForms:
    @pytest.mark.parametrize(
        "item",
        [
            Sample(U, Y),
            (U, Y),
            [U, Y],
            {"u": U, "y": Y},
            (U.numpy(), Y.numpy()),
            {"u": U.numpy(), "y": Y},
            (U, Y.to(torch.uint8)),
            (U, Y.numpy().astype(np.int32)),
            (U.numpy().astype(">f4"), Y.numpy().astype(">i2")),
            (np.asfortranarray(U.numpy()), Y.numpy()[::-1][::-1]),
        ],
    )
    def test_with_target(self, item: Any) -> None:
        stream = from_iterable([item], classes=3)
        sample = only(stream)
        assert sample.y is not None
        assert torch.equal(sample.u, U)
        assert torch.equal(sample.y, Y)
        assert (sample.u.dtype, sample.y.dtype) == (torch.float32, torch.int64)
        assert (sample.end, sample.time) == (False, None)
        spec = stream.spec
        assert (spec.u_shape, spec.u_dtype) == ((3, 2), torch.float32)
        assert (spec.y_shape, spec.y_dtype, spec.classes) == ((3,), torch.int64, 3)

    @pytest.mark.parametrize("item", [Sample(U), (U, None), (U,), U, U.numpy(), {"u": U}])
    def test_without_target(self, item: Any) -> None:
        stream = from_iterable([item], classes=3)
        sample = only(stream)
        assert torch.equal(sample.u, U)
        assert sample.y is None
        assert (stream.spec.y_shape, stream.spec.y_dtype) == ((3,), torch.int64)

    def test_outputs_say_what_a_missing_target_would_be(self) -> None:
        spec = from_iterable([U.double()], outputs=4).spec
        assert (spec.y_shape, spec.y_dtype, spec.classes) == ((3, 4), torch.float64, None)
        spec = from_iterable([U.long()], outputs=4).spec
        assert (spec.y_shape, spec.y_dtype) == ((3, 4), torch.float32)

    def test_real_targets(self) -> None:
        spec = from_iterable([(U, torch.zeros(3, 5))]).spec
        assert (spec.y_shape, spec.y_dtype, spec.classes) == ((3, 5), torch.float32, None)

    @pytest.mark.parametrize("time", [2, 2.0, np.float32(2.0), np.int64(2)])
    @pytest.mark.parametrize("end", [True, np.True_])
    def test_end_and_time(self, end: Any, time: Any) -> None:
        sample = only(from_iterable([{"u": U, "y": Y, "end": end, "time": time}], classes=3))
        assert sample.end is True
        assert sample.time == 2.0
        assert type(sample.time) is float

    def test_nothing_is_added_in_front(self) -> None:
        stream = from_iterable([(U[0], Y[:2])], classes=3)
        assert stream.spec.u_shape == (2,)

    def test_the_source_may_use_its_buffers_again(self) -> None:
        def reusing() -> Iterator[Any]:
            array, tensor = np.zeros((1, 2), np.float32), torch.zeros(1, 1)
            for n in range(3):
                array.fill(n)
                yield array, tensor.fill_(n)

        samples = list(from_iterable(reusing()).samples())
        assert [sample.u.tolist() for sample in samples] == [[[n, n]] for n in range(3)]
        assert [float(sample.y) for sample in samples if sample.y is not None] == [0, 1, 2]

    def test_gradients_are_cut(self) -> None:
        sample = only(from_iterable([(U.clone().requires_grad_(), Y)], classes=3))
        assert not sample.u.requires_grad


class TestAskedAgain:
    def test_an_iterator_once(self) -> None:
        stream = from_iterable(iter([(U, Y), (U + 1, Y)]), classes=3)
        assert len(list(stream.samples())) == 2
        with pytest.raises(StreamError, match=r"made from an iterator \(list_iterator\)"):
            stream.samples()

    def test_a_generator_once_even_if_not_read_to_its_end(self) -> None:
        stream = from_iterable(((U + n, Y) for n in range(3)), classes=3)
        assert torch.equal(next(iter(stream.samples())).u, U)
        with pytest.raises(StreamError, match="generator"):
            stream.samples()

    def test_epochs(self) -> None:
        def first(n: int, epochs: int | None, source: Any) -> list[float]:
            stream = from_iterable(source, classes=3, epochs=epochs)
            samples = stream.samples()
            return [sample.u[0, 0].item() for sample, _ in zip(samples, range(n), strict=False)]

        items = [(U + n, Y) for n in range(3)]
        assert first(9, 1, items) == [0, 1, 2]
        assert first(9, 2, items) == [0, 1, 2, 0, 1, 2]
        assert first(8, None, items) == [0, 1, 2, 0, 1, 2, 0, 1]
        stream = from_iterable(items, classes=3, epochs=2)
        assert [len(list(stream.samples())) for _ in range(2)] == [6, 6]

    def test_epochs_of_a_loader_have_its_orders(self) -> None:
        def order(loader: DataLoader[Any], passes: int) -> list[float]:
            return [float(u[0, 0]) for _ in range(passes) for u, _ in loader]

        def loader() -> DataLoader[Any]:
            data = TensorDataset(torch.arange(12.0).reshape(6, 2), torch.arange(6) % 3)
            shuffled = torch.Generator().manual_seed(3)
            return DataLoader(data, batch_size=2, shuffle=True, generator=shuffled)

        drawn = [float(s.u[0, 0]) for s in from_loader(loader(), classes=3, epochs=3).samples()]
        assert drawn == order(loader(), 3)

    @pytest.mark.parametrize("epochs", [2, None])
    def test_epochs_of_an_iterator(self, epochs: int | None) -> None:
        with pytest.raises(StreamError, match=r"an iterator \(list_iterator\) can be read once"):
            from_iterable(iter([(U, Y)]), classes=3, epochs=epochs)

    def test_epochs_that_are_none(self) -> None:
        with pytest.raises(SettingsError, match="epochs is 0; at least 1"):
            from_iterable([(U, Y)], classes=3, epochs=0)
        with pytest.raises(StreamError, match=r"\(list\) yields no sample"):
            from_iterable([], classes=3, epochs=None)

    def test_an_iterable_again_and_again(self) -> None:
        stream = from_iterable([(U + n, Y) for n in range(3)], classes=3)
        for _ in range(3):
            assert [sample.u[0, 0].item() for sample in stream.samples()] == [0, 1, 2]

    def test_the_first_item_is_fetched_once_and_not_lost(self) -> None:
        fetched = []

        class Counting:
            def __iter__(self) -> Iterator[Any]:
                for n in range(3):
                    fetched.append(n)
                    yield U + n, Y

        stream = from_iterable(Counting(), classes=3)
        assert fetched == [0]
        assert [sample.u[0, 0].item() for sample in stream.samples()] == [0, 1, 2]
        assert fetched == [0, 1, 2]

    def test_stays_in_its_process(self) -> None:
        stream = from_iterable([(U, Y)], classes=3)
        assert isinstance(stream, Stream)
        assert not stream.portable


class Batches(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for n in range(3):
            yield U + n, Y


class TestLoader:
    def test_batches_of_a_loader(self) -> None:
        data = TensorDataset(torch.arange(10.0).reshape(5, 2), torch.arange(5))
        stream = from_loader(DataLoader(data, batch_size=2), classes=5)
        assert stream.spec.u_shape == (2, 2)
        for _ in range(2):
            drawn = [sample.y.tolist() for sample in stream.samples() if sample.y is not None]
            assert drawn == [[0, 1], [2, 3], [4]]

    def test_same_order_as_the_loader_without_hamdist(self) -> None:
        def loader() -> DataLoader[Any]:
            data = TensorDataset(torch.arange(50.0).unsqueeze(1), torch.arange(50))
            generator = torch.Generator().manual_seed(3)
            return DataLoader(data, batch_size=4, shuffle=True, generator=generator)

        plain, wrapped = loader(), from_loader(loader(), classes=50)
        for _ in range(2):  # two epochs: the generator goes on between them
            expected = [y.tolist() for _, y in plain]
            assert [s.y.tolist() for s in wrapped.samples() if s.y is not None] == expected

    def test_a_buffer_that_collate_fn_fills_again(self) -> None:
        buffer = torch.empty(2, 3)

        def collate(rows: list[Any]) -> Any:
            torch.stack([u for u, _ in rows], out=buffer)
            return buffer, torch.stack([y for _, y in rows])

        data = TensorDataset(torch.arange(12.0).view(4, 3), torch.zeros(4, dtype=torch.long))
        stream = from_loader(DataLoader(data, 2, collate_fn=collate), classes=2)
        first, second = [sample.u for sample in stream.samples()]
        assert torch.equal(torch.cat([first, second]), data.tensors[0])

    def test_which_loaders_give_the_same_again(self) -> None:
        data = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
        shuffled = BatchSampler(RandomSampler(data), 2, drop_last=False)
        loaders = [DataLoader(data, 2), DataLoader(data, batch_sampler=shuffled)]
        assert not any(from_loader(loader, classes=2).replays for loader in loaders)
        assert from_loader(DataLoader(Batches(), batch_size=None), classes=2).replays

    def test_inputs_alone(self) -> None:
        loader = DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2)
        assert [sample.y for sample in from_loader(loader, classes=2).samples()] == [None, None]
        bare: Any = DataLoader([torch.zeros(2)] * 4, batch_size=2)
        assert from_loader(bare, outputs=1).spec.u_shape == (2, 2)

    def test_iterable_dataset(self) -> None:
        stream = from_loader(Batches(), classes=3)
        for _ in range(2):
            assert [sample.u[0, 0].item() for sample in stream.samples()] == [0, 1, 2]
        batched = from_loader(DataLoader(Batches(), batch_size=None), classes=3)
        assert [sample.u[0, 0].item() for sample in batched.samples()] == [0, 1, 2]

    def test_samples(self) -> None:
        loader: Any = DataLoader([Sample(U, Y, True)], batch_size=None)
        assert only(from_loader(loader, classes=3)).end

    def test_something_else(self) -> None:
        with pytest.raises(StreamError, match=r"got a list: give a DataLoader.*from_iterable"):
            from_loader([(U, Y)])
        with pytest.raises(StreamError, match=r"TensorDataset: give a DataLoader"):
            from_loader(TensorDataset(U))


class TestErrors:
    def test_empty(self) -> None:
        with pytest.raises(StreamError, match=r"the source \(list\) yields no sample"):
            from_iterable([])

    def test_not_iterable(self) -> None:
        with pytest.raises(StreamError, match="a int cannot be iterated"):
            from_iterable(3)
        with pytest.raises(StreamError, match="a TensorDataset .*: give a DataLoader of it"):
            from_iterable(TensorDataset(U, Y))

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (3, "is a int; a sample is a Sample"),
            ((U, Y, Y), "is a tuple of length 3; a sample is.*names={0: .*2: .weight.}"),
            ((), "is a tuple of length 0"),
            ({"x": U, "u": U}, "is a dict with the unknown x; a sample is"),
            ({"y": Y}, "is a dict of 'y'; which of them are inputs is open: say it with names="),
            (([1.0], Y), ": u is a list; give a torch tensor or a numpy array"),
            ((None, Y), ": u is a NoneType"),
            ({"x": [1.0], "label": [0]}, ": u is a list"),
            ((U.to_sparse(), Y), ": u has another kind of tensor .*sparse_coo.*to_dense"),
            (
                (torch.nested.as_nested_tensor([U, U], layout=torch.jagged), Y),
                ": u has another kind .*jagged",
            ),
            ((U.to("meta"), Y), ": u has no values, on the meta device"),
            ((np.ma.masked_less(np.zeros(3), 1), Y), ": u has masked values: .*filled"),
            ((U, [0, 1, 2]), ": y is a list"),
            ((np.array(["a"]), Y), ": u is a numpy array of <U1, which torch has no dtype for"),
            ({"u": U, "end": 1}, ": end is 1; give True or False"),
            ({"u": U, "time": "now"}, ": time is 'now'; give a number of seconds"),
            ({"u": U, "time": True}, ": time is True"),
        ],
    )
    def test_items(self, item: Any, message: str) -> None:
        with pytest.raises(StreamError, match=f"^sample 0 ?{message}"):
            from_iterable([item], classes=3)
        stream = from_iterable([(U, Y), (U, Y), item], classes=3)
        with pytest.raises(StreamError, match=f"^sample 2 ?{message}"):
            list(stream.samples())

    @pytest.mark.parametrize(
        ("item", "classes", "message"),
        [
            ((U, Y > 1), None, "y has dtype torch.bool: convert targets that are classes with"),
            ((U, Y.float()), 3, "y has dtype torch.float32, but classes=3"),
            (U, None, "sample 0 has no target.* give classes=.* outputs="),
            (torch.tensor(1.0), 3, r"u has no dimension: samples are batches"),
        ],
    )
    def test_first_item(self, item: Any, classes: int | None, message: str) -> None:
        with pytest.raises(StreamError, match=message):
            from_iterable([item], classes=classes)

    @pytest.mark.parametrize(
        "whole",
        [(U, Y), [U, Y], (U.numpy(), Y.numpy()), (U, U), {"x": U, "label": Y}, U, Y.numpy()],
    )
    def test_a_whole_data_set_is_no_stream(self, whole: Any) -> None:
        with pytest.raises(
            StreamError, match=r"is a whole data set, .*batch_size=32.*\[\(x, y\)\]"
        ):
            from_iterable(whole, classes=3)

    @pytest.mark.parametrize("batches", [[U, U], [U, U, U], [U], torch.stack([U, U]), [(U, Y)]])
    def test_batches_are_no_whole_data_set(self, batches: Any) -> None:
        stream = from_iterable(batches, classes=3)
        assert all(torch.equal(sample.u, U) for sample in stream.samples())

    def test_arguments(self) -> None:
        with pytest.raises(SettingsError, match="not both"):
            from_iterable([U], classes=2, outputs=2)
        with pytest.raises(SettingsError, match="classes is 0"):
            from_iterable([U], classes=0)
        with pytest.raises(SettingsError, match="outputs is 0"):
            from_iterable([U], outputs=0)

    def test_errors_of_the_source_pass_through(self) -> None:
        def failing() -> Iterator[Any]:
            yield U, Y
            raise OSError("sensor unplugged")

        stream = from_iterable(failing(), classes=3)
        with pytest.raises(OSError, match="sensor unplugged"):
            list(stream.samples())
