"""Torch's random generator, of which all threads of a process have one: whose turn it is.

Runs in several threads at once, as a search for hyperparameters makes them, so draw what each
would draw alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TURN = threading.RLock()


@contextmanager
def generator_kept(seed: int | None = None) -> Iterator[None]:
    """Leave torch's generator of the processor as it is; no other thread's run draws inside.

    Args:
        seed: of what is drawn inside; None: it goes on from where the generator is.
    """
    with TURN, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield
