"""Requirements of blocks: resources and device (`engine.blocks`, `engine.device`).

A block's requirements of its host (a host, processors, a share of a GPU, custom resources) are
requested for its actor; blocks of one actor must not contradict each other. Device, type and
autocast are the block's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from hamdist.config import BlockEngineSettings, EngineSettings
from hamdist.errors import SettingsError
from hamdist.runtime.plan.dtypes import device_of


@dataclass(frozen=True)
class ActorRequirements:
    """Resource requirements of one actor.

    Attributes:
        host: name of a host; None: any.
        gpus: None: no GPU; 0: whatever share is left, of a block on 'cuda'.
        blocks: its blocks, for errors.
    """

    host: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Return True if the requirements exclude no host."""
        return self.host is None and self.cpus == 1 and self.gpus is None and not self.resources


def contradiction(a: BlockEngineSettings, b: BlockEngineSettings) -> str | None:
    """Return the setting in which two blocks of one actor contradict, with both values."""
    for name in ("host", "cpus", "gpus"):
        first, other = getattr(a, name), getattr(b, name)
        if first is not None and other is not None and first != other:
            return f"{name} {_shown(first)} and {_shown(other)}"
    for name in a.resources.keys() & b.resources.keys():
        if a.resources[name] != b.resources[name]:
            return f"resources.{name} {a.resources[name]:g} and {b.resources[name]:g}"
    return None


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def apart(block_settings: Mapping[str, BlockEngineSettings]) -> tuple[tuple[int, int], ...]:
    """Return the pairs of blocks, by number, that cannot share an actor."""
    alike: dict[int, list[int]] = defaultdict(list)
    settings = list(block_settings.values())
    for i, setting in enumerate(settings):
        alike[id(setting)].append(i)
    pairs = [
        (max(i, j), min(i, j))
        for group, other in combinations(alike.values(), 2)
        if contradiction(settings[group[0]], settings[other[0]]) is not None
        for i, j in product(group, other)
    ]
    return tuple((i, j) for j, i in sorted(pairs))


def requirements(
    blocks: Sequence[str], block_settings: Mapping[str, BlockEngineSettings], engine: EngineSettings
) -> ActorRequirements:
    """Return the requirements of the actor of `blocks`. Raises SettingsError if two contradict."""
    host: str | None = None
    cpus, gpus = 1.0, None
    resources: dict[str, float] = {}
    earlier: dict[int, str] = {}  # the first block with each setting
    for name in blocks:
        block_setting = block_settings[name]
        earlier.setdefault(id(block_setting), name)
        for other in earlier.values():
            clash = contradiction(block_settings[other], block_setting)
            if clash is not None:
                raise SettingsError(
                    f"engine.blocks: {other!r} and {name!r} share an actor, but ask for {clash}; "
                    "give them different actors (engine.placement), or ask for the same"
                )
        host = host if block_setting.host is None else block_setting.host
        cpus = cpus if block_setting.cpus is None else block_setting.cpus
        gpus = gpus if block_setting.gpus is None else block_setting.gpus
        resources |= block_setting.resources
    if gpus is None and any(
        device_of(block_settings[b], engine).startswith("cuda") for b in blocks
    ):
        gpus = 0.0
    return ActorRequirements(host, cpus, gpus, resources, tuple(blocks))


def idle_block_settings(asking: Iterable[BlockEngineSettings]) -> list[str]:
    """Return the settings without effect in a single process, as they were given."""
    settings = list(asking)
    names = ("host", "cpus", "gpus", "resources")
    return [
        n
        for n in names
        if any(getattr(block_setting, n) not in (None, {}) for block_setting in settings)
    ]
