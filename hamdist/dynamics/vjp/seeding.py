"""Random numbers of a block: a generator of its own, so that all engines draw the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hamdist.dynamics.objective.losses import CrossEntropy, LossFunction, Weighted, mse
from hamdist.dynamics.saved_state.stateful import Stateful, check_names, plain_parts
from hamdist.dynamics.tracing.traced_module import TracedModule
from hamdist.dynamics.user_modules.copies import loss_copy
from hamdist.dynamics.user_modules.generator import TURN
from hamdist.dynamics.user_modules.python_state import holders_in
from hamdist.errors import SnapshotError

_RANDOM = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


class OwnGenerator(Stateful):
    """Context in which torch's random numbers come from a separate generator.

    It continues where it stopped, and leaves the generators outside unchanged. device: of the
    numbers; a GPU has a separate generator, too.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._inside = torch.Generator().manual_seed(seed).get_state()
        self._outside = self._inside
        self._gpu = device if device is not None and device.type == "cuda" else None
        if self._gpu is not None:
            self._inside_gpu = torch.Generator(self._gpu).manual_seed(seed).get_state()
            self._outside_gpu = self._inside_gpu

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator; on a GPU that of its generator, too."""
        return {"cpu": self._inside, "gpu": None if self._gpu is None else self._inside_gpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_names(type(self).__name__, state, ("cpu", "gpu"))
        try:
            torch.Generator().set_state(state["cpu"])
        except (RuntimeError, TypeError) as error:
            raise SnapshotError(f"the state of a random generator is none: {error}") from None
        self._inside = state["cpu"]
        if self._gpu is not None and state["gpu"] is not None:
            self._inside_gpu = state["gpu"]

    def __enter__(self) -> None:
        TURN.acquire()
        self._outside = torch.get_rng_state()
        torch.set_rng_state(self._inside)
        if self._gpu is not None:
            self._outside_gpu = torch.cuda.get_rng_state(self._gpu)
            torch.cuda.set_rng_state(self._inside_gpu, self._gpu)

    def __exit__(self, *_: object) -> None:
        self._inside = torch.get_rng_state()
        torch.set_rng_state(self._outside)
        if self._gpu is not None:
            self._inside_gpu = torch.cuda.get_rng_state(self._gpu)
            torch.cuda.set_rng_state(self._outside_gpu, self._gpu)
        TURN.release()


def seeded_loss(loss: LossFunction, seed: int, device: torch.device | None = None) -> LossFunction:
    """Return a copy of a user's loss, which may draw random numbers and keep state of its own, so
    that every run and every readout begins with the same, in all engines.
    """
    if loss is mse or isinstance(loss, CrossEntropy):
        return loss
    own = loss_copy(loss)
    inner = own.loss if isinstance(own, Weighted) else own
    holders = holders_in(inner)
    made = [dict(vars(part)) for part in holders]
    return SeededLoss(own, OwnGenerator(seed, device), holders, made)


NO_MEMORY: dict[str, Any] = {"random": None, "buffers": {}, "attributes": []}


@dataclass(frozen=True, slots=True)
class SeededLoss:
    """A loss with a random generator of its own. holders: the modules, and objects of a user's
    classes, that it is or refers to, which may keep state; made: their attributes at first."""

    loss: LossFunction
    generator: OwnGenerator
    holders: Sequence[Any]
    made: Sequence[Mapping[str, Any]]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        with self.generator:
            return self.loss(prediction, target)

    def _buffers(self) -> dict[str, Tensor]:
        modules = [part for part in self.holders if isinstance(part, nn.Module)]
        parts = enumerate(modules)
        return {f"{i}.{name}": b for i, module in parts for name, b in module.named_buffers()}

    def memory(self) -> dict[str, Any]:
        """Return random numbers, buffers and plain attributes, in tensors of their own."""
        buffers = {name: b.clone() for name, b in self._buffers().items()}
        pairs = zip(self.holders, self.made, strict=True)
        attributes = [copy.deepcopy(plain_parts(vars(part), made)) for part, made in pairs]
        return {
            "random": self.generator.state_dict(),
            "buffers": buffers,
            "attributes": attributes,
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Go on from what `memory` returned."""
        self.generator.load_state_dict(memory["random"])
        for part, values in zip(self.holders, memory["attributes"], strict=False):
            vars(part).update(copy.deepcopy(values))
        for name, buffer in self._buffers().items():
            buffer.copy_(memory["buffers"].get(name, buffer))


def block_seed(run_seed: int, name: str) -> int:
    """Return the seed of a block's generator: a function of the run's seed and its name alone."""
    digest = hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


TORCHS = ("torch.nn.modules.",)


def foreign(module: nn.Module, known: tuple[str, ...] = TORCHS) -> bool:
    """Return True if a part is not torch's own, so that it may do anything to its input.

    An invertible map counts as known. known: how the names of modules begin whose classes are.
    """
    return any(
        m.hamdist_whole if isinstance(m, TracedModule) else not type(m).__module__.startswith(known)
        for m in module.modules()
    )


def draws(module: nn.Module) -> bool:
    """Return True if a forward pass may draw random numbers.

    Torch's own layers without dropout do not; a user's module may.
    """
    return foreign(module) or bool(random_parts(module))


def random_parts(module: nn.Module) -> list[nn.Module]:
    """Return the parts of `module` that draw random numbers: torch's layers, invertible maps."""
    parts = []
    for part in module.modules():
        rate = getattr(part, "dropout", 0.0)  # a number (attention, recurrent nets), or a module
        chance = isinstance(part, TracedModule) and part.hamdist_draws
        if chance or isinstance(part, _RANDOM) or (isinstance(rate, (int, float)) and rate):
            parts.append(part)
    return parts
