"""Cuts a model into blocks.

An `nn.Sequential` becomes a chain of blocks, each an `nn.Sequential` of neighbouring children. Any
other module is traced (dynamics/tracing), and its steps become blocks (cuts.py chooses where they
begin, assemble.py makes them).

In an `nn.Sequential` a unit is a child that has parameters together with the children without
parameters behind it (Linear + ReLU); children without parameters at the front belong to the first
unit, and those behind an invertible unit that are not invertible themselves to the next one.
`grouping` makes one block of each unit, of two units, or of all; `blocks` balances any number of
blocks by parameters or by measured time; `cuts` names the children that begin a block.
The keys of the blocks' modules are the original ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hamdist.config import CutBalance, Grouping, PartitionSettings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.graph.inputs import NetworkInputs, by_parent, called_by_parent, check_taken
from hamdist.dynamics.modules.reversible import pieces_of
from hamdist.dynamics.objective.losses import Losses, LossFunction, losses_of, mse, named
from hamdist.dynamics.partition.assemble import OperationRun, assembled
from hamdist.dynamics.partition.cuts import Cuts, Policy, balanced, stays
from hamdist.dynamics.partition.step_seconds import step_seconds
from hamdist.dynamics.tracing.block_graph import one_block
from hamdist.dynamics.tracing.dataflow import Flow
from hamdist.dynamics.tracing.join_runs import Trace
from hamdist.dynamics.tracing.program import Value, value_of
from hamdist.dynamics.tracing.recorded_calls import Unfollowed, stays_whole
from hamdist.dynamics.tracing.trace import trace, traced_whole
from hamdist.dynamics.user_modules.copies import overlaps
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.dynamics.user_modules.python_state import is_foreign
from hamdist.errors import GraphError

__all__ = ["Policy", "check_made", "is_chain", "split_module", "split_sequential", "traced"]


def check_made(model: nn.Module, *, sent: bool = False) -> None:
    """Raise GraphError for a model that is not ready to be cut.

    That is a lazy module without weights, a tensor without values (meta), one whose elements share
    memory, and, where modules are sent to other processes, a scripted module.
    """
    for name, part in model.named_modules():
        if sent and isinstance(part, torch.jit.ScriptModule):
            raise GraphError(
                f"{name or 'the model'} is compiled (torch.jit), which cannot be sent to an actor: "
                "give the Python module that it was made of, or set engine.kind to 'inprocess'"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise GraphError(
                f"{name!r} has no shape yet (a lazy module): call the model once on an example, "
                "which makes its weights, before you train it"
            )
        if tensor.is_meta:
            raise GraphError(
                f"{name!r} lies on the meta device and has no values: give the model some "
                "(.to_empty(device='cpu'), then an initialisation or load_state_dict)"
            )
        if tensor.layout != torch.strided:
            raise GraphError(
                f"{name!r} is a sparse tensor, which cannot be sent or saved: register it dense "
                "(.to_dense()), or its indices and values as two buffers"
            )
        if isinstance(tensor, nn.Parameter) and overlaps(tensor):
            raise GraphError(
                f"{name!r} is a weight whose numbers share memory (expand), which no optimiser can "
                "move: make it of .clone(), or expand it in forward"
            )


def is_chain(model: nn.Module, partition: PartitionSettings) -> TypeGuard[nn.Sequential]:
    """Return True for an nn.Sequential that can be cut between its children by these settings."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return False
    if not is_usual(model):
        return False
    names = [name for name, child in model._modules.items() if child is not None]
    deeper = any(cut not in names and "." in cut for cut in partition.cuts or ())
    too_many = partition.blocks is not None and partition.blocks > len(names)
    nested = any(len(list(child.children())) for child in model.children())
    twice = {id(m) for m in model._modules.values()}  # its own code may keep something: look at it
    if len(twice) < len(model._modules) and any(is_foreign(type(m)) for m in model.modules()):
        return False
    return not (deeper or (too_many and nested) or partition.balance is CutBalance.ACTIVATIONS)


def split_sequential(
    model: nn.Sequential,
    loss: LossFunction,
    partition: PartitionSettings,
    grouping: Grouping,
    *,
    example: Tensor,
    state_readout: bool = False,
) -> Graph:
    """Return the chain of blocks `block0` ... by `partition`, or else by `grouping`.

    example: (B, ...) an input of the right shape and dtype, for the balance by time.
    Raises GraphError for an empty model, an unknown cut, or more blocks than children.
    """
    children = [(name, m) for name, m in model._modules.items() if m is not None]
    if not children:
        raise GraphError("the model is an empty nn.Sequential; give it at least one module")

    def graph(starts: Sequence[int]) -> Graph:
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

    def seconds(starts: Sequence[int]) -> list[float]:
        return list(step_seconds(graph(starts).copy(), {INPUT: example}).values())

    return graph(_starts(children, partition, grouping, seconds))


def _starts(
    children: Sequence[tuple[str, nn.Module]],
    partition: PartitionSettings,
    grouping: Grouping,
    seconds: Callable[[Sequence[int]], list[float]],
) -> list[int]:
    """Return the indices of the children that begin a block.

    seconds: from such indices to what a step of each block takes.
    """
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
    if partition.balance is CutBalance.TIME:
        costs = seconds(pieces)
    else:
        numbers = [sum(p.numel() for p in m.parameters()) for _, m in children]
        costs = [float(sum(numbers[a:b])) for a, b in zip(pieces, ends, strict=True)]
    return [pieces[i] for i in balanced(costs, partition.blocks)]


def _units(children: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """Return the indices of the children that begin a unit."""
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


# -- any other module ----------------------------------------------------------------------------


def split_module(
    model: nn.Module,
    loss: Losses,
    partition: PartitionSettings,
    grouping: Grouping,
    *,
    example: NetworkInputs,
    targets: Collection[str] | None = None,
    policy: Policy | None = None,
    state_readout: bool = False,
    together: str | None = None,
    ragged: bool = False,
) -> Graph:
    """Return the blocks by `policy`, by `partition` or else by `grouping`.

    loss: of every output, or by output; targets: the outputs for which the stream has targets, if
    it names them. An output of a model that returns several is named by its key in a dict, or
    `out0`, `out1`, ... in a tuple, and so is the block that predicts it. example: inputs of the
    right shapes and dtypes. together: the reason to keep the users of a weight in one block, if
    any. ragged: samples may have lengths of their own.

    A model that cannot be traced is one block, which `Graph.notes` explains. Raises GraphError
    where blocks, cuts or a policy require more than that, for impossible cuts, and for outputs that
    the model does not have.
    """
    check_taken(model, example)
    inputs = by_parent(example)
    divides = (partition.blocks or 1) > 1 or bool(partition.cuts) or policy is not None
    try:
        followed = trace(model, inputs, called_by_parent, ragged=ragged)
    except Unfollowed as why:
        reason = stays_whole(why.module, model, why)
        if divides:
            raise GraphError(
                f"the model cannot be cut into blocks: {reason}; change that line, put it into a "
                "submodule (which then stays whole alone), or leave the partition out"
            ) from None
        single = _one_step(model, inputs, why)
        of_one_value = single is None or value_of(single.output) == (0, ())
        if callable(loss) and len(inputs) == 1 and of_one_value:
            return _whole(model, loss, inputs, state_readout, single.whole[""] if single else why)
        if single is None:
            raise GraphError(f"the model cannot be run: {reason}") from None
        followed = single
    names, values, losses = _outputs(followed, loss, targets)
    flow = Flow(followed, model, values, together)
    cuts = Cuts(flow, model)

    def graph(
        runs: Sequence[OperationRun], losses: Sequence[LossFunction], *, delay: int, state: bool
    ) -> Graph:
        return assembled(flow, model, runs, losses, list(inputs), delay=delay, state_readout=state)

    def seconds(starts: list[int]) -> list[float]:
        runs = cuts.runs(starts, names)
        tried = graph(runs, [mse] * len(names), delay=1, state=False)
        spent = step_seconds(tried.copy(), inputs)
        return [spent[run.name] for run in runs if run.ops]

    if policy is not None:
        starts = cuts.by_policy(policy)
    elif partition.cuts is not None:
        starts = cuts.named(partition.cuts)
    elif partition.blocks is not None:
        starts = cuts.balanced(partition.blocks, partition.balance, seconds, len(names))
    else:
        starts = cuts.grouped(grouping)
    built = graph(cuts.runs(starts, names), losses, delay=partition.delay, state=state_readout)
    built.notes += stays(followed.whole, model)
    built.one_length, built.one_row = followed.one_length, followed.one_row
    return built


def traced(model: nn.Module, example: NetworkInputs) -> fx.Graph:
    """Return what a model does, as the graph of which hamdist makes blocks.

    Modules of torch are one node each, weights have their dotted names. `print(graph)` and
    `graph.print_tabular()` show it, `graph.python_code("self").src` as Python code.

    Args:
        model: stays as it is.
        example: an input (B, ...) of the right shape and dtype, or several by name.

    Raises:
        GraphError: the model does something that cannot be followed.
    """
    check_taken(model, example)
    inputs = by_parent(example)
    try:
        steps = trace(model, inputs, called_by_parent)
        return one_block(steps, model, list(inputs)).hamdist_graph
    except Unfollowed as why:
        raise GraphError(
            f"the model cannot be traced: {stays_whole(why.module, model, why)}"
        ) from None


def _whole(
    model: nn.Module,
    loss: LossFunction,
    inputs: Mapping[str, Tensor],
    state_readout: bool,
    why: Unfollowed,
) -> Graph:
    """Return one block with a whole model that takes one tensor and returns one."""
    block = BlockSpec("block0", model, tuple(inputs), loss=loss, state=state_readout)
    built = Graph([block], original=model)
    built.notes += stays({"": why}, model)
    return built


def _one_step(model: nn.Module, inputs: Mapping[str, Tensor], why: Unfollowed) -> Trace | None:
    """Return the trace of the model as one step; None where it does not even run so."""
    try:
        return traced_whole(model, inputs, called_by_parent, why)
    except Unfollowed:
        return None


def _outputs(
    followed: Trace, loss: Losses, targets: Collection[str] | None
) -> tuple[list[str], list[Value], list[LossFunction]]:
    """Return names (of the only one: ''), values and losses of the outputs that have a loss."""
    outputs = [(name, value_of(node)) for name, node in named(followed.output)]
    refs = {name: value for name, value in outputs if value is not None}
    if not refs:
        raise GraphError(
            "the model's output does not depend on its input and its weights; return the prediction"
        )
    losses = losses_of(list(refs), loss, targets)
    return list(losses), [refs[n] for n in losses], list(losses.values())
