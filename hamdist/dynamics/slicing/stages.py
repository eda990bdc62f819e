"""Cuts the operations of a sliced block into stages: each is computed in one block, or in m.

A stage ends where something needs all neurons of what is spread over slices. What has no weights
and follows from what a block reads is in no stage: its readers repeat it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.graph.spec import BlockSpec, Joining, ShapeMap, combined
from hamdist.dynamics.slicing.layouts import Layouts, dry_run
from hamdist.dynamics.slicing.op_layouts import (
    NumberLayout,
    ParameterLayout,
    Regrain,
    Replicate,
    Shard,
    TupleLayout,
    Use,
)
from hamdist.dynamics.slicing.sliced_layers import Share
from hamdist.dynamics.tracing.block_graph import one_block
from hamdist.dynamics.tracing.recorded_calls import Unfollowed, stays_whole
from hamdist.dynamics.tracing.trace import trace
from hamdist.dynamics.tracing.traced_module import TracedModule, appended
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.hooks import hook_of
from hamdist.errors import GraphError


@dataclass
class SlicePhase:
    """Operations that are computed in one block, or in m. needs: stages that it reads."""

    number: int
    sliced: bool
    needs: set[int] = field(default_factory=set)


class SlicePhases:
    """The stages of one block, `spec`, for m slices.

    traced: its operations, from one placeholder by parent to `result`; root: the module that they
    name their parts in, modules: these parts by name. values: of every node in a dry run, and in
    one with a batch larger by one. layouts: how the values lie over the slices. stage_of: nodes
    that belong to a stage, in order.

    shapes: of what the block reads, by name, batch in front. Raises GraphError for a block that
    cannot be sliced, with what prevents it.
    """

    def __init__(self, block: BlockSpec, shapes: ShapeMap) -> None:
        self.spec = block
        self.m = block.slices
        self._refuse_what_has_no_slices()
        hooked = [(m, hook) for m in block.module.modules() if (hook := hook_of(m))]
        self._refuse([f"a {type(m).__name__} has a {hook}" for m, hook in hooked])
        self.root: nn.Module = nn.Module()
        self.root.add_module("m", copied(block.module))
        self.traced, self.result = self._trace({p: _zeros(shapes[p], 0) for p in block.parents})
        module = fx.GraphModule(self.root, self.traced)
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

    def _refuse_what_has_no_slices(self) -> None:
        b = self.spec
        for kind, applies in (
            ("an output module", b.output is not None),
            ("an initial state", b.initial is not None),
            ("a Joining of its own", isinstance(b.combine, Joining)),
        ):
            if applies:
                raise GraphError(f"block {b.name!r} with {kind} cannot be sliced; set its slices=1")

    def _refuse(self, reasons: list[str]) -> None:
        if reasons:
            raise GraphError(
                f"block {self.spec.name!r} cannot be sliced: {reasons[0]}; leave its slices out, "
                "or cut the model so that the layers to slice are a block of their own"
            )

    @property
    def last(self) -> SlicePhase:
        """Return the stage that makes the block's result."""
        return self.stage_of[self.result]

    def sent(self, stage: SlicePhase) -> fx.Node:
        """Return the one value of `stage` that others read."""
        (node,) = self._sent(stage)
        return node

    def axis(self, stage: SlicePhase) -> int | None:
        """Return the axis on which the slices of `stage` are joined; None if summed, or one."""
        layout = self.layouts.steps[self.sent(stage)].layout
        return layout.axis if isinstance(layout, Shard) else None

    def share(self, i: int, units: int, chunks: int = 1) -> Share:
        """Return the part of slice i of `units`, in each of `chunks`."""
        return Share(units, chunks, i, self.m)

    # -- what the block does -------------------------------------------------------------------

    def _trace(self, inputs: dict[str, Tensor]) -> tuple[fx.Graph, fx.Node]:
        """Return its operations, from one placeholder by parent to the result."""
        graph = fx.Graph()
        parents = [graph.placeholder(f"p{i}") for i in range(len(inputs))]
        inner, prefix = self.root.get_submodule("m"), "m."
        if not isinstance(inner, TracedModule):
            self.root = inner = self._traced_root(inputs)
            prefix = ""
        # (what stays whole in a piece does so in a slice, too)
        self._refuse(["the model stays whole"] if inner.hamdist_whole else [])
        self._refuse(
            [
                f"its forward moves the buffer {inner_path(name)!r}, which every slice reads"
                for name in inner.hamdist_moves
            ]
        )
        result = appended(graph, prefix, inner, parents)
        if not isinstance(result, fx.Node):
            raise GraphError(
                f"block {self.spec.name!r} cannot be sliced: it returns {type(result).__name__}, "
                "not one tensor"
            )
        graph.output(result)
        for node in reversed(graph.nodes):  # what nobody reads
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        return graph, result

    def _traced_root(self, inputs: dict[str, Tensor]) -> TracedModule:
        """Return the block's module in a module of its own, traced down to torch's modules."""
        spec = self.spec

        def call(root: Any, h: Mapping[str, Tensor]) -> Any:
            return root.m(*combined(spec.combine, list(h.values())))

        try:
            steps = trace(self.root, inputs, call, packages=("torch.",))
            whole = {inner_path(name): why for name, why in steps.whole.items()}
            self._refuse([stays_whole(name, spec.module, why) for name, why in whole.items()])
            return one_block(steps, self.root, list(inputs))
        except Unfollowed as why:
            self._refuse([stays_whole(inner_path(why.module), spec.module, why)])
            raise

    # -- stages --------------------------------------------------------------------------------

    def _arrange(self) -> bool:
        """Determine layouts and stages; return False where a constraint was added meanwhile."""
        self.layouts = Layouts(self.spec.name, self.modules, self.values, self._grain)  # type: ignore[arg-type]
        self.stages: list[SlicePhase] = []
        self.stage_of: dict[fx.Node, SlicePhase] = {}
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
        if isinstance(step.layout, (NumberLayout, ParameterLayout)) or node.op in (
            "placeholder",
            "get_attr",
        ):
            return
        is_sliced = not isinstance(step.layout, Replicate)
        inside = [  # stages whose values it takes as they are
            self.stage_of[i]
            for i in node.all_input_nodes
            if i in self.stage_of and (step.uses.get(i) is Use.PIECE or not self.stage_of[i].sliced)
        ]
        inside = [s for s in inside if s.sliced == is_sliced]
        if not is_sliced and (node in self._free or not (inside or self._fixed(node))):
            return
        if not inside and is_sliced:
            inside = [s for s in self.stages if s.sliced][-1:]
        latest = max(inside, key=lambda s: s.number, default=None)
        if latest is not None and node not in self._apart and self._fits(node, latest):
            stage = latest
        else:
            stage = SlicePhase(len(self.stages), is_sliced)
            self.stages.append(stage)
        self.stage_of[node] = stage
        stage.needs |= self._outside(node, stage)

    def _fixed(self, node: fx.Node) -> bool:
        """Return True if readers cannot repeat the node.

        It has weights, draws numbers, or is the block's result.
        """
        return node is self.result or self.layouts.weighted(node)

    def _outside(self, node: fx.Node, stage: SlicePhase) -> set[int]:
        """Return the stages that `node` reads from inside of `stage`."""
        nodes = set()
        uses = self.layouts.steps[node].uses
        for i in node.all_input_nodes:
            phase = self.stage_of.get(i)
            is_inside = phase is stage and (not stage.sliced or uses.get(i) is Use.PIECE)
            if not is_inside:
                nodes |= self._sources(i)
        return nodes

    def _sources(self, node: fx.Node) -> set[int]:
        """Return the stages whose results make `node`."""
        if node in self.stage_of:
            return {self.stage_of[node].number}
        if isinstance(self.layouts.steps[node].layout, NumberLayout):
            return set()
        return {s for i in node.all_input_nodes for s in self._sources(i)}

    def _fits(self, node: fx.Node, stage: SlicePhase) -> bool:
        """Return True if nothing that it reads from outside comes from `stage`."""
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
        """Make every stage send one tensor, the batch in front.

        Returns False where a stage would have to send two: the later one then gets a stage of its
        own, or is repeated by its readers.
        """
        for stage in self.stages:
            *others, last = self._sent(stage)
            if not others and (stage.sliced or self._fixed(last) or self._batch_first(last)):
                continue
            if not stage.sliced and not self._fixed(last):
                self._free.add(last)
            else:
                self._apart.add(self._branch(last, stage))
            return False
        return True

    def _branch(self, node: fx.Node, stage: SlicePhase) -> fx.Node:
        """Return where the operations that lead to `node` alone begin in `stage`.

        That is `node` itself where all of them do.
        """
        start = node
        first = next(n for n, phase in self.stage_of.items() if phase is stage)
        while True:
            before = [i for i in start.all_input_nodes if self.stage_of.get(i) is stage]
            if len(before) != 1 or list(before[0].users) != [start] or before[0] is first:
                return start if start not in self._apart else node
            start = before[0]

    def _batch_first(self, node: fx.Node) -> bool:
        first, more = (values[node] for values in self.values)
        return isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] + 1 == more.shape[0]

    def _sent(self, stage: SlicePhase) -> list[fx.Node]:
        """Return the values of `stage` that others read, in order: in the end one."""
        sent = []
        for node, phase in self.stage_of.items():
            if phase is not stage:
                continue
            outside = node is self.result
            for user in node.users:
                if user.op == "output" or isinstance(self.layouts.steps[user].layout, NumberLayout):
                    continue
                inside = self.stage_of.get(user) is stage
                uses = self.layouts.steps[user].uses
                if not inside or (stage.sliced and uses.get(node) is not Use.PIECE):
                    outside = True
            if outside:
                sent.append(node)
        return sent

    def _check(self) -> None:
        name = self.spec.name
        widths = [(n, self.layouts.units(n)) for n in self.traced.nodes if n.op == "call_module"]
        layers = [(n, units) for n, units in widths if units is not None]
        if not layers:
            kinds = dict.fromkeys(type(m).__name__ for m in self.spec.module.modules())
            raise GraphError(
                f"block {name!r} cannot be sliced: nothing in it has neurons, channels or heads to "
                f"share out (it holds {', '.join(kinds)}); slices take Linear, Conv1d to Conv3d "
                "and MultiheadAttention"
            )
        for node, (units, noun) in layers:
            if units < self.m:
                layer = inner_path(str(node.target)) or type(self.spec.module).__name__
                raise GraphError(
                    f"block {name!r} cannot be spread over {self.m} slices: its module {layer!r} "
                    f"has {units} {noun}; use at most {units} slices"
                )
        for stage in self.stages:
            (sent,) = self._sent(stage)
            if isinstance(self.layouts.steps[sent].layout, TupleLayout) or not isinstance(
                self.values[0][sent], Tensor
            ):
                raise GraphError(
                    f"block {name!r} cannot be sliced: {sent.name} would have to hand on several "
                    "tensors at once; leave its slices out"
                )


def inner_path(target: str) -> str:
    """Return the name that a part of the traced module has in the block's own."""
    return target.removeprefix("m").removeprefix(".")


def _zeros(like: tuple[tuple[int, ...], torch.dtype], more: int) -> Tensor:
    shape, dtype = like
    return torch.zeros((shape[0] + more, *shape[1:]), dtype=dtype)
