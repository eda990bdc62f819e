"""Checks of a graph for memory `reversible`, and of the precision of recovered states.

A block whose module consists of invertible maps keeps nothing of a sample: its child sends its
output back together with the message. So it has one parent and one child. All other blocks keep
their activations; they are at the ends: they read the input, or are readouts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hamdist.dynamics.graph.graph import BlockSpec, Graph, ShapeMap, combined
from hamdist.dynamics.graph.inputs import INPUT, is_input
from hamdist.dynamics.modules.reversible import pieces_of, undone
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.dynamics.vjp.seeding import random_parts
from hamdist.errors import LevelError

# Depth |lambda| tau of a leak: e to this power is what a state's rounding error grows by.
LEAK_FLOAT32 = 5.0
LEAK_FLOAT64 = 10.0
# Relative errors of recovered states: above the first the gradients are no longer exact in a way
# that matters, above the second they mean nothing.
WARN_ABOVE = 1e-3
REFUSE_ABOVE = 1e-1

_INSTEAD = (
    "write it as a hamdist.Coupling or hamdist.Midpoint, put it into the block of the readout "
    "(partition.cuts), or use level 'backprop'"
)


def reversible_blocks(graph: Graph, shapes: ShapeMap) -> frozenset[str]:
    """Return the blocks that keep nothing of a sample.

    Raises LevelError for a graph in which that leaves something out: no such block, one with
    several parents or children, a block between them whose input cannot be recomputed, parts that
    differ from one evaluation to the next, a leak that is too strong for the dtype of the states.
    """
    names = {b.name for b in graph.blocks.values() if b.loss is None and pieces_of(b.module)}
    for block in graph.blocks.values():
        if block.name in names:
            _check_neighbours(graph, block)
            _check_evaluations(block)
        elif block.loss is None and not all(map(is_input, block.parents)):
            raise LevelError(
                f"memory 'reversible': block {block.name!r} ({_kind(block.module)}) is h' = f(h) "
                "(HL Eq. 9) or the like, whose input cannot be recomputed from its output; "
                + _INSTEAD
            )
    if not names:
        raise LevelError(
            "memory 'reversible': no block is reversible, so every activation would be stored; "
            "give each hamdist.Coupling or hamdist.Midpoint a block of its own "
            "(partition.cuts), or use level 'backprop'"
        )
    for chain in _chains(graph, names):
        _check_leak(graph, chain, shapes[chain[0]][1])
    return frozenset(names)


def _check_neighbours(graph: Graph, block: BlockSpec) -> None:
    children = [edge.child for edge in graph.out_of[block.name]]
    if len(children) != 1:
        raise LevelError(
            f"memory 'reversible': block {block.name!r} has the children {', '.join(children)}; a "
            "reversible block gets its state back from one child; put its children into one block"
        )
    if len(block.parents) != 1:
        raise LevelError(
            f"memory 'reversible': block {block.name!r} reads {', '.join(block.parents)}; a "
            "reversible block recomputes the state of one parent; put the others into that parent"
        )


def _check_evaluations(block: BlockSpec) -> None:
    """Check that both passes evaluate the same function, and that twice is the same as once."""
    name = f"memory 'reversible': block {block.name!r} has "
    for part in random_parts(block.module):
        if part.training and getattr(part, "p", None) != 0:
            raise LevelError(
                f"{name}a {type(part).__name__}, which would draw other numbers when the state is "
                "recomputed; leave it out, or use level 'backprop'"
            )
    for part in block.module.modules():
        if isinstance(part, _NormBase) and part.training and part.track_running_stats:
            raise LevelError(
                f"{name}a {type(part).__name__} in training mode, which moves its running "
                "statistics at every evaluation, also when the state is recomputed; use a "
                "LayerNorm or GroupNorm, track_running_stats=False, or level 'backprop'"
            )


def _check_leak(graph: Graph, chain: list[str], dtype: torch.dtype) -> None:
    limit = LEAK_FLOAT64 if dtype == torch.float64 else LEAK_FLOAT32
    depth = 0.0
    for name in chain:
        for piece in pieces_of(graph.blocks[name].module):
            if piece.decay >= 1:
                raise LevelError(
                    f"memory 'reversible': block {name!r} has a leak of |lambda| tau = "
                    f"{piece.decay:g} per step. From 1 on that is HL Eq. 9 (c tau = 1), which "
                    "diverges when it is run backwards (as 2.414^k at 1); use leak=0, or level "
                    "'backprop'"
                )
            depth += piece.decay
        if depth > limit:
            raise LevelError(
                f"memory 'reversible': with block {name!r} the leak comes to depth |lambda| tau = "
                f"{depth:g}, above {limit:g} for {_short(dtype)}: run backwards, rounding errors "
                f"grow by about e^{depth:.3g}; use leak=0, a smaller tau or fewer steps"
                + ("" if dtype == torch.float64 else ", dtype float64 (up to 10)")
                + ", or level 'backprop'"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Sequential):
        return ", ".join(type(part).__name__ for part in module)
    return type(module).__name__


def _chains(graph: Graph, reversible: Collection[str]) -> list[list[str]]:
    """Return the chains of reversible blocks, each the only child of the one before."""
    chains = []
    for name in graph.blocks:
        if name in reversible and graph.blocks[name].parents[0] not in reversible:
            chain = [name]
            while (child := graph.out_of[chain[-1]][0].child) in reversible:
                chain.append(child)
            chains.append(chain)
    return chains


@dataclass(frozen=True, slots=True)
class InversionError:
    """Error of a state recovered through a chain of `blocks`: |recovered - true| / |true|.

    The state is that before the first block, recovered from the one behind the last, of `dtype`.
    """

    blocks: list[str]
    error: float
    dtype: torch.dtype

    def __str__(self) -> str:
        first, last = self.blocks[0], self.blocks[-1]
        return f"block {first!r}" if first == last else f"blocks {first!r} to {last!r}"


@torch.no_grad()
def recoveries(graph: Graph, reversible: Collection[str], u: Tensor) -> list[InversionError]:
    """Return the errors with which an example u, (B, ...), is recovered with the present weights.

    In `reversible`, as `reversible_blocks` returns them. Memory: a few states, whatever the depth;
    modules are copied. Raises LevelError for a block whose buffers differ after an evaluation.
    """
    errors = []
    for chain in _chains(graph, reversible):
        start = _before(graph, graph.blocks[chain[0]], u)
        x = start.clone()  # which a user's module might write to
        for name in chain:
            with generator_kept():
                x = _evaluated(graph.blocks[name], x)
        for name in reversed(chain):
            with generator_kept():
                x = undone(pieces_of(copied(graph.blocks[name].module)), x)
        size = torch.linalg.vector_norm(start.double())
        apart = torch.linalg.vector_norm((x - start).double())
        error = float(apart / size) if size else float(apart)
        errors.append(InversionError(chain, error, start.dtype))
    return errors


def _before(graph: Graph, block: BlockSpec, u: Tensor) -> Tensor:
    """Return the input of `block`: the stream's, or the state of its ordinary parent."""
    (name,) = block.parents
    if name == INPUT:
        return u
    parent = graph.blocks[name]
    with generator_kept():
        module = copied(parent.module)
        h: Tensor = module(*combined(parent.combine, [u.clone() for _ in parent.parents]))
    return h


def _evaluated(block: BlockSpec, x: Tensor) -> Tensor:
    module = copied(block.module)
    h: Tensor = module(x)
    before = dict(block.module.named_buffers())
    for name, buffer in module.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise LevelError(
                f"memory 'reversible': block {block.name!r} moves its buffer {name!r} at every "
                "evaluation, also when the state is recomputed; use a module without it, or level "
                "'backprop'"
            )
    return h


def drift_warnings(graph: Graph, reversible: Collection[str], u: Tensor) -> list[str]:
    """Return the warnings for a run in which these blocks are `reversible`.

    u: an example, (B, ...). Raises LevelError where the states are not recovered at all.
    """
    warnings: list[str] = []
    if not reversible:
        return warnings
    for error in recoveries(graph, reversible, u):
        drift = (
            f"memory 'reversible': {error} recover their states with a relative error of "
            f"{error.error:.1e} ({_short(error.dtype)}, at the weights of the start)"
        )
        if not error.error <= REFUSE_ABOVE:
            raise LevelError(
                f"{drift}, so their gradients would mean nothing. If F draws random numbers or "
                "writes to its input, take that out; else use dtype float64, a smaller tau or "
                "scale, or fewer steps; or level 'backprop'"
            )
        if error.error > WARN_ABOVE:
            warnings.append(
                f"{drift}; gradients will be off by about as much, and the error grows as the "
                "weights do. Use dtype float64, a smaller tau or scale, or fewer steps"
            )
    for block in graph.blocks.values():
        inside = [m for m in block.module.modules() if _is_weighted_step(m)]
        if block.name not in reversible and inside:
            warnings.append(
                f"memory 'reversible': block {block.name!r} has invertible parts but keeps their "
                "activations, for it has others as well; cut before or behind the first "
                f"{type(inside[0]).__name__} (partition.cuts)"
            )
    return warnings


def _is_weighted_step(module: nn.Module) -> bool:
    is_step = bool(pieces_of(module)) and not isinstance(module, nn.Sequential)
    return is_step and next(module.parameters(), None) is not None
