"""Blocks that learn by a rule (rules/rule.py): what a rule returns is checked, and acts.

B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from hamdist.config import Order
from hamdist.dynamics.blocks.block import BlockParts, SavesPasses
from hamdist.dynamics.blocks.hold import HoldBlock, Tick
from hamdist.dynamics.blocks.pulse import PulseReadout
from hamdist.dynamics.blocks.readout_loss import Reading, ReadoutLoss, plain, scaled, total
from hamdist.dynamics.finite import StepFactor
from hamdist.dynamics.rules.rule import MEMORY, BlockView, Rule, Updates
from hamdist.dynamics.saved_state.stateful import PlainData, Stateful, check_names
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import norm_of
from hamdist.errors import GraphError, SnapshotError

RETURNS = {
    "forward": ["h", "kept"],
    "backward": ["messages", "updates"],
    "relax": ["h", "messages", "updates"],
}


class AppliedRule(Stateful):
    """A rule on one block: calls it, checks what it returns, and moves the memory that learns."""

    def __init__(self, rule: Rule, view: BlockView) -> None:
        self.rule, self.view = rule, view
        self.learns = rule.overrides("learn")
        self.listens = rule.signals.back != "none"
        view.at("start", 0, len(view.initial))
        memory = rule.start(view)
        if not isinstance(memory, dict):
            self._refuse("start", f"returned {_kind(memory)}, not a dict by name")
        self.learned = {n: t.data for n, t in memory.items() if isinstance(t, nn.Parameter)}
        view.memory = {**memory, **self.learned}
        self.check_plain("start", view.memory)

    def move_by(self, weights: Weights, factor: StepFactor) -> None:
        """Take the steps of the memory that learns. factor: of beta, by sample."""
        self.weights, self._factor = weights, factor

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.view.memory, "weights": self.weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_names("rule", state, ("memory", "weights"))
        for name, tensor in self.learned.items():
            tensor.copy_(state["memory"][name])
        self.view.memory = {**state["memory"], **self.learned}
        self.weights.load_state_dict(state["weights"])

    def check_plain(self, method: str, value: object) -> None:
        """Raise GraphError unless `value`, which `method` has left, is plain data."""
        live = [*self.view.theta.values()]
        live += self.learned.values() if method == "forward" else []
        try:
            PlainData(live).packed(value)
        except SnapshotError as error:
            self._refuse(method, f"keeps no plain data: {error}")

    def call(self, method: str, sample: int, batch: int, *arguments: Any) -> Any:
        """Call a method of the rule, and return what it returns (RETURNS), without graphs.

        Messages to parents that want none are None. Raises GraphError for a wrong form.
        """
        view, names = self.view, RETURNS.get(method)
        view.at(method, sample, batch)
        given = [*view.theta.values(), *_tensors([*arguments])]
        given += [view.h] if method == "relax" else []
        versions = [t._version for t in given]
        result = getattr(self.rule, method)(view, *arguments)
        if versions != [t._version for t in given]:
            what = "changes a weight or a signal in place, which others read as well"
            self._refuse(method, f"{what}: work on a copy, and return an update")
        if names is None:
            return result
        if not isinstance(result, tuple) or len(result) != len(names):
            self._refuse(method, f"returned {_kind(result)}, not ({', '.join(names)})")
        by_name = dict(zip(names, result, strict=True))
        if "h" in by_name:
            h, shape = by_name["h"], (batch, *view.shape)
            if not _fits(h, shape, view.initial.dtype):
                self._refuse(method, f"gives h as {_kind(h)}, not {_of(view.initial.dtype, shape)}")
            by_name["h"] = plain(by_name["h"])
        if "messages" in by_name:
            by_name["messages"] = self._messages(method, by_name["messages"])
        return tuple(by_name.values())

    def _messages(self, method: str, messages: Any) -> list[Tensor | None]:
        view, parents = self.view, len(self.view.inputs)
        if not isinstance(messages, (list, tuple)) or len(messages) != parents:
            expected = f"return a list with one for each of its {parents} parents"
            self._refuse(method, f"gives its messages as {_kind(messages)}; {expected}")
        for message, parent in zip(messages, view.inputs, strict=True):
            shape, dtype = (view.batch, *parent), view.initial.dtype
            if message is not None and not _fits(message, shape, dtype):
                to = f"a parent, not {_of(dtype, shape)}, like its state"
                self._refuse(method, f"gives {_kind(message)} as the message to {to}")
        pairs = zip(messages, view.wanted, strict=True)
        return [plain(m) if want and m is not None else None for m, want in pairs]

    def forward(
        self, sample: int, inputs: Sequence[Tensor], before: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return h, and what is kept. before: h of the token before, None at a sequence's first."""
        view, batch = self.view, len(inputs[0])
        begins = before is None
        view.in_sample(begins=begins)
        if view.own is not None:
            state = view.initial.new_zeros(batch, *view.shape) if before is None else before
            inputs = [*inputs[: view.own], state, *inputs[view.own :]]
        h, kept = self.call("forward", sample, batch, inputs)
        view.in_sample(begins=begins, h=h)
        return h, kept

    def back(
        self, kept: Any, message: Tensor, sample: int, tau: float
    ) -> tuple[list[Tensor | None], list[Tensor] | None]:
        """Return the messages to the parents, and the updates of theta."""
        messages, updates = self.call("backward", sample, len(message), kept, message)
        if self.view.own is not None:
            del messages[self.view.own]
        return messages, self.gradients(updates, sample, tau)

    def feedback_cosine(self) -> float | None:
        """Return the cosine between the rule's feedback matrices and the weights they stand for."""
        if not any(self.view.wanted):
            return None  # nothing is sent through them
        self.view.at("feedback", self.view.sample, self.view.batch)
        pairs = [(b, self.view.theta[n]) for n, b in self.rule.feedback(self.view).items()]
        lengths = norm_of([b for b, _ in pairs]) * norm_of([w for _, w in pairs])
        return sum(float((b * w).sum()) for b, w in pairs) / lengths if lengths else None

    def gradients(self, updates: Any, sample: int, tau: float) -> list[Tensor] | None:
        """Return the updates of theta in its order (None: there are none); memory moves."""
        if not isinstance(updates, Mapping):
            self._refuse("rule", f"gives its updates as {_kind(updates)}, not a dict by weight")
        theta = self.view.theta
        weights = {**theta, **{MEMORY + name: t for name, t in self.learned.items()}}
        for name, g in updates.items():
            if name not in weights:
                hint = f"known: {', '.join(weights)} (memory learns if `start` gives nn.Parameter)"
                self._refuse(
                    "rule", f"an update for {name!r}, which is no weight that learns; {hint}"
                )
            if not _fits(g, (*weights[name].shape,), weights[name].dtype):
                hint = f"and the weight is {_kind(weights[name])}"
                self._refuse("rule", f"its update for {name!r} is {_kind(g)}, {hint}")
        if any(name.startswith(MEMORY) for name in updates):
            steps = _in_order(updates, self.learned, MEMORY)
            self.weights.move(steps, self._factor(sample), tau)
        return _in_order(updates, theta) if any(name in theta for name in updates) else None

    def _refuse(self, method: str, text: str) -> NoReturn:
        where = "" if method == "rule" else f" {method}()"
        raise GraphError(
            f"rule {type(self.rule).__name__} of block {self.view.name!r}:{where} {text}"
        )


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors among `value` and in its lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _in_order(updates: Updates, like: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
    by_name = {name: updates.get(prefix + name) for name in like}
    return [torch.zeros_like(like[n]) if g is None else plain(g) for n, g in by_name.items()]


def _fits(value: object, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided
    return is_dense and value.shape == shape and value.dtype is dtype  # type: ignore[attr-defined]


def _of(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"a {str(dtype).removeprefix('torch.')} tensor of shape {shape}"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" ({value.layout})"
        return _of(value.dtype, tuple(value.shape)) + layout
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{length}"


class RuleBlock(SavesPasses):
    """A state block that pulses pass, and that learns by a rule.

    h: of the latest sample; None before the first one of a sequence.
    """

    def __init__(self, parts: BlockParts, rule: AppliedRule, tau: float) -> None:
        super().__init__(parts)
        self.rule = rule
        self.h: Tensor | None = None
        self.z: Tensor | None = None
        self.trace: dict[int, Any] = {}
        self._tau = tau

    STATE = ("cell", "weights", "rule", "h", "z")

    def held(self) -> Any:
        return self.trace

    def rebuild(self, records: Any) -> None:
        self.trace = dict(records)

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:
        """Return h of `sample`, and keep what the rule keeps of it."""
        self.h, self.trace[sample] = self.rule.forward(sample, inputs, self.h)
        self.count(self.trace[sample], [])
        self.most = max(self.most, len(self.trace))
        self._guard("h", self.h, inputs)
        return self.h

    def end_sequence(self) -> None:
        """Forget the state: the next sample is the first of its sequence."""
        self.h = None

    def learn(self, sample: int, label: Tensor | None) -> None:
        """Make the step of the tick in which `sample` passes, if the rule has one."""
        rule = self.rule
        kept, asks, g = self.trace[sample], rule.rule.signals.label, None
        if rule.learns and not (asks and label is None):
            batch = 0 if self.h is None else len(self.h)
            updates = rule.call("learn", sample, batch, kept, label if asks else None)
            g = rule.gradients(updates, sample, self._tau)
        if not rule.listens:
            del self.trace[sample]
            self.learn_from(sample, g, self._tau)
        elif g is not None:
            self.learn_from(sample, g, self._tau)
            self.weights.updates -= 1  # a sample's update is counted with its message

    def backward(self, sample: int, messages: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the messages to the parents; without any message nothing moves."""
        kept, message = self.trace.pop(sample), total(messages)
        if message is None:
            self.learn_from(sample, None, self._tau)
            return [None] * len(self._wanted)
        self.z = scaled(message, self._tau)
        self._guard("z", self.z)
        to_parents, g = self.rule.back(kept, scaled(self.z, self._c), sample, self._tau)
        self.learn_from(sample, g, self._tau)
        return to_parents


class RuleReadout(PulseReadout):
    """An output net that a pulse reaches, and that learns by a rule from its own error."""

    def __init__(self, parts: BlockParts, loss: ReadoutLoss, rule: AppliedRule) -> None:
        super().__init__(parts, loss)
        self.rule = rule

    STATE: ClassVar[tuple[str, ...]] = (*PulseReadout.STATE, "rule")

    def _learn(
        self,
        sample: int,
        inputs: Sequence[Tensor],
        target: Tensor | None,
        share: float = 1.0,  # noqa: ARG002  (rules know no micro-batches)
    ) -> tuple[list[Tensor | None], Reading | None]:
        y, kept = self.rule.forward(sample, inputs)
        self.prediction = y
        if target is None:
            self.learn_from(sample, None, self._tau)
            return [None] * len(self._wanted), None
        error, reading = self._loss.read(y, target, sample, inputs=inputs)
        to_parents, g = self.rule.back(kept, error, sample, self._tau)
        self.learn_from(sample, g, self._tau)
        return to_parents, reading


class RelaxingBlock(HoldBlock):
    """A held block whose state, messages and updates are a rule's, tick by tick."""

    def __init__(self, parts: BlockParts, h: Tensor, rule: AppliedRule, c: int) -> None:
        super().__init__(parts, Order.OMEGA_FIRST, h)
        self.rule = rule
        self._ticks = c  # of a sample

    STATE: ClassVar[tuple[str, ...]] = ("cell", "weights", "rule", "h", "z")

    def complete(self, messages: Sequence[Tensor | None]) -> None:
        """Take the messages of the tick before: z is their sum."""
        message = total(messages)
        self.z = torch.zeros_like(self.h) if message is None else message
        self._guard("z", self.z)

    def tick(
        self, inputs: Sequence[Tensor], tick: Tick, send: Callable[[Tensor], Tensor] = plain
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Run one tick; `h` is then the state of the next. It has no reading."""
        self.rule.view.in_tick(self.h, tick.k, self._ticks, learns=tick.updates)
        h, to_parents, updates = self.rule.call("relax", tick.sample, len(self.h), inputs, self.z)
        self._guard("h", h, inputs)
        self.h = send(h)
        if tick.updates:
            g = self.rule.gradients(updates, tick.sample, tick.tau)
            self.learn_from(tick.sample, g, tick.tau)
        return to_parents, None
