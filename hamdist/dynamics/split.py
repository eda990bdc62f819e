"""Cuts an `nn.Sequential` into a chain of blocks.

A unit is a child that has parameters together with the children without parameters behind it
(Linear + ReLU); children without parameters at the front belong to the first unit, and those
behind an invertible unit that are not invertible themselves to the next one. `grouping`
makes one block of each unit, of two units, or of all; `blocks` balances any number of blocks by
parameters or by measured time; `cuts` names the children that begin a block.
The keys of the blocks' modules are the original ones.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hamdist.config import Balance, Grouping, PartitionSettings
from hamdist.dynamics.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.losses import LossFunction
from hamdist.dynamics.reversible import pieces_of
from hamdist.errors import GraphError

REPEATS = 5


def split_sequential(
    model: nn.Sequential,
    loss: LossFunction,
    partition: PartitionSettings,
    grouping: Grouping,
    *,
    example: Tensor,
    state_readout: bool = False,
) -> Graph:
    """The chain of blocks `block0` ... that `partition` (or else `grouping`) asks for.

    example: (B, ...) an input of the right shape and type, for the balance by time.
    Raises GraphError for an empty model, an unknown cut, or more blocks than children.
    """
    children = [(name, m) for name, m in model._modules.items() if m is not None]
    if not children:
        raise GraphError("the model is an empty nn.Sequential; give it at least one module")
    for i, (name, module) in enumerate(children):
        stateful = [*module.parameters(), *module.buffers()]
        if stateful and any(module is other for _, other in children[:i]):
            raise GraphError(
                f"module {name!r} stands in the nn.Sequential twice, so its weights would belong "
                "to two blocks; give each place its own module"
            )
    starts = _starts(children, model, partition, grouping, example)
    blocks: list[BlockSpec] = []
    for i, (first, last) in enumerate(zip(starts, [*starts[1:], len(children)], strict=True)):
        readout = last == len(children)
        blocks.append(
            BlockSpec(
                name=f"block{i}",
                module=nn.Sequential(OrderedDict(children[first:last])),
                parents=(blocks[-1].name if blocks else INPUT,),
                delays={blocks[-1].name: partition.delay} if blocks else {},
                loss=loss if readout else None,
                state=readout and state_readout,
            )
        )
    return Graph(blocks, original=model)


def _starts(
    children: Sequence[tuple[str, nn.Module]],
    model: nn.Sequential,
    partition: PartitionSettings,
    grouping: Grouping,
    example: Tensor,
) -> list[int]:
    """Indices of the children that begin a block."""
    names = [name for name, _ in children]
    if partition.cuts is not None:
        for cut in partition.cuts:
            if cut not in names:
                raise GraphError(f"cut {cut!r} is no child of the model; known: {', '.join(names)}")
        return sorted({0, *(names.index(cut) for cut in partition.cuts)})
    units = _units(children)
    if partition.blocks is None:
        size = {Grouping.LAYER: 1, Grouping.GROUP: 2, Grouping.NETWORK: len(units)}[grouping]
        return units[::size]
    if partition.blocks > len(children):
        raise GraphError(
            f"cannot cut {len(children)} modules into {partition.blocks} blocks; "
            f"use at most {len(children)}"
        )
    pieces = units if partition.blocks <= len(units) else list(range(len(children)))
    ends = [*pieces[1:], len(children)]
    if partition.balance is Balance.TIME:
        per_child = _seconds(model, example)
    else:
        per_child = [float(sum(p.numel() for p in m.parameters())) for _, m in children]
    costs = [sum(per_child[a:b]) for a, b in zip(pieces, ends, strict=True)]
    return [pieces[i] for i in balanced(costs, partition.blocks)]


def _units(children: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """Indices of the children that begin a unit."""
    starts = [0]
    weighted = invertible = False  # the unit so far: has a child with weights; could be undone
    for i, (_, module) in enumerate(children):
        has_weights = next(module.parameters(), None) is not None
        undoable = bool(pieces_of(module))
        if weighted and (has_weights or (invertible and not undoable)):
            starts.append(i)
            weighted = False
            invertible = undoable
        else:
            invertible = undoable and (invertible or i == 0)
        weighted = weighted or has_weights
    return starts


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """First indices of `parts` runs of neighbours whose largest sum of `costs` is the least
    possible (the earliest cuts among equals); every run has at least one element."""
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(0, 0): (0.0, 0)}
    for part in range(1, parts + 1):
        for end in range(part, n - (parts - part) + 1):
            best[part, end] = min(
                (max(best[part - 1, start][0], sums[end] - sums[start]), start)
                for start in range(part - 1, end)
                if (part - 1, start) in best
            )
    starts, end = [], n
    for part in range(parts, 0, -1):
        end = best[part, end][1]
        starts.append(end)
    return starts[::-1]


def _seconds(model: nn.Sequential, example: Tensor) -> list[float]:
    """Median seconds of forward and backward of each child on `example`."""
    probe = copy.deepcopy(model)
    seconds = []
    x = example
    with torch.random.fork_rng(devices=[]):
        for child in probe.children():
            runs = []
            for _ in range(REPEATS + 1):
                begin = time.perf_counter()
                y = child(x)
                if y.requires_grad:
                    y.backward(torch.ones_like(y))
                runs.append(time.perf_counter() - begin)
            seconds.append(sorted(runs[1:])[REPEATS // 2])
            x = y.detach().requires_grad_(y.is_floating_point())
    return seconds
