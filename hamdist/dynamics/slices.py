"""Spreads the neurons of blocks over several blocks: a graph in, a graph out.

    block1 (7 neurons, slices=3)   ->   block1_0 (3), block1_1 (2), block1_2 (2)

Each slice is a block as any other and exchanges its own neurons' signals alone; who reads block1
reads all three and joins them (`Joining`). Layers whose neurons follow from others' (the second
half of an MLP, the output projection of an attention) give summands, which their readers sum.

The forward of a sliced block is traced with torch.fx, laid out (layout.py), and cut into stages: a
stage ends where something needs all neurons. A stage of slices is m blocks, one of something whole
(a layer norm, what behind the slices is not elementwise) is one block. Operations without weights
on what a block reads are repeated in all slices, which costs no hop. The stages of block1 are
block1a_0 ... block1b ...; a last stage that is one block keeps the name block1, and so does what
takes the loss of a sliced readout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.graph import (
    INPUT,
    BlockSpec,
    Combine,
    Graph,
    Join,
    Joining,
    Part,
    ShapeMap,
    Sliced,
)
from hamdist.dynamics.layout import (
    Layouts,
    Narrow,
    Number,
    Regrain,
    Several,
    Split,
    Use,
    Weight,
    Whole,
    dry_run,
)
from hamdist.dynamics.reading import read, readable
from hamdist.dynamics.shards import Places, Share
from hamdist.errors import GraphError


def sliced(
    graph: Graph,
    u_shape: Sequence[int],
    u_dtype: torch.dtype,
    inputs: ShapeMap | None = None,
) -> Graph:
    """`graph` with every block of `slices` m > 1 spread over m blocks; itself where there is none.

    u_shape: of the stream's input, batch in front; inputs: of each, by the names that parents have,
    where there are several. Raises GraphError for a block that cannot be sliced, with what prevents
    it.
    """
    for block in graph.blocks.values():
        if isinstance(block.slices, bool) or not isinstance(block.slices, int) or block.slices < 1:
            raise GraphError(
                f"block {block.name!r}: slices is {block.slices!r}; give a whole number from 1 on"
            )
    wanted = [b for b in graph.blocks.values() if b.slices > 1]
    if not wanted:
        return graph
    inputs = {INPUT: (tuple(u_shape), u_dtype), **(inputs or {})}
    shapes = {**graph.shapes(u_shape, u_dtype, inputs), **inputs}
    cuts = {b.name: _Cut(b, shapes) for b in wanted}
    outs = {b.name: _Out((b.name,)) for b in graph.blocks.values()}
    outs |= {name: cut.out for name, cut in cuts.items()}
    outs |= {name: _Out((name,)) for name in inputs}
    blocks: list[BlockSpec] = []
    parts: list[Part] = []
    origin: dict[str, str] = {}
    for block in graph.blocks.values():
        cut = cuts.get(block.name)
        made = [_reading(block, outs)] if cut is None else list(cut.blocks(outs, parts))
        blocks += made
        origin |= dict.fromkeys((b.name for b in made), block.name)
    return Graph(blocks, sliced=Sliced(graph, tuple(parts), origin))


@dataclass(frozen=True)
class _Out:
    """Who gives the value of an unsliced block: blocks, to be joined on `axis`, or summed."""

    names: tuple[str, ...]
    axis: int | None = None

    @property
    def join(self) -> Join:
        return Join(len(self.names), self.axis)


def _reading(block: BlockSpec, outs: Mapping[str, _Out]) -> BlockSpec:
    """An unsliced block, whose parents may be sliced."""
    given = [outs[p] for p in block.parents]
    if all(len(out.names) == 1 for out in given):
        names = {p: out.names[0] for p, out in zip(block.parents, given, strict=True)}
        delays = {names[p]: d for p, d in block.delays.items()}
        return replace(block, parents=tuple(names.values()), delays=delays)
    if isinstance(block.combine, Joining):
        raise GraphError(
            f"block {block.name!r} joins its parents by itself, of which some are sliced; give it "
            "a Combine, or leave the slices out"
        )
    return replace(
        block,
        parents=tuple(name for out in given for name in out.names),
        combine=Joining(tuple(out.join for out in given), block.combine),
        delays={n: d for p, d in block.delays.items() for n in outs[p].names},
    )


@dataclass
class _Stage:
    """Operations that are computed in one block, or in m. needs: stages that it reads."""

    number: int
    many: bool
    needs: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _From:
    """What a block of a stage reads: a parent of the unsliced block by number, or another stage
    (all of it, or its slice `piece`)."""

    parent: int | None = None
    stage: int | None = None
    piece: int | None = None


class _Cut:
    """One block, cut into stages."""

    def __init__(self, block: BlockSpec, shapes: ShapeMap) -> None:
        self.spec = block
        self.m = block.slices
        self._refuse_what_has_no_slices()
        self._inner = readable(copy.deepcopy(block.module))
        self._root = nn.Module()
        self._root.add_module("m", self._inner)
        self.traced, self.result = self._trace()
        module = fx.GraphModule(self._root, self.traced)
        self.modules = dict(module.named_modules(remove_duplicate=False))
        runs = tuple(
            dry_run(copy.deepcopy(module), [_zeros(shapes[p], more) for p in block.parents])
            for more in (0, 1)
        )
        # (the copies' graphs have nodes of their own, in the same order)
        self.values = tuple(dict(zip(self.traced.nodes, run.values(), strict=True)) for run in runs)
        self._grain: dict[fx.Node, tuple[int, int]] = {}
        self._apart: set[fx.Node] = set()  # begin a stage
        self._free: set[fx.Node] = set()  # are repeated by their readers
        while not self._arrange():
            pass
        self._check()
        self.out = self._named_out()

    def _refuse_what_has_no_slices(self) -> None:
        b = self.spec
        for what, given in (
            ("an output module", b.output is not None),
            ("an initial state", b.initial is not None),
            ("a Joining of its own", isinstance(b.combine, Joining)),
        ):
            if given:
                raise GraphError(f"block {b.name!r} with {what} cannot be sliced; set its slices=1")

    # -- what the block does -------------------------------------------------------------------

    def _trace(self) -> tuple[fx.Graph, fx.Node]:
        """Its operations, from one placeholder by parent to the result."""
        spec = self.spec
        graph = fx.Graph()
        parents = [graph.placeholder(f"p{i}") for i in range(len(spec.parents))]
        arguments = parents
        if len(parents) > 1 and spec.combine is Combine.CONCAT:
            arguments = [graph.call_function(torch.cat, (parents, -1))]
        elif len(parents) > 1 and spec.combine is Combine.SUM:
            total = parents[0]
            for parent in parents[1:]:
                total = graph.call_function(torch.add, (total, parent))
            arguments = [total]
        try:
            result = read(graph, self._root, "m", arguments)
        except Exception as error:  # a user's forward may raise anything on fx's stand-ins
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise GraphError(
                f"block {spec.name!r} ({type(spec.module).__name__}) cannot be sliced: torch.fx "
                f"cannot read its forward ({reason}); leave its slices out, or cut the model so "
                "that the layers to slice are a block of their own"
            ) from error
        if not isinstance(result, fx.Node):
            raise GraphError(
                f"block {spec.name!r} cannot be sliced: it returns {type(result).__name__}, not "
                "one tensor"
            )
        graph.output(result)
        for node in reversed(graph.nodes):  # what nobody reads
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        return graph, result

    # -- stages --------------------------------------------------------------------------------

    def _arrange(self) -> bool:
        """Layouts and stages with what is known so far; False where something new was learned."""
        self.layouts = Layouts(self.spec.name, self.modules, self.values, self._grain)  # type: ignore[arg-type]
        self.stages: list[_Stage] = []
        self.stage_of: dict[fx.Node, _Stage] = {}
        try:
            for node in self.traced.nodes:
                if node.op != "output":
                    self.layouts.read(node)
                    self._place(node)
        except Regrain as new:
            for origin in new.origins:
                units, chunks = self._grain.get(origin, (math.inf, 1))
                if new.units >= units and new.chunks in (None, chunks):
                    raise GraphError(
                        f"block {self.spec.name!r} cannot be sliced: its layers disagree about "
                        "which neurons belong together; leave its slices out"
                    ) from None
                self._grain[origin] = (new.units, new.chunks or chunks)
            return False
        return self._one_value_each()

    def _place(self, node: fx.Node) -> None:
        step = self.layouts.steps[node]
        if isinstance(step.layout, (Number, Weight)) or node.op in ("placeholder", "get_attr"):
            return
        many = not isinstance(step.layout, Whole)
        inside = [  # stages whose values it takes as they are
            self.stage_of[i]
            for i in node.all_input_nodes
            if i in self.stage_of and (step.uses.get(i) is Use.PIECE or not self.stage_of[i].many)
        ]
        inside = [s for s in inside if s.many == many]
        if not many and (node in self._free or not (inside or self._fixed(node))):
            return
        if not inside and many:
            inside = [s for s in self.stages if s.many][-1:]
        latest = max(inside, key=lambda s: s.number, default=None)
        if latest is not None and node not in self._apart and self._fits(node, latest):
            stage = latest
        else:
            stage = _Stage(len(self.stages), many)
            self.stages.append(stage)
        self.stage_of[node] = stage
        stage.needs |= self._outside(node, stage)

    def _fixed(self, node: fx.Node) -> bool:
        """Whether it cannot be repeated by its readers: it has weights or draws numbers, or it is
        the block's result."""
        return node is self.result or self.layouts.weighted(node)

    def _outside(self, node: fx.Node, stage: _Stage) -> set[int]:
        """The stages that `node` reads from inside of `stage`."""
        found = set()
        uses = self.layouts.steps[node].uses
        for i in node.all_input_nodes:
            own = self.stage_of.get(i)
            taken = own is stage and (not stage.many or uses.get(i) is Use.PIECE)
            if not taken:
                found |= self._sources(i)
        return found

    def _sources(self, node: fx.Node) -> set[int]:
        """The stages whose results make `node`."""
        if node in self.stage_of:
            return {self.stage_of[node].number}
        if isinstance(self.layouts.steps[node].layout, Number):
            return set()
        return {s for i in node.all_input_nodes for s in self._sources(i)}

    def _fits(self, node: fx.Node, stage: _Stage) -> bool:
        """Whether nothing that it reads from outside comes from `stage`."""
        waiting, seen = list(self._outside(node, stage)), set()
        while waiting:
            number = waiting.pop()
            if number == stage.number:
                return False
            if number not in seen:
                seen.add(number)
                waiting += self.stages[number].needs
        return True

    def _one_value_each(self) -> bool:
        """A block sends one tensor, the batch in front. False where a stage would have to send two:
        the later one then gets a stage of its own, or is repeated by its readers."""
        for stage in self.stages:
            sent = self._sent(stage)
            if not stage.many and not (self._fixed(sent[-1]) or self._batch_first(sent[-1])):
                self._free.add(sent[-1])
                return False
            if len(sent) > 1:
                last = sent[-1]
                if not stage.many and not self._fixed(last):
                    self._free.add(last)
                else:
                    self._apart.add(self._branch(last, stage))
                return False
        return True

    def _branch(self, node: fx.Node, stage: _Stage) -> fx.Node:
        """Where what leads to `node` alone begins in `stage`, or `node` where all of it does."""
        start = node
        first = next(n for n, own in self.stage_of.items() if own is stage)
        while True:
            before = [i for i in start.all_input_nodes if self.stage_of.get(i) is stage]
            if len(before) != 1 or list(before[0].users) != [start] or before[0] is first:
                return start if start not in self._apart else node
            start = before[0]

    def _batch_first(self, node: fx.Node) -> bool:
        one, more = (values[node] for values in self.values)
        return isinstance(one, Tensor) and one.dim() > 0 and one.shape[0] + 1 == more.shape[0]

    def _sent(self, stage: _Stage) -> list[fx.Node]:
        """What others read of `stage`, in order."""
        sent = []
        for node, own in self.stage_of.items():
            if own is not stage:
                continue
            outside = node is self.result
            for user in node.users:
                if user.op == "output" or isinstance(self.layouts.steps[user].layout, Number):
                    continue
                inside = self.stage_of.get(user) is stage
                uses = self.layouts.steps[user].uses
                if not inside or (stage.many and uses.get(node) is not Use.PIECE):
                    outside = True
            if outside:
                sent.append(node)
        return sent

    def _check(self) -> None:
        name = self.spec.name
        found = [(n, self.layouts.units(n)) for n in self.traced.nodes if n.op == "call_module"]
        layers = [(n, units) for n, units in found if units is not None]
        if not layers:
            kinds = dict.fromkeys(type(m).__name__ for m in self._inner.modules())
            raise GraphError(
                f"block {name!r} cannot be sliced: nothing in it has neurons, channels or heads to "
                f"share out (it holds {', '.join(kinds)}); slices take Linear, Conv1d to Conv3d "
                "and MultiheadAttention"
            )
        for node, (units, noun) in layers:
            if units < self.m:
                raise GraphError(
                    f"block {name!r} cannot be spread over {self.m} slices: its module "
                    f"{_path(str(node.target)) or type(self._inner).__name__!r} has {units} "
                    f"{noun}; use at most {units} slices"
                )
        for stage in self.stages:
            (sent,) = self._sent(stage)
            if isinstance(self.layouts.steps[sent].layout, Several) or not isinstance(
                self.values[0][sent], Tensor
            ):
                raise GraphError(
                    f"block {name!r} cannot be sliced: {sent.name} would have to hand on several "
                    "tensors at once; leave its slices out"
                )

    # -- the blocks ----------------------------------------------------------------------------

    @property
    def _last(self) -> _Stage:
        return self.stage_of[self.result]

    def _name(self, stage: _Stage) -> str:
        """Of a stage, without the number of the slice."""
        if stage is self._last and not stage.many:
            return self.spec.name
        if len(self.stages) == 1:
            return self.spec.name
        n = stage.number
        return self.spec.name + ("abcdefghijklmnopqrstuvwxy"[n] if n < 25 else f"z{n - 25}")

    def _out_of(self, stage: _Stage) -> _Out:
        if not stage.many:
            return _Out((self._name(stage),))
        names = tuple(f"{self._name(stage)}_{i}" for i in range(self.m))
        layout = self.layouts.steps[self._sent(stage)[0]].layout
        return _Out(names, layout.axis if isinstance(layout, Split) else None)

    def _named_out(self) -> _Out:
        """Who gives the value of the unsliced block; of a readout, what takes its loss."""
        return _Out((self.spec.name,)) if self.spec.loss is not None else self._out_of(self._last)

    def blocks(self, outs: Mapping[str, _Out], parts: list[Part]) -> Iterator[BlockSpec]:
        """The blocks, in the order of their stages; `parts` gets where their tensors come from."""
        for stage in self.stages:
            out = self._out_of(stage)
            for i, name in enumerate(out.names):
                yield self._block(stage, i, name, outs, parts)
        if self.spec.loss is not None and self._last.many:
            out = self._out_of(self._last)
            yield BlockSpec(
                self.spec.name,
                nn.Identity(),
                out.names,
                combine=Joining((out.join,)),
                loss=self.spec.loss,
            )

    def _block(
        self, stage: _Stage, i: int, name: str, outs: Mapping[str, _Out], parts: list[Part]
    ) -> BlockSpec:
        made = _Made(self, stage, i, frozenset())
        joined = {f.stage for f in made.reads if f.piece is None and f.stage is not None}
        twice = {f.stage for f in made.reads if f.piece is not None and f.stage in joined}
        if twice:
            made = _Made(self, stage, i, frozenset(twice))
        given: list[_Out] = []
        delays: dict[str, int] = {}
        for source in made.reads:
            if source.parent is not None:
                parent = self.spec.parents[source.parent]
                given.append(outs[parent])
                delay = self.spec.delays.get(parent, 1)
                delays |= dict.fromkeys(outs[parent].names, delay) if delay != 1 else {}
            else:
                out = self._out_of(self.stages[source.stage or 0])
                given.append(out if source.piece is None else _Out((out.names[source.piece],)))
        parts += [replace(part, block=name) for part in made.parts]
        joining = Joining(tuple(out.join for out in given), Combine.ARGUMENTS)
        single = all(len(out.names) == 1 for out in given)
        last = stage is self._last
        shape = self.spec.shape if last else None
        layout = self.layouts.steps[made.sent].layout
        if shape is not None and isinstance(layout, Split):
            size = self.share(i, layout.units, layout.chunks).length(shape[layout.axis - 1])
            shape = (*shape[: layout.axis - 1], size, *shape[layout.axis :])
        readout = last and not stage.many and self.spec.loss is not None
        return BlockSpec(
            name,
            made.module,
            tuple(n for out in given for n in out.names),
            combine=Combine.ARGUMENTS if single else joining,
            delays=delays,
            loss=self.spec.loss if readout else None,
            state=readout and self.spec.state,
            shape=shape,
        )

    def share(self, i: int, units: int, chunks: int = 1) -> Share:
        return Share(units, chunks, i, self.m)


class _Made:
    """One block of a stage: slice i of it, or all (i = 0). joined_here: stages of which it reads
    its own slice and all of them, so that it joins them itself.

    module; reads: what its arguments are; parts: where its tensors come from.
    """

    def __init__(self, cut: _Cut, stage: _Stage, i: int, joined_here: frozenset[int]) -> None:
        self.i, self.m = i, cut.m
        self.graph = fx.Graph()
        self.reads: list[_From] = []
        self.parts: list[Part] = []
        self._cut, self._stage, self._joined_here = cut, stage, joined_here
        self._inputs: dict[_From, fx.Node] = {}
        self._made: dict[object, fx.Node] = {}
        self._held: dict[str, Any] = {}
        self._uses: Mapping[fx.Node, Use | Narrow] = {}
        (self.sent,) = cut._sent(stage)
        for node, own in cut.stage_of.items():
            if own is stage:
                self._made[node] = self._operation(node)
        self.graph.output(self._made[self.sent])
        self.module = fx.GraphModule(self._held, self.graph, "Slice")

    def share(self, units: int, chunks: int = 1) -> Share:
        return self._cut.share(self.i, units, chunks)

    def _operation(self, node: fx.Node) -> fx.Node:
        step = self._cut.layouts.steps[node]
        self._uses = step.uses
        return self.copy(node) if step.make is None else step.make(self)

    def copy(self, node: fx.Node) -> fx.Node:
        """The operation as it is, on what its inputs are here."""
        if node.op == "call_module":
            whole = self._cut.modules[str(node.target)]
            return self.module_of(node, whole)
        return self._copied(node, self.value)

    def _copied(self, node: fx.Node, value: Any) -> fx.Node:
        literal = self._cut.layouts.literal
        args = fx.map_arg(literal(node.args), value)
        kwargs = fx.map_arg(literal(node.kwargs), value)
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def module_of(self, node: fx.Node, module: nn.Module) -> fx.Node:
        stateful = [*module.state_dict(), *(k for k, _ in module.named_buffers())]
        return self.module_with(node, module, dict.fromkeys(stateful))

    def module_with(self, node: fx.Node, module: nn.Module, places: Places) -> fx.Node:
        path = _path(str(node.target))
        self._held[path or "layer"] = module
        prefix = f"{path}." if path else ""
        for key, place in places.items():
            axis, index = place if place is not None else (None, None)
            new = f"{path or 'layer'}.{key}"
            self.parts.append(Part(self._cut.spec.name, prefix + key, "", new, axis, index))
        args = fx.map_arg(node.args, self.value)
        return self.graph.call_module(path or "layer", args, fx.map_arg(node.kwargs, self.value))

    def value(self, node: fx.Node) -> fx.Node:
        """An input of the operation under construction, as its use says."""
        use = self._uses.get(node, Use.WHOLE)
        if isinstance(use, Narrow):
            return self._narrowed(node, use)
        if use is Use.PIECE:
            own = self._cut.stage_of[node]
            if own is self._stage:
                return self._made[node]
            return self._input(_From(stage=own.number, piece=self.i))
        return self._whole(node)

    def _narrowed(self, node: fx.Node, use: Narrow) -> fx.Node:
        key = (node, use)
        if key not in self._made:
            size = int(self._cut.values[0][node].shape[use.axis])
            share, whole = self.share(use.units, use.chunks), self._whole(node)
            part = size // use.chunks
            pieces = [
                self.graph.call_function(
                    torch.narrow,
                    (whole, use.axis, chunk * part + share.start(part), share.length(part)),
                )
                for chunk in range(use.chunks)
            ]
            self._made[key] = (
                pieces[0]
                if len(pieces) == 1
                else self.graph.call_function(torch.cat, (pieces, use.axis))
            )
        return self._made[key]

    def _whole(self, node: fx.Node) -> fx.Node:
        """All of a value: as another block gives it, or made again from what others give."""
        own = self._cut.stage_of.get(node)
        if own is self._stage and not own.many:
            return self._made[node]
        if own is not None:
            return self._joined(own)
        key = (node, Use.WHOLE)
        if key not in self._made:
            if node.op == "placeholder":
                names = [n for n in self._cut.traced.nodes if n.op == "placeholder"]
                self._made[key] = self._input(_From(parent=names.index(node)))
            elif node.op == "get_attr":
                self._made[key] = self._attribute(node)
            elif node.op == "call_module":
                path = _path(str(node.target)) or "layer"
                self._held[path] = self._cut.modules[str(node.target)]
                args = fx.map_arg((node.args, node.kwargs), self._whole)
                self._made[key] = self.graph.call_module(path, *args)
            else:
                self._made[key] = self._copied(node, self._whole)
        return self._made[key]

    def _attribute(self, node: fx.Node) -> fx.Node:
        path = _path(str(node.target))
        tensor = self._cut.values[0][node]
        found: Any = self._cut._root
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, nn.Parameter) and isinstance(tensor, Tensor):
            found = found.clone()  # a constant, of which every block has its own
        self._held[path] = found
        self.parts.append(Part(self._cut.spec.name, path, "", path))
        return self.graph.get_attr(path)

    def _joined(self, stage: _Stage) -> fx.Node:
        if stage.number not in self._joined_here:
            return self._input(_From(stage=stage.number))
        key = ("joined", stage.number)
        if key not in self._made:
            pieces = [self._input(_From(stage=stage.number, piece=i)) for i in range(self._cut.m)]
            axis = self._cut._out_of(stage).axis
            if axis is not None:
                self._made[key] = self.graph.call_function(torch.cat, (pieces, axis))
            else:
                total = pieces[0]
                for piece in pieces[1:]:
                    total = self.graph.call_function(torch.add, (total, piece))
                self._made[key] = total
        return self._made[key]

    def _input(self, source: _From) -> fx.Node:
        if source not in self._inputs:
            last = self._inputs[self.reads[-1]] if self.reads else self.graph._root
            with self.graph.inserting_after(last):
                self._inputs[source] = self.graph.placeholder(f"p{len(self.reads)}")
            self.reads.append(source)
        return self._inputs[source]


def _path(target: str) -> str:
    return target.removeprefix("m").removeprefix(".")


def _zeros(known: tuple[tuple[int, ...], torch.dtype], more: int) -> Tensor:
    shape, dtype = known
    return torch.zeros((shape[0] + more, *shape[1:]), dtype=dtype)
