"""The stream of characters against hand-written tables."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from hamdist.config import StreamSettings
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import CharacterStream, held_out, make_stream
from hamdist.streams.sources.characters import ALPHABET, CHARACTERS, language_reference


def settings(path: Path | None = None, length: int = 3, **fields: object) -> StreamSettings:
    own = {"source": "characters", "path": path, "characters": {"length": length}, **fields}
    return StreamSettings.model_validate(own)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """20 characters: 18 to learn from and 2 held out."""
    path = tmp_path / "text.txt"
    path.write_text("a \n~é!" + "abcdefghijkl" + "yz", encoding="utf-8")
    return path


def test_numbers() -> None:
    """New line, then ASCII from the blank to the tilde; 0 for all else."""
    assert (ALPHABET[:4], ALPHABET[-1], CHARACTERS) == ('\n !"', "~", 97)


def test_windows(text: Path) -> None:
    stream = make_stream(settings(text, batch=5), seed=0, dtype=torch.float32)
    assert (stream.spec.u_shape, stream.spec.y_shape) == ((5, 3), (5, 3))
    assert (stream.spec.classes, stream.spec.tokens) == (97, 97)
    ids = [67, 2, 1, 96, 0, 3, *range(67, 79)]  # the 18 characters
    allowed = {tuple(ids[i : i + 4]) for i in range(15)}
    seen = set()
    for item in islice(stream.samples(), 60):
        for u, y in zip(item.u.tolist(), item.y.tolist(), strict=True):
            assert u[1:] == y[:-1]
            seen.add((*u, y[-1]))
    assert seen == allowed  # each of 15, in 300 draws


def test_the_seed_decides() -> None:
    ids = torch.arange(90)
    first, same, other = (
        [s.u.tolist() for s in islice(CharacterStream(ids, 4, 2, seed).samples(), 5)]
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_held_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 81 + "abcdefghi")  # 90 characters
    x, y = held_out(settings(path), seed=0, dtype=torch.float32, samples=1)
    assert x.tolist() == [[67, 68, 69], [70, 71, 72]]
    assert y.tolist() == [[68, 69, 70], [71, 72, 73]]


def test_validation(tmp_path: Path) -> None:
    """A sixth of the 24 characters to learn from: u to x; none of them is in a window of those."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    own = settings(path, evaluate="validation", batch=9)
    x, y = held_out(own, seed=0, dtype=torch.float32, samples=1)
    assert (x.tolist(), y.tolist()) == ([[87, 88, 89]], [[88, 89, 90]])
    stream = make_stream(own, seed=0, dtype=torch.float32)
    learned = {n for item in islice(stream.samples(), 30) for n in item.y.flatten().tolist()}
    assert learned == set(range(68, 87))  # b to t


def test_the_language_reference() -> None:
    """Long, in English, and no paragraph of it twice, so that the held-out part is new."""
    text = language_reference()
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(text) > 200_000
    assert "statement" in text
    learned = len(text) - len(text) // 10
    x, y = held_out(settings(length=64), seed=0, dtype=torch.float32, samples=1)
    decoded = "".join(("\0" + ALPHABET)[i] for i in x[0])
    assert decoded[:20] == text[learned : learned + 20].translate(
        {ord(c): "\0" for c in "“”’‘–…—°ß"}
    )
    assert len(x) == (len(text) // 10 - 65) // 64 + 1
    assert torch.equal(x[0, 1:], y[0, :-1])


def test_refused(text: Path, tmp_path: Path) -> None:
    def made(own: StreamSettings) -> None:
        make_stream(own, seed=0, dtype=torch.float32)

    with pytest.raises(StreamError, match=r"18 characters.*no window of 18 .*characters\.length"):
        made(settings(text, length=18))
    with pytest.raises(StreamError, match=r"nowhere.*cannot be read"):
        made(settings(tmp_path / "nowhere"))
    with pytest.raises(StreamError, match=r"2 characters"):
        held_out(settings(text), seed=0, dtype=torch.float32, samples=1)
    with pytest.raises(StreamError, match="cannot fade"):
        made(settings(text, smooth={}))
    with pytest.raises(ValidationError, match="length"):
        settings(length=0)
    with pytest.raises(SettingsError, match="length is 0"):
        CharacterStream(torch.arange(9), 0, 1, 0)
