"""The section `learning.optimizer`: an optimiser by name, with its own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, model_validator

from hamdist.config.sections.section import Rate, Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

VECTORS = "vectors"  # a group: all weights of fewer than two dimensions
MUON = "muon"
_NO_STEP_ALONE = ("optimizer", "lbfgs", "sparseadam")  # need a closure, or sparse gradients
_NOT_OURS = ("params", "differentiable", "capturable")  # of a constructor
_REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError)


class OptimizerSettings(Section):
    """An optimiser; besides these fields it takes the arguments of its class."""

    model_config = ConfigDict(extra="allow")

    name: str
    """The class of torch.optim in lower case (`adamw`); of `muon`, weights that are no matrices go
    to AdamW. Or `FILE.py:NAME` or `package.module:NAME` of another class, or of a function of
    parameters and arguments, whose code then runs; it needs an `lr`."""
    lr: Rate | None = None
    """Step size, instead of learning.lr."""
    groups: dict[str, dict[str, Any]] = {}
    """By pattern of weights' names (as in a shell; `vectors`: biases, scales, all weights of fewer
    than two dimensions), arguments that these have otherwise; the first that fits holds."""
    rest: dict[str, Any] = {}
    """Of `muon`, the arguments of its AdamW (lr and weight_decay: muon's, where given)."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_in_text(cls, raw: Any) -> Any:
        """Convert texts such as 1e-3, which YAML takes for a text, to numbers."""
        if not isinstance(raw, Mapping):
            return raw
        return {k: v if k in ("name", "lr") else _with_numbers(v) for k, v in raw.items()}

    @model_validator(mode="after")
    def _torch_takes_them(self) -> OptimizerSettings:
        if self.rest and self.name != MUON:
            raise ValueError(f"'rest' belongs to name 'muon', not {self.name!r}: leave it out")
        if self.is_own:
            return self
        of_class = arguments(self.name)
        _check_known(self.options, of_class, self.name, "")
        of_groups = of_class
        if self.name == MUON:
            _check_known(self.rest, arguments("adamw"), "adamw", "rest.")
            of_groups = [a for a in of_class if a in arguments("adamw")]
        for pattern, options in self.groups.items():
            _check_known(options, of_groups, self.name, f"groups.{pattern}.")
        self._try()
        return self

    def _try(self) -> None:
        """Raise ValueError for values that torch refuses."""
        from torch import nn, zeros

        tries = [("", self.name, self.options), ("rest: ", "adamw", self.rest)]
        tries += [
            (f"groups.{p}: ", self.name, {**self.options, **g}) for p, g in self.groups.items()
        ]
        for where, name, options in tries:
            try:
                optimizer_class(name)([nn.Parameter(zeros(2, 2))], **options)
            except _REFUSALS as error:
                raise ValueError(
                    f"{where}torch.optim.{optimizer_class(name).__name__} does not take "
                    f"{options}: {type(error).__name__}: {error}"
                ) from None

    @property
    def is_own(self) -> bool:
        """Return True for a class or a function that is not torch's: it is tried when a run is
        planned."""
        return ":" in self.name

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of the class but lr."""
        return dict(self.model_extra or {})

    @property
    def default_lr(self) -> float:
        """Return the step size that torch takes where none is given."""
        return float(inspect.signature(optimizer_class(self.name)).parameters["lr"].default)


def _with_numbers(value: Any) -> Any:
    """Return `value` with texts that are numbers as numbers, lists as tuples, at any depth."""
    if isinstance(value, Mapping):
        return {k: _with_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_with_numbers(v) for v in value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def known_optimizers() -> dict[str, type[Optimizer]]:
    """Return the classes of torch.optim that move weights by their gradients alone, by name."""
    from torch import optim

    classes = {name.lower(): c for name, c in vars(optim).items() if inspect.isclass(c)}
    return {
        name: c
        for name, c in sorted(classes.items())
        if issubclass(c, optim.Optimizer) and name not in _NO_STEP_ALONE
    }


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class called `name`. Raises ValueError if this torch has none."""
    optimizers = known_optimizers()
    if name not in optimizers:
        from torch import __version__

        since = "; torch has Muon from 2.9 on" if name == MUON else ""
        raise ValueError(
            f"torch {__version__} has no optimiser {name!r} that works here{since}; known: "
            f"{', '.join(optimizers)} (any other: FILE.py:NAME, or train(..., optimizer=FUNCTION))"
        )
    return optimizers[name]


def arguments(name: str) -> list[str]:
    """Return the arguments of an optimiser that settings may give."""
    parameters = inspect.signature(optimizer_class(name)).parameters
    return [argument for argument in parameters if argument not in _NOT_OURS]


def _check_known(options: Mapping[str, Any], names: Collection[str], name: str, where: str) -> None:
    for argument in options:
        if argument not in names:
            raise ValueError(
                f"{where}{argument}: no such argument of torch.optim."
                f"{optimizer_class(name).__name__} that settings can give; known: "
                f"{', '.join(names)}"
            )
