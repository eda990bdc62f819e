"""Generators for the random choices of streams: one per purpose, none of them global."""

from __future__ import annotations

import hashlib

import torch


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on all of (purpose, numbers) and on nothing else.

    The parts are hashed, so neighbouring seeds and neighbouring epochs share no sequence, and
    (seed 0, epoch 1) is not (seed 1, epoch 0).
    """
    text = "/".join([purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # the CPU generator is a Mersenne Twister that takes 32 bits of seed
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
