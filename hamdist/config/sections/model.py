"""The section `model`: which network, and how large."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from hamdist.config.sections.section import Above0, Positive, Section


class ModelKind(str, Enum):
    """Models that settings can name; `--model file.py:function` and the API take any."""

    MLP = "mlp"
    RESIDUAL_MLP = "residual-mlp"
    REVERSIBLE_MLP = "reversible-mlp"
    MIDPOINT = "midpoint"
    RNN = "rnn"
    GRU = "gru"
    LSTM = "lstm"
    LEAKY = "leaky"
    SPIKING = "spiking"
    DIAGONAL = "diagonal"
    TRACKER = "tracker"
    RESNET = "resnet"
    CONVNET = "convnet"
    LENET = "lenet"
    VIT = "vit"
    GPT = "gpt"
    LSTM_LAYERS = "lstm-layers"


RESIDUAL = (ModelKind.RESIDUAL_MLP, ModelKind.VIT, ModelKind.GPT, ModelKind.LSTM_LAYERS)


class ModelSettings(Section):
    """The shipped network."""

    kind: ModelKind = ModelKind.MLP
    """Which network."""
    stabilise: bool = False
    """Normed inputs and scaled residuals for the model's layers, of a model of one's own, too."""
    width: Positive = 128
    """Of the hidden layers; of `resnet` and `convnet` the channels before they double; of `tracker`
    its neurons."""
    depth: Positive = 5
    """Layers with weights (of recurrent kinds: cells; of resnet, convnet, vit, gpt, lstm-layers:
    residual layers). A `lenet` has its own of both."""
    subspace: Positive | dict[Annotated[str, BeforeValidator(str)], Positive] | None = None
    """Rank of the fixed subspace of the last dimension in which every layer but the last ends, so
    that `engine.compress` sends fewer numbers; or ranks by layer, as `{layer1: 24}` (of
    `residual-mlp` `{1: 24}`), of those that end in one."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of a state that `leaky` and `spiking` units keep from token to token."""
    threshold: Above0 = 0.6
    """Above which `spiking` units spike."""
    tau: Above0 = 0.1
    """Step of integration of `midpoint`."""
    bias: bool = True
    """Whether the neurons of `tracker` have a bias."""
    heads: Positive = 4
    """Attention heads of `vit` and `gpt`."""
    patch: Positive = 7
    """Side of a patch of `vit`."""

    @model_validator(mode="after")
    def _residual_stream(self) -> ModelSettings:
        ranks = self.subspace.values() if isinstance(self.subspace, dict) else [self.subspace or 1]
        fits = self.kind in RESIDUAL and 0 < max(ranks, default=0) <= self.width
        if self.subspace is not None and not fits:
            raise ValueError(
                f"'subspace' is {self.subspace} with kind {self.kind.value!r} of width "
                f"{self.width}: give a rank up to the width of a residual stream, as "
                f"{', '.join(kind.value for kind in RESIDUAL)} have one"
            )
        return self
