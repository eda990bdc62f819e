"""Which process hosts which blocks. It changes no number, only time and memory."""

from __future__ import annotations

from hamdist.config import EngineSettings
from hamdist.dynamics.graph import Graph
from hamdist.dynamics.split import balanced
from hamdist.errors import SettingsError


def place(graph: Graph, engine: EngineSettings, cpus: int) -> list[list[str]]:
    """The blocks of each actor: as `engine.placement` says, or runs of neighbouring blocks with
    about equally many parameters; `auto` uses as many actors as blocks or processors allow.

    Raises SettingsError for more actors than blocks, and for a placement that leaves a block out,
    names an unknown one, or one twice.
    """
    names = list(graph.blocks)
    if engine.placement is not None:
        return _explicit(names, engine.placement)
    actors = min(len(names), cpus) if engine.actors == "auto" else engine.actors
    if actors > len(names):
        raise SettingsError(
            f"engine.actors: {actors} actors for {len(names)} blocks ({', '.join(names)}); use at "
            f"most {len(names)}, or cut the model into more blocks (partition.blocks)"
        )
    costs = [
        1.0 + sum(p.numel() for p in block.module.parameters()) for block in graph.blocks.values()
    ]
    starts = balanced(costs, actors)
    ends = [*starts[1:], len(names)]
    return [names[a:b] for a, b in zip(starts, ends, strict=True)]


def _explicit(names: list[str], placement: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    placed = [name for group in placement for name in group]
    for name in placed:
        if name not in names:
            raise SettingsError(
                f"engine.placement: unknown block {name!r}; the blocks are {', '.join(names)}"
            )
        if placed.count(name) > 1:
            raise SettingsError(f"engine.placement: block {name!r} stands there twice")
    missing = [name for name in names if name not in placed]
    if missing:
        raise SettingsError(
            f"engine.placement: no actor for {', '.join(missing)}; place every block"
        )
    if not all(placement):
        raise SettingsError("engine.placement: an actor without blocks; remove it")
    return [[name for name in names if name in group] for group in placement]
