"""Into how many parts a batch is cut (`locality.microbatches`), before a run, and what cannot go
together with gradients that are added up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import FunctionType

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hamdist.config import Credit, LearningSettings, Memory, Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.spec import combined
from hamdist.dynamics.objective.losses import (
    CrossEntropy,
    LossFunction,
    class_axis,
    counts,
    model_loss,
    mse,
)
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.microbatches import auto_microbatches
from hamdist.dynamics.user_modules.code_digest import may_keep_state
from hamdist.dynamics.user_modules.copies import copied, loss_copy
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import LevelError
from hamdist.runtime.plan.checks import rules_by_block
from hamdist.streams.sample import SampleSpec, TargetSpec

WIDE = torch.complex128  # (holds everything)
CLOSE = 1e-3  # relative to the largest value; products of fewer rows round in another order


def cut_batches(knobs: Locality, graph: Graph, spec: SampleSpec, settings: Settings) -> Locality:
    """Return `knobs` with a number of micro-batches. Raises LevelError if the batch stays whole."""
    learning, interleave = settings.learning, settings.engine.interleave
    parts = knobs.microbatches
    if interleave > 1 and parts == 1:
        raise LevelError(
            f"engine.interleave {interleave} at level {settings.level.value!r}: it shortens the "
            "waits for the first and the last micro-batch of a sample, and there are none; use "
            "level 'pipeline', or leave it out"
        )
    if parts == "auto":
        parts = auto_microbatches(spec.batch)
    knobs = replace(knobs, microbatches=parts, clip=_network_clip(knobs, graph, learning))
    keeps_passes = knobs.pulse and knobs.memory in (Memory.TRACE, Memory.TRACE_WEIGHTS)
    summed = (
        parts * knobs.accumulate > 1
        or knobs.clip < math.inf
        or _against_sums(graph, learning)
        or rules_by_block(graph)
    )
    if spec.kept and (summed or not keeps_passes):
        raise LevelError(
            "labels that come late, with the trace kept (stream.relearn: trace): that goes with "
            "'trace' and 'backprop', but not with micro-batches, locality.accumulate, a clip of "
            "the network, heads, learning.inputs, rules or weights of several blocks; use "
            "stream.relearn: again"
        )
    if knobs.accumulate > 1 or knobs.double_buffered:
        for reason in _against_sums(graph, learning):
            raise LevelError(f"locality.accumulate {knobs.accumulate} with {reason}; leave it out")
    if parts == 1:
        return knobs
    if parts > spec.batch:
        raise LevelError(
            f"locality.microbatches {parts} of batches of {spec.batch} row(s): use at most "
            f"{spec.batch}, or larger batches"
        )
    for reason in _against(graph, learning):
        raise LevelError(
            f"locality.microbatches {parts} with {reason}; use level 'backprop', or "
            "locality.microbatches 1"
        )
    return knobs


def lie_apart(graph: Graph, knobs: Locality, blocks: Collection[str]) -> bool:
    """Return True if micro-batches pass other blocks between those of one process."""
    places = [i for i, name in enumerate(graph.blocks) if name in blocks]
    apart = bool(places) and places[-1] - places[0] >= len(places)
    return apart and knobs.microbatches != 1


def _network_clip(knobs: Locality, graph: Graph, learning: LearningSettings) -> float:
    """Return the largest norm of the gradient of all blocks; infinite where it is not clipped."""
    limit = learning.network_clip
    if limit is None:
        return math.inf
    name = f"learning.clip {limit:g} of the network"
    if not knobs.pulse or knobs.speed != "inf" or knobs.credit is not Credit.MESSAGES:
        raise LevelError(
            f"{name} with presentation {knobs.presentation.value!r}, speed {knobs.speed!r} and "
            f"credit {knobs.credit.value!r}: there blocks move before the gradient of every other "
            "one is known, so no sample has a norm of all; use level 'backprop', 'pipeline' or "
            "'reversible', or {norm: ..., of: block}"
        )
    reasons = _against_parts(learning, "sample", "one")
    if learning.dampening:
        reasons.append("learning.dampening, which scales the loss, so the norm, from step to step")
    reasons += [
        f"a rule (block {block!r}), whose step is its own" for block in rules_by_block(graph)
    ]
    reasons += [
        f"learning.blocks.{block}.clip, another one"
        for block, settings in learning.blocks.items()
        if settings.clip is not None
    ]
    for reason in reasons:
        raise LevelError(f"{name} with {reason}; leave one of them out")
    return limit


def _against_parts(learning: LearningSettings, part: str, of: str) -> list[str]:
    """Return what needs all gradients of a step at once; they come by `part`."""
    reasons = []
    if learning.any_heads:
        reasons.append(f"learning.heads, which move the weights whenever a {part} passes")
    if learning.any_inputs:
        reasons.append(f"learning.inputs, whose statistics are those of {of} batch")
    return reasons


def _against_sums(graph: Graph, learning: LearningSettings) -> list[str]:
    """Return what excludes steps by the gradients of several samples."""
    reasons = _against_parts(learning, "sample", "one")
    if graph.ties:
        names = ", ".join(tie.name for tie in graph.ties)
        reasons.append(f"weights that several blocks share ({names})")
    return reasons


def _against(graph: Graph, learning: LearningSettings) -> list[str]:
    """Return the settings that exclude micro-batches."""
    reasons = _against_parts(learning, "micro-batch", "a whole")
    if any(block.loss is model_loss for block in graph.blocks.values()):
        reasons.append(
            "the loss 'model': the model takes its mean itself, and how many rows or tokens of a "
            "micro-batch count in it is not known outside (name the loss of its predictions "
            "instead)"
        )
    return reasons


def microbatch_warnings(
    knobs: Locality,
    graph: Graph,
    spec: SampleSpec,
    inputs: Mapping[str, Tensor],
    ignore_index: int,
    *,
    auto: bool,
) -> list[str]:
    """Return warnings about micro-batches, whose number hamdist chose if `auto`."""
    parts, notes = knobs.microbatches, []
    if auto:
        notes.append(f"locality.microbatches 'auto' is {parts}: batches have {spec.batch} row(s)")
    if parts == 1:
        return notes
    modules = [m for b in graph.blocks.values() for m in b.module.modules()]
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training]
    mixing, outputs = _mixing(graph, inputs, spec.batch)
    unlike = [n for n in graph.readouts if _is_no_mean(graph, spec, n, outputs[n], ignore_index)]
    remedies = {
        "batch norms normalise each micro-batch by its own statistics, and note them once "
        "each": norms and "use LayerNorm or GroupNorm, or locality.microbatches 1",
        f"the loss of {', '.join(unlike)} is no mean over rows (it adds them up, or divides by "
        "weights of classes, or by how many it does not mask)": unlike
        and "make it one, or use level 'backprop'",
        f"what block {''.join(mixing[:1])!r} makes of a row depends on the other rows of the "
        "batch, or on their number": mixing
        and "leave that out of the model, or use locality.microbatches 1",
    }
    return notes + [
        f"locality.microbatches {parts}: {cause}, so the run is not the one of the whole batch; "
        f"{remedy}"
        for cause, remedy in remedies.items()
        if remedy
    ]


# What torch, and checks in a loss of the user's own, raise of targets that they do not take.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)


def _is_no_mean(graph: Graph, spec: SampleSpec, name: str, y: Tensor, ignore_index: int) -> bool:
    """Return True if a loss of the user's own is not the mean of those of two halves of a batch."""
    return any(_apart(loss, y, t, ignore_index) for loss, t in _trials(graph, spec, name, y))


def _trials(
    graph: Graph, spec: SampleSpec, name: str, y: Tensor
) -> Iterator[tuple[LossFunction, Tensor]]:
    """Yield the loss of a readout with targets for a prediction y, if it is the user's own."""
    loss, target = graph.blocks[name].loss, spec.target(name)
    if loss is None or target is None or graph.blocks[name].output is not None:
        return
    if loss is mse or isinstance(loss, CrossEntropy) or spec.weighted:
        return
    real = spec.example_y.get(name) if isinstance(spec.example_y, Mapping) else spec.example_y
    if real is not None and len(real) == len(y):
        yield loss, real
    with suppress(ValueError):  # (its classes have no axis that is known)
        yield loss, _targets(target, y)


def _apart(loss: LossFunction, y: Tensor, t: Tensor, ignore_index: int) -> bool:
    """Return True if the loss of a batch is not the mean of those of its two halves."""
    half, loss = len(y) // 2, loss_copy(loss)
    parts = [slice(None), slice(half), slice(half, None)]
    counted = [counts(t[rows], ignore_index) for rows in parts]
    with torch.no_grad(), generator_kept(), suppress(*_REFUSALS):
        whole, first, second = (
            float(loss(y[rows].clone(), t[rows].clone())) * n / max(1, counted[0]) if n else 0.0
            for rows, n in zip(parts, counted, strict=True)
        )
        return math.isfinite(whole) and not abs(whole - first - second) <= CLOSE * abs(whole)
    return False  # (it wants other targets than these)


def row_warnings(
    graph: Graph, name: str, of: tuple[Sequence[int], torch.dtype], spec: SampleSpec
) -> list[str]:
    """Return a warning where a loss of the user's own mixes rows, or adds them up.

    of: shape and type of the prediction. It adds up if it is twice as large for the rows once more.
    """
    shape, dtype = of
    draw, target = torch.Generator().manual_seed(0), spec.target(name)
    y = torch.randn(shape, generator=draw).to(dtype)
    for loss, t in _trials(graph, spec, name, y):
        real = target is not None and target.dtype.is_floating_point
        if real and {tuple(shape), tuple(t.shape)} == {(spec.batch,), (spec.batch, 1)}:
            if not _apart(loss, y, t, 0):
                continue
            return [
                f"of the prediction of {name!r} and its targets one is a column, (B, 1), and the "
                "other is (B,), and the loss mixes rows: most likely torch broadcasts them to "
                "(B, B); give both one shape"
            ]
        plain = isinstance(loss, FunctionType) and not may_keep_state(loss)
        if not plain and loss_copy(loss) is loss:
            continue  # (it may keep what it is called with)
        with torch.no_grad(), generator_kept(), suppress(*_REFUSALS):
            once, twice = (
                float(loss_copy(loss)(torch.cat([y] * n), torch.cat([t] * n))) for n in (1, 2)
            )
            if math.isfinite(once) and once and abs(twice - 2 * once) <= CLOSE * abs(once):
                return [
                    f"the loss of {name!r} adds up rows (for twice as many it is twice as large), "
                    "where a mean is meant: steps grow with the batch, and losses of other "
                    "batches, as held-out ones, are no mean; divide by the rows, as "
                    "reduction='mean' does"
                ]
    return []


def _targets(spec: TargetSpec, y: Tensor) -> Tensor:
    """Return targets for a prediction y, with other classes in each half of the batch."""
    numbers = torch.arange(math.prod(spec.shape)).view(spec.shape)
    if spec.dtype.is_floating_point:
        return (numbers % 7 / 7).to(spec.dtype)
    classes = spec.classes or y.shape[class_axis(y.shape, spec.shape)]
    return (numbers * classes // numbers.numel()).to(spec.dtype)


def _mixing(
    graph: Graph, inputs: Mapping[str, Tensor], batch: int
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the blocks that make something else of half a batch, and all outputs: of both runs."""
    whole = dict(inputs)
    mixing, waiting = [], list(graph.blocks.values())
    while ready := [b for b in waiting if all(p in whole for p in b.parents)]:
        for block in ready:
            module = copied(block.module).eval()
            parents = [whole[parent] for parent in block.parents]
            half = [h[: batch // 2] if len(h) == batch else h for h in parents]
            with torch.no_grad(), generator_kept():
                h = module(*combined(block.combine, [h_p.clone() for h_p in parents]))
                try:
                    part = module(*combined(block.combine, half))
                except RuntimeError:  # (in a run it is the block's error)
                    part = h[:0]
            apart = (h[: len(part)].to(WIDE) - part.to(WIDE)).abs()
            if not len(part) or apart.max() > CLOSE * h.to(WIDE).abs().max():
                mixing.append(block.name)
            whole[block.name] = h
            waiting.remove(block)
    return mixing, whole
