"""Comparisons with a stand-in for the engines: plan, settings per level, pairing, interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hamdist.config import EngineKind, Level, Settings
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import SettingsError
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.results.scores import evaluate
from hamdist.streams import from_loader, held_out
from hamdist.streams.sample import Stream
from hamdist.study.run import run as runs
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.comparison import PlannedRun, compare, plan
from hamdist.study.run.own_data import OwnData, OwnFunctions
from hamdist.study.run.run import Timeline, run_level
from hamdist.study.shared.recipes import load_settings, recipes

SETTINGS = Settings.model_validate(
    {
        "steps": 12,
        "seed": 5,
        "model": {"width": 8, "depth": 2},
        "stream": {"batch": 4},
        "learning": {"lr": 0.05},
        "metrics": {"window": 5},
        "compare": {"levels": ["trace", "local"], "seeds": 2},
        "levels": {"local": {"learning": {"lr": 0.01}}, "backprop": {"learning": {"lr": 0.3}}},
    }
)


class Engines:
    """Stands in for `train`: notes what it was given, learns nothing."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.calls: list[tuple[nn.Module, list[torch.Tensor], Settings]] = []
        self.interrupt_at = interrupt_at

    def __call__(
        self,
        model: nn.Module,
        stream: Stream,
        settings: Settings,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        resume: object = None,
        frozen: bool = False,
    ) -> RunResult:
        assert resume is None
        assert not frozen
        first = [sample.u for sample, _ in zip(stream.samples(), range(3), strict=False)]
        self.calls.append((copy.deepcopy(model), first, settings))
        steps = settings.steps or 0
        windows = [Window(i, i, 1, 1.0, 2, 4) for i in range(steps)]
        if on_progress is not None:
            on_progress(Progress(0.6, 6, steps, windows[:6], []))
            on_progress(Progress(3.0, steps, steps, windows, []))
        return RunResult(
            model=model,
            blocks={},
            windows={"block1": windows},
            samples=steps,
            ticks=steps + 2,
            seconds=3.0,
            startup_seconds=0.1,
            bytes_per_edge={"block0->block1": 240},
            peak_memory={"driver": 10},
            staleness=2,
            interrupted=len(self.calls) - 1 == self.interrupt_at,
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    fake = Engines()
    monkeypatch.setattr(runs, "train", fake)
    return fake


def test_plan() -> None:
    assert plan(SETTINGS) == [
        PlannedRun(None, 5),
        PlannedRun(None, 6),
        PlannedRun(Level.TRACE, 5),
        PlannedRun(Level.LOCAL, 5),
        PlannedRun(Level.TRACE, 6),
        PlannedRun(Level.LOCAL, 6),
    ]
    twice = Settings.model_validate({"steps": 1, "compare": {"levels": ["trace", "trace"]}})
    assert [item.name for item in plan(twice)] == ["centralised", "trace"]
    with pytest.raises(SettingsError, match="--steps"):
        plan(Settings())


def test_same_weights_and_stream_per_seed_own_settings_per_level(engines: Engines) -> None:
    finished = list(compare(SETTINGS, plan(SETTINGS)))
    assert [(run.level, run.seed) for run in finished] == [
        (item.name, item.seed) for item in plan(SETTINGS)
    ]
    assert [run.engine for run in finished] == ["pytorch"] * 2 + ["inprocess"] * 4
    models, items, asked = zip(*engines.calls, strict=True)
    assert [(s.level, s.seed, s.learning.lr) for s in asked] == [
        (Level.TRACE, 5, 0.05),
        (Level.LOCAL, 5, 0.01),
        (Level.TRACE, 6, 0.05),
        (Level.LOCAL, 6, 0.01),
    ]
    weights = [model[0].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(torch.equal(a, b) for a, b in zip(items[0], items[1], strict=True))
    assert not torch.equal(items[0][0], items[2][0])


def test_baseline_has_the_settings_of_backprop(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train_centralised", engines)
    list(compare(SETTINGS, [PlannedRun(None, 7)]))
    assert engines.calls[0][2].learning.lr == 0.3
    assert engines.calls[0][2].seed == 7


def test_interrupted_run_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "train", Engines(interrupt_at=1))
    finished = list(compare(SETTINGS, plan(SETTINGS)))
    assert [run.interrupted for run in finished] == [False, False, False, True]
    assert finished[-1].held_out is None


@pytest.mark.parametrize("baseline", [None, CENTRALISED])
def test_rows_of_uneven_batches(baseline: str | None) -> None:
    """40 rows are a batch of 32 and one of 8, three times over: 20 in the mean."""
    whole = TensorDataset(torch.randn(40, 6), torch.zeros(40, dtype=torch.int64))
    own = OwnData(from_loader(DataLoader(whole, batch_size=32), classes=2, epochs=3))
    settings = SETTINGS.for_level(Level.TRACE)
    run, _ = run_level(
        settings,
        baseline=baseline,
        own=OwnFunctions(
            lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), lambda _: own
        ),
    )
    assert (run.samples, run.rows, run.batch) == (6, 120, 20)
    assert run.rows_per_second == pytest.approx(120 / run.seconds)


@pytest.mark.usefixtures("engines")
def test_numbers_of_a_run() -> None:
    own = SETTINGS.for_level(Level.TRACE)
    run, model = run_level(own)
    assert (run.samples, run.batch, run.ticks, run.staleness) == (12, 4, 14, 2)
    assert run.rows_per_second == pytest.approx(16.0)
    # 6 samples had entered after 0.6 s, 12 after 3 s: linear between
    assert run.window_seconds == pytest.approx([0.1 * i for i in range(1, 7)]
                                               + [0.6 + 0.4 * i for i in range(1, 7)])  # fmt: skip
    x, y = held_out(own.stream, seed=5, dtype=torch.float32, samples=12)
    with torch.no_grad():
        prediction = model(x)
    assert run.held_out is not None
    assert run.held_out.accuracy == pytest.approx(
        float((prediction.argmax(1) == y).double().mean())
    )
    assert run.held_out.loss == pytest.approx(float(cross_entropy(prediction, y)), rel=1e-5)


def test_a_users_model_is_made_anew_per_seed(engines: Engines) -> None:
    list(
        compare(
            SETTINGS, plan(SETTINGS), own=OwnFunctions(lambda: nn.Sequential(nn.Linear(64, 10)))
        )
    )
    weights = [model[0].weight for model, _, _ in engines.calls]
    assert weights[0].shape == (10, 64)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_timeline_is_bounded_and_keeps_its_shape() -> None:
    timeline = Timeline()
    for i in range(20_000):
        timeline(Progress(i * 0.1, i, None, [], []))
    assert len(timeline._points) <= runs.TIMELINE_LIMIT
    assert timeline.at([0, 5_000, 20_000], (20_000, 2_000.0)) == pytest.approx([0, 500, 2_000])


def test_evaluation_in_pieces_leaves_the_modes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamdist.runtime.results.scores.CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9), nn.BatchNorm1d(2)).double()
    model[2].eval()
    y = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    scores = evaluate(model, x, y, mse)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    with torch.no_grad():
        prediction = model[2](model[0](x))
    assert scores.loss == pytest.approx(float(0.5 * (prediction - y).square().sum(1).mean()))
    assert scores.accuracy is None


def test_every_recipe_is_valid_for_each_of_its_levels() -> None:
    images = ["digits", "fashion-mnist", "resnet", "smooth-digits", "vit"]
    to_compare = [*images, "gpt", "lstm"]
    assert list(recipes()) == sorted([*to_compare, "ahead", "sentences", "tracking"])
    for name, description in recipes().items():
        settings = load_settings(name)
        assert settings.name == name
        assert plan(settings)
        assert settings.engine.kind is EngineKind.RAY or name not in to_compare
        assert len(description) > 20
        for level in settings.compare.levels:
            assert settings.for_level(level).level is level
