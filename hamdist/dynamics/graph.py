"""The graph of blocks: what it is, and every check that needs no run.

An edge parent -> child carries the parent's state h forward and the child's message m backward.
The stream's input is the parent named `u`; nothing travels back to it.
B: batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from hamdist.dynamics.inputs import INPUT as INPUT
from hamdist.dynamics.inputs import Inputs, by_parent, is_input
from hamdist.dynamics.losses import LossFunction
from hamdist.errors import GraphError

OUTPUT_KEY = "output:"
# Modules that are run on zeros in a dry run, up to this many numbers in weights and input: a few
# milliseconds of arithmetic.
PLAIN_MODULES = ("torch.nn.", "hamdist.")
SMALL_WEIGHTS = 2**22
SMALL_INPUT = 2**16

T = TypeVar("T")

ShapeMap: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Combine(str, Enum):
    """How a module takes several parents: joined on the last axis, summed, or one argument each."""

    CONCAT = "concat"
    SUM = "sum"
    ARGUMENTS = "arguments"


@dataclass(frozen=True, slots=True)
class Join:
    """`parents` neighbouring parents as one input: joined on `axis`, or summed (axis None)."""

    parents: int = 1
    axis: int | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        if self.axis is None:
            return combined(Combine.SUM, tensors)[0]
        return torch.cat(list(tensors), dim=self.axis)


@dataclass(frozen=True, slots=True)
class Joining:
    """How a module takes parents of which some are slices of one (slices.py): the slices are joined
    first, then what comes out is taken as `then` says."""

    joins: tuple[Join, ...]
    then: Combine = Combine.CONCAT

    def groups(self, inputs: Sequence[T]) -> list[Sequence[T]]:
        """What is given by parent, by join."""
        ends = list(accumulate(join.parents for join in self.joins))
        return [inputs[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def joined(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [j.of(group) for j, group in zip(self.joins, self.groups(inputs), strict=True)]


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor of an unsliced block is now: all of `key` of `block`, or, with `index`, those
    of its places along `axis`. old, old_key: of the unsliced block."""

    old: str
    old_key: str
    block: str
    key: str
    axis: int | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Sliced:
    """What a graph was before slices: graph, parts of its tensors, by block the unsliced one."""

    graph: Graph
    parts: tuple[Part, ...]
    origin: Mapping[str, str]

    def gather(self, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The weights and buffers of the unsliced blocks, from those of the slices."""
        unsliced = [name for name in weights if self.origin[name] == name]
        whole = {name: dict(weights[name]) for name in unsliced}
        for part in self.parts:
            if part.old not in whole or part.old in unsliced:
                unsliced = [name for name in unsliced if name != part.old]
                own = self.graph.blocks[part.old].module.state_dict()
                whole[part.old] = {k: copy.deepcopy(v) for k, v in own.items()}
            piece = weights[part.block][part.key]
            if part.index is None or part.axis is None:
                whole[part.old][part.old_key] = piece
            else:
                whole[part.old][part.old_key].index_copy_(part.axis, part.index, piece)
        return whole


@dataclass(frozen=True, slots=True)
class Edge:
    """parent -> child. delay: ticks a signal needs, in either direction."""

    index: int
    parent: str
    child: str
    delay: int

    @property
    def name(self) -> str:
        return f"{self.parent}->{self.child}"

    @property
    def from_input(self) -> bool:
        return is_input(self.parent)


@dataclass(frozen=True)
class BlockSpec:
    """One block: f(h_parents; theta) and where its inputs come from.

    parents: names in the order in which the module takes them; `u` is the stream's input. The
    block itself, or one listed behind it, is read in a sequence as it was at the token before.
    delays: ticks of the edge from a parent, where it is not 1.
    loss: makes the block a readout. Without `state` a readout is an output net (HL Eq. 4): it
    predicts from its parents' states and has none of its own; with `state` it is a state block and
    predicts output(h), or h itself where `output` is None.
    shape: of h without the batch; needed for one block of every cycle, where it cannot be derived.
    initial: h_0 without the batch, where it is not zero (presentation 'hold').
    slices: over how many blocks its neurons are spread (slices.py).
    """

    name: str
    module: nn.Module
    parents: tuple[str, ...]
    combine: Combine | Joining = Combine.CONCAT
    delays: Mapping[str, int] = field(default_factory=dict)
    loss: LossFunction | None = None
    state: bool = False
    output: nn.Module | None = None
    shape: tuple[int, ...] | None = None
    initial: Tensor | None = None
    slices: int = 1

    @property
    def has_state(self) -> bool:
        return self.loss is None or self.state


def combined(combine: Combine | Joining, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The arguments of the module: the inputs joined, summed in their order, or as they are."""
    if isinstance(combine, Joining):
        return combined(combine.then, combine.joined(inputs))
    if len(inputs) < 2 or combine is Combine.ARGUMENTS:
        return list(inputs)
    if combine is Combine.CONCAT:
        return [torch.cat(list(inputs), dim=-1)]
    total = inputs[0]
    for tensor in inputs[1:]:
        total = total + tensor
    return [total]


class Graph:
    """A checked directed graph of blocks, in the order given; edges in the order of the parents.

    original: the module that was cut into these blocks, if one was; its `state_dict` keys are those
    of the blocks' modules. sliced: what the graph was before its slices (slices.py). notes: what to
    tell about the way it was cut.

    Raises GraphError, naming the blocks: a name twice, an unknown or doubled parent, a delay below
    one tick, a block without parents, no readout, no path to a readout, a child of an output net,
    parameters shared by blocks.
    """

    def __init__(
        self,
        blocks: Iterable[BlockSpec],
        *,
        original: nn.Module | None = None,
        sliced: Sliced | None = None,
    ) -> None:
        self.sliced = sliced
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
        self._check_names()
        self._check_delays()
        self._check_readouts()
        self._check_parameters()
        self.into = {b: [e for e in self.edges if e.child == b] for b in self.blocks}
        self.out_of = {b: [e for e in self.edges if e.parent == b] for b in self.blocks}
        self.out_of[INPUT] = [e for e in self.edges if e.from_input]
        self.notes: list[str] = []
        self.depths = self._depths()
        self._original = original

    # -- checks -----------------------------------------------------------------------------

    def _check_names(self) -> None:
        if not self.blocks:
            raise GraphError("the graph has no blocks; give it at least a readout")
        for block in self.blocks.values():
            if not block.name or block.name == INPUT or "->" in block.name or "." in block.name:
                raise GraphError(
                    f"block {block.name!r}: a name is not empty, not {INPUT!r} (the stream's "
                    "input) and holds neither '->' nor '.'"
                )
            if hasattr(nn.ModuleDict(), block.name):
                raise GraphError(
                    f"block {block.name!r}: torch keeps this name for itself; choose another"
                )
            if not block.parents:
                raise GraphError(
                    f"block {block.name!r} has no parents; name the blocks it reads, or {INPUT!r}"
                )
            for parent in (*block.parents, *block.delays):
                if not is_input(parent) and parent not in self.blocks:
                    known = ", ".join((INPUT, *self.blocks))
                    raise GraphError(
                        f"block {block.name!r} has the unknown parent {parent!r}; known: {known}"
                    )
            for parent in block.delays:
                if parent not in block.parents:
                    raise GraphError(
                        f"block {block.name!r} has a delay for {parent!r}, which is not its parent"
                    )
            for parent in block.parents:
                if block.parents.count(parent) > 1:
                    raise GraphError(
                        f"block {block.name!r} names its parent {parent!r} twice; one edge joins "
                        "two blocks, so repeat the input inside the module"
                    )

    def _check_delays(self) -> None:
        for edge in self.edges:
            if isinstance(edge.delay, bool) or not isinstance(edge.delay, int):
                raise GraphError(f"edge {edge.name}: delay {edge.delay!r} is no whole number")
            if edge.delay < 1:
                cycle = self._zero_delay_cycle()
                found = f"; it lies on the zero-delay cycle {' -> '.join(cycle)}" if cycle else ""
                raise GraphError(
                    f"edge {edge.name} has delay {edge.delay}{found}: a signal needs at least one "
                    "tick; for an instantaneous connection put both into one block"
                )

    def _zero_delay_cycle(self) -> list[str]:
        zero = {
            b: [e.child for e in self.edges if e.parent == b and e.delay < 1] for b in self.blocks
        }

        def walk(path: list[str]) -> list[str]:
            for child in zero[path[-1]]:
                if child in path:
                    return [*path[path.index(child) :], child]
                found = walk([*path, child])
                if found:
                    return found
            return []

        return next((c for c in (walk([b]) for b in self.blocks) if c), [])

    def _check_readouts(self) -> None:
        if not self.readouts:
            raise GraphError(
                "no block has a loss, so nothing is learned; give the last block a loss"
            )
        for edge in self.edges:
            parent = self.blocks.get(edge.parent)
            if parent is not None and not parent.has_state:
                raise GraphError(
                    f"block {edge.child!r} reads {edge.parent!r}, an output net, which has no "
                    "state; read its parents instead, or give it a state (state=True)"
                )
        for block in self.blocks.values():
            if block.output is not None and not (block.loss is not None and block.state):
                raise GraphError(
                    f"block {block.name!r} has an output module but is no readout with a state"
                )
        reached = _reach(self.readouts, ((e.child, e.parent) for e in self.edges))
        lost = [b for b in self.blocks if b not in reached]
        if lost:
            raise GraphError(
                f"no path leads from {_names(lost)} to a readout, so no message ever comes back; "
                "connect or remove them"
            )

    def _check_parameters(self) -> None:
        owner: dict[int, tuple[str, str]] = {}
        for name, module in ((b.name, m) for b in self.blocks.values() for m in _modules(b)):
            for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                other = owner.setdefault(id(tensor), (name, key))
                if other[0] != name:
                    what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                    raise GraphError(
                        f"blocks {other[0]!r} and {name!r} share a {what} ({other[1]!r} and "
                        f"{key!r}); a weight belongs to one block, so keep both in one block or "
                        "give each its own"
                    )

    # -- structure --------------------------------------------------------------------------

    @property
    def readouts(self) -> list[str]:
        return [b.name for b in self.blocks.values() if b.loss is not None]

    @cached_property
    def acyclic(self) -> bool:
        return len(self._topological()) == len(self.blocks)

    def _topological(self) -> list[str]:
        """Blocks with parents first; those on or behind a cycle are missing."""
        waiting = {b.name: sum(not is_input(p) for p in b.parents) for b in self.blocks.values()}
        ready = [name for name, parents in waiting.items() if not parents]
        for name in ready:
            for edge in self.out_of[name]:
                waiting[edge.child] -= 1
                if not waiting[edge.child]:
                    ready.append(edge.child)
        return ready

    def cycle(self) -> list[str]:
        """The blocks that lie on or behind a cycle."""
        ordered = set(self._topological())
        return [b for b in self.blocks if b not in ordered]

    def _depths(self) -> dict[str, int]:
        """Ticks until a sample reaches a block: by the longest path from the input in an acyclic
        graph (semantics.md), by the shortest where there are cycles; the input's own edges count
        from their second tick. Blocks that no input reaches have depth 0."""
        depths = {INPUT: -1, **{e.parent: -1 for e in self.out_of[INPUT]}}
        if self.acyclic:
            for name in self._topological():
                reach = [depths[e.parent] + e.delay for e in self.into[name] if e.parent in depths]
                if reach:
                    depths[name] = max(reach)
        else:
            for _ in self.blocks:
                for edge in self.edges:
                    if edge.parent in depths:
                        reach_by = depths[edge.parent] + edge.delay
                        depths[edge.child] = min(reach_by, depths.get(edge.child, reach_by))
        return {b: depths.get(b, 0) for b in self.blocks}

    @property
    def depth(self) -> int:
        """D: the depth of the deepest readout."""
        return max(self.depths[r] for r in self.readouts)

    def unreached(self) -> list[str]:
        """Blocks to which no path leads from the input."""
        reached = _reach(self._inputs, ((e.parent, e.child) for e in self.edges))
        return [b for b in self.blocks if b not in reached]

    @cached_property
    def adrift(self) -> set[str]:
        """Blocks that no chain of edges, in either direction, joins with the input."""
        ways = [(e.parent, e.child) for e in self.edges]
        return self.blocks.keys() - _reach(self._inputs, [*ways, *((b, a) for a, b in ways)])

    @property
    def _inputs(self) -> list[str]:
        return list(dict.fromkeys([INPUT, *(e.parent for e in self.out_of[INPUT])]))

    def parameters(self) -> dict[str, list[str]]:
        """The names of the weights by block, those of an output module behind `output:`."""
        names = {}
        for block in self.blocks.values():
            own = [n for n, p in block.module.named_parameters() if p.requires_grad]
            if block.output is not None:
                outer = block.output.named_parameters()
                own += [OUTPUT_KEY + n for n, p in outer if p.requires_grad]
            names[block.name] = own
        return names

    def recurrent(self, edge: Edge) -> bool:
        """Whether `edge` leads from a block to itself or to one listed before it: in a sequence it
        carries the state of the token before."""
        if edge.from_input:
            return False
        order = list(self.blocks)
        return order.index(edge.child) <= order.index(edge.parent)

    # -- shapes -----------------------------------------------------------------------------

    def shapes(
        self, u_shape: Sequence[int], u_dtype: torch.dtype, several: ShapeMap | None = None
    ) -> ShapeMap:
        """Shape and type of every block's h (of an output net: its prediction), by a dry run on a
        copy of its module (`_probes`). u_shape: with the batch in front. several: those of the
        inputs by parent (`u.NAME`), where there is more than one.

        Raises GraphError naming the block whose module does not take its parents' shapes, or the
        input that the stream does not have.
        """
        batch = u_shape[0]
        known: ShapeMap = dict(several or {INPUT: (tuple(u_shape), u_dtype)})
        for edge in self.out_of[INPUT]:
            if edge.parent not in known:
                raise GraphError(
                    f"block {edge.child!r} reads the input {edge.parent!r}, but the stream has "
                    f"{', '.join(map(repr, known))}; name one of these"
                )
        cyclic = set(self.cycle())
        for name in cyclic:
            shape = self.blocks[name].shape
            if shape is not None:
                known[name] = ((batch, *shape), _dtype(self.blocks[name].module, u_dtype))
        waiting = list(self.blocks)
        found: ShapeMap = {}
        while waiting:
            ready = [n for n in waiting if all(p in known for p in self.blocks[n].parents)]
            if not ready:
                raise GraphError(
                    f"the shapes of {_names(waiting)} depend on each other; give one block of "
                    "each cycle its shape (shape=..., without the batch)"
                )
            for name in ready:
                found[name] = self._dry_run(name, known)
                declared = known.setdefault(name, found[name])
                if declared[0] != found[name][0]:
                    raise GraphError(
                        f"block {name!r} gives h of shape {found[name][0]}, but shape="
                        f"{self.blocks[name].shape} was declared (batch {batch} in front)"
                    )
                self._check_initial(name, declared[0])
                waiting.remove(name)
        return found

    def _check_initial(self, name: str, shape: tuple[int, ...]) -> None:
        block = self.blocks[name]
        if block.initial is None:
            return
        if not block.has_state:
            raise GraphError(f"block {name!r} is an output net, which has no initial state")
        if tuple(block.initial.shape) != shape[1:]:
            raise GraphError(
                f"block {name!r} has an initial state of shape {tuple(block.initial.shape)}, but "
                f"its h has {shape[1:]} (without the batch)"
            )

    def _dry_run(self, name: str, known: ShapeMap) -> tuple[tuple[int, ...], torch.dtype]:
        block = self.blocks[name]
        shapes = [known[p] for p in block.parents]
        given = ", ".join(
            f"{p} {tuple(s)}" for p, (s, _) in zip(block.parents, shapes, strict=True)
        )
        h = self._run_on(name, block.module, block.combine, shapes, given)
        if not isinstance(h, Tensor):
            raise GraphError(
                f"block {name!r} returned {type(h).__name__}, not a tensor; return the one tensor "
                "that its children read"
            )
        if h.dim() == 0 or h.shape[0] != shapes[0][0][0]:
            raise GraphError(
                f"block {name!r} turns {given} into {tuple(h.shape)}: the batch must stay in front"
            )
        if block.output is not None:
            state = [(tuple(h.shape), h.dtype)]
            self._run_on(name, block.output, block.combine, state, f"its own h {tuple(h.shape)}")
        return tuple(h.shape), h.dtype

    def _run_on(
        self,
        name: str,
        module: nn.Module,
        combine: Combine | Joining,
        shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
        given: str,
    ) -> object:
        """`module` on tensors of `shapes`, on the first device that takes them."""
        for device in _probes(module, shapes):
            probe = copy.deepcopy(module).to(device)
            inputs = [torch.zeros(s, dtype=t, device=device) for s, t in shapes]
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    return probe(*combined(combine, inputs))
            except NotImplementedError:
                continue
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                if device == "meta" and "meta" in str(error).lower():
                    continue
                reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                raise GraphError(
                    f"block {name!r} ({type(module).__name__}) does not take its input {given}: "
                    f"{reason}"
                ) from error
        raise GraphError(f"block {name!r} cannot be run on its input {given}")

    # -- copies and the way back --------------------------------------------------------------

    def copy(self) -> Graph:
        """The same graph over copies of the modules."""
        blocks = [
            BlockSpec(**{**vars(b), "module": m, "output": o})
            for b in self.blocks.values()
            for m, o in [copy.deepcopy((b.module, b.output))]
        ]
        return self.over(blocks)

    def over(self, blocks: Iterable[BlockSpec]) -> Graph:
        """The same graph over `blocks`, which are its own in another form."""
        made = Graph(blocks, original=self._original, sliced=self.sliced)
        made.notes = list(self.notes)
        return made

    @property
    def unsliced(self) -> Graph:
        """The graph before slices: itself, if it has none."""
        return self if self.sliced is None else self.sliced.graph

    def merge(
        self, weights: Mapping[str, Mapping[str, Tensor]], whole: nn.Module | None = None
    ) -> nn.Module:
        """A plain module with the blocks' `weights`: parameters and buffers, by block and key (keys
        of an output module begin with `output:`).

        For a split model its `state_dict` has the original keys; for a graph built by hand the
        module is `whole`, which has the keys of a `MergedGraph`, or a `MergedGraph`. Slices are
        put together.
        """
        if self.sliced is not None:
            return self.sliced.graph.merge(self.sliced.gather(weights), whole)
        state: dict[str, Tensor] = {}
        if self._original is not None:
            merged = copy.deepcopy(self._original)
            state.update(merged.state_dict())  # of parts that no block uses
        else:
            merged = MergedGraph(self) if whole is None else whole
        for name, tensors in weights.items():
            for key, tensor in tensors.items():
                part = "output" if key.startswith(OUTPUT_KEY) else "module"
                prefix = f"blocks.{name}.{part}." if self._original is None else ""
                state[prefix + key.removeprefix(OUTPUT_KEY)] = tensor
        persistent = merged.state_dict().keys()
        merged.load_state_dict({k: v for k, v in state.items() if k in persistent}, strict=True)
        for key, buffer in merged.named_buffers():
            if key not in persistent and key in state:
                buffer.copy_(state[key])
        return merged


class MergedGraph(nn.Module):
    """The graph as one feed-forward module: u -> the readout's prediction (or a dict of them).

    With cycles the states are relaxed from h_0 by h <- f(h_parents) `relax` times (cτ = 1).
    """

    def __init__(self, graph: Graph, relax: int = 100) -> None:
        super().__init__()
        self.relax = relax
        self.order = graph._topological() if graph.acyclic else list(graph.blocks)
        self.acyclic = graph.acyclic
        self.readouts = graph.readouts
        self.parents = {b.name: b.parents for b in graph.blocks.values()}
        self.combines = {b.name: b.combine for b in graph.blocks.values()}
        self.shapes = {b.name: b.shape for b in graph.blocks.values()}
        self.initial = {b.name: b.initial for b in graph.blocks.values()}
        self.blocks = nn.ModuleDict(
            {b.name: copy.deepcopy(_whole(b)) for b in graph.blocks.values()}
        )

    def _whole(self, name: str) -> _Whole:
        return cast(_Whole, self.blocks[name])

    def _f(self, name: str, h: Mapping[str, Tensor]) -> Tensor:
        inputs = [h[p] for p in self.parents[name]]
        result: Tensor = self._whole(name).module(*combined(self.combines[name], inputs))
        return result

    def forward(self, u: Inputs | None = None, **several: Tensor) -> Tensor | dict[str, Tensor]:
        """u: (B, ...), or several inputs by name, as one mapping or as keyword arguments."""
        h = by_parent(several if u is None else u)
        u = next(iter(h.values()))
        for name, shape in self.shapes.items():
            if not self.acyclic and shape is not None:
                dtype = _dtype(self._whole(name).module, u.dtype)
                h[name] = torch.zeros(u.shape[0], *shape, dtype=dtype, device=u.device)
                initial = self.initial[name]
                if initial is not None:
                    h[name] = h[name] + initial.to(h[name])
        if self.acyclic:
            for name in self.order:
                h[name] = self._f(name, h)
        else:
            for _ in range(self.relax):
                ready = [n for n in self.order if all(p in h for p in self.parents[n])]
                h = {**h, **{n: self._f(n, h) for n in ready}}
        outputs = {}
        for name in self.readouts:
            output = self._whole(name).output
            outputs[name] = h[name] if output is None else output(h[name])
        return outputs[self.readouts[0]] if len(self.readouts) == 1 else outputs


def _reach(starts: Iterable[str], ways: Iterable[tuple[str, str]]) -> set[str]:
    """All that can be reached from `starts` along `ways`, given as (from, to)."""
    onward: dict[str, list[str]] = {}
    for a, b in ways:
        onward.setdefault(a, []).append(b)
    reached: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += onward.get(name, [])
    return reached


class _Whole(nn.Module):
    """A block's module and its output module under one name."""

    def __init__(self, module: nn.Module, output: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self.output = output


def _whole(block: BlockSpec) -> nn.Module:
    return _Whole(block.module, block.output)


def _dtype(module: nn.Module, u_dtype: torch.dtype) -> torch.dtype:
    """The type of a state that is declared by its shape: of the weights, or of the input."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter.dtype
    return u_dtype if u_dtype.is_floating_point else torch.get_default_dtype()


def _modules(block: BlockSpec) -> list[nn.Module]:
    return [block.module] if block.output is None else [block.module, block.output]


def _probes(
    module: nn.Module, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> tuple[str, ...]:
    """Where a dry run of `module` is tried: on meta tensors, and on zeros where it reads values.

    On zeros alone where types differ, which meta tensors let pass; and where it is cheaper: the
    first use of meta tensors imports about a second of torch, the arithmetic of a small module of
    torch's own (which does nothing but arithmetic) takes less than a millisecond.
    """
    types = {t for _, t in shapes if t.is_floating_point}
    types |= {p.dtype for p in module.parameters() if p.is_floating_point()}
    if len(types) > 1:
        return ("cpu",)
    weights = sum(p.numel() for p in module.parameters())
    inputs = sum(math.prod(shape) for shape, _ in shapes)
    plain = all(type(m).__module__.startswith(PLAIN_MODULES) for m in module.modules())
    if plain and weights <= SMALL_WEIGHTS and inputs <= SMALL_INPUT:
        return ("cpu",)
    return ("meta", "cpu")


def _names(blocks: Sequence[str]) -> str:
    noun = "block" if len(blocks) == 1 else "blocks"
    return f"{noun} {', '.join(repr(b) for b in blocks)}"
