"""Losses L(y, target). Each is a mean over the batch (docs: concepts/equations).

B: batch, O: outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from hamdist.config import IGNORE_INDEX, MODEL_LOSS, Loss
from hamdist.dynamics.native import rows
from hamdist.dynamics.user_modules.structure import parts_of
from hamdist.errors import GraphError

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# of a model's only output, or of all; or by output
Losses: TypeAlias = LossFunction | Mapping[str, LossFunction]

# phi -> phi dL/dy
Slope: TypeAlias = Callable[[float], Tensor]

aten = torch.ops.aten


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return (1/B) sum_b 1/2 sum_j (y_bj - target_bj)^2. prediction and target: (B, O).

    Raises ValueError for other shapes, which torch would broadcast.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"mse of a prediction {tuple(prediction.shape)} and a target {tuple(target.shape)}: "
            "give both one shape"
        )
    return 0.5 * (prediction - target).square().sum() / prediction.shape[0]


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Softmax cross-entropy: the mean over the batch, and over all other axes that have a class.

    ignore_index: targets of this class are left out of the mean. reduction: as torch's.
    """

    ignore_index: int = IGNORE_INDEX
    reduction: str = "mean"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar; NaN, as torch has it, where no target counts.

        prediction: (B, classes) with target (B,); (B, classes, ...) with (B, ...), as torch has it;
        or (B, ..., classes) with (B, ...), as language models have it. Raises ValueError where both
        fit.
        """
        if target.is_floating_point() and not _are_probabilities(target):
            raise ValueError(
                f"cross-entropy of real-valued targets takes probabilities over axis 1, and these "
                f"lie between {target.min():.3g} and {target.max():.3g}, their sums between "
                f"{target.sum(1).min():.3g} and {target.sum(1).max():.3g}: use the loss 'mse' for "
                "real numbers (loss='mse', --set loss=mse), or normalise them"
            )
        if prediction.dim() > 2 and class_axis(prediction.shape, target.shape) != 1:
            prediction = prediction.movedim(-1, 1)
        return functional.cross_entropy(
            prediction, target, ignore_index=self.ignore_index, reduction=self.reduction
        )


cross_entropy = CrossEntropy()


def _are_probabilities(target: Tensor) -> bool:
    """Return True if the sums over axis 1 are 1, up to round-off of half precision."""
    return bool((target >= 0).all()) and bool(((target.sum(1) - 1).abs() < 1e-2).all())


def class_axis(prediction: Sequence[int], target: Sequence[int]) -> int:
    """Return the axis of the classes in a prediction of that shape, 1 or the last one.

    Raises ValueError where both would do for (B, n, n); targets of the prediction's own shape are
    probabilities, with classes on axis 1.
    """
    dims = len(prediction)
    if dims <= 2 or tuple(prediction) == tuple(target):
        return 1
    second = (prediction[0], *prediction[2:]) == tuple(target)
    last = tuple(prediction[:-1]) == tuple(target)
    if second and last:
        raise ValueError(
            f"a prediction {tuple(prediction)} has its classes on axis 1 or on the last one: give "
            "a loss of your own that says which"
        )
    return dims - 1 if last else 1


def loss_and_slope(
    loss: LossFunction, y: Tensor, target: Tensor, *, native: bool = False
) -> tuple[Tensor, Slope]:
    """Return L(y, target), a scalar, and its slope.

    Both in closed form for hamdist's own losses where their targets are of the usual kind (native:
    few numbers by the C code of native/rows.py); otherwise by autograd, from y on. Raises
    ValueError for a loss without a gradient that is not 0 (as of a batch without a target).
    """
    if loss is mse and target.dtype == y.dtype and target.shape == y.shape:
        apart = y - target
        value = 0.5 * apart.square().sum() / y.shape[0]
        return value, lambda phi: apart * (phi / y.shape[0])
    if isinstance(loss, CrossEntropy) and y.dim() == 2 and target.dtype == torch.int64:
        ignored = loss.ignore_index
        row_losses = rows.cross_entropy(y, target, ignored) if native and ignored < 0 else None
        if row_losses is not None:
            value, d = row_losses
            return value, lambda phi: d if phi == 1 else d * phi
        logs = torch.log_softmax(y, 1)
        value, counted = aten.nll_loss_forward(logs, target, None, 1, ignored)

        def slope(phi: float) -> Tensor:
            phis = torch.full_like(value, phi)
            back = aten.nll_loss_backward(phis, logs, target, None, 1, ignored, counted)
            back_slope: Tensor = aten._log_softmax_backward_data(back, logs, 1, y.dtype)
            return back_slope

        return value, slope
    return _by_autograd(loss, y, target)


def _by_autograd(loss: LossFunction, y: Tensor, target: Tensor) -> tuple[Tensor, Slope]:
    leaf = y.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf.clone(), target)  # (which it may write to)
    if not isinstance(value, Tensor) or value.numel() != 1:
        received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the loss is {received}; return a tensor with one number, the batch's mean"
        )
    if value and not value.requires_grad:
        raise ValueError(
            "the loss has no gradient, so nothing would learn: it does not depend on the "
            "prediction, or was detached from it (detach, no_grad, argmax, numpy)"
        )
    value = value.reshape(())

    def slope(phi: float) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(y)
        (pulled,) = torch.autograd.grad(value, leaf, torch.full_like(value, phi), allow_unused=True)
        return torch.zeros_like(y) if pulled is None else pulled

    return value.detach(), slope


@dataclass(frozen=True, slots=True)
class Weighted:
    """A loss with weights of the rows: (1/n) sum_b w_b n_b l_b.

    l_b is the loss of row b alone, a mean over n_b targets: 1, or the class targets that are not
    ignored; n is their sum. Weights of 1 change nothing. parted: makes y and w (B,) of the target.
    """

    loss: LossFunction
    parted: Callable[[Tensor], tuple[Tensor, Tensor]]
    ignore_index: int = IGNORE_INDEX

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        y, weights = self.parted(target)
        if isinstance(self.loss, CrossEntropy):
            sums = replace(self.loss, reduction="none")(prediction, y).reshape(len(y), -1).sum(1)
        elif self.loss is mse:
            sums = 0.5 * (prediction - y).square().reshape(len(y), -1).sum(1)
        else:
            pairs = zip(torch.split(prediction, 1), torch.split(y, 1), strict=True)
            sums = torch.stack([self._sum(*pair) for pair in pairs])
        return (sums * weights.to(sums)).sum() / max(counts(y, self.ignore_index), 1)

    def _sum(self, prediction: Tensor, y: Tensor) -> Tensor:
        n = counts(y, self.ignore_index)
        return self.loss(prediction, y).reshape(()) * n if n else prediction.sum() * 0


def counts(target: Tensor, ignore_index: int = IGNORE_INDEX) -> int:
    """Return the number of targets over which a loss is the mean.

    Of class targets (B, ...) those that are not ignored, of real-valued ones the rows.
    """
    if target.is_floating_point():
        return len(target)
    return int((target != ignore_index).sum())


def model_loss(prediction: Tensor, _target: Tensor) -> Tensor:
    """Return the loss that a model has computed itself, from targets among its inputs.

    prediction: that number, alone or once for each row of the batch, (B, 1).
    """
    return prediction.reshape(-1)[0]


def make_loss(name: Loss, ignore_index: int = IGNORE_INDEX) -> LossFunction:
    """Return the loss function of that name."""
    named = {Loss.MSE: mse, Loss.MODEL: model_loss}
    return named.get(name) or CrossEntropy(ignore_index)


def make_losses(names: Loss | Mapping[str, Loss], ignore_index: int = IGNORE_INDEX) -> Losses:
    """Return the loss functions of `settings.loss` and `settings.ignore_index`."""
    if names is Loss.MODEL:
        return {MODEL_LOSS: model_loss}
    if isinstance(names, Loss):
        return make_loss(names, ignore_index)
    return {output: make_loss(name, ignore_index) for output, name in names.items()}


# -- outputs: named by a key, a field, or out0, out1, ... in a tuple; the only one is ONLY ---------

ONLY = ""


def named_parts(output: Any, name: str = ONLY) -> list[tuple[str, Any]]:
    """Return the parts of nested tuples, lists, dicts, namedtuples and dataclasses, by name."""
    parts = parts_of(output)
    if parts is None:
        return [(name, output)]
    first = f"{name}_" if name else ""
    return [
        pair
        for key, value in parts
        for pair in named_parts(
            value, first + (str(key) if name or type(key) is not int else f"out{key}")
        )
    ]


def tensors(output: Any) -> dict[str, Tensor]:
    """Return the parts that are tensors, by name."""
    return {name: tensor for name, tensor in named_parts(output) if isinstance(tensor, Tensor)}


def losses_of(
    outputs: Sequence[str], loss: Losses, targets: Collection[str] | None
) -> dict[str, LossFunction]:
    """Return the loss of each output that has one.

    Those are the outputs that `loss` names, or else those that the stream's targets name, or else
    all. Raises GraphError for names that the model does not have.
    """
    if list(outputs) == [ONLY]:
        if isinstance(loss, Mapping):
            raise GraphError(
                f"loss names the outputs {', '.join(map(repr, loss))}, but the model returns one "
                "tensor; give one loss, or return a dict"
            )
        return {ONLY: loss}
    chosen = list(outputs)
    if isinstance(loss, Mapping):
        chosen = list(loss)
    elif targets is not None:
        chosen = list(targets)
    for name in chosen:
        if name not in outputs:
            origin = "loss" if isinstance(loss, Mapping) else "the stream's targets"
            names = ", ".join(map(repr, outputs))
            raise GraphError(f"{origin} name the output {name!r}; the model's outputs are {names}")
    return {name: loss[name] if isinstance(loss, Mapping) else loss for name in chosen}


def main_output(accuracies: Mapping[str, float | None]) -> str:
    """Return the output by which a model is compared: the last of classes, or the last."""
    classes = [name for name, accuracy in accuracies.items() if accuracy is not None]
    return (classes or list(accuracies))[-1]
