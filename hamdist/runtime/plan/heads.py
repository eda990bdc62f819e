"""The heads of a run: blocks with a local readout (`learning.heads`, level `heads`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hamdist.config import Credit, HeadsSettings, LearningSettings, Memory
from hamdist.dynamics.blocks.heads import make_head
from hamdist.dynamics.graph.graph import Graph, ShapeMap
from hamdist.dynamics.graph.patterns import fitting
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.vjp.seeding import block_seed
from hamdist.errors import LevelError

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
