"""Settings of single blocks, from `engine.blocks`."""

from __future__ import annotations

from hamdist.config import BlockEngineSettings, EngineSettings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.patterns import check_patterns, fitting

NOTHING = BlockEngineSettings()


def block_settings(graph: Graph, engine: EngineSettings) -> dict[str, BlockEngineSettings]:
    """Return the settings of each block. Raises SettingsError for a pattern that fits no block."""
    check_patterns("engine.blocks", engine.blocks, graph.blocks, "block")
    fields = {name: fitting(name, engine.blocks) for name in graph.blocks}
    return {n: NOTHING if p is None else engine.blocks[p] for n, p in fields.items()}


def device_of(block_setting: BlockEngineSettings, engine: EngineSettings) -> str:
    """Return the device on which a block computes."""
    return engine.device if block_setting.device is None else block_setting.device
