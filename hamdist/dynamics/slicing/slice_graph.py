"""Spreads the neurons of blocks over several blocks: a graph in, a graph out.

    block1 (7 neurons, slices=3)   ->   block1_0 (3), block1_1 (2), block1_2 (2)

Each slice is a block as any other and exchanges its own neurons' signals alone; who reads block1
reads all three and joins them (`Joining`). Layers whose neurons follow from others' (the second
half of an MLP, the output projection of an attention) give summands, which their readers sum.

The forward of a sliced block is traced with torch.fx, laid out (layouts.py), and cut into stages
(stages.py): a stage ends where something needs all neurons. A stage of slices is m blocks, one of
something whole (a layer norm, what behind the slices is not elementwise) is one block. Operations
without weights on what a block reads are repeated in all slices, which costs no hop. The stages of
block1 are block1a_0 ... block1b ...; a last stage that is one block keeps the name block1, and so
does what takes the loss of a sliced readout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hamdist.dynamics.graph.graph import (
    INPUT,
    BlockSpec,
    Combine,
    Graph,
    Join,
    Joining,
    ShapeMap,
    Sliced,
    TensorSlice,
)
from hamdist.dynamics.slicing.op_layouts import Shard
from hamdist.dynamics.slicing.slice_module import SliceModule
from hamdist.dynamics.slicing.stages import SlicePhase, SlicePhases
from hamdist.errors import GraphError


def sliced(
    graph: Graph, u_shape: Sequence[int], u_dtype: torch.dtype, inputs: ShapeMap | None = None
) -> Graph:
    """Return `graph` with every block of `slices` m > 1 spread over m blocks.

    The graph itself where there is none. u_shape: of the stream's input, batch in front; inputs: of
    each, by the names that parents have, where there are several. Raises GraphError for a block
    that cannot be sliced, with the reason.
    """
    for block in graph.blocks.values():
        if isinstance(block.slices, bool) or not isinstance(block.slices, int) or block.slices < 1:
            raise GraphError(
                f"block {block.name!r}: slices is {block.slices!r}; give a whole number from 1 on"
            )
    sliced_blocks = [b for b in graph.blocks.values() if b.slices > 1]
    if not sliced_blocks:
        return graph
    shared = {use[0] for weight in graph.shared for use in weight.uses}
    for block in sliced_blocks:
        if block.name in shared:
            raise GraphError(
                f"block {block.name!r}: slices is {block.slices}, but it has a weight that another "
                "block uses, too; keep both users in one block, or slice others"
            )
    inputs = {INPUT: (tuple(u_shape), u_dtype), **(inputs or {})}
    shapes = {**graph.shapes(u_shape, u_dtype, inputs), **inputs}
    cuts = {b.name: _Cut(b, shapes) for b in sliced_blocks}
    outs = {b.name: _Out((b.name,)) for b in graph.blocks.values()}
    outs |= {name: cut.out for name, cut in cuts.items()}
    outs |= {name: _Out((name,)) for name in inputs}
    blocks: list[BlockSpec] = []
    parts: list[TensorSlice] = []
    origin: dict[str, str] = {}
    for block in graph.blocks.values():
        cut = cuts.get(block.name)
        blocks_of = [_reading(block, outs)] if cut is None else list(cut.blocks(outs, parts))
        blocks += blocks_of
        origin |= dict.fromkeys((b.name for b in blocks_of), block.name)
    origins = Sliced(graph, tuple(parts), origin)
    return Graph(blocks, sliced=origins, shared=graph.shared)


@dataclass(frozen=True)
class _Out:
    """The blocks that give the value of an unsliced block, to be joined on `axis`, or summed."""

    names: tuple[str, ...]
    axis: int | None = None

    @property
    def join(self) -> Join:
        return Join(len(self.names), self.axis)


def _reading(block: BlockSpec, outs: Mapping[str, _Out]) -> BlockSpec:
    """Return an unsliced block with parents that may be sliced."""
    sources = [outs[p] for p in block.parents]
    if all(len(out.names) == 1 for out in sources):
        names = {p: out.names[0] for p, out in zip(block.parents, sources, strict=True)}
        delays = {names[p]: d for p, d in block.delays.items()}
        return replace(block, parents=tuple(names.values()), delays=delays)
    if isinstance(block.combine, Joining):
        raise GraphError(
            f"block {block.name!r} joins its parents by itself, of which some are sliced; give it "
            "a Combine, or leave the slices out"
        )
    return replace(
        block,
        parents=tuple(name for out in sources for name in out.names),
        combine=Joining(tuple(out.join for out in sources), block.combine),
        delays={n: d for p, d in block.delays.items() for n in outs[p].names},
    )


class _Cut:
    """The blocks that one block becomes.

    out: the blocks that give its value; of a readout, the block that takes its loss.
    """

    def __init__(self, block: BlockSpec, shapes: ShapeMap) -> None:
        self.spec = block
        self._stages = SlicePhases(block, shapes)
        self.out = _Out((block.name,)) if block.loss is not None else self._out_of(self._last)

    @property
    def _last(self) -> SlicePhase:
        return self._stages.last

    def _name(self, stage: SlicePhase) -> str:
        """Return the name of a stage, without the number of the slice."""
        if stage is self._last and not stage.sliced:
            return self.spec.name
        if len(self._stages.stages) == 1:
            return self.spec.name
        n = stage.number
        return self.spec.name + ("abcdefghijklmnopqrstuvwxy"[n] if n < 25 else f"z{n - 25}")

    def _out_of(self, stage: SlicePhase) -> _Out:
        if not stage.sliced:
            return _Out((self._name(stage),))
        names = tuple(f"{self._name(stage)}_{i}" for i in range(self._stages.m))
        return _Out(names, self._stages.axis(stage))

    def blocks(self, outs: Mapping[str, _Out], parts: list[TensorSlice]) -> Iterator[BlockSpec]:
        """Yield the blocks in the order of their stages; add their tensors' origins to `parts`."""
        for stage in self._stages.stages:
            out = self._out_of(stage)
            for i, name in enumerate(out.names):
                yield self._block(stage, i, name, outs, parts)
        if self.spec.loss is not None and self._last.sliced:
            out = self._out_of(self._last)
            yield BlockSpec(
                self.spec.name,
                nn.Identity(),
                out.names,
                combine=Joining((out.join,)),
                loss=self.spec.loss,
            )

    def _block(
        self,
        stage: SlicePhase,
        i: int,
        name: str,
        outs: Mapping[str, _Out],
        parts: list[TensorSlice],
    ) -> BlockSpec:
        module = SliceModule(self._stages, stage, i, frozenset())
        joined = {f.stage for f in module.reads if f.piece is None and f.stage is not None}
        twice = {f.stage for f in module.reads if f.piece is not None and f.stage in joined}
        if twice:
            module = SliceModule(self._stages, stage, i, frozenset(twice))
        sources: list[_Out] = []
        delays: dict[str, int] = {}
        for source in module.reads:
            if source.parent is not None:
                parent = self.spec.parents[source.parent]
                sources.append(outs[parent])
                delay = self.spec.delays.get(parent, 1)
                delays |= dict.fromkeys(outs[parent].names, delay) if delay != 1 else {}
            else:
                out = self._out_of(self._stages.stages[source.stage or 0])
                sources.append(out if source.piece is None else _Out((out.names[source.piece],)))
        parts += [replace(part, block=name) for part in module.parts]
        joining = Joining(tuple(out.join for out in sources), Combine.ARGUMENTS)
        single = all(len(out.names) == 1 for out in sources)
        last = stage is self._last
        shape = self.spec.shape if last else None
        layout = self._stages.layouts.steps[module.sent].layout
        if shape is not None and isinstance(layout, Shard):
            size = self._stages.share(i, layout.units, layout.chunks).length(shape[layout.axis - 1])
            shape = (*shape[: layout.axis - 1], size, *shape[layout.axis :])
        readout = last and not stage.sliced and self.spec.loss is not None
        return BlockSpec(
            name,
            module.module,
            tuple(n for out in sources for n in out.names),
            combine=Combine.ARGUMENTS if single else joining,
            delays=delays,
            loss=self.spec.loss if readout else None,
            state=readout and self.spec.state,
            shape=shape,
        )
