"""A live run to which random things are said, and from which actors are taken."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import psutil

from hamdist.runtime.live.run import LiveRun

# What is said, and how often, of a thousand times; a label comes for a random sample that waits.
SAID = {
    "feed": 500,
    "feed without a label": 230,
    "teach": 210,
    "predict": 30,
    "set": 14,
    "pause": 10,
    "settle": 3,
    "weights": 2,
    "snapshot": 1,
}
MOST_WAITING = 500  # samples without a label; others never get one


def talk(
    run: LiveRun,
    samples: Iterable[tuple[Any, Any]],
    seed: int = 3,
    *,
    before: Callable[[int], object] = lambda _: None,
    said: dict[str, int] = SAID,
    sequences: bool = False,
    most: int = MOST_WAITING,
) -> dict[str, int]:
    """Say something for each of `samples`, chosen by `seed`; return how often what was said.

    before: called with the number of each in front of it. sequences: samples are tokens, of which
    every fifth ends a sequence; one looks at the run behind an end, and labels come at once. most:
    samples that wait for a label.
    """
    drawn, counts = random.Random(seed), dict.fromkeys(said, 0)
    waiting: list[tuple[int, Any]] = []
    for k, (u, y) in enumerate(samples):
        before(k)
        (what,) = drawn.choices(list(said), list(said.values()))
        counts[what] += 1
        looks = what in ("settle", "weights", "snapshot")
        end = sequences and (looks or drawn.random() < 0.2)
        if what == "feed without a label":
            waiting = [*waiting[1 - most :], (run.feed(u, end=end), y)]
        elif what == "predict":
            waiting = [*waiting[1 - most :], (run.predict(u, end=end).number, y)]
        elif what == "teach" and waiting and not sequences:
            run.teach(*waiting.pop(drawn.randrange(len(waiting))))
        elif what == "set":
            run.set(learning={"lr": drawn.choice([0.005, 0.01, 0.02])})
        elif what == "pause":
            run.settle()  # (in a pause there is room for 64 entries)
            run.pause()
            run.feed(u, y, end=end)
            run.go_on()
        else:
            run.feed(u, y, end=end)
        if looks:
            getattr(run, what)()
    return counts


def kill_an_actor(chosen: int = 0) -> None:
    """Kill (SIGKILL) an actor of this process's Ray, by its number modulo theirs."""
    own = psutil.Process().children(recursive=True)
    actors = [p for p in own if "ray::WorkerActor" in " ".join(p.cmdline())]
    os.kill(actors[chosen % len(actors)].pid, 9)
