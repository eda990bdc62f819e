"""Weights from files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from hamdist.dynamics.graph import Graph
from hamdist.errors import SettingsError


def warmed(model: nn.Module | Graph, file: Path) -> nn.Module:
    """`model` with the weights of a `state_dict` in a safetensors file. Raises SettingsError naming
    the file where it has none, or those of another model."""
    if isinstance(model, Graph):
        raise SettingsError(
            f"--weights '{file}': a model that is a graph of blocks has no state_dict; go on from "
            "a snapshot (--resume)"
        )
    try:
        state = load(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"--weights '{file}': cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise SettingsError(f"--weights '{file}': no safetensors file: {error}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise SettingsError(f"--weights '{file}': of another model: {first}") from None
    return model
