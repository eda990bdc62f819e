"""From the outcome of an engine to the result for the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedSequence, merged_module
from hamdist.runtime.advice.advice import after
from hamdist.runtime.nodes.weight_ports import weight_lags
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.rule_checks import carries
from hamdist.runtime.process.startup import Startup
from hamdist.runtime.results.result import BlockState, Outcome, RunResult
from hamdist.runtime.signals.edge_codecs import in_edge_order


def make_result(
    graph: Graph, plan: Plan, outcome: Outcome, startup: Startup, settings: Settings, why: list[str]
) -> RunResult:
    """Return the result of a run from what its engine returned."""
    startup.add(outcome.startup)
    lost = [name for name in graph.blocks if name not in outcome.blocks]
    if lost:
        outcome.warnings.append(
            f"the run was called off before {', '.join(lost)} could hand over their weights; the "
            "model has their initial ones"
        )
    weights = {name: {**b.theta, **b.buffers} for name, b in outcome.blocks.items()}
    for name in lost:
        weights[name] = graph.blocks[name].state_dict()
    averages = {name: b.average for name, b in outcome.blocks.items() if b.average}
    facts = {
        **outcome.shared(),
        "startup": startup.seconds,
        "startup_seconds": sum(startup.seconds.values()),
        "compression": in_edge_order(outcome.compression, graph),
        "rounding": {n: b.rounding for n, b in outcome.blocks.items() if b.rounding is not None},
        "staleness": plan.staleness,
        "resumed": plan.resumed,
        "delays": {e.name: e.delay for e in plan.graph.edges if not e.from_input},
        "weight_lags": weight_lags(plan),
        "stored": {
            name: outcome.blocks[name].stored
            for name in graph.blocks
            if plan.knobs.sequence and name in outcome.blocks
        },
        "chosen": settings if why else None,
        "why": why,
        "warnings": [*outcome.warnings, *after(plan, outcome)],
    }
    return RunResult(
        model=_merged(graph, plan, weights, averages),
        plain=_merged(graph, plan, weights, {}) if averages else None,
        blocks=outcome.blocks,
        windows=outcome.windows,
        records={name: outcome.records[name] for name in graph.blocks if name in outcome.records},
        **facts,
    )


def model_of(graph: Graph, plan: Plan, blocks: Mapping[str, BlockState]) -> nn.Module:
    """Return the plain module with the weights of all blocks, or their averages."""
    weights = {name: {**b.theta, **b.buffers} for name, b in blocks.items()}
    return _merged(graph, plan, weights, {n: b.average for n, b in blocks.items() if b.average})


def _merged(
    graph: Graph,
    plan: Plan,
    weights: Mapping[str, Mapping[str, Any]],
    averages: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    averaged = {name: {**of_block, **averages.get(name, {})} for name, of_block in weights.items()}
    return merged_module(graph, averaged, _whole(graph, plan))


def _whole(graph: Graph, plan: Plan) -> MergedSequence | None:
    """Return the module that takes the weights of a sequence's blocks."""
    if not plan.knobs.sequence and not carries(plan.graph):
        return None
    before, spec = graph.unsliced, plan.spec
    shapes = before.shapes(spec.u_shape, spec.u_dtype, spec.parents)
    return MergedSequence(before, shapes)
