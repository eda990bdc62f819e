"""Batches by key, or by place: which of their values are inputs, and which are targets.

A key has a name: `u`, the only input; an argument of the model (`u.NAME` where that is called u or
y); `y`, the target; `y.NAME`, the target of the output NAME; `weight`, the weights of the rows.
Keys without a name are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from hamdist.errors import StreamError

# By key of a batch, or place in a tuple.
Names: TypeAlias = Mapping[str, str] | Mapping[int, str]

TARGETS = ("label", "labels", "target", "targets", "y")  # keys that need no name
WEIGHT = "weight"  # the name of a key that has the weights of the rows
TUPLES = (
    '; names={0: "u", 1: "y"} leaves the others out, names={0: "x", 1: "y", 2: "task"} hands the '
    'third one to the model as its argument \'task\', and names={0: "u", 1: "y", 2: "weight"} '
    "weighs each row's loss by its number"
)


def named_parts(
    n: int, sample: Mapping[Any, Any], names: Mapping[str, str]
) -> tuple[Any, Any, Any]:
    """Return u, y and the weights of the rows of sample n, picked by the names of its keys.

    u is the only input or a dict of them by argument; y the target, a dict of them by output, or
    None; weights None where no key has that name. Raises StreamError for a missing key, and for
    names that contradict each other.
    """
    missing = [key for key in names if key not in sample]
    if missing:
        raise StreamError(
            f"sample {n} has no {missing[0]!r}, which names= speaks of; it has "
            f"{', '.join(map(repr, sample))}"
        )
    weights = [sample[key] for key, name in names.items() if name == WEIGHT]
    targets = {n: sample[key] for key, n in names.items() if n == "y" or n.startswith("y.")}
    inputs = {
        name if name == "u" else name.removeprefix("u."): sample[key]
        for key, name in names.items()
        if name not in targets and name != WEIGHT
    }
    alone = not ("u" in inputs and len(inputs) > 1) and not ("y" in targets and len(targets) > 1)
    if not inputs or not alone or len(inputs) + len(targets) + bool(weights) < len(names):
        raise StreamError(
            f"names is {dict(names)}: name one input 'u', or every input as an argument of the "
            "model, and one target 'y', or the target of every output 'y.NAME'; at most one "
            "'weight'"
        )
    u, weight = inputs.get("u", inputs), next(iter(weights), None)
    if not targets or "y" in targets:
        return u, targets.get("y"), weight
    return u, {name.removeprefix("y."): y for name, y in targets.items()}, weight


def default_names(
    n: int, sample: Mapping[Any, Any], arguments: Sequence[str] | None
) -> dict[str, str]:
    """Return names for the keys of sample n: the target by its usual key, the others as inputs.

    A single other key is the input, several are arguments of the model (`arguments`, where they are
    known). Raises StreamError, with the mapping to write, where a key may mean something else.
    """
    targets = [key for key in sample if key in TARGETS]
    others = [key for key in sample if key not in targets]
    arrays = all(isinstance(sample[key], (Tensor, np.ndarray)) for key in others)
    named = arguments is None or all(key in arguments for key in others)
    if others and len(targets) <= 1 and ((arrays and named) or len(others) == 1):
        alone = len(others) == 1 and (arguments is None or others[0] not in arguments[1:])
        return dict.fromkeys(targets, "y") | {key: "u" if alone else key for key in others}
    guess = {str(key): "y" if key in targets[:1] else str(key) for key in sample}
    takes = "" if arguments is None else f" ({', '.join(arguments)})"
    raise StreamError(
        f"sample {n} is a dict of {', '.join(map(repr, sample)) or 'nothing'}; which of them are "
        f"inputs is open: say it with names={guess} (in settings: stream.names), naming the only "
        f"input 'u', or each as an argument of the model{takes}, and the target 'y'; what is not "
        "named is left out"
    )
