"""Answers of a live run, and the functions that it calls as things happen, with uses of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hamdist.dynamics.graph.inputs import NetworkInputs
from hamdist.errors import SettingsError, Stop
from hamdist.runtime.results.events import ActorReplaced, SnapshotComplete, WindowFull
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.results.scores import Scores, Targets

ADDRESS = "address.json"  # in a served run's folder
SAFETENSORS = "application/x-safetensors"


@dataclass(frozen=True, slots=True)
class Answer:
    """The prediction of sample `number`: (B, ...), or a dict of them by readout."""

    number: int
    prediction: Tensor | dict[str, Tensor]
    _versions: Callable[[], dict[str, int]] = field(repr=False)

    @property
    def versions(self) -> dict[str, int]:
        """Return the updates that each block's weights had had when the sample passed it (with
        presentation 'hold': when its prediction was made), as the stamps of signals count them."""
        return self._versions()


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """Samples that were `fed`, and `answered`; what is `waiting` for the network; the engine's
    latest report, of one to four a second."""

    fed: int
    answered: int
    waiting: int
    paused: bool
    progress: Progress | None


class Predictions:
    """The predictions of a run, for `for` and `async for`."""

    def __init__(self, run: Any, follow: bool) -> None:
        self._run, self._follow, self._number = run, follow, 0

    def __iter__(self) -> Iterator[tuple[int, Answer]]:
        return self

    def __next__(self) -> tuple[int, Answer]:
        answers: tuple[int, Answer] | None = self._run._following(self._number, self._follow)
        if answers is None:
            raise StopIteration
        self._number = answers[0] + 1
        return answers

    def __aiter__(self) -> AsyncIterator[tuple[int, Answer]]:
        return self

    async def __anext__(self) -> tuple[int, Answer]:
        answers = await asyncio.to_thread(next, self, None)
        if answers is None:
            raise StopAsyncIteration
        return answers


class Callback:
    """Base of callbacks, each of which does nothing.

    `run` is the `LiveRun`, `answer` an `Answer`. They are called by the thread that feeds, within
    its call. One that raises `hamdist.Stop` ends the run: the call raises it on, and the run as a
    context takes it for its end.
    """

    def on_start(self, run: Any) -> None:
        """Handle the start of the run.

        Args:
            run: the `LiveRun`.
        """

    def on_sample(self, run: Any, answer: Any) -> None:
        """Handle the answer to a sample.

        Args:
            run: the `LiveRun`.
            answer: its number, prediction (B, ...) and weight versions (`Answer`).
        """

    def on_window(self, run: Any, event: WindowFull) -> None:
        """Handle a full window of prequential metrics.

        Args:
            run: the `LiveRun`.
            event: the readout and the window.
        """

    def on_evaluate(self, run: Any, scores: Scores, model: nn.Module) -> None:
        """Handle the scores of `run.evaluate`.

        Args:
            run: the `LiveRun`.
            scores: loss, and accuracy of class targets.
            model: with the weights that were scored; a copy, which may be kept.
        """

    def on_snapshot(self, run: Any, event: SnapshotComplete) -> None:
        """Handle a complete snapshot.

        Args:
            run: the `LiveRun`.
            event: its place and tick.
        """

    def on_loss_of_actor(self, run: Any, event: ActorReplaced) -> None:
        """Handle the replacement of a lost actor.

        Args:
            run: the `LiveRun`.
            event: the actor, its blocks, and how long it took.
        """

    def on_end(self, run: Any, result: RunResult) -> None:
        """Handle the end of the run.

        Args:
            run: the `LiveRun`.
            result: what the caller gets; changes to it are seen there.
        """


METHOD_OF: Mapping[type, str] = {
    Answer: "on_sample",
    WindowFull: "on_window",
    SnapshotComplete: "on_snapshot",
    ActorReplaced: "on_loss_of_actor",
}


def check_callbacks(callbacks: object) -> None:
    """Raise SettingsError for what is no list of callbacks."""
    if not isinstance(callbacks, Sequence):
        raise SettingsError(f"callbacks is a {type(callbacks).__name__}; give a list of callbacks")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise SettingsError(f"callbacks: {callback!r} is no hamdist.Callback; give one, made")


class Evaluation(Callback):
    """Evaluates the run on held-out data whenever `every` more samples have been answered.

    The weights are those of one emission (a consistent cut), at level `backprop` in one process
    those that have learned all samples so far, and nothing is learned of it. On Ray the network
    goes on meanwhile: up to 64 samples may have been learned since, of which there is no evaluation
    more, as there is one of all that a journal repeats. Sequences come to their end first.

    Args:
        x: the inputs, (N, ...).
        y: their targets, (N, ...).
        every: number of samples.

    Raises:
        SettingsError: `every` is below 1.
    """

    def __init__(self, x: NetworkInputs, y: Targets, every: int) -> None:
        if every < 1:
            raise SettingsError(f"Evaluation: every is {every}; at least 1")
        self.x, self.y, self.every = x, y, every
        self._due, self._scored = False, 0  # samples that the latest evaluation has seen

    def on_start(self, run: Any) -> None:  # noqa: ARG002
        """Begin anew."""
        self._due, self._scored = False, 0

    def on_sample(self, run: Any, answer: Any) -> None:
        """Evaluate, if it is time."""
        self._due |= (answer.number + 1) % self.every == 0 and answer.number >= self._scored
        if self._due and run.can_be_cut:
            self._due, self._scored = False, run.status().answered
            run.evaluate(self.x, self.y)


class EndsWhen(Callback):
    """Stops the run when a condition of its `status()` holds (`start(until=)`), sample by sample.

    Args:
        until: returns True at the end.
    """

    def __init__(self, until: Callable[[Any], bool]) -> None:
        if not callable(until):
            raise SettingsError(f"until is {until!r}; give a function of the run's status")
        self.until = until

    def on_sample(self, run: Any, answer: Any) -> None:
        """Stop the run, if it is time. Raises Stop."""
        if self.until(run.status()):
            raise Stop(f"until= holds behind sample {answer.number}")


class EarlyStopping(Callback):
    """Stops the run when `patience` evaluations in a row were not better than the best.

    It begins anew with each run. One that goes on with its journal (`start(resume=)`) is told
    nothing of evaluations before, unless it gets the same object.

    Args:
        patience: number of evaluations.
        accuracy: True: more accuracy is better; False: less loss.
        least: the difference from which on scores are better.

    Raises:
        SettingsError: `patience` is below 1; by `on_evaluate`, for `accuracy` of targets that are
            no classes.
    """

    def __init__(self, patience: int = 3, *, accuracy: bool = False, least: float = 0.0) -> None:
        if patience < 1:
            raise SettingsError(f"{type(self).__name__}: patience is {patience}; at least 1")
        self.patience, self.accuracy, self.least = patience, accuracy, least
        self.best: Scores | None = None
        self.worse = 0

    def on_start(self, run: Any) -> None:
        """Begin anew, unless the run goes on."""
        if not run.status().fed:
            self.best, self.worse = None, 0

    def better(self, scores: Scores) -> bool:
        """Return True, and remember the scores, if they are the best so far.

        Args:
            scores: of an evaluation.
        """
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

    def on_start(self, run: Any) -> None:
        """Begin anew, unless the run goes on."""
        super().on_start(run)
        if self.best is None:
            self.weights = None

    def on_evaluate(self, run: Any, scores: Scores, model: nn.Module) -> None:  # noqa: ARG002
        """Keep the weights, if they are the best so far."""
        if self.better(scores):
            self.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}

    def on_end(self, run: Any, result: RunResult) -> None:  # noqa: ARG002
        """Give the result's model the best weights."""
        if self.weights is not None:
            result.model.load_state_dict(self.weights)
