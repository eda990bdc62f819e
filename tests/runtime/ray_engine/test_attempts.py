"""Oracle: hand-written stories of an actor that is lost again and again."""

from __future__ import annotations

import pytest

from hamdist.runtime.ray_engine.replacement import Attempts


@pytest.mark.parametrize(
    ("story", "counts"),
    [
        # (tick as far as it is known, tick of the latest snapshot)
        ([(22, 0), (22, 0), (22, 0)], [1, 2, 3]),  # a block that raises
        ([(None, 0), (None, 0), (None, 0)], [1, 2, 3]),  # dies before it was heard of
        ([(97, 90), (None, 90), (95, 90)], [1, 2, 3]),  # heard of at another time each time
        ([(40, 0), (55, 0), (70, 60)], [1, 1, 1]),  # killed by others, on its way
        ([(None, 0), (None, 50), (None, 50)], [1, 1, 2]),  # a snapshot was taken meanwhile
        ([(40, 0), (30, 0), (41, 0), (41, 0)], [1, 2, 1, 2]),
    ],
)
def test_losses_without_getting_further(story, counts):
    attempts = Attempts()
    assert [attempts.lost("actor 1", *loss) for loss in story] == counts


def test_each_actor_for_itself():
    attempts = Attempts()
    assert [attempts.lost(name, None, 0) for name in "aba"] == [1, 1, 2]
