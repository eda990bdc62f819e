"""Generates sentences of two classes, decided by few words and reversed by a negation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hamdist.errors import SettingsError
from hamdist.streams.sample import generator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SUBJECTS = (
    *("the film", "the movie", "the plot", "the story", "the cast", "the music", "the ending"),
    *("the dialogue", "the director", "the camera", "the script", "the acting", "the picture"),
    *("the hero", "the villain", "the scene", "the show", "the book", "the song", "the play"),
    *("this film", "this movie", "this story", "every scene", "each act", "his role", "her role"),
    *("its first half", "its second half", "the rest"),
)
_VERBS = _words("is was seems felt looks remains became sounds appears stays")
_GOOD = _words(
    "good great fine superb lovely brilliant moving clever warm funny charming honest bright "
    "elegant gripping fresh tender rich vivid splendid"
)
_BAD = _words(
    "bad poor awful dull boring clumsy cold silly tedious dreadful weak stale bleak empty crude "
    "noisy shallow dreary messy tired"
)
_PLAIN = _words(
    "long short old new quiet loud simple modern french german colourful early late dark slow fast "
    "young small large local"
)
_NEGATIONS = _words("not never hardly")
_DEGREES = _words("very quite rather really so too truly almost always often")
_FRONTS = (
    *("in the end", "to be fair", "as far as i can see", "on the whole", "for once"),
    *("after an hour", "this time", "in my view", "at first sight", "all in all", "last night"),
)
_TAILS = (
    *("with friends around us", "when the lights went out", "for people of any age"),
    *("at the theatre", "in that small town", "during the war", "before the winter"),
    *("on a rainy sunday evening", "under the summer sky", "near the river", "between two wars"),
    *("with my brother and his wife", "from start to finish", "over the years"),
)
_JOINTS = (",", ", and", ", while", "; then", "and", "because")
_STOP = "."


def grammar_words() -> list[str]:
    """Return every word that `sentences` can use, in alphabetical order."""
    groups = [
        _SUBJECTS,
        _VERBS,
        _NEGATIONS,
        _DEGREES,
        _GOOD,
        _BAD,
        _PLAIN,
        _FRONTS,
        _TAILS,
        _JOINTS,
    ]
    tokens = {token for group in groups for text in group for token in text.split()}
    return sorted({*tokens, _STOP})


def sentences(count: int, seed: int, *, part: str = "train") -> list[tuple[str, int]]:
    """Generate `count` sentences with their classes: 0 for a bad statement, 1 for a good one.

    Tokens are parted by spaces. A sentence makes one or two statements about a subject. One
    carries the class, by a good or a bad word, which a negation before it turns into its opposite;
    the other one uses a plain word, negated or not. So neither the class-bearing word nor the
    negation alone decides, and the deciding words stand anywhere. Lengths differ (5 to 36 tokens,
    13 on average). Classes are balanced: of samples 2n and 2n + 1 one is good.

    Sentence n depends on (seed, part, n) alone. Raises SettingsError for `count` below 1.
    """
    if count < 1:
        raise SettingsError(f"count is {count}; there is at least 1 sentence")
    pairs = []
    for n in range(count):
        flip = _Dice("text classes", seed, part, n // 2).below(2)
        label = (n % 2) ^ flip
        pairs.append((_sentence(label, _Dice("text", seed, part, n)), label))
    return pairs


class _Dice:
    """Random choices that depend on (purpose, seed, part, number) alone."""

    def __init__(self, purpose: str, seed: int, part: str, number: int) -> None:
        self._random = generator(f"{purpose} {part}", seed, number)

    def below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._random))

    def pick(self, words: Sequence[str]) -> str:
        return words[self.below(len(words))]

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self._random, dtype=torch.float64)) < share


def _sentence(label: int, dice: _Dice) -> str:
    statements = 1 + dice.below(2)
    telling = dice.below(statements)
    words = [dice.pick(_FRONTS), ","] if dice.chance(0.4) else []
    for i in range(statements):
        if i:
            words.append(dice.pick(_JOINTS))
        negated = dice.chance(0.4)
        words += [dice.pick(_SUBJECTS), dice.pick(_VERBS)]
        if negated:
            words.append(dice.pick(_NEGATIONS))
        if dice.chance(0.5):
            words.append(dice.pick(_DEGREES))
        if i == telling:
            words.append(dice.pick(_GOOD if label ^ negated else _BAD))
        else:
            words.append(dice.pick(_PLAIN))
        if dice.chance(0.3):
            words.append(dice.pick(_TAILS))
    return " ".join([*words, _STOP])
