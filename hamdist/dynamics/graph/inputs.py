"""The inputs of a model: one, `u`, or several by name, `u.NAME`.

Several are handed to the model by position where they are numbered (`u.0`, `u.1`), else as keyword
arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from hamdist.errors import GraphError

INPUT = "u"
NetworkInputs: TypeAlias = Tensor | Mapping[str, Tensor]


def is_input(name: str) -> bool:
    """Return True if a parent of this name is (a part of) the stream's input."""
    return name == INPUT or name.startswith(INPUT + ".")


def by_parent(u: NetworkInputs) -> dict[str, Tensor]:
    """Return the inputs by the names that blocks have for them (`u`, or `u.NAME`)."""
    if isinstance(u, Tensor):
        return {INPUT: u}
    return {f"{INPUT}.{name}": tensor for name, tensor in u.items()}


def call_model(model: nn.Module, u: NetworkInputs) -> Any:
    """Return model(u), or the model called with its several inputs."""
    if isinstance(u, Tensor):
        return model(u)
    if all(name.isdigit() for name in u):
        return model(*(u[name] for name in sorted(u, key=int)))
    return model(**u)


def arguments_of(model: object) -> list[str] | None:
    """Return the names of the arguments of `model.forward`; None if open (`**kwargs`, a Graph)."""
    if not isinstance(model, nn.Module):
        return None
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return None if any(p.kind in variable for p in parameters) else [p.name for p in parameters]


def called_by_parent(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Return the model called with inputs that carry the names of parents (`u`, or `u.NAME`)."""
    if INPUT in inputs:
        return model(inputs[INPUT])
    return call_model(model, {name.removeprefix(INPUT + "."): u for name, u in inputs.items()})


def check_inputs(model: nn.Module, u: NetworkInputs) -> None:
    """Check that `model.forward` takes the several inputs.

    Raises:
        GraphError: it has other arguments.
    """
    if isinstance(u, Tensor):
        return
    numbered = all(name.isdigit() for name in u)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(*u.values()) if numbered else signature.bind(**u)
    except TypeError as error:
        received = f"{len(u)} inputs by position" if numbered else f"the inputs {', '.join(u)}"
        raise GraphError(
            f"the stream gives {received}, but {type(model).__name__}.forward{signature} does not "
            f"take them ({error}): give u as a dict by its arguments, or as a tuple in their "
            "order, or say with names= what the keys of a batch mean"
        ) from None


def rows_of(batch: int, parts: int, part: int) -> range:
    """Returns the rows of one of `parts` micro-batches, whose sizes differ by one at most: the
    first ones are larger. Empty for the last ones of a batch of fewer rows than `parts`."""
    each, more = divmod(batch, parts)
    start = part * each + min(part, more)
    return range(start, start + each + (part < more))
