"""What is refused before a run builds anything: sizes beyond memory, models that cannot run."""

from __future__ import annotations

import copy

import psutil
import torch
from torch import nn

from hamdist.config import Settings
from hamdist.errors import SettingsError

LAYER_BYTES = 20_000  # of the Python objects of one layer


def check_size(settings: Settings, *, own_model: bool = False, own_data: bool = False) -> None:
    """Raises SettingsError where the least that a run takes is more memory than this host has.

    own_model, own_data: width and depth, or the batch, are not those of the settings.
    """
    width, depth = (1, 0) if own_model else (settings.model.width, settings.model.depth)
    batch = 0 if own_data else settings.stream.batch
    number = getattr(torch, settings.dtype.value).itemsize
    layer = 2 * number * width**2 + LAYER_BYTES  # weights, their costates, and the objects
    needed, there = depth * layer + batch * number * width, psutil.virtual_memory().total
    if needed > there:
        raise SettingsError(
            f"model.width {width:,}, model.depth {depth:,}, stream.batch {batch:,}: weights and "
            f"one state take at least {needed / 2**30:,.0f} GiB, and this host has "
            f"{there / 2**30:,.0f} GiB: use smaller ones"
        )


def check_model(model: nn.Module) -> None:
    """Raises SettingsError for a model that cannot be copied into blocks, or has no weights."""
    if next(model.parameters(), None) is None:
        raise SettingsError("the model has no weights: there is nothing to learn")
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except TypeError as error:
                raise SettingsError(
                    f"the model's {'.'.join(filter(None, (name, attribute)))} is a "
                    f"{type(value).__name__}, which cannot be copied ({error}), but each block "
                    "gets a copy of its modules: make it where it is used, or outside of the model"
                ) from None
