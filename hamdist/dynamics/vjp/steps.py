"""Steps of a program of kernels, one after the other: forward, and the products backward.

Values are numbered: the arguments first, then what each step makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from hamdist.dynamics.vjp.gradient import Gradients
from hamdist.dynamics.vjp.kernels import KeptTensors, Kernel, Wanted

# By value, whether something needs its message, and by input of its step the same.
Needs: TypeAlias = list[tuple[bool, Wanted]]


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """One kernel. reads: places of its inputs among the arguments and the steps' outputs.

    lasting: its output leaves the block, so that its memory is not used again.
    """

    kernel: Kernel
    reads: tuple[int, ...]
    lasting: bool


def run_steps(
    steps: Sequence[ProgramStep], arguments: Sequence[Tensor], old: Sequence[KeptTensors] | None
) -> list[KeptTensors]:
    """Return what each step keeps, its output first. old: of an earlier call, to be overwritten."""
    values: list[Any] = list(arguments)
    saved = []
    for i, step in enumerate(steps):
        before = None if old is None or step.lasting else old[i]
        saved.append(step.kernel.forward(before, *[values[r] for r in step.reads]))
        values.append(saved[-1][0])
    return saved


def pull_steps(
    steps: Sequence[ProgramStep],
    saved: Sequence[KeptTensors],
    z: Tensor,
    needs: Needs,
    g: Gradients | None,
) -> list[Tensor | None]:
    """Return the messages to the arguments. z: about the last step's output; needs: `needed`."""
    last = len(steps) - 1
    many = len(needs) - len(steps)
    about: list[Tensor | None] = [None] * many + [None] * last + [z]
    for i in range(last, -1, -1):
        step, message = steps[i], about[many + i]
        has_work, reads = needs[many + i]
        if message is None or not has_work:
            continue
        products = step.kernel.pull(saved[i], message, reads, g)
        for place, product in zip(step.reads, products, strict=True):
            if product is not None:
                before = about[place]
                about[place] = product if before is None else before + product
    return about[:many]


def needed(steps: Sequence[ProgramStep], wanted: Sequence[bool], *, weights: bool) -> Needs:
    """Return what messages to the arguments (`wanted`) and gradients (`weights`) need."""
    needs: Needs = [(want, ()) for want in wanted]
    for step in steps:
        reads = tuple(needs[r][0] for r in step.reads)
        trained = weights and any(w is not None for w in step.kernel.weights)
        needs.append((trained or any(reads), reads))
    return needs
