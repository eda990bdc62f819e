"""The state of an optimiser: its form, and the attributes of a user's class."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer


def state_forms(groups: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Return, by group, the arguments that decide which tensors the state of a weight has."""
    return [[bool(g.get(name)) for name in ("amsgrad", "centered", "momentum")] for g in groups]


def own_attributes(opt: Optimizer) -> dict[str, Any]:
    """Return the attributes of a user's optimiser, without those that torch gives every one."""
    return {name: value for name, value in vars(opt).items() if name not in _of_all_optimizers()}


@functools.cache  # (and not on import: torch imports its compiler with the first optimiser)
def _of_all_optimizers() -> frozenset[str]:
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], 0.1)))


def without_arrays(state: Any) -> Any:
    """Return the state of a weight without NumPy arrays: torch's `load_state_dict` takes none."""
    if not isinstance(state, Mapping):
        return state
    return {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
