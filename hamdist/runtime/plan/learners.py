"""The learners of a run: heads, blocks with a local readout (`learning.heads`, level `heads`), and
the optimisers of torch's that move the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from hamdist.config import (
    VECTORS,
    Compensation,
    Credit,
    Decay,
    DynamicsSettings,
    HeadsSettings,
    LearningSettings,
    Memory,
    OptimizerSettings,
    Settings,
)
from hamdist.dynamics.blocks.heads import make_head
from hamdist.dynamics.graph.graph import Graph, ShapeMap
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.updates.optimizers import ELEMENTWISE, BlockOptimizers, OptimizerRule
from hamdist.dynamics.vjp.seeding import block_seed
from hamdist.errors import LevelError, SettingsError
from hamdist.loading import load_function

BESIDE_MESSAGES = 0.3  # staleness.md: trace + local heads


@dataclass(frozen=True)
class Heads:
    """The heads of a run.

    Attributes:
        weights: of the heads' steps, by block that has one.
        readout: whose labels and loss they take.
        predictions: their shape, batch in front.
        norm: with a layer norm.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    readout: str = ""
    predictions: tuple[int, ...] = ()
    norm: bool = True

    def make(self, block: str, shapes: ShapeMap, run_seed: int) -> nn.Module:
        """Make the head of `block`, the same in every process. Raises LevelError."""
        seed = block_seed(run_seed, f"{block}/head")
        return make_head(block, shapes[block], self.predictions, norm=self.norm, seed=seed)


def plan_heads(
    graph: Graph, shapes: ShapeMap, knobs: Locality, learning: LearningSettings
) -> Heads | None:
    """Return the heads that `learning` and `knobs` ask for; None where no labels travel.

    Raises LevelError for heads that a level cannot have, an unknown readout, and a block from whose
    states no linear readout can make the readout's predictions.
    """
    alone = knobs.credit is Credit.HEADS
    settings = learning.heads or (HeadsSettings() if alone else None)
    by_pattern = {p: b.heads for p, b in learning.blocks.items() if b.heads is not None}
    if settings is None and not any(weight != "off" for weight in by_pattern.values()):
        return None
    settings = settings or HeadsSettings()
    if not knobs.pulse or knobs.memory is Memory.REVERSIBLE:
        raise LevelError(
            f"learning.heads with presentation {knobs.presentation.value!r} and memory "
            f"{knobs.memory.value!r}: a label travels with one sample through blocks that keep its "
            "activations or learn at once; use the levels 'heads', 'trace' or 'backprop'"
        )
    readout = graph.readouts[0] if settings.readout is None else settings.readout
    if readout not in graph.readouts:
        raise LevelError(
            f"learning.heads.readout {readout!r} is no readout; readouts: "
            f"{', '.join(graph.readouts)}"
        )
    everywhere = settings.weight or (1.0 if alone else BESIDE_MESSAGES)
    if learning.heads is None and not alone:
        everywhere = 0.0  # single blocks ask for theirs
    weights = {}
    for name, block in graph.blocks.items():
        trained = any(p.requires_grad for p in block.module.parameters())
        if name in graph.readouts or not trained or block.rule is not None:
            continue
        pattern = fitting(name, by_pattern)
        weight = everywhere if pattern is None else by_pattern[pattern]
        if isinstance(weight, float) and weight:
            weights[name] = weight
    plan = Heads(weights, readout, shapes[readout][0], settings.norm)
    for name in weights:
        plan.make(name, shapes, 0)
    return plan


# -- optimisers ------------------------------------------------------------------------------------


FUNCTION = "optimizer (a function)"


def plan_optimizers(
    graph: Graph, knobs: Locality, settings: Settings, functions: OptimizerRule | None
) -> OptimizerRule | None:
    """Return how blocks make their optimisers; None where they follow the equations.

    Every block's are made once here, so that what they refuse is known before anything starts.

    functions: a rule of the user's functions, if there are some.

    Raises:
        SettingsError: Functions and settings contradict each other, or do not work.
        LevelError: The level, or a recipe, has no place for an optimiser.
    """
    learning = settings.learning
    functions = functions or OptimizerRule()
    if learning.optimizer is None and functions.function is None:
        if functions.scheduler is not None:
            raise SettingsError(
                "scheduler without an optimiser, whose step size it would change: give optimizer "
                "or learning.optimizer as well, or use learning.decay and learning.warmup"
            )
        return None
    _check_once(learning, functions)
    name = FUNCTION if learning.optimizer is None else "learning.optimizer"
    for reason in _contradictions(name, settings.dynamics, learning, knobs):
        raise LevelError(reason)
    rule = dataclasses.replace(
        functions,
        settings=learning.optimizer,
        own=own_optimizer(learning.optimizer),
        lr=learning.lr,
        lrs={p: b.lr for p, b in learning.blocks.items() if b.lr is not None},
        qualified=not graph.unsliced.was_cut,
        seed=settings.seed,
    )
    trained = {block: _trained(graph, block) for block in graph.blocks}
    if learning.optimizer is not None:
        full = [rule.full_name(block, name) for block, names in trained.items() for name in names]
        patterns = [p for p in learning.optimizer.groups if p != VECTORS]
        check_patterns("learning.optimizer.groups", patterns, full, "weight")
    by_block = {b: BlockOptimizers(rule, b, named) for b, named in trained.items() if named}
    kinds = {b: [type(opt).__name__ for opt in group.optimizers] for b, group in by_block.items()}
    rule = dataclasses.replace(rule, kinds=kinds)
    if settings.partition.slices:
        _check_slices(name, rule)
    return rule


def own_optimizer(optimizer: OptimizerSettings | None) -> Callable[..., object] | None:
    """Return what `learning.optimizer` names; None where it is torch's. Raises SettingsError."""
    if optimizer is None or not optimizer.is_own:
        return None
    return load_function("learning.optimizer", optimizer.name)


def _trained(graph: Graph, block: str) -> dict[str, nn.Parameter]:
    """Return the weights that a block moves, as parameters that share their memory."""
    shared = graph.foreign_weights(block)
    named = graph.blocks[block].module.named_parameters()
    return {n: nn.Parameter(p.data) for n, p in named if p.requires_grad and n not in shared}


def _check_once(learning: LearningSettings, functions: OptimizerRule) -> None:
    """Raise SettingsError where two places say the same thing."""
    if functions.function is not None and learning.optimizer is not None:
        raise SettingsError("optimizer (a function) and learning.optimizer: give one of them")
    if functions.function is not None:
        names = ("lr", "momentum", "dampening", "weight_decay", "adaptive", "first_step")
        fields = [name for name in names if name in learning.model_fields_set]
        fields += [f"blocks.{p}.lr" for p, b in learning.blocks.items() if b.lr is not None]
        if fields:
            raise SettingsError(
                f"learning.{fields[0]} beside optimizer, a function, whose steps do not depend on "
                "it: say it in the function, and leave it out here"
            )
    varies = learning.decay is not Decay.NONE or learning.warmup or learning.course is not None
    if functions.scheduler is not None and varies:
        raise SettingsError(
            "scheduler beside learning.decay, warmup or course: both change the step size by "
            "sample; give one of them"
        )


def _contradictions(
    name: str, d: DynamicsSettings, learning: LearningSettings, knobs: Locality
) -> Iterator[str]:
    """Yield why blocks cannot have an optimiser."""
    if knobs.hold:
        yield (
            f"{name} with presentation 'hold': omega and its dissipation are part of Hamilton's "
            "equations there, in every tick; use learning.momentum, weight_decay and adaptive, or "
            "a level whose weights move when a message arrives (trace, heads, backprop), or switch "
            "it off at this level (levels: {LEVEL: {learning: {optimizer: off}}})"
        )
    constants = {n: getattr(d, n) for n in ("beta", "eta", "eta_omega", "weight_cost")}
    for block, b in d.blocks.items():
        constants |= {f"blocks.{block}.{n}": getattr(b, n) for n in ("beta", "eta", "eta_omega")}
    for constant, value in constants.items():
        if value:
            yield (
                f"dynamics.{constant} beside {name}, whose steps do not depend on it: leave one of "
                "them out"
            )
    for knob in (Compensation.WEIGHT_PREDICTION, Compensation.LOOK_AHEAD):
        if knob in knobs.compensation:
            yield (
                f"compensation {knob.value!r} beside {name}, whose steps are not along omega: "
                "leave one of them out (Nesterov's momentum: optimizer: {name: sgd, momentum: 0.9, "
                "nesterov: true})"
            )
    if knobs.credit is Credit.MESSAGES and learning.any_heads:
        yield (
            f"learning.heads beside messages with {name}: a weight would have two optimisers; use "
            "level 'heads', or leave one of them out"
        )


def _check_slices(name: str, rule: OptimizerRule) -> None:
    for block, kinds in rule.kinds.items():
        for kind in kinds:
            if kind not in ELEMENTWISE:
                raise LevelError(
                    f"{name} {kind} with partition.slices: its step on a slice of a matrix (block "
                    f"{block!r}) is not that slice of its step on the whole; use one that moves "
                    f"each number by itself ({', '.join(sorted(ELEMENTWISE))}), or no slices"
                )
