"""The samples of a stream, and the protocol of a stream.

HL's stream is a sequence of (u, y^, delta): input, target and tag at a time t_k. Here the tag is
`Sample.end`, which closes a sequence; t_k is `Sample.time`; and `Sample.late` holds targets that
come later than their inputs, by the number or key of the earlier sample to which they belong.

B: batch, O: outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from hamdist.errors import StreamError

# (B,) classes or (B, O) values, for every readout; or a target by the name of its readout; None
# (or a name that is not there) where it is missing.
Target: TypeAlias = Tensor | Mapping[str, Tensor | None] | None


class Emits(IntEnum):
    """Kind of an emission: nothing new, a sample, or an earlier one whose label has come."""

    IDLE = 0
    SAMPLE = 1
    AGAIN = 2


class Emission(NamedTuple):
    """Facts about an emission that all blocks get, in a live run (streams/live.py) and where
    labels come late (wrappers/late_targets.py).

    Attributes:
        kind: IDLE, SAMPLE or AGAIN (with the label that has come for it).
        shown: number of the emissions before that were not idle.
        number: of the sample, counted from 0; of an idle one, of the latest sample.
        rate: factor of the step size, from this emission on.
        snapshot: the snapshot (from 1) for which every block is to hand over its state, or 0.
        waits: a sample's label may come in a later emission.
    """

    kind: Emits
    shown: int
    number: int
    rate: float = 1.0
    snapshot: int = 0
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample (u, y) of a stream; a batch counts as one sample.

    Attributes:
        u: input (B, ...).
        y: (B,) classes or (B, O) values, or None where the target is missing; or a mapping from
            the names of readouts to such targets.
        end: True for the last sample of a sequence.
        time: time stamp in seconds, if the sample has one.
        late: targets that come with this sample and belong to earlier ones, by their key, or by
            their number (from 0) where they have none; None for a target that will never come.
            `LateLabels` and `Rejoin` bring both together.
        inputs: for a model with several inputs all of them, by the names of its arguments, or
            numbered ('0', '1', ...) by position; u is the first one then.
        emission: in a live run and where labels come late, what this emission of the stream is.
        key: by which a later sample names this one in `late`.
    """

    u: Tensor
    y: Target = None
    end: bool = False
    time: float | None = None
    late: Mapping[int | str, Target] | None = None
    inputs: Mapping[str, Tensor] | None = None
    emission: Emission | None = None
    key: int | str | None = None

    def target(self, readout: str) -> Tensor | None:
        """Return the target of a readout, or None where it is missing.

        Args:
            readout: its name.
        """
        return self.y.get(readout) if isinstance(self.y, Mapping) else self.y


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """Shape (with the batch in front), type and number of classes of the targets of one readout.

    `classes` is None for real-valued targets.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape (with the batch in front) and type of one of several inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Shapes and types that every sample of a stream has (shapes with the batch in front).

    Attributes:
        classes: number of classes, for targets that are class indices; None for real values.
        targets: by readout, where every readout has its own; then y_shape, y_dtype and classes are
            those of the first one (`several` makes such a spec).
        tokens: number of different tokens, where u holds their numbers (int64, 0 ... tokens - 1).
        inputs: by name, where there are several; then u_shape and u_dtype are those of the first.
        example: the inputs of a real sample, by the names that blocks have for them, if available.
        example_y: its target.
        patience: number of unlabelled samples that may wait for their label, of a live run or where
            labels come late (wrappers/late_targets.py); 0: a label comes with its sample or never.
        kept: blocks keep what they have of such a sample, and learn from that.
        emissions: of the stream for each sample; None if that is not the same for all.
        ragged: True if samples may have lengths of their own, behind the batch.
        weighted: True if targets have the weights of their rows beside them (`with_weights`); the
            spec is that of the targets alone.
        live: True for the stream of a live run, which may be idle.
    """

    u_shape: tuple[int, ...]
    u_dtype: torch.dtype
    y_shape: tuple[int, ...]
    y_dtype: torch.dtype
    classes: int | None = None
    targets: Mapping[str, TargetSpec] | None = None
    tokens: int | None = None
    inputs: Mapping[str, InputSpec] | None = None
    example: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    example_y: Target = field(default=None, compare=False, repr=False)
    patience: int = 0
    kept: bool = False
    emissions: int | None = 1
    ragged: bool = False
    weighted: bool = False
    live: bool = False

    @classmethod
    def several(
        cls, u_shape: tuple[int, ...], u_dtype: torch.dtype, targets: Mapping[str, TargetSpec]
    ) -> SampleSpec:
        """Return the spec of a stream whose samples have a target for each of several readouts.

        Args:
            u_shape: of the inputs, (B, ...).
            u_dtype: their type.
            targets: by readout.
        """
        first = next(iter(targets.values()))
        return cls(u_shape, u_dtype, first.shape, first.dtype, first.classes, dict(targets))

    @property
    def parents(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shapes and types of the inputs by the blocks' names for them: `u`, `u.NAME`."""
        if self.inputs is None:
            return {"u": (self.u_shape, self.u_dtype)}
        return {f"u.{name}": (u.shape, u.dtype) for name, u in self.inputs.items()}

    @property
    def batch(self) -> int:
        """Return B."""
        return self.u_shape[0]

    def target(self, readout: str) -> TargetSpec | None:
        """Return the spec of the targets of a readout; None where the stream has none for it.

        Args:
            readout: its name.
        """
        if self.targets is not None:
            return self.targets.get(readout)
        return TargetSpec(self.y_shape, self.y_dtype, self.classes)


def with_weights(y: Tensor, weights: Tensor) -> Tensor:
    """Return y (B, ...) and the weights of its rows, (B,), as one tensor for `split_weights`:
    (B, n + 1) of int64, the n numbers of a row and its weight, real ones as bits of their float64.
    """
    rows = y.reshape(len(y), -1)
    bits = rows.double().view(torch.int64) if rows.is_floating_point() else rows
    return torch.cat([bits, weights.double().reshape(-1, 1).view(torch.int64)], 1)


def split_weights(target: Tensor, spec: TargetSpec) -> tuple[Tensor, Tensor]:
    """Return y and the weights of what `with_weights` has made. spec: of y, but for its length."""
    weights = target[:, -1].contiguous().view(torch.float64)
    rows = target[:, :-1].contiguous()
    if spec.dtype.is_floating_point:
        rows = rows.view(torch.float64).to(spec.dtype)
    behind = spec.shape[1:]
    return rows.reshape(len(rows), *(-1 for _ in behind[:1]), *behind[1:]), weights


def with_example(spec: SampleSpec, first: Sample) -> SampleSpec:
    """Return `spec` with the inputs and the target of a real sample, for dry runs of models."""
    several = {f"u.{name}": u for name, u in (first.inputs or {}).items()}
    return replace(spec, example=several or {"u": first.u}, example_y=first.y)


@runtime_checkable
class Stream(Protocol):
    """An ordered, possibly endless source of samples.

    `samples()` starts at sample 0. A portable stream can be sent to another process (pickled by
    Ray) and yields the same samples there at every call; one that is not portable (a plain
    iterator, a DataLoader) stays in the driver's process and may allow one call only.
    """

    portable: bool

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, from sample 0 on."""


@runtime_checkable
class Reporting(Protocol):
    """Stream that counts events of its samples (such as how many were dropped)."""

    def report(self) -> dict[str, int]:
        """Return the counts since the last `samples()`, by name; of a wrapped stream too."""
        ...


def report_of(stream: Stream) -> dict[str, int]:
    """Return the counts of a stream by name; none for a stream that does not count.

    Args:
        stream: the stream, once it has been drawn.
    """
    return stream.report() if isinstance(stream, Reporting) else {}


def check_stream(wrapper: str, stream: object) -> None:
    """Raise StreamError if `stream`, to be wrapped by `wrapper`, is no stream."""
    if not isinstance(stream, Stream):
        raise StreamError(
            f"{wrapper} wraps a stream, not a {type(stream).__name__}; make one with "
            "hamdist.streams.from_iterable(...) or from_loader(...), which say how samples look"
        )


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator that depends on all of (purpose, numbers) and on nothing else.

    The parts are hashed, so neighbouring seeds and neighbouring epochs share no sequence, and
    (seed 0, epoch 1) is not (seed 1, epoch 0).
    """
    text = "/".join([purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # the CPU generator is a Mersenne Twister that takes 32 bits of seed
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
