"""State as plain data: everything with which another process can continue a block.

Classes name their changing attributes in STATE (`Stateful`). Their values are numbers, texts,
tensors, lists, tuples, mappings, queues, and the small data classes marked by `known`, nested in
any way: `packed` turns that into JSON and a list of tensors, `unpacked` turns it back. Nothing
else can be expressed, so nothing else can come out of a file.

A forward pass that waits for its backward pass is the hard part: with memory `trace` its weights
have moved since, so it cannot be computed again. Autograd has a graph of it whose nodes keep
tensors. `held` reads those tensors; `rebuilt` lets the module run once more on the same inputs,
which makes a graph of the same nodes, and then replaces the tensors of every node by those of the
first graph. Weights are left out: a graph meets today's, in both (vjp/autograd.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.errors import SnapshotError

_Class = TypeVar("_Class", bound=type)
_classes: dict[str, type] = {}
_tags: dict[type, str] = {}


def registered(tag: str) -> Callable[[_Class], _Class]:
    """Mark a data class, a named tuple or an enum as one that state may hold.

    New fields need a default, and come last: files of earlier formats lack them.

    Args:
        tag: the name of the class in files; it stays when the class gets another name.
    """

    def mark(cls: _Class) -> _Class:
        _classes[tag], _tags[cls] = cls, tag
        return cls

    return mark


class Stateful:
    """An object whose state is the values of the attributes that STATE names.

    An attribute that is a `Stateful` itself contributes its state. ADDED: names in STATE that
    files of earlier formats lack, with the values that they then get. OPTIONAL: those that stay as
    they are where one of two runs has none.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    ADDED: ClassVar[Mapping[str, Any]] = {}
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in tensors that later steps may overwrite: `packed` copies them."""
        state = {}
        for name in self.STATE:
            value = getattr(self, name)
            state[name] = value.state_dict() if isinstance(value, Stateful) else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raise SnapshotError where it is that of another class."""
        state = {**{n: v for n, v in self.ADDED.items() if n not in state}, **state}
        check_names(type(self).__name__, state, self.STATE)
        for name in self.STATE:
            value = getattr(self, name)
            if name in self.OPTIONAL and (value is None or state[name] is None):
                continue
            if isinstance(value, Stateful):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


def check_names(whose: str, state: object, names: Collection[str]) -> None:
    """Raise SnapshotError unless `state` has exactly these entries."""
    if not isinstance(state, Mapping) or set(state) != set(names):
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise SnapshotError(
            f"the state of a {whose} has {sorted(names)}, not {keys}: it was saved by another "
            "version of hamdist, or belongs to another network"
        )


def popped(state: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """Return the entry `name` of `state`, and the others; raise SnapshotError where it has none."""
    if name not in state:
        check_names("block", state, (name,))
    return state[name], {key: value for key, value in state.items() if key != name}


# -- plain data -----------------------------------------------------------------------------------


class Packing:
    """The tensors of one file, each once, as copies in host memory."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._places: dict[tuple[Any, ...], int] = {}
        self._alive: list[Tensor] = []  # so that no address is given to another tensor meanwhile

    def packed(self, value: Any) -> Any:
        """Return `value` as JSON; raise SnapshotError for a value that has no form."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, Enum):
            return {"enum": _name(value), "name": value.name}
        if isinstance(value, int) and type(value) is int:
            return value
        if isinstance(value, float) and not isinstance(value, np.generic):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
            number = isinstance(value, np.generic)
            return {"numpy": self._tensor(torch.from_numpy(np.array(value))), "number": number}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Mapping):
            return {"map": [[self.packed(k), self.packed(v)] for k, v in value.items()]}
        if isinstance(value, deque):
            return {"queue": [self.packed(v) for v in value], "most": value.maxlen}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"is": _name(value), "of": [self.packed(v) for v in value]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            of = [self.packed(getattr(value, f.name)) for f in dataclasses.fields(value)]
            return {"is": _name(value), "of": of}
        if isinstance(value, (set, frozenset)):
            return {"set": [self.packed(v) for v in sorted(value)]}
        if isinstance(value, tuple):
            return {"tuple": [self.packed(v) for v in value]}
        if isinstance(value, list):
            return [self.packed(v) for v in value]
        raise SnapshotError(
            f"a {type(value).__name__} cannot be saved: state is numbers, texts, tensors, and "
            "lists and mappings of those (a module's own comes from get_extra_state)"
        )

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        """Return its place and strides: the order in which a kernel adds may depend on them."""
        plain = tensor.detach()
        strides = list(plain.stride())
        for axis, (size, stride) in enumerate(zip(plain.shape, strides, strict=True)):
            if stride == 0 and size > 1:  # the same numbers again and again
                plain = plain.narrow(axis, 0, 1)
        key = (plain.data_ptr(), plain.dtype, plain.shape, plain.stride(), str(plain.device))
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.tensors)
            self.tensors.append(plain.to("cpu", copy=True).contiguous())
            self._alive.append(tensor)
        entry = {"tensor": place, "shape": list(tensor.shape), "strides": strides}
        return entry if tensor.is_cpu else {**entry, "gpu": True}


class PlainData(Packing):
    """A packing that copies nothing. live: tensors that move in place."""

    def __init__(self, live: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live = {t.untyped_storage().data_ptr() for t in live}

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        if tensor.requires_grad:
            raise SnapshotError("a tensor has a graph: detach it, or keep what it was made of")
        if tensor.untyped_storage().data_ptr() in self._live:
            raise SnapshotError("a tensor is a weight itself, which moves: keep a clone")
        return {}


_OF_MODULES = vars(nn.Module()).keys() - {"training"}
_FIXED = (int, float, str, tuple, type(None))


def plain_parts(
    values: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
    live: Iterable[Tensor] = (),
) -> dict[str, Any]:
    """Return those attributes of a user's object that are plain data without memory of `live`.

    made: the attributes when it was made; of those that have not changed since, another run may
    have others.
    """
    plain: dict[str, Any] = {}
    for name, value in values.items():
        fixed = isinstance(value, _FIXED) and value is (made or {}).get(name, plain)
        with suppress(SnapshotError, TypeError):  # (TypeError: a set that has no order)
            if not fixed and name not in _OF_MODULES:
                PlainData(live).packed(value)
                plain[name] = value
    return plain


def as_text(value: Any) -> str:
    """Return a text that two values have in common if they are equal in all numbers."""
    packing = Packing()
    return repr([packing.packed(value), [t.tolist() for t in packing.tensors]])


def _name(value: object) -> str:
    tag = _tags.get(type(value))
    if tag is None:
        raise SnapshotError(
            f"a {type(value).__name__} cannot be saved: it is not one of {sorted(_classes)}"
        )
    return tag


def unpacked(data: Any, tensors: Sequence[Tensor], gpu: torch.device | None = None) -> Any:
    """Return the value that `Packing.packed` was given; raise SnapshotError for anything else.

    gpu: device of tensors that were on a GPU.
    """
    try:
        return _Unpacking(tensors, gpu).unpacked(data)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise SnapshotError(
            f"this is no state of hamdist's ({type(error).__name__}: {error})"
        ) from None


class _Unpacking:
    def __init__(self, tensors: Sequence[Tensor], gpu: torch.device | None) -> None:
        self._tensors = tensors
        self._gpu = gpu or torch.device("cpu")
        self._unpacked: dict[str, Tensor] = {}

    def unpacked(self, data: Any) -> Any:
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if isinstance(data, list):
            return [self.unpacked(v) for v in data]
        form = next((f for f in _FORMS if f in data), None)
        if form is None:
            raise ValueError(f"unknown form {sorted(data)}")
        return _FORMS[form](self, data)

    def _tensor(self, data: Any) -> Tensor:
        key = repr(data)
        if key not in self._unpacked:
            flat = self._tensors[_index(data["tensor"])]
            tensor = _laid_out(flat, data["shape"], data["strides"])
            self._unpacked[key] = tensor.to(self._gpu) if "gpu" in data else tensor
        return self._unpacked[key]

    def _dtype(self, data: Any) -> torch.dtype:
        dtype = getattr(torch, data["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{data['dtype']!r} is no type of tensors")
        return dtype


_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_FORMS: dict[str, Callable[[_Unpacking, Any], Any]] = {  # by the key that tells a form
    "tensor": _Unpacking._tensor,
    "is": lambda it, data: _classes[data["is"]](*map(it.unpacked, data["of"])),
    "map": lambda it, data: {it.unpacked(k): it.unpacked(v) for k, v in data["map"]},
    "queue": lambda it, data: deque(map(it.unpacked, data["queue"]), data["most"]),
    "tuple": lambda it, data: tuple(map(it.unpacked, data["tuple"])),
    "set": lambda it, data: set(map(it.unpacked, data["set"])),
    "enum": lambda _, data: _classes[data["enum"]][data["name"]],  # type: ignore[index]
    "size": lambda _, data: torch.Size(data["size"]),
    "dtype": _Unpacking._dtype,
    "numpy": lambda it, data: it.unpacked(data["numpy"]).numpy()[() if data["number"] else ...],
    "float": lambda _, data: _FLOATS[data["float"]],
}


def _index(place: object) -> int:
    if type(place) is not int or place < 0:
        raise ValueError(f"{place!r} is no place of a tensor")
    return place


def _laid_out(tensor: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    """Return a copy of `tensor` in the shape and with the strides that it had."""
    small = [1 if stride == 0 and n > 1 else n for n, stride in zip(shape, strides, strict=True)]
    if list(tensor.shape) != small:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} stands for one of {shape}")
    order = sorted(range(len(small)), key=lambda axis: (-strides[axis], axis))
    copy = torch.empty_permuted(small, order, dtype=tensor.dtype)  # dense, in the order of strides
    copy.copy_(tensor)
    return copy if small == shape else copy.expand(shape)


# -- what autograd's graphs keep ------------------------------------------------------------------


class Slot:
    """One tensor that a node of a graph keeps. set: replaces it by another one."""

    __slots__ = ("name", "set", "value")

    def __init__(self, name: str, value: Tensor, set_: Callable[[Tensor], None]) -> None:
        self.name = name
        self.value = value
        self.set = set_


def graph_slots(output: Tensor) -> Iterator[Slot]:
    """Yield the tensors that the graph of `output` keeps, in an order given by its nodes alone."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from _node_slots(node)
        waiting += [follower for follower, _ in reversed(node.next_functions)]


def _node_slots(node: Any) -> Iterator[Slot]:
    kind = type(node).__name__
    for name in sorted(dir(node)):
        if not name.startswith("_raw_saved_"):
            continue
        raw = getattr(node, name)
        seen = name.removeprefix("_raw")
        values = getattr(node, seen) if hasattr(node, seen) else node.saved_tensors
        is_list = isinstance(raw, (tuple, list))
        pairs = zip(raw, values, strict=True) if is_list else [(raw, values)]
        for i, (variable, value) in enumerate(pairs):
            if value is not None:
                yield Slot(f"{kind}{seen}.{i}", value, _replacing(variable))
    # A user's autograd function may keep more, as attributes of its context.
    for name, value in sorted(getattr(node, "__dict__", {}).items()):
        if isinstance(value, Tensor):
            yield Slot(f"{kind}.{name}", value, lambda t, n=name: setattr(node, n, t))  # type: ignore[misc]


def _replacing(raw: Any) -> Callable[[Tensor], None]:
    def put(value: Tensor) -> None:
        raw.register_hooks(lambda saved: saved, lambda _: value)

    return put


def nested_slots(saved: Any, name: str = "kept") -> Iterator[Slot]:
    """Yield the tensors in nested lists."""
    for i, value in enumerate(saved):
        if isinstance(value, Tensor):
            yield Slot(f"{name}.{i}", value, lambda t, i=i: saved.__setitem__(i, t))  # type: ignore[misc]
        elif isinstance(value, list):
            yield from nested_slots(value, f"{name}.{i}")


def held(slots: Iterator[Slot], live: Collection[int]) -> list[list[Any]]:
    """Return names and values of `slots`; None for the value of one in memory of `live`."""
    return [
        [slot.name, None if slot.value.untyped_storage().data_ptr() in live else slot.value]
        for slot in slots
    ]


def fill(slots: Iterator[Slot], values: Sequence[Sequence[Any]]) -> None:
    """Set `slots` to the values that `held` returned for a graph of the same form.

    Raises SnapshotError where the form is another one.
    """
    all_slots = list(slots)
    if [slot.name for slot in all_slots] != [name for name, _ in values]:
        raise SnapshotError(
            "a block computes in another way than the one that was saved: its module, torch or "
            "hamdist has changed"
        )
    for slot, (_, value) in zip(all_slots, values, strict=True):
        if value is not None:
            slot.set(value.to(slot.value.device))
