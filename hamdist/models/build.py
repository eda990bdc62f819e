"""Models that settings can name, and models that a user's own function makes.

    mlp            Linear, ReLU, Linear, ReLU, ..., Linear
    residual-mlp   block 0       h = relu(u W + b)
                   blocks 1..    h' = h + alpha relu(LN(h) W + b),  alpha = 1/sqrt(L)
                   last block    y = LN(h) W + b
    reversible-mlp block 0       (a, b) = relu(u W + b), a pair of states
                   blocks 1..    (a, b) <- (b, a + alpha relu(LN(b) W + b)),  alpha = 1/sqrt(L)
                   last block    y = LN(a, b) W + b
    midpoint       block 0       h_0 = relu(u W + b)
                   block 1       (h_0, h_1),  h_1 = h_0 + tau f_0(h_0),  f_k = tanh(h W_k + b_k)
                   blocks 2..    (h_k, h_{k+1}),  h_{k+1} = h_{k-1} + 2 tau f_k(h_k)
                   last block    y = LN(h_{N-1}, h_N) W + b

    rnn, gru, lstm, leaky, spiking, diagonal (dynamics/modules/recurrent.py)
                   embedding     where u holds tokens: (B,) to (B, H)
                   cell0 ...     nn.RNNCell (tanh), nn.GRUCell, nn.LSTMCell, LeakyCell without and
                                 with spikes, DiagonalCell, over one another
                   readout       y = h W + b of what others read of the last cell's state

    resnet, convnet, vit, gpt, lstm-layers: networks.py

    tracker        fully connected neurons, the first of which follows the target: no input
                   (models/tracker.py)

LN is a layer norm without affine weights, eps = 1e-3. W ~ N(0, 2/fan_in), in the last layer
N(0, 1/fan_in); b = 0. L (`depth`) counts the layers that have weights. Of recurrent models it
counts the cells, and the weights are drawn as torch does it.

B: batch, I: inputs, H: width, O: outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hamdist.config import Loss, ModelKind, ModelSettings, PartitionSettings, Settings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Combine, Graph
from hamdist.dynamics.modules.prenorm import layer_norm, linear_of
from hamdist.dynamics.modules.recurrent import DiagonalCell, LeakyCell, Reads, RecurrentCell
from hamdist.dynamics.modules.reversible import Coupling, MidpointStart
from hamdist.dynamics.modules.subspace import in_subspaces
from hamdist.dynamics.objective.losses import LossFunction, make_loss
from hamdist.dynamics.user_modules.copies import in_type
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import SettingsError
from hamdist.loading import call_function, check_call, load_function, title
from hamdist.models.networks import NETWORKS, make_network
from hamdist.models.tracker import tracker
from hamdist.streams.sample import SampleSpec

Cell: TypeAlias = RecurrentCell | LeakyCell | DiagonalCell

CELLS: dict[ModelKind, Callable[[int, int, ModelSettings], Cell]] = {
    ModelKind.RNN: lambda i, n, _: RecurrentCell(nn.RNNCell(i, n, dtype=torch.float64)),
    ModelKind.GRU: lambda i, n, _: RecurrentCell(nn.GRUCell(i, n, dtype=torch.float64)),
    ModelKind.LSTM: lambda i, n, _: RecurrentCell(nn.LSTMCell(i, n, dtype=torch.float64)),
    ModelKind.LEAKY: lambda i, n, s: LeakyCell(i, n, s.decay),
    ModelKind.SPIKING: lambda i, n, s: LeakyCell(i, n, s.decay, s.threshold),
    ModelKind.DIAGONAL: lambda i, n, _: DiagonalCell(i, n),
}

ModelFactory: TypeAlias = Callable[[], object]
MODEL_OPTION = "--model"
BASELINE_OPTION = "--baseline-model"


class InputBlock(nn.Module):
    """relu(u W + b). u: (B, ...) flattened to (B, I); returns (B, H)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, u: Tensor) -> Tensor:
        return torch.relu(self.linear(u.flatten(1)))


class Branch(nn.Module):
    """The residual branch alpha relu(LN(h) W + b). h: (B, H); returns (B, H)."""

    def __init__(self, linear: nn.Linear, alpha: float) -> None:
        super().__init__()
        self.norm = layer_norm(linear.in_features)
        self.linear = linear
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        return self.alpha * torch.relu(self.linear(self.norm(h)))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class ResidualBlock(Branch):
    """h + alpha relu(LN(h) W + b). h: (B, H); returns (B, H)."""

    def forward(self, h: Tensor) -> Tensor:
        # (super().forward would not be proved by purity.py: no closed form, and other bits)
        return h + self.alpha * torch.relu(self.linear(self.norm(h)))


class OutputBlock(nn.Module):
    """LN(h) W + b. h: (B, H); returns (B, O)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = layer_norm(linear.in_features)
        self.linear = linear

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(h))
        return logits


def make_model(
    settings: ModelSettings, spec: SampleSpec, *, seed: int, dtype: torch.dtype
) -> nn.Sequential:
    """Return the model that `settings` names, for samples of `spec`.

    One child per layer (`mlp`: a ReLU behind each), from (B, ...) inputs to (B, O), O = classes or
    the target's features. `seed` alone decides the weights, up to rounding to `dtype`; torch's
    global generator is neither read nor moved. Raises SettingsError where model and stream cannot
    fit, and for a kind that `make_recurrent` or `make_tracker` makes.
    """
    if settings.kind in CELLS:
        raise SettingsError(
            f"model.kind: {settings.kind.value} has a memory from sample to sample, which only "
            "`hamdist run` at level 'bptt' trains; choose another kind"
        )
    if settings.kind is ModelKind.TRACKER:
        raise SettingsError(
            "model.kind: a tracker has no input and no layers, which only `hamdist run` at level "
            "'local' trains; choose another kind"
        )
    if settings.subspace is not None:
        whole = settings.model_copy(update={"subspace": None})
        model = make_model(whole, spec, seed=seed, dtype=dtype)
        return in_subspaces(model, settings.width, settings.subspace, seed)
    if settings.kind in NETWORKS:
        outputs = _outputs(settings, spec)
        return make_network(settings, spec, outputs, seed=seed, dtype=dtype)
    inputs, outputs = _features(settings, spec)
    _check_depth(settings)
    width, hidden = settings.width, [settings.width] * (settings.depth - 1)
    if settings.kind in _PAIRED:
        first = 2 * width if settings.kind is ModelKind.REVERSIBLE_MLP else width
        shapes = [(inputs, first), *[(width, width)] * (settings.depth - 2), (2 * width, outputs)]
        return _reversible(_linears(shapes, seed, dtype), settings)
    layers = _linears(list(itertools.pairwise([inputs, *hidden, outputs])), seed, dtype)
    if settings.kind is ModelKind.RESIDUAL_MLP:
        return _residual_mlp(layers)
    return _mlp(layers, flatten=len(spec.u_shape) != 2)


_PAIRED = (ModelKind.REVERSIBLE_MLP, ModelKind.MIDPOINT)
_LEAST_DEPTH = {
    ModelKind.RESIDUAL_MLP: (2, "input and output"),
    ModelKind.REVERSIBLE_MLP: (3, "input, output and a coupling"),
    ModelKind.MIDPOINT: (3, "input, output and a step"),
}


def _check_depth(settings: ModelSettings) -> None:
    least, parts = _LEAST_DEPTH.get(settings.kind, (1, ""))
    if settings.depth < least:
        raise SettingsError(
            f"model.depth: {settings.kind.value} needs at least {least} layers, {parts} "
            f"(received {settings.depth})"
        )


def make_recurrent(
    settings: ModelSettings, spec: SampleSpec, loss: LossFunction, *, seed: int, dtype: torch.dtype
) -> Graph:
    """Return the graph of cells that `settings` names (rnn, gru, lstm, leaky, spiking, diagonal).

    It takes tokens (B,) or inputs (B, I) of `spec`; its readout predicts (B, O) at every token.
    `seed` alone decides the weights, as in `make_model`. Raises SettingsError where model and
    stream cannot fit.
    """
    below, inputs, outputs = INPUT, _inputs(settings, spec), _outputs(settings, spec)
    width = settings.width
    blocks = []
    with generator_kept(seed):
        if spec.tokens is not None:
            embedding = nn.Embedding(spec.tokens, width, dtype=torch.float64)
            blocks.append(BlockSpec("embedding", embedding, (INPUT,)))
            below, inputs = "embedding", width
        for i in range(settings.depth):
            cell = CELLS[settings.kind](inputs, width, settings)
            part = getattr(cell, "hidden", None)
            module = cell if i == 0 else Reads(cell, part, None)
            name, shape = f"cell{i}", (cell.size,)
            blocks.append(
                BlockSpec(name, module, (below, name), combine=Combine.ARGUMENTS, shape=shape)
            )
            below, inputs = name, width if part else cell.size
        readout = Reads(nn.Linear(inputs, outputs, dtype=torch.float64), part)
        blocks.append(BlockSpec("readout", readout, (below,), loss=loss))
    for block in blocks:
        block.module.to(dtype)
    return Graph(blocks)


def _inputs(settings: ModelSettings, spec: SampleSpec) -> int:
    """Return I, the inputs of the first cell; 0 for tokens."""
    kind = settings.kind.value
    if spec.tokens is not None and len(spec.u_shape) == 1:
        return 0
    if not spec.u_dtype.is_floating_point:
        raise SettingsError(
            f"model.kind: {kind} takes real-valued inputs (B, I), or tokens (B,) of which the "
            f"stream says how many there are (SampleSpec.tokens); it yields {spec.u_dtype} of "
            f"shape {spec.u_shape}; use the source 'sequences' with sequences.view 'tokens', or "
            "build a Graph"
        )
    if len(spec.u_shape) != 2:
        raise SettingsError(
            f"model.kind: {kind} takes inputs (B, I), the stream yields {spec.u_shape}; build a "
            "Graph whose first block makes (B, I) of them"
        )
    return spec.u_shape[1]


def _features(settings: ModelSettings, spec: SampleSpec) -> tuple[int, int]:
    """Return I and O."""
    kind = settings.kind.value
    if not spec.u_dtype.is_floating_point:
        raise SettingsError(
            f"model.kind: {kind} takes real-valued inputs, the stream yields {spec.u_dtype}; "
            "give a model of your own (--model file.py:function)"
        )
    return math.prod(spec.u_shape[1:]), _outputs(settings, spec)


def _outputs(settings: ModelSettings, spec: SampleSpec) -> int:
    """Return O."""
    kind = settings.kind.value
    if spec.targets is not None:
        raise SettingsError(
            f"model.kind: {kind} has one output, the stream has targets by readout "
            f"({', '.join(map(repr, spec.targets))}); build a Graph with a readout for each"
        )
    if spec.classes is not None:
        return spec.classes
    if not spec.y_dtype.is_floating_point:
        raise SettingsError(
            f"model.kind: {kind} has an output for every class, and the stream's targets "
            f"({spec.y_dtype}) do not say how many there are: give the stream classes=, or a model "
            "of your own (--model file.py:function)"
        )
    if len(spec.y_shape) != 2:
        raise SettingsError(
            f"model.kind: {kind} predicts values of shape (B, O), the stream's targets have shape "
            f"{spec.y_shape}; give a model of your own (--model file.py:function)"
        )
    return spec.y_shape[1]


def _linears(shapes: list[tuple[int, int]], seed: int, dtype: torch.dtype) -> list[nn.Linear]:
    """Return linear layers of (fan_in, fan_out), drawn in float64 in their order."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i, (fan_in, fan_out) in enumerate(shapes):
        gain = 1.0 if i == len(shapes) - 1 else 2.0
        draw = torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
        layers.append(linear_of(draw * math.sqrt(gain / fan_in), dtype))
    return layers


def _mlp(layers: list[nn.Linear], *, flatten: bool) -> nn.Sequential:
    children: list[nn.Module] = [nn.Flatten()] if flatten else []
    for layer in layers[:-1]:
        children += [layer, nn.ReLU()]
    return nn.Sequential(*children, layers[-1])


def _residual_mlp(layers: list[nn.Linear]) -> nn.Sequential:
    alpha = 1 / math.sqrt(len(layers))
    hidden = [ResidualBlock(layer, alpha) for layer in layers[1:-1]]
    return nn.Sequential(InputBlock(layers[0]), *hidden, OutputBlock(layers[-1]))


def _reversible(layers: list[nn.Linear], settings: ModelSettings) -> nn.Sequential:
    hidden: list[nn.Module] = []
    for layer in layers[1:-1]:
        if settings.kind is ModelKind.REVERSIBLE_MLP:
            hidden.append(Coupling(Branch(layer, 1 / math.sqrt(len(layers)))))
            continue
        f = nn.Sequential(layer, nn.Tanh())
        hidden.append(Coupling(f, 2 * settings.tau) if hidden else MidpointStart(f, settings.tau))
    return nn.Sequential(InputBlock(layers[0]), *hidden, OutputBlock(layers[-1]))


def make_tracker(
    settings: ModelSettings,
    spec: SampleSpec,
    partition: PartitionSettings,
    *,
    seed: int,
    dtype: torch.dtype,
) -> Graph:
    """Return a tracker of `width` neurons in `partition.blocks` slices (1 unless given).

    Raises SettingsError where it cannot be cut so, and for targets that are not one real value.
    """
    if spec.targets is not None or spec.classes is not None or spec.y_shape != (spec.batch, 1):
        raise SettingsError(
            "model.kind: a tracker follows one real value, which these targets are not; use "
            "stream.source signal"
        )
    n, blocks = settings.width, partition.blocks or 1
    if partition.cuts is not None or blocks > n:
        raise SettingsError(
            f"partition: a tracker of {n} neurons (model.width) has no modules to cut at, but can "
            f"be cut into 'partition.blocks' of 1 to {n} slices"
        )
    return tracker(
        n, bias=settings.bias, seed=seed, dtype=dtype, blocks=blocks, delay=partition.delay
    )


def load_factory(name: str, option: str = MODEL_OPTION) -> ModelFactory:
    """Return the function `package.module:function` or `file.py:function`, without calling it.

    An `nn.Module` class will do. Its module is imported, so its code runs: `name` may come from a
    command line or a program, never from a settings file. The current directory is searched too.
    option: the option in front of the name, for errors. Raises SettingsError for every way in which
    it can be wrong.
    """
    factory = load_function(option, name)
    if isinstance(factory, nn.Module):
        raise SettingsError(
            f"{option} {name!r} is a {type(factory).__name__} that has been made: name a function "
            "that makes one, so that every seed has weights of its own"
        )
    check_call(option, name, factory)
    return factory


def make_from_factory(
    factory: ModelFactory, *, seed: int, dtype: torch.dtype, option: str = MODEL_OPTION
) -> nn.Module:
    """Return the module that `factory` returns, its floating-point tensors in `dtype`.

    torch's global generator is seeded with `seed` while the function runs and restored afterwards.
    Raises SettingsError where the function fails or returns something else than an `nn.Module`.
    """
    with generator_kept(seed):
        model = call_function(option, factory)
    if not isinstance(model, nn.Module):
        raise SettingsError(
            f"{option}: {title(factory)}() returned {type(model).__name__}, not a torch.nn.Module"
        )
    if dtype == torch.float64 and any(t.is_complex() for t in model.parameters()):
        raise SettingsError(
            f"{option}: {title(factory)}() has complex weights, of which files of results "
            "(safetensors) hold complex64 alone: leave dtype at float32"
        )
    return in_type(model, dtype)


def make_from_settings(
    settings: Settings, spec: SampleSpec, factory: ModelFactory | None, dtype: torch.dtype
) -> nn.Module | Graph:
    """Return the model that the settings name, or that `factory` makes. Raises SettingsError."""
    if factory is not None:
        return make_from_factory(factory, seed=settings.seed, dtype=dtype)
    if settings.model.kind in CELLS:
        partition = settings.partition
        if partition.blocks is not None or partition.cuts is not None:
            raise SettingsError(
                f"partition: a {settings.model.kind.value} has a block for each cell; leave "
                "'partition.blocks' and 'partition.cuts' out"
            )
        loss = only_loss(settings)
        return make_recurrent(settings.model, spec, loss, seed=settings.seed, dtype=dtype)
    if settings.model.kind is ModelKind.TRACKER:
        partition = settings.partition
        return make_tracker(settings.model, spec, partition, seed=settings.seed, dtype=dtype)
    return make_model(settings.model, spec, seed=settings.seed, dtype=dtype)


def only_loss(settings: Settings) -> LossFunction:
    """Return the loss of a model of sequences."""
    if not isinstance(settings.loss, Loss):
        raise SettingsError(
            f"loss: names the outputs {', '.join(map(repr, settings.loss))}, but a "
            f"{settings.model.kind.value} has one; give one loss"
        )
    return make_loss(settings.loss, settings.ignore_index)
