"""The effect of compression on a run's signals, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hamdist.runtime.signals.codec import Compressed

KIB = 2**10
EDGES_SHOWN = 6

Compression = Mapping[str, Mapping[str, Compressed]]


def compression_fact(compression: Compression) -> str:
    """Return a line for every edge; of many edges their sum, and the largest error."""
    if not compression:
        return ""
    if len(compression) <= EDGES_SHOWN:
        lines = [f"{edge} {_words(list(ways.values()))}" for edge, ways in compression.items()]
        return "\n".join(lines)
    worst = max(compression, key=lambda e: max(c.worst for c in compression[e].values()))
    return f"{_words(_all(compression))} ({worst})"


def compression_notes(of_runs: Sequence[Compression]) -> list[str]:
    """Return all edges of several runs in one sentence; none if nothing was compressed."""
    parts = [c for compression in of_runs for c in _all(compression)]
    return [f"signals compressed: {_words(parts)}"] if parts else []


def _all(compression: Compression) -> list[Compressed]:
    return [c for ways in compression.values() for c in ways.values()]


def _words(parts: Sequence[Compressed]) -> str:
    """Return 'int8: 1,275 KiB, 73 % saved; decoded signals off by 0.56 %, at most 1.2 %'."""
    sent, saved = sum(c.sent for c in parts), sum(c.saved for c in parts)
    names = ", ".join(dict.fromkeys(c.codec for c in parts))
    signals = sum(c.signals for c in parts)
    mean = sum(c.mean * c.signals for c in parts) / signals if signals else 0.0
    worst = max(c.worst for c in parts)
    share = saved / (sent + saved) if sent + saved else 0.0
    return (
        f"{names}: {sent / KIB:,.0f} KiB, {100 * share:.0f} % saved; decoded signals off by "
        f"{100 * mean:.2g} %, at most {100 * worst:.2g} %"
    )
