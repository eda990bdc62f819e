"""Types and devices of single blocks. Oracles: torch with the same casts between its layers; the
in-process engine; the same run without settings of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.architectures import ResNet
from dynamics.tracing.test_any_network import images, made, sgd
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, batches, chain, cycle_graph, skip_graph, stream
from torch import nn

from hamdist.config import Settings, read_settings
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.vjp.autocast import AutocastFunction
from hamdist.errors import GraphError, LevelError, SettingsError
from hamdist.runtime.signals.cast import CPU, CastPlan, entered, host_copy, to_host
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MIXED = {"block[13]": {"dtype": "float64"}, "block2": {"dtype": "bfloat16"}}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")


def run_of(model, source, blocks, level="trace", items=41, **fields):
    engine = {"blocks": blocks, **fields.pop("engine", {})}
    wanted = {"steps": items, "seed": 5, "level": level, "engine": engine, **fields}
    return train(model(), source, Settings.model_validate(wanted))


def items_of(items):
    return from_iterable(batches(items), classes=3)


def test_backprop_equals_autograd_with_casts_between_the_layers():
    """Blocks 1 and 3 in float64, the rest in float32. The casts' own gradients are casts."""
    found = run_of(chain, items_of(20), {"block[13]": {"dtype": "float64"}}, "backprop", 20)
    start = chain()
    layers = [nn.Sequential(*list(start)[i : i + 2]) for i in range(0, 9, 2)]
    types = [F32, F64, F32, F64, F32]
    for layer, dtype in zip(layers, types, strict=True):
        layer.to(dtype)
    optimiser = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    for u, y in batches(20):
        h = u
        for layer, dtype in zip(layers, types, strict=True):
            h = layer(h.to(dtype))
        optimiser.zero_grad()
        cross_entropy(h, y).backward()
        optimiser.step()
    for i, layer in enumerate(layers):
        for key, value in found.blocks[f"block{i}"].theta.items():
            theirs = dict(layer.named_parameters())[f"{int(key[0]) % 2}{key[1:]}"]
            assert value.dtype == theirs.dtype == types[i]
            assert (value - theirs).abs().max() < (1e-6 if types[i] is F32 else 1e-7)


def test_types_of_signals_states_and_model():
    found = run_of(chain, stream(41), MIXED, "local")
    types = [F32, F64, BF16, F64, F32]
    for i, dtype in enumerate(types):
        block = found.blocks[f"block{i}"]
        assert {t.dtype for t in (*block.theta.values(), *block.omega.values())} == {dtype}
        if i < 4:
            assert block.h.dtype == block.z.dtype == dtype
    assert {p.dtype for p in found.model.parameters()} == {F32}
    found.model(torch.randn(3, 6))
    # 40 or 41 states and as many messages of (4, 8): in the sender's type forward, in the child's
    # type (which it took the state in) backward
    plain = run_of(chain, stream(41), {}, "local").bytes_per_edge
    for i in range(4):
        edge = f"block{i}->block{i + 1}"
        forward, backward = types[i].itemsize, types[i + 1].itemsize
        assert found.bytes_per_edge[edge] / plain[edge] == pytest.approx(
            (forward + backward) / 8, rel=0.03
        )


def test_both_directions_are_compressed_in_their_own_types():
    """(4, 8) numbers and 4 scales, as int8: 48 bytes of float32, 64 of float64. The state goes in
    its sender's type, the message in that in which the child has taken the state."""
    blocks = {"block1": {"dtype": "float64"}}
    fields = {"engine": {"compress": "int8"}}
    done = run_of(chain, stream(10), blocks, items=10, **fields).compression
    sizes = {e: [(c.sent, c.sent + c.saved) for c in ways.values()] for e, ways in done.items()}
    short, long = (480, 1280), (640, 2560)
    assert sizes["block0->block1"] == [short, long]
    assert sizes["block1->block2"] == [long, short]
    assert sizes["block2->block3"] == [short, short]


@pytest.mark.parametrize("level", ["trace", "local"])
@pytest.mark.parametrize("blocks", [{}, {"*": {"dtype": "float32"}}, {"*": {"device": "cpu"}}])
def test_what_changes_nothing(level, blocks):
    assert_equal(run_of(chain, stream(41), {}, level), run_of(chain, stream(41), blocks, level))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("model", "level", "blocks"),
    [
        (chain, "trace", MIXED),
        (chain, "local", {**MIXED, "block0": {"autocast": "bf16"}}),
        (skip_graph, "trace", {"[ad]": {"dtype": "float64"}, "c": {"autocast": "bf16"}}),
        (cycle_graph, "local", {"b": {"dtype": "float64"}, "d": {"dtype": "bfloat16"}}),
    ],
)
def test_engines_are_equal(session, leaves_no_socket, model, level, blocks):
    def once(**engine):
        return run_of(
            model, PortableStream(41), blocks, level, engine={"compress": "int8", **engine}
        )

    alone, spread = once(), once(kind="ray", actors=2)
    assert_equal(alone, spread)
    assert alone.rounding == spread.rounding
    assert alone.compression == spread.compression


def test_autocast_by_hand():
    """A linear layer: x and W in bfloat16, the sum in float32, the result in bfloat16; back to
    float32 where it leaves. Measured against the product without."""
    module = nn.Linear(6, 5)
    cell = AutocastFunction(copy.deepcopy(module), Combine.CONCAT, 0, CPU)
    errors = []
    for n in range(1, 6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(n))
        found = cell.forward([x], [True])
        weight, bias = module.weight.bfloat16(), module.bias.bfloat16()
        expected = nn.functional.linear(x.bfloat16(), weight, bias).float()
        assert found.output.dtype is F32
        assert torch.equal(found.output, expected)
        if n in (1, 2, 4):
            exact = module(x)
            errors.append(float((expected - exact).detach().norm() / exact.detach().norm()))
    assert cell.rounding.passes == 3
    assert cell.rounding.mean == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert cell.rounding.worst == pytest.approx(max(errors), rel=1e-5)
    assert 1e-4 < cell.rounding.worst < 2**-6


def test_the_measurement_of_autocast_leaves_no_trace():
    """Random masks, and running statistics, are those of a block that nobody measures."""
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    measured = AutocastFunction(copy.deepcopy(module), Combine.CONCAT, 3, CPU)
    plain = AutocastFunction(copy.deepcopy(module), Combine.CONCAT, 3, CPU)
    plain._without = lambda arguments: None
    for n in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(n))
        assert torch.equal(measured.forward([x], [True]).output, plain.forward([x], [True]).output)
    assert torch.equal(measured.module[1].running_mean, plain.module[1].running_mean)
    # the same masks with and without: what differs is rounding, no dropped neuron
    assert measured.rounding.worst < 0.05


def test_autocast_learns_nearly_as_float32_does():
    exact = run_of(chain, stream(41), {}, "backprop")
    found = run_of(chain, stream(41), {"*": {"autocast": "bf16"}}, "backprop")
    assert list(found.rounding) == [f"block{i}" for i in range(5)]
    for name, block in exact.blocks.items():
        for key, value in block.theta.items():
            other = found.blocks[name].theta[key]
            assert other.dtype is F32
            apart = float((other - value).norm() / value.norm())
            assert 0 < apart < 0.02


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        (
            {"blok0": {"dtype": "float64"}},
            SettingsError,
            "engine.blocks.blok0: no such block; known: block0",
        ),
        (
            {"*": {}, "block0": {}, "block?": {}},
            SettingsError,
            "block\\?: every block .* list it earlier",
        ),
        (
            {"block1": {"autocast": "bf16", "dtype": "float64"}},
            LevelError,
            "'block1' has autocast .* float64",
        ),
    ],
)
def test_wrong_blocks(blocks, error, words):
    with pytest.raises(error, match=words):
        run_of(chain, stream(2), blocks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{blocks: {a: {dtype: float16}}}", "engine.blocks.a.dtype: .*'float16'"),
        (
            "{blocks: {a: {device: gpu}}}",
            "engine.blocks.a.device: a device is 'cpu', 'cuda', 'cuda:N'",
        ),
        ("{device: tpu}", "engine.device: a device is 'cpu'"),
        ("{blocks: {a: {gpus: 1.5}}}", "'gpus' is 1.5: a share is at most 1, or a whole number"),
        ("{blocks: {a: {gpus: 1, device: cpu}}}", "'gpus' is 1 with device 'cpu'"),
        ("{blocks: {a: {cpus: 0}}}", "engine.blocks.a.cpus: .*greater than 0"),
        ("{blocks: {a: {gpu: 1}}}", "engine.blocks.a.gpu: no such setting"),
        ("{spread: wide}", "engine.spread: .*'packed'"),
    ],
)
def test_wrong_words(text, words):
    with pytest.raises(SettingsError, match=words):
        read_settings(f"engine: {text}", "here")


def test_a_block_that_cannot_compute_in_its_type():
    class Picky(nn.Module):
        def forward(self, x):
            if x.dtype != F32:
                raise TypeError("float32 alone")
            return x

    def model():
        return nn.Sequential(nn.Linear(6, 4), Picky(), nn.Linear(4, 3))

    words = "'block1' cannot compute in float64: float32 alone; leave its dtype out"
    fields = {"partition": {"cuts": ["1", "2"]}}
    with pytest.raises(GraphError, match=words):
        run_of(model, stream(2), {"block1": {"dtype": "float64"}}, **fields)


def test_rounding_spoils_recomputed_states():
    from hamdist.models.build import make_model

    def model():
        wanted = Settings.model_validate(
            {"model": {"kind": "reversible-mlp", "width": 8, "depth": 4}}
        )
        return make_model(wanted.model, stream(4).spec, seed=0, dtype=F32)

    with pytest.raises(LevelError, match="'block1' has a type .* memory 'reversible'"):
        run_of(model, stream(4), {"block1": {"autocast": "bf16"}}, "reversible")


def test_what_comes_in_is_cast_once():
    x, n = torch.tensor([1 + 2**-10], dtype=F64), torch.tensor([3])
    assert entered(x, CPU, None) is x
    assert entered(x, CPU, F64) is x
    assert entered(n, CPU, BF16) is n
    assert entered(x, CPU, BF16).tolist() == [1.0]
    assert entered(x.to(BF16), CPU, F64).tolist() == [1.0]
    assert to_host(x) is x
    assert host_copy(x) is not x


def test_auto_takes_what_is_there():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert CastPlan("a", "auto").resolved().type == expected
    assert CastPlan("a", "cpu").resolved() == CPU
    with pytest.raises(SettingsError, match="'a': device 'cuda:99', but this process sees"):
        CastPlan("a", "cuda:99").resolved()


def test_auto_is_the_processor_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is at hand")
    plain = run_of(chain, stream(41), {})
    assert_equal(plain, run_of(chain, stream(41), {}, engine={"device": "auto"}))
    with pytest.raises(SettingsError, match="'block0': device 'cuda', but this process sees 0"):
        run_of(chain, stream(41), {"block0": {"device": "cuda"}})


@needs_gpu
@pytest.mark.parametrize("level", ["trace", "local", "backprop"])
@pytest.mark.parametrize("blocks", [{"block[13]": {"device": "cuda"}}, {"*": {"device": "auto"}}])
def test_a_gpu_beside_the_processor(level, blocks):
    """In float64 the same to round-off as on the processor alone."""
    fields = {"level": level, "dtype": "float64"}

    def model():
        return chain().double()

    def source():
        return from_iterable([(u.double(), y) for u, y in batches(41)], classes=3)

    plain = run_of(model, source(), {}, **fields)
    found = run_of(model, source(), blocks, **fields)
    for name, block in plain.blocks.items():
        for key, value in block.theta.items():
            assert found.blocks[name].theta[key].is_cpu
            assert (found.blocks[name].theta[key] - value).abs().max() < 1e-12


@needs_gpu
def test_signals_leave_a_gpu_through_pinned_memory():
    x = torch.randn(4, 6, device="cuda")
    host = to_host(x)
    assert host.is_pinned()
    assert torch.equal(host, x.cpu())
    assert torch.equal(entered(host, x.device, BF16).cpu(), x.bfloat16().cpu())


@needs_gpu
def test_dropout_on_a_gpu_draws_from_its_own_generator():
    def model():
        return chain(dropout=0.5)

    torch.cuda.manual_seed(1)
    first = run_of(model, stream(41), {"*": {"device": "cuda"}})
    outside = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(2)
    again = run_of(model, stream(41), {"*": {"device": "cuda"}})
    assert_equal(first, again)
    torch.cuda.manual_seed(1)
    assert torch.equal(outside, torch.cuda.get_rng_state())


@pytest.mark.ray
@needs_gpu
def test_a_gpu_in_an_actor(session, leaves_no_socket):
    blocks = {"block[13]": {"device": "cuda"}}
    alone = run_of(chain, PortableStream(41), blocks)
    spread = run_of(chain, PortableStream(41), blocks, engine={"kind": "ray", "actors": 2})
    assert_equal(alone, spread)


def residual(n, dtype=F32):
    """Sample n for a ResNet."""
    u, y = images(n)
    return u.to(dtype), y


INSIDE = {"cuts": ["layer1.0.conv2", "layer2.0.conv2"]}  # a skip and a branch leave each block


def test_blocks_that_several_values_leave_have_a_type():
    """All in float64, the sum of a float32 model's run is that of the float64 model under SGD."""
    model = made(ResNet).float()
    items = [residual(n) for n in range(8)]
    fields = {"level": "backprop", "learning": {"lr": 0.1}, "partition": INSIDE}

    def learned(blocks):
        own = {**fields, "engine": {"blocks": blocks}}
        return train(model, from_iterable(items, classes=3), Settings.model_validate(own))

    double = sgd(copy.deepcopy(model).double(), [(u.double(), y) for u, y in items])
    expected = double.state_dict()
    for key, value in merged(learned({"*": {"dtype": "float64"}})).items():
        assert (value - expected[key]).abs().max() <= 1e-12 * max(1, expected[key].abs().max())
    # one block alone, to the rounding of the others; and it did compute in its own type
    one, plain = learned({"block1": {"dtype": "float64"}}), learned({})
    assert {t.dtype for t in one.blocks["block1"].theta.values()} == {F64}
    assert {t.dtype for t in one.blocks["block0"].theta.values()} == {F32}
    apart = [float((merged(one)[k] - v).abs().max()) for k, v in merged(plain).items()]
    assert 0 < max(apart) < 1e-4


def merged(result):
    """What the blocks have at the end, in their own types, by the model's names."""
    return {
        key: value
        for block in result.blocks.values()
        for key, value in {**block.theta, **block.buffers}.items()
    }


needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="no two CUDA devices are at hand",
)


def close(found, plain, bound=1e-12):
    for key, value in merged(plain).items():
        other = merged(found)[key]
        assert other.is_cpu
        assert (other - value).abs().max() <= bound * max(1, value.abs().max())


def residual_run(engine, **fields):
    """A ResNet cut inside its branches, in float64."""
    items = [residual(n, F64) for n in range(8)]
    own = {"level": "trace", "learning": {"lr": 0.1}, "engine": engine, "dtype": "float64"}
    settings = Settings.model_validate({**own, "partition": {**INSIDE, **fields}})
    return train(made(ResNet), from_iterable(items, classes=3), settings)


@needs_gpu
@pytest.mark.parametrize("fields", [{}, {"slices": {"block1": 2}}, {"delays": {"*": 3}}])
def test_a_network_with_skips_on_a_gpu(fields):
    """All of it, and one block beside the processor: the same to round-off."""
    plain = residual_run({}, **fields)
    close(residual_run({"device": "cuda"}, **fields), plain)
    close(residual_run({"blocks": {"block1*": {"device": "cuda:0"}}}, **fields), plain)


@needs_gpu
def test_compressed_signals_leave_a_gpu():
    """Rounded to bf16 there or here: the same."""
    plain = residual_run({"compress": "bf16"})
    close(residual_run({"compress": "bf16", "blocks": {"block1": {"device": "cuda"}}}), plain, 1e-6)


@needs_gpu
def test_autocast_on_a_gpu_says_how_far_it_is_off():
    blocks = {"block[13]": {"device": "cuda", "autocast": "bf16"}}
    found = run_of(chain, stream(41), blocks)
    assert found.rounding.keys() == {"block1", "block3"}
    assert all(0 < r.mean < 0.02 for r in found.rounding.values())


@needs_two_gpus
def test_signals_between_two_gpus_of_a_process():
    plain = residual_run({})
    found = {"block0": {"device": "cuda:0"}, "block[12]": {"device": "cuda:1"}}
    close(residual_run({"blocks": found}), plain)


@pytest.mark.ray
@needs_two_gpus
def test_two_gpus_in_two_actors(session, leaves_no_socket):
    one_each = {"gpus": 1, "device": "cuda"}
    blocks = {"block[0-2]": one_each, "block[34]": one_each}
    placement = [["block0", "block1", "block2"], ["block3", "block4"]]
    alone = run_of(chain, PortableStream(41), {"*": {"device": "cuda"}})
    engine = {"kind": "ray", "placement": placement}
    assert_equal(alone, run_of(chain, PortableStream(41), blocks, engine=engine))
