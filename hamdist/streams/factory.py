"""From settings to streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hamdist.config import LabelledTokens, Late, Source, Split, StreamSettings, View
from hamdist.errors import SettingsError
from hamdist.streams.sample import Stream
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.characters import CharacterStream, character_parts, held_out_windows
from hamdist.streams.sources.datasets import DataSet, digits, mnist1d, validation_split
from hamdist.streams.sources.drift import DriftStream
from hamdist.streams.sources.images import IMAGE_FILES, read_images
from hamdist.streams.sources.memory import MemoryStream
from hamdist.streams.sources.sequences import TokenStream
from hamdist.streams.sources.signals import SignalStream
from hamdist.streams.sources.text_files import CLASSES, Texts
from hamdist.streams.sources.texts import Vocabulary, classes_of, corpus, padded
from hamdist.streams.wrappers.canvas import Canvas, still
from hamdist.streams.wrappers.late_targets import Delayed, LateLabels, Rejoin
from hamdist.streams.wrappers.pace import Paced
from hamdist.streams.wrappers.smooth import Smooth, Withhold, first_frame, nearest_sample

HELD_OUT_BATCH = 256  # rows of the held-out sequences of a task of memory


def make_stream(settings: StreamSettings, *, seed: int, dtype: torch.dtype) -> Stream:
    """Return the stream that the settings name, endless and portable.

    Its source is made smooth, then targets are withheld, then late (and learned from when they
    come, or waited for), then it is paced in real time.

    Args:
        settings: of the stream.
        seed: of the order of the samples, and of everything that is drawn.
        dtype: of floating-point inputs.

    Raises:
        StreamError: a data set is missing, or a motion has inputs that are no square images.
        SettingsError: a source without a validation part is to be scored on one.
    """
    _check_part(settings)
    stream = _source(settings, seed, dtype)
    if settings.smooth is not None:
        stream = Smooth(stream, settings.smooth.frames, settings.smooth.motion)
    if settings.missing > 0:
        stream = Withhold(stream, settings.missing, seed)
    if settings.late_targets > 0:
        tagged = settings.target_delay is None and not settings.again
        stream = Delayed(stream, settings.late_targets, tagged=tagged)
    if settings.again:
        delay = settings.target_delay or settings.late_targets
        return LateLabels(stream, delay, kept=settings.relearn == "trace")
    if settings.late_targets > 0 or settings.target_delay is not None:
        stream = Rejoin(stream, settings.target_delay, patience=settings.patience)
    if settings.pace is None:
        return stream
    period = None if isinstance(settings.pace.period, str) else settings.pace.period
    return Paced(stream, period, settings.pace.late)


def _source(settings: StreamSettings, seed: int, dtype: torch.dtype) -> Stream:
    if settings.source is Source.DRIFT:
        return _drift(settings, seed, dtype)
    if settings.source is Source.SIGNAL:
        return SignalStream(**dict(settings.signal), seed=seed, dtype=dtype)
    if settings.source is Source.SEQUENCES:
        return _sequences(settings, seed)
    if settings.source is Source.MEMORY:
        return MemoryStream(**dict(settings.memory), batch=settings.batch, seed=seed, dtype=dtype)
    if settings.source is Source.CHARACTERS:
        ids, _ = _characters(settings)
        return CharacterStream(ids, settings.characters.length, settings.batch, seed)
    data = _data_set(settings, seed, dtype)
    if settings.canvas is None:
        return data.train
    return Canvas(data.train, **dict(settings.canvas), background=_background(data), seed=seed)


def _characters(settings: StreamSettings) -> tuple[Tensor, Tensor]:
    return character_parts(settings.path, validation=settings.evaluate is Split.VALIDATION)


def _background(data: DataSet) -> float:
    """Return the value of a blank pixel."""
    return float(data.x.min())


def _check_part(settings: StreamSettings) -> None:
    """Raise SettingsError where there is no validation part, or no key that has a name."""
    if settings.names is not None:
        raise SettingsError(
            f"stream.names: source {settings.source.value!r} has no keys; names are for batches of "
            "your own (--stream): leave it out"
        )
    tokens = settings.source is Source.SEQUENCES and settings.sequences.view is View.TOKENS
    none = tokens or settings.source is Source.SIGNAL
    if settings.evaluate is Split.VALIDATION and none:
        source = "sequences seen token by token" if tokens else settings.source.value
        raise SettingsError(
            f"stream.evaluate: {source} has no validation part; leave it out, or use another source"
        )


def held_out(
    settings: StreamSettings, *, seed: int, dtype: torch.dtype, samples: int
) -> tuple[Tensor, Tensor] | None:
    """Return x (N, F) and y (N,) int64 on which a run is evaluated.

    x is (N, T) int64 for tokens; y is (N, T) for characters. They are the held-out part of a data
    set or of texts; of the drifting stream new rows of the concept in force at the run's last
    sample. With `evaluate: validation` a sixth of the training part instead (of the drifting stream
    the same: its runs differ by seed). Never smooth or withheld; on a canvas where the stream's
    images are.

    Args:
        settings, seed: of the stream.
        dtype: of x, where it is real.
        samples: number of samples the run has read, including dropped ones.

    Returns:
        None for a signal, whose prequential loss says how well it is followed, for texts and tasks
        that are read token by token (`held_out_tokens`), and for texts too few to hold some out.

    Raises:
        StreamError: as for `make_stream`.
    """
    if settings.source in (Source.SIGNAL, Source.MEMORY):
        return None
    if settings.source is Source.SEQUENCES:
        if settings.sequences.view is View.TOKENS:
            return None
        texts, vocabulary = _texts(settings, seed)
        if not texts.held_out:
            return None
        return _fixed(texts.held_out, vocabulary, settings.sequences.length)
    if settings.source is Source.CHARACTERS:
        return held_out_windows(_characters(settings)[1], settings.characters.length)
    if settings.source is Source.DRIFT:
        last = nearest_sample(max(samples, 1) - 1, _frames(settings))
        return _drift(settings, seed, dtype).held_out(last)
    data = _data_set(settings, seed, dtype)
    if settings.canvas is not None:
        return still(data.x, settings.canvas.side, _background(data)), data.y
    return data.x, data.y


def drifts(settings: StreamSettings, samples: int) -> tuple[int, ...]:
    """Return the samples that are the first of a new concept.

    In a smooth stream these are the samples whose targets are the first of a new concept. The
    result is () without drift, and where samples may be dropped, which makes them unpredictable.

    Args:
        settings: of the stream.
        samples: how many are looked at, from the first one on.
    """
    dropping = settings.pace is not None and settings.pace.late is Late.DROP
    if settings.source is not Source.DRIFT or dropping:
        return ()
    frames = _frames(settings)
    sources = range(settings.drift.period, samples, settings.drift.period)
    starts = (first_frame(source, frames) for source in sources)
    return tuple(start for start in starts if start < samples)


def _frames(settings: StreamSettings) -> int:
    return 1 if settings.smooth is None else settings.smooth.frames


def held_out_tokens(
    settings: StreamSettings, *, seed: int, dtype: torch.dtype = torch.float32
) -> TokenStream | MemoryStream | None:
    """Return a stream of the held-out sequences, once, one after the other, token by token; None
    where it is no stream of texts or tasks of memory that are read so.

    Args:
        settings: of the stream.
        seed: of the sequences, where they are made up.
        dtype: of floating-point inputs.
    """
    if settings.source is Source.MEMORY:
        fields, part = dict(settings.memory), settings.evaluate.value
        fields |= {"batch": HELD_OUT_BATCH, "sequences": 4}
        return MemoryStream(**fields, seed=seed, dtype=dtype, part=part)
    if settings.source is not Source.SEQUENCES or settings.sequences.view is not View.TOKENS:
        return None
    texts, vocabulary = _texts(settings, seed)
    ids = _last_tokens(texts.held_out, vocabulary, settings.sequences.length)
    labels = classes_of(texts.held_out)
    return TokenStream(ids, labels, 1, seed, classes=len(CLASSES), shuffled=False, endless=False)


def _texts(settings: StreamSettings, seed: int) -> tuple[Texts, Vocabulary]:
    sequences = settings.sequences
    texts, vocabulary = corpus(sequences.count, seed, settings.path, sequences.vocabulary)
    if settings.evaluate is Split.VALIDATION:
        train, held = validation_split(list(texts.train))
        texts = replace(texts, train=train, held_out=held)
    return texts, vocabulary


def _sequences(settings: StreamSettings, seed: int) -> Stream:
    sequences = settings.sequences
    texts, vocabulary = _texts(settings, seed)
    if sequences.view is View.SEQUENCES:
        x, y = _fixed(texts.train, vocabulary, sequences.length)
        classes, tokens = len(CLASSES), len(vocabulary)
        return ArrayStream(x, y, settings.batch, seed, classes=classes, tokens=tokens)
    ids, labels = _last_tokens(texts.train, vocabulary, sequences.length), classes_of(texts.train)
    every = sequences.targets is LabelledTokens.EVERY
    return TokenStream(
        ids, labels, settings.batch, seed, classes=len(CLASSES), tokens=len(vocabulary), every=every
    )


def _last_tokens(
    texts: Sequence[tuple[Sequence[str], int]], vocabulary: Vocabulary, length: int
) -> list[Tensor]:
    """Return the last `length` tokens of each text."""
    return [vocabulary.encode(tokens[-length:]) for tokens, _ in texts]


def _fixed(
    texts: Sequence[tuple[Sequence[str], int]], vocabulary: Vocabulary, length: int
) -> tuple[Tensor, Tensor]:
    """Return x (N, T) and y (N,) of texts."""
    return padded(_last_tokens(texts, vocabulary, length), length), classes_of(texts)


def _drift(settings: StreamSettings, seed: int, dtype: torch.dtype) -> DriftStream:
    return DriftStream(**dict(settings.drift), batch=settings.batch, seed=seed, dtype=dtype)


def _data_set(settings: StreamSettings, seed: int, dtype: torch.dtype) -> DataSet:
    validation = settings.evaluate is Split.VALIDATION
    if settings.source is Source.DIGITS:
        return digits(settings.batch, seed, dtype, validation=validation)
    if settings.source is Source.MNIST_1D:
        return mnist1d(settings.batch, seed, dtype, validation=validation)
    return read_images(
        IMAGE_FILES[settings.source.value],
        settings.batch,
        seed,
        dtype,
        settings.path,
        steps=settings.images.steps,
        permutation=settings.images.permutation,
        validation=validation,
    )
