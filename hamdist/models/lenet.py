"""LeNet (LeCun et al. 1998), in the form of BioTorch's benchmarks (Sanfiz and Akrout 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hamdist.errors import SettingsError


class PooledConvolution(nn.Module):
    """pool(relu(W * h)), the largest of 2 x 2, of images, flat or not; of whole images no pool."""

    def __init__(
        self, shape: tuple[int, int, int], outputs: int, size: int = 5, *, padding: int = 0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.conv = nn.Conv2d(shape[0], outputs, size, padding=padding)
        self.pool = nn.Flatten() if size == shape[1] else nn.MaxPool2d(2)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.pool(torch.relu(self.conv(h.reshape(-1, *self.shape))))
        return out


def lenet_layers(image: tuple[int, int, int], outputs: int) -> list[nn.Module]:
    """Return the layers for images (C, S, S); padded by 2 where S is below 32."""
    padding = 2 if image[1] < 32 else 0
    side = (image[1] + 2 * padding - 4) // 2
    rest = (side - 4) // 2
    if rest < 1:
        raise SettingsError(f"model.kind: lenet takes images of 12 x 12 and more, not {image[1:]}")
    return [
        PooledConvolution(image, 6, padding=padding),
        PooledConvolution((6, side, side), 16),
        PooledConvolution((16, rest, rest), 120, rest),
        nn.Linear(120, 84),
        nn.Linear(84, outputs),
    ]
