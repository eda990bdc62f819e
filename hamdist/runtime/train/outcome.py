"""From the outcome of an engine to the result for the user; the likely cause of a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.blocks.dissipation import dissipation_warnings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedSequence, merged_module
from hamdist.errors import DivergedError
from hamdist.runtime.nodes.weight_ports import weight_lags
from hamdist.runtime.plan.checks import carries
from hamdist.runtime.plan.plan import Plan
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
        "warnings": list(outcome.warnings),
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


# -- a run that left the finite range --------------------------------------------------------------


def with_cause(error: DivergedError, plan: Plan) -> DivergedError:
    """Return the same error with its likely cause."""
    cause = error.cause or _cause(error, plan)
    return DivergedError(error.block, error.tick, error.quantity, error.norm, cause)


def _cause(error: DivergedError, plan: Plan) -> str:
    d = plan.dynamics.of(error.block)
    if d.sign == 1:
        return (
            "sign s = +1 is the original Hamilton equations, which blow up when they are "
            "integrated forward in time; use dynamics.sign -1 (Hamiltonian Learning)"
        )
    of_z = error.quantity == "z"  # what children have sent
    blocks = [
        b for b in plan.graph.blocks.values() if error.block in (b.parents if of_z else [b.name])
    ]
    rules = [block.name for block in blocks if block.rule is not None]
    if math.isnan(error.norm) and rules:
        return (
            f"what the rule of {', '.join(rules)} returns is not a number: look there for a root "
            "or a norm at 0, a logarithm, a division"
        )
    if error.quantity == "omega" and math.isnan(error.norm):
        return (
            "a derivative does not exist where the block's module stands now, as that of a root or "
            "a norm at 0; keep its argument away from there (an epsilon)"
        )
    if error.tick <= plan.graph.depths[error.block] or not (d.beta or d.betas):
        return (
            "the weights have not moved, so look at the input's scale, the initial weights and "
            f"dynamics.limit ({d.limit:g})"
        )
    if plan.knobs.hold and error.block in plan.graph.cycle():
        too_little = dissipation_warnings(plan.graph, plan.dynamics)
        if too_little:
            return too_little[0]
    rate = "learning.lr" if plan.follows_lr else "dynamics.beta"
    if plan.optimizer is not None and plan.optimizer.function is not None:
        rate = "lr in the function 'optimizer'"
    smaller = f"use a smaller {rate}"
    if plan.knobs.sequence:
        return (
            f"most likely the steps are too large: {smaller} (a step follows the sum of the losses "
            "of a sequence, so it grows with the sequence's length)"
        )
    stale = ""
    if plan.schedule.staleness:
        stale = (
            f", or steps that shrink with the delay (locality.delay_power): messages are up to "
            f"{plan.schedule.staleness} samples late"
        )
    return f"most likely the steps are too large: {smaller}{stale}"
