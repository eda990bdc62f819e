"""Streams made of others: without the targets of readouts, in another type, without a sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from hamdist.errors import StreamError
from hamdist.streams.replay import drops, passed_over, replays, samples_from
from hamdist.streams.sample import Sample, SampleSpec, Stream, Target, check_stream, report_of


def with_targets_of(stream: Stream, readouts: Collection[str]) -> Stream:
    """Return `stream` without the targets of other readouts.

    It is returned unchanged where it has no others, or where it lacks one of `readouts` (an error
    that later checks report).
    """
    specs = stream.spec.targets
    if specs is None or specs.keys() <= set(readouts) or not set(readouts) <= specs.keys():
        return stream
    return Chosen(stream, readouts)


class Derived(ABC):
    """Stream made of another one: portable where that is, and replaying where that does."""

    def __init__(self, stream: Stream) -> None:
        self.portable: bool = stream.portable
        self.replays = replays(stream)
        self._stream = stream

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream."""
        return self._stream.spec

    def report(self) -> dict[str, int]:
        """Return the counts of the wrapped stream."""
        return report_of(self._stream)

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on."""


class Chosen(Derived):
    """Stream in which the targets of other readouts than these are left out."""

    def __init__(self, stream: Stream, readouts: Collection[str]) -> None:
        super().__init__(stream)
        self.drops = drops(stream)
        self._readouts = frozenset(readouts)

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, without the targets of those readouts."""
        spec = self._stream.spec
        targets = {n: target for n, target in (spec.targets or {}).items() if n in self._readouts}
        some = SampleSpec.several(spec.u_shape, spec.u_dtype, targets)
        of_target = {n: getattr(some, n) for n in ("y_shape", "y_dtype", "classes", "targets")}
        return replace(spec, **of_target)

    def samples(self) -> Iterator[Sample]:
        return self.chosen(self._stream.samples())

    def passed(self) -> int:
        """Return the number of samples that the wrapped stream has dropped."""
        return passed_over(self._stream)

    def samples_behind(self, drawn: int, passed: int) -> Iterator[Sample]:
        """Return the samples of the wrapped stream behind `drawn` and `passed` ones."""
        return self.chosen(samples_from(self._stream, drawn, passed))

    def chosen(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Yield `samples` as this stream gives them."""
        for sample in samples:
            if isinstance(sample.y, Mapping):
                y = {n: target for n, target in sample.y.items() if n in self._readouts}
                yield replace(sample, y=y)
            else:
                yield sample


def in_dtype(stream: Stream, dtype: torch.dtype) -> Stream:
    """Return `stream` with its real-valued inputs and targets in `dtype`; itself where they are."""
    cast = Cast(stream, dtype)
    return stream if cast.spec == stream.spec else cast


class Cast(Chosen):
    """Stream whose real-valued inputs and targets have type `dtype`."""

    def __init__(self, stream: Stream, dtype: torch.dtype) -> None:
        super().__init__(stream, ())
        self._dtype = dtype

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, in this type."""
        old = self._stream.spec
        several = {n: replace(i, dtype=self._type(i.dtype)) for n, i in (old.inputs or {}).items()}
        targets = {n: replace(t, dtype=self._type(t.dtype)) for n, t in (old.targets or {}).items()}
        example = {name: self._cast(u) for name, u in (old.example or {}).items()}
        return replace(
            old,
            u_dtype=self._type(old.u_dtype),
            y_dtype=self._type(old.y_dtype),
            inputs=several or old.inputs,
            targets=targets or old.targets,
            example=example or old.example,
            example_y=self._target(old.example_y),
        )

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_complex:
            return self._dtype.to_complex()
        return self._dtype if dtype.is_floating_point else dtype

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._type(value.dtype))

    def _target(self, y: Target) -> Target:
        if isinstance(y, Mapping):
            return {name: None if t is None else self._cast(t) for name, t in y.items()}
        return None if y is None else self._cast(y)

    def chosen(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield replace(
                sample,
                u=self._cast(sample.u),
                y=self._target(sample.y),
                late=sample.late and {n: self._target(y) for n, y in sample.late.items()},
                inputs=sample.inputs and {n: self._cast(u) for n, u in sample.inputs.items()},
            )


class WithoutSample(Derived):
    """The first `number` samples of a stream (None: all), but for one."""

    def __init__(self, stream: Stream, sample: int, number: int | None) -> None:
        check_stream("WithoutSample", stream)
        if not replays(stream):
            raise StreamError(
                "--without-sample: the stream does not give the same samples again; give one that "
                "does (--stream)"
            )
        super().__init__(stream)
        self._sample, self._number = sample, number

    @property
    def unaltered(self) -> Stream:
        """Return the stream with that sample."""
        return self._stream

    def samples(self) -> Iterator[Sample]:
        """Yield the samples that are left, from the first one on."""
        for n, sample in enumerate(islice(self._stream.samples(), self._number)):
            if n != self._sample:
                yield sample
