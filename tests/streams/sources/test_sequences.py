"""Texts as streams of tokens and of whole sequences."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hamdist.config import StreamSettings
from hamdist.errors import StreamError
from hamdist.streams import (
    Stream,
    TokenStream,
    held_out,
    held_out_tokens,
    make_stream,
    token_sequences,
)
from hamdist.streams.sources.texts import Vocabulary, grammar_words, sentences

SEQUENCES = [torch.tensor(ids) for ids in ([3, 4], [5], [6, 7, 8], [9, 2])]
LABELS = torch.tensor([1, 0, 0, 1])


def tokens(batch: int = 1, **options: Any) -> TokenStream:
    return TokenStream(SEQUENCES, LABELS, batch, 0, endless=False, **options)


def table(stream: Stream) -> list[tuple[list[int], list[int] | None, bool]]:
    return [(s.u.tolist(), None if s.y is None else s.y.tolist(), s.end) for s in stream.samples()]


class TestTokenStream:
    def test_one_after_the_other(self) -> None:
        assert table(tokens(shuffled=False)) == [
            ([3], None, False),
            ([4], [1], True),
            ([5], [0], True),
            ([6], None, False),
            ([7], None, False),
            ([8], [0], True),
            ([9], None, False),
            ([2], [1], True),
        ]

    def test_targets_at_every_token(self) -> None:
        targets = [y for _, y, _ in table(tokens(shuffled=False, every=True))]
        assert targets == [[1], [1], [0], [0], [0], [0], [1], [1]]

    def test_side_by_side(self) -> None:
        assert table(tokens(2, shuffled=False)) == [
            ([3, 0], None, False),
            ([4, 5], [1, 0], True),
            ([6, 0], None, False),
            ([7, 9], None, False),
            ([8, 2], [0, 1], True),
        ]

    def test_each_epoch_in_an_order_of_its_own(self) -> None:
        stream = TokenStream(SEQUENCES, LABELS, 1, 7)
        items = list(islice(stream.samples(), 80))
        epochs = [items[i : i + 8] for i in range(0, 80, 8)]
        orders = set()
        for epoch in epochs:
            found, sequence = [], []
            for item in epoch:
                sequence.append(int(item.u))
                if item.end:
                    found.append((tuple(sequence), int(item.y)))
                    sequence = []
            assert sorted(found) == [((3, 4), 1), ((5,), 0), ((6, 7, 8), 0), ((9, 2), 1)]
            orders.add(tuple(found))
        assert len(orders) > 3

    def test_spec(self) -> None:
        spec = tokens(2).spec
        assert (spec.u_shape, spec.u_dtype) == ((2,), torch.int64)
        assert (spec.y_shape, spec.y_dtype, spec.classes) == ((2,), torch.int64, 2)

    @pytest.mark.parametrize(
        "wrong", [torch.tensor([[1]]), torch.tensor([1.0]), torch.empty(0, dtype=torch.int64)]
    )
    def test_refused(self, wrong: torch.Tensor) -> None:
        with pytest.raises(StreamError, match="sequence 1 has shape"):
            TokenStream([SEQUENCES[0], wrong], LABELS[:2], 1, 0)


def settings(**fields: Any) -> StreamSettings:
    return StreamSettings.model_validate({"source": "sequences", **fields})


class TestSettings:
    def test_whole_sequences(self) -> None:
        own = settings(batch=4, sequences={"count": 12, "length": 9})
        stream = make_stream(own, seed=3, dtype=torch.float32)
        assert stream.portable
        assert (stream.spec.u_shape, stream.spec.u_dtype) == ((4, 9), torch.int64)
        assert stream.spec.classes == 2
        ids, labels, words = token_sequences(12, 9, 3)
        assert stream.spec.tokens == words
        rows = [
            (tuple(row), label)
            for item in islice(stream.samples(), 3)
            for row, label in zip(item.u.tolist(), item.y.tolist(), strict=True)
        ]
        expected = zip(ids.tolist(), labels.tolist(), strict=True)
        assert sorted(rows) == sorted((tuple(row), label) for row, label in expected)

    def test_token_by_token(self) -> None:
        own = settings(sequences={"count": 6, "length": 9, "view": "tokens"})
        assert own.batch == 1
        stream = make_stream(own, seed=3, dtype=torch.float32)
        assert stream.spec.u_shape == (1,)
        words = Vocabulary(grammar_words())
        expected = {
            (tuple(words.encode(text.split()[-9:]).tolist()), label)
            for text, label in sentences(6, 3)
        }
        found, sequence = set(), []
        for item in stream.samples():
            sequence.append(int(item.u))
            if item.end:
                found.add((tuple(sequence), int(item.y)))
                sequence = []
            else:
                assert item.y is None
            if len(found) == 6:
                break
        assert found == expected

    def test_every_token(self) -> None:
        own = settings(sequences={"view": "tokens", "targets": "every"})
        stream = make_stream(own, seed=0, dtype=torch.float32)
        assert all(item.y is not None for item in islice(stream.samples(), 40))

    def test_held_out(self) -> None:
        own = settings(batch=2, sequences={"length": 9})
        x, y = held_out(own, seed=1, dtype=torch.float32, samples=5)
        assert (x.shape, x.dtype, y.shape) == ((200, 9), torch.int64, (200,))
        assert int(y.sum()) == 100
        again = held_out(own, seed=2, dtype=torch.float32, samples=5)
        assert torch.equal(x, again[0])

    def test_held_out_tokens(self) -> None:
        own = settings(sequences={"length": 9, "view": "tokens"})
        assert held_out(own, seed=1, dtype=torch.float32, samples=5) is None
        items = list(held_out_tokens(own, seed=1).samples())
        x, y = held_out(settings(sequences={"length": 9}), seed=1, dtype=torch.float32, samples=5)
        assert [int(item.u) for item in items] == x[x > 0].tolist()
        assert [int(item.y) for item in items if item.end] == y.tolist()

    def test_a_signal_has_no_held_out_part(self) -> None:
        own = StreamSettings.model_validate({"source": "signal"})
        assert held_out(own, seed=0, dtype=torch.float32, samples=5) is None

    def test_real_texts(self, tmp_path: Path) -> None:
        lines = [f"{i % 2}\tword{i} end" for i in range(4)]
        (tmp_path / "t.tsv").write_text("\n".join(lines))
        own = settings(batch=4, path=tmp_path / "t.tsv", sequences={"length": 3, "vocabulary": 1})
        item = next(make_stream(own, seed=0, dtype=torch.float32).samples())
        assert item.u.tolist() == [[0, 1, 2]] * 4  # only 'end' is in the vocabulary
        assert held_out(own, seed=0, dtype=torch.float32, samples=5) is None  # too few of them
