"""Rules on the blocks of a plan, and a dry run of each before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hamdist.dynamics.blocks.rule_block import AppliedRule, MakeWeights
from hamdist.dynamics.graph.graph import BlockSpec, combined
from hamdist.dynamics.rules.rule import BlockView, Rule
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.vjp.autograd import OwnGenerator, block_seed, draws
from hamdist.errors import GraphError, HamdistError, LevelError
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.rules import ruled


def applied_rule(
    plan: Plan,
    spec: BlockSpec,
    module: nn.Module,
    theta: Mapping[str, Tensor],
    make_weights: MakeWeights,
) -> AppliedRule:
    """Return the rule of a block, applied to `module` with the weights `theta` that learn."""
    name, graph = spec.name, plan.graph
    shapes = {**plan.spec.parents, **plan.shapes}
    shape, dtype = shapes[name]
    h = torch.zeros(shape, dtype=dtype)
    h = h.to(next(iter(theta.values()), h))  # of the type and on the device of the weights

    def seed(what: str) -> int:
        return block_seed(plan.seed, f"{name}/rule/{what}")

    stochastic = draws(module)
    view = BlockView(
        name=name,
        module=module,
        theta=dict(theta),
        shape=shape[1:],
        inputs=[shapes[parent][0][1:] for parent in spec.parents],
        outputs=shapes[graph.readouts[0]][0][1:],
        depth=graph.depths[name],
        readout=spec.loss is not None,
        wanted=[e.index in plan.channels.messages for e in graph.into[name]],
        join=partial(combined, spec.combine),
        seed=seed,
        random=lambda what: OwnGenerator(seed(what), h.device) if stochastic else nullcontext(),
        h=h,
    )
    scale = partial(plan.scale, name)
    rule = cast(Rule, spec.rule)
    return AppliedRule(rule, view, make_weights, lambda w: w.scaled_by(scale, plan.sample_of))


def try_rules(plan: Plan) -> None:
    """Run every rule once, on a copy of its block and on zeros, so that its errors show early.

    Raises GraphError, which names the rule, the block and the method.
    """
    for name, rule in ruled(plan.graph).items():
        spec = plan.graph.blocks[name]
        who = f"rule {type(rule).__name__} of block {name!r}"
        if name in plan.cast_plans and plan.cast_plans[name].autocast:
            raise LevelError(f"{who}: it computes without autocast; switch that off for this block")
        if plan.spec.ragged:
            raise LevelError(f"{who}: rules know no samples of several lengths; pad them")
        try:
            _try(plan, spec, rule)
        except HamdistError:
            raise
        except Exception as error:
            raise GraphError(f"{who}, in a dry run: {type(error).__name__}: {error}") from error


def _try(plan: Plan, spec: BlockSpec, rule: Rule) -> None:
    module = copied(spec.module)
    theta = {n: p.data for n, p in module.named_parameters() if p.requires_grad}
    dynamics = replace(plan.dynamics.of(spec.name), average=None, betas=())

    def weights(tensors: Sequence[Tensor], names: Sequence[str]) -> Weights:
        return Weights(tensors, dynamics, plan.knobs.order, names)

    applied = applied_rule(plan, spec, module, theta, weights)
    shapes, readout = {**plan.spec.parents, **plan.shapes}, plan.graph.readouts[0]
    h = applied.view.h
    inputs = [
        torch.zeros(s, dtype=h.dtype if t.is_floating_point else t, device=h.device)
        for s, t in map(shapes.__getitem__, spec.parents)
    ]
    batch = len(h)
    if rule.presentation == "hold":
        applied.view.in_tick(h, 0, plan.schedule.c, learns=True)
        applied.gradients(applied.call("relax", 0, batch, inputs, h)[2], 0, 1.0)
        return
    h, kept = applied.call("forward", 0, batch, inputs)
    applied.check_plain("forward", kept)
    if applied.learns:
        target = plan.spec.target(plan.taught_by) if rule.signals.label else None
        label = None if target is None else torch.zeros(target.shape, dtype=target.dtype)
        label = None if label is None else label.to(h.device)
        applied.gradients(applied.call("learn", 0, batch, kept, label), 0, 1.0)
    if applied.listens:
        like = shapes[readout][0] if spec.back == "error" and spec.loss is None else h.shape
        found = applied.call("backward", 0, batch, kept, h.new_zeros(like))
        applied.gradients(found[1], 0, 1.0)
    applied.check_plain("backward", applied.view.memory)
