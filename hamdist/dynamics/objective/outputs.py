"""Names of the parts of a model's output, and the loss of each part.

An output is named by its key in a dict, its field in a namedtuple or dataclass, or `out0`,
`out1`, ... in a tuple; the only one is `ONLY`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from hamdist.dynamics.objective.losses import Losses, LossFunction
from hamdist.dynamics.user_modules.structure import parts_of
from hamdist.errors import GraphError

ONLY = ""


def named(output: Any, name: str = ONLY) -> list[tuple[str, Any]]:
    """Return the parts of nested tuples, lists, dicts, namedtuples and dataclasses, by name."""
    parts = parts_of(output)
    if parts is None:
        return [(name, output)]
    first = f"{name}_" if name else ""
    return [
        pair
        for key, value in parts
        for pair in named(
            value, first + (str(key) if name or type(key) is not int else f"out{key}")
        )
    ]


def tensors(output: Any) -> dict[str, Tensor]:
    """Return the parts that are tensors, by name."""
    return {name: one for name, one in named(output) if isinstance(one, Tensor)}


def losses_of(
    outputs: Sequence[str], loss: Losses, targets: Collection[str] | None
) -> dict[str, LossFunction]:
    """Return the loss of each output that has one.

    Those are the outputs that `loss` names, or else those that the stream's targets name, or else
    all. Raises GraphError for names that the model does not have.
    """
    if list(outputs) == [ONLY]:
        if isinstance(loss, Mapping):
            raise GraphError(
                f"loss names the outputs {', '.join(map(repr, loss))}, but the model returns one "
                "tensor; give one loss, or return a dict"
            )
        return {ONLY: loss}
    chosen = list(outputs)
    if isinstance(loss, Mapping):
        chosen = list(loss)
    elif targets is not None:
        chosen = list(targets)
    for name in chosen:
        if name not in outputs:
            what = "loss" if isinstance(loss, Mapping) else "the stream's targets"
            known = ", ".join(map(repr, outputs))
            raise GraphError(f"{what} name the output {name!r}; the model's outputs are {known}")
    return {name: loss[name] if isinstance(loss, Mapping) else loss for name in chosen}


def main_output(accuracies: Mapping[str, float | None]) -> str:
    """Return the output by which a model is compared: the last of classes, or the last."""
    classes = [name for name, accuracy in accuracies.items() if accuracy is not None]
    return (classes or list(accuracies))[-1]
