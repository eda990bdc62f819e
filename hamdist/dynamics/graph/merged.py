"""Turns a graph back into one module: the `model` of a run's result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import INPUT, OUTPUT_KEY, Graph, ShapeMap
from hamdist.dynamics.graph.inputs import NetworkInputs, by_parent
from hamdist.dynamics.graph.shapes import declared_dtype
from hamdist.dynamics.graph.spec import combined
from hamdist.dynamics.graph.ties import names_of
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import GraphError


class MergedGraph(nn.Module):
    """The graph as one feed-forward module: u -> the readout's prediction (or a dict of them).

    Args:
        relax: with cycles, the number of times that the states are relaxed from h_0 by
            h <- f(h_parents) (cτ = 1).
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
            {b.name: copied(_Whole(b.module, b.output)) for b in graph.blocks.values()}
        )
        for weight in graph.shared:
            (first, key), *others = weight.uses
            parameter = self._whole(first).module.get_parameter(key)
            for name, other in others:
                module = self._whole(name).module
                for full_name in names_of(module, [other]):
                    path, _, last = full_name.rpartition(".")
                    setattr(module.get_submodule(path), last, parameter)

    def _whole(self, name: str) -> _Whole:
        return cast(_Whole, self.blocks[name])

    def _f(self, name: str, h: Mapping[str, Tensor]) -> Tensor:
        inputs = [h[p] for p in self.parents[name]]
        result: Tensor = self._whole(name).module(*combined(self.combines[name], inputs))
        return result

    def forward(
        self, u: NetworkInputs | None = None, **several: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Return the prediction, or a dict of them by readout.

        Args:
            u: the input (B, ...), or several inputs by name as one mapping.
            **several: several inputs by name.
        """
        h = by_parent(several if u is None else u)
        u = next(iter(h.values()))
        for name, shape in self.shapes.items():
            if not self.acyclic and shape is not None:
                dtype = declared_dtype(self._whole(name).module, u.dtype)
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


class _Whole(nn.Module):
    """A block's module and its output module under one name."""

    def __init__(self, module: nn.Module, output: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self.output = output


class MergedSequence(nn.Module):
    """A graph as one module for sequences: u (T, B, ...) -> the readout's predictions (T, B, ...).

    With several readouts it returns a dict by readout. Before the first token all states are zero.
    The `state_dict` has the keys of a `MergedGraph`.

    Args:
        shapes: shapes and dtypes of the blocks' states, the batch in front.
    """

    def __init__(self, graph: Graph, shapes: ShapeMap) -> None:
        super().__init__()
        self.readouts = graph.readouts
        self.combines = {b.name: b.combine for b in graph.blocks.values()}
        # Per block its parents, and whether it reads what they were at the token before.
        self.parents = {
            name: [(e.parent, graph.recurrent(e)) for e in edges]
            for name, edges in graph.into.items()
        }
        self.carried = sorted(
            {p for ps in self.parents.values() for p, recurrent in ps if recurrent}
        )
        for name in self.carried:  # as buffers, they go where the module goes
            shape, dtype = shapes[name]
            zeros = torch.zeros(1, *shape[1:], dtype=dtype)
            self.register_buffer(f"before_{name}", zeros, persistent=False)
        self.blocks = MergedGraph(graph).blocks

    def forward(self, u: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the predictions (T, B, ...) of u (T, B, ...), or a dict of them by readout."""
        if not len(u):
            raise GraphError("a sequence has at least one token; u has none (T = 0)")
        predictions: dict[str, list[Tensor]] = {name: [] for name in self.readouts}
        h: dict[str, Tensor] | None = None
        for token in u:
            h = self.token(token, h)
            for name in self.readouts:
                predictions[name].append(h[name])
        outputs = {name: torch.stack(tokens) for name, tokens in predictions.items()}
        return outputs[self.readouts[0]] if len(outputs) == 1 else outputs

    def token(self, u: Tensor, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the states (readouts: the predictions) of one token by block, each (B, ...).

        Args:
            u: the token, (B, ...).
            before: the states of the token before; None at a sequence's first.
        """
        h = {INPUT: u}
        if before is None:
            zeros = {name: self.get_buffer(f"before_{name}") for name in self.carried}
            before = {name: t.expand(len(u), *t.shape[1:]) for name, t in zeros.items()}
        for name, parents in self.parents.items():
            inputs = [(before if recurrent else h)[p] for p, recurrent in parents]
            module = cast(nn.Module, self.blocks[name].module)
            h[name] = module(*combined(self.combines[name], inputs))
        return h


def merged_module(
    graph: Graph, weights: Mapping[str, Mapping[str, Tensor]], whole: nn.Module | None = None
) -> nn.Module:
    """Return a plain module with the weights of the blocks; slices are put together.

    For a cut model its `state_dict` has the original keys; for a graph built by hand those of a
    `MergedGraph`.

    Args:
        weights: parameters and buffers by block and key (keys of an output module begin with
            `output:`).
        whole: for a graph built by hand the module to fill; None for a `MergedGraph`.
    """
    if graph.sliced is not None:
        return merged_module(graph.sliced.graph, graph.sliced.gather(weights), whole)
    state: dict[str, Tensor] = {}
    if graph.original is not None:
        merged = copied(graph.original)
        state.update(merged.state_dict())  # of parts that no block uses
    else:
        merged = MergedGraph(graph) if whole is None else whole
    learned: dict[str, Tensor] = {}
    copies = {(t.user, k) for t in graph.ties for o, k in t.keys if o in weights.get(t.owner, ())}
    for name, tensors in weights.items():
        for key, tensor in tensors.items():
            if (name, key) not in copies:
                by_hand = graph.original is None
                learned[name_in_merged_graph(name, key) if by_hand else key] = tensor
    state |= {**learned, **_by_all_names(merged, learned)}
    for path, part in merged.named_modules():
        names = () if isinstance(part, torch.jit.ScriptModule) else tuple(part._buffers)
        for name in names:  # of another shape, where forward has assigned it
            value, old = state.get(f"{path}.{name}" if path else name), part._buffers[name]
            if value is not None:
                like = value if old is None else old
                part._buffers[name] = value.to(like.dtype, copy=True)
    merged_state = merged.state_dict()  # has the versions of modules' formats, which some ask for
    fitting = {k: v for k, v in state.items() if k in merged_state}
    merged_state.clear()
    merged_state.update(fitting)
    merged.load_state_dict(merged_state, strict=True)
    return merged


def name_in_merged_graph(block: str, key: str) -> str:
    """Return the name that `key` of a block has in a `MergedGraph`."""
    part = "output" if key.startswith(OUTPUT_KEY) else "module"
    return f"blocks.{block}.{part}.{key.removeprefix(OUTPUT_KEY)}"


def _by_all_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors`, each under all names that its weight has in `module`."""
    names: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    by_name = {}
    for same in names.values():
        present = [name for name in same if name in tensors]
        by_name.update({name: tensors[present[0]] for name in same if present})
    return by_name
