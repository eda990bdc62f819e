"""What happens to a run, where and when: chosen by a seed, in forward passes instead of seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

KILL, HANG, DRIVER = "kill", "hang", "driver"
RAYLET, HOST, LINK = "raylet", "host", "link"
ALONE = (KILL, KILL, HANG, KILL, KILL, DRIVER, KILL)  # what takes turns, before it is shuffled
HOSTS = (KILL, LINK, RAYLET, KILL, HANG, HOST, DRIVER, KILL)
BLOCKS = 5
LATEST_SECONDS = 0.02  # behind the pass: anywhere in what a process does in a few ticks


@dataclass(frozen=True)
class Event:
    """number: its place in the run. passes: forward passes of `block` before it; seconds: until it
    happens then, or for a link how long it stays cut. host: of a raylet, a host, a link."""

    number: int
    what: str
    block: int
    passes: int
    seconds: float
    host: int = 0

    def plain(self) -> dict[str, object]:
        return asdict(self)


def chosen(kills: int, seed: int, passes: int, hosts: Sequence[int] = ()) -> list[Event]:
    """`kills` events among the first `passes` forward passes, evenly spread but for a random part.
    hosts: those that may lose their raylet, their cable or everything; without any, no such events.
    """
    choice = random.Random(seed)
    turns = HOSTS if hosts else ALONE
    kinds = [turns[i % len(turns)] for i in range(kills)]
    choice.shuffle(kinds)
    step = passes / (kills + 1)
    events = []
    for i, what in enumerate(kinds):
        at = int((i + 0.5 + choice.random()) * step)
        seconds = choice.uniform(1, 5) if what == LINK else choice.uniform(0, LATEST_SECONDS)
        host = choice.choice(hosts) if what in (RAYLET, HOST, LINK) else 0
        events.append(Event(i, what, choice.randrange(BLOCKS), max(2, at), seconds, host))
    return events
