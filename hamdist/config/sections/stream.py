"""The section `stream`: where the samples come from, how many at a time, how late, how smooth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hamdist.config.sections.section import Above0, Positive, Rate, Section


class Source(str, Enum):
    """The streams that settings can name."""

    DIGITS = "digits"
    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"
    CIFAR10 = "cifar10"
    MNIST_1D = "mnist1d"
    DRIFT = "drift"
    SEQUENCES = "sequences"
    SIGNAL = "signal"
    CHARACTERS = "characters"
    MEMORY = "memory"


class Split(str, Enum):
    """Data that a run is scored on: the test part, or (to choose settings) a sixth of the training
    part, which is then not learned from.
    """

    TEST = "test"
    VALIDATION = "validation"


class View(str, Enum):
    """A sample of a text: one token of it, or all of it."""

    TOKENS = "tokens"
    SEQUENCES = "sequences"


class LabelledTokens(str, Enum):
    """Tokens of a text that carry its class: the last one, or every one."""

    LAST = "last"
    EVERY = "every"


class MemoryTask(str, Enum):
    """Generated tasks of memory (streams/sources/memory.py): symbols to be repeated, a bit to be
    stored and recalled, cues on two sides to be counted."""

    COPY = "copy"
    RECALL = "recall"
    EVIDENCE = "evidence"


class SignalKind(str, Enum):
    """A target that moves in time: a sinusoid, one around an offset, cosines and constants patched
    together, constants that jump."""

    SINUSOID = "sinusoid"
    OFFSET = "offset"
    PATCHED = "patched"
    CONSTANTS = "constants"


class Late(str, Enum):
    """Samples that arrive while the network is busy: all but the newest are dropped, or all are
    kept and wait their turn.
    """

    DROP = "drop"
    KEEP = "keep"


class Relearn(str, Enum):
    """Samples whose target comes late: predicted when they come, scored by that prediction, and
    shown again with the target; or held back until the target comes.
    """

    AGAIN = "again"
    TRACE = "trace"
    WAIT = "wait"


class Motion(str, Enum):
    """Motion of a smooth stream between two samples."""

    FADE = "fade"
    SHIFT = "shift"
    ROTATE = "rotate"


class SmoothSettings(Section):
    """Turns a stream into one that changes slowly."""

    frames: Positive = 20
    """Samples that each takes."""
    motion: Motion = Motion.FADE
    """What happens between two."""


class CanvasSettings(Section):
    """Images move over a canvas, clip after clip."""

    side: Positive = 40
    """Pixels of a side."""
    frames: Positive = 20
    """Samples that each image stays for."""
    fade: Annotated[int, Field(ge=0)] = 10
    """Last samples of a clip, over which the next image fades in."""
    speed: Above0 = 1.0
    """Pixels a sample."""

    @model_validator(mode="after")
    def _fades_inside(self) -> CanvasSettings:
        if self.fade >= self.frames:
            raise ValueError(
                f"'fade' is {self.fade}, but a clip has {self.frames} samples ('frames'): fewer of "
                "them can fade"
            )
        return self


class ImageSettings(Section):
    """Images from files."""

    steps: Positive | None = None
    """Steps into which an image is cut, row by row: 784 of one pixel or 28 of one row are
    sequential MNIST; not given: the image whole."""
    permutation: Annotated[int, Field(ge=0)] | None = None
    """Seed of a fixed order of the pixels, the same in every image (permuted MNIST); not given: as
    they are."""


class DriftSettings(Section):
    """The synthetic drifting stream: Gaussian classes that jump."""

    features: Positive = 16
    """Numbers of a row."""
    classes: Annotated[int, Field(ge=2)] = 4
    """Number of classes."""
    period: Positive = 500
    """Samples between two jumps."""
    noise: Rate = 0.5
    """Standard deviation of a row around its class."""


class SequenceSettings(Section):
    """Texts of two classes."""

    count: Positive | None = None
    """Texts to learn from; not given: all that the path holds (of the grammar 100)."""
    length: Positive = 20
    """Tokens of a sequence; of longer texts the last ones count."""
    view: View = View.SEQUENCES
    """A sample is one token of each text, or all of them."""
    targets: LabelledTokens = LabelledTokens.LAST
    """Which tokens carry the class."""
    vocabulary: Positive = 10_000
    """Words at most, of texts from a path."""


class CharacterSettings(Section):
    """Windows of a text."""

    length: Positive = 64
    """Characters of a window."""


class MemorySettings(Section):
    """Sequences of a generated task of memory."""

    task: MemoryTask = MemoryTask.RECALL
    """Symbols to be repeated, a bit to be stored and recalled, cues on two sides to be counted."""
    length: Positive = 20
    """Of copy the symbols, of recall the tokens of a sequence, of evidence those of the pause."""
    ends: bool = True
    """Whether sequences end, and states begin anew; false: they go on for ever."""


class SignalSettings(Section):
    """A real-valued target over time."""

    kind: SignalKind = SignalKind.SINUSOID
    """Its form."""
    amplitude: Above0 | None = None
    """Not given: the kind's own."""
    offset: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Not given: the kind's own."""
    period: Above0 = 2 * math.pi
    """Seconds."""
    tau: Above0 = 1e-3
    """Seconds between two samples."""
    dwell: Above0 = 5.0
    """Seconds of one patch."""
    lead: Above0 | None = None
    """Seconds by which the target is ahead of the signal, which then is the input; not given: there
    is no input."""


class PaceSettings(Section):
    """Samples arrive in real time."""

    period: Above0 | Literal["stamps"] = "stamps"
    """Seconds between two samples, or `stamps`: at their own time stamps."""
    late: Late = Late.DROP
    """What becomes of samples that arrive while the network is busy."""


class StreamSettings(Section):
    """Source of the samples, and everything that is done to them."""

    source: Source = Source.DIGITS
    """The stream."""
    batch: Positive = 32
    """Rows of a sample; of signals, and of texts seen token by token, 1 unless given."""
    path: Path | None = None
    """Folder of the files of images; of texts a folder or file; of characters a file."""
    smooth: SmoothSettings | None = None
    """Let samples fade, shift or rotate into each other."""
    canvas: CanvasSettings | None = None
    """Let images move over a larger canvas."""
    images: ImageSettings = ImageSettings()
    """Of sources `mnist`, `fashion-mnist` and `cifar10`."""
    evaluate: Split = Split.TEST
    """What a run is scored on: the test part, or a sixth of the training part."""
    drift: DriftSettings = DriftSettings()
    """Of source `drift`."""
    sequences: SequenceSettings = SequenceSettings()
    """Of source `sequences`."""
    signal: SignalSettings = SignalSettings()
    """Of source `signal`."""
    characters: CharacterSettings = CharacterSettings()
    """Of source `characters`."""
    memory: MemorySettings = MemorySettings()
    """Of source `memory`."""
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of samples whose target is withheld."""
    late_targets: Annotated[int, Field(ge=0)] = 0
    """Samples by which targets come later than their inputs."""
    target_delay: Positive | None = None
    """Rejoin each target with the input that came so many samples before; not given: by the
    targets' tags."""
    relearn: Relearn | None = None
    """What becomes of a sample whose target comes late: shown again with it, learned with the trace
    kept so long, or waiting for it; not given: again (with a pace: wait)."""
    patience: Positive = 64
    """Samples that may wait for a target."""
    names: dict[str, str] | None = None
    """What the keys of a user's batches mean, by key: `u`, `y`, an argument of the model,
    `y.OUTPUT`."""
    pace: PaceSettings | None = None
    """Let samples arrive in real time."""

    @model_validator(mode="before")
    @classmethod
    def _single_rows(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "batch" not in raw and _by_row(raw):
            return {**raw, "batch": 1}
        return raw

    @model_validator(mode="after")
    def _parts_fit(self) -> StreamSettings:
        source, canvas, images = self.source.value, self.canvas, self.images != ImageSettings()
        late, delay = self.late_targets, self.target_delay
        most = max(late, delay or 0)
        again = self.relearn in (Relearn.AGAIN, Relearn.TRACE)
        faults: dict[str, object] = {
            f"'batch' is {self.batch}, but a signal has one row: leave it out": self.source
            is Source.SIGNAL
            and self.batch != 1,
            f"'canvas' moves images, which source {source!r} has not: leave it out, or use "
            f"{' or '.join(s.value for s in _IMAGES)}": canvas and self.source not in _IMAGES,
            "'canvas' and 'smooth': each has frames of its own; leave one of them out": canvas
            and self.smooth,
            f"'images' belongs to {', '.join(s.value for s in _FILES)}, not to source "
            f"{source!r}: leave it out": images and self.source not in _FILES,
            "'canvas' moves images, 'images' cuts them: give one": canvas and images,
            f"'relearn' is {self.relearn and self.relearn.value!r} with 'pace', whose samples come "
            "at times of their own: use 'wait', whose scores know no delay": again and self.pace,
            f"'late_targets' is {late} and 'target_delay' is {delay}: each target would meet "
            "another sample than its own; give one of them, or both alike": late
            and delay not in (None, late),
            f"targets come {most} samples late, but 'patience' is {self.patience}: no sample would "
            "wait for its target; raise 'patience'": most > self.patience and not self.again,
        }
        for fault in (text for text, holds in faults.items() if holds):
            raise ValueError(fault)
        return self

    @property
    def again(self) -> bool:
        """Return True if samples whose targets come late are predicted when they come."""
        late = self.late_targets > 0 or self.target_delay is not None
        return late and self.pace is None and self.relearn is not Relearn.WAIT


_FILES = (Source.MNIST, Source.FASHION_MNIST, Source.CIFAR10)
_IMAGES = (Source.DIGITS, Source.MNIST, Source.FASHION_MNIST)


def _by_row(raw: Mapping[str, Any]) -> bool:
    """Return True if samples of these stream settings have one row by default."""
    if raw.get("source") == Source.SEQUENCES.value:
        sequences = raw.get("sequences")
        view = (
            sequences.get("view")
            if isinstance(sequences, Mapping)
            else getattr(sequences, "view", None)
        )
        return view == View.TOKENS.value
    return raw.get("source") == Source.SIGNAL.value
