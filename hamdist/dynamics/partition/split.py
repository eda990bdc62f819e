"""Cuts a model into blocks.

A model becomes a list of steps: an `nn.Sequential` its children, which are not looked into where
the cuts do not ask for it, any other module what it does when it runs (dynamics/tracing). cuts.py
chooses where blocks begin, assemble.py makes them. The keys of their weights are the original ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hamdist.config import CutBalance, Grouping, PartitionSettings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.graph.inputs import NetworkInputs, by_parent, called_by_parent, check_inputs
from hamdist.dynamics.objective.losses import Losses, LossFunction, losses_of, mse, named_parts
from hamdist.dynamics.partition.assemble import OperationRun, assembled
from hamdist.dynamics.partition.cuts import Cuts, Policy, stays
from hamdist.dynamics.partition.step_seconds import step_seconds
from hamdist.dynamics.tracing.block_graph import one_block
from hamdist.dynamics.tracing.dataflow import Flow
from hamdist.dynamics.tracing.join_runs import Trace
from hamdist.dynamics.tracing.program import Value, value_of
from hamdist.dynamics.tracing.recorded_calls import Unfollowed, stays_whole
from hamdist.dynamics.tracing.trace import chain_of_children, trace, traced_whole
from hamdist.dynamics.user_modules.copies import overlaps
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.dynamics.user_modules.python_state import is_foreign
from hamdist.errors import GraphError

__all__ = ["Policy", "check_made", "split_module", "traced"]


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
    if isinstance(model, nn.Sequential) and not any(m is not None for m in model._modules.values()):
        raise GraphError("the model is an empty nn.Sequential; give it at least one module")
    check_inputs(model, example)
    inputs = by_parent(example)
    divides = (partition.blocks or 1) > 1 or bool(partition.cuts) or policy is not None
    chain = policy is None and callable(loss) and len(inputs) == 1
    try:
        if chain and _is_chain(model, partition):
            followed = chain_of_children(model, *inputs)
        else:
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


def _is_chain(model: nn.Module, partition: PartitionSettings) -> TypeGuard[nn.Sequential]:
    """Return True for an nn.Sequential that these settings cut between its children."""
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
    check_inputs(model, example)
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
    outputs = [(name, value_of(node)) for name, node in named_parts(followed.output)]
    refs = {name: value for name, value in outputs if value is not None}
    if not refs:
        raise GraphError(
            "the model's output does not depend on its input and its weights; return the prediction"
        )
    losses = losses_of(list(refs), loss, targets)
    return list(losses), [refs[n] for n in losses], list(losses.values())
