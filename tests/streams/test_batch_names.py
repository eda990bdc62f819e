"""Batches by key: which key is an input, which a target; and epochs told to those who shuffle."""

from __future__ import annotations

from collections import UserDict, namedtuple
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from hamdist.config import StreamSettings
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import from_iterable, from_loader, make_stream
from hamdist.streams.replay import samples_from

A, B = torch.arange(6.0).view(3, 2), torch.ones(3, 4)
Y = torch.tensor([0, 2, 1], dtype=torch.int32)


def parts(item, **given):
    """What is made of one item: its inputs by name, and its target."""
    (sample,) = from_iterable([item], **given).samples()
    return sample.inputs if sample.inputs is not None else sample.u, sample.y


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("key", ["label", "labels", "target", "targets", "y"])
def test_one_input_needs_no_name(kind, key):
    u, y = parts(kind({"image": A, key: Y}))
    assert torch.equal(u, A)
    assert y.dtype == torch.int64
    assert torch.equal(y, Y.long())


@pytest.mark.parametrize("arguments", [None, ["ids", "mask", "cache"]])
def test_several_inputs_are_arguments(arguments):
    u, y = parts({"ids": A, "mask": B, "labels": Y}, arguments=arguments)
    assert list(u) == ["ids", "mask"]
    assert torch.equal(u["mask"], B)
    assert torch.equal(y, Y.long())


def test_a_single_key_that_is_a_later_argument_is_that_one():
    u, _ = parts({"embeds": A, "labels": Y}, arguments=["ids", "embeds"])
    assert list(u) == ["embeds"]


@pytest.mark.parametrize(
    ("item", "names", "inputs", "target"),
    [
        ({"a": A, "b": B, "label": Y}, {"a": "u", "label": "y"}, A, Y),
        ({"a": A, "b": B, "label": Y}, {"b": "x", "a": "y"}, {"x": B}, A),
        ({"a": A, "b": B}, {"a": "u.y", "b": "y"}, {"y": A}, B),
        ({"a": A, "k": Y, "v": B}, {"a": "u", "k": "y.kind", "v": "y.v"}, A, {"kind": Y, "v": B}),
        ((A, Y, "first task"), {0: "u", 1: "y"}, A, Y),
        ([A, Y, B], {0: "x", 1: "y", 2: "task"}, {"x": A, "task": B}, Y),
    ],
)
def test_names(item, names, inputs, target):
    u, y = parts(item, names=names)
    for got, wanted in ((u, inputs), (y, target)):
        got, wanted = (one if isinstance(one, dict) else {"": one} for one in (got, wanted))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], wanted[k].to(got[k].dtype)) for k in wanted)


@pytest.mark.parametrize(
    ("item", "given", "words"),
    [
        ({"a": A, "id": B, "label": Y}, {"arguments": ["x"]}, r"names={'a': 'a'.*model \(x\)"),
        ({"a": A, "text": ["x"], "label": Y}, {}, r"'a', 'text', 'label'; which of them"),
        ({"a": A, "label": Y, "target": Y}, {}, "is open"),
        (
            {"a": A},
            {"names": {"b": "u"}},
            "sample 0 has no 'b', which names= speaks of; it has 'a'",
        ),
        ({"a": A, "b": B}, {"names": {"a": "u", "b": "x"}}, "name one input 'u', or every input"),
        ({"a": A, "b": B}, {"names": {"a": "x", "b": "x"}}, "name one input"),
        ({"a": A, "b": Y, "c": Y}, {"names": {"a": "u", "b": "y", "c": "y.d"}}, "one target 'y'"),
        ({"a": A}, {"names": {"a": "y"}}, "name one input"),
    ],
)
def test_unclear(item, given, words):
    with pytest.raises(StreamError, match=words):
        from_iterable([item], **given)


def test_names_of_a_source_without_keys():
    with pytest.raises(SettingsError, match=r"stream.names: source 'digits' has no keys"):
        make_stream(StreamSettings(names={"a": "u"}), seed=0, dtype=torch.float32)


class ByEpoch(Sampler[int]):
    """An order for each epoch, as DistributedSampler has it."""

    def __init__(self, many=6):
        self.many, self.told = many, []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        draw = torch.Generator().manual_seed(self.told[-1])
        return iter(torch.randperm(self.many, generator=draw).tolist())

    def __len__(self):
        return self.many


class Pairs(ByEpoch):
    """The same as a batch sampler."""

    def __iter__(self):
        order = list(super().__iter__())
        return iter([order[i : i + 2] for i in range(0, self.many, 2)])

    def __len__(self):
        return self.many // 2


class Rows(Dataset):
    def __init__(self):
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.tensor([float(i)]), torch.tensor(i % 2)


class Batches(IterableDataset):
    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(self.epoch))
        return iter([(rows[:, None].float(), rows % 2) for rows in order.split(2)])


TABLE = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6) % 2)
LOADERS = {
    "sampler": lambda: DataLoader(TABLE, batch_size=2, sampler=ByEpoch()),
    "batch sampler": lambda: DataLoader(TABLE, batch_sampler=Pairs()),
    "iterable": Batches,
    "iterable in a loader": lambda: DataLoader(Batches(), batch_size=None),
}


def orders(samples):
    """The rows of each epoch."""
    values = [int(v) for sample in samples for v in sample.u.flatten()]
    return [values[i : i + 6] for i in range(0, len(values), 6)]


@pytest.mark.parametrize("kind", LOADERS)
def test_epochs_are_told(kind):
    wanted = [
        torch.randperm(6, generator=torch.Generator().manual_seed(epoch)).tolist()
        for epoch in range(3)
    ]
    stream = from_loader(LOADERS[kind](), classes=2, epochs=3)
    assert orders(stream.samples()) == wanted
    assert orders(stream.samples()) == wanted, "asked again it begins with epoch 0"
    endless = from_loader(LOADERS[kind](), classes=2, epochs=None)
    assert orders(islice(endless.samples(), 9)) == wanted
    behind = samples_from(from_loader(LOADERS[kind](), classes=2, epochs=3), 3, 0)
    assert orders(behind) == wanted[1:], "gone on with in the second epoch"


def test_a_data_set_is_told_once_an_epoch():
    rows = Rows()
    loader = DataLoader(rows, batch_size=2, sampler=ByEpoch())
    list(from_loader(loader, classes=2, epochs=2).samples())
    assert rows.told == loader.sampler.told == [0, 1]  # type: ignore[attr-defined]


def test_a_namedtuple_has_names():
    Batch = namedtuple("Batch", "label image")
    y, u = torch.tensor([0, 1]), torch.ones(2, 3)
    for names in (None, {"image": "u", "label": "y"}, {1: "u", 0: "y"}):
        (sample,) = from_iterable([Batch(y, u)], classes=2, names=names).samples()
        assert torch.equal(sample.u, u)
        assert torch.equal(sample.y, y)
    Pair = namedtuple("Pair", "features count")  # (no name of a target: by place)
    (sample,) = from_iterable([Pair(u, y)], classes=2).samples()
    assert torch.equal(sample.u, u)
