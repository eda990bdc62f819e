"""A local function in closed form: a short program of kernels instead of autograd.

program.py decides which modules have one; all others use `AutogradFunction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import Combine, combined
from hamdist.dynamics.saved_state.stateful import Slot, check_names, fill, nested_slots
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient, Gradients
from hamdist.dynamics.vjp.kernels import KeptTensors, Wanted
from hamdist.dynamics.vjp.local_function import ModuleFunction, Products
from hamdist.dynamics.vjp.native_chain import Chain
from hamdist.dynamics.vjp.program import read_program
from hamdist.dynamics.vjp.seeding import OwnGenerator, draws
from hamdist.dynamics.vjp.steps import Needs, ProgramStep, needed, pull_steps, run_steps
from hamdist.errors import SnapshotError


@dataclass(slots=True)
class Steps:
    """The record of a forward pass. kept: by step; inputs: by parent, and which are wanted."""

    saved: list[KeptTensors]
    inputs: list[Tensor]
    wanted: Wanted
    output: Tensor


class ClosedFunction(ModuleFunction):
    """A local function of a module that is a program of kernels.

    A pulled record's memory is used again by the forward pass after the next pull: until then
    omega may consist of the factors of its gradients, which lie in that memory.
    """

    def __init__(
        self, module: nn.Module, combine: Combine, seed: int, program: Sequence[ProgramStep]
    ) -> None:
        random = OwnGenerator(seed) if draws(module) else nullcontext()
        super().__init__(module, combine, random)
        self._steps = list(program)
        self._free: list[Steps] = []
        self._pulled: Steps | None = None  # the latest
        self._needs: dict[Wanted, Needs] = {}
        # One kernel on one input, as of a chain of linear layers: nothing to look up or to share
        # out, which is a good part of a small block's step.
        self._only = program[0] if len(program) == 1 and program[0].reads == (0,) else None

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Steps:
        old = self._free.pop() if self._free else None
        only = self._only
        if only is not None and len(inputs) == 1:
            x = inputs[0]
            x = x.detach() if x.requires_grad else x
            before = None if old is None or only.lasting else old.saved[0]
            output = only.kernel.forward(before, x)
            return Steps([output], [x], (wanted[0] and x.is_floating_point(),), output[0])
        states = [t.detach() if t.requires_grad else t for t in inputs]
        wants = tuple(w and t.is_floating_point() for w, t in zip(wanted, states, strict=True))
        before = None if old is None else old.saved
        saved = run_steps(self._steps, combined(self._combine, states), before)
        return Steps(saved, states, wants, saved[-1][0])

    def pull(
        self,
        record: Steps,
        cotangent: Tensor,
        *,
        inputs: bool = True,
        weights: bool = True,
        keep: bool = False,
        at_once: AtOnce | None = None,
    ) -> Products:
        """Return the products as `LocalFunction.pull`, gradients of weights as their factors.

        They are marked where the weights have moved by them already.
        """
        wanted = record.wanted if inputs else (False,) * len(record.wanted)
        g = Gradients(len(self.theta), at_once) if weights else None
        to_parents = self._pulled_through(record, cotangent, wanted, g)
        # omega may consist of factors in this record's memory until the next pull replaces them. So
        # a record is free one pull later: now it becomes `_pulled`, at the next pull it moves to
        # `_free`, from which `forward` takes it to write over.
        if not keep:
            if self._pulled is not None:
                self._free.append(self._pulled)
            self._pulled = record
        if g is None:
            return to_parents, []
        if g.moved < len(g):
            for i, gradient in enumerate(g):
                if gradient is None:
                    g[i] = torch.zeros_like(self.theta[i])
        return to_parents, cast("list[Gradient]", g)

    def rebuilt(self, state: Mapping[str, Any]) -> Any:
        try:
            return super().rebuilt(state)
        except SnapshotError:  # (a snapshot of format 1 may join its kernels in another way)
            check_names("record", state, ("inputs", "wanted", "output", "kept"))
        chains = [step.kernel for step in self._steps if isinstance(step.kernel, Chain)]
        for chain in chains:
            chain.apart = True
        try:
            record = self.forward(state["inputs"], state["wanted"])
        finally:
            for chain in chains:
                chain.apart = False
        slots = _by_kernel([(slot.name, slot) for slot in self._slots(record)])
        fill(
            iter([Slot(name, slot.value, slot.set) for name, slot in slots]),
            _by_kernel(state["kept"]),
        )
        for step, saved in zip(self._steps, record.saved, strict=True):
            if isinstance(step.kernel, Chain):
                saved[0] = saved[1][-1][0]  # the chain's output is that of its last kernel
        record.output.data.copy_(state["output"])
        return record

    def _wants(self, record: Any) -> list[bool]:
        return list(record.wanted)

    def _slots(self, record: Any) -> Iterator[Slot]:
        return nested_slots(record.saved)

    def _pulled_through(
        self, record: Steps, cotangent: Tensor, wanted: Wanted, g: Gradients | None
    ) -> list[Tensor | None]:
        """Return the messages to the parents; put the gradients into `g`, if given."""
        needs = self._wanted(wanted, weights=g is not None)
        only = self._only
        if only is not None and len(wanted) == 1 and needs[-1][0]:
            (m,) = only.kernel.pull(record.saved[0], cotangent, wanted, g)
            if not wanted[0]:
                return [None]
            return [torch.zeros_like(record.inputs[0]) if m is None else m]
        about = pull_steps(self._steps, record.saved, cotangent, needs, g)
        return self._apart(record, wanted, about)

    def _wanted(self, wanted: Wanted, *, weights: bool) -> Needs:
        """Return `needed` for messages to these parents."""
        key = (*wanted, weights)
        needs = self._needs.get(key)
        if needs is None:
            places = _combined_places(self._combine, len(wanted))
            asks = [any(wanted[p] for p in place) for place in places]
            needs = self._needs[key] = needed(self._steps, asks, weights=weights)
        return needs

    def _apart(
        self, record: Steps, wanted: Wanted, about: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the messages by parent; zeros where a wanted input has no influence."""
        shapes = [t.shape for t in record.inputs]
        if len(shapes) < 2 or self._combine is Combine.ARGUMENTS:
            split: list[Tensor | None] = list(about)
        elif about[0] is None:
            split = [None] * len(shapes)
        elif self._combine is Combine.CONCAT:
            split = list(torch.split(about[0], [s[-1] for s in shapes], dim=-1))
        else:
            split = [about[0].sum_to_size(s) for s in shapes]
        return [
            None if not w else (torch.zeros_like(t) if m is None else m)
            for w, m, t in zip(wanted, split, record.inputs, strict=True)
        ]


def _combined_places(combine: Combine, parents: int) -> list[tuple[int, ...]]:
    """Return by argument of the module the parents of which it is made."""
    if parents < 2 or combine is Combine.ARGUMENTS:
        return [(p,) for p in range(parents)]
    return [tuple(range(parents))]


def make_closed(
    module: nn.Module, combine: Combine, seed: int, parents: int, *, native: bool = False
) -> ClosedFunction | None:
    """Return the closed form of `module` with so many parents; None where it has none.

    native: kernels that follow each other run in C (native/chain.py).
    """
    program = read_program(module, len(_combined_places(combine, parents)), native=native)
    return None if program is None else ClosedFunction(module, combine, seed, program)


def _by_kernel(saved: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
    """Return what each kernel keeps, named by its place there alone, however chains join them.

    saved: by name, `kept.STEP.i`; in a chain that was not one call of C `kept.STEP.1.KERNEL.i`, and
    `kept.STEP.0` is its last kernel's output once more.
    """
    joined = {name.rsplit(".", 2)[0] for name, _ in saved if name.count(".") > 2}
    repeated = {f"{step.removesuffix('.1')}.0" for step in joined}
    return [(name.rsplit(".", 1)[1], value) for name, value in saved if name not in repeated]
