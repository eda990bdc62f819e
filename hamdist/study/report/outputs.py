"""Scores of a model of several outputs, output by output, in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hamdist.study.run.run import Run


def outputs_fact(run: Run) -> str:
    """Return a line for every output; empty for a model with one."""
    if len(run.prequential) < 2:
        return ""
    lines = []
    for name, whole in run.prequential.items():
        line = f"{name}: prequential {_words(whole.mean_loss, whole.accuracy)}"
        if run.held_out is not None and name in run.held_out.outputs:
            scores = run.held_out.outputs[name]
            line += f", held-out {_words(scores.loss, scores.accuracy)}"
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
        right = [one.accuracy for one in of_output if one.accuracy is not None]
        loss = statistics.fmean(one.loss for one in of_output)
        parts.append(f"{name} {_words(loss, statistics.fmean(right) if right else None)}")
    return [f"held-out by output: {'; '.join(parts)} (the table has {scored[0].main!r})"]


def _words(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4g}" + ("" if accuracy is None else f" ({100 * accuracy:.1f} %)")
