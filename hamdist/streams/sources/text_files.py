"""Reads real texts of two classes from files and cuts them into tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import generator

CLASSES = ("neg", "pos")  # class 0, class 1
HELD_OUT_SHARE = 5  # one text in five, where there is no test part
HELD_OUT_MOST = 1000

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,!?;:]")
_MARKUP = re.compile(r"<[^>]*>")
_LAYOUT = (
    "a folder with pos/*.txt and neg/*.txt (or train and test folders that hold those), or a text "
    "file with label<TAB>text lines, labels 0 and 1 or neg and pos"
)


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens of each text, and its class (0 or 1), for training and for evaluation."""

    train: Sequence[tuple[Sequence[str], int]]
    held_out: Sequence[tuple[Sequence[str], int]]


def tokenise(text: str) -> list[str]:
    """Return the words (lower case, with apostrophes) and the marks . , ! ? ; : in their order.

    Markup such as <br /> is left out.
    """
    return _TOKEN.findall(_MARKUP.sub(" ", text).lower())


def read_texts(path: Path | str, count: int | None, seed: int) -> Texts:
    """Read real texts of two classes, half of each, tokenised, in an order drawn from the seed.

    Where there is no test part, of each class every fifth text, counted from the third, is held
    out. At most 1,000 texts are held out, the same ones for every seed.

    Args:
        path: a folder with pos/*.txt and neg/*.txt; a folder whose train and test folders hold
            those (IMDb as it is unpacked; test is the held-out part); or a UTF-8 text file with
            label<TAB>text lines, labels 0 and 1 or neg and pos.
        count: number of texts of the training part, None for all.

    Raises:
        StreamError: the path does not exist or cannot be read, a label is another one, or a class
            has too few texts.
        SettingsError: `count` is below 1.
    """
    if count is not None and count < 1:
        raise SettingsError(f"count is {count}; there is at least 1 text")
    place = Path(path).expanduser()
    if place.is_file():
        train, test = _split(_read_lines(place))
    elif all((place / name).is_dir() for name in CLASSES):
        train, test = _split(_files(place))
    elif all((place / "train" / name).is_dir() for name in CLASSES):
        train, test = _files(place / "train"), _files(place / "test")
    else:
        raise StreamError(f"no texts in {place}: give {_LAYOUT}")
    for label, entries in enumerate(train):
        number = 1 if count is None else (count + 1 - label) // 2
        if len(entries) < number:
            raise StreamError(
                f"{place}: class {CLASSES[label]!r} has {len(entries)} texts to train on, "
                f"{number} are needed: lower stream.sequences.count, or add texts"
            )
    return Texts(_chosen(train, count, seed), _chosen(test, HELD_OUT_MOST, 0))


def _tokens(text: str | Path) -> list[str]:
    """Return the tokens of a line, or of a file."""
    if isinstance(text, str):
        return tokenise(text)
    tokens = tokenise(read_text(text))
    if not tokens:
        raise StreamError(f"{text}: holds no word: remove it")
    return tokens


_ByClass = tuple[Sequence[str | Path], Sequence[str | Path]]


def _files(folder: Path) -> _ByClass:
    negative, positive = (sorted((folder / name).glob("*.txt")) for name in CLASSES)
    return negative, positive


def _read_lines(path: Path) -> _ByClass:
    labels = {**{str(i): i for i in range(len(CLASSES))}, **{n: i for i, n in enumerate(CLASSES)}}
    lines: tuple[list[str], list[str]] = ([], [])
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        label, tab, text = line.partition("\t")
        if not tab or label.strip() not in labels or not tokenise(text):
            raise StreamError(
                f"{path}, line {number}: {line[:40]!r} is no label<TAB>text, with a label 0 or 1, "
                "neg or pos, and at least one word"
            )
        lines[labels[label.strip()]].append(text)
    return lines


def _split(entries: _ByClass) -> tuple[_ByClass, _ByClass]:
    """Hold out, for want of a test part, every fifth text of each class, from the third on."""
    train: list[list[str | Path]] = []
    test: list[list[str | Path]] = []
    for texts in entries:
        held_out = set(range(2, len(texts), HELD_OUT_SHARE))
        train.append([text for i, text in enumerate(texts) if i not in held_out])
        test.append([texts[i] for i in sorted(held_out)])
    return (train[0], train[1]), (test[0], test[1])


def _chosen(entries: _ByClass, count: int | None, seed: int) -> list[tuple[Sequence[str], int]]:
    """Return `count` texts, half of each class (or all), mixed in a seeded order."""
    picked: list[tuple[str | Path, int]] = []
    for label, texts in enumerate(entries):
        order = torch.randperm(len(texts), generator=generator("texts", seed, label)).tolist()
        number = len(texts) if count is None else (count + 1 - label) // 2
        picked += [(texts[i], label) for i in order[:number]]
    mixed = torch.randperm(len(picked), generator=generator("text order", seed)).tolist()
    return [(_tokens(picked[i][0]), picked[i][1]) for i in mixed]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raise StreamError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path}: cannot be read as UTF-8 text: {error}") from error
