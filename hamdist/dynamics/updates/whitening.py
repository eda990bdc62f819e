"""Steps that do not depend on the scale and the correlation of a layer's inputs.

For a linear layer y = W x + b whose gradient is G = z^T x, g_b = sum of the rows of z, from the
layer's own inputs alone:

    mu <- m mu + (1 - m) mean(x)
    A  <- m' A + (1 - m') mean( (x - mu)^T (x - mu) )          every `look`-th update, m' = m^look
    P   = (1 + e) ( A / t + e I )^-1,    t = trace(A) / I      every `refresh`-th update
    G'  = z^T (x - mu) P,        g_b' = g_b - G' mu

Why: a message about inputs of d updates ago keeps a direction of curvature kappa stable only up to
steps of about pi / ((2d + 1) kappa). The largest curvature, that of the inputs' mean, then decides
for all the others. With P = I (`centred`) it is the mean alone that is taken out; with A the
directions get about the same curvature. G' and g_b' are the gradients of W and c in
y = W P^(1/2) (x - mu) + c, brought back to W and b. (Input side of K-FAC: Martens and Grosse 2015;
natural networks: Desjardins et al. 2015.) With rule `rotated` G stays as it is but for the mean,
and Adam's axes turn into those of A and of the costates (rotation.py).

R: rows (batch, times further dimensions), O, I: outputs and inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hamdist.config import InputRule, InputsSettings, RotatedSides
from hamdist.dynamics.saved_state.stateful import Stateful, popped
from hamdist.dynamics.updates.rotation import Axes, Rotation
from hamdist.dynamics.vjp.gradient import Column, Gradient, Outer, dense
from hamdist.dynamics.vjp.layer_inputs import GradientsWithInputs, costate_rows, rows_of


class InputStatistics(Stateful):
    """mu (I,), A (I, I), P (I, I) of the inputs of one layer, after so many `updates`.

    B (O, O): `outer`, of its costates. bias: place of the layer's.
    """

    def __init__(self, rule: InputsSettings) -> None:
        self.rule = rule
        self.updates = 0
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None
        self.inverse: Tensor | None = None
        self.outer: Tensor | None = None
        self.bias = -1
        self.rotation = Rotation()

    STATE = ("updates", "mean", "covariance", "inverse", "outer", "bias", "rotation")
    ADDED: ClassVar[Mapping[str, Any]] = {
        "outer": None,
        "bias": -1,
        "rotation": Rotation().state_dict(),
    }

    def see(self, x: Tensor, z: Tensor | None = None) -> None:
        """Add the inputs of one update, x: (R, I), and its costates, z: (R, O)."""
        r = self.rule
        mean = x.mean(0)
        self.mean = mean if self.mean is None else torch.lerp(self.mean, mean, 1 - r.memory)
        if r.rule is not InputRule.CENTRED:
            costates = r.rotated and r.sides is RotatedSides.BOTH
            self._observe(x - self.mean, z if costates else None)
        self.updates += 1

    def _observe(self, x: Tensor, z: Tensor | None) -> None:
        r = self.rule
        if self.updates % r.look == 0:
            self.covariance = self._followed(self.covariance, x)
            self.outer = None if z is None else self._followed(self.outer, z)
        if r.rotated:
            place = self.updates % r.refresh
            if place == 0:
                self.rotation.refresh([self.outer, self.covariance])
            if place == r.refresh // 2 or self.updates == 0:
                self.rotation.take()
        elif self.updates % r.refresh == 0 and self.covariance is not None:
            a = self.covariance
            scaled = a / a.diagonal().mean()
            scaled.diagonal().add_(r.damping)
            self.inverse = torch.linalg.inv(scaled).mul_(1 + r.damping)

    def _followed(self, before: Tensor | None, rows: Tensor) -> Tensor:
        """Return the running mean of rows^T rows / R. It begins with 1; of axes with the first."""
        now = torch.mm(rows.t(), rows) / len(rows)
        if before is None:
            before = now if self.rule.rotated else torch.eye(len(now)).to(now)
        return torch.lerp(before, now, 1 - self.rule.memory**self.rule.look)

    def factors(self, g: Outer) -> tuple[Outer, Column]:
        """Return G' and g_b', as factors, from G = z^T x."""
        if self.mean is None:
            raise RuntimeError("factors: no inputs have been seen")
        x = g.x - self.mean
        if self.rule.rotated:
            return Outer(g.z, x), Column(g.z)
        if self.inverse is not None:
            x = torch.mm(x, self.inverse)
        return Outer(g.z, x), Column(g.z * (1 - torch.mv(x, self.mean)).unsqueeze(1))


class InputWhitening(Stateful):
    """Whitening of all linear layers of a local function.

    That is of layers whose gradients come as factors, or with the inputs of the layer
    (vjp/layer_inputs.py: convolutions, too). A layer without a bias is left as it is: the mean of
    its inputs cannot be taken out.
    """

    def __init__(self, rule: InputsSettings) -> None:
        self.rule = rule
        self.layers: dict[int, InputStatistics] = {}  # by the place of the weight

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {i: layer.state_dict() for i, layer in self.layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers, _ = popped(state, "layers")
        self.layers = {i: InputStatistics(self.rule) for i in layers}
        for i, layer in self.layers.items():
            layer.load_state_dict(layers[i])

    def applied(self, g: Sequence[Gradient]) -> list[Gradient]:
        """Return the gradients of one update as they are used, in the order of the weights.

        None of them may have moved its weight already.
        """
        if isinstance(g, GradientsWithInputs):
            return self._watched(g)
        gradients = list(g)
        for i, g_i in enumerate(g):
            if not isinstance(g_i, Outer):
                continue
            bias = _bias(g, g_i)
            if bias is None:
                continue
            layer = self._layer(i, bias)
            layer.see(g_i.x, g_i.z)
            gradients[i], gradients[bias] = layer.factors(g_i)
        return gradients

    @property
    def axes(self) -> Axes:
        """Return the axes of Adam's steps."""
        layers = self.layers.items() if self.rule.rotated else ()
        return Axes([(i, s.bias, s.mean, s.rotation) for i, s in layers if s.mean is not None])

    def _layer(self, weight: int, bias: int) -> InputStatistics:
        layer = self.layers.setdefault(weight, InputStatistics(self.rule))
        layer.bias = bias
        return layer

    def _watched(self, g: GradientsWithInputs) -> list[Gradient]:
        gradients = list(g)
        for (layer, read), costates in zip(g.read, g.costates, strict=True):
            weight, bias = dense(g[layer.weight]), dense(g[layer.bias])
            whitening = self._layer(layer.weight, layer.bias)
            z = costate_rows(layer.module, costates).to(weight.dtype)
            whitening.see(rows_of(layer.module, read).to(weight.dtype), z)
            flat, gradients[layer.bias] = whitened(weight.flatten(1), bias, whitening)
            gradients[layer.weight] = flat.view_as(weight)
        return gradients


def _bias(g: Sequence[Gradient], of: Outer) -> int | None:
    """Return the place of the bias whose gradient has the same rows."""
    places = (j for j, g_i in enumerate(g) if isinstance(g_i, Column) and g_i.z is of.z)
    return next(places, None)


def whitened(g: Tensor, g_bias: Tensor, layer: InputStatistics) -> tuple[Tensor, Tensor]:
    """Return G' (O, I) and g_b' (O,) for gradients that are tensors: G (O, I), g_b (O,)."""
    if layer.mean is None:
        raise RuntimeError("whitened: no inputs have been seen")
    centred = torch.addr(g, g_bias, layer.mean, alpha=-1)
    if layer.inverse is not None:
        centred = torch.mm(centred, layer.inverse)
    return centred, g_bias if layer.rule.rotated else g_bias - torch.mv(centred, layer.mean)
