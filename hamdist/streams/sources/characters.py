"""The characters of a text, window by window: each is predicted from those before it.

N: windows, B: batch, T: characters of a window.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec, generator
from hamdist.streams.sources.datasets import VALIDATION_EVERY
from hamdist.streams.sources.text_files import read_text

# Characters and their numbers; 0 is any other one. They do not depend on the text.
ALPHABET = "\n" + "".join(c for c in map(chr, range(128)) if c in string.printable and c >= " ")
CHARACTERS = 1 + len(ALPHABET)
HELD_OUT_SHARE = 10  # the last tenth of a text

_NUMBERS = {character: number for number, character in enumerate(ALPHABET, start=1)}


class CharacterStream:
    """Windows of a text at random places: u (B, T) int64, and y (B, T), the characters that follow.

    Endless and portable.

    Args:
        ids: the text's characters by number, (length of the text,) int64.
        length: T.

    Raises:
        SettingsError: `length` or `batch` below 1.
        StreamError: the text is too short.
    """

    portable: bool = True

    def __init__(self, ids: Tensor, length: int, batch: int, seed: int) -> None:
        if length < 1 or batch < 1:
            raise SettingsError(f"length is {length} and batch {batch}; both are at least 1")
        self._windows = _windows(ids, length, 1)
        self._batch = batch
        self._seed = seed

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes and types of the samples."""
        shape = (self._batch, self._windows.shape[1] - 1)
        return SampleSpec(
            shape, torch.int64, shape, torch.int64, classes=CHARACTERS, tokens=CHARACTERS
        )

    def samples(self) -> Iterator[Sample]:
        """Yield windows of the text and the characters that follow, endlessly."""
        random = generator("windows", self._seed)
        while True:
            rows = torch.randint(len(self._windows), (self._batch,), generator=random)
            chosen = self._windows[rows]
            yield Sample(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous())


def character_parts(
    path: Path | str | None = None, *, validation: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a text's characters by number: the part to learn from, and its last tenth, held out.

    Raises StreamError where the text cannot be read.

    Args:
        path: a UTF-8 text file; None: `language_reference`.
        validation: hold out the last sixth of the part to learn from instead.
    """
    text = language_reference() if path is None else read_text(Path(path).expanduser())
    ids = torch.tensor([_NUMBERS.get(character, 0) for character in text], dtype=torch.int64)
    first_held_out = len(ids) - len(ids) // HELD_OUT_SHARE
    learned, held_out = ids[:first_held_out], ids[first_held_out:]
    if not validation:
        return learned, held_out
    first = len(learned) - len(learned) // VALIDATION_EVERY
    return learned[:first], learned[first:]


def held_out_windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return x (N, T) and y (N, T), all windows of a text, one after the other."""
    windows = _windows(ids, length, length)
    return windows[:, :-1], windows[:, 1:]


def language_reference() -> str:
    """Return the part of its language reference that Python ships for `help()`.

    It has 373,000 characters in 3.11, and differs a little from one version of Python to the next.
    The topics are in alphabetical order; a paragraph that occurs in several topics is taken once,
    so that none is both learned and held out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise StreamError(
            "this Python came without its language reference (pydoc_data.topics): set stream.path "
            "to a text file"
        ) from error
    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def _windows(ids: Tensor, length: int, step: int) -> Tensor:
    """Return windows (N, T + 1) of a text."""
    if len(ids) <= length:
        raise StreamError(
            f"a text of {len(ids)} characters (of a file, one in {HELD_OUT_SHARE} is held out) has "
            f"no window of {length} and the one that follows: lower stream.characters.length, or "
            "take a longer text"
        )
    return ids.unfold(0, length + 1, step)
