"""The section `learning`: the step size and what changes a step."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hamdist.config.sections.optimizer import OptimizerSettings
from hamdist.config.sections.section import (
    Above0,
    CourseSettings,
    Positive,
    Rate,
    Section,
    as_written,
)


class FirstStep(str, Enum):
    """Dampening of the first momentum step.

    None, as in PyTorch; or as of all later ones, which is the plain table of HL Appendix E.
    """

    UNDAMPENED = "undampened"
    DAMPENED = "dampened"


class Decay(str, Enum):
    """Fall of the step size over the run, to `learning.floor` of itself."""

    NONE = "none"
    LINEAR = "linear"
    COSINE = "cosine"


class AdaptiveSettings(Section):
    """Adam's step: each weight's rate is divided by the root of the running mean of its squared
    gradients, plus epsilon. `learning.momentum` is Adam's beta_1."""

    memory: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's beta_2."""
    epsilon: Above0 = 1e-8
    """Adam's epsilon."""


class AverageSettings(Section):
    """A moving average of a block's weights, with which a run is evaluated and exported."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    """Share of the average that stays at an update."""
    every: Positive = 1
    """Updates between two looks at the weights (`decay` is per update all the same)."""


class InputRule(str, Enum):
    """Correction of a linear layer's step by its inputs (dynamics/updates/whitening.py).

    Their mean is taken out, or their correlation as well; or Adam's axes are turned into those of
    the curvature (dynamics/updates/rotation.py).
    """

    CENTRED = "centred"
    WHITENED = "whitened"
    ROTATED = "rotated"


class RotatedSides(str, Enum):
    """Statistics that axes are turned by: of a layer's inputs, or of its costates as well."""

    INPUTS = "inputs"
    BOTH = "both"


class InputsSettings(Section):
    """Statistics of a layer's inputs."""

    rule: InputRule = InputRule.WHITENED
    """Take the inputs' mean out of the step, or their correlation as well; `rotated`: take the mean
    out, and turn the axes of Adam's step (`adaptive`) into the eigenvectors of the covariances."""
    sides: RotatedSides = RotatedSides.BOTH
    """`rotated`: the covariances of the inputs, or of inputs and costates."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the mean that stays at an update."""
    damping: Above0 = 0.1
    """Damping of the inverse (`whitened`)."""
    look: Positive = 4
    """Updates between two looks at the covariances (`whitened`, `rotated`)."""
    refresh: Positive = 50
    """Updates between two inverses (`whitened`), or two sets of axes (`rotated`), which a thread
    computes over the first half of them."""

    @property
    def rotated(self) -> bool:
        """Return True if the axes of Adam's step are turned."""
        return self.rule is InputRule.ROTATED


def _rule_alone(value: object) -> object:
    """Return `centred` as `{rule: centred}`; off as it was written."""
    if isinstance(value, str) and value != "off":
        return {"rule": value}
    return as_written(value)


InputsSetting = Annotated[InputsSettings | Literal["off"], BeforeValidator(_rule_alone)]


class ClipSettings(Section):
    """The largest norm of a gradient."""

    norm: Above0
    """The norm."""
    of: Literal["block", "network"] = "block"
    """Whose gradient: each block's by itself, or that of all blocks together (levels `backprop`,
    `pipeline`, `reversible`), as torch.nn.utils.clip_grad_norm_ has it: not local."""


class HeadsSettings(Section):
    """A readout for every block without one: only that block learns from it; it is not exported."""

    weight: Above0 | None = None
    """Of its step, beside that of the messages; not given: 0.3, at level `heads` 1."""
    readout: str | None = None
    """The readout whose targets and loss it takes; not given: the first."""
    norm: bool = True
    """With a layer norm before the linear layer."""


def _number_alone(name: str) -> BeforeValidator:
    """Return a validator that makes `{name: 0.99}` of 0.99, and leaves off as it was written."""

    def mapping(value: object) -> object:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {name: value} if number else as_written(value)

    return BeforeValidator(mapping)


Averaging = Annotated[AverageSettings | Literal["off"], _number_alone("decay")]


def _name_alone(value: object) -> object:
    """`adamw` as `{name: adamw}`; off as none."""
    if value is False or value == "off":
        return None
    return {"name": value} if isinstance(value, str) else value


class BlockLearningSettings(Section):
    """Settings of one block that differ from those of all blocks."""

    lr: Rate | None = None
    """Step size."""
    average: Averaging | None = None
    """Moving average of the weights."""
    clip: Annotated[Above0 | Literal["off"], BeforeValidator(as_written)] | None = None
    """Largest norm of the gradient."""
    heads: Annotated[Above0 | Literal["off"], BeforeValidator(as_written)] | None = None
    """Weight of the block's own readout, or off."""
    inputs: InputsSetting | None = None
    """Statistics of the inputs."""


class LearningSettings(Section):
    """The step size and what changes a step, in the words of gradient descent (HL Appendix E)."""

    lr: Rate = 0.1
    """Step size."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """As torch.optim.SGD has it; with `adaptive` Adam's beta_1."""
    dampening: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the momentum, as torch.optim.SGD has it."""
    first_step: FirstStep = FirstStep.UNDAMPENED
    """`undampened`: the first momentum step as in PyTorch; `dampened`: as in the plain table of HL
    Appendix E."""
    decay: Decay = Decay.NONE
    """How the step size falls over the run (needs `steps`)."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of lr that a decay falls to."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Samples over which the step size first rises."""
    weight_decay: Rate = 0.0
    """As torch.optim.SGD has it; with `adaptive` as AdamW."""
    course: CourseSettings | None = None
    """A factor of lr by sample (of beta, where that is given), besides."""
    adaptive: AdaptiveSettings | None = None
    """Adam's step; not given: one rate for all of a block's weights."""
    optimizer: Annotated[OptimizerSettings | None, BeforeValidator(_name_alone)] = None
    """One of torch.optim by its name, `FILE.py:NAME` of another one, or a mapping with `name` and
    its arguments; it moves the weights, at levels whose weights move when a message arrives.
    momentum, dampening, weight_decay and adaptive are then among its arguments; lr, where it is
    not given, is torch's."""
    average: Averaging = "off"
    """Moving average of each block's weights for evaluation and export: its decay, or a mapping."""
    clip: Annotated[ClipSettings | Literal["off"], _number_alone("norm")] = "off"
    """Largest norm of a block's gradient, or a mapping."""
    heads: HeadsSettings | None = None
    """A readout of its own for every block, beside the messages."""
    inputs: InputsSetting = "off"
    """Steps that do not depend on the mean (`centred`) or the correlation (`whitened`) of a layer's
    inputs; `rotated`: Adam's steps along the axes of inputs and costates."""
    rules: dict[str, str | dict[str, Any]] = {}
    """Rules of learning other than the level's, by block (patterns as in a shell, names first): the
    name of a built-in one, `FILE.py:NAME` of a `hamdist.Rule`, whose code then runs, or a mapping
    with `name` and the arguments of the class."""
    blocks: dict[str, BlockLearningSettings] = {}
    """What single blocks have otherwise, by name (patterns as in a shell, names first)."""

    @property
    def network_clip(self) -> float | None:
        """Return the largest norm of the gradient of all blocks together, if there is one."""
        clip = self.clip
        return clip.norm if isinstance(clip, ClipSettings) and clip.of == "network" else None

    @property
    def any_heads(self) -> bool:
        """Return True if a block has a readout of its own."""
        return self.heads is not None or any(
            b.heads not in (None, "off") for b in self.blocks.values()
        )

    @property
    def any_inputs(self) -> bool:
        """Return True if the inputs of a block are centred or whitened."""
        return self.inputs != "off" or any(
            b.inputs not in (None, "off") for b in self.blocks.values()
        )

    @model_validator(mode="after")
    def _adam_is_not_dampened(self) -> LearningSettings:
        if self.adaptive is not None and self.dampening:
            raise ValueError(
                f"'dampening' is {self.dampening:g} with 'adaptive', whose steps do not depend on "
                "it: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_decides(self) -> LearningSettings:
        if self.optimizer is None:
            return self
        names = ("momentum", "dampening", "weight_decay", "adaptive", "first_step")
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"'{name}' beside 'optimizer', whose steps do not depend on it: give the "
                    f"optimiser its own arguments (optimizer: {{name: {self.optimizer.name}, ...}})"
                )
        lr, lr_is_set = self.optimizer.lr, "lr" in self.model_fields_set
        if lr is not None and lr_is_set and lr != self.lr:
            raise ValueError(f"'lr' is {self.lr:g} and 'optimizer.lr' {lr:g}: give one of them")
        if self.optimizer.is_own and lr is None and not lr_is_set:
            raise ValueError(f"optimizer {self.optimizer.name!r}: give its step size, lr")
        if not lr_is_set:  # (a dump of all fields has it then)
            self.__dict__["lr"] = self.optimizer.default_lr if lr is None else lr
        return self
