"""Modules whose input can be recomputed from their output, and the blocks of level `reversible`.

Everything is made of one elementary map on a pair of states, held in one tensor whose two halves on
axis 1 are a and b:

    (a, b) -> (b, c)    with    c = a + s F(b)            a = c - s F(b)
    M_a = M_c,    M_b += s (dF/db)^T M_c,    g = s (dF/dtheta)^T M_c

With s = 1 two of them are a block of RevNet (Gomez, Ren, Urtasun, Grosse 2017). With F = f, s = 2
tau and the pair (h_{k-1}, h_k) one is a step of the midpoint rule, and M_a, M_b are its adjoint
(docs: concepts/equations, "Without stored activations"):

    h_1 = h_0 + tau f(h_0),    h_{k+1} = h_{k-1} + 2 tau f(h_k)
    z_k = z_{k+2} + 2 tau J_k^T z_{k+1},    z_0 = z_2 + z_1 + tau J_0^T z_1

Order 2; memory of about four states, whatever the number of steps. A leak, dh/dt = -lambda h + f,
makes either direction grow as lambda tau + sqrt(1 + lambda^2 tau^2) per step.

B: batch, n: features of one state, or channels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hamdist.dynamics.modules.pairs import InverseStep, InvertibleMap, halves
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.errors import SettingsError


class Coupling(InvertibleMap):
    """(a, b) -> (b, a + s (F(b) - lambda b)), on x (B, 2n) or (B, 2n, H, W).

    Two in a row are a block of RevNet; with scale = 2 tau it is a midpoint step from (h_{k-1}, h_k)
    to (h_k, h_{k+1}).

    Args:
        f: F, a module from n to n features.
        scale: s.
    """

    def __init__(self, f: nn.Module, scale: float = 1.0, *, leak: float = 0.0) -> None:
        super().__init__()
        self.f = f
        self.scale = _finite("Coupling: scale", scale)
        self.leak = _finite("Coupling: leak", leak)

    @property
    def decay(self) -> float:
        """Return |lambda s| / 2."""
        return abs(self.leak * self.scale) / 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the pair (b, c) for x = (a, b), halves of axis 1.

        Args:
            x: the pair, (B, 2 H, ...).
        """
        a, b = halves(x)
        return torch.cat([b, torch.add(a, _field(self.f, self.leak, b), alpha=self.scale)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the pair (a, b) for y = (b, c)."""
        b, c = halves(y)
        return torch.cat([torch.sub(c, _field(self.f, self.leak, b), alpha=self.scale), b], 1)

    def back(self, y: Tensor, message: Tensor) -> InverseStep:
        b, c = halves(y)
        m_b, m_c = halves(message)
        f, to_b, g = _pull(self.f, self.leak, b, self.scale * m_c, self.theta)
        x = torch.cat([torch.sub(c, f, alpha=self.scale), b], 1)
        del f
        return InverseStep(x, torch.cat([m_c, m_b + to_b], 1), g)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}" + (f", leak={self.leak:g}" if self.leak else "")


class MidpointStart(InvertibleMap):
    """First midpoint step: h_0 -> (h_0, h_0 + tau (f(h_0) - lambda h_0)).

    From (B, n, ...) to (B, 2n, ...).

    Args:
        f: a module from n to n features.
        tau: step, in the unit of time.
    """

    def __init__(self, f: nn.Module, tau: float, *, leak: float = 0.0) -> None:
        super().__init__()
        self.f = f
        self.tau = _above_0("MidpointStart: tau", tau)
        self.leak = _finite("MidpointStart: leak", leak)

    @property
    def decay(self) -> float:
        """Return |lambda| tau."""
        return abs(self.leak) * self.tau

    def forward(self, x: Tensor) -> Tensor:
        """Return the pair (h_0, h_1), (B, 2 H, ...).

        Args:
            x: h_0, (B, H, ...).
        """
        return torch.cat([x, torch.add(x, _field(self.f, self.leak, x), alpha=self.tau)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return h_0, (B, H, ...), of the pair (h_0, h_1)."""
        return halves(y)[0]

    def back(self, y: Tensor, message: Tensor) -> InverseStep:
        m_0, m_1 = halves(message)
        h_0 = halves(y)[0].contiguous()
        _, to_0, g = _pull(self.f, self.leak, h_0, self.tau * m_1, self.theta)
        return InverseStep(h_0, m_0 + m_1 + to_0, g)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}" + (f", leak={self.leak:g}" if self.leak else "")


class Squeeze(InvertibleMap):
    """Pixel unshuffle of images: fewer rows and columns, more channels, nothing lost.

    From (B, C, H, W) to (B, C k^2, H/k, W/k). The halves of the channels stay the halves.

    Args:
        factor: k.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = _count("Squeeze: factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of fewer, deeper pixels, (B, C k^2, H/k, W/k).

        Args:
            x: the image, (B, C, H, W).
        """
        return nn.functional.pixel_unshuffle(x, self.factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the image (B, C, H, W)."""
        return nn.functional.pixel_shuffle(y, self.factor)

    def back(self, y: Tensor, message: Tensor) -> InverseStep:
        return InverseStep(self.inverse(y), self.inverse(message), [])

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Midpoint(nn.Module):
    """Midpoint rule of dh/dt = -lambda h + f(h), all `steps` steps with the same f.

    From h_0 (B, n, ...) to the pair (h_{steps-1}, h_steps), (B, 2n, ...).

    Args:
        f: a module from n to n features.
        steps: number of steps.
        tau: step, in the unit of time.
        start: False to begin with the pair (h_{-1}, h_0), (B, 2n, ...), instead of h_0.
    """

    def __init__(
        self, f: nn.Module, steps: int, tau: float, *, leak: float = 0.0, start: bool = True
    ) -> None:
        super().__init__()
        self.f = f
        self.steps = _count("Midpoint: steps", steps)
        self.tau = _above_0("Midpoint: tau", tau)
        self.leak = _finite("Midpoint: leak", leak)
        self.start = start

    @property
    def pieces(self) -> list[InvertibleMap]:
        """Return the steps, in order; all share f."""
        first: list[InvertibleMap] = []
        if self.start:
            first.append(MidpointStart(self.f, self.tau, leak=self.leak))
        step = Coupling(self.f, 2 * self.tau, leak=self.leak)
        return [*first, *[step] * (self.steps - len(first))]

    def forward(self, x: Tensor) -> Tensor:
        """Return the pair (h_{steps-1}, h_steps).

        Args:
            x: h_0, or the pair before it.
        """
        for piece in self.pieces:
            x = piece(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Return the input that led to a pair.

        Args:
            y: the pair.
        """
        return undone(self.pieces, y)

    def extra_repr(self) -> str:
        leak = f", leak={self.leak:g}" if self.leak else ""
        return f"steps={self.steps}, tau={self.tau:g}{leak}"


def pieces_of(module: nn.Module) -> list[InvertibleMap]:
    """Return the invertible maps that `module` consists of, in order.

    The list is empty if it has other parts: then its input cannot be recomputed from its output.
    """
    if not is_usual(module):
        return []
    if isinstance(module, InvertibleMap):
        return [module]
    if type(module) is Midpoint:
        return module.pieces
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = [pieces_of(part) for part in module]
        return [piece for part in parts for piece in part] if all(parts) else []
    return []


def undone(pieces: Sequence[InvertibleMap], y: Tensor) -> Tensor:
    """Return the input of `pieces` that led to y."""
    for piece in reversed(pieces):
        y = piece.inverse(y)
    return y


class InversePass:
    """Vector-Jacobian products of a chain of invertible maps, from its output alone."""

    def __init__(self, pieces: Sequence[InvertibleMap], parameters: Sequence[Tensor]) -> None:
        """Set up the pass; parameters: those whose gradients are returned, in this order."""
        places = {id(p): i for i, p in enumerate(parameters)}
        owners = {id(piece): [places[id(p)] for p in piece.theta] for piece in pieces}
        self._pieces = [(piece, owners[id(piece)]) for piece in pieces]
        self._parameters = list(parameters)

    def back(self, pair: list[Tensor]) -> InverseStep:
        """Return the input, its message and the gradients of the chain.

        pair: y and the message about it, which are removed from the list, so that their memory
        can be freed. A parameter that several maps share gets the sum over them, from the last on.
        """
        y, message = pair
        pair.clear()
        g: list[Tensor | None] = [None] * len(self._parameters)
        for piece, places in reversed(self._pieces):
            y, message, piece_g = piece.back(y, message)
            for place, term in zip(places, piece_g, strict=True):
                before = g[place]
                if term is not None:
                    g[place] = term if before is None else before + term
        return InverseStep(y, message, g)


def _field(f: nn.Module, leak: float, h: Tensor) -> Tensor:
    """Return f(h) - lambda h; raise ValueError where f(h) has not the shape of h."""
    # A part that works in place would change h itself, which is a half of the output.
    writes = any(getattr(m, "inplace", False) for m in f.modules())
    value: Tensor = f(h.clone() if writes else h)
    if value.shape != h.shape:
        raise ValueError(
            f"F of a coupling or a midpoint step turns {tuple(h.shape)} into {tuple(value.shape)}; "
            "it must keep the shape of its state"
        )
    return value - leak * h if leak else value


def _pull(
    f: nn.Module, leak: float, h: Tensor, cotangent: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return f(h) - lambda h, and cotangent^T of its derivatives by h and theta, by one call; None
    for weights that f has not used."""
    leaf = h.detach().requires_grad_()
    wrt = [leaf, *theta]
    with torch.enable_grad():
        value = _field(f, leak, leaf)
    pulled: Sequence[Tensor | None] = [None] * len(wrt)
    if value.requires_grad:
        pulled = torch.autograd.grad(value, wrt, cotangent, allow_unused=True)
    to_h, *g = pulled
    return value.detach(), torch.zeros_like(leaf) if to_h is None else to_h, g


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise SettingsError(f"{name} {value!r} is no finite number")
    return value


def _above_0(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise SettingsError(f"{name} {value!r}: give a finite number above 0")
    return value


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} {value!r}: give a whole number, at least 1")
    return value
