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
    VIT = "vit"
    GPT = "gpt"
    LSTM_LAYERS = "lstm-layers"


class ModelSettings(Section):
    """kind, width of the hidden layers, depth: number of layers that have weights (of rnn, gru and
    lstm: of cells; of resnet, convnet, vit, gpt, lstm-layers: of residual layers). tau: step of
    integration of `midpoint`. width, bias of `tracker`: its neurons, and whether they have one.
    width of `resnet` and `convnet`: its channels before they double. stabilise: normed inputs and
    scaled residuals for its layers (dynamics/modules/prenorm.py), of a model of one's own, too.
    heads: of vit and gpt; patch: its side, of vit."""

    kind: ModelKind = ModelKind.MLP
    stabilise: bool = False
    width: Positive = 128
    depth: Positive = 5
    tau: Above0 = 0.1
    bias: bool = True
    heads: Positive = 4
    patch: Positive = 7
