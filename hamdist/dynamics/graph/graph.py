"""The graph of blocks: structure, shapes (B: batch), and the way back to a plain module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hamdist.display.network import NetworkPicture, network_picture
from hamdist.dynamics.graph import checks as graph_checks
from hamdist.dynamics.graph.inputs import INPUT, is_input
from hamdist.dynamics.graph.shapes import check_initial, declared_dtype, shape_of
from hamdist.dynamics.graph.spec import (
    OUTPUT_KEY,
    BlockSpec,
    Combine,
    Edge,
    Join,
    Joining,
    ShapeMap,
    SharedWeight,
    Tie,
    as_network,
    combined,
    names_text,
    reach,
)
from hamdist.dynamics.graph.ties import shared_weights, ties_of
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import GraphError

EXTRA = "_extra_state"  # what a module says of itself in its state_dict

__all__ = [
    "INPUT",
    "OUTPUT_KEY",
    "BlockSpec",
    "Combine",
    "Edge",
    "Graph",
    "Join",
    "Joining",
    "ShapeMap",
    "SharedWeight",
    "Sliced",
    "TensorSlice",
    "Tie",
    "combined",
]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Place of a part of an unsliced block's tensor in the blocks that replace it.

    All of `key` of `block`, or, with `index`, those of its places along `axis`. old, old_key: the
    unsliced block and the name of the tensor there.
    """

    old: str
    old_key: str
    block: str
    key: str
    axis: int | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Sliced:
    """The graph before its blocks were sliced, and where its tensors are now.

    Attributes:
        graph: the unsliced graph.
        parts: the parts of its tensors.
        origin: by block of the sliced graph the unsliced block.
    """

    graph: Graph
    parts: tuple[TensorSlice, ...]
    origin: Mapping[str, str]

    def gather(self, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the weights and buffers of the unsliced blocks, put together from the slices."""
        unsliced = [name for name in weights if self.origin[name] == name]
        whole = {name: dict(weights[name]) for name in unsliced}
        for part in self.parts:
            if part.old not in whole or part.old in unsliced:
                unsliced = [name for name in unsliced if name != part.old]
                state = self.graph.blocks[part.old].module.state_dict()
                whole[part.old] = {k: copy.deepcopy(v) for k, v in state.items()}
            piece = weights[part.block][part.key]
            if part.index is None or part.axis is None:
                whole[part.old][part.old_key] = piece
            else:
                whole[part.old][part.old_key].index_copy_(part.axis, part.index, piece)
        return whole


class Graph:
    """A checked directed graph of blocks, in the order given; edges in the order of the parents.

    Args:
        blocks: the blocks, each with the names of its parents.
        original: the module that was cut into these blocks, if one was; its `state_dict` keys are
            those of the blocks' modules.
        sliced: the graph before its blocks were sliced, if they were.
        shared: the weights that several blocks shared before `apart` gave each block a copy.

    Attributes:
        notes: warnings about the way in which the model was cut.
        example: inputs by parent, for dry runs of modules that look at values.

    Raises:
        GraphError: names the blocks, for a name that occurs twice, an unknown or doubled parent, a
            delay below one tick, a block without parents, no readout, no path to a readout, a
            child of an output net, or buffers shared by blocks.
    """

    def __init__(
        self,
        blocks: Iterable[BlockSpec],
        *,
        original: nn.Module | None = None,
        sliced: Sliced | None = None,
        shared: Sequence[SharedWeight] = (),
    ) -> None:
        self.sliced = sliced
        self.shared = tuple(shared)
        self.blocks: dict[str, BlockSpec] = {}
        for block in blocks:
            if block.name in self.blocks:
                raise GraphError(f"two blocks are named {block.name!r}; give each its own name")
            self.blocks[block.name] = block
        self.edges: list[Edge] = []
        for block in self.blocks.values():
            for parent in block.parents:
                delay = block.delays.get(parent, 1)
                self.edges.append(Edge(len(self.edges), parent, block.name, delay))
        graph_checks.check_names(self.blocks)
        graph_checks.check_delays(self.edges)
        graph_checks.check_readouts(self.blocks, self.edges)
        graph_checks.check_parameters(self.blocks)
        self.into: dict[str, list[Edge]] = {b: [] for b in self.blocks}
        self.out_of: dict[str, list[Edge]] = {b: [] for b in (*self.blocks, INPUT)}
        for edge in self.edges:
            self.into[edge.child].append(edge)
            self.out_of[INPUT if edge.from_input else edge.parent].append(edge)
        self.notes: list[str] = []
        self.one_length: str | None = None
        self.one_row: str | None = None
        self.state: set[str] = set()  # Python state that forwards change, once shapes are known
        self.example: Mapping[str, Tensor] = {}
        self.depths = self._depths()
        self.original = original

    # -- structure --------------------------------------------------------------------------

    @property
    def was_cut(self) -> bool:
        """Return True if a module was cut into these blocks, False if they were built by hand."""
        return self.original is not None

    @property
    def readouts(self) -> list[str]:
        """Return the names of the blocks with a loss."""
        return [b.name for b in self.blocks.values() if b.loss is not None]

    @cached_property
    def acyclic(self) -> bool:
        """Return True if no block depends on its own state."""
        return len(self._topological()) == len(self.blocks)

    def _topological(self) -> list[str]:
        """Return the blocks with parents first, without those on or behind a cycle."""
        waiting = {b.name: sum(not is_input(p) for p in b.parents) for b in self.blocks.values()}
        ready = [name for name, parents in waiting.items() if not parents]
        for name in ready:
            for edge in self.out_of[name]:
                waiting[edge.child] -= 1
                if not waiting[edge.child]:
                    ready.append(edge.child)
        return ready

    def cycle(self) -> list[str]:
        """Return the blocks that lie on or behind a cycle."""
        ordered = set(self._topological())
        return [b for b in self.blocks if b not in ordered]

    def _depths(self) -> dict[str, int]:
        """Return the ticks until a sample reaches each block.

        That is the longest path from the input in an acyclic graph (docs:
        concepts/time-and-signals), the shortest where there are cycles. The input's own edges
        count from their second tick. A block that no input reaches has depth 0.
        """
        depths = {INPUT: -1, **{e.parent: -1 for e in self.out_of[INPUT]}}
        if self.acyclic:
            for name in self._topological():
                reach = [depths[e.parent] + e.delay for e in self.into[name] if e.parent in depths]
                if reach:
                    depths[name] = max(reach)
        else:
            before: dict[str, int] = {}
            while depths != before:
                before = dict(depths)
                for edge in (edge for edge in self.edges if edge.parent in depths):
                    reach_by = depths[edge.parent] + edge.delay
                    depths[edge.child] = min(reach_by, depths.get(edge.child, reach_by))
        return {b: depths.get(b, 0) for b in self.blocks}

    @property
    def depth(self) -> int:
        """Return D, the depth of the deepest readout."""
        return max(self.depths[r] for r in self.readouts)

    def unreached(self) -> list[str]:
        """Return the blocks to which no path leads from the input."""
        reached = reach(self._inputs, ((e.parent, e.child) for e in self.edges))
        return [b for b in self.blocks if b not in reached]

    @cached_property
    def adrift(self) -> set[str]:
        """Return the blocks that no chain of edges, in either direction, joins with the input."""
        ways = [(e.parent, e.child) for e in self.edges]
        return self.blocks.keys() - reach(self._inputs, [*ways, *((b, a) for a, b in ways)])

    @property
    def _inputs(self) -> list[str]:
        return list(dict.fromkeys([INPUT, *(e.parent for e in self.out_of[INPUT])]))

    def parameters(self) -> dict[str, list[str]]:
        """Return the names of the weights by block, those of an output module behind `output:`."""
        names = {}
        for name, block in self.blocks.items():
            weights = [
                (p + n, w) for p, m in block.modules.items() for n, w in m.named_parameters()
            ]
            foreign = self.foreign_weights(name)
            names[name] = [n for n, w in weights if w.requires_grad and n not in foreign]
        return names

    def foreign_weights(self, block: str) -> set[str]:
        """Return the names of the weights of a block that belong to another block.

        Args:
            block: its name.
        """
        return {key for tie in self.ties if tie.user == block for key in tie.theirs}

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """Return the pairs of owner and user of each shared weight (presentation 'pulse')."""
        if not self.shared:
            return ()
        back = {b: 2 * self.depth - depth for b, depth in self.depths.items()}
        return ties_of(self.shared, {**back, **{r: self.depths[r] for r in self.readouts}})

    def apart(self) -> Graph:
        """Return this graph with a copy of every shared weight per block, recorded in `shared`.

        The graph itself is returned if no weight is shared.
        """
        seen: set[int] = set()
        blocks = []
        for block in self.blocks.values():
            ids = {id(p) for p in block.module.parameters()}
            copied = copy.deepcopy(block.module) if ids & seen else block.module
            blocks.append(BlockSpec(**{**vars(block), "module": copied}))
            seen |= ids
        shared = shared_weights(self.blocks.values())
        changed = any(b.module is not self.blocks[b.name].module for b in blocks)
        return self.over(blocks, shared) if changed else self

    def silent(self) -> frozenset[str]:
        """Return the blocks to which no message needs to be sent.

        These blocks, and all on a way to them, have no weights that learn, and one of them has
        frozen ones (`requires_grad` is False). The set is empty if they have no weights at all:
        then whoever observes their costates gets them.
        """
        learning = {name for name, weights in self.parameters().items() if weights}
        trained = learning | {tie.user for tie in self.ties}
        unmoved = self.blocks.keys() - reach(trained, ((e.parent, e.child) for e in self.edges))
        frozen = any(next(self.blocks[b].module.parameters(), None) is not None for b in unmoved)
        return frozenset(unmoved) if frozen else frozenset()

    def recurrent(self, edge: Edge) -> bool:
        """Return True if an edge of a sequence carries the state of the previous token.

        Args:
            edge: it does if it leads from a block to itself, or to one listed before it.
        """
        if edge.from_input:
            return False
        return self._places[edge.child] <= self._places[edge.parent]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.blocks)}

    # -- shapes -----------------------------------------------------------------------------

    def shapes(
        self, u_shape: Sequence[int], u_dtype: torch.dtype, several: ShapeMap | None = None
    ) -> ShapeMap:
        """Return shape and dtype of every block's h (of an output net: its prediction).

        They come from a dry run on a copy of each module (graph/shapes.py).

        Args:
            u_shape, u_dtype: shape of the input, with the batch in front, and its type.
            several: shapes and dtypes of the inputs by parent (`u.NAME`), if there are several.

        Raises:
            GraphError: names the block whose module does not take its parents' shapes, or the
                input that the stream does not have.
        """
        batch = u_shape[0]
        by_name: ShapeMap = dict(several or {INPUT: (tuple(u_shape), u_dtype)})
        for edge in self.out_of[INPUT]:
            if edge.parent not in by_name:
                raise GraphError(
                    f"block {edge.child!r} reads the input {edge.parent!r}, but the stream has "
                    f"{', '.join(map(repr, by_name))}; name one of these"
                )
        cyclic = set(self.cycle())
        for name in cyclic:
            shape = self.blocks[name].shape
            if shape is not None:
                by_name[name] = ((batch, *shape), declared_dtype(self.blocks[name].module, u_dtype))
        shapes: ShapeMap = {}
        missing = {n: {*b.parents} - by_name.keys() for n, b in self.blocks.items()}
        ready = [name for name in self.blocks if not missing[name]]
        while ready:
            freed: set[str] = set()
            for name in ready:
                shapes[name] = shape_of(self.blocks[name], by_name, self.example, self.state)
                declared = by_name.setdefault(name, shapes[name])
                if declared[0] != shapes[name][0]:
                    raise GraphError(
                        f"block {name!r} gives h of shape {shapes[name][0]}, but shape="
                        f"{self.blocks[name].shape} was declared (batch {batch} in front)"
                    )
                check_initial(self.blocks[name], declared[0])
                children = {e.child for e in self.out_of[name] if name in missing[e.child]}
                for child in children:
                    missing[child].remove(name)
                freed |= {child for child in children if not missing[child]}
            ready = sorted(freed, key=self._places.__getitem__)
        if waiting := [n for n in self.blocks if n not in shapes]:
            raise GraphError(
                f"the shapes of {names_text(waiting)} depend on each other; give one block of "
                "each cycle its shape (shape=..., without the batch)"
            )
        return shapes

    def draw(self) -> NetworkPicture:
        """Return a picture of the blocks and edges; `save` it as .svg or .dot."""
        network = as_network(self.blocks, self.parameters(), self.edges, self.depths, {}, {})
        return network_picture(network, f"{len(self.blocks)} blocks")

    def _repr_svg_(self) -> str:
        return self.draw().svg

    # -- copies and the way back --------------------------------------------------------------

    def copy(self) -> Graph:
        """Return the same graph over copies of the modules; what is shared stays shared."""
        memo: dict[int, object] = {}
        blocks = [
            BlockSpec(**{**vars(b), "module": m, "output": o})
            for b in self.blocks.values()
            for m, o in [copied((b.module, b.output), memo)]
        ]
        return self.over(blocks)

    def over(
        self, blocks: Iterable[BlockSpec], shared: Sequence[SharedWeight] | None = None
    ) -> Graph:
        """Return the same graph over `blocks`, which are its own blocks in another form.

        Args:
            blocks: as for a graph.
            shared: as for a graph; None if that does not change.
        """
        shared = self.shared if shared is None else shared
        graph = Graph(blocks, original=self.original, sliced=self.sliced, shared=shared)
        graph.notes, graph.example = list(self.notes), self.example
        graph.one_length, graph.one_row = self.one_length, self.one_row
        return graph

    @property
    def unsliced(self) -> Graph:
        """Return the graph before its blocks were sliced; itself if none was."""
        return self if self.sliced is None else self.sliced.graph
