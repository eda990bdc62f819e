"""Convolutions of images by the C code of native/convolution.h."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Size, Tensor

from hamdist.dynamics.native import rows

# Where torch's library is not faster: sums of few numbers over many places, or little work of which
# a call is a good part, and weights that a cache holds (scripts/bench/products --convolutions).
NUMBERS, PLACES, WORK, WEIGHTS = 160, 100, 1 << 21, 1 << 16


class Convolution:
    """A convolution of images of one shape; the sizes come as (rows, columns).

    Args:
        x: shape of the images, (B, C, rows, columns).
        w: shape of the weights, (O, C, rows, columns).
        stride, padding, dilation: as of torch.nn.Conv2d.
    """

    def __init__(
        self,
        x: Sequence[int],
        w: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        out = [
            (size + 2 * pad - far * (kernel - 1) - 1) // step + 1
            for size, kernel, step, pad, far in zip(
                x[2:], w[2:], stride, padding, dilation, strict=True
            )
        ]
        self.out_shape = Size((x[0], w[0], *out))
        self._kernel = w[1] * w[2] * w[3]
        self._table = array("Q", [x[0], x[1], w[0]])
        for pair in (x[2:], w[2:], stride, padding, dilation, out):
            self._table.extend(pair)

    @property
    def pays(self) -> bool:
        """Return True if the C code can make it in this process, and torch would not be faster."""
        images, outputs, height, width = self.out_shape
        places, weights = height * width, outputs * self._kernel
        work = images * weights * places
        short = self._kernel <= NUMBERS and places >= PLACES
        little = work <= WORK and (images == 1 or places >= PLACES // 3)
        return rows.has_products(outputs) and work > 0 and weights <= WEIGHTS and (short or little)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return y (B, O, ...) of x (B, C, ...), contiguous, with weights w (O, C, ...), b (O,)."""
        y, sizes = x.new_empty(self.out_shape), self._table.buffer_info()[0]
        room = x.new_empty(rows.library.convolution_room(sizes, 0))
        bias = 0 if b is None else b.data_ptr()
        pointers = x.data_ptr(), w.data_ptr(), bias, y.data_ptr(), room.data_ptr()
        rows.library.convolve(sizes, *pointers, rows.FLAGS[x.dtype])
        return y

    def pull(
        self, x: Tensor, w: Tensor, z: Tensor, *, message: bool, gradients: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the message about x and the gradient of w and, in its last column, b, (O, K + 1).

        Args:
            x, w: as of `forward`.
            z: about y, contiguous.
            message, gradients: which are wanted; the others are None.
        """
        sizes, outputs = self._table.buffer_info()[0], self.out_shape[1]
        room = x.new_empty(rows.library.convolution_room(sizes, 1))
        to = x.new_empty(x.shape) if message else None
        g = x.new_empty(outputs, self._kernel + 1) if gradients else None
        sent = (0 if t is None else t.data_ptr() for t in (g, to, room))
        pointers = x.data_ptr(), w.data_ptr(), z.data_ptr(), *sent
        rows.library.convolve_back(sizes, *pointers, rows.FLAGS[x.dtype])
        return to, g
