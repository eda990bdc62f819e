"""Texts of two classes as sequences of tokens: made by a grammar, or read from files.

N: texts, T: tokens of a sequence, V: words of the vocabulary, D: size of a word's vector.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import generator
from hamdist.streams.sources.grammar import grammar_words, sentences
from hamdist.streams.sources.text_files import Texts, read_texts, tokenise

PAD, UNKNOWN = "<pad>", "<unk>"
WORDS = 10_000  # of a vocabulary taken from files, at most
SENTENCES = 100
HELD_OUT_SENTENCES = 200


class Vocabulary:
    """Words and their numbers: 0 stands for padding, 1 for every word that is not here."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words: tuple[str, ...] = (PAD, UNKNOWN, *words)
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]], most: int = WORDS) -> Vocabulary:
        """The `most` most frequent words of tokenised texts, the most frequent first; words that
        are equally frequent in alphabetical order."""
        counts = Counter(token for text in texts for token in text)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[:most])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> Tensor:
        """The numbers of the tokens, (len(tokens),) int64."""
        unknown = self._numbers[UNKNOWN]
        numbers = [self._numbers.get(token, unknown) for token in tokens]
        return torch.tensor(numbers, dtype=torch.int64)


def token_sequences(
    count: int, length: int, seed: int, path: Path | str | None = None
) -> tuple[Tensor, Tensor, int]:
    """`count` texts of two classes, half of each: ids (N, T) int64, labels (N,) int64, and V.

    T = `length`: of a longer text the last T tokens count, a shorter one is padded in front with
    0, so that the last token is always a word. Texts are sentences of the grammar (`sentences`),
    or with `path` the training part of real ones (`read_texts`).

    Raises SettingsError for `count` or `length` below 1, StreamError for files that are not there,
    cannot be read, or hold fewer texts than `count`.
    """
    if length < 1:
        raise SettingsError(f"length is {length}; a sequence has at least 1 token")
    texts, vocabulary = corpus(count, seed, path)
    ids = padded([vocabulary.encode(tokens) for tokens, _ in texts.train], length)
    return ids, classes_of(texts.train), len(vocabulary)


def corpus(
    count: int | None, seed: int, path: Path | str | None = None, most: int = WORDS
) -> tuple[Texts, Vocabulary]:
    """Texts, half of each class, and their vocabulary: of the grammar (all its words), or with
    `path` of real ones (at most `most` words of the training part). The held-out part does not
    depend on the seed.

    count: of the training part; None for all that the path holds, or 100 of the grammar.
    Raises like `token_sequences`.
    """
    if path is not None:
        texts = read_texts(path, count, seed)
        return texts, Vocabulary.of((tokens for tokens, _ in texts.train), most)
    train = sentences(SENTENCES if count is None else count, seed)
    held_out = sentences(HELD_OUT_SENTENCES, 0, part="held-out")
    return Texts(_tokenised(train), _tokenised(held_out)), Vocabulary(grammar_words())


def padded(sequences: Sequence[Tensor], length: int) -> Tensor:
    """(N, length): the last `length` numbers of each sequence, shorter ones with 0 in front."""
    out = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, ids in zip(out, sequences, strict=True):
        kept = ids[-length:]
        row[length - len(kept) :] = kept
    return out


def classes_of(texts: Sequence[tuple[Sequence[str], int]]) -> Tensor:
    """The classes of texts, (N,) int64."""
    return torch.tensor([label for _, label in texts], dtype=torch.int64)


def _tokenised(texts: Iterable[tuple[str, int]]) -> list[tuple[Sequence[str], int]]:
    return [(tokenise(text), label) for text, label in texts]


def load_glove(
    path: Path | str, vocabulary: Vocabulary, *, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """An embedding (V, D) of `dtype`: the vectors that a GloVe file has for the vocabulary's words.

    The file is text, one word and its D numbers a line, parted by spaces (as nlp.stanford.edu
    gives it out; a word may hold spaces). Padding is zeros; words that the file does not have are
    drawn from N(0, s^2), s being the standard deviation of the vectors found. Read line by line:
    the file may be large.

    Raises StreamError where the file cannot be read, a line has fewer than D numbers or a wanted
    one has other things (naming the line), or none of the words is in it.
    """
    place = Path(path).expanduser()
    wanted = {word: number for number, word in enumerate(vocabulary.words)}
    found: dict[int, list[float]] = {}
    size = 0
    try:
        with place.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.rstrip("\n ").split(" ")
                size = size or len(fields) - 1
                if size < 2 or len(fields) <= size:
                    raise StreamError(
                        f"{place}, line {number}: {len(fields) - 1} numbers after "
                        f"{fields[0][:40]!r}, expected {size if size > 1 else 'a vector'}: "
                        "is it a GloVe file?"
                    )
                word = " ".join(fields[:-size])
                if word in wanted:
                    found[wanted[word]] = _numbers(fields[-size:], place, number)
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{place}: cannot be read as UTF-8 text: {error}") from error
    if not found:
        raise StreamError(f"{place}: has a vector for none of the {len(vocabulary)} words")
    vectors = torch.tensor(list(found.values()), dtype=torch.float64)
    spread = float(vectors.std(correction=0))
    shape = (len(vocabulary), size)
    random = generator("glove", seed)
    embedding = spread * torch.randn(shape, generator=random, dtype=torch.float64)
    embedding[list(found)] = vectors
    embedding[0] = 0.0
    return embedding.to(dtype)


def _numbers(values: Sequence[str], path: Path, line: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise StreamError(f"{path}, line {line}: {' '.join(values)[:40]!r} are no finite numbers")
    return numbers
