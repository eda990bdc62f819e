"""Assembles blocks from the runs of steps between cuts.

Several values that leave one block go as columns of one signal, and each reader takes its own out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import LossFunction, model_loss
from hamdist.dynamics.tracing.block_graph import BlockGraph
from hamdist.dynamics.tracing.dataflow import Flow, references
from hamdist.dynamics.tracing.program import Value
from hamdist.errors import GraphError


@dataclass(frozen=True, slots=True)
class OperationRun:
    """Neighbouring ops, by number, that become the block `name`; the output that it predicts."""

    name: str
    ops: tuple[int, ...]
    output: int | None = None


def assembled(
    flow: Flow,
    model: nn.Module,
    runs: Sequence[OperationRun],
    losses: Sequence[LossFunction],
    inputs: Sequence[str],
    *,
    delay: int,
    state_readout: bool,
) -> Graph:
    """Return the graph of `runs`, over the parts of `model` themselves.

    losses: by output; inputs: by name, as parents have it.
    """
    home = {i: run.name for run in runs for i in run.ops}
    readouts = {run.output: run.name for run in runs if run.output is not None}
    leaving: dict[str, list[Value]] = {run.name: [] for run in runs}
    for run in runs:
        for value in _outer(flow, run, home):
            if value not in leaving[home[value[0]]]:
                leaving[home[value[0]]].append(value)
    blocks = []
    for run in runs:
        built = BlockGraph(flow, model, run.name, home, leaving)
        result = _result(built, flow, run, losses, leaving[run.name])
        parents = built.finish(result, (*leaving, *inputs))
        between = [p for p in parents if p in leaving]
        predicts = run.output is not None and readouts[run.output] == run.name
        blocks.append(
            BlockSpec(
                name=run.name,
                module=built.children() or built.module(),
                parents=tuple(parents),
                combine=Combine.ARGUMENTS,
                delays=dict.fromkeys(between, delay),
                loss=losses[run.output or 0] if predicts else None,
                state=predicts and state_readout,
            )
        )
    return Graph(blocks, original=model)


def _outer(flow: Flow, run: OperationRun, home: Mapping[int, str]) -> list[Value]:
    """Return the values of other runs that a run reads, in order."""
    outer = [
        value
        for i in run.ops
        for value in references(flow.ops[i])
        if home.get(value[0], run.name) != run.name and value[0] not in flow.free
    ]
    if run.output is not None:
        value = flow.outputs[run.output]
        if home[value[0]] != run.name:
            outer.append(value)
    return list(dict.fromkeys(outer))


def _result(
    built: BlockGraph,
    flow: Flow,
    run: OperationRun,
    losses: Sequence[LossFunction],
    leaving: Sequence[Value],
) -> fx.Node:
    """Return what a block sends or predicts; a model's own loss is repeated for each row."""
    for i in run.ops:
        built.emit(i)
    if run.output is None:
        forms = [flow.form(value) for value in leaving]
        alone = len(forms) == 1 and forms[0].batch_first
        return built.value(leaving[0]) if alone else built.packed(leaving)
    value = flow.outputs[run.output]
    if losses[run.output] is not model_loss:
        return built.value(value)
    if flow.form(value).dims != ():
        raise GraphError(
            "loss 'model' learns one number that the model computes itself, and the output is "
            "more than that: give the stream's targets a loss, such as 'cross-entropy'"
        )
    return built.packed([value])
