"""The stories of bugs that were found and fixed."""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, both
from runtime.networks import CLASSES, FEATURES, PortableStream, batches, chain, dense, seeded
from torch import nn

import hamdist
from hamdist.config import Settings, read_settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.errors import ClusterError, GraphError, SettingsError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.study.shared.recipes import load_settings

RAY = {"actors": 2}


def test_an_override_holds_where_the_recipe_speaks_of_the_level():
    """--set learning.lr=7 was overruled by the recipe's levels.trace.learning.lr."""
    settings = load_settings("digits", [{"learning": {"lr": 7.0}}])
    assert {settings.for_level(level).learning.lr for level in settings.levels} == {7.0}
    assert settings.for_level(settings.level).learning.lr == 7.0
    text = "levels: {trace: {learning: {lr: 0.3}}}"
    own = read_settings(text, "x", [{"levels": {"trace": {"learning": {"lr": 5.0}}}}])
    assert own.for_level(own.level).learning.lr == 5.0


def test_keywords_of_train_hold_where_the_settings_speak_of_the_level():
    still = Settings.model_validate({"levels": {"trace": {"learning": {"lr": 0.0}}}})
    result = hamdist.train(
        chain(), batches(20), still, classes=CLASSES, level="trace", learning={"lr": 0.5}
    )
    before = chain().state_dict()
    assert any(not torch.equal(before[k], v) for k, v in result.model.state_dict().items())


@pytest.mark.ray
def test_inputs_with_odd_strides_are_the_same_in_both_engines(session):
    """A channels-last input of one channel is contiguous, and still another one to a kernel."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        u = torch.randn(4, 9, 9, 1, generator=generator).permute(0, 3, 1, 2)
        made.append((u, torch.randint(3, (4,), generator=generator)))

    def model():
        return seeded(
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 49, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        )

    assert_equal(*both(model, lambda: from_iterable(made, classes=3), RAY, 40, level="trace"))


class Leaky(nn.Module):
    """Returns the memory that it goes on writing to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("h", torch.zeros(4, FEATURES), persistent=False)

    def forward(self, x):
        if x.device.type == "meta":
            return x.clone()
        with torch.no_grad():
            return self.h.mul_(0.9).add_(x)


class Constant(nn.Module):
    """Returns a weight itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, FEATURES))

    def forward(self, x):
        return self.w


@pytest.mark.ray
@pytest.mark.parametrize("first", [Leaky, Constant])
def test_what_a_module_keeps_is_not_what_it_sends(session, first):
    def model():
        return seeded(
            lambda: nn.Sequential(
                first(), nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, CLASSES)
            )
        )

    fields = {"level": "trace", "partition": {"cuts": ["1", "3", "4"]}}
    alone, spread = both(model, lambda: PortableStream(40), {"actors": 4}, 40, **fields)
    assert_equal(alone, spread)
    if first is Leaky:
        assert torch.equal(alone.model[0].h, spread.model[0].h)
        assert alone.model[0].h.abs().sum() > 0


@pytest.mark.timeout(30)
def test_blocks_that_the_input_does_not_reach_end_with_the_targets():
    """Such a component went on for ever: the end of the stream never came to it."""
    graph = Graph(
        [
            BlockSpec("a", dense(2, 3), ("r",), shape=(3,)),
            BlockSpec("r", nn.Linear(3, 2), ("a",), loss=mse, state=True, shape=(2,)),
            BlockSpec("own", nn.Linear(FEATURES, 2), ("u",), loss=mse),
        ]
    )
    samples = [(torch.ones(4, FEATURES), torch.ones(4, 2)) for _ in range(20)]
    result = train(graph, from_iterable(samples), Settings(level="local"))
    assert result.samples == 20
    assert result.blocks["r"].updates >= 19


class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 16)


def test_a_sequential_with_a_forward_of_its_own_keeps_it():
    def model():
        return seeded(lambda: Scaled(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)))

    result = train(model(), PortableStream(5), Settings(level="backprop", steps=5))
    assert list(result.blocks) == ["block0", "block1"]
    u, y = batches(5)[0]
    first = cross_entropy(model()(u), y)
    assert result.windows["block1"][0].samples == 5
    one = train(model(), PortableStream(1), Settings(level="backprop", steps=1))
    assert one.windows["block1"][0].loss == pytest.approx(first.item(), rel=1e-6)


def noisy_loss(prediction, target):
    return cross_entropy(prediction + 0.1 * torch.randn_like(prediction), target)


@pytest.mark.ray
@pytest.mark.parametrize("level", ["local", "trace"])
def test_a_loss_that_draws_draws_the_same_in_both_engines(session, level):
    fields = {"level": level, "steps": 30}
    results = [
        train(
            chain(),
            PortableStream(30),
            Settings.model_validate({**fields, "engine": engine}),
            loss=noisy_loss,
        )
        for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2})
    ]
    assert_equal(*results)


@pytest.mark.parametrize("name", ["values", "train", "half", "forward"])
def test_names_that_torch_keeps_are_refused_at_once(name):
    with pytest.raises(GraphError, match=f"'{name}'.*choose another"):
        Graph([BlockSpec(name, nn.Linear(2, 2), ("u",), loss=mse)])


def test_learning_under_inference_mode_is_learning():
    with torch.inference_mode():
        result = train(chain(), PortableStream(10), Settings(level="trace", steps=10))
    outside = train(chain(), PortableStream(10), Settings(level="trace", steps=10))
    assert_equal(result, outside)


def test_one_activation_in_two_places_is_no_shared_weight():
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Linear(FEATURES, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, CLASSES)
    )
    result = train(model, PortableStream(5), Settings(level="trace", steps=5))
    assert len(result.blocks) == 3
    u = batches(1)[0][0]
    layers = [result.model[i] for i in (0, 2, 4)]
    expected = layers[2](relu(layers[1](relu(layers[0](u)))))
    assert torch.equal(result.model(u), expected)


@pytest.mark.parametrize(
    ("outputs", "loss", "words"),
    [(2, None, "3 classes"), (5, mse, "targets have dtype")],
)
def test_a_prediction_of_the_wrong_shape_is_found_before_the_run(outputs, loss, words):
    with pytest.raises(GraphError, match=words):
        train(nn.Sequential(nn.Linear(FEATURES, outputs)), PortableStream(3), Settings(), loss=loss)


def test_a_buffer_shared_by_blocks_is_refused():
    norm = nn.BatchNorm1d(5, affine=False)
    blocks = [
        BlockSpec("a", nn.Sequential(nn.Linear(FEATURES, 5), norm), ("u",)),
        BlockSpec("b", nn.Sequential(norm, nn.Linear(5, 2)), ("a",), loss=mse),
    ]
    with pytest.raises(GraphError, match="'a' and 'b' share a buffer"):
        Graph(blocks)


def test_a_run_without_targets_says_so():
    silent = from_iterable([(u, None) for u, _ in batches(9)], classes=CLASSES)
    result = train(chain(), silent, Settings(level="trace"))
    assert any("no sample had a target" in text for text in result.warnings)


@pytest.mark.ray
def test_two_threads_do_not_share_a_session(session):
    """The test session belongs to this thread; a run of another one is refused with the reason."""
    import threading

    caught = []

    def other():
        try:
            train(
                chain(),
                PortableStream(5),
                Settings.model_validate({"engine": {"kind": "ray", "actors": 1}}),
            )
        except ClusterError as error:
            caught.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    assert "another thread" in caught[0]


def test_a_loss_may_be_named():
    """`loss` is a field of the settings and an argument: both mean the same."""
    items = [(u, torch.ones(len(u), 2)) for u, _ in batches(5)]
    model = nn.Linear(FEATURES, 2)
    named = hamdist.train(model, items, level="backprop", loss="mse")
    given = hamdist.train(model, items, level="backprop", loss=mse)
    assert torch.equal(named.model.weight, given.model.weight)
    with pytest.raises(SettingsError, match="loss: .*received 'mean'"):
        hamdist.train(model, items, level="backprop", loss="mean")
