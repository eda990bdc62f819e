"""Centralised training: the whole model in this process, plain PyTorch, an optimiser of torch's.

The same model, stream, order, loss, optimiser (torch.optim.SGD, or what `learning` names, with its
groups) and step size as the runs it is compared with, and the same moving average of the weights
(`learning.average`) for evaluation. The step size of sample n (from 0) follows the same course
(dynamics/updates/learning_rate.py). Samples without target are not learned from, but count. The
prequential loss comes from the forward pass that the gradient belongs to.

A recurrent network (a MergedSequence) takes one token after the other. It makes one step by the sum
of the losses at a sequence's end, or after `locality.truncation` tokens; then states go on without
their gradient (truncated backpropagation through time), also at ends if `dynamics.reset.h: never`.

`frozen` trains the last layer alone, on the hidden blocks as they were drawn: what a level without
memory has to beat before it can be said to learn anything in its hidden blocks.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hamdist.config import EngineSettings, FirstStep, LearningSettings, Reset, Settings
from hamdist.dynamics.graph.inputs import call_model
from hamdist.dynamics.graph.merged import MergedSequence
from hamdist.dynamics.objective.losses import (
    ONLY,
    Losses,
    LossFunction,
    Weighted,
    counts,
    losses_of,
    make_losses,
    tensors,
)
from hamdist.dynamics.objective.prequential import Prequential, Window
from hamdist.dynamics.updates.average import Average
from hamdist.dynamics.updates.learning_rate import StepCourse
from hamdist.dynamics.updates.optimizers import OptimizerRule
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import BlockError, GraphError, SettingsError
from hamdist.runtime.placement.step_costs import example_sample
from hamdist.runtime.plan.learners import own_optimizer
from hamdist.runtime.process.threads import cores, torch_threads
from hamdist.runtime.process.usage import peak_bytes, reset_peak
from hamdist.runtime.results.result import BlockProgress, Progress, RunResult
from hamdist.runtime.train.prepare import in_dtype_of
from hamdist.streams.replay import next_sample
from hamdist.streams.sample import (
    Emission,
    Emits,
    Sample,
    SampleSpec,
    Stream,
    report_of,
    split_weights,
)

CENTRALISED = "centralised"
FROZEN = "frozen"
PROGRESS_SECONDS = 0.25


def train_centralised(
    model: nn.Module,
    stream: Stream,
    settings: Settings,
    *,
    loss: Losses | None = None,
    frozen: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
) -> RunResult:
    """Train a copy of `model` with backpropagation; `frozen`: its last child with weights alone.

    Uses `settings.learning`, `locality.accumulate`, `steps`, `loss` (unless `loss` is given),
    `seed` (of what the model draws from torch's global generator, which is put back afterwards),
    `metrics`, and `engine`: as many threads as a run with that engine has, or one where a short
    trial finds one faster. Ctrl-C ends the training with what was reached (`interrupted`). Of a
    model that returns several outputs the losses add up, and `windows` has those of each.

    Raises LevelError for a decay without `steps`, SettingsError for `frozen` with a model that is
    no nn.Sequential of several children with weights, StreamError for an unusable sample,
    GraphError for losses or targets of outputs that the model does not have, and BlockError named
    'centralised' where the model, the loss or their gradient fails.
    """
    entered = time.perf_counter()
    reset_peak()
    losses = make_losses(settings.loss, settings.ignore_index) if loss is None else loss
    model, stream = in_dtype_of(settings, model, stream)
    trained = copied(model)
    if frozen:
        _freeze(trained)
    trainer = _Trainer(trained, settings, losses, stream.spec)
    # (Where a label comes late the sample is shown again: torch has no gradient of an old pass.)
    with generator_kept(settings.seed):
        threads = _threads(trainer, stream.spec, settings)
        torch.manual_seed(settings.seed)
        with torch_threads(threads):
            start, cpu = time.perf_counter(), time.process_time()
            interrupted = _train(trainer, stream, settings, start, on_progress)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    averaged = trainer.averaged()
    return RunResult(
        model=averaged or trainer.model,
        plain=None if averaged is None else trainer.model,
        blocks={},
        windows={name or CENTRALISED: metric.windows for name, metric in trainer.metrics.items()},
        samples=trainer.samples,
        rows=trainer.rows,
        ticks=trainer.samples,
        seconds=seconds,
        startup_seconds=start - entered,
        bytes_per_edge={},
        peak_memory={"driver": peak_bytes()},
        time_use={"driver": {"cpu": cpu}},
        staleness=0,
        stream=report_of(stream),
        interrupted=interrupted,
    )


class _Trainer:
    """Learns one sample at a time. samples: how many it was shown. metrics: by output."""

    def __init__(
        self, model: nn.Module, settings: Settings, loss: Losses, spec: SampleSpec
    ) -> None:
        self._settings, self._spec = settings, spec
        self._waiting: dict[int, dict[str, Tensor]] = {}  # predictions that wait for their labels
        self._states: dict[str, Tensor] | None = None  # of a recurrent network, of the token before
        self._tokens: list[list[Tensor]] = []  # losses, since the latest step
        self.model, self.loss = model, loss
        self._losses: dict[str, LossFunction] | None = None
        self.course = StepCourse(settings.learning, settings.steps)
        self.optimisers = _optimisers(model, settings.learning)
        self._groups = [group for optimizer in self.optimisers for group in optimizer.param_groups]
        self._rates = [group["lr"] for group in self._groups]
        self.metrics: dict[str, Prequential] = {}
        average = settings.learning.average
        theta = [p.data for p in model.parameters() if p.requires_grad]
        self.average = None if isinstance(average, str) else Average(theta, average)
        self.samples = self.rows = self.updates = 0
        self._group, self._gathered = settings.locality.accumulate or 1, False

    def show(self, sample: Sample) -> None:
        """Test on the sample, then train on it; a sample without target only counts. One whose
        label comes late passes twice (streams/wrappers/late_targets.py)."""
        emission = sample.emission or Emission(Emits.SAMPLE, 0, self.samples, waits=False)
        names = self._spec.targets or [ONLY]
        waits = emission.kind is Emits.SAMPLE and emission.waits
        shown = waits or isinstance(self.model, MergedSequence)
        try:
            if waits:
                self._predict(sample, emission.number)
            elif shown or any(sample.target(name) is not None for name in names):
                self._learn(sample, emission)
            if self._gathered and (self.samples + 1) % self._group == 0:
                self._move()
        except GraphError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise BlockError(CENTRALISED, self.samples, text, traceback.format_exc()) from error
        if emission.kind is Emits.SAMPLE:
            self.samples, self.rows = self.samples + 1, self.rows + len(sample.u)

    def _predictions(self, sample: Sample) -> dict[str, Tensor]:
        if isinstance(self.model, MergedSequence):
            self._states = self.model.token(sample.u, self._states)
            first, *more = self.model.readouts
            states = self._states
            return {n: states[n] for n in (first, *more)} if more else {ONLY: states[first]}
        return tensors(call_model(self.model, sample.u if sample.inputs is None else sample.inputs))

    def _predict(self, sample: Sample, number: int) -> None:
        """Keep the predictions, which are scored when the label has come."""
        with torch.no_grad():
            self._waiting[number] = self._predictions(sample)
        if len(self._waiting) > self._spec.patience:
            del self._waiting[min(self._waiting)]

    def _learn(self, sample: Sample, emission: Emission) -> None:
        earlier = self._waiting.pop(emission.number, None)
        predictions = self._predictions(sample)
        losses = self._losses = self._losses or self._losses_of(predictions)
        values, ignored = [], self._settings.ignore_index
        for name, loss in losses.items():
            y = sample.target(name)
            of, plain = self._spec.target(name), y
            if y is not None and of is not None and self._spec.weighted:
                plain = split_weights(y, of)[0]
                loss = Weighted(loss, partial(split_weights, spec=of), ignored)
            if y is not None and plain is not None and counts(plain, ignored):
                values.append(loss(predictions[name], y))
                scored, value = predictions[name].detach(), values[-1].detach()
                if earlier is not None:
                    scored = earlier[name]
                    value = loss(scored, y)
                self.metrics[name].record(emission.number, scored, plain, value)
        values = self._closed(values, end=sample.end)
        if not values:
            return
        if not self._gathered:
            self.model.zero_grad()
        if self._group > 1:
            values = [value / self._group for value in values]
        torch.autograd.backward(values)
        self._gathered = True

    def _closed(self, values: list[Tensor], *, end: bool) -> list[Tensor]:
        """Return the losses of this step; none where tokens of its sequence are still to come."""
        if not isinstance(self.model, MergedSequence):
            return values
        self._tokens.append(values)
        if not end and len(self._tokens) != self._settings.locality.truncation:
            return []
        values, self._tokens = [v for token in self._tokens for v in token], []
        states = {n: h.detach() for n, h in (self._states or {}).items()}
        carries = self._settings.dynamics.reset.h is Reset.NEVER
        self._states = states if carries or not end else None
        return values

    def _move(self) -> None:
        factor, clip = self.course(self.samples), self._settings.learning.network_clip
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimisers:
            optimizer.step()
        self._gathered = False
        self.updates += 1
        if self.average is not None:
            self.average.update()

    def averaged(self) -> nn.Module | None:
        """Return the model with the average of its weights, if there is one."""
        if self.average is None:
            return None
        model = copied(self.model)
        moving = [p for p in model.parameters() if p.requires_grad]
        for p, value in zip(moving, self.average.values, strict=True):
            p.data.copy_(value)
        return model

    def _losses_of(self, predictions: dict[str, Tensor]) -> dict[str, LossFunction]:
        """Return the losses of the outputs that have one; each gets metrics of its own."""
        targets = self._spec.targets
        if list(predictions) == [ONLY] and targets is not None:
            raise GraphError(
                f"the stream has targets by readout ({', '.join(map(repr, targets))}), but "
                "the model returns one tensor: return a dict of predictions by these names, or "
                "give the stream one target"
            )
        losses = losses_of(list(predictions), self.loss, targets)
        of, ignored = self._settings.metrics, self._settings.ignore_index
        self.metrics = {n: Prequential(of.window, of.limit, ignore_index=ignored) for n in losses}
        return losses

    def windows(self) -> list[Window]:
        """Return those of the first output, as engines under way do."""
        return next((metric.windows for metric in self.metrics.values()), [])


def _freeze(model: nn.Module) -> None:
    """Freeze all weights but those of the last child that has some."""
    if isinstance(model, MergedSequence):
        for name in model.parents.keys() - set(model.readouts):
            model.blocks[name].requires_grad_(False)
        return
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if not isinstance(model, nn.Sequential) or len(children) < 2:
        raise SettingsError(
            "model: 'frozen' trains the last child with weights of an nn.Sequential of several; "
            f"this {type(model).__name__} has {len(children)}"
        )
    for child in children[:-1]:
        child.requires_grad_(False)


def _optimisers(model: nn.Module, learning: LearningSettings) -> list[torch.optim.Optimizer]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, adaptive = learning.optimizer, learning.adaptive
    if optimizer is not None:
        rule = OptimizerRule(optimizer, lr=learning.lr, own=own_optimizer(optimizer))
        return rule.optimizers(CENTRALISED, named)
    if adaptive is None:
        constants = (learning.lr, learning.momentum, learning.dampening, learning.weight_decay)
        return [torch.optim.SGD(named.values(), *constants)]
    betas, decay = (learning.momentum, adaptive.memory), learning.weight_decay
    return [torch.optim.AdamW(named.values(), learning.lr, betas, adaptive.epsilon, decay)]


def _train(
    trainer: _Trainer,
    stream: Stream,
    settings: Settings,
    start: float,
    on_progress: Callable[[Progress], object] | None,
) -> bool:
    """Show every sample; return True where Ctrl-C came first."""
    reported, interrupted = start, False
    steps, samples = settings.steps, iter(stream.samples())
    try:
        while steps is None or trainer.samples < steps:
            sample = next_sample(samples, trainer.samples)
            if sample is None:
                break
            trainer.show(sample)
            now = time.perf_counter()
            if on_progress is not None and now - reported >= PROGRESS_SECONDS:
                on_progress(_progress(trainer, steps, now - start))
                reported = now
    except KeyboardInterrupt:
        interrupted = True
    for metrics in trainer.metrics.values():
        metrics.flush()
    if on_progress is not None:
        on_progress(_progress(trainer, steps, time.perf_counter() - start))
    return interrupted


def _progress(trainer: _Trainer, steps: int | None, seconds: float) -> Progress:
    return Progress(
        seconds=seconds,
        samples=trainer.samples,
        steps=steps,
        windows=trainer.windows(),
        blocks=[BlockProgress(CENTRALISED, trainer.samples, trainer.updates)],
    )


def _threads(trainer: _Trainer, spec: SampleSpec, settings: Settings) -> int:
    """Return 1, or as many threads as the compared run has: whichever trains a copy faster."""
    probe = _Trainer(copied(trainer.model), settings, trainer.loss, spec)
    sample = example_sample(spec)

    def step() -> None:
        probe.samples = 0
        probe.show(sample)

    return faster_of({1, fair_threads(settings.engine)}, step)


def baseline_warnings(settings: Settings) -> list[str]:
    """Return a warning where the levels do not follow `learning` alone, which is all SGD knows."""
    d = settings.dynamics
    constants = ("beta", "phi", "eta", "eta_omega", "weight_cost")
    others = [f"dynamics.{name}" for name in constants if getattr(d, name)]
    if any(block.beta is not None or block.eta is not None for block in d.blocks.values()):
        others.append("dynamics.blocks")
    learning = settings.learning
    dampened = learning.first_step is FirstStep.DAMPENED
    if dampened and learning.momentum and learning.dampening:
        others.append("learning.first_step")
    others += ["learning.clip"] if learning.clip != "off" and not learning.network_clip else []
    others += ["learning.inputs"] if learning.inputs != "off" else []
    others += [f"learning.{name}" for name in ("heads", "blocks") if getattr(learning, name)]
    if not others:
        return []
    return [
        f"centralised training follows 'learning' alone, not {', '.join(others)}: the gap to it is "
        "not that of locality"
    ]


WARM_UP, REPEATS, CLEARLY = 3, 15, 1.1


def fair_threads(engine: EngineSettings) -> int:
    """Return the threads that all processes of a run with `engine` use, at most the cores."""
    return min(engine.processes(cores()) * engine.threads, cores())


def faster_of(candidates: set[int], step: Callable[[], None]) -> int:
    """Return the number of threads with which `step` is fastest (median of a few).

    More threads than the fewest must win clearly: on a busy machine each one waits for the last.
    """
    fewest, *more = sorted(candidates)
    if not more:
        return fewest
    seconds = {threads: _seconds(threads, step) for threads in (fewest, *more)}
    best = min(more, key=seconds.__getitem__)
    return best if seconds[best] * CLEARLY < seconds[fewest] else fewest


def _seconds(threads: int, step: Callable[[], None]) -> float:
    times = []
    with torch_threads(threads):
        for _ in range(WARM_UP + REPEATS):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    return sorted(times[WARM_UP:])[REPEATS // 2]
