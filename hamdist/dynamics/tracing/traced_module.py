"""A run of a traced model's steps as a module of its own.

A `TracedModule` holds the parts and weights of the original under their own dotted names, and a
program: steps in the order in which the model took them. The arguments of a step are a template,
that is nested tuples, lists, dicts and slices of plain values and of the places below, whose values
are known only when the module runs. B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.user_modules.structure import (
    Built,
    filled,
    getter,
    has_built,
    part_of,
    parts_of,
)

Path: TypeAlias = tuple[Any, ...]  # keys and indices that lead to a tensor in what a step returned


@dataclass(frozen=True, slots=True)
class ValueRef:
    """Result of step `step`; with a path, a part of it."""

    step: int
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Arg:
    """An input of the model."""

    name: str


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A parameter or buffer, by its dotted name."""

    name: str


@dataclass(frozen=True, slots=True)
class ConstantRef:
    """A tensor that the model makes or keeps, equal for every sample."""

    index: int


@dataclass(frozen=True, slots=True)
class Length:
    """A dimension of an input, which may differ from sample to sample; base: that of the
    example."""

    name: str
    axis: int
    base: int


@dataclass(frozen=True, slots=True)
class SymbolicSize:
    """per * B + more, plus (a + b * B) times a length, for each (length, a, b)."""

    per: int
    more: int = 0
    lengths: tuple[tuple[Length, int, int], ...] = ()

    def of(self, batch: int, length: Callable[[Length], int]) -> int:
        """Return the number, for a batch and the lengths of a sample."""
        found = self.per * batch + self.more
        for one, a, b in self.lengths:
            found += (a + b * batch) * length(one)
        return found

    @property
    def batched(self) -> bool:
        """Return True if it depends on the batch."""
        return self.per != 0 or any(b for _, _, b in self.lengths)

    @property
    def by_row(self) -> int:
        """Return the number per row of the example, or the number if no batch is in it."""
        if self.batched:
            return self.per + sum(b * one.base for one, _, b in self.lengths)
        return self.of(0, lambda one: one.base)


@dataclass(frozen=True, slots=True)
class DeviceRef:
    """The device on which the module runs."""


Place: TypeAlias = ValueRef | Arg | WeightRef | ConstantRef | SymbolicSize | DeviceRef
PLACES = (ValueRef, Arg, WeightRef, ConstantRef, SymbolicSize, DeviceRef)
Template: TypeAlias = Any


def places(template: Template) -> list[Place]:
    """Return the places in a template, in order."""
    found: list[Place] = []
    replaced(template, found.append)
    return found


def replaced(template: Template, value: Callable[[Any], Any]) -> Any:
    """Return the template with `value(place)` for every place."""
    if isinstance(template, PLACES):
        return value(template)
    kind = type(template)
    parts = parts_of(template)
    if parts is not None:
        return filled(template, [replaced(part, value) for _, part in parts])
    if kind is slice:
        return slice(*(replaced(t, value) for t in (template.start, template.stop, template.step)))
    return template


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One call. target: the name of a part, of a tensor's method, or a function, as `kind` says.

    grad: True if autograd records it.
    """

    kind: str
    target: Any
    args: tuple[Template, ...]
    kwargs: dict[str, Template] = field(default_factory=dict)
    grad: bool = True


MODULE, METHOD, FUNCTION = "module", "method", "function"


# From the inputs and what the steps so far returned.
Get: TypeAlias = Callable[[Sequence[Tensor], list[Any]], Any]


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


class TracedModule(nn.Module):
    """f(inputs) by a program; one tensor comes out.

    parts, weights: of the original, by dotted name; persistent: the names of the buffers that
    belong to its state_dict. constants: by index. In the program `Arg` is the name of one of
    `inputs`, a `ValueRef` the number of a step. draws, writes: the program itself draws random
    numbers, writes to its inputs (its parts may do so as well).
    """

    def __init__(
        self,
        inputs: Sequence[str],
        program: Sequence[TracedStep],
        output: Template,
        *,
        parts: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        persistent: frozenset[str],
        constants: Mapping[int, Tensor],
        draws: bool,
        writes: bool,
    ) -> None:
        super().__init__()
        self._hamdist_ready: tuple[list[Get], Get] | None = None
        self._hamdist_draws = draws
        self._hamdist_writes = writes
        self._hamdist_inputs = tuple(inputs)
        self._hamdist_program = tuple(program)
        self._hamdist_output = output
        self._hamdist_parts = dict(parts)
        if self.is_whole:
            _adopt(self, parts[""])
        for name in sorted({**parts, **weights} if not self.is_whole else (), key=_depth):
            thing = parts.get(name)
            _place(self, name, weights[name] if thing is None else thing, name in persistent)
        for index, tensor in constants.items():
            self.register_buffer(f"hamdist_constant_{index}", tensor, persistent=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._hamdist_inputs

    @property
    def program(self) -> tuple[TracedStep, ...]:
        return self._hamdist_program

    @property
    def output(self) -> Template:
        return self._hamdist_output

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules that its steps call, by name."""
        return self._hamdist_parts

    @property
    def draws(self) -> bool:
        return self._hamdist_draws

    @property
    def writes(self) -> bool:
        return self._hamdist_writes

    @property
    def is_whole(self) -> bool:
        """Return True if it calls the whole model, whose weights and modules keep their names."""
        return "" in self._hamdist_parts

    def forward(self, *inputs: Tensor) -> Any:
        ready = self._hamdist_ready
        if ready is None:
            steps = [self._call(step) for step in self._hamdist_program]
            ready = self._hamdist_ready = steps, self._getter(self._hamdist_output)
        steps, output = ready
        values: list[Any] = []
        for step in steps:
            values.append(step(inputs, values))
        return output(inputs, values)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hamdist_ready": None}

    def _call(self, step: TracedStep) -> Get:
        """Return a step as a function."""
        args, kwargs = self._getter(step.args), self._getter(step.kwargs)
        run: Callable[..., Any] = step.target if step.kind == FUNCTION else _method(step.target)
        if step.kind == MODULE:
            run = self._hamdist_parts[step.target]

        def call(inputs: Sequence[Tensor], values: list[Any]) -> Any:
            return run(*args(inputs, values), **kwargs(inputs, values))

        def quietly(inputs: Sequence[Tensor], values: list[Any]) -> Any:
            with torch.no_grad():
                return call(inputs, values)

        return call if step.grad else quietly

    def _getter(self, template: Template) -> Get:
        """Return a template as a function of the inputs and the steps' results."""
        if not places(template):
            return lambda *_: template
        if isinstance(template, PLACES):
            return self._place_getter(template)
        kind = type(template)
        if kind is dict:
            keys, inner = list(template), [self._getter(t) for t in template.values()]
            return lambda i, v: {k: get(i, v) for k, get in zip(keys, inner, strict=True)}
        if kind is slice:
            ends = [self._getter(t) for t in (template.start, template.stop, template.step)]
            return lambda i, v: slice(*[get(i, v) for get in ends])
        parts = [self._getter(t) for _, t in parts_of(template) or ()]
        if kind is Built:
            return lambda i, v: filled(template, [get(i, v) for get in parts]).value()
        return lambda i, v: kind([get(i, v) for get in parts])

    def _place_getter(self, place: Place) -> Get:
        if isinstance(place, ValueRef):
            at, path = place.step, place.path
            if not path:
                return lambda _, values: values[at]
            return lambda _, values: reduce(part_of, path, values[at])
        if isinstance(place, Arg):
            number = self._hamdist_inputs.index(place.name)
            return lambda inputs, _: inputs[number]
        if isinstance(place, SymbolicSize):
            where = self._hamdist_inputs.index

            def size(inputs: Sequence[Tensor], _: list[Any]) -> int:
                return place.of(
                    inputs[0].shape[0], lambda one: inputs[where(one.name)].shape[one.axis]
                )

            return size
        if isinstance(place, DeviceRef):
            return lambda inputs, _: inputs[0].device
        name = place.name if isinstance(place, WeightRef) else f"hamdist_constant_{place.index}"
        path_to, _, last = name.rpartition(".")
        owner = self.get_submodule(path_to)  # a weight may stand in for another during a call
        return lambda *_: getattr(owner, last)

    def fx_graph(self) -> fx.Graph | None:
        """Return the program as a graph of torch.fx; None if it has more than calls on tensors."""
        graph = fx.Graph()
        inputs = {name: graph.placeholder(name) for name in self._hamdist_inputs}
        made: list[fx.Node] = []

        def node(place: Any) -> fx.Node:
            if isinstance(place, Arg):
                return inputs[place.name]
            if not isinstance(place, ValueRef):
                raise _NotOnTensors
            found = made[place.step]
            for key in place.path:
                found = graph.call_function(getter(key), (found, key))
            return found

        create: dict[str, Callable[..., fx.Node]] = {
            MODULE: graph.call_module,
            METHOD: graph.call_method,
            FUNCTION: graph.call_function,
        }
        try:
            for step in self._hamdist_program:
                if not step.grad or self.is_whole or has_built((step.args, step.kwargs)):
                    return None
                args, kwargs = replaced(step.args, node), replaced(step.kwargs, node)
                made.append(create[step.kind](step.target, args, kwargs))
            graph.output(node(self._hamdist_output))
        except _NotOnTensors:
            return None
        return graph

    def extra_repr(self) -> str:
        return f"{', '.join(self._hamdist_inputs)}; {len(self._hamdist_program)} steps"


class _NotOnTensors(Exception):
    """A step takes more than tensors and fixed values."""


def _depth(name: str) -> int:
    return name.count(".")


def _adopt(piece: nn.Module, model: nn.Module) -> None:
    """Give `piece` the weights, buffers and modules of `model`, under the same names."""
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        piece.__dict__[registry] = model.__dict__[registry]


def _place(root: nn.Module, name: str, thing: nn.Module | Tensor, persistent: bool) -> None:
    """Put `thing` at `name`, where it may be already, as a part of an earlier one."""
    *path, last = name.split(".")
    holder = root
    for key in path:
        inner = holder._modules.get(key)
        if inner is None:
            inner = nn.Module()
            holder.add_module(key, inner)
        holder = inner
    if last in holder._modules or last in holder._parameters or last in holder._buffers:
        return
    if isinstance(thing, nn.Module):
        holder.add_module(last, thing)
    elif isinstance(thing, nn.Parameter):
        holder.register_parameter(last, thing)
    else:
        holder.register_buffer(last, thing, persistent=persistent)
