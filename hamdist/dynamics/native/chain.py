"""Chains of operations by the C code of native/rows.c.

A step of a small batch is bound by reading and writing weights, and by what a call costs: one call
runs all operations forward, one computes both vector-Jacobian products and moves the weights. For
inputs of one shape all sizes and places are computed once.

R: rows of an operation; I, O: widths of its inputs and outputs.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from hamdist.dynamics.native import rows

MOST = 64  # operations of a chain
NARROW = 1 << 14
_PAD = 16  # numbers: 64 bytes of the smaller type
_FIELDS, _INTO = 13, 4  # of an operation in rows.c
_NONE, _GIVEN, _SENT, _FIRST = range(4)  # places of messages, as in rows.c


class OperationKind(IntEnum):
    """Kind of an operation of a chain, as in rows.c."""

    LINEAR, NORM, ACTIVATION, ADD, SCALE, EMBEDDING, PROJECTION = range(7)


class Activation(IntEnum):
    """An elementwise function, as in rows.c."""

    IDENTITY, RELU, TANH, SIGMOID = range(4)


class Operation(NamedTuple):
    """An operation. reads: its inputs (0: the chain's, i + 1: what operation i makes).

    w, b: its weights, of a table w alone; of a projection b is its table. number: epsilon, factor,
    sign, or the padding's index. width: O; 0: that of its input.
    """

    kind: OperationKind
    reads: tuple[int, ...]
    w: Tensor | None = None
    b: Tensor | None = None
    act: Activation = Activation.IDENTITY
    number: float = 0.0
    width: int = 0

    def saved_shape(self, rows: int, out: int) -> tuple[int, int]:
        """Return the shape of what is kept of z: the gradient, or a factor of it."""
        if self.w is None:
            return 0, out
        return (2 if self.kind is OperationKind.NORM else rows), out

    def ends(self, before: Operation) -> bool:
        """Return True if this can be f of a linear layer before it, which alone reads that."""
        kinds = self.kind, before.kind
        return kinds == (OperationKind.ACTIVATION, OperationKind.LINEAR) and not before.act

    def pays(self) -> bool:
        """Return True if a row of a linear layer is faster here than by torch.

        It is not where there are many rows of a few numbers.
        """
        return self.w is None or self.w.shape[1] >= _PAD or self.w.numel() <= NARROW


class NativeChain:
    """Operations on an input of one shape; their weights move in place.

    sizes: by value (the input first), how many numbers it has and how many of them are a row.
    """

    def __init__(self, operations: Sequence[Operation], sizes: Sequence[tuple[int, int]]) -> None:
        self._operations = list(operations)  # whose memory this reads and writes
        self._dtype = next(op.w.dtype for op in operations if op.w is not None)
        self._flags = rows.FLAGS[self._dtype]
        self._outs = [(total // width, width) for total, width in sizes[1:]]
        self._most_rows = max(rows_of for rows_of, _ in self._outs)
        self._has_products = rows.has_products(self._most_rows)
        self._gemm = 0 if self._has_products else rows.gemm(self._dtype)
        self._ds = [op.saved_shape(*out) for op, out in zip(operations, self._outs, strict=True)]
        makes, keeps = ([_filled(r * o) for r, o in shapes] for shapes in (self._outs, self._ds))
        norms = [
            _filled(4 * rows) if op.kind is OperationKind.NORM else 0
            for op, (rows, _) in zip(operations, self._outs, strict=True)
        ]
        # (the last output is not in `inner`, but what a norm knows of its rows)
        ends = list(accumulate(map(sum, zip([*makes[:-1], 0], norms, strict=True))))
        self._at, self._at_d = [0, *ends], [0, *accumulate(keeps)]
        self.inner, self.d = max(self._at[-1], 1), max(self._at_d[-1], 1)
        self._apart = max(_filled(sizes[0][0]), *makes)  # of two messages
        self._ways: dict[bool, array[int]] = {}
        numbers: list[int] = []
        for i, op in enumerate(operations):
            into = self._outs[i][1]
            if op.w is not None and op.kind is not OperationKind.NORM:
                into = op.w.shape[op.kind is OperationKind.LINEAR]
            pointers = (0 if t is None else t.data_ptr() for t in (op.w, op.b))
            numbers += [op.kind, *pointers, self._outs[i][0], into, self._outs[i][1], op.act]
            numbers += [op.reads[0], op.reads[-1], self._at[i], self._at_d[i]]
            numbers += [
                self._at[i + 1] - norms[i],
                *struct.unpack("Q", struct.pack("d", op.number)),
            ]
        self._table = array("Q", numbers)

    @property
    def runs(self) -> bool:
        """Return True if the C code can step it: there is a row, and products of several."""
        has_products = self._most_rows == 1 or self._has_products or self._gemm != 0
        return min(many for many, _ in self._outs) > 0 and has_products

    def forward(self, x: Tensor, inner: Tensor, y: Tensor) -> bool:
        """Write the output of the last operation to y, those of the others to `inner`.

        inner, and d and m of `pull`: memory of as many numbers as `inner`, `d` and `messages` say.
        Returns False for an index that is in no table.
        """
        torch.get_num_threads()  # tells OpenMP torch's number, once in each Python thread
        table, many = self._table.buffer_info()[0], len(self._operations)
        memory = (t.data_ptr() for t in (x, inner, y))
        return rows.library.chain_forward(table, many, *memory, self._gemm, self._flags)

    def messages(self, *, wanted: bool) -> int:
        """Return the numbers of m of `pull`, with the input's message or without."""
        ways = self._ways.get(wanted)
        if ways is None:
            ways = self._ways[wanted] = array("Q", _ways(self._operations, wanted=wanted))
        return max(1, (max(ways) - _FIRST + 1) * self._apart)

    def pull(
        self,
        x: Tensor,
        inner: Tensor,
        y: Tensor,
        z: Tensor,
        d: Tensor,
        m: Tensor,
        to: Tensor | None,
        rates: array[float] | None,
        limit: float,
    ) -> int:
        """Compute products and updates by operation, from the last one on.

        The message to x goes to `to`. Of a linear layer d = z f', the message d W; then W += alpha
        d^T x and b += beta times the sum of d's rows, unless the norm of d^T (x, 1), of the parts
        that move, is above the limit. In the same way of a layer norm and a table, whose gradient
        is the sum of the rows z that read a row of it.

        rates: alpha and beta of every operation; None: nothing moves. Returns a number whose bit i
        is set if operation i has moved.
        """
        torch.get_num_threads()  # (as in `forward`)
        tables = (t.buffer_info()[0] for t in (self._table, self._ways[to is not None]))
        memory = (t.data_ptr() for t in (x, inner, y, z, d, m))
        sent = 0 if to is None else to.data_ptr()
        alphas = 0 if rates is None else rates.buffer_info()[0]
        return rows.library.chain_pull(
            *(*tables, len(self._operations), *memory),
            *(self._apart, sent, alphas, self._gemm, self._flags, limit),
        )

    def read_by(self, i: int, x: Tensor, inner: Tensor) -> Tensor:
        """Return what linear layer i has read, (R, I); of `inner` as `forward` left it."""
        at, width = self._operations[i].reads[0], self._table[_FIELDS * i + _INTO]
        value = x if at == 0 else _part(inner, self._at[at - 1], self._outs[at - 1])
        return value.view(-1, width)

    def saved(self, i: int, d: Tensor) -> Tensor:
        """Return what `pull` kept of operation i: d, (R, O), or a norm's two gradients, (2, O)."""
        return _part(d, self._at_d[i], self._ds[i])


def _part(memory: Tensor, at: int, shape: tuple[int, int]) -> Tensor:
    return memory[at : at + shape[0] * shape[1]].view(shape)


def _filled(numbers: int) -> int:
    return -(-numbers // _PAD) * _PAD


def _ways(operations: Sequence[Operation], *, wanted: bool) -> list[int]:
    """Return by operation the places of z, of the messages it makes, and of those they add to.

    wanted: the input's message, which the last of its readers to come writes to its own place. A
    place is free again where nobody reads it any more; an operation on one value may work in z's.
    """
    need = [wanted]
    for op in operations:
        need.append(op.w is not None or any(need[r] for r in op.reads))
    to_come = Counter(r for op in operations for r in op.reads)
    place = {len(operations): _GIVEN}
    readers: Counter[int] = Counter({_GIVEN: MOST, _SENT: MOST})

    def free() -> int:
        at = next(p for p in count(_FIRST) if not readers[p])
        readers[at] += 1
        return at

    ways = []
    for i in range(len(operations) - 1, -1, -1):
        op, z = operations[i], place.get(i + 1, _NONE)
        to, had = [_NONE, _NONE], [_NONE, _NONE]
        alone = len(op.reads) == 1
        readers[z] -= alone
        for j, value in enumerate(op.reads if z != _NONE else ()):
            to_come[value] -= 1
            if not need[value]:
                continue
            before, last = place.get(value, _NONE), value == 0 and not to_come[value]
            passes = op.kind is OperationKind.ADD and (j == 0 or op.number == 1)
            if passes and before == _NONE and not last:
                place[value] = z
                readers[z] += 1
                continue
            had[j], to[j] = before, _SENT if last else free()
            place[value] = to[j]
            readers[before] -= 1
        readers[z] -= not alone
        ways.append([z, *to, *had])
    return [number for way in reversed(ways) for number in way]
