"""Weights from files, and from another model."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from hamdist.dynamics.graph.graph import Graph
from hamdist.errors import SettingsError


def beside(plain: nn.Module, model: nn.Module | Graph) -> str:
    """Give `plain` the weights and buffers of `model` whose names and shapes it has.

    Returns:
        What to say about that.
    """
    plain_state = plain.state_dict()
    model_state = {} if isinstance(model, Graph) else model.state_dict()
    fitting = {
        k: t for k, t in model_state.items() if k in plain_state and plain_state[k].shape == t.shape
    }
    plain.load_state_dict(fitting, strict=False)
    rest = [key for key in plain_state if key not in fitting]
    return (
        f"centralised training is that of another module, a {type(plain).__name__} "
        f"(--baseline-model), with {len(fitting)} of its {len(plain_state)} tensors taken from the "
        "model" + (f"; its own are {', '.join(rest)}" if rest else "")
    )


def warmed(model: nn.Module | Graph, file: Path) -> nn.Module:
    """Return `model` with the weights of a `state_dict` in a safetensors file.

    Raises SettingsError naming the file if it has none, or those of another model.
    """
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
        model_state = model.state_dict()  # has the versions of modules' formats, which some ask for
        model_state.clear()
        model_state.update(state)
        model.load_state_dict(model_state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise SettingsError(f"--weights '{file}': of another model: {first}") from None
    return model
