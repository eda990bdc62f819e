"""Foreign sources as streams: torch loaders, and any Python iterable.

B: batch, O: outputs. Every sample is a batch, its first dimension the batch dimension: nothing here
adds one, since the first dimension of (3, 32) may be either. A source of single rows is batched
by a DataLoader, or by x[None].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from hamdist.errors import StreamError
from hamdist.streams.batch_names import Names
from hamdist.streams.iterable import IterableStream, Sizes

_ARRAYS, _LISTS = (Tensor, np.ndarray), (list, tuple)


def from_loader(
    loader: DataLoader[Any] | IterableDataset[Any],
    *,
    classes: Sizes = None,
    outputs: Sizes = None,
    epochs: int | None = 1,
    names: Names | None = None,
    arguments: Sequence[str] | None = None,
    model_loss: str | None = None,
    ragged: bool | None = None,
) -> IterableStream:
    """Return a stream of the batches of a torch DataLoader, or of an IterableDataset of batches.

    The order and the seed are the loader's own; where it, its sampler, batch sampler or data set
    has `set_epoch`, that is called with 0, 1, ... before each epoch. A loader without
    drop_last=True may end with a shorter batch, which not every level takes. The first sample is
    fetched at once and yielded later; tensors are copied, except where a DataLoader has collated
    them into fresh batches already.

    Args:
        loader: yields Samples, (u, y), u alone, or dicts; u: (B, ...), y: (B,) classes or (B, O)
            values.
        classes, outputs, names, arguments, model_loss, ragged: as of `from_iterable`.
        epochs: number of passes over the loader (None: until the run has its steps).

    Raises:
        StreamError: as for `from_iterable`, and for an object that is neither.
    """
    if not isinstance(loader, (DataLoader, IterableDataset)):
        raise StreamError(
            f"from_loader got a {type(loader).__name__}: give a DataLoader (which also batches a "
            "map-style Dataset), an IterableDataset, or use from_iterable"
        )
    copied = replays = True
    if isinstance(loader, DataLoader):
        # A collate_fn of a user's own may fill one buffer again and again; workers send copies. A
        # sampler may shuffle, and workers draw numbers.
        copied = loader.collate_fn is not default_collate and not loader.num_workers
        replays = loader.batch_size is None and isinstance(loader.dataset, IterableDataset)
    return IterableStream(
        loader,
        classes=classes,
        outputs=outputs,
        copied=copied,
        replays=replays,
        epochs=epochs,
        names=names,
        arguments=arguments,
        model_loss=model_loss,
        ragged=ragged,
    )


def from_iterable(
    iterable: Iterable[Any],
    *,
    classes: Sizes = None,
    outputs: Sizes = None,
    epochs: int | None = 1,
    names: Names | None = None,
    arguments: Sequence[str] | None = None,
    model_loss: str | None = None,
    ragged: bool | None = None,
) -> IterableStream:
    """Return a stream of the samples of any Python iterable, finite or not.

    Each sample is a Sample, (u, y), (u, None) where the target is missing, u alone, or a dict with
    'u' and, if it has them, 'y', 'end' (bool), 'time' (seconds), 'key' (a number or text),
    'late' (targets of earlier samples by their key, or number, for `LateLabels`). u:
    (B, ...), y: (B,) classes or (B, O) values; torch tensors or numpy arrays, copied, so that the
    source may use its buffers again. Samples are batches: a batch dimension is never added. For a
    model with several inputs, u is a dict of them by the names of its arguments, or a tuple by
    position.

    Other dicts (and similar objects, such as transformers' BatchEncoding) are batches by key:
    'label', 'labels', 'target', 'targets' or 'y' is the target, a single other key the input,
    several others the arguments of the model of the same name.

    Where readouts have targets of their own, y is a dict of them by the readout's name, as are
    classes and outputs: {'digit': (B,), 'angle': (B, 1)} with classes={'digit': 10}. The names are
    those of the first sample, of classes and of outputs; a sample may leave out a target, or give
    None for it.

    The first sample is fetched at once, for the shapes, and yielded later. An iterator allows one
    call of `samples()`; an iterable that makes new iterators (a list, a class with __iter__) any
    number. Errors of the source itself pass through.

    Args:
        iterable: the samples.
        classes: number of classes, of integer targets; None for as many as the model predicts.
        outputs: O, for real-valued targets of which the first one is missing.
        epochs: number of passes over the iterable (None: until the run has its steps).
        names: the meaning of the keys of a dict, or of the places of a tuple: 'u' (the only input),
            'y' (the target), 'weight' (of the rows), the name of an argument of the model, or
            'y.NAME' (the target of its output NAME); other keys are then left out.
        arguments: the names of the model's arguments, where they are known.
        model_loss: the model's output that is its own loss (loss `model`): all keys are then
            arguments, those of targets, too, and a number without meaning stands for the target of
            that output.
        ragged: whether samples may have lengths of their own behind the batch (each padded to its
            own longest row); None to look at the samples of a list, and to assume it of a
            DataLoader with a `collate_fn` of its own.

    Raises:
        StreamError: the source yields nothing or something else (names the sample), its first
            sample leaves the kind of target open, an iterator gets a second call of `samples()`, or
            has other `epochs` than 1.
        SettingsError: `classes` and `outputs` for the same readout, or a number below 1.
    """
    _check_batches(iterable)
    return IterableStream(
        iterable,
        classes=classes,
        outputs=outputs,
        copied=True,
        epochs=epochs,
        names=names,
        arguments=arguments,
        model_loss=model_loss,
        ragged=ragged,
    )


def _check_batches(iterable: object) -> None:
    """Raise StreamError for a whole data set: rows, a dict of arrays, or the pair (X, Y).

    (An array of three axes may be batches of inputs, and a list of inputs alike is some.)
    """
    entries = list(iterable.values()) if isinstance(iterable, Mapping) else iterable
    if isinstance(iterable, _ARRAYS):
        entries = [iterable] if iterable.ndim < 3 else []
    arrays = [a for a in entries if isinstance(a, _ARRAYS)] if isinstance(entries, _LISTS) else []
    if isinstance(iterable, _LISTS):
        kinds = {(tuple(a.shape[1:]), a.dtype) for a in arrays}
        pair = len(arrays) == len(iterable) == 2
        arrays = arrays if pair and (isinstance(iterable, tuple) or len(kinds) > 1) else []
    if arrays:
        raise StreamError(
            f"a {type(iterable).__name__} of {' and '.join(str(tuple(a.shape)) for a in arrays)} "
            "is a whole data set, not its batches: give DataLoader(TensorDataset(x, y), "
            "batch_size=32, shuffle=True), or [(x, y)] for one batch of all rows"
        )
