"""Where the time of a tick goes.

arithmetic          the block steps by hand, of the busiest actor's share (arithmetic.py)
autograd or Python  the rest of the block step
pack/unpack         signals to bytes and back
waiting             for a signal, or for room to send one
rest                schedule, stream, metrics, the loop itself
"""

from __future__ import annotations

from collections.abc import Mapping

ARITHMETIC, PYTHON, PACKING = "arithmetic", "autograd or Python", "pack/unpack"
WAITING, REST, ELSE = "waiting", "rest", "everything else"


def parts(
    tick: float, arithmetic: float | None, time_use: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Seconds of a tick by part. time_use: seconds a tick by process (RunResult.time_use), of
    which the one with the longest step is looked at. arithmetic: None where it was not measured;
    it then stands in the step."""
    busiest = max(time_use.values(), key=lambda p: p.get("step", 0.0), default=None)
    if busiest is None or not busiest.get("step"):
        if arithmetic is None:
            return {ELSE: tick}
        return {ARITHMETIC: arithmetic, ELSE: tick - arithmetic}
    step, packing = busiest["step"], busiest.get("packing", 0.0)
    waiting = busiest.get("waiting", 0.0)
    found = {} if arithmetic is None else {ARITHMETIC: arithmetic}
    found["step" if arithmetic is None else PYTHON] = step - (arithmetic or 0.0)
    found |= {PACKING: packing, WAITING: waiting}
    found[REST] = busiest.get("total", tick) - step - packing - waiting
    return found


def sentence(tick: float, found: Mapping[str, float]) -> str:
    """`tick 660 µs: arithmetic 420, waiting 60, ...`, the longest part first."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return f"tick {tick * 1e6:,.0f} µs: " + ", ".join(f"{n} {s * 1e6:,.0f}" for n, s in ordered)
