"""The fingerprint of a run, which has to be equal for a run to resume from a snapshot."""

from __future__ import annotations

from typing import Any

from hamdist.config import Compress, EngineSettings, Settings, StepKind
from hamdist.runtime.plan.plan import Plan

_ALIKE = ("level", "locality", "loss", "dtype", "seed", "metrics")


def fingerprint(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Return everything that two runs have in common if one can continue from the other's state.

    Left out are numbers that may change on the way, where blocks live, and how signals travel.
    """
    engine = plan.engine.model_dump(mode="json")
    dumped = settings.model_dump(mode="json")
    blocks = {
        name: {
            "parents": list(block.parents),
            "parameters": {k: list(p.shape) for k, p in block.module.named_parameters()},
            "shape": list(plan.shapes[name][0]),
            **({} if block.rule is None else {"rule": type(block.rule).__name__}),
            **({} if plan.optimizer is None else {"optimizer": plan.optimizer.kinds.get(name)}),
        }
        for name, block in plan.graph.blocks.items()
    }
    kinds = {
        n: {"dtype": b["dtype"], "autocast": b["autocast"]} for n, b in engine["blocks"].items()
    }
    return {
        "blocks": blocks,
        "edges": {e.name: e.delay for e in plan.graph.edges},
        "channels": [c.key for c in plan.channels.all()],
        "c": plan.schedule.c,
        **{name: dumped[name] for name in _ALIKE},
        "compress": [engine["compress"], engine["feedback"], *_share(plan.engine)],
        "native": plan.native,
        "closed": plan.engine.step is not StepKind.AUTOGRAD,
        "computes": kinds,
    }


def _share(engine: EngineSettings) -> list[float]:
    """Return `engine.topk_share` where a codec uses it."""
    words = engine.compress.values() if isinstance(engine.compress, dict) else [engine.compress]
    return [engine.topk_share] if Compress.TOPK in words else []
