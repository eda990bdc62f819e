"""The validation part of each source, against the training part that it is taken from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from fashion_files import write_fashion

from hamdist.config import Source, StreamSettings
from hamdist.errors import SettingsError
from hamdist.streams import held_out, make_stream
from hamdist.streams.sources.datasets import validation_rows, validation_split


def settings(source: str, evaluate: str, **more: object) -> StreamSettings:
    raw = {"source": source, "batch": 1, "evaluate": evaluate, **more}
    return StreamSettings.model_validate(raw)


def rows(own: StreamSettings, many: int) -> list[tuple[float, ...]]:
    """One epoch of the stream, each row as numbers."""
    stream = make_stream(own, seed=0, dtype=torch.float64)
    return [tuple(s.u[0].flatten().tolist()) for s in islice(stream.samples(), many)]


def held(own: StreamSettings, seed: int = 3) -> list[tuple[float, ...]]:
    part = held_out(own, seed=seed, dtype=torch.float64, samples=1)
    assert part is not None
    return [tuple(row.flatten().tolist()) for row in part[0]]


def test_every_sixth_row_from_the_third_on() -> None:
    chosen = validation_rows(15).nonzero().squeeze(1).tolist()
    assert chosen == [2, 8, 14]
    assert validation_split(list("abcdefghi")) == (list("abdefgh"), ["c", "i"])


@pytest.mark.parametrize("source", ["digits", "fashion-mnist"])
def test_the_parts_make_up_the_training_part(source: str, tmp_path: Path) -> None:
    more: dict[str, object] = {}
    if source == "fashion-mnist":
        write_fashion(tmp_path, train=25, held=7)
        more = {"path": tmp_path}
    whole, test = (settings(source, part, **more) for part in ("test", "test"))
    many = 25 if more else 1438
    training = rows(whole, many)
    own = settings(source, "validation", **more)
    validation = held(own)
    learned = rows(own, many - len(validation))
    assert len(validation) == -(-(many - 2) // 6)
    assert sorted(learned + validation) == sorted(training)
    assert not set(learned) & set(validation) or more == {}  # digits have some images twice
    assert len(held(test)) == (7 if more else 359)


def test_texts() -> None:
    own = {"sequences": {"count": 60, "length": 8}}
    training = rows(settings("sequences", "test", **own), 60)
    validation = settings("sequences", "validation", **own)
    # the texts of a run depend on its seed, so that `held` must have that of `rows`
    assert sorted(rows(validation, 50) + held(validation, seed=0)) == sorted(training)


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("signal", {}, "signal has no validation part"),
        ("sequences", {"sequences": {"view": "tokens"}}, "token by token has no validation"),
    ],
)
def test_sources_without_one(source: str, more: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_stream(settings(source, "validation", **more), seed=0, dtype=torch.float32)


def test_a_drifting_stream_differs_by_seed() -> None:
    assert held(settings(Source.DRIFT.value, "validation")) == held(
        settings(Source.DRIFT.value, "test")
    )
