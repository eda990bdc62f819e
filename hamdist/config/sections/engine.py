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
    """Quantity that a placement balances between actors."""

    PARAMETERS = "parameters"
    TIME = "time"


class Bits(str, Enum):
    """Reactions to processes of a run, or a snapshot, with other bits (process/arithmetic.py).

    warn: a warning before the first tick. exact: the run is refused. portable: every process is
    started so that hosts of different kinds agree (runtime/process/portable.py), at the price of
    slower products; where they do not even so, the run is refused.
    """

    WARN = "warn"
    EXACT = "exact"
    PORTABLE = "portable"


class Pin(str, Enum):
    """Placement of an actor's stepping thread on a processor: a fixed one, or any."""

    AUTO = "auto"
    OFF = "off"


class Compress(str, Enum):
    """Form of a signal on its way: unchanged, or in fewer bytes (runtime/signals/codec.py)."""

    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    DELTA = "delta"
    CODEBOOK = "codebook"
    TOPK = "topk"
    SUBSPACE = "subspace"


class Feedback(str, Enum):
    """Signals of codecs 'int8', 'int4' and 'topk' that carry the error of the one before them.

    None, all, the states alone or the messages alone.
    """

    OFF = "off"
    ON = "on"
    STATES = "states"
    MESSAGES = "messages"


class Spread(str, Enum):
    """Distribution of actors over the hosts of a cluster.

    Ray decides; as few hosts as hold them; evenly many to each; busy actors to fast hosts, by
    measurement. Neighbours stay together where they can.
    """

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
    """Implementation of a block's step.

    closed: in closed form where its module has one, by torch. native: as closed, and most of it by
    C code, as many operations at a time as follow each other. auto: native where hamdist was
    installed with it and a process has one thread. autograd: by autograd alone.
    """

    AUTO = "auto"
    NATIVE = "native"
    CLOSED = "closed"
    AUTOGRAD = "autograd"


class TransportKind(str, Enum):
    """Transport of signals between actors.

    auto: shm on one host (ipc where the platform has no such memory, or a queue is too long for
    it), tcp between hosts.
    """

    AUTO = "auto"
    SHM = "shm"
    IPC = "ipc"
    TCP = "tcp"


class DeviceSignals(str, Enum):
    """Transport of signals between CUDA blocks of two actors on one host.

    auto: they stay in GPU memory (CUDA IPC) where that works, which is tried before the start, else
    they go through host memory, with a warning that gives the reason. host: through host memory.
    ipc: as auto, but where it does not work the run is refused.
    """

    AUTO = "auto"
    HOST = "host"
    IPC = "ipc"


class Encryption(str, Enum):
    """Encryption of signals that go by tcp, with a key of the run on both ends.

    auto: they are encrypted. on: they are, and a cluster whose Ray needs no token, and so gives the
    keys to any client, is refused. off: any process that can reach a socket can read and send.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is 'cpu', 'cuda', 'cuda:N' or 'auto'")
    return value


def _ports(value: str) -> str:
    first, dash, last = value.partition("-")
    is_range = dash and first.strip().isdecimal() and last.strip().isdecimal()
    if not is_range or not 1024 <= int(first) <= int(last) <= 65535:
        raise ValueError(
            f"'ports' is {value!r}: give the first and the last one, of 1024 to 65535, such as "
            "'40000-40099'"
        )
    return value


Device = Annotated[str, AfterValidator(_device)]


class BlockEngineSettings(Section):
    """Place of a block, and its way of computing.

    `host`, `cpus`, `gpus` and `resources` are requirements of its actor.
    """

    host: str | None = None
    """By address, name, Ray's id, or a custom resource or label that hosts have."""
    cpus: Above0 | None = None
    """CPUs that Ray reserves."""
    gpus: Above0 | None = None
    """GPUs that Ray reserves; may be a share of one."""
    resources: dict[str, Above0] = {}
    """Custom resources of Ray."""
    device: Device | None = None
    """Device of the block; `auto`: cuda where the actor sees a GPU, else cpu."""
    dtype: BlockDType | None = None
    """Type of weights and computation; what comes in is cast to it."""
    autocast: Annotated[Literal["bf16", "off"], BeforeValidator(as_written)] = "off"
    """Compute in bf16 where torch's autocast does; its deviation from float32 is reported."""

    @model_validator(mode="after")
    def _share_of_a_gpu(self) -> BlockEngineSettings:
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"'gpus' is {self.gpus:g}: a share is at most 1, or a whole number")
        if self.gpus is not None and self.device == "cpu":
            raise ValueError(f"'gpus' is {self.gpus:g} with device 'cpu': leave one of them out")
        return self


class EngineSettings(Section):
    """Place of the blocks, their way of computing, and the transport of their signals."""

    kind: EngineKind = EngineKind.INPROCESS
    """One process, or Ray actors. The numbers are the same."""
    actors: Positive | Literal["auto"] = "auto"
    """How many processes; `auto`: as many as pay."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Further processes that wait, with torch loaded, to replace lost actors: one is then replaced
    without the seconds that a process takes to start (0.3 s instead of 0.6 on a local Ray, where
    it costs more than that if all processors are busy). Each takes about 250 MiB (50 on a local
    Ray), and the CPUs and GPUs of an actor."""
    placement: tuple[tuple[str, ...], ...] | None = None
    """The blocks of each actor, by name; not given: neighbours together, balanced."""
    interleave: Positive = 1
    """Runs of neighbouring blocks that each actor gets, as far from each other as there are actors
    (level `pipeline`: shorter waits for the first and last micro-batch, more signals)."""
    balance: Balance = Balance.TIME
    """What is shared out evenly between actors."""
    threads: Positive = 1
    """Threads of each process."""
    step: StepKind = StepKind.AUTO
    """How a block's step is computed: `closed` forms of torch, `native` C code for most of them,
    `auto`, or `autograd`; equal to round-off."""
    bits: Bits = Bits.WARN
    """What is done where processes compute other bits: `warn`, refuse (`exact`), or make x86 hosts
    agree (`portable`)."""
    pin: Annotated[Pin, BeforeValidator(as_written)] = Pin.AUTO
    """Keep each process on processors of its own."""
    address: str | None = None
    """Ray cluster to join, HOST:PORT; not given: a local Ray is started."""
    transport: TransportKind = TransportKind.AUTO
    """How signals cross between actors; `auto`: shared memory on one host, tcp between hosts."""
    ports: Annotated[str, AfterValidator(_ports)] | None = None
    """`FIRST-LAST`: ports on which actors receive signals by tcp, for hosts behind a firewall: one
    for each edge and direction that comes from another host, to each host; not given: any that are
    free."""
    encryption: Annotated[Encryption, BeforeValidator(as_written)] = Encryption.AUTO
    """Encryption of signals that go by tcp; `on` refuses a Ray cluster without a token."""
    device_signals: DeviceSignals = DeviceSignals.AUTO
    """How signals cross between CUDA blocks of two actors on one host. Has not run on a GPU yet."""
    queue: Positive = 4
    """Signals that may wait on an edge beyond those that the schedule keeps in flight."""
    bundle: Annotated[Positive | Literal["auto", "off"], BeforeValidator(as_written)] = "auto"
    """Most signals that a delayed edge sends as one message; `auto`: half as many as its delay
    allows."""
    device: Device = "cpu"
    """Device of the blocks that do not say."""
    blocks: dict[str, BlockEngineSettings] = {}
    """Where single blocks live and how they compute, by name (patterns as in a shell, names first).
    """
    spread: Spread = Spread.AUTO
    """Which hosts of a cluster actors go to."""
    compress: Compress | dict[str, Compress] = Compress.NONE
    """How signals travel: one word for all edges between blocks, or by edge (patterns, names first;
    `u->*` from the stream). Part of what a run means, in one process too."""
    feedback: Annotated[Feedback, BeforeValidator(as_written)] = Feedback.MESSAGES
    """Which signals of `int8`, `int4` and `topk` carry the error of the one before them."""
    topk_share: Annotated[float, Field(gt=0, le=1)] = 1 / 16
    """Of the numbers of a signal, the share that `topk` sends."""
    digests: bool | Annotated[int, Field(ge=2)] = False
    """Keep a running hash of every edge's signals (a number n: of every n-th one, which costs n
    times less) and of the weights, for `hamdist diff`, `bisect` and `rewind`."""
    stall_warning: Annotated[float, Field(gt=0)] = 10.0
    """Seconds without progress after which the watchdog warns."""
    stall_limit: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without progress after which the run ends."""
    idle_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that a local Ray waits for the next run of the same process."""
    link_delay: Rate = 0.0
    """Experimental. Seconds by which every message between two actors comes late, for tests and
    studies."""

    @property
    def port_range(self) -> range | None:
        """Return the ports of `ports`; None for any."""
        if self.ports is None:
            return None
        first, last = map(int, self.ports.split("-"))
        return range(first, last + 1)

    def processes(self, auto: int = 1) -> int:
        """Return the number of actors of a run on this host; `auto` where that is left open."""
        if self.kind is EngineKind.INPROCESS:
            return 1
        if self.placement is not None:
            return len(self.placement)
        return auto if self.actors == "auto" else self.actors

    @model_validator(mode="after")
    def _one_process(self) -> EngineSettings:
        several = {"actors": self.actors not in (1, "auto"), "spares": self.spares > 0}
        for name, is_set in several.items():
            if self.kind is EngineKind.INPROCESS and is_set:
                raise ValueError(
                    f"{name!r} is {getattr(self, name)} with kind 'inprocess', which is one "
                    "process: leave it out, or use kind 'ray' (--engine ray)"
                )
        if self.interleave > 1 and (self.kind is EngineKind.INPROCESS or self.placement):
            raise ValueError(
                f"'interleave' is {self.interleave} with "
                + ("a 'placement', which" if self.placement else "kind 'inprocess', whose process")
                + " says where every block lives: leave it out"
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
