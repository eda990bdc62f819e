"""Adjusts other libraries while one of their models is traced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

# Files of transformers that make attention masks. They ask whether a mask hides anything at all,
# and leave it out where it does not, unless somebody traces: the values of a mask would decide
# what happens next.
MASKS = ("/transformers/masking_utils.py", "/transformers/modeling_attn_mask_utils.py")
NEAR = 4  # frames between torch.jit.is_tracing and who asks


@contextmanager
def masks_stay() -> Iterator[None]:
    """Make transformers build every attention mask, whatever its values: a block then does the same
    for every sample. Elsewhere `torch.jit.is_tracing` says what it always says."""
    ask = sys.modules["torch.jit"].is_tracing

    def is_tracing() -> bool:
        return _asked_for_masks() or bool(ask())

    with patch("torch.jit.is_tracing", is_tracing):
        yield


def _asked_for_masks() -> bool:
    frame = sys._getframe(2)
    for _ in range(NEAR):
        if frame.f_code.co_filename.replace("\\", "/").endswith(MASKS):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
