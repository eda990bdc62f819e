"""The settings of a run: what the YAML files hold, checked by pydantic.

Every name of a level, a knob, a loss, an engine or a transport is an enum here. Shapes and the
graph are checked later, by `dynamics`; what can be checked without them is checked here.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from hamdist.errors import SettingsError


class Level(str, Enum):
    """A named preset of the knobs of locality (the presets: dynamics/locality.py). auto: the one
    that fits the network and the stream (runtime/auto.py)."""

    LOCAL = "local"
    GROUP = "group"
    DELAY_FREE = "delay-free"
    TRACE = "trace"
    HEADS = "heads"
    REVERSIBLE = "reversible"
    BACKPROP = "backprop"
    BPTT = "bptt"
    AUTO = "auto"


class Grouping(str, Enum):
    """What one block holds when neither `blocks` nor `cuts` says so."""

    LAYER = "layer"
    GROUP = "group"
    NETWORK = "network"


class Presentation(str, Enum):
    """How a sample is shown: held at the input for c ticks; entering once and travelling; or in a
    sequence that travels forward and then, sample by sample, in reverse."""

    HOLD = "hold"
    PULSE = "pulse"
    SEQUENCE = "sequence"


class Moves(str, Enum):
    """Which states move in a tick of `hold`: all, or one depth after the other (HL Eq. 10)."""

    ALL = "all"
    LAYER_BY_LAYER = "layer-by-layer"


class Memory(str, Enum):
    """What a block keeps of the past: nothing, its activations, the weights used on them too, or
    nothing because it recomputes its inputs from its outputs."""

    NONE = "none"
    TRACE = "trace"
    TRACE_WEIGHTS = "trace+weights"
    REVERSIBLE = "reversible"


class Update(str, Enum):
    """When weights move: in every tick, in a sample's last tick, when a message arrives, at the
    end of a sequence."""

    TICK = "tick"
    LAST = "last-tick"
    ARRIVAL = "arrival"
    SEQUENCE = "sequence"


class Credit(str, Enum):
    """Where a block's gradient comes from: the messages of its children, or its own readout (no
    message crosses an edge; the label travels with the signal)."""

    MESSAGES = "messages"
    HEADS = "heads"


class Compensation(str, Enum):
    """What a block does about the delay of its messages, by quantities of its own: steps divided by
    (1 + delay)^delay_power; the weights of a sample as they are expected to be when its message
    comes; momentum that looks ahead (Nesterov); states sent as they are expected to be; gradients
    with an estimate of the input that a message answers to."""

    NONE = "none"
    DELAY_SCALED = "delay-scaled"
    WEIGHT_PREDICTION = "weight-prediction"
    LOOK_AHEAD = "look-ahead"
    PROSPECTIVE = "prospective"
    RETROSPECTIVE = "retrospective"


class Order(str, Enum):
    """The order of the updates inside a tick (equations.md; HL Algorithm 1 and Appendix D)."""

    SIMULTANEOUS = "simultaneous"
    OMEGA_FIRST = "omega-first"
    SEQUENTIAL = "sequential"


class TargetOf(str, Enum):
    """Which target a readout of `hold` compares with: its own sample's, or the current one."""

    SAMPLE = "sample"
    CURRENT = "current"


class Readout(str, Enum):
    """The last block as output net (HL Eq. 4), or as a state that is its own output."""

    OUTPUT = "output"
    STATE = "state"


class Balance(str, Enum):
    """What a placement balances between actors."""

    PARAMETERS = "parameters"
    TIME = "time"


class Reset(str, Enum):
    """When a block's h, z or omega is cleared: never, before a sample, before a sequence."""

    NEVER = "never"
    SAMPLE = "sample"
    SEQUENCE = "sequence"


class CutBalance(str, Enum):
    """What `blocks: N` balances between blocks: what they learn, what they take, or the real
    numbers that they make (which a trace keeps)."""

    PARAMETERS = "parameters"
    TIME = "time"
    ACTIVATIONS = "activations"


class FirstStep(str, Enum):
    """Whether the first momentum step is dampened: not, as in PyTorch; or as all later ones, which
    is the plain table of HL Appendix E."""

    UNDAMPENED = "undampened"
    DAMPENED = "dampened"


class Record(str, Enum):
    """What is recorded per tick: the energies, or the states and costates as well."""

    ENERGY = "energy"
    TRAJECTORY = "trajectory"


class Decay(str, Enum):
    """How the step size falls over the run, to `learning.floor` of itself."""

    NONE = "none"
    LINEAR = "linear"
    COSINE = "cosine"


class Loss(str, Enum):
    """Cross-entropy of class targets, or 1/2 the squared error; both are means over the batch."""

    CROSS_ENTROPY = "cross-entropy"
    MSE = "mse"


class EngineKind(str, Enum):
    """One process, or Ray actors."""

    INPROCESS = "inprocess"
    RAY = "ray"


class Pin(str, Enum):
    """Whether the thread of an actor that steps its blocks stays on one processor."""

    AUTO = "auto"
    OFF = "off"


class Compress(str, Enum):
    """How a signal travels: as it is, or in fewer bytes (dynamics/compress.py)."""

    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Feedback(str, Enum):
    """Which signals of codec 'int8' carry the error of the one before them: none, all, the states
    alone or the messages alone."""

    OFF = "off"
    ON = "on"
    STATES = "states"
    MESSAGES = "messages"


class Spread(str, Enum):
    """Which hosts of a cluster actors go to: Ray decides; as few hosts as hold them; evenly many to
    each; busy actors to fast hosts, by measurement. Neighbours stay together where they can."""

    AUTO = "auto"
    PACKED = "packed"
    SPREAD = "spread"
    PROFILE = "profile"


class BlockDType(str, Enum):
    """The type in which a block computes and keeps its weights."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


class Step(str, Enum):
    """How a block's step is computed. closed: in closed form where its module has one, by torch.
    native: as closed, and linear layers on one row (batch 1) by C code. auto: native where hamdist
    was installed with it and a process has one thread. autograd: by autograd alone."""

    AUTO = "auto"
    NATIVE = "native"
    CLOSED = "closed"
    AUTOGRAD = "autograd"


class TransportKind(str, Enum):
    """How signals cross between actors. auto: shm on one host (ipc where the platform has no such
    memory, or a queue is too long for it), tcp between hosts."""

    AUTO = "auto"
    SHM = "shm"
    IPC = "ipc"
    TCP = "tcp"


class DeviceSignals(str, Enum):
    """How signals cross between CUDA blocks of two actors on one host. auto: they stay in GPU
    memory (CUDA IPC) where that works, which is tried before the start, else they go through host
    memory, and a warning says why. host: through host memory. ipc: as auto, but where it does not
    work the run is refused."""

    AUTO = "auto"
    HOST = "host"
    IPC = "ipc"


class Encryption(str, Enum):
    """Whether signals that go by tcp are encrypted, and both ends ask for a key of this run. auto:
    they are. on: they are, and a cluster whose Ray asks for no token, and so hands the keys to
    anybody, is refused. off: whoever can reach a socket can read and send."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Source(str, Enum):
    """The streams that settings can name."""

    DIGITS = "digits"
    FASHION_MNIST = "fashion-mnist"
    MNIST_1D = "mnist1d"
    DRIFT = "drift"
    SEQUENCES = "sequences"
    SIGNAL = "signal"
    CHARACTERS = "characters"


class Part(str, Enum):
    """What a run is scored on: the test part, or (to choose settings) a sixth of the training part,
    which is then not learned from."""

    TEST = "test"
    VALIDATION = "validation"


class View(str, Enum):
    """What an item of a text is: one token of it, or all of it."""

    TOKENS = "tokens"
    SEQUENCES = "sequences"


class Known(str, Enum):
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


class Motion(str, Enum):
    """What a smooth stream does between two samples."""

    FADE = "fade"
    SHIFT = "shift"
    ROTATE = "rotate"


class ModelKind(str, Enum):
    """Models that settings can name; `--model file.py:function` and the API take any."""

    MLP = "mlp"
    RESIDUAL_MLP = "residual-mlp"
    REVERSIBLE_MLP = "reversible-mlp"
    MIDPOINT = "midpoint"
    RNN = "rnn"
    GRU = "gru"
    LSTM = "lstm"
    TRACKER = "tracker"
    RESNET = "resnet"
    CONVNET = "convnet"
    VIT = "vit"
    GPT = "gpt"
    LSTM_LAYERS = "lstm-layers"


class DType(str, Enum):
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(ge=1)]

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Speed = Positive | Literal["inf", "depth"]


def _off(value: object) -> object:
    """`off` and `on` as they were written: YAML reads them as false and true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class ModelSettings(_Section):
    """kind, width of the hidden layers, depth: number of layers that have weights (of rnn, gru and
    lstm: of cells; of resnet, convnet, vit, gpt, lstm-layers: of residual layers). tau: step of
    integration of `midpoint`. width, bias of `tracker`: its neurons, and whether they have one.
    width of `resnet` and `convnet`: its channels before they double. stabilise: normed inputs and
    scaled residuals for its layers (dynamics/stabilise.py), of a model of one's own, too. heads: of
    vit and gpt; patch: its side, of vit."""

    kind: ModelKind = ModelKind.MLP
    stabilise: bool = False
    width: Positive = 128
    depth: Positive = 5
    tau: Above0 = 0.1
    bias: bool = True
    heads: Positive = 4
    patch: Positive = 7


class SmoothSettings(_Section):
    """Turns a stream into one that changes slowly: each sample takes `frames` items."""

    frames: Positive = 20
    motion: Motion = Motion.FADE


class CanvasSettings(_Section):
    """Images move over a canvas of `side` pixels, `speed` pixels an item; each stays for `frames`
    items, over the last `fade` of which the next one fades in (streams/canvas.py)."""

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


class DriftSettings(_Section):
    """The synthetic drifting stream: Gaussian classes that jump every `period` items."""

    features: Positive = 16
    classes: Annotated[int, Field(ge=2)] = 4
    period: Positive = 500
    noise: Rate = 0.5


class SequenceSettings(_Section):
    """Texts of two classes. count: how many to learn from; None: all that the path holds (of the
    grammar 100). length: tokens of a sequence; of longer texts the last ones count. vocabulary:
    words at most, of texts from a path."""

    count: Positive | None = None
    length: Positive = 20
    view: View = View.SEQUENCES
    targets: Known = Known.LAST
    vocabulary: Positive = 10_000


class CharacterSettings(_Section):
    """Windows of a text. length: characters of one."""

    length: Positive = 64


class SignalSettings(_Section):
    """A real-valued target over time. amplitude, offset: None for the kind's own. period, tau
    (between two items) and dwell (of one patch) in seconds."""

    kind: SignalKind = SignalKind.SINUSOID
    amplitude: Above0 | None = None
    offset: Annotated[float, Field(allow_inf_nan=False)] | None = None
    period: Above0 = 2 * math.pi
    tau: Above0 = 1e-3
    dwell: Above0 = 5.0


class PaceSettings(_Section):
    """Samples arrive in real time. period: seconds between two of them, or `stamps`: at their own
    time stamps, counted from the first one."""

    period: Above0 | Literal["stamps"] = "stamps"
    late: Late = Late.DROP


class StreamSettings(_Section):
    """batch: rows of an item (of signals, and of texts seen token by token, 1 unless given).
    path: the folder of the IDX files; of texts a folder or a file; of characters a file. missing:
    share of items whose target is withheld.

    late_targets: items by which the targets come later than their inputs. target_delay: rejoins
    each target with the sample that came so many items before it; None: by the targets' tags.
    patience: samples that may wait for a target. pace: in real time. canvas: images move over a
    larger canvas. evaluate: what a run is scored on.
    """

    source: Source = Source.DIGITS
    batch: Positive = 32
    path: Path | None = None
    smooth: SmoothSettings | None = None
    canvas: CanvasSettings | None = None
    evaluate: Part = Part.TEST
    drift: DriftSettings = DriftSettings()
    sequences: SequenceSettings = SequenceSettings()
    signal: SignalSettings = SignalSettings()
    characters: CharacterSettings = CharacterSettings()
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    late_targets: Annotated[int, Field(ge=0)] = 0
    target_delay: Positive | None = None
    patience: Positive = 64
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
        if late and delay is not None and delay != late:
            raise ValueError(
                f"'late_targets' is {late} and 'target_delay' is {delay}: each target would meet "
                "another sample than its own; give one of them, or both alike"
            )
        if max(late, delay or 0) > self.patience:
            raise ValueError(
                f"targets come {max(late, delay or 0)} items late, but 'patience' is "
                f"{self.patience}: no sample would wait for its target; raise 'patience'"
            )
        return self


_IMAGES = (Source.DIGITS, Source.FASHION_MNIST)


def _by_row(raw: Mapping[str, Any]) -> bool:
    """Whether items of these stream settings have one row unless they say otherwise."""
    if raw.get("source") == Source.SEQUENCES.value:
        own = raw.get("sequences")
        view = own.get("view") if isinstance(own, Mapping) else getattr(own, "view", None)
        return view == View.TOKENS.value
    return raw.get("source") == Source.SIGNAL.value


class PartitionSettings(_Section):
    """How the model is cut into blocks: a number of blocks, or the names of the modules that begin
    a block (at any depth: `layer2.1.conv2`); without either the level's grouping decides. blocks:
    on the way from the input to an output; every further output is a block more. balance: what
    `blocks` balances.

    slices: by block (patterns as in a shell, names first), over how many blocks its neurons are
    spread. delay: ticks per edge; delays: of single edges, by name ('block0->block1', 'block*->*';
    names first; a sliced block's name stands for all its slices); auto: the fewest that keep every
    block busy, by a measurement of the links at start (engine 'ray')."""

    blocks: Positive | None = None
    cuts: tuple[str, ...] | None = None
    balance: CutBalance = CutBalance.PARAMETERS
    delay: Positive = 1
    slices: dict[str, Positive] = {}
    delays: dict[str, Positive] | Literal["auto"] = {}

    @model_validator(mode="after")
    def _one_way(self) -> PartitionSettings:
        if self.blocks is not None and self.cuts is not None:
            raise ValueError("give 'blocks' or 'cuts', not both")
        return self


def _listed(value: object) -> object:
    """One name as a list of one; `none` as a list of none."""
    if isinstance(value, (str, Compensation)):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [one for one in value if one != Compensation.NONE.value]
    return value


Compensations = Annotated[tuple[Compensation, ...], BeforeValidator(_listed)]


class LocalityOverrides(_Section):
    """Knobs of locality; what is not given keeps the level's preset. truncation: how many of the
    last samples of a sequence are gone through in reverse (level 'bptt'; not given: all).

    gate: weights move only while the block's input has been still for as long as its messages take,
    up to that share of itself (true: 0.1). lead: ticks by which states are sent ahead (compensation
    'prospective'); blend: of the input's estimate (compensation 'retrospective'). Either asks for
    its compensation, as `delay_power` does."""

    grouping: Grouping | None = None
    speed: Speed | None = None
    presentation: Presentation | None = None
    moves: Moves | None = None
    memory: Memory | None = None
    credit: Credit | None = None
    update: Update | None = None
    compensation: Compensations | None = None
    delay_power: Rate | None = None
    gate: bool | Above0 | None = None
    lead: Above0 | None = None
    blend: Above0 | None = None
    order: Order | None = None
    target: TargetOf | None = None
    readout: Readout | None = None
    truncation: Positive | None = None


class CourseSettings(_Section):
    """A number that changes with time: `values` one after the other, the last one from then on, or
    with `cycle` all of them again and again. every: ticks (or samples) that each value stands for;
    smooth: it goes on a straight line from one to the next instead."""

    values: Annotated[tuple[Rate, ...], Field(min_length=1)]
    cycle: bool = False
    every: Positive = 1
    smooth: bool = False


class ResetSettings(_Section):
    """When the blocks' states, costates and weight costates are cleared. h, where it is not given:
    never, but with presentation 'sequence' before each sequence."""

    h: Reset | None = None
    z: Reset = Reset.NEVER
    omega: Reset = Reset.NEVER


class BlockDynamicsSettings(_Section):
    """What one block has otherwise. beta: of the block, or of its parameters by name (patterns as
    in a shell: a name itself goes first, then the first pattern that fits)."""

    c: Above0 | None = None
    eta: Rate | None = None
    eta_z: Rate | None = None
    eta_omega: Rate | None = None
    beta: Rate | dict[str, Rate] | None = None


class DynamicsSettings(_Section):
    """Hamilton's equations (equations.md). tau in seconds, or `stamps`: the differences of the
    stream's time stamps; c in 1/seconds (default 1/tau), eta in 1/seconds (one for both costates,
    or eta_z and eta_omega). tau and phi may change from tick to tick (phi where the presentation is
    not 'hold': from sample to sample). What is not given follows from `learning`: beta = lr/tau,
    phi = (1 - dampening)/tau, eta_omega = (1 - momentum)/tau, eta_z = 0; with presentation
    'sequence' eta_omega = 0, and omega begins each way back with momentum times its value.

    weight_cost: r_w of the term r_w/2 |theta|^2 of the Hamiltonian (NILP). blocks: by name
    (patterns as in a shell), what single blocks have otherwise. limit: of the norm of a block's
    h, z or omega, and of a loss; above it the run is stopped as a numerical failure.
    """

    tau: Above0 | CourseSettings | Literal["stamps"] = 1.0
    c: Above0 | None = None
    eta: Rate | None = None
    eta_z: Rate | None = None
    eta_omega: Rate | None = None
    beta: Rate | None = None
    phi: Rate | CourseSettings | None = None
    sign: Literal[-1, 1] = -1
    weight_cost: Rate = 0.0
    reset: ResetSettings = ResetSettings()
    blocks: dict[str, BlockDynamicsSettings] = {}
    limit: Above0 = 1e12


class AdaptiveSettings(_Section):
    """Adam's step: each weight's beta is divided by the root of the running mean of its squared
    gradients (of which it keeps `memory` from update to update), plus epsilon. learning.momentum
    is Adam's beta_1, memory its beta_2."""

    memory: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Above0 = 1e-8


class AverageSettings(_Section):
    """A moving average of a block's own weights, with which a run is evaluated and exported.
    decay: the share of it that stays when the weights come in; every: updates between two looks at
    the weights (`decay` is per update, whatever `every` is)."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    every: Positive = 1


class InputRule(str, Enum):
    """What a linear layer's step does about its inputs: takes their mean out, or their correlation
    as well (dynamics/whitening.py)."""

    CENTRED = "centred"
    WHITENED = "whitened"


class InputsSettings(_Section):
    """Statistics of a layer's own inputs. memory: of their mean, from update to update; of rule
    'whitened', damping: of the inverse; look: updates between two looks at the covariance; refresh:
    between two inverses."""

    rule: InputRule = InputRule.WHITENED
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.99
    damping: Above0 = 0.1
    look: Positive = 4
    refresh: Positive = 50


def _rule_alone(value: object) -> object:
    """`centred` as `{rule: centred}`; off as it was written."""
    if isinstance(value, str) and value != "off":
        return {"rule": value}
    return _off(value)


Inputs = Annotated[InputsSettings | Literal["off"], BeforeValidator(_rule_alone)]


class HeadsSettings(_Section):
    """A readout of its own for every block without one, which teaches that block alone: a layer
    norm and a linear layer, which are no part of the exported model. weight: of its step, beside
    that of the messages (not given: 0.3; at level 'heads', where there are none, 1). readout: the
    one whose targets and loss it takes (not given: the first). norm: with the layer norm."""

    weight: Above0 | None = None
    readout: str | None = None
    norm: bool = True


def _decay_alone(value: object) -> object:
    """`0.99` as `{decay: 0.99}`; off as it was written."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"decay": value}
    return _off(value)


Averaging = Annotated[AverageSettings | Literal["off"], BeforeValidator(_decay_alone)]


class BlockLearningSettings(_Section):
    """What one block has otherwise; what is not given is as for all blocks."""

    lr: Rate | None = None
    average: Averaging | None = None
    clip: Annotated[Above0 | Literal["off"], BeforeValidator(_off)] | None = None
    heads: Annotated[Above0 | Literal["off"], BeforeValidator(_off)] | None = None
    inputs: Inputs | None = None


class LearningSettings(_Section):
    """The step size and its course, in the words of gradient descent (HL Appendix E). decay: over
    the run, to the share `floor` of lr; warmup: samples over which it first rises; course: a factor
    of lr by sample (of beta, where that is given), besides (rates.py). adaptive:
    not given: one beta for all of a block's weights. average: of each block's weights, for
    evaluation and export; clip: the most that the norm of a block's gradient may be; heads: the
    blocks' own readouts; inputs: steps that do not depend on the mean, or on the correlation, of a
    linear layer's inputs. blocks: by name (patterns as in a shell, names first), what single blocks
    have otherwise (`heads` is then the weight, or off)."""

    lr: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dampening: Annotated[float, Field(ge=0, lt=1)] = 0.0
    first_step: FirstStep = FirstStep.UNDAMPENED
    decay: Decay = Decay.NONE
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0
    course: CourseSettings | None = None
    adaptive: AdaptiveSettings | None = None
    average: Averaging = "off"
    clip: Annotated[Above0 | Literal["off"], BeforeValidator(_off)] = "off"
    heads: HeadsSettings | None = None
    inputs: Inputs = "off"
    blocks: dict[str, BlockLearningSettings] = {}

    @model_validator(mode="after")
    def _adam_is_not_dampened(self) -> LearningSettings:
        if self.adaptive is not None and self.dampening:
            raise ValueError(
                f"'dampening' is {self.dampening:g} with 'adaptive', whose steps do not depend on "
                "it: leave it out"
            )
        return self


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is 'cpu', 'cuda', 'cuda:N' or 'auto'")
    return value


Device = Annotated[str, AfterValidator(_device)]


class BlockEngineSettings(_Section):
    """Where a block lives, and how it computes. For its actor: host: by address, name, Ray's id, or
    a custom resource or label that hosts have; cpus, gpus: what Ray reserves, gpus may be a share;
    resources: custom ones. Its own: device (auto: cuda where the actor sees a GPU, else cpu),
    dtype (what comes in is cast to it), autocast to bf16 (its deviation is reported)."""

    host: str | None = None
    cpus: Above0 | None = None
    gpus: Above0 | None = None
    resources: dict[str, Above0] = {}
    device: Device | None = None
    dtype: BlockDType | None = None
    autocast: Annotated[Literal["bf16", "off"], BeforeValidator(_off)] = "off"

    @model_validator(mode="after")
    def _share_of_a_gpu(self) -> BlockEngineSettings:
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"'gpus' is {self.gpus:g}: a share is at most 1, or a whole number")
        if self.gpus is not None and self.device == "cpu":
            raise ValueError(f"'gpus' is {self.gpus:g} with device 'cpu': leave one of them out")
        return self


class EngineSettings(_Section):
    """actors: how many processes, or auto: as many as pay. placement: the blocks of each actor, by
    name. balance: what is shared out evenly between actors where nothing else is said. threads: of
    each process. step: how blocks compute (closed forms equal autograd to round-off). pin: each
    process to processors of its own. address: of a Ray cluster (none: a local Ray is started).
    encryption: of signals that go by tcp, with keys made for the run (off warns).
    device_signals: between CUDA blocks of two actors on one host.
    queue: signals that may wait on an edge beyond those that the schedule keeps in flight.
    bundle: the most signals that an edge sends as one message where its delay allows several; auto:
    half as many as it allows, so that the other half of the delay hides the link. A sample then
    reaches a delayed edge with its followers.
    blocks: by name (patterns as in a shell, names first), where single blocks live and how they
    compute; device: of those that do not say. spread: of the actors over the hosts of a cluster.
    compress: how signals travel, one word for all edges between blocks, or by edge (patterns as in
    a shell, names first; `u->*` from the stream). It is part of what a run means: what a receiver
    sees is the decoded signal, in one process too. feedback: which int8 signals carry errors on.
    stall_warning, stall_limit: seconds without progress until the watchdog speaks, and gives up.
    link_delay: for tests and studies: seconds by which every message between two actors comes later
    than it does.
    """

    kind: EngineKind = EngineKind.INPROCESS
    actors: Positive | Literal["auto"] = "auto"
    placement: tuple[tuple[str, ...], ...] | None = None
    balance: Balance = Balance.TIME
    threads: Positive = 1
    step: Step = Step.AUTO
    pin: Annotated[Pin, BeforeValidator(_off)] = Pin.AUTO
    address: str | None = None
    transport: TransportKind = TransportKind.AUTO
    encryption: Annotated[Encryption, BeforeValidator(_off)] = Encryption.AUTO
    device_signals: DeviceSignals = DeviceSignals.AUTO
    queue: Positive = 4
    bundle: Annotated[Positive | Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    device: Device = "cpu"
    blocks: dict[str, BlockEngineSettings] = {}
    spread: Spread = Spread.AUTO
    compress: Compress | dict[str, Compress] = Compress.NONE
    feedback: Annotated[Feedback, BeforeValidator(_off)] = Feedback.MESSAGES
    stall_warning: Annotated[float, Field(gt=0)] = 10.0
    stall_limit: Annotated[float, Field(gt=0)] = 300.0
    link_delay: Rate = 0.0

    @model_validator(mode="after")
    def _a_way_for_gpus(self) -> EngineSettings:
        if self.device_signals is not DeviceSignals.IPC:
            return self
        if self.transport in (TransportKind.IPC, TransportKind.TCP):
            raise ValueError(
                f"'device_signals' is 'ipc' with transport {self.transport.value!r}, which goes "
                "through host memory: use transport 'auto' or 'shm'"
            )
        if self.link_delay:
            raise ValueError(
                f"'device_signals' is 'ipc' with link_delay {self.link_delay:g}, which makes "
                "signals late on their way through host memory: leave one of them out"
            )
        return self


class MetricsSettings(_Section):
    """window: items that one prequential window covers. limit: windows that are kept; with more,
    neighbours are joined. record: what is recorded per tick, by block; record_every: ticks between
    two entries."""

    window: Positive = 50
    limit: Annotated[int, Field(ge=2)] = 2048
    record: Record | None = None
    record_every: Positive = 1


class SnapshotSettings(_Section):
    """Snapshots of a run, and what is done when a part of it is lost. path: a folder (of all
    hosts), or a URL that fsspec knows (s3://...); without one no snapshots are taken. every: ticks
    from one to the next; seconds: the same in time; without either every 30 seconds. keep: how many
    stay.

    recover: lost actors are started again from the latest snapshot (engine 'ray'). memory: MiB of
    signals that an actor keeps for that; with more a snapshot is taken. attempts: failures of one
    block at one tick that end the run. silence: seconds after which an actor that does not answer
    counts as lost.
    """

    path: str | None = None
    every: Positive | None = None
    seconds: Above0 | None = None
    keep: Positive = 2
    recover: bool = True
    memory: Positive = 256
    attempts: Positive = 3
    silence: Above0 = 10.0


class CompareSettings(_Section):
    """What `hamdist compare` runs beside centralised backpropagation, and how many seeds."""

    levels: tuple[Level, ...] = (Level.BACKPROP, Level.TRACE, Level.LOCAL)
    seeds: Positive = 1


class LevelOverrides(_Section):
    """What a level changes in the rest of the settings."""

    partition: dict[str, Any] = {}
    locality: dict[str, Any] = {}
    dynamics: dict[str, Any] = {}
    learning: dict[str, Any] = {}


class Settings(_Section):
    """One run, or one comparison. loss: of the model's output; of one that returns several, for
    all, or by output (those without one are not learned). `levels` holds what applies to a level
    only."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: DType = DType.FLOAT32
    steps: Positive | None = None
    level: Level = Level.TRACE
    loss: Loss | Annotated[dict[str, Loss], Field(min_length=1)] = Loss.CROSS_ENTROPY
    model: ModelSettings = ModelSettings()
    stream: StreamSettings = StreamSettings()
    partition: PartitionSettings = PartitionSettings()
    locality: LocalityOverrides = LocalityOverrides()
    dynamics: DynamicsSettings = DynamicsSettings()
    learning: LearningSettings = LearningSettings()
    engine: EngineSettings = EngineSettings()
    metrics: MetricsSettings = MetricsSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    compare: CompareSettings = CompareSettings()
    levels: dict[Level, LevelOverrides] = {}

    @model_validator(mode="after")
    def _levels_are_settings(self) -> Settings:
        for level in self.levels:
            _merged(self, level)
        return self

    def for_level(self, level: Level) -> Settings:
        """These settings at `level`, with what `levels` says about it merged in."""
        return _merged(self, level)


def _merged(settings: Settings, level: Level) -> Settings:
    if level is Level.AUTO:  # which level's overrides hold shows later
        others = {one: own for one, own in settings.levels.items() if one is not Level.AUTO}
        made = _laid(settings, level)
        return made.model_copy(update={"levels": others}) if others else made
    return _laid(settings, level)


def _laid(settings: Settings, level: Level) -> Settings:
    raw = settings.model_dump(mode="json", exclude={"levels"}, exclude_unset=True)
    overrides = settings.levels.get(level, LevelOverrides()).model_dump(exclude_unset=True)
    try:
        return Settings.model_validate(merge(raw, {**overrides, "level": level.value}))
    except ValidationError as error:
        raise ValueError(f"in 'levels.{level.value}': {describe(error)}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


LEVEL_SECTIONS = frozenset(LevelOverrides.model_fields)


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, for overrides that a user gives: what they say holds at every level, also where
    `levels` says otherwise, unless they speak of `levels` themselves."""
    merged = merge(base, over)
    sections = {k: v for k, v in over.items() if k in LEVEL_SECTIONS and isinstance(v, Mapping)}
    levels = merged.get("levels")
    if sections and isinstance(levels, Mapping):
        merged["levels"] = {
            level: merge(own, sections) if isinstance(own, Mapping) else own
            for level, own in levels.items()
        }
        merged = merge(merged, {k: v for k, v in over.items() if k == "levels"})
    return merged


_TYPE = re.compile(
    r"(constrained-\w+|str-enum\[\w+\]|literal\[.*\]|dict\[.*\]|float|int|str|[A-Z]\w*Settings)$"
)


def describe(error: ValidationError) -> str:
    """One line per wrong field: its path, what is wrong, the value received. A field that may be
    of several types is wrong in one of these ways or the other."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in error.errors(include_url=False):
        # pydantic names the types of a union inside the path, as no field is named
        path = [str(part) for part in item["loc"]]
        where = ".".join(part for part in path if not _TYPE.match(part)) or "settings"
        if item["type"] == "extra_forbidden":
            found.setdefault((where, ""), []).append("no such setting")
            continue
        value = item["input"]
        given = "" if isinstance(value, Mapping) else f" (received {_shown.repr(value)})"
        found.setdefault((where, given), []).append(item["msg"].removeprefix("Value error, "))
    return "\n".join(
        f"{where}: {', or: '.join(dict.fromkeys(reasons))}{given}"
        for (where, given), reasons in found.items()
    )


# More than any settings have; beyond it a few lines of text could take minutes or the whole stack.
MAX_NESTING = 50
MAX_VALUES = 10_000

_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxdict, _shown.maxlist, _shown.maxtuple = 4, 20, 20, 20
_shown.maxstring, _shown.maxother, _shown.maxlong = 200, 200, 40


def _load(text: str) -> Any:
    """What YAML `text` holds. Raises ValueError saying why it does not hold settings: besides what
    is no YAML, tags (which name types), and text that is small and becomes large by its aliases."""
    try:
        _look_through(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ValueError(f"{where}no valid YAML: {problem}") from None


def _look_through(text: str) -> None:
    """Raises ValueError for what `_load` refuses. Counts values as often as aliases repeat them."""
    sizes: dict[str, int] = {}  # by anchor
    open_: list[tuple[str | None, int]] = []  # the collections around: anchor, values before it
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"line {line}: the tag {tag!r}: settings are plain values")
        before, anchor = values, getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ValueError(f"line {line}: *{anchor} stands before the end of &{anchor}")
            values += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if anchor is not None:
                sizes[anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            values += 1
            open_.append((anchor, before))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        if values > MAX_VALUES or len(open_) > MAX_NESTING:
            raise ValueError(
                f"line {line}: more than {MAX_VALUES:,} values, or {MAX_NESTING} inside each other"
            )


def parse_override(text: str) -> dict[str, Any]:
    """`stream.batch=8` as {'stream': {'batch': 8}}; the value is read as YAML.

    Raises SettingsError where there is no '=' or the value is no YAML.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise SettingsError(f"--set {text!r}: write it as key=value, for example stream.batch=8")
    try:
        parsed: Any = _load(value)
    except ValueError as error:
        raise SettingsError(f"--set {text!r}: the value is no YAML: {error}") from None
    parts = key.split(".")
    if len(parts) > MAX_NESTING:
        raise SettingsError(f"--set {text!r}: a key of {len(parts)} parts")
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)


def read_yaml(text: str, origin: str) -> Any:
    """What YAML `text` holds: plain values, and no more of them than it looks like.

    Raises SettingsError naming `origin`, and the line.
    """
    try:
        return _load(text)
    except ValueError as error:
        raise SettingsError(f"{origin}, {error}") from None


def read_settings(text: str, origin: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Settings from YAML `text`, with `overrides` laid over it in order (`lay_over`).

    Raises SettingsError naming `origin`, and the line or the field.
    """
    raw = read_yaml(text, origin)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{origin}: settings are a mapping of names to values, not {_shown.repr(raw)}"
        )
    for override in overrides:
        raw = lay_over(raw, override)
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{origin}: {describe(error)}") from None


def to_yaml(settings: Settings) -> str:
    """The settings in full, readable by `read_settings`."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    return text
