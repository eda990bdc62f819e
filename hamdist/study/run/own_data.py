"""Models and streams made by a user's functions (`--model`, `--stream file.py:function`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.inputs import call_model
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import SettingsError, StreamError
from hamdist.loading import call_function, check_call, load_function, title
from hamdist.models.build import BASELINE_OPTION, ModelFactory, load_factory
from hamdist.runtime.placement.step_costs import example_inputs
from hamdist.streams import Stream, from_iterable, from_loader
from hamdist.streams.batch_names import WEIGHT, Names
from hamdist.streams.sample import SampleSpec
from hamdist.streams.wrappers.derived import in_dtype

STREAM_OPTION = "--stream"

Classes = int | Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class OwnData:
    """The stream to learn from, and the held-out one (None: nothing)."""

    train: Stream
    held_out: Stream | None = None

    def in_dtype(self, dtype: torch.dtype) -> OwnData:
        """Return it with its real numbers in `dtype`, which the model of a run has."""
        held_out = None if self.held_out is None else in_dtype(self.held_out, dtype)
        return OwnData(in_dtype(self.train, dtype), held_out)


DataFactory = Callable[[int], OwnData]


class OwnFunctions(NamedTuple):
    """A user's functions, each instead of what settings name; None: as the settings say.

    Attributes:
        model: makes the model.
        data: makes the stream of a seed.
        plain: makes the module of centralised training, from the model's weights (`load_matching`).
    """

    model: ModelFactory | None = None
    data: DataFactory | None = None
    plain: ModelFactory | None = None


NO_FUNCTIONS = OwnFunctions()


def load_functions(
    settings: Settings, model: str | None, stream: str | None, plain: str | None = None
) -> OwnFunctions:
    """Return the functions that options have named. Raises SettingsError if they cannot be used."""
    return OwnFunctions(
        None if model is None else load_factory(model),
        None if stream is None else load_stream(stream, settings.stream.names, settings.model_loss),
        None if plain is None else load_factory(plain, BASELINE_OPTION),
    )


def load_stream(
    name: str, names: Names | None = None, model_loss: str | None = None
) -> DataFactory:
    """Return a function that makes the stream of a seed by the user's function `name`.

    The function is called anew for every run, with `seed=` if it takes one, while torch's global
    generator is seeded with it. It returns a stream, or a stream and held-out data; each is a
    `hamdist.streams.Stream`, a DataLoader, or an iterable of (u, y); held-out data may be one pair
    (u, y) of tensors, and has to end.

    Args:
        name: `package.module:function` or `file.py:function`.
        names: the meaning of the keys of batches.
        model_loss: the output that is the model's own loss (see `from_iterable`).

    Raises:
        SettingsError: the function cannot be used.
        StreamError: its result cannot be used.
    """
    function = load_function(STREAM_OPTION, name)
    check_call(STREAM_OPTION, name, function, *(["seed"] if _takes_seed(function) else []))
    return _maker(STREAM_OPTION, function, None, None, {"names": names, "model_loss": model_loss})


def data_of(
    stream: Iterable[Any] | Callable[..., object],
    held_out: object,
    names: Names | None,
    model_loss: str | None,
    classes: Classes,
) -> DataFactory:
    """Return a function that makes the stream of a seed: of one that can be drawn again, or a
    function as of `load_stream`. Raises SettingsError for an iterator.

    Args:
        held_out: what the scores are of, besides what the function returns; None: nothing.
        stream, names, model_loss, classes: see `load_stream` and `from_iterable`.
    """
    if isinstance(stream, Iterator):
        raise SettingsError(
            f"stream is an iterator ({type(stream).__name__}), which can be drawn once, but every "
            "run draws it anew: give a list, a DataLoader, or a function that makes it"
        )
    function: Any = stream
    if not callable(stream) or isinstance(stream, Stream):
        function = lambda: stream  # noqa: E731
        function.__qualname__ = type(stream).__name__
    return _maker("stream", function, held_out, classes, {"names": names, "model_loss": model_loss})


def _maker(
    option: str,
    function: Callable[..., object],
    held_out: object,
    classes: Classes,
    read: dict[str, Any],
) -> DataFactory:
    """Return a function that makes the data of a seed by a user's `function`."""
    takes_seed, names = _takes_seed(function), read["names"]
    # (the scores of what is held out count every row once)
    unweighted = names and {key: name for key, name in names.items() if name != WEIGHT}
    scored = {**read, "names": unweighted}

    def make(seed: int) -> OwnData:
        with generator_kept(seed):
            result = call_function(option, function, **({"seed": seed} if takes_seed else {}))
            both = result if held_out is None else (result, held_out)
            parts = list(both) if isinstance(both, tuple) and len(both) == 2 else [both]
            name = f"{option}: {title(function)}()"
            train = _as_stream(parts[0], classes, read, name, "what to learn from")
            counted = _classes(train.spec)
            others = [[p] if _pair(p) or isinstance(p, Mapping) else p for p in parts[1:]]
            return OwnData(
                train,
                *(_as_stream(part, counted, scored, name, "what is held out") for part in others),
            )

    return make


def _takes_seed(function: Callable[..., object]) -> bool:
    try:
        return "seed" in inspect.signature(function).parameters
    except ValueError:  # some callables written in C have none
        return False


def _classes(spec: SampleSpec) -> Classes:
    """Return the facts about classes that the held-out part shares."""
    if spec.targets is None:
        return spec.classes
    return {n: t.classes for n, t in spec.targets.items() if t.classes is not None} or None


def _pair(result: object) -> bool:
    """Return True if `result` is (u, y), two tensors, and not a collection of such pairs."""
    arrays = (torch.Tensor, np.ndarray)
    return (
        isinstance(result, (tuple, list)) and [isinstance(x, arrays) for x in result] == [True] * 2
    )


def _as_stream(
    result: object, classes: Classes, read: dict[str, Any], name: str, part: str
) -> Stream:
    """Make a stream of a `part` of the result, with `read` as arguments of `from_iterable`."""
    if isinstance(result, Stream):
        return result
    try:
        if isinstance(result, (DataLoader, IterableDataset)):
            return from_loader(result, classes=classes, **read)
        plain = isinstance(result, Iterable) and not isinstance(
            result, (str, Mapping, torch.Tensor)
        )
        if plain and not _pair(result):
            return from_iterable(result, classes=classes, **read)  # type: ignore[arg-type]  # (plain)
    except StreamError as error:
        raise StreamError(f"{name}, {part}: {error}") from error
    kind = "one pair of tensors" if _pair(result) else type(result).__name__
    raise SettingsError(
        f"{name} returned {kind}; return a stream (see "
        "hamdist.streams), a DataLoader or an iterable of (u, y), or a pair of these, the second "
        "of which is held out"
    )


def check_held_out(model: nn.Module, data: OwnData) -> None:
    """Raise SettingsError if held-out data have other shapes or types than the model takes.

    They are used only when the run is over.
    """
    if data.held_out is None or _rows(data.held_out.spec) == _rows(data.train.spec):
        return
    spec = data.held_out.spec
    try:
        with torch.no_grad():
            call_model(copied(model).eval(), example_inputs(spec))
    except Exception as error:  # a user's forward may raise anything
        raise SettingsError(
            f"{STREAM_OPTION}: the model does not take what is held out, {_shown(spec)}, which is "
            f"not like what it learns from, {_shown(data.train.spec)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _shown(spec: SampleSpec) -> str:
    parts = (f"{name} {tuple(shape)} {dtype}" for name, (shape, dtype) in spec.parents.items())
    return ", ".join(parts)


def _rows(spec: SampleSpec) -> dict[str, object]:
    """Return shapes without the batch, and types, of the inputs."""
    return {name: (shape[1:], dtype) for name, (shape, dtype) in spec.parents.items()}


# -- initial weights -------------------------------------------------------------------------------


def load_matching(plain: nn.Module, model: nn.Module | Graph) -> str:
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


def with_saved_weights(model: nn.Module | Graph, file: Path) -> nn.Module:
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
