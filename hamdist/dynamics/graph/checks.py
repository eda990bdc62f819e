"""Checks of a graph of blocks before any of its modules runs. All raise GraphError."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from torch import Tensor, nn

from hamdist.dynamics.graph.inputs import INPUT, is_input
from hamdist.dynamics.graph.spec import BlockSpec, Edge, names_text, reach
from hamdist.dynamics.user_modules.python_state import is_foreign, mutable_in
from hamdist.errors import GraphError


def check_names(blocks: Mapping[str, BlockSpec]) -> None:
    """Check that block names differ, and that every parent exists and is named once."""
    if not blocks:
        raise GraphError("the graph has no blocks; give it at least a readout")
    for block in blocks.values():
        if not block.name or block.name == INPUT or "->" in block.name or "." in block.name:
            raise GraphError(
                f"block {block.name!r}: a name is not empty, not {INPUT!r} (the stream's "
                "input) and holds neither '->' nor '.'"
            )
        if hasattr(nn.ModuleDict(), block.name):
            raise GraphError(
                f"block {block.name!r}: torch keeps this name for itself; choose another"
            )
        if not block.parents:
            raise GraphError(
                f"block {block.name!r} has no parents; name the blocks it reads, or {INPUT!r}"
            )
        for parent in (*block.parents, *block.delays):
            if not is_input(parent) and parent not in blocks:
                names = ", ".join((INPUT, *blocks))
                raise GraphError(
                    f"block {block.name!r} has the unknown parent {parent!r}; known: {names}"
                )
        for parent in block.delays:
            if parent not in block.parents:
                raise GraphError(
                    f"block {block.name!r} has a delay for {parent!r}, which is not its parent"
                )
        for parent in block.parents:
            if block.parents.count(parent) > 1:
                raise GraphError(
                    f"block {block.name!r} names its parent {parent!r} twice; one edge joins "
                    "two blocks, so repeat the input inside the module"
                )


def check_delays(edges: Sequence[Edge]) -> None:
    """Check that every edge takes a whole number of ticks, at least one."""
    for edge in edges:
        if isinstance(edge.delay, bool) or not isinstance(edge.delay, int):
            raise GraphError(f"edge {edge.name}: delay {edge.delay!r} is no whole number")
        if edge.delay < 1:
            cycle = _zero_delay_cycle(edges)
            where = f"; it lies on the zero-delay cycle {' -> '.join(cycle)}" if cycle else ""
            raise GraphError(
                f"edge {edge.name} has delay {edge.delay}{where}: a signal needs at least one "
                "tick; for an instantaneous connection put both into one block"
            )


def _zero_delay_cycle(edges: Sequence[Edge]) -> list[str]:
    zero: dict[str, list[str]] = {}
    for edge in edges:
        if edge.delay < 1:
            zero.setdefault(edge.child, []).append(edge.parent)
    try:
        TopologicalSorter(zero).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def check_readouts(blocks: Mapping[str, BlockSpec], edges: Sequence[Edge]) -> None:
    """Check that there is a readout, that every block has a path to one, and that no output net
    has a child.
    """
    readouts = [b.name for b in blocks.values() if b.loss is not None]
    if not readouts:
        raise GraphError("no block has a loss, so nothing is learned; give the last block a loss")
    for edge in edges:
        parent = blocks.get(edge.parent)
        if parent is not None and not parent.has_state:
            raise GraphError(
                f"block {edge.child!r} reads {edge.parent!r}, an output net, which has no "
                "state; read its parents instead, or give it a state (state=True)"
            )
    for block in blocks.values():
        if block.output is not None and not (block.loss is not None and block.state):
            raise GraphError(
                f"block {block.name!r} has an output module but is no readout with a state"
            )
    reached = reach(readouts, ((e.child, e.parent) for e in edges))
    lost = [b for b in blocks if b not in reached]
    if lost:
        raise GraphError(
            f"no path leads from {names_text(lost)} to a readout, so no message ever comes back; "
            "connect or remove them"
        )


def check_parameters(
    blocks: Mapping[str, BlockSpec], why: str | None = None, *, frozen: bool = False
) -> None:
    """Check that every buffer, and every weight of an output module, belongs to one block.

    why: the reason for which that has to hold for all weights that learn, too, and with `frozen`
    for those that do not; None if there is none.
    """
    owner: dict[int, tuple[str, str, bool]] = {}
    for name, module, output in _modules(blocks.values()):
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            other = owner.setdefault(id(tensor), (name, key, output))
            weight = isinstance(tensor, nn.Parameter)
            alone = why is not None and (frozen or tensor.requires_grad)
            if other[0] != name and (not weight or alone or output or other[2]):
                kind = "parameter" if weight else "buffer"
                here = "" if why is None or not weight else f"with {why} "
                raise GraphError(
                    f"blocks {other[0]!r} and {name!r} share a {kind} ({other[1]!r} and "
                    f"{key!r}); {here}a weight belongs to one block, so keep both in one block or "
                    "give each its own"
                )


def check_shared_modules(blocks: Mapping[str, BlockSpec]) -> None:
    """Check that a module with the user's own code that keeps Python state belongs to one block."""
    owner: dict[int, str] = {}
    for name, module, _ in _modules(blocks.values()):
        for part in module.modules():
            other = owner.setdefault(id(part), name)
            attributes = [v for k, v in vars(part).items() if not k.startswith("_")]
            attributes = [v for v in attributes if not isinstance(v, (Tensor, nn.Module))]
            if other != name and is_foreign(type(part)) and mutable_in(attributes):
                raise GraphError(
                    f"blocks {other!r} and {name!r} share a {type(part).__name__}, which may keep "
                    "Python state from call to call, so copies of it may differ; keep both in one "
                    "block"
                )


def _modules(blocks: Iterable[BlockSpec]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield each module with the name of its block, and True if it is the output module."""
    for block in blocks:
        yield block.name, block.module, False
        if block.output is not None:
            yield block.name, block.output, True
