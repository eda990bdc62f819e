"""Golden files: trajectories of an implementation that shares nothing with this one, run again.

The format is that of shared/golden/README.md. A file is known by what it holds, never by its name:

    tick      spec, u, yhat, tau, phi, c, ...   Hamilton's equations tick by tick   tick_golden
    tracking  z, x0, W0, q, ...                 the tracker of NILP                 tracking_golden
    bptt      th.Wx, th.Wh, th.b, r, ...        the reversed stream                 bptt
    sgd       X, Y, order, lr, ...              torch.optim.SGD                     gradient_descent
    leapfrog  W, b, h0, N, kind, ...            the midpoint rule                   reversible

The entries `rtol` and `atol` are the tolerances of all checks of their file, as numpy has them:
|a - b| <= atol + rtol |b|; what is not given is as usual.

This module finds and reads the files and measures distances; those named on the right run them.
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hamdist.errors import SettingsError
from hamdist.study.verify.oracles.check import FAULTS, Check, Difference, failure, largest, reason

Array: TypeAlias = NDArray[Any]
GoldenData: TypeAlias = Mapping[str, Array]

# |a - b| <= RTOL (|b| + FLOOR), which is numpy's rtol 1e-9, atol 1e-11.
RTOL, FLOOR = 1e-9, 1e-2
_floor = ContextVar("_floor", default=FLOOR)  # of the file that is checked
ORACLE = "golden file"
ORDERS = ("simultaneous", "omega_first", "sequential")

# By the names that files have for them.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    **dict.fromkeys(("linear", "identity", "none"), nn.Identity),
    **dict.fromkeys(("sigmoid", "logistic"), nn.Sigmoid),
    **dict.fromkeys(("relu", "rectifier"), nn.ReLU),
}

# Entries that mark a kind, and the module whose function checks_of(data, name) checks it.
KINDS = {
    "tick": (("spec", "u", "yhat", "tau", "phi", "c"), "oracles.tick_golden"),
    "tracking": (("z", "x0", "W0", "q", "r_w"), "oracles.tracking_golden"),
    "bptt": (("th.Wx", "th.Wh", "th.b", "yhat", "r"), "topics.bptt"),
    "sgd": (("X", "Y", "order", "lr"), "topics.gradient_descent"),
    "leapfrog": (("W", "b", "h0", "N", "kind"), "topics.reversible"),
}


def shipped() -> Path:
    """Return the folder of the golden files that come with hamdist.

    In the repository those are its tests', which a wheel holds beside this module.
    """
    installed = Path(__file__).parent / "golden_files"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "tests" / "golden"


def files(folder: Path) -> list[Path]:
    """Return the .npz files in `folder`, by name.

    Raises SettingsError if there are none, or it cannot be read.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".npz")
    except OSError as error:
        raise SettingsError(
            f"--golden '{folder}': cannot read this folder ({error.strerror}); give the folder of "
            "the golden files"
        ) from None
    if not paths:
        raise SettingsError(
            f"--golden '{folder}': no .npz file in this folder; give the folder of the golden files"
        )
    return paths


def shipped_checks(kind: str) -> Iterator[Check]:
    """Yield the checks of the shipped files of a kind that tests/study/verify/oracles.py made."""
    for path in files(shipped() / "autograd"):
        if kind_of(read(path)) == kind:
            yield from file_checks(path)


def checks(full: bool, paths: Sequence[Path]) -> Generator[Check, None, None]:  # noqa: ARG001
    """Yield the checks of all files."""
    for path in paths:
        yield from file_checks(path)


def file_checks(path: Path) -> list[Check]:
    """Return the checks of one file; for an unreadable file one that fails with the reason."""
    try:
        data = read(path)
        _, module = KINDS[kind_of(data)]
        checks_of = importlib.import_module(f"hamdist.study.verify.{module}").checks_of
        return [_within(check, data) for check in checks_of(data, path.name)]
    except FAULTS as error:
        return [failure(f"{path.name}: not understood: {reason(error)}", error)]


def _within(check: Check, data: GoldenData) -> Check:
    """Return the check with the tolerances that the file names."""
    rtol, atol = (number(data, key) if key in data else None for key in ("rtol", "atol"))
    if rtol is not None and not 0 < rtol < 1:
        raise SettingsError(f"entry 'rtol' is {rtol:g}; give a number between 0 and 1")
    if atol is not None and not 0 <= atol < np.inf:
        raise SettingsError(f"entry 'atol' is {atol:g}; give a number from 0 on")
    bound = check.bound if rtol is None else rtol
    if atol is None or not bound:
        return replace(check, bound=bound)
    context = copy_context()
    context.run(_floor.set, atol / bound)
    return replace(check, bound=bound, measure=partial(context.run, check.measure))


def read(path: Path) -> dict[str, Array]:
    """Return the entries of `path`. Raises SettingsError if it is no file of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as entries:
            return {key: entries[key] for key in entries.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise SettingsError(f"not an .npz file of plain arrays ({reason(error)})") from None


def kind_of(data: GoldenData) -> str:
    """Return the kind of a file with these entries."""
    for kind, (entries, _) in KINDS.items():
        if all(e in data for e in entries):
            return kind
    raise SettingsError(
        f"its entries ({', '.join(sorted(data)[:8])}, ...) are those of no kind: "
        f"{'; '.join(f'{kind} has ' + ', '.join(e) for kind, (e, _) in KINDS.items())}"
    )


# -- entries --------------------------------------------------------------------------------------


def entry(data: GoldenData, key: str, shape: Sequence[int] | None = None) -> Array:
    """Return an entry. Raises SettingsError if `key` is missing or has another shape."""
    if key not in data:
        raise SettingsError(f"entry {key!r} is missing")
    if shape is not None and data[key].shape != tuple(shape):
        raise SettingsError(f"entry {key!r} has shape {data[key].shape}, not {tuple(shape)}")
    return data[key]


def number(data: GoldenData, key: str) -> float:
    """Return an entry that is one number. Raises SettingsError for another."""
    return float(entry(data, key, ()))


def choice(data: GoldenData, key: str, names: Sequence[str]) -> str:
    """Return an entry that is one of `names`. Raises SettingsError for another."""
    value = str(entry(data, key, ()))
    if value not in names:
        raise SettingsError(f"entry {key!r} is {value!r}; known: {', '.join(names)}")
    return value


# -- dense layers: a layer is (outputs, activation) ------------------------------------------------


def read_layers(layers: Iterable[tuple[int, str]], where: str) -> tuple[tuple[int, str], ...]:
    """Return dense layers. Raises SettingsError, which names `where`, for an unknown activation."""
    for _, activation in layers:
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise SettingsError(f"{where} has the activation {activation!r}; known: {names}")
    return tuple((int(outputs), activation) for outputs, activation in layers)


def weight_shapes(
    layers: Iterable[tuple[int, str]], inputs: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names i.W, i.b of the weights of layer i, in the order of the module's."""
    for i, (outputs, _) in enumerate(layers):
        yield f"{i}.W", (outputs, inputs)
        yield f"{i}.b", (outputs,)
        inputs = outputs


def dense_layers(layers: Iterable[tuple[int, str]], inputs: int) -> list[nn.Sequential]:
    """Return the layers in float64, each a linear module with its activation."""
    modules = []
    for outputs, activation in layers:
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        modules.append(nn.Sequential(linear, ACTIVATIONS[activation]()))
        inputs = outputs
    return modules


# -- distances ------------------------------------------------------------------------------------


def distance(ours: Array, expected: Array) -> float:
    """Return max |a - b| / (|b| + floor), 0 where they are equal; NaN if one alone is NaN."""
    if ours.shape != expected.shape:
        raise SettingsError(f"shape {ours.shape} instead of {expected.shape}")
    apart = np.abs(ours - expected)
    with np.errstate(divide="ignore"):  # (infinitely far apart, where atol is 0)
        apart = np.where(apart == 0, 0.0, apart / (np.abs(expected) + _floor.get() + (apart == 0)))
    apart = np.where(np.isnan(ours) & np.isnan(expected), 0.0, apart)
    return float(np.max(apart, initial=0.0))


def worst(pairs: Mapping[str, tuple[Array, Array]]) -> Difference:
    """Return the largest `distance` among (ours, expected), and where it is.

    The pairs are compared by name, entry by entry along the first axis.
    """
    return largest(
        (f"{name} at k = {k}", distance(np.asarray(a), np.asarray(b)))
        for name, (ours, expected) in pairs.items()
        for k, (a, b) in enumerate(zip(ours, expected, strict=True))
    )
