"""The section `learning`: the step size and what changes a step."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

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
    """Whether the first momentum step is dampened: not, as in PyTorch; or as all later ones, which
    is the plain table of HL Appendix E."""

    UNDAMPENED = "undampened"
    DAMPENED = "dampened"


class Decay(str, Enum):
    """How the step size falls over the run, to `learning.floor` of itself."""

    NONE = "none"
    LINEAR = "linear"
    COSINE = "cosine"


class AdaptiveSettings(Section):
    """Adam's step: each weight's beta is divided by the root of the running mean of its squared
    gradients (of which it keeps `memory` from update to update), plus epsilon. learning.momentum
    is Adam's beta_1, memory its beta_2."""

    memory: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Above0 = 1e-8


class AverageSettings(Section):
    """A moving average of a block's own weights, with which a run is evaluated and exported.
    decay: the share of it that stays when the weights come in; every: updates between two looks at
    the weights (`decay` is per update, whatever `every` is)."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    every: Positive = 1


class InputRule(str, Enum):
    """What a linear layer's step does about its inputs: takes their mean out, or their correlation
    as well (dynamics/updates/whitening.py)."""

    CENTRED = "centred"
    WHITENED = "whitened"


class InputsSettings(Section):
    """Statistics of a layer's own inputs. memory: of their mean, from update to update; of rule
    'whitened', damping: of the inverse; look: updates between two looks at the covariance; refresh:
    between two inverses."""

    rule: InputRule = InputRule.WHITENED
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.99
    damping: Above0 = 0.1
    look: Positive = 4
    refresh: Positive = 50


def _rule_alone(value: object) -> object:
    """`centred` as `{rule: centred}`; off as it was written."""
    if isinstance(value, str) and value != "off":
        return {"rule": value}
    return as_written(value)


InputsSetting = Annotated[InputsSettings | Literal["off"], BeforeValidator(_rule_alone)]


class HeadsSettings(Section):
    """A readout of its own for every block without one, which teaches that block alone: a layer
    norm and a linear layer, which are no part of the exported model. weight: of its step, beside
    that of the messages (not given: 0.3; at level 'heads', where there are none, 1). readout: the
    one whose targets and loss it takes (not given: the first). norm: with the layer norm."""

    weight: Above0 | None = None
    readout: str | None = None
    norm: bool = True


def _decay_alone(value: object) -> object:
    """`0.99` as `{decay: 0.99}`; off as it was written."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"decay": value}
    return as_written(value)


Averaging = Annotated[AverageSettings | Literal["off"], BeforeValidator(_decay_alone)]


def _name_alone(value: object) -> object:
    """`adamw` as `{name: adamw}`; off as none."""
    if value is False or value == "off":
        return None
    return {"name": value} if isinstance(value, str) else value


class BlockLearningSettings(Section):
    """What one block has otherwise; what is not given is as for all blocks."""

    lr: Rate | None = None
    average: Averaging | None = None
    clip: Annotated[Above0 | Literal["off"], BeforeValidator(as_written)] | None = None
    heads: Annotated[Above0 | Literal["off"], BeforeValidator(as_written)] | None = None
    inputs: InputsSetting | None = None


class LearningSettings(Section):
    """The step size and its course, in the words of gradient descent (HL Appendix E). decay: over
    the run, to the share `floor` of lr; warmup: samples over which it first rises; course: a factor
    of lr by sample (of beta, where that is given), besides (rates.py). weight_decay: as
    torch.optim.SGD has it, r_w = weight_decay / tau; with adaptive as AdamW has it. adaptive:
    not given: one beta for all of a block's weights. optimizer: of torch.optim, which moves the
    weights instead (levels whose weights move when a message arrives); momentum, dampening,
    weight_decay and adaptive are then among its arguments, and lr, where it is not given, is
    torch's. average: of each block's weights, for
    evaluation and export; clip: the most that the norm of a block's gradient may be; heads: the
    blocks' own readouts; inputs: steps that do not depend on the mean, or on the correlation, of a
    linear layer's inputs. blocks: by name (patterns as in a shell, names first), what single blocks
    have otherwise (`heads` is then the weight, or off)."""

    lr: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dampening: Annotated[float, Field(ge=0, lt=1)] = 0.0
    first_step: FirstStep = FirstStep.UNDAMPENED
    decay: Decay = Decay.NONE
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Rate = 0.0
    course: CourseSettings | None = None
    adaptive: AdaptiveSettings | None = None
    optimizer: Annotated[OptimizerSettings | None, BeforeValidator(_name_alone)] = None
    average: Averaging = "off"
    clip: Annotated[Above0 | Literal["off"], BeforeValidator(as_written)] = "off"
    heads: HeadsSettings | None = None
    inputs: InputsSetting = "off"
    blocks: dict[str, BlockLearningSettings] = {}

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
        own = ("momentum", "dampening", "weight_decay", "adaptive", "first_step")
        for name in own:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"'{name}' beside 'optimizer', whose steps do not depend on it: give the "
                    f"optimiser its own arguments (optimizer: {{name: {self.optimizer.name}, ...}})"
                )
        lr, given = self.optimizer.lr, "lr" in self.model_fields_set
        if lr is not None and given and lr != self.lr:
            raise ValueError(f"'lr' is {self.lr:g} and 'optimizer.lr' {lr:g}: give one of them")
        if not given:  # (a dump of all fields has it then)
            self.__dict__["lr"] = self.optimizer.default_lr if lr is None else lr
        return self
