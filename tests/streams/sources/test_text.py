"""Tokens, vocabularies, made-up and real texts, vectors of words: against hand-written tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from hamdist.errors import SettingsError, StreamError
from hamdist.streams import Vocabulary, load_glove, token_sequences
from hamdist.streams.sources.text_files import read_texts, tokenise
from hamdist.streams.sources.texts import (
    _BAD,
    _GOOD,
    _NEGATIONS,
    corpus,
    grammar_words,
    padded,
    sentences,
)


def test_tokenise() -> None:
    text = "It's  GREAT,<br />isn't it?! Über-film 7/10 ..."
    expected = ["it's", "great", ",", "isn't", "it", "?", "!", "über", "film", "7", "10"]
    assert tokenise(text) == [*expected, ".", ".", "."]


class TestVocabulary:
    def test_numbers(self) -> None:
        words = Vocabulary(["b", "a"])
        assert len(words) == 4
        assert words.encode(["a", "b", "zebra", "a"]).tolist() == [3, 2, 1, 3]
        assert words.encode(["a"]).dtype == torch.int64

    def test_most_frequent_first(self) -> None:
        texts = [["c", "a", "b"], ["b", "c"], ["d"]]
        assert Vocabulary.of(texts).words == ("<pad>", "<unk>", "b", "c", "a", "d")
        assert Vocabulary.of(texts, most=3).words == ("<pad>", "<unk>", "b", "c", "a")


def test_padded() -> None:
    rows = [torch.tensor([5, 6]), torch.tensor([1, 2, 3, 4]), torch.tensor([7, 8, 9])]
    assert padded(rows, 3).tolist() == [[0, 5, 6], [2, 3, 4], [7, 8, 9]]


class TestSentences:
    def test_the_class_follows_from_word_and_negation(self) -> None:
        seen = set()
        for text, label in sentences(400, 1):
            tokens = text.split()
            (at,) = [i for i, token in enumerate(tokens) if token in _GOOD + _BAD]
            negated = any(token in _NEGATIONS for token in tokens[at - 2 : at])
            good = tokens[at] in _GOOD
            assert label == (good != negated), text
            seen.add((good, negated))
        assert len(seen) == 4

    def test_negations_elsewhere_say_nothing(self) -> None:
        # plain statements are negated, too: a bag of words does not know
        loose = 0
        for text, _ in sentences(400, 1):
            tokens = text.split()
            (at,) = [i for i, token in enumerate(tokens) if token in _GOOD + _BAD]
            loose += any(t in _NEGATIONS for t in tokens[: max(0, at - 2)] + tokens[at:])
        assert 40 < loose < 160

    def test_classes_are_balanced_in_pairs_and_not_in_a_row(self) -> None:
        labels = [label for _, label in sentences(200, 0)]
        pairs = list(zip(labels[::2], labels[1::2], strict=True))
        assert all(a + b == 1 for a, b in pairs)
        assert 20 < sum(a for a, _ in pairs) < 80

    def test_sentence_n_depends_on_seed_part_and_n_alone(self) -> None:
        assert sentences(30, 5)[:10] == sentences(10, 5)
        assert sentences(10, 5) != sentences(10, 6)
        held_out = {text for text, _ in sentences(200, 5, part="held-out")}
        assert not held_out & {text for text, _ in sentences(200, 5)}

    def test_words(self) -> None:
        words = grammar_words()
        used = {token for text, _ in sentences(3000, 2) for token in text.split()}
        assert used == set(words)
        assert 180 <= len(words) <= 220
        lengths = [len(text.split()) for text, _ in sentences(3000, 2)]
        assert min(lengths) >= 5
        assert max(lengths) <= 36
        assert len(set(lengths)) > 15
        text = sentences(1, 0)[0][0]
        assert tokenise(text) == text.split()

    def test_refused(self) -> None:
        with pytest.raises(SettingsError, match="count is 0"):
            sentences(0, 0)


class TestTokenSequences:
    def test_made_up(self) -> None:
        ids, labels, size = token_sequences(100, 12, 3)
        assert (ids.shape, ids.dtype, labels.shape, labels.dtype) == (
            (100, 12),
            torch.int64,
            (100,),
            torch.int64,
        )
        assert int(labels.sum()) == 50
        words = Vocabulary(grammar_words())
        assert size == len(words)
        for row, label, (text, expected) in zip(ids, labels, sentences(100, 3), strict=True):
            tokens = text.split()[-12:]
            assert row.tolist() == [0] * (12 - len(tokens)) + words.encode(tokens).tolist()
            assert label == expected

    def test_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "texts.tsv").write_text(
            "pos\tgood good day\n1\tgood\n\n0\tbad day\nneg\ta very bad day indeed\n"
        )
        ids, labels, size = token_sequences(4, 3, 0, tmp_path / "texts.tsv")
        # good 3, bad 2, day 3 times, the others once
        words = Vocabulary(["day", "good", "bad", "a", "indeed", "very"])
        assert size == len(words)
        rows = {
            (tuple(row), label) for row, label in zip(ids.tolist(), labels.tolist(), strict=True)
        }
        assert rows == {
            (tuple(words.encode(["good", "good", "day"]).tolist()), 1),
            ((0, 0, *words.encode(["good"]).tolist()), 1),
            ((0, *words.encode(["bad", "day"]).tolist()), 0),
            (tuple(words.encode(["bad", "day", "indeed"]).tolist()), 0),
        }

    def test_refused(self) -> None:
        with pytest.raises(SettingsError, match="length is 0"):
            token_sequences(10, 0, 0)


def folder(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


class TestFiles:
    def test_a_folder_of_two_classes(self, tmp_path: Path) -> None:
        files = {f"{c}/{i}.txt": f"{c} {i}" for c in ("pos", "neg") for i in range(8)}
        texts = read_texts(folder(tmp_path, {**files, "pos/notes.md": "no"}), None, 0)
        # of 0 ... 7 every fifth from the third on is held out: 2 and 7
        held_out = sorted((" ".join(tokens), label) for tokens, label in texts.held_out)
        assert held_out == [("neg 2", 0), ("neg 7", 0), ("pos 2", 1), ("pos 7", 1)]
        train = sorted((" ".join(tokens), label) for tokens, label in texts.train)
        assert train == [
            (f"{c} {i}", int(c == "pos")) for c in ("neg", "pos") for i in (0, 1, 3, 4, 5, 6)
        ]

    def test_imdb_as_it_is_unpacked(self, tmp_path: Path) -> None:
        files = {
            f"{part}/{c}/{i}_8.txt": f"{part} {c} {i}"
            for part in ("train", "test")
            for c in ("pos", "neg")
            for i in range(6)
        }
        root = folder(tmp_path, {**files, "train/unsup/0.txt": "x", "imdb.vocab": "x"})
        texts = read_texts(root, 5, 1)
        assert {tokens[0] for tokens, _ in texts.train} == {"train"}
        assert sorted(label for _, label in texts.train) == [0, 0, 0, 1, 1]
        assert all(tokens[1] == ("neg", "pos")[label] for tokens, label in texts.train)
        assert sorted(tokens[2] for tokens, _ in texts.held_out) == [str(i // 2) for i in range(12)]
        assert {tokens[0] for tokens, _ in texts.held_out} == {"test"}
        other = read_texts(root, 5, 2)
        assert other.train != texts.train
        assert other.held_out == texts.held_out

    def test_the_vocabulary_is_that_of_the_training_part(self, tmp_path: Path) -> None:
        files = {f"train/{c}/0.txt": f"{c} word word" for c in ("pos", "neg")}
        files |= {f"test/{c}/0.txt": "other" for c in ("pos", "neg")}
        _, words = corpus(2, 0, folder(tmp_path, files), most=2)
        assert words.words == ("<pad>", "<unk>", "word", "neg")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("good day\n", "line 1: 'good day' is no label<TAB>text"),
            ("1\tyes\n2\tperhaps\n", r"line 2: '2\\tperhaps' is no label"),
            ("1\t  \n", "line 1"),
            ("1\tyes\n1\tyes\n", "class 'neg' has 0 texts to train on"),
        ],
    )
    def test_lines_that_are_none(self, tmp_path: Path, content: str, words: str) -> None:
        (tmp_path / "t.tsv").write_text(content)
        with pytest.raises(StreamError, match=words):
            read_texts(tmp_path / "t.tsv", None, 0)

    def test_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StreamError, match=r"no texts in .*missing: give a folder with pos"):
            read_texts(tmp_path / "missing", 2, 0)
        root = folder(tmp_path, {"pos/0.txt": "fine", "neg/0.txt": "bad"})
        with pytest.raises(StreamError, match=r"class 'neg' has 1 texts to train on, 2 are needed"):
            read_texts(root, 3, 0)
        with pytest.raises(SettingsError, match="count is 0"):
            read_texts(root, 0, 0)
        (root / "pos/0.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(StreamError, match=r"0\.txt: cannot be read as UTF-8"):
            read_texts(root, 2, 0)
        (root / "pos/0.txt").write_text("<br />")
        with pytest.raises(StreamError, match=r"0\.txt: holds no word"):
            read_texts(root, 2, 0)


class TestGlove:
    WORDS = Vocabulary(["film", "is", ". . .", "unheard"])

    def write(self, path: Path, text: str) -> Path:
        (path / "glove.txt").write_text(text)
        return path / "glove.txt"

    def test_table(self, tmp_path: Path) -> None:
        file = self.write(
            tmp_path, "the 9 9 9\nis 1 -2 3.5\nfilm 0 0.5 1e-1\n. . . 2 2 2\nlast -1 -1 -1 \n"
        )
        vectors = load_glove(file, self.WORDS, seed=0, dtype=torch.float64)
        assert vectors.shape == (6, 3)
        found = [[0.0, 0.5, 0.1], [1.0, -2.0, 3.5], [2.0, 2.0, 2.0]]
        assert vectors[2:5].tolist() == found
        assert vectors[0].tolist() == [0.0, 0.0, 0.0]
        assert torch.equal(vectors, load_glove(file, self.WORDS, seed=0, dtype=torch.float64))
        other = load_glove(file, self.WORDS, seed=1, dtype=torch.float64)
        assert torch.equal(vectors[2:5], other[2:5])
        assert not torch.equal(vectors[5], other[5])
        assert load_glove(file, self.WORDS, seed=0).dtype == torch.float32

    def test_words_that_are_not_there_are_spread_like_those_that_are(self, tmp_path: Path) -> None:
        many = Vocabulary(["film", "is", *map(str, range(2000))])
        file = self.write(tmp_path, "film 0 4 0 4\nis 4 0 4 0\n")
        drawn = load_glove(file, many, seed=0)[4:]
        assert drawn.std().item() == pytest.approx(2.0, rel=0.03)
        assert drawn.mean().item() == pytest.approx(0.0, abs=0.05)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("film 1 2 3\nis 1 2\n", "line 2: 2 numbers after 'is', expected 3"),
            ("400000 50\nfilm 1 2 3\n", "line 1: 1 numbers after '400000'"),
            ("film 1 two 3\n", "line 1: '1 two 3' are no finite numbers"),
            ("film 1 nan 3\n", "line 1: .* no finite numbers"),
            ("day 1 2 3\n", "a vector for none of the 6 words"),
            ("", "a vector for none"),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, words: str) -> None:
        with pytest.raises(StreamError, match=words):
            load_glove(self.write(tmp_path, text), self.WORDS, seed=0)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(StreamError, match="cannot be read"):
            load_glove(tmp_path / "none.txt", self.WORDS, seed=0)
