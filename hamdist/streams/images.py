"""Shapes of batches of images.

B: batch, C: channels, H: side of an image.
"""

from __future__ import annotations

import math

from hamdist.errors import StreamError


def square_images(
    shape: tuple[int, ...], needed_by: str, instead: str
) -> tuple[int, int, int, int]:
    """(B, C, H, H) for the shape of a batch of square images, flat ones included.

    Raises StreamError for other shapes, in which `needed_by` is what needs them and `instead` what
    to do without them.
    """
    match shape:
        case (batch, flat) if math.isqrt(flat) ** 2 == flat:
            return batch, 1, math.isqrt(flat), math.isqrt(flat)
        case (batch, height, width) if height == width:
            return batch, 1, height, width
        case (batch, channels, height, width) if height == width:
            return batch, channels, height, width
    raise StreamError(
        f"{needed_by} needs square images, (B, H, H), (B, C, H, H) or (B, H*H), "
        f"but inputs have shape {shape}: {instead}"
    )
