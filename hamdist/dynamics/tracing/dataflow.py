"""The dependencies between a traced model's steps, and the places where it can be cut.

A block begins at a place in the order of the steps. The order is the model's own, except that

- steps that depend neither on weights nor on chance (token numbers, padding masks, positions,
  buffers that are only read) are in no block: each block that needs them makes them from the input
  and from copies of the buffers. So a mask of -inf is no part of a state;
- a step without batch (a table of positions) is right before its first use;
- with several outputs the steps of one output alone are behind those that outputs share.

Between two blocks travel the values that later blocks read: real values that can be columns of a
signal. No block begins where a buffer has users on both sides (or a weight, at levels that cannot
tie copies of it), where memory is written to behind the place and was made before it, or where
another value would have to cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hamdist.dynamics.tracing.join_runs import Trace
from hamdist.dynamics.tracing.program import ColumnForm, Op, Value, is_weight, value_of


@dataclass(frozen=True, slots=True)
class NoCut:
    """Range of places at which no block begins, behind `first` up to `last`, and why."""

    first: int
    last: int
    why: str
    remedy: str


class Flow:
    """The order of the ops, and their dependencies.

    order: the ops that belong to a block. segments: where the ops that outputs share begin, and
    those of each output alone. needs: by op, those that come first. glues: ranges without a cut.
    together: the reason to keep the users of a weight in one block (None: there is none).
    """

    def __init__(
        self, trace: Trace, model: nn.Module, outputs: Sequence[Value], together: str | None = None
    ) -> None:
        self._model, self._together = model, together
        self.trace = trace
        self.ops = trace.ops
        self.outputs = list(outputs)
        self._tensors = dict(_tensors(model))
        self._parameters = {id(p) for p in model.parameters()}
        self._steady = self._only_read()
        self.needs = [({i for i, _ in references(op)} | op.reads) for op in self.ops]
        self._moving = [i for i, op in enumerate(self.ops) if self._moves_buffers(op)]
        self.live = self._living()
        self.weights = [self._weights(op) for op in self.ops]
        self.pure = self._pure()
        self._written = {m for i in self.live for m in self.ops[i].writes}
        self.free = self.pure - {i for i, _ in outputs}
        self.order, self.segments = self._ordered()
        self.place = {i: k for k, i in enumerate(self.order)}
        self.glues = [*self._by_weights(), *self._by_memory(), *self._by_values()]

    # -- ops --------------------------------------------------------------------------------------

    def _living(self) -> set[int]:
        """Return the ops that an output needs, and those that move a buffer."""
        waiting = [i for i, _ in self.outputs] + self._moving
        live: set[int] = set()
        while True:
            while waiting:
                i = waiting.pop()
                if i not in live:
                    live.add(i)
                    waiting += self.needs[i]
            # what writes to the memory of something that lives
            memory = {m for i in live for m in self.ops[i].memory}
            waiting = [i for i, op in enumerate(self.ops) if i not in live and op.writes & memory]
            if not waiting:
                return live

    def _of_module(self, op: Op[ColumnForm]) -> dict[int, str]:
        """Return weights and buffers of the module that an op calls: names by identity."""
        if op.node.op != "call_module":
            return {}
        prefix = f"{op.node.target}." if op.node.target else ""
        module = self._model.get_submodule(str(op.node.target))
        return {id(t): f"{prefix}{name}" for name, t in _tensors(module)}

    def _moves_buffers(self, op: Op[ColumnForm]) -> bool:
        """Return True if an op may change buffers, and so is run even if nothing needs its result:
        it writes to one, or calls a module that has some and was not looked into (a batch norm)."""
        buffers = set(self._of_module(op)) - self._parameters
        return bool(buffers or self.written_weights(op))

    def written_weights(self, op: Op[ColumnForm]) -> list[str]:
        """Return the names of the buffers that an op writes to."""
        origins = [self.trace.origin.get(m) for m in op.writes]
        return [str(w.target) for w in origins if is_weight(w)]

    def _only_read(self) -> set[int]:
        """Return the constant buffers: never written to, and in no module that is one step."""
        moved = {key for op in self.ops for key in self._of_module(op)}
        moved |= {id(self._tensors[w]) for op in self.ops for w in self.written_weights(op)}
        buffers = {id(t) for t in self._tensors.values() if not isinstance(t, nn.Parameter)}
        return buffers - moved

    def _weights(self, op: Op[ColumnForm]) -> dict[int, str]:
        """Return the weights, and the buffers that move, that an op uses: names by identity."""
        weights = self._of_module(op)
        named = [str(node.target) for node in op.node.all_input_nodes if is_weight(node)]
        for weight in (*named, *self.written_weights(op)):
            weights.setdefault(id(self._tensors[weight]), weight)
        return {key: name for key, name in weights.items() if key not in self._steady}

    def _pure(self) -> set[int]:
        """Return the ops that any block can repeat with the same result.

        They read inputs and constants, and write only to results of such ops.
        """
        pure = {i for i in self.live if not self.weights[i] and not self.ops[i].random}
        while True:
            others = {m for i in self.live - pure for m in self.ops[i].writes}
            foreign = {
                m for i in pure for m in self.ops[i].writes
                if not isinstance(self.trace.origin.get(m), int)
            }  # fmt: skip
            again = {
                i for i in pure
                if self.needs[i] <= pure
                and not (self.ops[i].memory | self.ops[i].writes) & (others | foreign)
            }  # fmt: skip
            if again == pure:
                return pure
            pure = again

    def _late(self, i: int) -> bool:
        """Return True if an op moves to its first user: it has no batch."""
        op = self.ops[i]
        moved = op.random or op.writes or op.memory & self._written
        return not moved and bool(op.out) and all(f.free for f in op.out.values())

    def _needed(self) -> set[int]:
        """Return the ops of blocks: `live`, without those that only free values need."""
        waiting = [i for i, _ in self.outputs] + self._moving
        waiting += [i for i in self.live if self.ops[i].writes]
        needed: set[int] = set()
        while waiting:
            i = waiting.pop()
            if i not in needed and i not in self.free:
                needed.add(i)
                waiting += self.needs[i]
        return needed

    def _ordered(self) -> tuple[list[int], list[int]]:
        alone = self._alone()
        places = sorted(self._needed())
        order: list[int] = []
        done: set[int] = set()

        def put(i: int) -> None:
            if i in done or i in self.free:
                return
            done.add(i)
            for n in sorted(self.needs[i]):
                put(n)
            order.append(i)

        segments = [0]
        ends = {i for i, _ in self.outputs}
        for segment in range(len(self.outputs) + 1 if len(self.outputs) > 1 else 1):
            if segment:
                segments.append(len(order))
            for i in places:
                if alone[i] == segment and (i in ends or not self._late(i)):
                    put(i)
        return order, segments

    def _alone(self) -> dict[int, int]:
        """Return by op: 1 + the one output that needs it, or 0."""
        if len(self.outputs) == 1:
            return dict.fromkeys(self.live, 0)
        reach: dict[int, set[int]] = {i: set() for i in self.live}
        for output, (end, _) in enumerate(self.outputs):
            reach[end].add(output)
        for i in sorted(self.live, reverse=True):
            for n in self.needs[i]:
                reach[n] |= reach[i]
        for i in sorted(self.live):  # what only moves a buffer goes where its operands are
            if not reach[i]:
                reach[i] = set.union(set(), *(reach[n] for n in self.needs[i]))
        return self._with_their_weights(
            {i: next(iter(r)) + 1 if len(r) == 1 else 0 for i, r in reach.items()}
        )

    def _with_their_weights(self, alone: dict[int, int]) -> dict[int, int]:
        """Move ops that use a weight for several outputs, with all they need, to the shared ones.

        So a module that is called once for each of them is in one block.
        """
        users: dict[int, set[int]] = {}
        for i in self.live:
            for key in self.weights[i]:
                users.setdefault(key, set()).add(i)
        while True:
            several = [places for places in users.values() if len({alone[i] for i in places}) > 1]
            shared = {i for i in set.union(set(), *several) if alone[i]}
            while shared:
                i = shared.pop()
                alone[i] = 0
                shared |= {n for n in self.needs[i] if alone[n]}
            if not several:
                return alone

    # -- what must stay together ------------------------------------------------------------------

    def _by_weights(self) -> Iterator[NoCut]:
        users: dict[int, list[tuple[int, str]]] = {}
        for i in self.order:
            for key, name in self.weights[i].items():
                users.setdefault(key, []).append((i, name))
        for ops in users.values():
            at = [self.place[i] for i, _ in ops]
            tensor = self._tensors[ops[0][1]]
            whole = self._whole_user(i for i, _ in ops)
            together = self._together if whole is None else f"{whole!r}, which stays whole,"
            alone = together is not None and (tensor.requires_grad or whole is not None)
            if max(at) > min(at) and (alone or not isinstance(tensor, nn.Parameter)):
                first = min(ops, key=lambda f: self.place[f[0]])
                last = max(ops, key=lambda f: self.place[f[0]])
                names = dict.fromkeys(name for _, name in (first, last))
                remedy = "give each user a weight of its own (untie them)"
                if len(names) == 1:
                    remedy = (
                        "call the module once, on both inputs joined (torch.cat), and split what "
                        "it returns"
                    )
                yield NoCut(
                    min(at), max(at),
                    f"the weight {' = '.join(map(repr, names))} is used in "
                    f"{self.title(first[0])} and in {self.title(last[0])}, and "
                    f"{f'with {together} ' if alone else ''}a weight belongs to one block",
                    f"{remedy}, or cut elsewhere",
                )  # fmt: skip

    def _whole_user(self, ops: Iterable[int]) -> str | None:
        """Return the first of the ops' modules that was not traced: copies of it may differ."""
        names = [name for i in ops for name in self.names(i)]
        return next((name for name in names if name in self.trace.whole), None)

    def _by_memory(self) -> Iterator[NoCut]:
        """Yield the ranges around memory that is written to.

        A cut is allowed if the writer is the only user behind it, has a copy, and sends it on.
        """
        last = self.last_use()
        for i in self.order:
            for memory in self.ops[i].writes:
                origin = self.trace.origin.get(memory)
                if is_weight(origin):
                    continue
                first = self.place.get(origin, 0) if isinstance(origin, int) else 0
                for place in range(first + 1, self.place[i] + 1):
                    crossing = [
                        value
                        for value, end in last.items()
                        if self.place[value[0]] < place <= end
                        and memory in self.ops[value[0]].memory
                    ]
                    handed_on = memory in self.ops[i].memory and len(crossing) == 1
                    if not isinstance(origin, int) or not handed_on:
                        yield NoCut(
                            place - 1, place,
                            f"{self.title(i)} writes to what {self.title(self.order[first])} made, "
                            "and both sides would have it",
                            "cut behind it, or do not write in place",
                        )  # fmt: skip

    def _by_values(self) -> Iterator[NoCut]:
        for value, last in self.last_use().items():
            form = self.form(value)
            if not form.sendable:
                kind = str(form.dtype).removeprefix("torch.")
                values = f"values of type {kind}"
                if form.dims is None:
                    values = f"a changing number of {kind}"
                if form.masked:
                    values = "values with the -inf of a mask"
                yield NoCut(
                    self.place[value[0]], last,
                    f"{values} go from {self.title(value[0])} to "
                    f"{self.title(self.order[last])}, and only real-valued batches travel",
                    "cut before the one or behind the other",
                )  # fmt: skip

    # -- what crosses -----------------------------------------------------------------------------

    def steady(self, name: str) -> bool:
        """Return True for a buffer that is only read, of which every block has a copy."""
        return id(self._tensors[name]) in self._steady

    def form(self, value: Value) -> ColumnForm:
        """Return dimensions and type of a value."""
        return self.ops[value[0]].out[value[1]]

    def last_use(self) -> dict[Value, int]:
        """Return the last place where a value is read, of values that are read in the order."""
        last: dict[Value, int] = {}
        for k, i in enumerate(self.order):
            for value in references(self.ops[i]):
                if value[0] in self.place:
                    last[value] = max(k, last.get(value, 0))
        return last

    def crossing(self) -> list[int]:
        """Return by place the numbers per row that would cross a cut there."""
        sizes = [0] * (len(self.order) + 1)
        for value, last in self.last_use().items():
            for k in range(self.place[value[0]] + 1, last + 1):
                sizes[k] += self.form(value).columns
        return sizes[: len(self.order)]

    def prevents(self, place: int) -> NoCut | None:
        """Return the range that forbids a block to begin at a place, if any."""
        return next((g for g in self.glues if g.first < place <= g.last), None)

    def learned(self, i: int) -> int:
        """Return the number of elements that an op learns."""
        tensors = [self._tensors[name] for name in self.weights[i].values()]
        return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))

    def real_numbers(self, i: int) -> int:
        """Return the real numbers per row that an op makes."""
        forms = self.ops[i].out.values()
        return sum(f.columns for f in forms if not f.free and f.dtype.is_floating_point)

    def title(self, i: int) -> str:
        """Return the name of an op for users."""
        op = self.ops[i]
        if op.node.op == "call_module":
            return f"{op.node.target!r}"
        return op.line or f"{op.where!r}"

    def names(self, i: int) -> tuple[str, ...]:
        """Return the modules that an op belongs to, outermost first."""
        op = self.ops[i]
        path = (str(op.node.target),) if op.node.op == "call_module" else ()
        return tuple(n for n in (*op.modules, *path) if n)


def references(op: Op[ColumnForm]) -> list[Value]:
    """Return the results of other ops that an op reads."""
    return list(filter(None, map(value_of, op.node.all_input_nodes)))


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
