"""Models against explicit formulas, and every way in which `--model` can be wrong."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hamdist.config import ModelKind, ModelSettings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedSequence
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.vjp.program import read_program
from hamdist.errors import SettingsError
from hamdist.models.build import CELLS, load_factory, make_from_factory, make_model, make_recurrent
from hamdist.models.networks import NETWORKS
from hamdist.streams.sample import SampleSpec

B, F, C = 4, 12, 3  # batch, features, classes
CLASSES = SampleSpec((B, F), torch.float64, (B,), torch.int64, classes=C)
IMAGES = SampleSpec((B, 1, 3, 4), torch.float64, (B,), torch.int64, classes=C)
VALUES = SampleSpec((B, F), torch.float64, (B, 2), torch.float64)


# Made by functions of their own, and networks that are not layers of one width (test_networks.py).
GRAPHS = {*CELLS, ModelKind.TRACKER, *NETWORKS}


def build(kind: ModelKind, spec: SampleSpec, depth: int = 4, seed: int = 0) -> nn.Sequential:
    settings = ModelSettings(kind=kind, width=7, depth=depth)
    return make_model(settings, spec, seed=seed, dtype=torch.float64)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def layer_norm(h: torch.Tensor) -> torch.Tensor:
    mean = h.mean(1, keepdim=True)
    variance = ((h - mean) ** 2).mean(1, keepdim=True)
    return (h - mean) / torch.sqrt(variance + 1e-3)


@pytest.mark.parametrize("spec", [CLASSES, IMAGES])
def test_residual_mlp_is_the_formula(spec: SampleSpec) -> None:
    model = build(ModelKind.RESIDUAL_MLP, spec, depth=4)
    u = torch.randn(spec.u_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layers = linears(model)
    for layer in layers:  # so that a forgotten bias shows
        layer.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    first, second, third, last = [
        (layer.weight.detach().T, layer.bias.detach()) for layer in layers
    ]
    alpha = 1 / math.sqrt(4)
    h = torch.relu(u.reshape(B, F) @ first[0] + first[1])
    for weight, bias in (second, third):
        h = h + alpha * torch.relu(layer_norm(h) @ weight + bias)
    expected = layer_norm(h) @ last[0] + last[1]
    torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [CLASSES, IMAGES])
def test_mlp_is_the_formula(spec: SampleSpec) -> None:
    model = build(ModelKind.MLP, spec, depth=3)
    u = torch.randn(spec.u_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = u.reshape(B, F)
    weights = [layer.weight.detach().T for layer in linears(model)]
    expected = torch.relu(torch.relu(h @ weights[0]) @ weights[1]) @ weights[2]
    torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [k for k in ModelKind if k not in GRAPHS])
@pytest.mark.parametrize(("spec", "outputs"), [(CLASSES, C), (IMAGES, C), (VALUES, 2)])
def test_shapes(kind: ModelKind, spec: SampleSpec, outputs: int) -> None:
    model = build(kind, spec, depth=5)
    shapes = [(layer.in_features, layer.out_features) for layer in linears(model)]
    paired = kind in (ModelKind.REVERSIBLE_MLP, ModelKind.MIDPOINT)
    first, last = 14 if kind is ModelKind.REVERSIBLE_MLP else 7, 14 if paired else 7
    assert shapes == [(F, first), (7, 7), (7, 7), (7, 7), (last, outputs)]
    assert model(torch.zeros(spec.u_shape, dtype=torch.float64)).shape == (B, outputs)


def test_residual_mlp_has_one_child_per_layer() -> None:
    model = build(ModelKind.RESIDUAL_MLP, CLASSES, depth=5)
    assert [len(linears(child)) for child in model] == [1] * 5
    assert {name for name, _ in model.named_parameters()} == {
        f"{i}.linear.{kind}" for i in range(5) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("kind", [ModelKind.MLP, ModelKind.RESIDUAL_MLP])
def test_every_layer_has_a_closed_form(kind: ModelKind) -> None:
    for child in build(kind, CLASSES, depth=4):
        assert read_program(nn.Sequential(child), 1) is not None, child


def test_depth_one() -> None:
    assert [type(m) for m in build(ModelKind.MLP, CLASSES, depth=1)] == [nn.Linear]
    with pytest.raises(SettingsError, match=r"model\.depth.*at least 2"):
        build(ModelKind.RESIDUAL_MLP, CLASSES, depth=1)


@pytest.mark.parametrize("kind", [k for k in ModelKind if k not in GRAPHS])
def test_initial_variances(kind: ModelKind) -> None:
    spec = SampleSpec((1, 400), torch.float32, (1,), torch.int64, classes=300)
    settings = ModelSettings(kind=kind, width=500, depth=3)
    layers = linears(make_model(settings, spec, seed=3, dtype=torch.float32))
    for layer, gain in zip(layers, (2.0, 2.0, 1.0), strict=True):
        weight = layer.weight.detach()
        # the variance of n normal draws has the relative spread sqrt(2/n); 5 of them
        tolerance = 5 * math.sqrt(2 / weight.numel())
        assert float(weight.var()) * layer.in_features / gain == pytest.approx(1, abs=tolerance)
        assert not layer.bias.any()


def test_seed_decides_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [build(ModelKind.RESIDUAL_MLP, CLASSES, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = [linears(model)[1].weight for model in models]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_dtypes_differ_by_rounding_only() -> None:
    settings = ModelSettings(kind=ModelKind.MLP, width=7, depth=3)
    double = make_model(settings, CLASSES, seed=0, dtype=torch.float64)
    single = make_model(settings, CLASSES, seed=0, dtype=torch.float32)
    for wide, narrow in itertools.zip_longest(double.parameters(), single.parameters()):
        assert torch.equal(wide.float(), narrow)


def test_streams_that_do_not_fit() -> None:
    tokens = SampleSpec((B, F), torch.int64, (B,), torch.int64, classes=C)
    with pytest.raises(SettingsError, match=r"real-valued inputs.*torch\.int64"):
        build(ModelKind.MLP, tokens)
    vector = SampleSpec((B, F), torch.float64, (B,), torch.float64)
    with pytest.raises(SettingsError, match=r"\(B, O\)"):
        build(ModelKind.MLP, vector)


MODULE = """
import torch
from torch import nn

NUMBER = 3
MADE = nn.Identity()

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))

def good():
    return nn.Sequential(nn.Linear(2, 2))

def takes(width):
    return nn.Sequential(nn.Linear(width, 2))

def fails():
    raise RuntimeError("no such luck")

def text():
    return "no module"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with modules of a user's in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    (tmp_path / "user_nets.py").write_text(MODULE)
    (tmp_path / "user_broken.py").write_text("1 / 0\n")
    (tmp_path / "user_syntax.py").write_text("def (\n")
    (tmp_path / "user_needs.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "user.dotted.py").write_text(MODULE)
    (tmp_path / "json.py").write_text(MODULE)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "user_other.py").write_text("from user_beside import good\n")
    (tmp_path / "deeper" / "user_beside.py").write_text(MODULE)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "name",
    ["user_nets:good", "user_nets:Net", "user_nets.py:good", "deeper/user_other.py:good"],
)
def test_factory_of_a_user(name: str) -> None:
    state = torch.get_rng_state()
    make = load_factory(name)
    models = [make_from_factory(make, seed=seed, dtype=torch.float64) for seed in (0, 0, 1)]
    first, same, other = [next(model.parameters()) for model in models]
    assert first.dtype is torch.float64
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_nets", "write it as package.module:function"),
        (":good", "write it as"),
        ("user_nets:", "write it as"),
        ("user_nowhere:good", "no module 'user_nowhere'"),
        ("user_nets.deeper:good", "'user_nets' is not a package|no module 'user_nets.deeper'"),
        ("user_needs:good", "its import failed: .*not_installed_anywhere"),
        ("user_broken:good", r"its import failed: ZeroDivisionError.*user_broken\.py, line 1"),
        ("user_syntax:good", "its import failed: SyntaxError"),
        ("user_nets:bad", "module 'user_nets' has no 'bad'"),
        ("user_nets:NUMBER", "'NUMBER' is int, not a function"),
        ("user_nets:MADE", "is a Identity that has been made: name a function that makes one"),
        ("user_nets:takes", "called without arguments, but missing .*'width'"),
        ("user_nets.py", "write it as package.module:function or path/file.py:function"),
        ("nowhere/user_nets.py:good", "there is no file 'nowhere/user_nets.py'"),
        ("user_nets.py:bad", "file 'user_nets.py' has no 'bad'"),
        ("user_broken.py:good", r"its import failed: ZeroDivisionError.*user_broken\.py, line 1"),
        ("user.dotted.py:good", "a file with a dot in its name; rename it"),
        ("json.py:good", "Python has another module 'json' .*; rename the file"),
    ],
)
def test_factory_that_cannot_be_had(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_factory(name)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_nets:fails", r"fails\(\) failed: RuntimeError: no such luck .*line \d+"),
        ("user_nets:text", r"text\(\) returned str, not a torch\.nn\.Module"),
    ],
)
def test_factory_that_makes_no_model(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_from_factory(load_factory(name), seed=0, dtype=torch.float32)


# -- recurrent kinds -----------------------------------------------------------------------------

TOKENS = SampleSpec((B,), torch.int64, (B,), torch.int64, classes=C, tokens=9)


def recurrent(kind: ModelKind, spec: SampleSpec, depth: int = 2, **more: object) -> Graph:
    settings = ModelSettings(kind=kind, width=7, depth=depth)
    options = {"seed": 0, "dtype": torch.float64, **more}
    return make_recurrent(settings, spec, cross_entropy, **options)


@pytest.mark.parametrize("spec", [CLASSES, TOKENS])
@pytest.mark.parametrize(
    ("kind", "layer"),
    [(ModelKind.RNN, nn.RNN), (ModelKind.GRU, nn.GRU), (ModelKind.LSTM, nn.LSTM)],
)
def test_recurrent_kinds_are_torch_layers_and_a_readout(
    kind: ModelKind, layer: type[nn.RNNBase], spec: SampleSpec
) -> None:
    graph = recurrent(kind, spec)
    generator = torch.Generator().manual_seed(1)
    if spec is TOKENS:
        u = torch.randint(9, (5, B), generator=generator)
        x, inputs = graph.blocks["embedding"].module(u), 7
    else:
        u = x = torch.randn(5, B, F, generator=generator, dtype=torch.float64)
        inputs = F
    stack = layer(inputs, 7, num_layers=2, dtype=torch.float64)  # type: ignore[call-arg]
    for i in range(2):
        for name, value in graph.blocks[f"cell{i}"].module.named_parameters():
            getattr(stack, f"{name.rpartition('.')[2]}_l{i}").data.copy_(value.data)
    head = graph.blocks["readout"].module.module
    expected = head(stack(x)[0])
    merged = MergedSequence(graph, graph.shapes(spec.u_shape, spec.u_dtype))
    assert expected.shape == (5, B, C)
    torch.testing.assert_close(merged(u), expected, rtol=1e-12, atol=1e-12)


def test_recurrent_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    graphs = [recurrent(ModelKind.LSTM, TOKENS, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = [
        torch.cat([p.detach().flatten() for b in g.blocks.values() for p in b.module.parameters()])
        for g in graphs
    ]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    single = recurrent(ModelKind.LSTM, TOKENS, dtype=torch.float32)
    rounded = [p for b in single.blocks.values() for p in b.module.parameters()]
    assert torch.equal(torch.cat([p.detach().flatten() for p in rounded]), first.float())


def test_streams_that_no_cell_can_read() -> None:
    unknown = SampleSpec((B,), torch.int64, (B,), torch.int64, classes=C)
    with pytest.raises(SettingsError, match="gru takes real-valued inputs.*sequences.view"):
        recurrent(ModelKind.GRU, unknown)
    with pytest.raises(SettingsError, match=r"takes inputs \(B, I\), the stream yields"):
        recurrent(ModelKind.GRU, IMAGES)


def test_a_recurrent_kind_is_no_chain_of_layers() -> None:
    with pytest.raises(SettingsError, match="model.kind: lstm has a memory.*'bptt'"):
        build(ModelKind.LSTM, CLASSES)
