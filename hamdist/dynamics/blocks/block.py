"""The parts common to all blocks, and snapshots of blocks with records of forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hamdist.dynamics.finite import Guard, StepFactor
from hamdist.dynamics.saved_state.block_memory import BlockMemory, bytes_of, storages_of
from hamdist.dynamics.saved_state.stateful import Stateful, popped
from hamdist.dynamics.updates.accumulate import GradientSum
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient, Unused, norm_of
from hamdist.dynamics.vjp.local_function import ForwardRecord, LocalFunction

SUM = "gradients"  # its name in a snapshot, beside STATE
COUNTED = "records counted"  # key of the most records at once, and of the bytes of one
WAITING = "waiting"
BUFFERS = "buffers"


@dataclass(slots=True)
class BlockParts:
    """The parts of all kinds of blocks.

    Attributes:
        microbatches: Number of parts of a batch.
        group: Samples whose gradients make one step.
        double_buffered: A sample meets the weights of the step before the latest.
        by_network: A step is clipped by the norm of the gradient of all blocks.
        wanted: By parent, whether it gets messages.
        factor: Of beta, by sample.
    """

    cell: LocalFunction
    weights: Weights
    wanted: Sequence[bool]
    dynamics: Dynamics
    factor: StepFactor
    guard: Guard
    microbatches: int = 1
    group: int = 1
    double_buffered: bool = False
    by_network: bool = False


class Block(Stateful):
    """A block or an output net: its local function, weights, and the settings of their steps.

    With micro-batches a pass has the number of a pulse (schedule/microbatches.py), and the weights
    move once a sample, by the sum of the gradients of its pulses; with `group`, once for so many
    samples. (The loss of each is divided by their number.)
    """

    def __init__(self, parts: BlockParts) -> None:
        self.cell = parts.cell
        self.weights = parts.weights
        self._wanted = list(parts.wanted)
        self._dynamics = parts.dynamics
        self._c = parts.dynamics.c
        self._factor = parts.factor
        self._guard = parts.guard
        self._parts = parts.microbatches
        self._group = parts.group
        self._by_network = parts.by_network
        summed = self._by_network or self._parts * self._group > 1
        self._sum = GradientSum() if summed else None
        self.defers = False  # True: a step by a sum of gradients waits for `take_step`
        # (sum of gradients, factor, tau) of a step that waits for `take_step`
        self._waiting: tuple[list[Gradient] | None, float, float] | None = None
        self.buffers = WeightBuffers(parts.weights, parts.group) if parts.double_buffered else None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._by_network:
            state[WAITING] = self._waiting
        if self.buffers is not None:
            state[BUFFERS] = self.buffers.state_dict()
        return state if self._sum is None else {**state, SUM: self._sum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._by_network:
            self._waiting, state = popped(state, WAITING)
        if self.buffers is not None:
            before, state = popped(state, BUFFERS)
            self.buffers.load_state_dict(before)
        if self._sum is not None:
            sums, state = popped(state, SUM)
            self._sum.load_state_dict(sums)
        super().load_state_dict(state)

    def run(self, sample: int, inputs: Sequence[Tensor]) -> ForwardRecord:
        """Return the record of a forward pass with the weights that a sample meets."""
        record: ForwardRecord
        at = self._theta_of(sample)
        if at is None:
            record = self.cell.forward(inputs, self._wanted)
        else:
            record = self.cell.forward_at(at, inputs, self._wanted)
        return record

    def _theta_of(self, sample: int) -> Sequence[Tensor] | None:
        """Return the weights that a sample meets; None for the latest."""
        return None if self.buffers is None else self.buffers.theta(sample)

    def memory(self, modules: Sequence[nn.Module]) -> BlockMemory:
        """Return the bytes that the block has of its own. modules: those of its functions."""
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        state = bytes_of(Block.state_dict(self), apart=storages_of(weights))
        return BlockMemory(bytes_of(weights), state, 0)

    def at_once(self, sample: int, tau: float) -> AtOnce | None:
        """Return the permission to move weights by the gradients of a pass before `learn_from`.

        See `Weights.at_once`.
        """
        if self._sum is not None:
            return None
        return self.weights.at_once(self._factor(sample), tau)

    def moves(self, pulse: int) -> bool:
        """Return True if the weights move with the message of a pulse."""
        return not (pulse + 1) % (self._parts * self._group)

    def learn_from(self, sample: int, g: Sequence[Gradient] | None, tau: float) -> None:
        """Take the gradients of one pass (None: no message came).

        Behind the last pass of a group of samples the weights move by the sum of its gradients.
        """
        if self._sum is not None:
            if g is not None:
                self._sum.add(g)
            if not self.moves(sample):
                return
            sample //= self._parts
            g = self._sum.take()
            self._waiting = g, self._factor(sample), tau
            if not self.defers and not self._by_network:
                self.take_step()
        elif g is None:
            self.weights.rest()
        else:
            self._move(g, self._factor(sample), tau)

    def _move(self, g: Sequence[Gradient], factor: float, tau: float) -> None:
        """Make one update. Weights that no pass has used stay, with omega and v, as in torch."""
        unused = [i for i, g_i in enumerate(g) if isinstance(g_i, Unused)]
        if not unused:
            self.weights.move(g, factor, tau)
            return
        before = [{i: ts[i].clone() for i in unused if ts} for ts in self.weights.moving()]
        self.weights.move(g, factor, tau)
        for ts, olds in zip(self.weights.moving(), before, strict=True):
            for i, old in olds.items():
                ts[i].copy_(old)

    @property
    def deferred(self) -> bool:
        """Return True if a step of the weights waits for `take_step`, and for nothing else."""
        return self._waiting is not None and not self._by_network

    def square(self) -> float:
        """Return |tau g|^2 of the step that waits."""
        g, _, tau = self._waiting or (None, 1.0, 0.0)
        return 0.0 if g is None else (tau * norm_of(g)) ** 2

    def step(self, share: float) -> None:
        """Make the step that waits, by this share of its gradient."""
        self.weights.share = share
        self.take_step()

    def take_step(self) -> None:
        """Make the step that waits, if there is one; before anything else reads the weights."""
        if self._waiting is None:
            return
        (g, factor, tau), self._waiting = self._waiting, None
        if self.buffers is not None:
            self.buffers.keep()
        if g is None:
            self.weights.rest()
        else:
            self._move(g, factor, tau)


class WeightBuffers(Stateful):
    """Two versions of a block's weights: the latest, and the one before (PipeDream-2BW, Narayanan
    et al. 2021). With group g = n div k of sample n

        theta_g      after the steps by groups 0 ... g - 2

    Args:
        weights: the block's, which move when a group's last message comes.
        group: k, samples per step.
    """

    def __init__(self, weights: Weights, group: int) -> None:
        self._weights = weights
        self._group = group
        self._before: list[Tensor] | None = None
        self._used: tuple[int, list[Tensor]] | None = None  # version and weights of the latest pass

    STATE = ("_before",)

    def version(self, sample: int) -> int:
        """Return the number of steps in the weights that a sample meets."""
        return max(0, sample // self._group - 1)

    def theta(self, sample: int) -> list[Tensor]:
        """Return the weights that a sample meets; nothing moves them, all of a group share them."""
        version = self.version(sample)
        if self._used is None or self._used[0] != version:
            if self._before is None or self._weights.updates == version:
                self._used = version, [t.clone() for t in self._weights.theta]
            else:
                self._used = version, self._before
        return self._used[1]

    def keep(self) -> None:
        """Keep the weights before they move."""
        self._before = [t.clone() for t in self._weights.theta]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._used = None


class SavesPasses(Block):
    """A block that keeps records of forward passes, saved under RECORDS beside its STATE.

    `cell` is one of STATE. trace: the records by sample, unless a subclass has others.
    """

    RECORDS: ClassVar[str] = "trace"
    most = 0  # records at once
    record_bytes: int | None = -1  # of the first record, -1 before it; None: not known

    def __init__(self, parts: BlockParts) -> None:
        super().__init__(parts)
        self.trace: dict[int, ForwardRecord] = {}

    def run(self, sample: int, inputs: Sequence[Tensor]) -> ForwardRecord:
        if self.record_bytes != -1:
            return super().run(sample, inputs)
        with self.cell.saved_tensors() as saved:
            record = super().run(sample, inputs)
        self.count(record, saved)
        return record

    def count(self, record: Any, saved: list[Tensor] | None) -> None:
        """Count the bytes of a record, if it is the first. saved: what autograd has of it."""
        if self.record_bytes == -1:
            module = self.cell.module
            apart = storages_of([*module.parameters(), *module.buffers()])
            self.record_bytes = None if saved is None else bytes_of([record, saved], apart)

    def memory(self, modules: Sequence[nn.Module]) -> BlockMemory:
        samples = self.most and self.record_bytes and self.most * self.record_bytes
        return super().memory(modules)._replace(samples=samples)

    def keep(self, pass_: int, sample: int | None, let_go: int | None) -> None:
        """Keep the record of a pass for a sample's label, or drop it; let go of another sample's.

        (The records of samples that wait have the keys -1, -2, ...: a sample is no pass.)
        """
        record = self.trace.pop(pass_, None)
        if record is not None and sample is not None:
            self.trace[-1 - sample] = record
        self.trace.pop(pass_ if let_go is None else -1 - let_go, None)

    def recall(self, pass_: int, sample: int) -> None:
        """Make the record of a sample whose label has come that of the pass that brings it."""
        record = self.trace.pop(-1 - sample, None)
        if record is not None:
            self.trace[pass_] = record

    def held(self) -> Any:
        """Return the records as plain data (`LocalFunction.held`)."""
        return {sample: self.cell.held(record) for sample, record in self.trace.items()}

    def rebuild(self, records: Any) -> None:
        """Set the records from the data of `held`, after everything else has been restored."""
        self.trace = {sample: self.cell.rebuilt(record) for sample, record in records.items()}

    def state_dict(self) -> dict[str, Any]:
        counted = {COUNTED: (self.most, self.record_bytes)}
        return {**super().state_dict(), self.RECORDS: self.held(), **counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        records, rest = popped(state, self.RECORDS)
        # (Files of earlier versions have no counts; they then begin with the next record.)
        self.most, self.record_bytes = rest.pop(COUNTED, (self.most, self.record_bytes))
        super().load_state_dict(rest)
        self.rebuild(records)
        # Once more: rebuilding runs the module, which moves its buffers and random numbers.
        self.cell.load_state_dict(rest["cell"])
