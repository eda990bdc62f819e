"""The module of one slice: the operations of a stage, on this slice's part of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.graph.graph import TensorSlice
from hamdist.dynamics.slicing.op_layouts import Narrow, Use
from hamdist.dynamics.slicing.sliced_layers import Share, SlicePlaces
from hamdist.dynamics.slicing.stages import SlicePhase, SlicePhases, inner_path


@dataclass(frozen=True)
class From:
    """An input of a block of a stage.

    It is a parent of the unsliced block by number, or another stage (all of it, or its slice
    `piece`).
    """

    parent: int | None = None
    stage: int | None = None
    piece: int | None = None


class SliceModule:
    """One block of a stage: slice i of it, or all (i = 0).

    joined_here: stages of which it reads its own slice and all of them, so that it joins them
    itself. reads: the inputs behind its arguments; parts: the origins of its tensors.
    """

    def __init__(
        self, stages: SlicePhases, stage: SlicePhase, i: int, joined_here: frozenset[int]
    ) -> None:
        self.i, self.m = i, stages.m
        self.graph = fx.Graph()
        self.reads: list[From] = []
        self.parts: list[TensorSlice] = []
        self._stages, self._stage, self._joined_here = stages, stage, joined_here
        self._inputs: dict[From, fx.Node] = {}
        self._nodes: dict[object, fx.Node] = {}
        self._held: dict[str, Any] = {}
        self._uses: Mapping[fx.Node, Use | Narrow] = {}
        self.sent = stages.sent(stage)
        for node, phase in stages.stage_of.items():
            if phase is stage:
                self._nodes[node] = self._operation(node)
        self.graph.output(self._nodes[self.sent])
        self.module = fx.GraphModule(self._held, self.graph, "Slice")

    def share(self, units: int, chunks: int = 1) -> Share:
        """Return this slice's share of so many neurons."""
        return self._stages.share(self.i, units, chunks)

    def _operation(self, node: fx.Node) -> fx.Node:
        step = self._stages.layouts.steps[node]
        self._uses = step.uses
        return self.copy(node) if step.make is None else step.make(self)

    def copy(self, node: fx.Node) -> fx.Node:
        """Return the operation unchanged, on its inputs in this slice."""
        if node.op == "call_module":
            whole = self._stages.modules[str(node.target)]
            return self.module_of(node, whole)
        return self._copied(node, self.value)

    def _copied(self, node: fx.Node, value: Any) -> fx.Node:
        literal = self._stages.layouts.literal
        args = fx.map_arg(literal(node.args), value)
        kwargs = fx.map_arg(literal(node.kwargs), value)
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def module_of(self, node: fx.Node, module: nn.Module) -> fx.Node:
        """Add a call of a module that this slice has whole, in the place of `node`."""
        stateful = [*module.state_dict(), *(k for k, _ in module.named_buffers())]
        return self.module_with(node, module, dict.fromkeys(stateful))

    def module_with(self, node: fx.Node, module: nn.Module, places: SlicePlaces) -> fx.Node:
        """Add a call of a module of which this slice has parts, in the place of `node`."""
        path = inner_path(str(node.target))
        self._held[path or "layer"] = module
        prefix = f"{path}." if path else ""
        for key, place in places.items():
            axis, index = place if place is not None else (None, None)
            new = f"{path or 'layer'}.{key}"
            self.parts.append(
                TensorSlice(self._stages.spec.name, prefix + key, "", new, axis, index)
            )
        args = fx.map_arg(node.args, self.value)
        return self.graph.call_module(path or "layer", args, fx.map_arg(node.kwargs, self.value))

    def value(self, node: fx.Node) -> fx.Node:
        """Return an input of the operation under construction, as its use says."""
        use = self._uses.get(node, Use.WHOLE)
        if isinstance(use, Narrow):
            return self._narrowed(node, use)
        if use is Use.PIECE:
            phase = self._stages.stage_of[node]
            if phase is self._stage:
                return self._nodes[node]
            return self._input(From(stage=phase.number, piece=self.i))
        return self._whole(node)

    def _narrowed(self, node: fx.Node, use: Narrow) -> fx.Node:
        key = (node, use)
        if key not in self._nodes:
            size = int(self._stages.values[0][node].shape[use.axis])
            share, whole = self.share(use.units, use.chunks), self._whole(node)
            part = size // use.chunks
            pieces = [
                self.graph.call_function(
                    torch.narrow,
                    (whole, use.axis, chunk * part + share.start(part), share.length(part)),
                )
                for chunk in range(use.chunks)
            ]
            self._nodes[key] = (
                pieces[0]
                if len(pieces) == 1
                else self.graph.call_function(torch.cat, (pieces, use.axis))
            )
        return self._nodes[key]

    def _whole(self, node: fx.Node) -> fx.Node:
        """Return all of a value: as another block gives it, or computed again from other values."""
        phase = self._stages.stage_of.get(node)
        if phase is self._stage and not phase.sliced:
            return self._nodes[node]
        if phase is not None:
            return self._joined(phase)
        key = (node, Use.WHOLE)
        if key not in self._nodes:
            if node.op == "placeholder":
                names = [n for n in self._stages.traced.nodes if n.op == "placeholder"]
                self._nodes[key] = self._input(From(parent=names.index(node)))
            elif node.op == "get_attr":
                self._nodes[key] = self._attribute(node)
            elif node.op == "call_module":
                path = inner_path(str(node.target)) or "layer"
                self._held[path] = self._stages.modules[str(node.target)]
                args = fx.map_arg((node.args, node.kwargs), self._whole)
                self._nodes[key] = self.graph.call_module(path, *args)
            else:
                self._nodes[key] = self._copied(node, self._whole)
        return self._nodes[key]

    def _attribute(self, node: fx.Node) -> fx.Node:
        path = inner_path(str(node.target))
        tensor = self._stages.values[0][node]
        value: Any = self._stages.root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, nn.Parameter) and isinstance(tensor, Tensor):
            value = value.clone()  # a constant, of which every block has its own
        self._held[path] = value
        self.parts.append(TensorSlice(self._stages.spec.name, path, "", path))
        return self.graph.get_attr(path)

    def _joined(self, stage: SlicePhase) -> fx.Node:
        if stage.number not in self._joined_here:
            return self._input(From(stage=stage.number))
        key = ("joined", stage.number)
        if key not in self._nodes:
            pieces = [self._input(From(stage=stage.number, piece=i)) for i in range(self._stages.m)]
            axis = self._stages.axis(stage)
            if axis is not None:
                self._nodes[key] = self.graph.call_function(torch.cat, (pieces, axis))
            else:
                total = pieces[0]
                for piece in pieces[1:]:
                    total = self.graph.call_function(torch.add, (total, piece))
                self._nodes[key] = total
        return self._nodes[key]

    def _input(self, source: From) -> fx.Node:
        if source not in self._inputs:
            last = self._inputs[self.reads[-1]] if self.reads else self.graph._root
            with self.graph.inserting_after(last):
                self._inputs[source] = self.graph.placeholder(f"p{len(self.reads)}")
            self.reads.append(source)
        return self._inputs[source]
