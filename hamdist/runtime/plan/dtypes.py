"""Settings of single blocks (`engine.blocks`), and which block computes in which type.

A block with `dtype` gets a copy of its module in that type, and casts every real input to it. All
other blocks take the types that they would have without such settings. So every cast is at the
border of the block that reads (signals/cast.py), and is the same in every engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hamdist.config import BlockDType, BlockEngineSettings, EngineSettings, Memory
from hamdist.dynamics.graph.graph import BlockSpec, Graph, ShapeMap, combined
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.user_modules.copies import copied, in_type
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import GraphError, LevelError
from hamdist.runtime.signals.cast import CastPlan

NOTHING = BlockEngineSettings()


def block_settings(graph: Graph, engine: EngineSettings) -> dict[str, BlockEngineSettings]:
    """Return the settings of each block. Raises SettingsError for a pattern that fits no block."""
    check_patterns("engine.blocks", engine.blocks, graph.blocks, "block")
    fields = {name: fitting(name, engine.blocks) for name in graph.blocks}
    return {n: NOTHING if p is None else engine.blocks[p] for n, p in fields.items()}


def device_of(block_setting: BlockEngineSettings, engine: EngineSettings) -> str:
    """Return the device on which a block computes."""
    return engine.device if block_setting.device is None else block_setting.device


DTYPES = {
    BlockDType.FLOAT32: torch.float32,
    BlockDType.FLOAT64: torch.float64,
    BlockDType.BFLOAT16: torch.bfloat16,
}


def with_cast_plans(
    graph: Graph, shapes: ShapeMap, inputs: ShapeMap, engine: EngineSettings, knobs: Locality
) -> tuple[Graph, ShapeMap, dict[str, CastPlan]]:
    """Return graph, shapes and cast plans in the types that `engine.blocks` asks for.

    The graph is a copy where blocks have types or devices of their own; there are no cast plans if
    no block has.

    Args:
        shapes: of every h in the graph as it is.
        inputs: shapes of the stream's inputs.

    Raises:
        SettingsError: a type or device is not available.
        GraphError: a block cannot compute in its type.
    """
    by_block = block_settings(graph, engine)
    devices = {name: device_of(block_setting, engine) for name, block_setting in by_block.items()}
    typed = [n for n, w in by_block.items() if w.dtype is not None or w.autocast == "bf16"]
    if not typed and all(device == "cpu" for device in devices.values()):
        return graph, shapes, {}
    if typed and knobs.memory is Memory.REVERSIBLE:
        raise LevelError(
            f"engine.blocks: {typed[0]!r} has a type or an autocast of its own, but with memory "
            "'reversible' states are recomputed from each other, and rounding would spoil them; "
            "leave it out, or use level 'backprop'"
        )
    before = {**shapes, **inputs}
    probed = graph.copy()
    with_inputs: ShapeMap = {}
    cast_plans = {}
    for name, block in probed.blocks.items():
        block_setting = by_block[name]
        dtype = None if block_setting.dtype is None else DTYPES[block_setting.dtype]
        takes = {edge.index: dtype or before[edge.parent][1] for edge in probed.into[name]}
        with_inputs[name] = shapes[name]
        if dtype is not None:
            for module in (block.module, block.output):
                if module is not None:
                    in_type(module, dtype)
            with_inputs[name] = shapes[name][0], _tried(block, before, dtype)
        _check_autocast(name, block_setting, with_inputs[name][1])
        cast_plans[name] = CastPlan(
            block=name,
            device=devices[name],
            inputs=takes,
            messages=with_inputs[name][1],
            targets=dtype,
            autocast=block_setting.autocast == "bf16",
        )
    return probed, with_inputs, cast_plans


def received_dtypes(cast_plans: Mapping[str, CastPlan]) -> dict[int, torch.dtype]:
    """Return the type in which each edge's child takes it and sends messages, by edge."""
    return {
        edge: dtype for cast_plan in cast_plans.values() for edge, dtype in cast_plan.inputs.items()
    }


def _check_autocast(name: str, block_setting: BlockEngineSettings, dtype: torch.dtype) -> None:
    if block_setting.autocast == "bf16" and dtype != torch.float32:
        raise LevelError(
            f"engine.blocks: {name!r} has autocast 'bf16', which rounds float32, but it computes "
            f"in {str(dtype).removeprefix('torch.')}; give it dtype float32, or leave autocast out"
        )


def _tried(block: BlockSpec, before: ShapeMap, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the block's output for inputs of `dtype`."""
    examples = block.with_own([before[parent] for parent in block.parents], before[block.name])
    inputs = [
        torch.zeros(shape, dtype=dtype if was.is_floating_point else was) for shape, was in examples
    ]
    word = str(dtype).removeprefix("torch.")
    try:
        h = _run(block.module, combined(block.combine, inputs))
        if block.output is not None and isinstance(h, Tensor):
            _run(block.output, [h])
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GraphError(
            f"engine.blocks: block {block.name!r} cannot compute in {word}: {reason}; leave its "
            "dtype out, or use autocast"
        ) from error
    if not isinstance(h, Tensor):
        raise GraphError(f"block {block.name!r} returned {type(h).__name__}, not a tensor")
    return h.dtype


@torch.no_grad()
def _run(module: nn.Module, inputs: list[Tensor]) -> object:
    with generator_kept():
        return copied(module)(*inputs)
