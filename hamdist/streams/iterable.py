"""Any iterable of samples as a stream: its spec from the first sample, later ones checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import HamdistWarning, SettingsError, StreamError
from hamdist.streams.batch_names import TARGETS, TUPLES, WEIGHT, Names, default_names, named_parts
from hamdist.streams.check import check_numbers
from hamdist.streams.epochs import AGAIN, Epochs, epoch_setters, is_ragged
from hamdist.streams.sample import (
    InputSpec,
    Sample,
    SampleSpec,
    Target,
    TargetSpec,
    with_example,
    with_weights,
)

_FORMS = (
    "a Sample, (u, y), (u, None), u alone, or a dict of 'u' and, if known, 'y', 'end', 'time', "
    "'late' or 'key'; of other dicts and tuples names= says what is what"
)
TAKEN = (
    "the model takes {key!r} as an argument, and here they are compared with its output as they "
    "are: what it would do with them itself (a language model shifts them by one) is left out. "
    "loss='model' learns the loss that it computes; names={names} says that this is meant"
)


class _Fields(NamedTuple):
    """The parts of a sample, as its source gives them."""

    u: Any
    y: Any = None
    end: Any = False
    time: Any = None
    late: Any = None
    key: Any = None
    weights: Any = None


_KEYS = _Fields._fields[:-1]  # of a dict
# A number for every readout, or by the name of the readout.
Sizes: TypeAlias = int | Mapping[str, int] | None


class IterableStream:
    """Stream of a user's iterable or loader, as `from_iterable` makes it; it stays in its process.

    Args:
        source: yields the samples.
        classes: number of classes of integer targets, by readout where there are several.
        outputs: numbers of an output's features, likewise.
        copied: True: tensors of a sample are copied, since the source writes to them again.
        replays: the source is sure to give the same samples again.
        epochs: how often the source is read; None: without an end.
        names: what the keys of mappings mean.
        arguments: names of the model's arguments.
        ragged: True: samples may have other shapes than the first; None: where the model allows.
        model_loss: name of the output that is the model's own loss. spec: of samples, if known.
    """

    portable: bool = False

    def __init__(
        self,
        source: Iterable[Any],
        *,
        classes: Sizes,
        outputs: Sizes,
        copied: bool,
        replays: bool = True,
        epochs: int | None = 1,
        names: Names | None = None,
        arguments: Sequence[str] | None = None,
        ragged: bool | None = None,
        model_loss: str | None = None,
        spec: SampleSpec | None = None,
    ) -> None:
        _check_sizes(classes, outputs)
        if not isinstance(source, Iterable):
            batches = "a DataLoader of it" if hasattr(source, "__getitem__") else "an iterable"
            raise StreamError(f"a {type(source).__name__} cannot be iterated: give {batches}")
        if epochs is not None and epochs < 1:
            raise SettingsError(f"epochs is {epochs}; at least 1 is needed, or None for no end")
        self._kind, iterator = type(source).__name__, source
        seeded = bool(epoch_setters(source))
        if epochs != 1 or not isinstance(source, Iterator):
            source = Epochs(source, epochs)
        self._source = source
        self._classes = classes
        self._copied = copied
        self._names = None if names is None else {str(key): name for key, name in names.items()}
        self._arguments = arguments
        self._model_loss = model_loss
        # The iterator that is peeked into is the one that the first `samples()` goes on with: a
        # loader that shuffles by a global generator draws from it once, as without hamdist.
        samples = iter(source)
        self._again = samples is not source
        self.replays = self._again and (replays or seeded)
        nothing = object()
        first = next(samples, nothing)
        if first is nothing:
            raise StreamError(f"the source ({self._kind}) yields no sample")
        if spec is None:
            spec = _learn(self.sample(0, first, weigh=False), classes, outputs)
            ragged = is_ragged(iterator) if ragged is None else ragged
            spec = replace(spec, ragged=ragged, weighted=WEIGHT in (self._names or {}).values())
        self._spec = spec
        self._peeked: Iterator[Any] | None = chain([first], samples)

    @property
    def spec(self) -> SampleSpec:
        """Return the spec that the first sample and the arguments give."""
        return self._spec

    def live_spec(self, patience: int) -> SampleSpec:
        """Return the spec of a live run whose samples are like the first sample.

        Args:
            patience: samples that may wait for their labels.
        """
        return replace(self._spec, patience=patience, live=True, emissions=None)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on.

        Raises:
            StreamError: the source is an iterator, and has been read.
        """
        if self._peeked is not None:
            samples, self._peeked = self._peeked, None
        elif self._again:
            samples = iter(self._source)
        else:
            raise StreamError(
                f"this stream was made from an iterator ({self._kind}), which can be read once and "
                f"has been: make a new stream, or give {AGAIN}"
            )
        return (self.sample(n, sample) for n, sample in enumerate(samples))

    def sample(self, n: int, sample: Any, *, weigh: bool = True) -> Sample:
        """Return a sample, in any of the accepted forms, as a sample.

        Args:
            n: its number, for messages.
            sample: what the source yielded.
            weigh: False: weights of rows are left out.

        Raises:
            StreamError: it has another form, or not that of the first sample.
        """
        u, y, end, time, late, key, weights = self._fields(n, sample)
        if key is not None and not _is_key(key):
            raise StreamError(f"sample {n}: key is {_short(key)}; give a whole number or a text")
        inputs = self._inputs(n, u)
        if not isinstance(end, (bool, np.bool_)):
            raise StreamError(f"sample {n}: end is {end!r}; give True or False")
        number = isinstance(time, (int, float, np.number)) and not isinstance(time, bool)
        if time is not None and not number:
            raise StreamError(f"sample {n}: time is {time!r}; give a number of seconds, or None")
        first = self._tensor(n, "u", u) if inputs is None else next(iter(inputs.values()))
        if self._model_loss is not None:
            if y is not None or weights is not None:
                raise StreamError(
                    f"sample {n} has a target or weight, and loss 'model' has none: name it as an "
                    "argument of the model, or give the output a loss"
                )
            y = {self._model_loss: torch.zeros(len(first), 1)}
        return Sample(
            first,
            self._target(n, "y", y, weights if weigh else None),
            bool(end),
            None if time is None else float(time),
            self._late(n, late),
            inputs,
            key=key,
        )

    def _fields(self, n: int, sample: Any) -> _Fields:
        """Return what is in a sample in any of the accepted forms."""
        if isinstance(sample, Sample):
            u = sample.u if sample.inputs is None else sample.inputs
            return _Fields(u, sample.y, sample.end, sample.time, sample.late, sample.key)
        if not {*(self._names or TARGETS)}.isdisjoint(getattr(sample, "_fields", ())):
            sample = sample._asdict()  # (a namedtuple, whose names say more than its places)
        if isinstance(sample, (tuple, list)) and self._names is not None:
            sample = {str(place): value for place, value in enumerate(sample)}
        if isinstance(sample, Mapping) and (self._names is not None or "u" not in sample):
            names = self._names or self._default_names(n, sample)
            u, y, weights = named_parts(n, sample, names)
            return _Fields(u, y, weights=weights)
        if isinstance(sample, Mapping):
            strange = [str(key) for key in sample if key not in _KEYS]
            if strange:
                raise StreamError(
                    f"sample {n} is a dict with the unknown {', '.join(strange)}; "
                    f"a sample is {_FORMS}"
                )
            return _Fields(**sample)
        if isinstance(sample, (Tensor, np.ndarray)):
            return _Fields(sample)
        if isinstance(sample, (tuple, list)) and len(sample) in (1, 2):
            return _Fields(*sample)
        length = f" of length {len(sample)}" if isinstance(sample, (tuple, list)) else ""
        hint = TUPLES if length and len(sample) > 2 else ""
        raise StreamError(
            f"sample {n} is a {type(sample).__name__}{length}; a sample is {_FORMS}{hint}"
        )

    def _default_names(self, n: int, sample: Mapping[Any, Any]) -> Mapping[str, str]:
        if self._model_loss is not None:
            return {str(key): str(key) for key in sample}
        names = default_names(n, sample, self._arguments)
        for key in names if n == 0 else ():
            if names[key] == "y" and key in (self._arguments or ()):
                warnings.warn(TAKEN.format(key=key, names=names), HamdistWarning, stacklevel=2)
        return names

    def _inputs(self, n: int, u: Any) -> dict[str, Tensor] | None:
        """Return several inputs by name, those of a tuple or list by number; None for one input."""
        arrays = (Tensor, np.ndarray)
        if isinstance(u, (tuple, list)) and u and all(isinstance(part, arrays) for part in u):
            u = {str(i): part for i, part in enumerate(u)}
        if not isinstance(u, Mapping):
            return None
        if not u:
            raise StreamError(f"sample {n}: u has no inputs; give at least one tensor")
        return {str(name): self._tensor(n, f"u[{name!r}]", part) for name, part in u.items()}

    def _late(self, n: int, late: Any) -> dict[int | str, Target] | None:
        if late is None:
            return None
        if not isinstance(late, Mapping) or not all(map(_is_key, late)):
            raise StreamError(
                f"sample {n}: late is {_short(late)}; give a dict from the numbers or keys of "
                "earlier samples to their targets"
            )
        return {key: self._target(n, f"late[{key!r}]", y) for key, y in late.items()}

    def _target(self, n: int, field: str, y: Any, weights: Any = None) -> Target:
        """Return a target, or a dict of them by readout, with the weights of the rows."""
        if y is None:
            return None
        if not isinstance(y, Mapping):
            return self._values(n, field, y, weights)
        return {
            str(name): None if t is None else self._values(n, f"{field}[{name!r}]", t, weights)
            for name, t in y.items()
        }

    def _values(self, n: int, field: str, value: Any, weights: Any) -> Tensor:
        """Return integer classes as int64, other targets unchanged; with weights, if given."""
        y = self._tensor(n, field, value)
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        y = y.to(torch.int64) if integers else y
        if weights is None:
            return y
        values = self._tensor(n, WEIGHT, weights).double()
        if values.numel() != len(y) or not bool(((values >= 0) & values.isfinite()).all()):
            raise StreamError(
                f"sample {n}: the weights are {_short(values)}, of shape {tuple(values.shape)}: "
                f"give a number from 0 on for each of its {len(y)} rows"
            )
        return with_weights(y, values)

    def _tensor(self, n: int, field: str, value: Any) -> Tensor:
        if isinstance(value, (Tensor, np.ndarray)):
            check_numbers(n, field, value)
        if isinstance(value, Tensor):
            tensor = value.detach()
            return tensor.clone(memory_format=torch.contiguous_format) if self._copied else tensor
        if not isinstance(value, np.ndarray):
            raise StreamError(
                f"sample {n}: {field} is a {type(value).__name__}; give a torch tensor or a numpy "
                "array, the batch in front"
            )
        try:  # a copy in the machine's byte order, which torch asks for
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise StreamError(
                f"sample {n}: {field} is a numpy array of {value.dtype}, which torch has no dtype "
                "for: convert it with astype"
            ) from error


def _is_key(key: object) -> bool:
    return isinstance(key, (int, str)) and not isinstance(key, bool)


def _check_sizes(classes: Sizes, outputs: Sizes) -> None:
    """Raise SettingsError for two sizes of one readout, or a size below 1."""
    both = classes is not None and outputs is not None
    named = isinstance(classes, Mapping) and isinstance(outputs, Mapping)
    if both and not named:
        raise SettingsError("give classes (integer targets) or outputs (values), not both")
    for name, sizes in (("classes", classes), ("outputs", outputs)):
        by_readout = sizes if isinstance(sizes, Mapping) else {None: sizes}
        for readout, size in by_readout.items():
            where = name if readout is None else f"{name}[{readout!r}]"
            if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
                raise SettingsError(f"{where} is {size!r}; give a whole number")
            if size is not None and size < 1:
                raise SettingsError(f"{where} is {size}; at least 1 is needed")
    if isinstance(classes, Mapping) and isinstance(outputs, Mapping):
        for readout in sorted(classes.keys() & outputs.keys()):
            raise SettingsError(
                f"{readout!r} is in classes (integer targets) and in outputs (values): leave it "
                "out of one"
            )


def _size_of(sizes: Sizes, readout: str | None) -> int | None:
    """Return the size for a readout; without a readout the one for all."""
    if isinstance(sizes, Mapping):
        return None if readout is None else sizes.get(readout)
    return sizes


def _learn(first: Sample, classes: Sizes, outputs: Sizes) -> SampleSpec:
    """Return the spec that the first sample and the user's arguments define."""
    u = first.u
    for tensor in (first.inputs or {"": u}).values():
        if tensor.dim() == 0:
            raise StreamError("sample 0: u has no dimension: samples are batches, (B, ...)")
    spec = with_example(_learn_targets(first, classes, outputs), first)
    if first.inputs is None:
        return spec
    return replace(
        spec, inputs={k: InputSpec(tuple(v.shape), v.dtype) for k, v in first.inputs.items()}
    )


def _learn_targets(first: Sample, classes: Sizes, outputs: Sizes) -> SampleSpec:
    u = first.u
    named = [part for part in (first.y, classes, outputs) if isinstance(part, Mapping)]
    if not named:
        y = first.target("")
        target = _target_spec("y", u, y, _size_of(classes, None), _size_of(outputs, None))
        return SampleSpec(tuple(u.shape), u.dtype, target.shape, target.dtype, target.classes)
    if isinstance(first.y, Tensor):
        raise StreamError(
            "sample 0: y is one target, but classes or outputs are given by readout: give y as a "
            "dict of the readouts' names, too"
        )
    names = list(dict.fromkeys(name for part in named for name in part))
    if not names:
        raise StreamError("sample 0: y is an empty dict: name the readouts, or give None")
    targets = {
        name: _target_spec(
            f"y[{name!r}]", u, first.target(name), _size_of(classes, name), _size_of(outputs, name)
        )
        for name in names
    }
    return SampleSpec.several(tuple(u.shape), u.dtype, targets)


def _target_spec(
    field: str, u: Tensor, y: Tensor | None, classes: int | None, outputs: int | None
) -> TargetSpec:
    if y is not None:
        integers = not y.dtype.is_floating_point
        if y.dtype == torch.bool:
            raise StreamError(
                f"sample 0: {field} has dtype {y.dtype}: convert targets that are classes with "
                "y.long(), real-valued ones to a floating-point dtype"
            )
        if not integers and classes is not None:
            raise StreamError(
                f"sample 0: {field} has dtype {y.dtype}, but classes={classes} says that "
                "targets are classes: convert them with y.long(), or leave classes out"
            )
        return TargetSpec(tuple(y.shape), y.dtype, classes)
    batch = u.shape[0]
    if outputs is not None:
        dtype = u.dtype if u.is_floating_point() else torch.get_default_dtype()
        return TargetSpec((batch, outputs), dtype)
    if classes is None:
        of = "" if field == "y" else f" as {field}"
        raise StreamError(
            f"sample 0 has no target{of}, so what targets are is open: give classes= for integer "
            "targets, outputs= for real-valued ones"
        )
    return TargetSpec((batch,), torch.int64, classes)


def _short(value: object) -> str:
    return f"{value!r:.60}"
