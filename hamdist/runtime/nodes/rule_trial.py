"""A dry run of the rules of a plan, before anything starts."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch

from hamdist.dynamics.blocks.rule_block import AppliedRule
from hamdist.dynamics.graph.graph import INPUT
from hamdist.errors import GraphError, HamdistError, LevelError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.rule_checks import ruled


def try_rules(plan: Plan) -> None:
    """Run every rule once, on a copy of its block and on zeros, so that its errors show early.

    Raises GraphError, which names the rule, the block and the method.
    """
    rules = ruled(plan.graph)
    plan = replace(plan, graph=plan.graph.copy()) if rules else plan
    for name, rule in rules.items():
        who = f"rule {type(rule).__name__} of block {name!r}"
        if name in plan.cast_plans and plan.cast_plans[name].autocast:
            raise LevelError(f"{who}: it computes without autocast; switch that off for this block")
        if plan.spec.ragged:
            raise LevelError(f"{who}: rules know no samples of several lengths; pad them")
        if rule.presentation == "sequence" and plan.spec.patience and not plan.spec.kept:
            again = "samples with late labels would be shown again, out of their sequence"
            raise LevelError(f"{who}: {again}; use stream.relearn: trace")
        before = dict(getattr(rule, "__dict__", {}))
        try:
            block = make_node(plan, name, Mailbox({INPUT, *plan.graph.blocks})).block
            _try(plan, name, block.rule)  # type: ignore[union-attr]  # it has one
        except HamdistError:
            raise
        except Exception as error:
            raise GraphError(f"{who}, in a dry run: {type(error).__name__}: {error}") from error
        for key, value in getattr(rule, "__dict__", {}).items():
            if value is not before.get(key, getattr(type(rule), key, value)):
                raise GraphError(
                    f"{who}: it changes self.{key}, but `self` holds constants, of which each "
                    "process has a copy: keep it in block.memory, which `start` returns"
                )


def _try(plan: Plan, name: str, applied: AppliedRule) -> None:
    spec, rule, h = plan.graph.blocks[name], applied.rule, applied.view.h
    shapes, readout = {**plan.spec.parents, **plan.shapes}, plan.graph.readouts[0]
    inputs = [
        torch.zeros(s, dtype=h.dtype if t.is_floating_point else t, device=h.device)
        for s, t in map(shapes.__getitem__, spec.parents)
    ]
    if rule.presentation == "hold":
        nudges = rule.nudges(plan.schedule.c)
        if any(plan.dynamics.phi(k) != phi for k, phi in enumerate(nudges + nudges)):
            counts = ", then ".join(
                f"{len([*same])} times {phi:g}" for phi, same in groupby(nudges)
            )
            raise LevelError(
                f"block {name!r} with rule {type(rule).__name__}: it needs the loss scaled by tick "
                f"of a sample; set dynamics.phi to {{values: [...], cycle: true}} with {counts}"
            )
        applied.view.in_tick(h, 0, plan.schedule.c, learns=True)
        applied.gradients(applied.call("relax", 0, len(h), inputs, h)[2], 0, 1.0)
        return
    h, kept = applied.forward(0, inputs)
    applied.check_plain("forward", kept)
    if applied.learns:
        y = plan.spec.target(plan.taught_by) if rule.signals.label else None
        label = None if y is None else torch.zeros(y.shape, dtype=y.dtype, device=h.device)
        applied.gradients(applied.call("learn", 0, len(h), kept, label), 0, 1.0)
    if applied.listens:
        like = shapes[readout][0] if spec.back == "error" and spec.loss is None else h.shape
        applied.back(kept, h.new_zeros(like), 0, 1.0)
    applied.check_plain("backward", applied.view.memory)
