"""The handle of a live run: feed, predict, teach, change, look, stop."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import copy
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.inputs import NetworkInputs
from hamdist.dynamics.objective.losses import Losses, make_losses
from hamdist.dynamics.user_modules.copies import loss_copy
from hamdist.errors import SettingsError, Stop, StreamError
from hamdist.runtime.live.callbacks import METHOD_OF, Answer, Callback, LiveStatus, Predictions
from hamdist.runtime.live.journal import Journal
from hamdist.runtime.nodes.emissions import Answered, HandedOver
from hamdist.runtime.nodes.source import checker_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.events import Evaluated, EventListener, RunEvent, SettingsChanged
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.results.run_events import RunEvents
from hamdist.runtime.results.scores import Scores, Targets, evaluate
from hamdist.runtime.train.outcome import model_of
from hamdist.streams.check import Checker
from hamdist.streams.entries import Entry
from hamdist.streams.iterable import IterableStream
from hamdist.streams.live import LiveStream
from hamdist.streams.sample import Sample, SampleSpec, Stream
from hamdist.streams.wrappers.derived import Chosen


class LiveRun(contextlib.AbstractContextManager["LiveRun"]):
    """A run that learns while one talks to it (`hamdist.start`); as a context it stops at the end.

    Calls may come from several threads; they are accepted one after the other, and this order is
    the run. A call raises the error that has ended the run. `interrupted`: a signal ends it.
    """

    interrupted = False

    def __init__(
        self,
        work: Callable[[Stream, Callable[[Progress], object]], RunResult],
        stream: LiveStream,
        reader: IterableStream,
        settings: Settings,
        losses: Losses | None,
        journal: Journal | None,
        callbacks: Sequence[Callback] = (),
        listeners: Sequence[EventListener] = (),
    ) -> None:
        self.settings = settings
        self.result: RunResult | None = None
        self._stream, self._reader, self._journal = stream, reader, journal
        self._losses = losses or make_losses(settings.loss, settings.ignore_index)
        self._answers: dict[int, Answer] = {}
        self._parts: dict[int, dict[str, Tensor]] = {}  # answers that some readouts lack
        self._from: dict[str, int] = {}  # by readout: the first number that is not there
        self._predicting: set[int] = set()  # by predict, which takes its answer itself
        self._progress: Progress | None = None
        self._callbacks, self._calling, self._stopped = list(callbacks), False, False
        self._events = RunEvents(settings, listeners, reader.spec.batch)
        self._happened: deque[Answer | RunEvent] = deque()
        self._wrappers: list[Chosen] = []
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._graph: Graph
        self._plan: Plan
        self._checker: Checker
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
        for callback in self._callbacks:
            callback.on_start(self)

    def _run(self, work: Callable[..., RunResult]) -> None:
        try:
            self.result = work(self._stream, self._note)
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody calls)
            self._error, self.result = error, getattr(error, "result", None)
        finally:
            self._stream.finished(self._error)
            self._started.set()

    def _begin(self, stream: Stream, graph: Graph, plan: Plan) -> None:
        """Note what the run is made of; called by the engine's thread before the first tick."""
        self._graph, self._plan, self._checker = graph, plan, checker_of(plan)
        self._stream.blocks = len(plan.graph.blocks)
        while isinstance(stream, Chosen):
            self._wrappers.insert(0, stream)
            stream = stream._stream
        self._started.set()

    def _note(self, progress: Progress) -> None:
        self._progress, events = progress, self._events(progress)
        if self._callbacks:
            self._happened.extend(events)

    def _call(self) -> None:
        """Tell the callbacks what has happened; within a callback nothing more is told."""
        while self._callbacks and self._happened and not self._calling:
            event, self._calling = self._happened.popleft(), True
            try:
                if type(event) in METHOD_OF:
                    self._tell(METHOD_OF[type(event)], event)
            finally:
                self._calling = False

    def _tell(self, what: str, *facts: object) -> None:
        """Tell all callbacks. Raises Stop, if one of them did, behind the last one."""
        stop: Stop | None = None
        for callback in self._callbacks:
            try:
                getattr(callback, what)(self, *facts)
            except Stop as raised:
                stop = raised
        if stop is not None:
            self._stopped = True
            raise stop

    def _say(self, entry: Entry, *, asks: set[int] | None = None, wait: bool) -> int:
        number = self._stream.say(entry, asks=asks, wait=wait)
        self._call()
        return number

    def _receive(self, news: Answered | HandedOver) -> None:
        if isinstance(news, HandedOver):
            self._stream.handed(*news)
            return
        if news.number < self._from.get(news.readout, 0):
            return  # of an actor that was replaced, once more
        self._from[news.readout] = news.number + 1
        parts = self._parts.setdefault(news.number, {})
        parts[news.readout] = news.prediction
        if len(parts) < len(self._plan.graph.readouts):
            return
        del self._parts[news.number]
        prediction = parts if len(parts) > 1 else news.prediction
        answer = Answer(news.number, prediction, partial(news.versions, self._plan))
        self._answers[news.number] = answer
        if self._callbacks:
            self._happened.append(answer)
        for number in list(self._answers)[: -self._stream.spec.patience]:
            if number not in self._predicting:
                self._answers.pop(number, None)
        self._stream.answered(news.number)

    # -- talking --------------------------------------------------------------------------------

    def _sample(self, n: int, u: Any, y: Any, end: bool = False) -> Sample:
        sample = checked = self._reader.sample(n, Sample(u, y, end))
        for wrapper in self._wrappers:
            (checked,) = wrapper.chosen(iter([checked]))
        self._checker.check(n, checked)
        return sample

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
        sample = self._sample(self._stream.accepted.fed, u, y, end)
        return self._say(Entry("feed", sample=sample), wait=wait)

    def predict(self, u: Any, *, end: bool = False, wait: bool = True) -> Answer:
        """Feed a sample without a label, and return its prediction. No weight moves by it.

        Args:
            u, end, wait: as of `feed`.

        Raises:
            StreamError: the sample does not fit, or the run is paused or ends before the answer.
        """
        if self._stream.paused:
            raise StreamError("the run is paused, so no answer comes: go_on() first")
        entry = Entry("feed", sample=self._sample(self._stream.accepted.fed, u, None, end))
        number = self._say(entry, asks=self._predicting, wait=wait)
        try:
            if not self._stream.wait(lambda: number in self._answers):
                raise StreamError(f"the run ended before the answer to sample {number}")
            return self._answers.pop(number)
        finally:
            self._predicting.discard(number)

    def teach(self, number: int, y: Any, *, wait: bool = True) -> None:
        """Give the label of an earlier sample, which passes the network once more to be learned.

        The score is that of the prediction of then (progressive validation with delay).

        Args:
            number: of the sample, as `feed` has returned it.
            y: its label, (B,) classes or (B, O) values; a dict by readout where there are several.
            wait: as of `feed`.

        Raises:
            StreamError: the sample waits for no label, or the level cannot show it again.
        """
        if not self._plan.knobs.pulse:
            raise StreamError(
                f"teach at level {self.settings.level.value!r}: its states go from one sample to "
                "the next, so none can be shown again in between; use a level of presentation "
                "'pulse' (trace, heads, backprop), or feed a sample when its label is there"
            )
        earlier = self._stream.accepted.find(number)
        if y is None:
            raise StreamError(f"sample {number}: y is None; a label that never comes is not taught")
        u = earlier.u if earlier.inputs is None else earlier.inputs
        self._say(Entry("teach", number, self._sample(number, u, y)), wait=wait)

    def set(self, *, learning: Mapping[str, float]) -> None:
        """Change the learning rate from the next sample on: `learning={"lr": 0.05}`.

        Args:
            learning: `lr` alone. Blocks with a rate of their own keep its ratio to the others'.

        Raises:
            SettingsError: another field, or a run whose step size does not come from `lr`.
        """
        lr_before, lr = self.settings.learning.lr, learning.get("lr")
        if set(learning) != {"lr"} or not isinstance(lr, (int, float)) or not lr >= 0:
            raise SettingsError(f"set: learning is {dict(learning)}; give {{'lr': a number >= 0}}")
        if not self._plan.follows_lr or not lr_before:
            raise SettingsError(
                "set: the step size does not come from learning.lr (dynamics.beta is given, or lr "
                "is 0); start the run with learning={'lr': ...}"
            )
        rule = self._plan.optimizer
        if rule is not None and rule.function is not None:
            raise SettingsError(
                "set: optimizer= is a function of yours, whose step sizes it knows alone; give "
                "scheduler= as well, or the optimiser by learning={'optimizer': ...}"
            )
        self._stream.say(Entry("set", rate=lr / lr_before))
        change: dict[str, Any] = {"sample": self._stream.accepted.fed, **self._events.head}
        self._events.emit(SettingsChanged(changed={"learning.lr": lr}, **change))

    def pause(self) -> None:
        """Hold the network: what is fed waits until `go_on`."""
        self._stream.hold(paused=True)

    def go_on(self) -> None:
        """End a pause."""
        self._stream.hold(paused=False)

    def settle(self) -> None:
        """Emit idle ticks until all that is under way has come to its end."""
        self._stream.settle()

    # -- looking --------------------------------------------------------------------------------

    def predictions(self, *, follow: bool = False) -> Predictions:
        """Return pairs of number and answer, in order, each once; `patience` of them wait.

        Args:
            follow: go on with samples to come, until the run ends; else end with those fed by now.
        """
        return Predictions(self, follow)

    def _following(self, number: int, follow: bool) -> tuple[int, Answer] | None:
        """Return the first answer from `number` on that nobody has taken, when it is there."""
        numbers: list[int] = []

        def there() -> bool:
            last, readouts = self._stream.accepted.fed - 1, self._plan.graph.readouts
            missing = any(last >= max(number, self._from.get(name, 0)) for name in readouts)
            if missing and not self._stream.paused:
                self._stream.awaited.add(last)
            free = sorted(self._answers.keys() - self._predicting)
            numbers.extend(n for n in free if n >= number)
            return bool(numbers) or not (follow or missing)

        self._stream.wait(there)
        return (numbers[0], self._answers.pop(numbers[0])) if numbers else None

    def model(self) -> nn.Module:
        """Return a plain module with the weights (or their averages) as they are now.

        All blocks' are of one emission (a consistent cut); nothing waits for it. What is under way
        has not been learned yet: `settle` first. Once the run has ended, those of its result.
        """
        if self.result is not None and self._error is None:
            return copy.deepcopy(self.result.model)
        states = self._stream.request("cut")
        blocks = {name: states[name] for name in self._plan.graph.blocks}
        return model_of(self._graph, self._plan, blocks)

    def weights(self) -> dict[str, Tensor]:
        """Return the `state_dict` of `model()`."""
        return {name: t.detach().clone() for name, t in self.model().state_dict().items()}

    def evaluate(self, x: NetworkInputs, y: Targets) -> Scores:
        """Return the scores of `model()` on held-out data. Nothing is learned of it.

        Args:
            x: inputs (N, ...), or a dict of them by name.
            y: targets, (N,) classes or (N, O) values, or a dict of them by readout.
        """
        with torch.inference_mode(False):
            model, ignored, spec = self.model(), self.settings.ignore_index, self._plan.spec
            answered = self.status().answered  # (others may feed meanwhile)
            losses = loss_copy(self._losses)  # (one that keeps state is the user's)
            scores = evaluate(model, x, y, losses, ignore_index=ignored, spec=spec)
        self._events.emit(Evaluated.of(scores, answered, **self._events.head))
        self._tell("on_evaluate", scores, model)
        return scores

    def snapshot(self) -> str:
        """Take a snapshot; return its place, for `resume`.

        Raises:
            SettingsError: the run keeps none.
            SnapshotError: it cannot be written.
        """
        if self._plan.snapshot_policy is None:
            raise SettingsError("snapshot: the run keeps none: give out=, or snapshots={'path': .}")
        return str(self._stream.request("snapshot"))

    def status(self) -> LiveStatus:
        """Return where the run stands."""
        stream, readouts = self._stream, self._plan.graph.readouts
        answered, fed = min(self._from.get(name, 0) for name in readouts), stream.accepted.fed
        return LiveStatus(fed, answered, stream.waiting, stream.paused, self._progress)

    @property
    def can_be_cut(self) -> bool:
        """Return True unless `model()` would have to wait for the end of a sequence."""
        within = self._stream.whole and self._stream.accepted.open
        return self.result is not None or not within or self._stream.read_states is not None

    @property
    def running(self) -> bool:
        """Return True until the run is stopped, or has failed."""
        return self._thread.is_alive()

    @property
    def spec(self) -> SampleSpec:
        """Return what samples look like that can be fed."""
        return self._reader.spec

    # -- ending ---------------------------------------------------------------------------------

    def ran_out(self) -> None:
        """Note that what feeds the run has no more."""
        self._stream.ran_out = True

    def stop(self) -> RunResult:
        """End the stream behind what was fed, and return the result, as of `hamdist.train`."""
        self._end()
        if self._error is not None or self.result is None:
            raise self._error or StreamError("the run has no result")
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback.on_end(self, self.result)
        return self.result

    def _end(self) -> None:
        atexit.unregister(self.stop)
        self._stream.close()
        self._thread.join()
        if self._error is None:
            with contextlib.suppress(Stop):  # (it has ended)
                self._call()
        if self._journal is not None:
            self._journal.close()
        events, self._events = self._events, RunEvents(self.settings, (), None)
        if self.result is not None and self._error is None:
            self.result.stopped |= self._stopped
            self.result.interrupted |= self.interrupted
            events.finish(self.result)
        events.end(self._error)

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> bool:
        stops = error is None or isinstance(error, Stop)
        self.stop() if stops else self._end()
        return stops
