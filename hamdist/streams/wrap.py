"""Foreign sources as streams: torch loaders, and any Python iterable.

B: batch, O: outputs. Every item is a batch, its first dimension the batch dimension: nothing here
adds one, since the first dimension of (3, 32) may be either. A source of single rows is batched
by a DataLoader, or by x[None].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec

_FORMS = "a Sample, (u, y), (u, None), u alone, or a dict of 'u' and, if known, 'y', 'end', 'time'"


def from_loader(
    loader: DataLoader[Any] | IterableDataset[Any],
    *,
    classes: int | None = None,
    outputs: int | None = None,
) -> IterableStream:
    """A stream of what a torch DataLoader, or an IterableDataset of batches, yields.

    Each item is a Sample, (u, y), u alone, or a dict (see `from_iterable`); u: (B, ...), y: (B,)
    classes or (B, O) values. The order and the seed are the loader's own. A loader without
    drop_last=True may end with a shorter batch, which not every level takes. The first item is
    fetched at once and yielded later; tensors are copied, except where a DataLoader has collated
    them into fresh batches already.

    Raises StreamError like `from_iterable`, and for an object that is neither.
    """
    if not isinstance(loader, (DataLoader, IterableDataset)):
        raise StreamError(
            f"from_loader got a {type(loader).__name__}: give a DataLoader (which also batches a "
            "map-style Dataset), an IterableDataset, or use from_iterable"
        )
    copied = not isinstance(loader, DataLoader) or loader.batch_size is None
    return IterableStream(loader, classes=classes, outputs=outputs, copied=copied)


def from_iterable(
    iterable: Iterable[Any], *, classes: int | None = None, outputs: int | None = None
) -> IterableStream:
    """A stream of what any Python iterable yields, finite or not.

    Each item is a Sample, (u, y), (u, None) where the target is missing, u alone, or a dict with
    'u' and, if it has them, 'y', 'end' (bool), 'time' (seconds). u: (B, ...), y: (B,) classes or
    (B, O) values; torch tensors or numpy arrays, copied, so that the source may use its buffers
    again. Items are batches: a batch dimension is never added.
    classes: number of classes; must be given for integer targets.
    outputs: O, for real-valued targets of which the first one is missing.

    The first item is fetched at once, to learn the shapes, and yielded later. An iterator can be
    asked for `samples()` once; an iterable that makes new iterators (a list, a class with
    __iter__) again and again. Errors of the source itself pass through.

    Raises StreamError for a source that yields nothing or something else (naming the item), for a
    first item that leaves the kind of target open, and for a second `samples()` of an iterator;
    SettingsError for `classes` together with `outputs`, or either below 1.
    """
    return IterableStream(iterable, classes=classes, outputs=outputs, copied=True)


class IterableStream:
    """Made by `from_loader` and `from_iterable`. Not portable: it stays in its process."""

    portable: bool = False

    def __init__(
        self,
        source: Iterable[Any],
        *,
        classes: int | None,
        outputs: int | None,
        copied: bool,
    ) -> None:
        if classes is not None and outputs is not None:
            raise SettingsError("give classes (integer targets) or outputs (values), not both")
        for name, value in (("classes", classes), ("outputs", outputs)):
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; at least 1 is needed")
        if not isinstance(source, Iterable):
            raise StreamError(f"a {type(source).__name__} cannot be iterated: give an iterable")
        self._source = source
        self._classes = classes
        self._copied = copied
        # The iterator that is peeked into is the one that the first `samples()` goes on with: a
        # loader that shuffles by a global generator draws from it once, as without hamdist.
        items = iter(source)
        self._again = items is not source
        nothing = object()
        first = next(items, nothing)
        if first is nothing:
            raise StreamError(f"the source ({type(source).__name__}) yields no item")
        self._spec = self._learn(self._sample(0, first), outputs)
        self._peeked: Iterator[Any] | None = chain([first], items)

    @property
    def spec(self) -> SampleSpec:
        """What the first item and the arguments say; other items are not compared with it here."""
        return self._spec

    def samples(self) -> Iterator[Sample]:
        """The items from item 0 on.

        Raises StreamError when an iterator is asked for the second time.
        """
        if self._peeked is not None:
            items, self._peeked = self._peeked, None
        elif self._again:
            items = iter(self._source)
        else:
            raise StreamError(
                f"this stream was made from an iterator ({type(self._source).__name__}), which "
                "can be read once and has been: make a new stream, or give an iterable that can "
                "be read again (a list, a DataLoader, a class with __iter__)"
            )
        return (self._sample(n, item) for n, item in enumerate(items))

    def _learn(self, first: Sample, outputs: int | None) -> SampleSpec:
        if first.u.dim() == 0:
            raise StreamError("item 0: u has no dimension: items are batches, (B, ...)")
        batch = first.u.shape[0]
        y_shape: tuple[int, ...] = (batch,)
        y_dtype = torch.int64
        if first.y is not None:
            y_shape, y_dtype = tuple(first.y.shape), first.y.dtype
            integers = not y_dtype.is_floating_point
            if integers and self._classes is None:
                raise StreamError(
                    f"item 0: y has dtype {y_dtype}, so targets are classes: say how many with "
                    "classes=, or convert real-valued targets to a floating-point dtype"
                )
            if not integers and self._classes is not None:
                raise StreamError(
                    f"item 0: y has dtype {y_dtype}, but classes={self._classes} says that "
                    "targets are classes: convert them with y.long(), or leave classes out"
                )
        elif outputs is not None:
            floats = first.u.is_floating_point()
            y_shape = (batch, outputs)
            y_dtype = first.u.dtype if floats else torch.get_default_dtype()
        elif self._classes is None:
            raise StreamError(
                "item 0 has no target, so what targets are is open: give classes= for integer "
                "targets, outputs= for real-valued ones"
            )
        return SampleSpec(tuple(first.u.shape), first.u.dtype, y_shape, y_dtype, self._classes)

    def _sample(self, n: int, item: Any) -> Sample:
        u, y, end, time = _fields(n, item)
        if not isinstance(end, (bool, np.bool_)):
            raise StreamError(f"item {n}: end is {end!r}; give True or False")
        number = isinstance(time, (int, float, np.number)) and not isinstance(time, bool)
        if time is not None and not number:
            raise StreamError(f"item {n}: time is {time!r}; give a number of seconds, or None")
        return Sample(
            self._tensor(n, "u", u),
            None if y is None else self._target(self._tensor(n, "y", y)),
            bool(end),
            None if time is None else float(time),
        )

    def _target(self, y: Tensor) -> Tensor:
        """Classes as int64, whatever integers the source counts in; the rest as it is."""
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        return y.to(torch.int64) if self._classes is not None and integers else y

    def _tensor(self, n: int, field: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            tensor = value.detach()
            return tensor.clone(memory_format=torch.contiguous_format) if self._copied else tensor
        if not isinstance(value, np.ndarray):
            raise StreamError(
                f"item {n}: {field} is a {type(value).__name__}; give a torch tensor or a numpy "
                "array, the batch in front"
            )
        try:  # a copy in the machine's byte order, which torch asks for
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise StreamError(
                f"item {n}: {field} is a numpy array of {value.dtype}, which torch has no dtype "
                "for: convert it with astype"
            ) from error


def _fields(n: int, item: Any) -> tuple[Any, Any, Any, Any]:
    """(u, y, end, time) of an item in any of the forms that are taken."""
    if isinstance(item, Sample):
        return item.u, item.y, item.end, item.time
    if isinstance(item, Mapping):
        strange = [str(key) for key in item if key not in ("u", "y", "end", "time")]
        if strange or "u" not in item:
            what = f"the unknown {', '.join(strange)}" if strange else "no 'u'"
            raise StreamError(f"item {n} is a dict with {what}; an item is {_FORMS}")
        return item["u"], item.get("y"), item.get("end", False), item.get("time")
    if isinstance(item, (Tensor, np.ndarray)):
        return item, None, False, None
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        return item[0], item[1] if len(item) == 2 else None, False, None
    length = f" of length {len(item)}" if isinstance(item, (tuple, list)) else ""
    raise StreamError(f"item {n} is a {type(item).__name__}{length}; an item is {_FORMS}")
