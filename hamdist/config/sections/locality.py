"""The level, and the section `locality`: the knobs that a level presets."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import BeforeValidator

from hamdist.config.sections.section import Above0, Positive, Rate, Section


class Level(str, Enum):
    """A named preset of the knobs of locality (dynamics/schedule/levels.py). auto: the one that
    fits the network and the stream (runtime/train/choose_level.py)."""

    LOCAL = "local"
    GROUP = "group"
    DELAY_FREE = "delay-free"
    TRACE = "trace"
    HEADS = "heads"
    REVERSIBLE = "reversible"
    BACKPROP = "backprop"
    PIPELINE = "pipeline"
    BPTT = "bptt"
    AUTO = "auto"


class Grouping(str, Enum):
    """Contents of one block when neither `blocks` nor `cuts` is given."""

    LAYER = "layer"
    GROUP = "group"
    NETWORK = "network"


class Presentation(str, Enum):
    """Ways to show a sample: held at the input for c ticks; entering once and travelling; or in a
    sequence that travels forward and then, sample by sample, in reverse.
    """

    HOLD = "hold"
    PULSE = "pulse"
    SEQUENCE = "sequence"


class Moves(str, Enum):
    """States that move in a tick of `hold`: all, or one depth after the other (HL Eq. 10)."""

    ALL = "all"
    LAYER_BY_LAYER = "layer-by-layer"


class Memory(str, Enum):
    """Data that a block keeps of the past: none, its activations, the weights used on them too, or
    none because it recomputes its inputs from its outputs.
    """

    NONE = "none"
    TRACE = "trace"
    TRACE_WEIGHTS = "trace+weights"
    REVERSIBLE = "reversible"


class Update(str, Enum):
    """When weights move: every tick, a sample's last, at a message, or at a sequence's end."""

    TICK = "tick"
    LAST = "last-tick"
    ARRIVAL = "arrival"
    SEQUENCE = "sequence"


class Credit(str, Enum):
    """Source of a block's gradient: the messages of its children, or its own readout (no message
    crosses an edge; the label travels with the signal).
    """

    MESSAGES = "messages"
    HEADS = "heads"


class Compensation(str, Enum):
    """Local corrections for the delay of a block's messages: steps divided by
    (1 + delay)^delay_power; the weights of a sample as they are expected to be when its message
    comes; momentum that looks ahead (Nesterov); states sent as they are expected to be; gradients
    with an estimate of the input that a message answers to.
    """

    NONE = "none"
    DELAY_SCALED = "delay-scaled"
    WEIGHT_PREDICTION = "weight-prediction"
    LOOK_AHEAD = "look-ahead"
    PROSPECTIVE = "prospective"
    RETROSPECTIVE = "retrospective"


class Order(str, Enum):
    """The order of the updates inside a tick (docs: concepts/equations; HL Alg. 1, Appendix D)."""

    SIMULTANEOUS = "simultaneous"
    OMEGA_FIRST = "omega-first"
    SEQUENTIAL = "sequential"


class TargetOf(str, Enum):
    """Target that a readout of `hold` compares with: its own sample's, or the current one."""

    SAMPLE = "sample"
    CURRENT = "current"


class Readout(str, Enum):
    """The last block as output net (HL Eq. 4), or as a state that is its own output."""

    OUTPUT = "output"
    STATE = "state"


Speed = Positive | Literal["inf", "depth"]
Microbatches = Positive | Literal["auto"]


def _listed(value: object) -> object:
    """Return one name as a list of one, `none` as an empty list."""
    if isinstance(value, (str, Compensation)):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [method for method in value if method != Compensation.NONE.value]
    return value


Compensations = Annotated[tuple[Compensation, ...], BeforeValidator(_listed)]


class LocalityOverrides(Section):
    """Knobs of locality; what is not given keeps the level's preset."""

    level: str | None = None
    """A level of your own: `FILE.py:NAME` of a `hamdist.OwnLevel`, whose code then runs. It says
    when samples enter and pass the blocks, in place of `speed`."""
    grouping: Grouping | None = None
    """What one block holds where `partition` does not say it."""
    speed: Speed | None = None
    """Hops of a signal between two samples; `depth`: the depth of the graph; `inf`: one sample at a
    time."""
    presentation: Presentation | None = None
    """How a sample is shown: held, as a travelling pulse, or in a sequence that comes back."""
    moves: Moves | None = None
    """Which states move in a tick of `hold`: all, or one depth after the other (HL Eq. 10)."""
    memory: Memory | None = None
    """What a block keeps of the past."""
    credit: Credit | None = None
    """Where a block's gradient comes from."""
    update: Update | None = None
    """When weights move."""
    compensation: Compensations | None = None
    """What a block does about late messages: one or a list."""
    delay_power: Rate | None = None
    """p of the step lr / (1 + delay)^p; asks for `delay-scaled`."""
    gate: bool | Above0 | None = None
    """Weights move only while the block's input has been still for as long as messages take, up to
    this share of itself (true: 0.1)."""
    lead: Above0 | None = None
    """Ticks by which states are sent ahead; asks for `prospective`."""
    blend: Above0 | None = None
    """Of the input's estimate; asks for `retrospective`."""
    order: Order | None = None
    """Order of the updates inside a tick (docs: concepts/equations)."""
    target: TargetOf | None = None
    """Which target a readout of `hold` compares with: its own sample's, or the current one."""
    readout: Readout | None = None
    """The last block as output net (HL Eq. 4), or as a state."""
    truncation: Positive | None = None
    """Samples of a sequence that are gone through in reverse (level `bptt`); not given: all."""
    microbatches: Microbatches | None = None
    """Parts of a sample's rows that travel one behind the other (level `pipeline`); `auto`: as many
    as have 32 rows each, 8 at most, and two of 8 rows or more."""
    accumulate: Positive | None = None
    """Samples whose gradients make one step of a block, their mean (presentation 'pulse')."""
    double_buffered: bool | None = None
    """Two versions of the weights: a group of `accumulate` samples goes forward and backward
    through the weights of the step before the latest, so that every step is late by one, at any
    depth (PipeDream-2BW)."""
