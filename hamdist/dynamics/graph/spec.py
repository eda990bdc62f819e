"""The elements of a graph: blocks, edges, and the ways in which a module takes its parents.

An edge parent -> child carries the parent's state h forward and the child's message m backward.
The stream's input is the parent named `u`; nothing travels back to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hamdist.display.network import NetworkActor, NetworkBlock, NetworkEdge, PlacedNetwork
from hamdist.dynamics.graph.inputs import is_input
from hamdist.dynamics.objective.losses import LossFunction
from hamdist.dynamics.rules.rule import Rule

OUTPUT_KEY = "output:"

T = TypeVar("T")

# By block or input: the shape, batch in front, and the type.
ShapeMap: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Combine(str, Enum):
    """Ways in which a module takes several parents.

    `concat`: concatenated on the last axis; `sum`: summed; `arguments`: one argument each.
    """

    CONCAT = "concat"
    SUM = "sum"
    ARGUMENTS = "arguments"


@dataclass(frozen=True, slots=True)
class Join:
    """Neighbouring parents taken as one input.

    Attributes:
        parents: number of parents.
        axis: axis on which they are concatenated; None to sum them.
    """

    parents: int = 1
    axis: int | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors of these parents as one."""
        if len(tensors) == 1:
            return tensors[0]
        if self.axis is None:
            return combined(Combine.SUM, tensors)[0]
        return torch.cat(list(tensors), dim=self.axis)


@dataclass(frozen=True, slots=True)
class Joining:
    """Combination of parents of which some are slices of one block.

    The slices are joined first; the results are taken as `then` says.
    """

    joins: tuple[Join, ...]
    then: Combine = Combine.CONCAT

    def groups(self, inputs: Sequence[T]) -> list[Sequence[T]]:
        """Return the inputs by join."""
        ends = list(accumulate(join.parents for join in self.joins))
        return [inputs[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def joined(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per join."""
        return [j.of(group) for j, group in zip(self.joins, self.groups(inputs), strict=True)]


def combined(combine: Combine | Joining, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the arguments of the module: inputs concatenated, summed in order, or as they are."""
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


@dataclass(frozen=True, slots=True)
class Edge:
    """The directed edge parent -> child.

    Attributes:
        delay: ticks that a signal needs, in either direction.
    """

    index: int
    parent: str
    child: str
    delay: int

    @property
    def name(self) -> str:
        """Return `parent->child`, as figures and errors show it."""
        return f"{self.parent}->{self.child}"

    @property
    def from_input(self) -> bool:
        """Return True if the parent is an input of the stream."""
        return is_input(self.parent)


@dataclass(frozen=True, slots=True)
class SharedWeight:
    """One weight that several blocks use.

    Attributes:
        uses: (block, name of the weight there), in the order of the graph.
        numel: number of its elements.
    """

    uses: tuple[tuple[str, str], ...]
    numel: int


@dataclass(frozen=True, slots=True)
class Tie:
    """Two blocks with the same weights: `user` has copies of weights of `owner`.

    Gradients travel to the owner, weights come back.

    Attributes:
        keys: (name in the owner, name in the user) of each weight.
        numel: number of elements of all of them.
    """

    index: int
    owner: str
    user: str
    keys: tuple[tuple[str, str], ...]
    numel: int

    @property
    def name(self) -> str:
        """Return `owner<->user`, as figures and errors show it."""
        return f"{self.owner}<->{self.user}"

    @property
    def owners(self) -> list[str]:
        """Return the names of the weights in the owner's module."""
        return [key for key, _ in self.keys]

    @property
    def theirs(self) -> list[str]:
        """Return the names of the weights in the user's module."""
        return [key for _, key in self.keys]


@dataclass(frozen=True)
class BlockSpec:
    """One block: f(h_parents; theta) and where its inputs come from.

    Attributes:
        name: name of the block, unique in its graph.
        module: f.
        parents: names in the order in which the module takes them; `u` is the stream's input. In a
            sequence the block itself, or one listed behind it, is read as it was at the previous
            token.
        combine: how the module takes several parents.
        delays: ticks of the edge from a parent, where it is not 1.
        loss: makes the block a readout. Without `state` a readout is an output net (HL Eq. 4): it
            predicts from its parents' states and has no state of its own.
        state: True for a readout that is a state block: it predicts output(h), or h itself where
            `output` is None.
        output: module from h to the prediction of such a readout.
        shape: shape of h without the batch; needed for one block of every cycle, where it cannot
            be derived.
        initial: h_0 without the batch, where it is not zero (presentation 'hold').
        slices: number of blocks over which its neurons are spread (dynamics/slicing).
        rule: how it learns, instead of by the level's own rule.
        own: place of its own state of the sample before among the inputs of the module, where its
            rule carries that (`own_states`): no edge does.
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
    rule: Rule | None = None
    own: int | None = None

    def with_own(self, inputs: Sequence[T], state: T) -> list[T]:
        """Return what the module takes: what its parents give, and its own state, if it has that.

        Args:
            inputs: by parent.
            state: the block's own.
        """
        at = len(inputs) if self.own is None else self.own
        return [*inputs[:at], *([] if self.own is None else [state]), *inputs[at:]]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return its modules by what the names of their weights begin with."""
        return {"": self.module, **({} if self.output is None else {OUTPUT_KEY: self.output})}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of its modules; names of the output module's begin with `output:`."""
        return {k: v for p, m in self.modules.items() for k, v in m.state_dict(prefix=p).items()}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Put the state of its modules in place.

        Args:
            state: as `state_dict` returns it.
            strict: as torch's; of `module` alone.

        Raises:
            RuntimeError: its names or shapes are others.
        """
        outer = {k: v for k, v in state.items() if k.startswith(OUTPUT_KEY)}
        self.module.load_state_dict({k: state[k] for k in state if k not in outer}, strict=strict)
        if self.output is not None:
            self.output.load_state_dict({k.removeprefix(OUTPUT_KEY): v for k, v in outer.items()})

    @property
    def back(self) -> str:
        """Return what comes back to the block about a sample: `message`, `error`, or `none`."""
        return "message" if self.rule is None else self.rule.signals.back

    @property
    def has_state(self) -> bool:
        """Return True if the block has a state h, which only an output net lacks."""
        return self.loss is None or self.state


def reach(starts: Iterable[str], ways: Iterable[tuple[str, str]]) -> set[str]:
    """Return everything that can be reached from `starts` along `ways`, given as (from, to)."""
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


def names_text(blocks: Sequence[str]) -> str:
    """Return `blocks` as an error lists them."""
    noun = "block" if len(blocks) == 1 else "blocks"
    return f"{noun} {', '.join(repr(b) for b in blocks)}"


def as_network(
    blocks: Mapping[str, BlockSpec],
    learned: Mapping[str, Collection[str]],
    edges: Sequence[Edge],
    depths: Mapping[str, int],
    shapes: ShapeMap,
    lags: Mapping[str, int],
    actors: Sequence[NetworkActor] = (),
) -> PlacedNetwork:
    """Return a network, with the shapes and the lags of messages of those blocks that have some.

    learned: by block the names of its own weights that move (`Graph.parameters`).
    """
    described = []
    for name, spec in blocks.items():
        shape, dtype = shapes.get(name, ((), ""))
        weights = ((p + n, w) for p, m in spec.modules.items() for n, w in m.named_parameters())
        numbers = sum(w.numel() for n, w in weights if n in learned[name])
        kind, loss = str(dtype).removeprefix("torch."), spec.loss is not None
        place = depths[name], lags.get(name)
        described.append(NetworkBlock(name, tuple(shape), kind, numbers, *place, loss))
    ends = [NetworkEdge(e.name, e.parent, e.child, e.delay) for e in edges]
    return PlacedNetwork(described, ends, list(actors))
