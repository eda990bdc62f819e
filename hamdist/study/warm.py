"""Weights from files, and weights of a run that has not ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from hamdist.dynamics.graph import Graph
from hamdist.errors import SettingsError
from hamdist.models import ModelFactory
from hamdist.runtime.resume import earlier
from hamdist.runtime.snapshot import latest
from hamdist.runtime.train import snapshot_model
from hamdist.streams.factory import make_stream
from hamdist.study.runs import build, torch_dtype


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


def exported(
    where: Path, factory: ModelFactory | None, told: Callable[[str], None]
) -> tuple[dict[str, Tensor], str]:
    """The `state_dict` of the whole model at the latest snapshot of a folder (or at the one that
    `where` is), and its name. factory: makes the model, where the run had one of its own.

    Raises SnapshotError.
    """
    snapshot = latest(where, told)
    settings = earlier(snapshot)
    dtype = torch_dtype(settings.dtype)
    stream = make_stream(settings.stream, seed=settings.seed, dtype=dtype)
    model = build(settings, stream.spec, factory, dtype)
    learned = snapshot_model(snapshot, model, stream.spec, settings)
    state = {k: v.detach().clone().contiguous() for k, v in learned.state_dict().items()}
    return state, str(snapshot)
