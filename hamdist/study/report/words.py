"""Compression of signals, and scores output by output, in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hamdist.runtime.signals.codec import Compressed
from hamdist.study.run.run import Run

KIB = 2**10
EDGES_SHOWN = 6

Compression = Mapping[str, Mapping[str, Compressed]]


def compression_fact(compression: Compression) -> str:
    """Return a line for every edge; of many edges their sum, and the largest error."""
    if not compression:
        return ""
    if len(compression) <= EDGES_SHOWN:
        lines = (f"{e} {_compression_words([*ways.values()])}" for e, ways in compression.items())
        return "\n".join(lines)
    worst = max(compression, key=lambda e: max(c.worst for c in compression[e].values()))
    return f"{_compression_words(_all(compression))} ({worst})"


def compression_notes(of_runs: Sequence[Compression]) -> list[str]:
    """Return all edges of several runs in one sentence; none if nothing was compressed."""
    parts = [c for compression in of_runs for c in _all(compression)]
    return [f"signals compressed: {_compression_words(parts)}"] if parts else []


def _all(compression: Compression) -> list[Compressed]:
    return [c for ways in compression.values() for c in ways.values()]


def _compression_words(parts: Sequence[Compressed]) -> str:
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


# -- outputs ---------------------------------------------------------------------------------------


def outputs_fact(run: Run) -> str:
    """Return a line for every output; empty for a model with one."""
    if len(run.prequential) < 2:
        return ""
    lines = []
    for name, whole in run.prequential.items():
        line = f"{name}: prequential {_score_words(whole.mean_loss, whole.accuracy)}"
        if run.held_out is not None and name in run.held_out.outputs:
            scores = run.held_out.outputs[name]
            line += f", held-out {_score_words(scores.loss, scores.accuracy)}"
        lines.append(line)
    return "\n".join(lines)


def outputs_notes(group: Sequence[Run]) -> list[str]:
    """Return the held-out scores of every output, as means over the runs."""
    scored = [run.held_out for run in group if run.held_out is not None and run.held_out.outputs]
    if not scored:
        return []
    parts = []
    for name in scored[0].outputs:
        of_output = [scores.outputs[name] for scores in scored]
        right = [score.accuracy for score in of_output if score.accuracy is not None]
        loss = statistics.fmean(score.loss for score in of_output)
        parts.append(f"{name} {_score_words(loss, statistics.fmean(right) if right else None)}")
    return [f"held-out by output: {'; '.join(parts)} (the table has {scored[0].main!r})"]


def _score_words(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4g}" + ("" if accuracy is None else f" ({100 * accuracy:.1f} %)")
