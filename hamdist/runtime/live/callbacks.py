"""Functions that a live run calls as things happen, and three users of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hamdist.dynamics.graph.inputs import NetworkInputs
from hamdist.errors import SettingsError, Stop
from hamdist.runtime.results.events import ActorReplaced, SnapshotComplete, WindowFull
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.results.scores import Scores, Targets


class Callback:
    """Base of callbacks, each of which does nothing.

    `run` is the `LiveRun`, `answer` an `Answer`. They are called by the thread that feeds, within
    its call. One that raises `hamdist.Stop` ends the run: the call raises it on, and the run as a
    context takes it for its end.
    """

    def on_start(self, run: Any) -> None:
        """The run has begun."""

    def on_sample(self, run: Any, answer: Any) -> None:
        """A sample has been answered."""

    def on_window(self, run: Any, event: WindowFull) -> None:
        """A window of prequential metrics is full."""

    def on_evaluate(self, run: Any, scores: Scores, model: nn.Module) -> None:
        """`run.evaluate` has scored a model."""

    def on_snapshot(self, run: Any, event: SnapshotComplete) -> None:
        """A snapshot is complete."""

    def on_loss_of_actor(self, run: Any, event: ActorReplaced) -> None:
        """An actor was lost, and has been replaced."""

    def on_end(self, run: Any, result: RunResult) -> None:
        """The run has ended; what changes in `result` the caller gets."""


class Evaluation(Callback):
    """Evaluates the run on held-out x (N, ...) with targets y, whenever `every` more samples came.

    The weights are those of one emission (a consistent cut), and nothing is learned of it.
    """

    def __init__(self, x: NetworkInputs, y: Targets, every: int) -> None:
        if every < 1:
            raise SettingsError(f"Evaluation: every is {every}; at least 1")
        self.x, self.y, self.every = x, y, every

    def on_sample(self, run: Any, answer: Any) -> None:
        """Evaluate, if it is time."""
        if (answer.number + 1) % self.every == 0:
            run.evaluate(self.x, self.y)


class EarlyStopping(Callback):
    """Stops the run when `patience` evaluations in a row were not better than the best.

    accuracy: more of it is better; else a smaller loss, by more than `least`.
    """

    def __init__(self, patience: int = 3, *, accuracy: bool = False, least: float = 0.0) -> None:
        self.patience, self.accuracy, self.least = patience, accuracy, least
        self.best: Scores | None = None
        self.worse = 0

    def better(self, scores: Scores) -> bool:
        """Return True, and remember the scores, if they are the best so far."""
        value, best = self._value(scores), -float("inf")
        if self.best is not None:
            best = self._value(self.best)
        if value - self.least > best:
            self.best = scores
            return True
        return False

    def _value(self, scores: Scores) -> float:
        if self.accuracy and scores.accuracy is None:
            raise SettingsError("EarlyStopping: accuracy of targets that are no classes")
        return scores.accuracy or 0.0 if self.accuracy else -scores.loss

    def on_evaluate(self, run: Any, scores: Scores, model: nn.Module) -> None:  # noqa: ARG002
        """Count an evaluation that was not better. Raises Stop."""
        self.worse = 0 if self.better(scores) else self.worse + 1
        if self.worse >= self.patience:
            raise Stop(f"{self.worse} evaluations were not better than {self.best}")


class BestWeights(EarlyStopping):
    """Keeps the weights of the best evaluation, and gives them to `result.model` at the end."""

    weights: dict[str, Tensor] | None = None

    def on_evaluate(self, run: Any, scores: Scores, model: nn.Module) -> None:  # noqa: ARG002
        """Keep the weights, if they are the best so far."""
        if self.better(scores):
            self.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}

    def on_end(self, run: Any, result: RunResult) -> None:  # noqa: ARG002
        """Give the result's model the best weights."""
        if self.weights is not None:
            result.model.load_state_dict(self.weights)
