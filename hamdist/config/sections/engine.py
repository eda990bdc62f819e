"""The section `engine`: where blocks live, how they compute, how their signals travel."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hamdist.config.sections.section import Above0, Positive, Rate, Section, as_written


class EngineKind(str, Enum):
    """One process, or Ray actors."""

    INPROCESS = "inprocess"
    RAY = "ray"


class Balance(str, Enum):
    """What a placement balances between actors."""

    PARAMETERS = "parameters"
    TIME = "time"


class Bits(str, Enum):
    """What is done where processes of a run, or the run that a snapshot was taken of, compute other
    bits (runtime/process/arithmetic.py). warn: it is said before the first tick. exact: the run is
    refused. portable: every process is started so that hosts of different kinds agree
    (runtime/process/portable.py), at the price of slower products; where they do not even so, the
    run is refused."""

    WARN = "warn"
    EXACT = "exact"
    PORTABLE = "portable"


class Pin(str, Enum):
    """Whether the thread of an actor that steps its blocks stays on one processor."""

    AUTO = "auto"
    OFF = "off"


class Compress(str, Enum):
    """How a signal travels: as it is, or in fewer bytes (runtime/signals/codec.py)."""

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


class StepKind(str, Enum):
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


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is 'cpu', 'cuda', 'cuda:N' or 'auto'")
    return value


Device = Annotated[str, AfterValidator(_device)]


class BlockEngineSettings(Section):
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
    autocast: Annotated[Literal["bf16", "off"], BeforeValidator(as_written)] = "off"

    @model_validator(mode="after")
    def _share_of_a_gpu(self) -> BlockEngineSettings:
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"'gpus' is {self.gpus:g}: a share is at most 1, or a whole number")
        if self.gpus is not None and self.device == "cpu":
            raise ValueError(f"'gpus' is {self.gpus:g} with device 'cpu': leave one of them out")
        return self


class EngineSettings(Section):
    """actors: how many processes, or auto: as many as pay. placement: the blocks of each actor, by
    name. balance: what is shared out evenly between actors where nothing else is said. threads: of
    each process. step: how blocks compute (closed forms equal autograd to round-off). bits: where
    processes compute other ones. pin: each process to processors of its own. address: of a Ray
    cluster (none: a local Ray is started).
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
    digests: a running hash of every edge's signals and of the weights, by which `hamdist diff`
    tells where two runs part.
    stall_warning, stall_limit: seconds without progress until the watchdog speaks, and gives up.
    idle_seconds: how long a local Ray and its actors wait for the next run of the same process.
    link_delay: for tests and studies: seconds by which every message between two actors comes later
    than it does.
    """

    kind: EngineKind = EngineKind.INPROCESS
    actors: Positive | Literal["auto"] = "auto"
    placement: tuple[tuple[str, ...], ...] | None = None
    balance: Balance = Balance.TIME
    threads: Positive = 1
    step: StepKind = StepKind.AUTO
    bits: Bits = Bits.WARN
    pin: Annotated[Pin, BeforeValidator(as_written)] = Pin.AUTO
    address: str | None = None
    transport: TransportKind = TransportKind.AUTO
    encryption: Annotated[Encryption, BeforeValidator(as_written)] = Encryption.AUTO
    device_signals: DeviceSignals = DeviceSignals.AUTO
    queue: Positive = 4
    bundle: Annotated[Positive | Literal["auto", "off"], BeforeValidator(as_written)] = "auto"
    device: Device = "cpu"
    blocks: dict[str, BlockEngineSettings] = {}
    spread: Spread = Spread.AUTO
    compress: Compress | dict[str, Compress] = Compress.NONE
    feedback: Annotated[Feedback, BeforeValidator(as_written)] = Feedback.MESSAGES
    digests: bool = False
    stall_warning: Annotated[float, Field(gt=0)] = 10.0
    stall_limit: Annotated[float, Field(gt=0)] = 300.0
    idle_seconds: Annotated[float, Field(ge=0)] = 60.0
    link_delay: Rate = 0.0

    def processes(self, auto: int = 1) -> int:
        """How many processes a run on this host asks for; `auto` where it leaves that open."""
        if self.kind is EngineKind.INPROCESS:
            return 1
        if self.placement is not None:
            return len(self.placement)
        return auto if self.actors == "auto" else self.actors

    @model_validator(mode="after")
    def _one_process(self) -> EngineSettings:
        if self.kind is EngineKind.INPROCESS and self.actors not in (1, "auto"):
            raise ValueError(
                f"'actors' is {self.actors} with kind 'inprocess', which is one process: leave it "
                "out, or use kind 'ray' (--engine ray)"
            )
        return self

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
