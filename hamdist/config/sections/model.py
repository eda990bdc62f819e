"""The section `model`: which network, and how large."""

from __future__ import annotations

from enum import Enum

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
    TRACKER = "tracker"
    RESNET = "resnet"
    CONVNET = "convnet"
    LENET = "lenet"
    VIT = "vit"
    GPT = "gpt"
    LSTM_LAYERS = "lstm-layers"


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
    """Layers with weights (of rnn, gru, lstm: cells; of resnet, convnet, vit, gpt, lstm-layers:
    residual layers). A `lenet` has its own of both."""
    tau: Above0 = 0.1
    """Step of integration of `midpoint`."""
    bias: bool = True
    """Whether the neurons of `tracker` have a bias."""
    heads: Positive = 4
    """Attention heads of `vit` and `gpt`."""
    patch: Positive = 7
    """Side of a patch of `vit`."""
