"""Fixed orthonormal bases, drawn by a seed.

    R = H_m diag(+-1),    H_2m = [H_m H_m; H_m -H_m] / sqrt(2)                     `rotated`
    Q = k columns of R^T,    h' = Q Q^T h                                          `Subspace`

R rotates vectors of n numbers: random signs, and Walsh-Hadamard transforms of m numbers, m the
largest power of two up to n; if m < n a second one, of the last m numbers, follows that of the
first m. Vectors that the C code can read are rotated by it (native/rotation.h), in m log m sums.

A residual stream whose layers all end in `Subspace` with one seed stays in the columns of Q. Of its
states, and of the messages to them, k numbers are all that has an effect (Ramasinghe et al. 2025).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from hamdist.dynamics.native.rotation import rotate
from hamdist.errors import SettingsError


class Subspace(nn.Module):
    """Projection onto a fixed subspace, h' = Q Q^T h, as the last module of a block.

    `engine.compress` sends the signals behind it by their k coefficients.

    Args:
        width: n, of the last dimension of h.
        rank: k, the dimensions of the subspace.
        seed: draws the subspace; the same for all layers of a residual stream.
        dtype: of h; torch's default.
    """

    projection: Tensor

    def __init__(
        self, width: int, rank: int, seed: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not 0 < rank <= width:
            raise ValueError(f"rank is {rank}: a subspace of {width} dimensions has 1 to {width}")
        self.width, self.rank, self.seed = width, rank, seed
        columns = lifted(torch.eye(rank, dtype=torch.float64), width, seed)
        projection = (columns.T @ columns).to(dtype or torch.get_default_dtype())
        self.register_buffer("projection", projection)

    def forward(self, h: Tensor) -> Tensor:
        """Return h', of the shape of h.

        Args:
            h: (B, ..., n).
        """
        return h @ self.projection

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}, seed={self.seed}"

    def follows_seed(self) -> bool:
        """Return True if the projection is the one of the seed: another one may be loaded."""
        x = torch.linspace(-1, 2, self.width).to(self.projection)
        c = coefficients(x.unsqueeze(0), self.rank, self.seed)
        return torch.allclose(self(x), lifted(c, self.width, self.seed)[0], atol=1e-2)

    def table(self) -> Tensor:
        """Return the signs of R and, as ones and zeros, what Q keeps of R x: (2, n)."""
        dtype, device = self.projection.dtype, self.projection.device
        signs = signs_of(self.width, self.seed, dtype, device)
        kept = torch.zeros_like(signs)
        kept[_rows(self.width, self.rank, self.seed)] = 1
        return torch.stack([signs, kept])


def in_subspaces(
    model: nn.Sequential, width: int, ranks: int | Mapping[str, int], seed: int
) -> nn.Sequential:
    """Return `model` with a `Subspace` behind some children: of the type of the last one's weights.

    Args:
        model: whose children make a residual stream.
        width: of the stream.
        ranks: by name of the child; a number is of all but the last.
        seed: draws the subspaces.

    Raises:
        SettingsError: for a name that is none of a child that can end in a subspace.
    """
    *layers, (_, head) = model.named_children()
    names = dict(layers)
    if isinstance(ranks, int):
        ranks = dict.fromkeys(names, ranks)
    for name in ranks:
        if name not in names:
            raise SettingsError(
                f"model.subspace: there is no layer {name!r} in front of the last one; the layers "
                f"are {', '.join(names)}"
            )
    dtype = next(head.parameters()).dtype
    ends = OrderedDict(model.named_children())
    for name, rank in ranks.items():
        ends[name] = nn.Sequential(ends[name], Subspace(width, rank, seed, dtype))
    return nn.Sequential(ends)


def coefficients(x: Tensor, rank: int, seed: int) -> Tensor:
    """Return Q^T x of vectors x, (N, n): (N, k)."""
    return rotated(x, seed)[:, _rows(x.shape[1], rank, seed)]


def lifted(c: Tensor, n: int, seed: int) -> Tensor:
    """Return Q c of vectors c, (N, k): (N, n)."""
    y = c.new_zeros(len(c), n)
    y[:, _rows(n, c.shape[1], seed)] = c
    return rotated_back(y, seed)


def rotated(x: Tensor, seed: int) -> Tensor:
    """Return R x of vectors (N, n)."""
    n = x.shape[1]
    signs = signs_of(n, seed, x.dtype, x.device)
    y = rotate(x, signs, back=False)
    if y is not None:
        return y
    m = _power(n)
    y = x * signs
    if m == n:
        return hadamard(y)
    y[:, :m] = hadamard(y[:, :m])
    y[:, -m:] = hadamard(y[:, -m:])
    return y


def rotated_back(y: Tensor, seed: int) -> Tensor:
    """Return R^T y of vectors (N, n)."""
    n = y.shape[1]
    signs = signs_of(n, seed, y.dtype, y.device)
    x = rotate(y, signs, back=True)
    if x is not None:
        return x
    m = _power(n)
    if m == n:
        x = hadamard(y)
    else:
        x = y.clone()
        x[:, -m:] = hadamard(x[:, -m:])
        x[:, :m] = hadamard(x[:, :m])
    return x * signs


def hadamard(x: Tensor) -> Tensor:
    """Return H x of vectors (N, m), m a power of two; H is its own inverse.

    H_ab x is H_a X H_b of the matrix X of a rows that x fills: 2 m (a + b) operations.
    """
    rows, m = x.shape
    a = 1 << (m.bit_length() - 1) // 2
    left, right = (_matrix(k, x.dtype, x.device) for k in (a, m // a))
    return (left @ (x.reshape(rows, a, m // a) @ right)).reshape(rows, m)


@lru_cache(maxsize=64)
def _matrix(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H_m."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < m:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return (matrix / math.sqrt(m)).to(device, dtype)


def _power(n: int) -> int:
    """Return the largest power of two up to n."""
    return 1 << (n.bit_length() - 1)


@lru_cache(maxsize=64)
def signs_of(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the signs of R, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (n,), generator=generator) - 1).to(device, dtype)


@lru_cache(maxsize=64)
def _rows(n: int, rank: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rank]
