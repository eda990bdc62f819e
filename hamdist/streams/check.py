"""The gate between a stream and a network: unusable samples stop the run, and say why.

B: batch, O: outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hamdist.config import IGNORE_INDEX
from hamdist.errors import StreamError
from hamdist.streams.sample import InputSpec, Sample, SampleSpec, Target, TargetSpec, split_weights

FEW = 64  # class targets
ALIGNMENT = 64  # bytes; what torch's CPU allocator gives, and vector instructions like


class Checker:
    """Compares every sample with the spec of its stream.

    Args:
        spec: shapes and types of the samples.
        equal_batches: all samples must have the batch of `spec` (levels that hold samples mix
            neighbouring ones); otherwise batches may differ, the other dimensions may not.
        stamped: time stamps are used, so every sample needs one, later than the one before.
        ignore_index: class targets of this number are no target; a sample of them alone has none.
        one_length: text for the error about a sample of another length than the first one; None if
            each may have its own.
        one_row: text for the error about a sample of one row; None if it may be.
    """

    def __init__(
        self,
        spec: SampleSpec,
        *,
        equal_batches: bool,
        stamped: bool = False,
        ignore_index: int = IGNORE_INDEX,
        one_length: str | None = "",
        one_row: str | None = None,
    ) -> None:
        self._spec = spec
        self._one_length, self._one_row = one_length, one_row
        self._ignore_index = ignore_index
        self._equal_batches = equal_batches
        self._stamped = stamped
        self.last = -math.inf  # time stamp
        self._first = InputSpec(spec.u_shape, spec.u_dtype)
        self._target_y = TargetSpec(spec.y_shape, spec.y_dtype, spec.classes)  # where there is one

    def check(self, n: int, sample: Sample) -> Sample:
        """Return a sample with u and y contiguous, aligned to 64 bytes, and alone in their storage.

        The sample itself is returned where it is so already.

        Args:
            n: its number.
            sample: as the stream yielded it.

        Raises:
            StreamError: names the sample, the field, the value received and the remedy, for a wrong
                type, dtype or shape, another batch size (in y than in u, or, with equal_batches,
                than before), NaN or infinity in floating-point values, class targets outside
                0 ... classes - 1, targets by readout where there is one for all, or the other way
                round, or for an unknown readout; targets of earlier samples without `LateLabels`;
                and, with `stamped`, time stamps that are missing or do not increase.
        """
        if sample.late is not None:
            raise StreamError(
                f"sample {n} brings targets of earlier samples "
                f"({', '.join(map(str, sample.late))}): wrap the stream in "
                "hamdist.streams.LateLabels (each sample is predicted when it comes), or in Rejoin "
                "(it waits for its target)"
            )
        if self._stamped:
            self._check_time(n, sample.time)
        if sample.inputs is not None or self._spec.inputs is not None:
            return self._several(n, sample)
        u = self._input(n, "u", sample.u, self._first)
        y = self._targets(n, sample.y, u.shape[0])
        if u is sample.u and y is sample.y:
            return sample
        return Sample(u, y, sample.end, sample.time)

    def _several(self, n: int, sample: Sample) -> Sample:
        """Check a sample of a model that has several inputs."""
        specs, drawn = self._spec.inputs, sample.inputs
        if specs is None or drawn is None or specs.keys() != drawn.keys():
            has = "one input, u" if drawn is None else ", ".join(map(repr, drawn))
            first = "one input, u" if specs is None else ", ".join(map(repr, specs))
            raise StreamError(
                f"sample {n} has {has}, the first one had {first}: give all samples the same inputs"
            )
        inputs = {
            name: self._input(n, f"u[{name!r}]", drawn[name], spec) for name, spec in specs.items()
        }
        batch = self._spec.batch  # of the first sample: what had other rows there is no batch
        batches = {n: u.shape[0] for n, u in inputs.items() if specs[n].shape[0] == batch}
        if len(set(batches.values())) > 1:
            rows = ", ".join(f"{name!r} {batch}" for name, batch in batches.items())
            raise StreamError(
                f"sample {n}: the inputs have different batches ({rows}): give every input of an "
                "sample the same rows"
            )
        u = next(iter(inputs.values()))
        y = self._targets(n, sample.y, u.shape[0])
        return Sample(u, y, sample.end, sample.time, inputs=inputs)

    def _check_time(self, n: int, time: float | None) -> None:
        if time is None:
            raise StreamError(
                f"sample {n} has no time stamp, but dynamics.tau is 'stamps': give every sample "
                "its time in seconds, or set dynamics.tau"
            )
        if not self.last < time < math.inf:
            raise StreamError(
                f"sample {n} has time stamp {time:g} s, the one before {self.last:g} s: time "
                "stamps have to increase; put the samples in order, or set dynamics.tau"
            )
        self.last = time

    def _input(self, n: int, field: str, u: Tensor, spec: InputSpec) -> Tensor:
        _check_dtype(n, field, u, spec.dtype)
        if not self._fits(u, spec):
            raise StreamError(
                f"sample {n}: {field} has shape {tuple(u.shape)}, earlier ones had "
                f"{_rows(spec.shape)}: every sample is a batch, (B, ...), whose rows have one "
                f"shape; reshape it, or add the batch dimension{self._why()}"
            )
        if self._equal_batches and u.shape[0] != spec.shape[0]:
            raise StreamError(
                f"sample {n} has batch {u.shape[0]}, earlier ones had {spec.shape[0]}: drop "
                "shorter batches (drop_last=True), or use a pulse level, which takes them"
            )
        if u.shape[0] == 0:
            raise StreamError(
                f"sample {n}: {field} has batch 0: leave empty batches out of the stream"
            )
        if u.shape[0] == 1 < spec.shape[0] and self._one_row is not None:
            raise StreamError(
                f"sample {n}: {field} has batch 1, with which the model does something else "
                f"({self._one_row}), and blocks were cut for more: leave such batches out "
                "(drop_last=True), or write that line without regard to the number of rows"
            )
        check_finite(n, field, u)
        return _aligned(u)

    def _targets(self, n: int, y: Target, batch: int) -> Target:
        """Return the target, or those of the readouts, unchanged where nothing had to be copied."""
        specs = self._spec.targets
        if y is None:
            return None
        if isinstance(y, Tensor) or not isinstance(y, Mapping):
            if specs is not None:
                raise StreamError(
                    f"sample {n}: y is one target, but this stream's targets are given by readout: "
                    f"give a dict of {', '.join(map(repr, specs))}"
                )
            return self._target(n, "y", y, self._target_y, batch)
        if specs is None:
            raise StreamError(
                f"sample {n}: y is a dict ({', '.join(map(repr, y))}), but this stream has one "
                "target for every readout: give a tensor or None, or dicts from sample 0 on"
            )
        strange = [name for name in y if name not in specs]
        if strange:
            raise StreamError(
                f"sample {n}: y has a target for {strange[0]!r}, but this stream has targets for "
                f"{', '.join(map(repr, specs))}: every name is known from the first sample on"
            )
        checked = {
            name: None if t is None else self._target(n, f"y[{name!r}]", t, specs[name], batch)
            for name, t in y.items()
        }
        return y if all(checked[name] is y[name] for name in y) else checked

    def _fits(self, value: Tensor, spec: InputSpec | TargetSpec) -> bool:
        if value.dim() == 0 or value.dim() != len(spec.shape):
            return False
        return self._one_length is None or value.shape[1:] == spec.shape[1:]

    def _why(self) -> str:
        return f"; {self._one_length}" if self._one_length else ""

    def _target(self, n: int, field: str, y: Tensor, spec: TargetSpec, batch: int) -> Tensor | None:
        """Return one checked target; None where all of its classes are ignored."""
        target = y
        if self._spec.weighted:
            y, _ = split_weights(y, spec)
        _check_dtype(n, field, y, spec.dtype)
        if not self._fits(y, spec):
            raise StreamError(
                f"sample {n}: {field} has shape {tuple(y.shape)}, expected {_rows(spec.shape)}: "
                f"targets are (B,) classes or (B, O) values; reshape it{self._why()}"
            )
        if y.shape[0] != batch:
            raise StreamError(
                f"sample {n}: {field} has batch {y.shape[0]}, but u has batch {batch}: "
                "give one target per input, or None for the whole sample"
            )
        check_finite(n, field, y)
        if spec.classes is None:
            return _aligned(target)
        possible = 0 <= self._ignore_index < spec.classes
        if not possible and _within(y, spec.classes):
            return _aligned(target)
        ignored = y == self._ignore_index
        strange = ((y < 0) | (y >= spec.classes)) & ~ignored
        if strange.any():
            where = tuple(strange.nonzero()[0].tolist())
            row = ", ".join(map(str, where))
            raise StreamError(
                f"sample {n}: {field}[{row}] is {y[where].item()}, but with {spec.classes} classes "
                f"targets are 0 to {spec.classes - 1}: correct the labels, or the number of "
                "classes, or say with ignore_index which number is no class"
            )
        return None if ignored.all() else _aligned(target)


def _within(y: Tensor, classes: int) -> bool:
    """Return True if all values of y are classes."""
    if 0 < y.numel() <= FEW:  # faster one by one
        return all(0 <= value < classes for value in y.reshape(-1).tolist())
    low, high = torch.aminmax(y)
    return low.item() >= 0 and high.item() < classes


def check_numbers(n: int, field: str, value: Tensor | np.ndarray) -> None:
    """Raise StreamError for a value of a sample without a number at each of its places."""
    if isinstance(value, np.ndarray):
        why = "masked values: say by filled(...) what they are" if np.ma.is_masked(value) else ""
    elif value.is_meta:
        why = "no values, on the meta device"
    elif value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = f"{'nested ' * value.is_nested}{value.dtype} {value.layout}"
        why = f"another kind of tensor ({kind}): make a dense one of it (to_dense, dequantize, ...)"
    else:
        return
    if why:
        raise StreamError(f"sample {n}: {field} has {why}")


def _check_dtype(n: int, field: str, value: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise StreamError(f"sample {n}: {field} is a {type(value).__name__}, not a torch tensor")
    check_numbers(n, field, value)
    if value.dtype != dtype:
        raise StreamError(
            f"sample {n}: {field} has dtype {value.dtype}, expected {dtype}: convert it with "
            f".to({dtype})"
        )


def check_finite(n: int, field: str, value: Tensor) -> None:
    """Raise StreamError for a value of a sample that is nan or infinite."""
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    # a sum of finite values can overflow: look again, value by value
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise StreamError(
            f"sample {n}: {field}{list(where)} is {value[where].item()} ({len(bad)} such values): "
            "clean the data, or drop such samples, before they enter the stream"
        )


def _aligned(value: Tensor) -> Tensor:
    """Return the tensor if it is contiguous, aligned and alone in its storage, else a copy."""
    if (
        value.is_contiguous()
        and not value.requires_grad
        and value.data_ptr() % ALIGNMENT == 0
        and value.untyped_storage().nbytes() == value.nbytes
    ):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def _rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['B', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"
