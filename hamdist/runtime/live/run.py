"""The handle of a live run: feed, predict, teach, change, look, stop."""

from __future__ import annotations

import atexit
import contextvars
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.inputs import NetworkInputs
from hamdist.dynamics.objective.losses import Losses, make_losses
from hamdist.errors import SettingsError, StreamError
from hamdist.runtime.live.answers import Answer, LiveStatus, Predictions
from hamdist.runtime.live.journal import Journal
from hamdist.runtime.nodes.live import Answered, HandedOver, News
from hamdist.runtime.nodes.source import checker_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.evaluate import Scores, Targets, evaluate
from hamdist.runtime.results.result import BlockState, Progress, RunResult
from hamdist.runtime.train.outcome import model_of
from hamdist.streams.check import Checker
from hamdist.streams.entries import Entry
from hamdist.streams.iterable import IterableStream
from hamdist.streams.live import LiveStream
from hamdist.streams.sample import Sample, Stream
from hamdist.streams.wrappers.chosen_targets import Chosen

Work = Callable[[Stream, Callable[[Progress], object]], RunResult]


class LiveRun:
    """A run that learns while one talks to it; `hamdist.start` makes one. As a context it stops the
    run at the end.

    Calls may come from several threads; they are accepted one after the other, and this order is
    the run. A call raises the error that has ended the run.
    """

    def __init__(
        self,
        work: Work,
        stream: LiveStream,
        reader: IterableStream,
        settings: Settings,
        losses: Losses | None,
        journal: Journal | None,
    ) -> None:
        self.settings = settings
        self.result: RunResult | None = None
        self._stream, self._reader, self._journal = stream, reader, journal
        self._losses = losses or make_losses(settings.loss, settings.ignore_index)
        self._patience = stream.spec.live
        self._answers: OrderedDict[int, Answer] = OrderedDict()
        self._parts: dict[int, dict[str, Tensor]] = {}
        self._from: dict[str, int] = {}  # by readout: the first number that is not there
        self._asked: set[int] = set()  # by predict, which takes its answer itself
        self._paused = False
        self._progress: Progress | None = None
        self._checks: list[Chosen] = []
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._graph: Graph | None = None
        self._made_plan: Plan | None = None
        self._checker: Checker | None = None
        stream.send, stream.started = self._receive, self._begin
        context = contextvars.copy_context()  # (with the caller's session of Ray)
        self._thread = threading.Thread(
            target=context.run, args=(self._run, work), daemon=True, name="hamdist-run"
        )
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            self._end()
            raise self._error
        atexit.register(self.stop)

    def _run(self, work: Work) -> None:
        try:
            self.result = work(self._stream, self._note)
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody calls)
            self._error = error
        finally:
            self._stream.finished(self._error)
            self._started.set()

    def _begin(self, stream: Stream, graph: Graph, plan: Plan) -> None:
        """Note what the run is made of; called by the engine's thread before the first tick."""
        self._graph, self._made_plan, self._checker = graph, plan, checker_of(plan)
        self._stream.blocks = tuple(plan.graph.blocks)
        while isinstance(stream, Chosen):
            self._checks.insert(0, stream)
            stream = stream._stream
        self._started.set()

    def _note(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def _plan(self) -> Plan:
        if self._made_plan is None:
            raise RuntimeError("the run has not begun")
        return self._made_plan

    # -- what comes back ------------------------------------------------------------------------

    def _receive(self, news: News) -> None:
        if isinstance(news, HandedOver):
            self._stream.handed(news.cut, news.block, news.state)
            return
        if news.number < self._from.get(news.readout, 0):
            return  # of an actor that was replaced, once more
        self._from[news.readout] = news.number + 1
        parts = self._parts.setdefault(news.number, {})
        parts[news.readout] = news.prediction
        readouts = self._plan.graph.readouts
        if len(parts) < len(readouts):
            return
        del self._parts[news.number]
        self._put(news, parts if len(readouts) > 1 else news.prediction)

    def _put(self, news: Answered, prediction: Tensor | dict[str, Tensor]) -> None:
        answer = Answer(news.number, prediction, news.event, self._plan.schedule)
        self._answers[news.number] = answer
        for number in list(self._answers)[: -self._patience]:
            if number not in self._asked:
                self._answers.pop(number, None)
        self._stream.answered(news.number)

    # -- talking --------------------------------------------------------------------------------

    def _sample(self, u: Any, y: Any, end: bool) -> Sample:
        """Return a sample for the stream. Raises StreamError for one that the run cannot use."""
        n = self._stream.fed
        sample = self._reader.sample(n, Sample(u, y, end))
        self._check(n, sample)
        return sample

    def _check(self, n: int, sample: Sample) -> None:
        for wrapper in self._checks:
            (sample,) = wrapper.chosen(iter([sample]))
        if self._checker is not None:
            self._checker.check(n, sample)

    def feed(self, u: Any, y: Any = None, *, end: bool = False, wait: bool = True) -> int:
        """Feed a sample; return its number.

        Args:
            u: (B, ...), as in `hamdist.train`; a dict where the model has several inputs.
            y: its label, if it is known; else `teach` may bring it later.
            end: the sample is the last one of its sequence.
            wait: for room, where the network is slower; False raises BlockingIOError instead.

        Raises:
            StreamError: the sample does not fit those before; nothing of it was accepted.
        """
        return self._stream.say(Entry("feed", sample=self._sample(u, y, end)), wait=wait)

    def predict(self, u: Any, *, end: bool = False, wait: bool = True) -> Answer:
        """Feed a sample without a label, and return its prediction. No weight moves by it."""
        if self._paused:
            raise StreamError("the run is paused, so no answer comes: go_on() first")
        entry = Entry("feed", sample=self._sample(u, None, end))
        number = self._stream.say(entry, awaits=True, wait=wait, noted=self._asked.add)
        try:
            self._stream.wait(lambda: number in self._answers)
            return self._answers.pop(number)
        except KeyError:
            raise StreamError(f"the run ended before the answer to sample {number}") from None
        finally:
            self._asked.discard(number)

    def teach(self, number: int, y: Any, *, wait: bool = True) -> None:
        """Give the label of an earlier sample, which passes the network once more to be learned.

        The score is that of the prediction of then (progressive validation with delay).

        Raises:
            StreamError: no such sample waits for a label, or states go from one sample to the next
                at this level, so that none can be shown again in between.
        """
        if not self._plan.knobs.pulse:
            raise StreamError(
                f"teach at level {self.settings.level.value!r}: its states go from one sample to "
                "the next, so none can be shown again in between; use a level of presentation "
                "'pulse' (trace, heads, backprop), or feed a sample when its label is there"
            )
        earlier = self._stream.unlabelled(number)
        if y is None:
            raise StreamError(f"sample {number}: y is None; a label that never comes is not taught")
        u = earlier.u if earlier.inputs is None else earlier.inputs
        label = self._reader.sample(number, Sample(u, y))  # type: ignore[arg-type]
        self._check(number, label)
        self._stream.say(Entry("teach", number, label), wait=wait)

    def set(self, *, learning: Mapping[str, float]) -> None:
        """Change the learning rate from the next sample on: `learning={"lr": 0.05}`.

        Blocks with a rate of their own keep its ratio to the others'.
        """
        known, lr = self.settings.learning.lr, learning.get("lr")
        if set(learning) != {"lr"} or not isinstance(lr, (int, float)) or not lr >= 0:
            raise SettingsError(f"set: learning is {dict(learning)}; give {{'lr': a number >= 0}}")
        if not self._plan.follows_lr or not known:
            raise SettingsError(
                "set: the run's step size does not come from learning.lr (or that is 0): dynamics."
                "beta is given; start it with learning={'lr': ...}"
            )
        self._stream.say(Entry("set", rate=lr / known))

    def pause(self) -> None:
        """Hold the network: what is fed waits until `go_on`."""
        self._stream.hold(paused=True)
        self._paused = True

    def go_on(self) -> None:
        """End a pause."""
        self._paused = False
        self._stream.hold(paused=False)

    def settle(self) -> None:
        """Emit idle ticks until all that is under way has come to its end."""
        self._stream.drained()

    # -- looking --------------------------------------------------------------------------------

    def predictions(self, *, follow: bool = False) -> Predictions:
        """Return the predictions of fed samples in their order, as pairs of number and answer.

        Args:
            follow: go on with samples to come, until the run ends; else end with those fed by now.
        """
        return Predictions(partial(self._next, follow=follow))

    def _next(self, number: int, *, follow: bool) -> tuple[int, Answer] | None:
        """Return the first answer from `number` on that nobody has taken."""

        def there() -> bool:
            fed = self._stream.fed
            if number < fed and not self._paused:
                self._stream.awaited.add(fed - 1) if self._missing(fed - 1) else None
            return self._first(number) is not None or not (follow or self._pending(number))

        self._stream.wait(there)
        first = self._first(number)
        return None if first is None else (first, self._answers.pop(first))

    def _missing(self, number: int) -> bool:
        return any(number >= self._from.get(name, 0) for name in self._plan.graph.readouts)

    def _pending(self, number: int) -> bool:
        last = self._stream.fed - 1
        return last >= number and self._missing(last)

    def _first(self, number: int) -> int | None:
        waiting = (n for n in list(self._answers) if n >= number and n not in self._asked)
        return min(waiting, default=None)

    def _blocks(self) -> dict[str, BlockState]:
        states: dict[str, BlockState] = self._stream.cut()
        return {name: states[name] for name in self._plan.graph.blocks}

    def model(self) -> nn.Module:
        """Return a plain module with the weights (or their averages) as they are now.

        All blocks' are of one emission of the stream (a consistent cut), and nothing waits for it.
        What is under way has not been learned yet: `settle` first, where it should be.
        """
        if self._graph is None:
            raise RuntimeError("the run has not begun")
        return model_of(self._graph, self._plan, self._blocks())

    def weights(self) -> dict[str, Tensor]:
        """Return the `state_dict` of `model()`."""
        return {name: t.detach().clone() for name, t in self.model().state_dict().items()}

    def evaluate(self, x: NetworkInputs, y: Targets) -> Scores:
        """Return the scores of `model()` on x (N, ...) with targets y. Nothing is learned of it."""
        with torch.inference_mode(False):
            ignored = self.settings.ignore_index
            return evaluate(self.model(), x, y, self._losses, ignore_index=ignored)

    def snapshot(self) -> str:
        """Take a snapshot now; return its place, from which `start(resume=...)` goes on.

        Raises:
            SettingsError: the run keeps none: give `out`, or `snapshots={"path": ...}`.
            SnapshotError: it could not be written.
        """
        if self._plan.snapshot_policy is None:
            raise SettingsError("snapshot: the run keeps none: give out=, or snapshots={'path': .}")
        return self._stream.snapshot()

    def status(self) -> LiveStatus:
        """Return where the run stands."""
        known = self._progress
        return LiveStatus(
            fed=self._stream.fed,
            answered=min((self._from.get(n, 0) for n in self._plan.graph.readouts), default=0),
            waiting=self._stream.waiting,
            paused=self._paused,
            seconds=0.0 if known is None else known.seconds,
            windows=[] if known is None else list(known.windows),
            replaced=[] if known is None else list(known.replaced),
        )

    # -- ending ---------------------------------------------------------------------------------

    def stop(self) -> RunResult:
        """End the stream behind what was fed, and return the result, as of `hamdist.train`."""
        self._end()
        if self._error is not None:
            raise self._error
        if self.result is None:
            raise StreamError("the run has no result")
        return self.result

    def _end(self) -> None:
        atexit.unregister(self.stop)
        self._stream.close()
        self._thread.join()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None:
            self.stop()
        else:
            self._end()
