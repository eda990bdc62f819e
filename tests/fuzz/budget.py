"""How long the fuzzing tests look: briefly, and always at the same examples, unless told otherwise:
500 times as many, drawn anew, by `HAMDIST_FUZZ=500 scripts/test tests/fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("HAMDIST_FUZZ", "1"))


def fuzz(examples):
    """The settings of a test that looks at so many examples when it is brief."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
