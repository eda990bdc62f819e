"""Oracle: the same stream without delay. Late targets meet their own samples, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from hamdist.config import Late, StreamSettings
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import (
    Checker,
    Delayed,
    Paced,
    Rejoin,
    Sample,
    Smooth,
    Stream,
    Withhold,
    from_iterable,
    make_stream,
    report_of,
)


def y(n: int) -> Tensor:
    return torch.tensor([n])


def sample(n: int, target: object = "own", *, late: Mapping[int, object] | None = None) -> Sample:
    own = y(n) if target == "own" else target
    return Sample(torch.tensor([[float(n)]]), own, n % 3 == 2, 0.5 * n, late)


def listed(samples: Sequence[Sample]) -> Stream:
    return from_iterable(samples, classes=1000)


def numbered(items: int) -> Stream:
    return listed([sample(n) for n in range(items)])


def late(items: int, targets: Mapping[int, Sequence[int]]) -> Stream:
    """Samples without targets of their own; sample n brings those of the samples targets[n]."""
    made = [
        sample(n, None, late={m: y(m) for m in targets[n]} if n in targets else None)
        for n in range(items)
    ]
    return listed(made)


def table(stream: Stream, items: int | None = None) -> list[tuple[int, int | None, bool, float]]:
    """(number, target, end, time) of each sample."""
    return [
        (int(s.u), None if s.y is None else int(s.y), s.end, s.time)
        for s in islice(stream.samples(), items)
    ]


def steps(stream: Stream) -> list[tuple[int, int]]:
    """(samples drawn from the source so far, number) for each sample given."""
    drawn = 0
    inner = stream._stream  # type: ignore[attr-defined]

    class Counting:
        portable, spec = False, inner.spec

        def samples(self) -> Iterator[Sample]:
            nonlocal drawn
            for item in inner.samples():
                drawn += 1
                yield item

    stream._stream = Counting()  # type: ignore[attr-defined]
    return [(drawn, int(s.u)) for s in stream.samples()]


class TestDelayed:
    def test_tagged(self) -> None:
        items = list(Delayed(numbered(5), 2).samples())
        assert [s.y for s in items] == [None] * 5
        brought = [s.late and {m: int(t) for m, t in s.late.items()} for s in items]
        assert brought == [None, None, {0: 0}, {1: 1}, {2: 2}]
        assert [(int(s.u), s.end, s.time) for s in items] == [
            (n, n % 3 == 2, 0.5 * n) for n in range(5)
        ]

    def test_as_their_own(self) -> None:
        assert [t for _, t, _, _ in table(Delayed(numbered(5), 2, tagged=False))] == [
            None,
            None,
            0,
            1,
            2,
        ]


@pytest.mark.parametrize("delay", [1, 3, 7])
@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_equal_to_the_stream_without_delay(delay: int, tagged: bool, missing: float) -> None:
    def source() -> Stream:
        return Withhold(numbered(40), missing, 5)

    rejoined = Rejoin(Delayed(source(), delay, tagged=tagged), None if tagged else delay)
    expected = table(source())
    assert table(rejoined)[: 40 - delay] == expected[: 40 - delay]
    # the targets of the last ones never came
    gone = [(n, None, end, time) for n, _, end, time in expected[40 - delay :]]
    rejoined = Rejoin(Delayed(source(), delay, tagged=tagged), None if tagged else delay)
    assert table(rejoined)[40 - delay :] == gone
    assert rejoined.report() == {"let_go": delay, "too_late": 0, "awaiting_most": delay}


def test_each_leaves_as_soon_as_its_target_is_there() -> None:
    assert steps(Rejoin(Delayed(numbered(6), 2))) == [
        (3, 0),
        (4, 1),
        (5, 2),
        (6, 3),
        (6, 4),  # the end of the stream
        (6, 5),
    ]


class TestTags:
    def test_any_order_several_or_none_in_an_item(self) -> None:
        stream = Rejoin(late(6, {2: [1], 3: [3, 0], 5: [2, 5, 4]}))
        assert [(n, t) for n, t, _, _ in table(stream)] == [(n, n) for n in range(6)]
        assert stream.report() == {"let_go": 0, "too_late": 0, "awaiting_most": 3}

    def test_in_order_even_where_a_later_target_came_first(self) -> None:
        # 1 is complete at sample 2, but waits for 0, which is complete at sample 3
        assert steps(Rejoin(late(5, {2: [1], 3: [0], 4: [2, 3, 4]}))) == [
            (4, 0),
            (4, 1),
            (5, 2),
            (5, 3),
            (5, 4),
        ]

    def test_own_and_late_targets(self) -> None:
        stream = Rejoin(
            listed([sample(0), sample(1, None), sample(2), sample(3, late={1: y(1)}), sample(4)])
        )
        assert [(n, t) for n, t, _, _ in table(stream)] == [(n, n) for n in range(5)]

    def test_a_target_that_will_never_come(self) -> None:
        stream = Rejoin(listed([sample(0, None), sample(1, late={0: None}), sample(2)]))
        assert steps(stream) == [(2, 0), (2, 1), (3, 2)]
        assert stream.report()["let_go"] == 0

    def test_patience(self) -> None:
        # nobody knows 1; the target of 0 comes when 0 has been let go
        stream = Rejoin(late(8, {3: [0], 4: [2], 5: [3, 4, 5], 7: [6, 7]}), patience=2)
        assert steps(stream) == [(3, 0), (4, 1), (5, 2), (6, 3), (6, 4), (6, 5), (8, 6), (8, 7)]
        stream = Rejoin(late(8, {3: [0], 4: [2], 5: [3, 4, 5], 7: [6, 7]}), patience=2)
        targets = [t for _, t, _, _ in table(stream)]
        assert targets == [None, None, 2, 3, 4, 5, 6, 7]
        assert stream.report() == {"let_go": 2, "too_late": 1, "awaiting_most": 2}

    def test_a_target_of_a_sample_to_come(self) -> None:
        with pytest.raises(StreamError, match="sample 1 brings the target of sample 2"):
            list(Rejoin(late(4, {1: [2]})).samples())
        with pytest.raises(StreamError, match="sample 1 brings the target of sample -1"):
            list(Rejoin(late(4, {1: [-1]})).samples())

        with pytest.raises(StreamError, match="sample 1 brings the target of sample 'a'"):
            list(Rejoin(listed([sample(0, None), sample(1, None, late={"a": y(1)})])).samples())

    def test_keys(self) -> None:
        keys = ["a", 7, "b", "a"]  # 'a' again, when the first one has its target
        tags: list[Mapping[int | str, Tensor]] = [{}, {"a": y(0)}, {}, {"b": y(2), 7: y(1)}]
        made = [
            {"u": sample(n).u, "key": key, "late": late or None}
            for n, (key, late) in enumerate(zip(keys, tags, strict=True))
        ]
        stream = Rejoin(from_iterable(made, classes=1000))
        assert [t for _, t, _, _ in table(stream)] == [0, 1, 2, None]
        assert stream.report() == {"let_go": 1, "too_late": 0, "awaiting_most": 2}

    def test_keys_that_do_not_fit(self) -> None:
        made = [{"u": sample(n).u, "key": "a"} for n in range(2)]
        with pytest.raises(StreamError, match="sample 1 has the key 'a' of sample 0, which waits"):
            list(Rejoin(from_iterable(made, classes=3)).samples())
        with pytest.raises(StreamError, match=r"sample 0: key is 0\.5; give a whole number or"):
            from_iterable([{"u": sample(0).u, "key": 0.5}], classes=3)
        made[1] = {"u": sample(1).u, "key": "b", "late": {"c": y(0)}}  # let go long ago, or wrong
        stream = Rejoin(from_iterable(made, classes=3))
        list(stream.samples())
        assert stream.report()["too_late"] == 1

    @pytest.mark.parametrize("first", [{0: y(0)}, {0: None}])
    def test_a_second_target(self, first: Mapping[int, Tensor | None]) -> None:
        stream = listed([sample(0), sample(1, None), sample(2, late={1: y(1)})])
        list(Rejoin(stream).samples())
        waits = [sample(0, None), sample(1, None), sample(2, None, late={1: first[0]})]
        twice = listed([*waits, sample(3, late={1: y(1)})])
        with pytest.raises(
            StreamError, match=r"sample 3 brings a second target \(y\) for sample 1"
        ):
            list(Rejoin(twice).samples())


class TestSeveralReadouts:
    def stream(self, items: Sequence[tuple[object, Mapping[int, object] | None]]) -> Rejoin:
        made = [sample(n, own, late=tags) for n, (own, tags) in enumerate(items)]
        return Rejoin(from_iterable(made, classes={"a": 1000, "b": 1000}))

    def targets(self, stream: Rejoin) -> list[tuple[int | None, int | None]]:
        return [
            tuple(None if (t := s.target(r)) is None else int(t) for r in ("a", "b"))
            for s in stream.samples()
        ]

    def test_a_sample_waits_for_each_readout(self) -> None:
        stream = self.stream(
            [
                ({"a": y(0)}, None),
                ({"a": y(1), "b": y(11)}, None),
                ({"a": y(2), "b": None}, {0: {"b": y(10)}}),
            ]
        )
        assert steps(stream) == [(3, 0), (3, 1), (3, 2)]
        stream = self.stream(
            [
                ({"a": y(0)}, None),
                ({"a": y(1), "b": y(11)}, None),
                ({"a": y(2), "b": None}, {0: {"b": y(10)}}),
            ]
        )
        assert self.targets(stream) == [(0, 10), (1, 11), (2, None)]

    def test_targets_of_one_sample_that_come_apart(self) -> None:
        items = [
            (None, None),
            (None, {0: {"a": y(0)}}),
            (None, {0: {"b": y(10)}, 1: None, 2: None}),
        ]
        assert steps(self.stream(items)) == [(3, 0), (3, 1), (3, 2)]
        assert self.targets(self.stream(items)) == [(0, 10), (None, None), (None, None)]

    def test_a_second_target_for_one_readout(self) -> None:
        stream = self.stream([({"a": y(0)}, None), ({"a": y(1)}, {0: {"a": y(7)}})])
        with pytest.raises(StreamError, match=r"second target \(a\) for sample 0"):
            list(stream.samples())

    def test_delayed_as_a_whole(self) -> None:
        made = [sample(n, {"a": y(n)} if n % 2 else {"a": y(n), "b": y(n + 10)}) for n in range(8)]
        expected = [(n, None if n % 2 else n + 10) for n in range(8)]
        for tagged in (True, False):
            inner = from_iterable(made, classes={"a": 1000, "b": 1000})
            stream = Rejoin(Delayed(inner, 3, tagged=tagged), None if tagged else 3)
            assert self.targets(stream)[:5] == expected[:5]
            assert stream.report()["let_go"] == 3


DRIFT = {"source": "drift", "batch": 3, "drift": {"features": 2, "classes": 3}}


class TestSettings:
    def stream(self, **fields: object) -> Stream:
        settings = StreamSettings.model_validate({**DRIFT, **fields})
        return make_stream(settings, seed=2, dtype=torch.float64)

    @pytest.mark.parametrize(
        "fields", [{"late_targets": 4}, {"late_targets": 4, "target_delay": 4}]
    )
    def test_late_targets_are_rejoined(self, fields: Mapping[str, int]) -> None:
        plain = self.stream(missing=0.3)
        stream = self.stream(missing=0.3, relearn="wait", **fields)
        assert stream.portable
        for a, b in islice(zip(plain.samples(), stream.samples(), strict=True), 50):
            assert torch.equal(a.u, b.u)
            assert a.y is b.y is None or torch.equal(a.y, b.y)
        assert report_of(stream) == {"let_go": 0, "too_late": 0, "awaiting_most": 4}

    def test_a_source_whose_targets_are_late_by_themselves(self) -> None:
        plain, stream = self.stream(), self.stream(target_delay=2, relearn="wait")
        inputs = islice(plain.samples(), 10)
        targets = islice(plain.samples(), 2, 12)
        for a, b, c in zip(inputs, targets, stream.samples(), strict=False):
            assert torch.equal(a.u, c.u)
            assert torch.equal(b.y, c.y)

    def test_paced_after_rejoining(self) -> None:
        stream = self.stream(late_targets=2, pace={"period": 0.001, "late": "keep"})
        assert isinstance(stream, Paced)
        for a, b in islice(zip(self.stream().samples(), stream.samples(), strict=True), 10):
            assert torch.equal(a.u, b.u)
            assert torch.equal(a.y, b.y)
        assert report_of(stream).keys() == {"let_go", "too_late", "awaiting_most", "waiting_most"}

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"late_targets": 3, "target_delay": 2}, "would meet another sample"),
            ({"late_targets": 3, "patience": 2, "relearn": "wait"}, "raise 'patience'"),
            ({"target_delay": 65, "relearn": "wait"}, "raise 'patience'"),
        ],
    )
    def test_what_does_not_fit(self, fields: Mapping[str, int], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.stream(**fields)


class TestRefused:
    def test_delays_and_patience(self) -> None:
        for wrong in (0, -1):
            with pytest.raises(SettingsError, match=f"delay is {wrong}"):
                Delayed(numbered(2), wrong)
            with pytest.raises(SettingsError, match=f"delay is {wrong}"):
                Rejoin(numbered(2), wrong)
        with pytest.raises(SettingsError, match="patience is 4; at least 5"):
            Rejoin(numbered(2), 5, patience=4)

    def test_tags_beside_a_delay(self) -> None:
        with pytest.raises(StreamError, match="sample 2 brings tagged targets.* delay 2"):
            list(Rejoin(Delayed(numbered(4), 2), 2).samples())

    def test_a_paced_stream(self) -> None:
        with pytest.raises(SettingsError, match="rejoin first, then pace"):
            Rejoin(Paced(numbered(2), 1.0, Late.DROP))

    def test_late_targets_that_nobody_rejoined(self) -> None:
        stream = Delayed(numbered(3), 1)
        check = Checker(stream.spec, equal_batches=True)
        items = list(stream.samples())
        check.check(0, items[0])
        with pytest.raises(
            StreamError, match=r"sample 1 brings targets of earlier samples \(0\).*Rejoin"
        ):
            check.check(1, items[1])
        with pytest.raises(StreamError, match="sample 1 brings targets .* rejoin first"):
            list(Smooth(Delayed(numbered(3), 1), 2).samples())

    @pytest.mark.parametrize("wrong", [[y(0)], {0.5: y(0)}, {True: y(0)}, 3])
    def test_tags_of_another_form(self, wrong: object) -> None:
        items = [{"u": torch.zeros(1, 1), "y": y(0), "late": wrong}]
        with pytest.raises(StreamError, match="sample 0: late is"):
            from_iterable(items, classes=3)


def test_tags_in_a_dict() -> None:
    items = [
        {"u": torch.zeros(1, 1).numpy()},
        {"u": torch.ones(1, 1).numpy(), "y": y(4).to(torch.int16), "late": {0: y(3).numpy()}},
    ]
    first, second = Rejoin(from_iterable(items, classes=5)).samples()
    assert torch.equal(first.y, y(3))
    assert torch.equal(second.y, y(4))
