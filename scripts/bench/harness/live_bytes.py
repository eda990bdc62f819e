"""Bytes of tensors that are alive at a time: an exact count, by intercepting every operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that operations of this thread allocate inside, with autograd's saved
    tensors.

    A tensor counts from its creation to the end of the last tensor on its memory. Meta tensors have
    no memory.

    Attributes:
        now, peak: bytes, at present and the most so far.
        leaving_out: shapes that are not counted, such as those of weights and their gradients.
    """

    def __init__(self, leaving_out: Iterable[Sequence[int]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shapes = [_bare(shape) for shape in leaving_out]
        self.now = 0
        self.peak = 0
        self._leaving_out = {*shapes, *(shape[::-1] for shape in shapes)}  # and transposed
        self._known: MutableMapping[object, bool] = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for argument in tree_leaves((args, kwargs)):
            if isinstance(argument, Tensor):  # what was there before
                self._known.setdefault(argument.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, Tensor):
                self._add(result)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or tensor.is_meta or _bare(tensor.shape) in self._leaving_out:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape without axes of length 1, which gradients may have in addition."""
    return tuple(n for n in shape if n != 1)
