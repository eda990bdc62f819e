"""A stream that a user's own function makes (`--stream file.py:function`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset

from hamdist.errors import SettingsError
from hamdist.loading import called, check_call, load_function, title
from hamdist.streams import Stream, from_iterable, from_loader
from hamdist.streams.sample import SampleSpec

STREAM_OPTION = "--stream"

Classes = int | Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class OwnData:
    """What to learn from, and what is held out (None: nothing)."""

    train: Stream
    held_out: Stream | None = None


def load_stream(name: str) -> Callable[[int], OwnData]:
    """Makes the stream of a seed by the function `package.module:function` or `file.py:function`.

    The function is called anew for every run, with `seed=` where it takes one, while torch's global
    generator is seeded with it. It returns a stream, or a stream and what is held out; each is a
    `hamdist.streams.Stream`, a DataLoader, or an iterable of (u, y). What is held out has to end.
    Raises SettingsError for every way in which it can be wrong, StreamError for what it returns.
    """
    function = load_function(STREAM_OPTION, name)
    takes_seed = _takes_seed(function)
    check_call(STREAM_OPTION, name, function, *(["seed"] if takes_seed else []))

    def make(seed: int) -> OwnData:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = called(STREAM_OPTION, function, **({"seed": seed} if takes_seed else {}))
            parts = list(made) if isinstance(made, tuple) and len(made) == 2 else [made]
            train = _as_stream(parts[0], None, title(function))
            classes = _classes(train.spec)
            held_out = [_as_stream(part, classes, title(function)) for part in parts[1:]]
            return OwnData(train, *held_out)

    return make


def _takes_seed(function: Callable[..., object]) -> bool:
    try:
        return "seed" in inspect.signature(function).parameters
    except ValueError:  # some callables written in C have none
        return False


def _classes(spec: SampleSpec) -> Classes:
    """What the held-out part need not say again."""
    if spec.targets is None:
        return spec.classes
    return {n: one.classes for n, one in spec.targets.items() if one.classes is not None} or None


def _as_stream(made: object, classes: Classes, name: str) -> Stream:
    if isinstance(made, Stream):
        return made
    if isinstance(made, (DataLoader, IterableDataset)):
        return from_loader(made, classes=classes)
    if isinstance(made, Iterable) and not isinstance(made, (str, Mapping, torch.Tensor)):
        return from_iterable(made, classes=classes)
    raise SettingsError(
        f"{STREAM_OPTION}: {name}() returned {type(made).__name__}; return a stream (see "
        "hamdist.streams), a DataLoader or an iterable of (u, y), or a pair of these, the second "
        "of which is held out"
    )
