"""Casts a stream to another floating-point type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hamdist.streams.sample import Sample, SampleSpec, Stream, Target
from hamdist.streams.wrappers.chosen_targets import Chosen


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
        own = self._stream.spec
        several = {n: replace(i, dtype=self._type(i.dtype)) for n, i in (own.inputs or {}).items()}
        targets = {n: replace(t, dtype=self._type(t.dtype)) for n, t in (own.targets or {}).items()}
        example = {name: self._cast(u) for name, u in (own.example or {}).items()}
        return replace(
            own,
            u_dtype=self._type(own.u_dtype),
            y_dtype=self._type(own.y_dtype),
            inputs=several or own.inputs,
            targets=targets or own.targets,
            example=example or own.example,
        )

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if dtype.is_floating_point else dtype

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._type(value.dtype))

    def _target(self, y: Target) -> Target:
        if isinstance(y, Mapping):
            return {name: None if t is None else self._cast(t) for name, t in y.items()}
        return None if y is None else self._cast(y)

    def chosen(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Yield `samples` as this stream gives them."""
        for sample in samples:
            yield replace(
                sample,
                u=self._cast(sample.u),
                y=self._target(sample.y),
                late=sample.late and {n: self._target(y) for n, y in sample.late.items()},
                inputs=sample.inputs and {n: self._cast(u) for n, u in sample.inputs.items()},
            )
