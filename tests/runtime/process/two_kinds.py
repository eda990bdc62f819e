"""A run with portable bits in this process, and with `ray` one with two actors, the second of which
lives on another kind of host: for a process of its own, as torch reads its variables once
(test_bits.py starts it, in environments of several kinds of hosts). Prints the weights' digest."""

from __future__ import annotations

import hashlib
import sys

from hamdist.config import EngineSettings
from hamdist.runtime.process.portable import pin

ENGINE = {"bits": "portable"}

if __name__ == "__main__":
    pin(EngineSettings.model_validate(ENGINE))

from runtime.engines.test_engines_equal import assert_equal  # noqa: E402
from runtime.process.test_bits import OTHER_KIND, RAY, convolutions  # noqa: E402 (torch's variables first)

from hamdist.runtime.ray_engine import placed_workers  # noqa: E402


def main():
    alone = convolutions(ENGINE)
    if "ray" in sys.argv:
        options_of_groups = placed_workers.options_of_groups  # type: ignore[attr-defined]

        def second_elsewhere(*given):
            first, second = options_of_groups(*given)
            return [first, second.pinned(dict(OTHER_KIND))]

        placed_workers.options_of_groups = second_elsewhere  # type: ignore[attr-defined]
        assert_equal(alone, convolutions({**RAY, **ENGINE}))
    digest = hashlib.sha256()
    for weight in alone.model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    print(digest.hexdigest())  # noqa: T201


if __name__ == "__main__":
    main()
