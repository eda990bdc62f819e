"""What blocks ask for: where they live, and how they compute (`engine.blocks`, `engine.device`).

What a block asks of its host (a host, processors, a share of a GPU, custom resources) is asked for
the actor that it lives in; blocks of one actor must not contradict each other. Device, type and
autocast are the block's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hamdist.config import BlockEngineSettings, EngineSettings
from hamdist.errors import SettingsError
from hamdist.runtime.plan.block_settings import device_of


@dataclass(frozen=True)
class Demand:
    """What one actor asks for. gpus: None: no GPU; 0: whatever share is left, of a block on
    'cuda'. blocks: who asks, for errors."""

    host: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether any host does."""
        return self.host is None and self.cpus == 1 and self.gpus is None and not self.resources


def contradiction(a: BlockEngineSettings, b: BlockEngineSettings) -> str | None:
    """The setting for which two blocks of one actor ask different things, with both values."""
    for name in ("host", "cpus", "gpus"):
        one, other = getattr(a, name), getattr(b, name)
        if one is not None and other is not None and one != other:
            return f"{name} {_shown(one)} and {_shown(other)}"
    for name in a.resources.keys() & b.resources.keys():
        if a.resources[name] != b.resources[name]:
            return f"resources.{name} {a.resources[name]:g} and {b.resources[name]:g}"
    return None


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def apart(wishes: Mapping[str, BlockEngineSettings]) -> tuple[tuple[int, int], ...]:
    """The pairs of blocks, by number, that cannot share an actor."""
    own = list(wishes.values())
    return tuple(
        (i, j)
        for j in range(len(own))
        for i in range(j)
        if own[i] is not own[j] and contradiction(own[i], own[j]) is not None
    )


def demand(
    blocks: Sequence[str], wishes: Mapping[str, BlockEngineSettings], engine: EngineSettings
) -> Demand:
    """What the actor of `blocks` asks for. Raises SettingsError where two of them contradict."""
    host: str | None = None
    cpus, gpus = 1.0, None
    resources: dict[str, float] = {}
    for i, name in enumerate(blocks):
        wish = wishes[name]
        for other in blocks[:i]:
            what = contradiction(wishes[other], wish)
            if what is not None:
                raise SettingsError(
                    f"engine.blocks: {other!r} and {name!r} share an actor, but ask for {what}; "
                    "give them different actors (engine.placement), or ask for the same"
                )
        host = host if wish.host is None else wish.host
        cpus = cpus if wish.cpus is None else wish.cpus
        gpus = gpus if wish.gpus is None else wish.gpus
        resources |= wish.resources
    if gpus is None and any(device_of(wishes[b], engine).startswith("cuda") for b in blocks):
        gpus = 0.0
    return Demand(host, cpus, gpus, resources, tuple(blocks))


def idle_wishes(asked: Iterable[BlockEngineSettings]) -> list[str]:
    """The settings that mean nothing in one process, as they were given."""
    given = list(asked)
    names = ("host", "cpus", "gpus", "resources")
    return [n for n in names if any(getattr(wish, n) not in (None, {}) for wish in given)]
