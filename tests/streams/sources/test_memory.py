"""Tasks of memory. Oracle: the answers by hand from what was shown, row by row."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from hamdist.config import IGNORE_INDEX, MemoryTask, Split, StreamSettings
from hamdist.streams import held_out_tokens, make_stream

B = 5


def stream(task, length, **more):
    memory = {"task": task, "length": length, **more}
    raw = {"source": "memory", "batch": B, "memory": memory}
    return StreamSettings.model_validate(raw)


def answers(task, shown, length):
    """By token what one row is asked for, from the features that it saw: (T, features)."""
    tokens = [[i for i, x in enumerate(u) if x] for u in shown]
    if task == "copy":
        return [None] * length + [tokens[t][0] for t in range(length)]
    if task == "evidence":
        right = sum(1 in t for t in tokens)
        return [None] * (len(tokens) - 1) + [int(right > 7 - right)]
    asked, bit = [], None
    for t in tokens:
        bit = t[0] if 2 in t else bit
        asked.append(bit if 3 in t else None)
    return asked


@pytest.mark.parametrize(("task", "T"), [("copy", 12), ("recall", 6), ("evidence", 20)])
def test_answers(task, T):
    made = make_stream(stream(task, 6), seed=3, dtype=torch.float64)
    samples = list(islice(made.samples(), 2 * T))
    assert [s.end for s in samples] == ([False] * (T - 1) + [True]) * 2
    for tokens in (samples[:T], samples[T:]):
        for row in range(B):
            expected = answers(task, [s.u[row].tolist() for s in tokens], 6)
            y = [IGNORE_INDEX if s.y is None else int(s.y[row]) for s in tokens]
            assert y == [IGNORE_INDEX if a is None else a for a in expected]
    assert {tuple(s.u.shape) for s in samples} == {made.spec.u_shape}
    assert made.spec.u_dtype == samples[0].u.dtype == torch.float64
    assert not torch.equal(samples[0].u, samples[T].u)


def test_parts_differ_and_an_endless_one_has_no_ends():
    def first(part, seed=3):
        own = stream("copy", 6).model_copy(update={"evaluate": part})
        held = list(held_out_tokens(own, seed=seed).samples())
        assert len(held) == 4 * 12
        return torch.stack([s.u for s in held])

    assert torch.equal(first(Split.TEST), first(Split.TEST))
    assert not torch.equal(first(Split.TEST), first(Split.VALIDATION))
    endless = make_stream(stream("recall", 4, ends=False), seed=0, dtype=torch.float32)
    assert not any(s.end for s in islice(endless.samples(), 20))
    assert held_out_tokens(StreamSettings(), seed=0) is None
    assert {t.value for t in MemoryTask} == {"copy", "recall", "evidence"}
