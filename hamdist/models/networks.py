"""Networks of images and of texts that settings can name: chains of pre-norm residual layers.

    resnet         stem        h = W * u, convolutions of 3 x 3; 8 layers make it ResNet-18-like
                   layer0 ...  h' = S(h) + alpha W2 * relu(W1 * relu(LN(h)))
    convnet        stem        h = relu(W * u)
                   layer0 ...  h' = S(h) + alpha relu(W * LN(h));  the head reads all pixels
    lenet          stem        h = pool(relu(W * u)), 5 x 5 to 6 channels
                   layer0      the same to 16;  layer1: all pixels to 120, relu;  layer2: 84, linear
                   (LeCun et al. 1998, as Sanfiz and Akrout 2021 have it; no residuals, no norms)
    vit            patches     h = W u + place, by patch
                   layer0 ...  h' = h + alpha attention(LN(h)),  h'' = h' + alpha mlp(LN(h'))
    gpt            embedding   h = W[u] + place
                   layer0 ...  as vit, the attention causal
    lstm-layers    embedding   h = W[u], of rows of numbers h = W u + b
                   layer0 ...  as vit, an nn.LSTM over the whole sequence in place of the attention

    head           y = W LN(h) + b: of the mean over pixels or patches; of texts at the last token
                   or, where every token has a target, at each

In the layers of a resnet that begin its second, third and fourth quarter the channels double, the
sides halve, and S is a convolution of 1 x 1 with stride 2; elsewhere S(h) = h. A convnet does so in
layer0, and its alpha is 1/sqrt(layers with weights), elsewhere 1/sqrt(residual branches). mlp:
W2 gelu(W1 h), 4H inside. LN is a layer norm over all that a sample (of texts and patches: a token)
has, without affine weights, eps = 1e-3. It is not a batch norm, as in He et al. 2016: that has no
value for one row, and its statistics tie the rows of a batch together, so that a message which
comes late would meet those of other samples and of older weights.

W ~ N(0, gain/fan_in), the gain 2 before a relu and 1 elsewhere; of a lenet uniform, of variance
2/(fan_in + fan_out), as its source has it (Glorot and Bengio 2010); b = 0; embeddings and places
N(0, 1) and N(0, 0.02^2); LSTMs as torch draws them.

B: batch, C: channels, T: tokens, H: width, A: heads, D = H/A.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hamdist.config import ModelKind, ModelSettings
from hamdist.dynamics.modules.prenorm import layer_norm
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import SettingsError
from hamdist.models.lenet import lenet_layers
from hamdist.streams.sample import SampleSpec

STAGES = 4
PLACE_STD = 0.02


class Stem(nn.Module):
    """A convolution with stride 2 of images, which may be flat. Returns (B, H, side/2, side/2)."""

    def __init__(self, image: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.image = image
        self.conv = nn.Conv2d(image[0], width, 3, stride=2, padding=1)

    def forward(self, u: Tensor) -> Tensor:
        h: Tensor = self.conv(u.reshape(-1, *self.image))
        return h


class Residual(nn.Module):
    """S(h) + alpha W2 * relu(W1 * relu(LN(h))). h: (B, C, side, side)."""

    def __init__(self, inputs: int, outputs: int, side: int, alpha: float) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.norm = layer_norm((inputs, side, side))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        branch = self.conv2(torch.relu(self.conv1(torch.relu(self.norm(h)))))
        out: Tensor = self.skip(h) + self.alpha * branch
        return out


class ReluStem(Stem):
    """relu(W * u), with stride 2."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.relu(self.conv(u.reshape(-1, *self.image)))


class Convolved(nn.Module):
    """S(h) + alpha relu(W * LN(h)). h: (B, C, side, side)."""

    def __init__(self, inputs: int, outputs: int, side: int, alpha: float) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.norm = layer_norm((inputs, side, side))
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.skip(h) + self.alpha * torch.relu(self.conv(self.norm(h)))
        return out


class FlatHead(nn.Module):
    """W LN(h) + b, of all pixels. h: (B, C, side, side); returns (B, O)."""

    def __init__(self, channels: int, side: int, outputs: int) -> None:
        super().__init__()
        self.norm = layer_norm((channels, side, side))
        self.linear = nn.Linear(channels * side**2, outputs)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(h).flatten(1))
        return y


class Patches(nn.Module):
    """Patches of images, which may be flat, as tokens. Returns (B, T, H)."""

    def __init__(self, image: tuple[int, int, int], patch: int, width: int) -> None:
        super().__init__()
        self.image = image
        self.project = nn.Conv2d(image[0], width, patch, stride=patch)
        self.place = nn.Parameter(torch.empty((image[1] // patch) ** 2, width))

    def forward(self, u: Tensor) -> Tensor:
        tokens: Tensor = self.project(u.reshape(-1, *self.image)).flatten(2).transpose(1, 2)
        return tokens + self.place


class Tokens(nn.Module):
    """W[u], with learned places. u: (B, T); returns (B, T, H)."""

    def __init__(self, tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.empty(length, width))

    def forward(self, u: Tensor) -> Tensor:
        h: Tensor = self.embedding(u) + self.place
        return h


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v by head, and their projection. h: (B, T, H)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        rows, tokens, width = h.shape
        shape = (rows, tokens, self.heads, width // self.heads)
        q, k, v = self.qkv(h).chunk(3, dim=2)
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.project(attended.transpose(1, 2).reshape(rows, tokens, width))
        return out


class Recurrence(nn.Module):
    """The hidden states of an LSTM, from a zero state on. h: (B, T, H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        states: Tensor = self.lstm(h)[0]
        return states


class BlockLayer(nn.Module):
    """h' = h + alpha mix(LN(h)), which mixes tokens; h'' = h' + alpha mlp(LN(h')). h: (B, T, H)."""

    def __init__(self, mix: nn.Module, width: int, alpha: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.mix = mix
        self.norm2 = layer_norm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.alpha * self.mix(self.norm1(h))
        inner = nn.functional.gelu(self.up(self.norm2(h)))
        out: Tensor = h + self.alpha * self.down(inner)
        return out


class MeanHead(nn.Module):
    """W mean(LN(h)) + b, the mean over `axes`: pixels, or tokens. Returns (B, O)."""

    def __init__(
        self, shape: tuple[int, ...], features: int, outputs: int, axes: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.norm = layer_norm(shape)
        self.linear = nn.Linear(features, outputs)
        self.axes = axes

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(h).mean(self.axes))
        return y


class TokenHead(nn.Module):
    """W LN(h) + b, (B, T, O) at each token, or (B, O) at the last one. h: (B, T, H)."""

    def __init__(self, width: int, outputs: int, *, every: bool) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, outputs)
        self.every = every

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(h if self.every else h[:, -1]))
        return y


def make_network(
    settings: ModelSettings, spec: SampleSpec, outputs: int, *, seed: int, dtype: torch.dtype
) -> nn.Sequential:
    """Return the network of a kind in `NETWORKS`, for samples of `spec`: a child per layer.

    `seed` alone decides the weights, up to rounding to `dtype`; torch's global generator is
    neither read nor moved. Raises SettingsError where model and stream cannot fit.
    """
    with generator_kept(seed):
        model = NETWORKS[settings.kind](settings, spec, outputs).double()
        _draw(model, xavier=settings.kind is ModelKind.LENET)
    return model.to(dtype)


def _draw(model: nn.Module, *, xavier: bool) -> None:
    """Draw the weights of all modules but LSTMs, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if xavier:
                nn.init.xavier_uniform_(module.weight)
            else:
                before_relu = isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
                gain = 2.0 if before_relu else 1.0
                nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all of them have one
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, (Patches, Tokens)):
            nn.init.normal_(module.place, std=PLACE_STD)


def _resnet(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    image = _image(settings, spec)
    alpha = 1 / math.sqrt(settings.depth)
    channels, side = settings.width, _half(image[1])
    children: list[nn.Module] = []
    for i in range(settings.depth):
        stage = i * STAGES // settings.depth
        wider = settings.width * 2**stage
        children.append(Residual(channels, wider, side, alpha))
        if wider != channels:
            channels, side = wider, _half(side)
    head = MeanHead((channels, side, side), channels, outputs, (2, 3))
    return _chain("stem", Stem(image, settings.width), children, head)


def _convnet(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    image = _image(settings, spec)
    alpha = 1 / math.sqrt(settings.depth + 2)
    width, side = settings.width, _half(image[1])
    children: list[nn.Module] = [Convolved(width, 2 * width, side, alpha)]
    width, side = 2 * width, _half(side)
    children += [Convolved(width, width, side, alpha) for _ in range(settings.depth - 1)]
    return _chain("stem", ReluStem(image, settings.width), children, FlatHead(width, side, outputs))


def _lenet(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    stem, *children, head = lenet_layers(_image(settings, spec), outputs)
    return _chain("stem", stem, children, head)


def _half(side: int) -> int:
    """Return the side of an image behind a convolution with stride 2 and padding."""
    return (side + 1) // 2


def _vit(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    image = _image(settings, spec)
    if image[1] % settings.patch:
        raise SettingsError(
            f"model.patch: {settings.patch} does not divide the side of the stream's images, "
            f"{image[1]}"
        )
    first = Patches(image, settings.patch, settings.width)
    mixes = _attentions(settings, causal=False)
    head = MeanHead((settings.width,), settings.width, outputs, (1,))
    return _layers("patches", first, mixes, settings, head)


def _gpt(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    tokens, length = _text(settings, spec)
    first = Tokens(tokens, length, settings.width)
    mixes = _attentions(settings, causal=True)
    return _layers("embedding", first, mixes, settings, _token_head(settings, spec, outputs))


def _lstm_layers(settings: ModelSettings, spec: SampleSpec, outputs: int) -> nn.Sequential:
    first: nn.Module
    if len(spec.u_shape) == 3 and spec.u_dtype.is_floating_point:
        first = nn.Linear(spec.u_shape[2], settings.width)
    else:
        first = nn.Embedding(_text(settings, spec)[0], settings.width)
    mixes: list[nn.Module] = [Recurrence(settings.width) for _ in range(settings.depth)]
    return _layers("embedding", first, mixes, settings, _token_head(settings, spec, outputs))


def _attentions(settings: ModelSettings, *, causal: bool) -> list[nn.Module]:
    if settings.width % settings.heads:
        raise SettingsError(
            f"model.heads: {settings.heads} does not divide model.width, {settings.width}"
        )
    count = range(settings.depth)
    return [Attention(settings.width, settings.heads, causal=causal) for _ in count]


def _token_head(settings: ModelSettings, spec: SampleSpec, outputs: int) -> TokenHead:
    every = spec.classes is not None and spec.y_shape == spec.u_shape
    return TokenHead(settings.width, outputs, every=every)


def _layers(
    name: str, first: nn.Module, mixes: list[nn.Module], settings: ModelSettings, head: nn.Module
) -> nn.Sequential:
    alpha = 1 / math.sqrt(2 * settings.depth)
    return _chain(name, first, [BlockLayer(mix, settings.width, alpha) for mix in mixes], head)


def _chain(name: str, first: nn.Module, layers: list[nn.Module], head: nn.Module) -> nn.Sequential:
    numbered = {f"layer{i}": layer for i, layer in enumerate(layers)}
    return nn.Sequential(OrderedDict({name: first, **numbered, "head": head}))


def _image(settings: ModelSettings, spec: SampleSpec) -> tuple[int, int, int]:
    """Return channels, and twice the side, of images (B, C, S, S), or (B, S*S) with one channel."""
    shape = spec.u_shape[1:]
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        shape = (1, side, side) if side**2 == shape[0] else shape
    if len(shape) != 3 or shape[1] != shape[2] or not spec.u_dtype.is_floating_point:
        raise SettingsError(
            f"model.kind: {settings.kind.value} takes square images (B, C, S, S) or (B, S*S), the "
            f"stream yields {spec.u_dtype} of shape {spec.u_shape}; use the source 'mnist', "
            "'fashion-mnist', 'cifar10' or 'digits'"
        )
    return shape[0], shape[1], shape[2]


def _text(settings: ModelSettings, spec: SampleSpec) -> tuple[int, int]:
    """Return the number of different tokens, and T."""
    if spec.tokens is None or len(spec.u_shape) != 2:
        raise SettingsError(
            f"model.kind: {settings.kind.value} takes tokens (B, T) of which the stream says how "
            f"many there are (SampleSpec.tokens); it yields {spec.u_dtype} of shape "
            f"{spec.u_shape}; use the source 'characters', or 'sequences' with sequences.view "
            "'sequences'"
        )
    return spec.tokens, spec.u_shape[1]


NETWORKS: Mapping[ModelKind, Callable[[ModelSettings, SampleSpec, int], nn.Sequential]] = {
    ModelKind.RESNET: _resnet,
    ModelKind.CONVNET: _convnet,
    ModelKind.LENET: _lenet,
    ModelKind.VIT: _vit,
    ModelKind.GPT: _gpt,
    ModelKind.LSTM_LAYERS: _lstm_layers,
}
