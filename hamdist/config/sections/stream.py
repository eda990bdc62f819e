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
    FASHION_MNIST = "fashion-mnist"
    MNIST_1D = "mnist1d"
    DRIFT = "drift"
    SEQUENCES = "sequences"
    SIGNAL = "signal"
    CHARACTERS = "characters"


class Split(str, Enum):
    """What a run is scored on: the test part, or (to choose settings) a sixth of the training part,
    which is then not learned from."""

    TEST = "test"
    VALIDATION = "validation"


class View(str, Enum):
    """What an item of a text is: one token of it, or all of it."""

    TOKENS = "tokens"
    SEQUENCES = "sequences"


class LabelledTokens(str, Enum):
    """Which tokens of a text carry its class: the last one, or every one."""

    LAST = "last"
    EVERY = "every"


class SignalKind(str, Enum):
    """A target that moves in time: a sinusoid, one around an offset, cosines and constants patched
    together, constants that jump."""

    SINUSOID = "sinusoid"
    OFFSET = "offset"
    PATCHED = "patched"
    CONSTANTS = "constants"


class Late(str, Enum):
    """What becomes of samples that arrive while the network is busy: all but the newest are
    dropped, or all are kept and wait their turn."""

    DROP = "drop"
    KEEP = "keep"


class Relearn(str, Enum):
    """What becomes of a sample whose target comes late: it is predicted when it comes, scored by
    that prediction, and shown again with its target; or it waits for its target outside."""

    AGAIN = "again"
    WAIT = "wait"


class Motion(str, Enum):
    """What a smooth stream does between two samples."""

    FADE = "fade"
    SHIFT = "shift"
    ROTATE = "rotate"


class SmoothSettings(Section):
    """Turns a stream into one that changes slowly: each sample takes `frames` items."""

    frames: Positive = 20
    motion: Motion = Motion.FADE


class CanvasSettings(Section):
    """Images move over a canvas of `side` pixels, `speed` pixels an item; each stays for `frames`
    items, over the last `fade` of which the next one fades in (streams/wrappers/canvas.py)."""

    side: Positive = 40
    frames: Positive = 20
    fade: Annotated[int, Field(ge=0)] = 10
    speed: Above0 = 1.0

    @model_validator(mode="after")
    def _fades_inside(self) -> CanvasSettings:
        if self.fade >= self.frames:
            raise ValueError(
                f"'fade' is {self.fade}, but a clip has {self.frames} items ('frames'): fewer of "
                "them can fade"
            )
        return self


class DriftSettings(Section):
    """The synthetic drifting stream: Gaussian classes that jump every `period` items."""

    features: Positive = 16
    classes: Annotated[int, Field(ge=2)] = 4
    period: Positive = 500
    noise: Rate = 0.5


class SequenceSettings(Section):
    """Texts of two classes. count: how many to learn from; None: all that the path holds (of the
    grammar 100). length: tokens of a sequence; of longer texts the last ones count. vocabulary:
    words at most, of texts from a path."""

    count: Positive | None = None
    length: Positive = 20
    view: View = View.SEQUENCES
    targets: LabelledTokens = LabelledTokens.LAST
    vocabulary: Positive = 10_000


class CharacterSettings(Section):
    """Windows of a text. length: characters of one."""

    length: Positive = 64


class SignalSettings(Section):
    """A real-valued target over time. amplitude, offset: None for the kind's own. period, tau
    (between two items) and dwell (of one patch) in seconds."""

    kind: SignalKind = SignalKind.SINUSOID
    amplitude: Above0 | None = None
    offset: Annotated[float, Field(allow_inf_nan=False)] | None = None
    period: Above0 = 2 * math.pi
    tau: Above0 = 1e-3
    dwell: Above0 = 5.0


class PaceSettings(Section):
    """Samples arrive in real time. period: seconds between two of them, or `stamps`: at their own
    time stamps, counted from the first one."""

    period: Above0 | Literal["stamps"] = "stamps"
    late: Late = Late.DROP


class StreamSettings(Section):
    """batch: rows of an item (of signals, and of texts seen token by token, 1 unless given).
    path: the folder of the IDX files; of texts a folder or a file; of characters a file. missing:
    share of items whose target is withheld.

    late_targets: items by which the targets come later than their inputs. relearn: what becomes of
    such samples (not given: again; with a pace, wait). target_delay: rejoins
    each target with the sample that came so many items before it; None: by the targets' tags.
    patience: samples that may wait for a target. names: what the keys of a user's batches mean, by
    key: u, y, an argument of the model, y.OUTPUT (streams/batch_names.py). pace: in real time.
    canvas: images move over a larger canvas. evaluate: what a run is scored on.
    """

    source: Source = Source.DIGITS
    batch: Positive = 32
    path: Path | None = None
    smooth: SmoothSettings | None = None
    canvas: CanvasSettings | None = None
    evaluate: Split = Split.TEST
    drift: DriftSettings = DriftSettings()
    sequences: SequenceSettings = SequenceSettings()
    signal: SignalSettings = SignalSettings()
    characters: CharacterSettings = CharacterSettings()
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    late_targets: Annotated[int, Field(ge=0)] = 0
    target_delay: Positive | None = None
    relearn: Relearn | None = None
    patience: Positive = 64
    names: dict[str, str] | None = None
    pace: PaceSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _single_rows(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "batch" not in raw and _by_row(raw):
            return {**raw, "batch": 1}
        return raw

    @model_validator(mode="after")
    def _parts_fit(self) -> StreamSettings:
        if self.source is Source.SIGNAL and self.batch != 1:
            raise ValueError(f"'batch' is {self.batch}, but a signal has one row: leave it out")
        if self.canvas is not None and self.source not in _IMAGES:
            raise ValueError(
                f"'canvas' moves images, which source {self.source.value!r} has not: leave it out, "
                f"or use {' or '.join(source.value for source in _IMAGES)}"
            )
        if self.canvas is not None and self.smooth is not None:
            raise ValueError(
                "'canvas' and 'smooth': each has frames of its own; leave one of them out"
            )
        late, delay = self.late_targets, self.target_delay
        if self.relearn is Relearn.AGAIN and self.pace is not None:
            raise ValueError(
                "'relearn' is 'again' with 'pace', whose samples come at times of their own: use "
                "'wait', whose scores know no delay"
            )
        if late and delay is not None and delay != late:
            raise ValueError(
                f"'late_targets' is {late} and 'target_delay' is {delay}: each target would meet "
                "another sample than its own; give one of them, or both alike"
            )
        if max(late, delay or 0) > self.patience and not self.again:
            raise ValueError(
                f"targets come {max(late, delay or 0)} items late, but 'patience' is "
                f"{self.patience}: no sample would wait for its target; raise 'patience'"
            )
        return self

    @property
    def again(self) -> bool:
        """Whether samples whose targets come late are shown again."""
        late = self.late_targets > 0 or self.target_delay is not None
        return late and self.pace is None and self.relearn is not Relearn.WAIT


_IMAGES = (Source.DIGITS, Source.FASHION_MNIST)


def _by_row(raw: Mapping[str, Any]) -> bool:
    """Whether items of these stream settings have one row unless they say otherwise."""
    if raw.get("source") == Source.SEQUENCES.value:
        own = raw.get("sequences")
        view = own.get("view") if isinstance(own, Mapping) else getattr(own, "view", None)
        return view == View.TOKENS.value
    return raw.get("source") == Source.SIGNAL.value
