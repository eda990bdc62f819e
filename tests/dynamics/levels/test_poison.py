"""Locality, proved by poison: NaN in everything that a block may not read changes nothing.

Two equal networks run side by side in time. In one, before every single event of every block, all
that is not the block's own is NaN: the other blocks' theta, omega, h, z, traces and pending terms,
every .grad, every signal except those that the schedule names for this very event. Afterwards it
is put back. Each event must leave the same bits and send the same bits. Positive controls: poison
in what the block does read is seen.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from dynamics.helpers import Network, clones, layer, linear, noise, samples, settings
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Phase
from hamdist.dynamics.vjp.closed import Steps
from hamdist.dynamics.vjp.local_function import ForwardRecord
from hamdist.errors import DivergedError
from hamdist.runtime.nodes.hold import HoldNode


def nan(like: Tensor) -> Tensor:
    return torch.full_like(like.detach(), float("nan"))


def chain(*, state=False):
    return Graph(
        [
            BlockSpec("a", layer(4, 5, 0), ("u",)),
            BlockSpec("b", nn.Sequential(layer(5, 6, 1), nn.Dropout(0.3)), ("a",)),
            BlockSpec("c", layer(6, 5, 2), ("b",), delays={"b": 2}),
            BlockSpec("r", linear(5, 2, 3), ("c",), loss=mse, state=state),
        ]
    )


def branches(*, state=False):
    """A skip and two readouts, one of them with an output module where it has a state."""
    output = linear(3, 2, 5) if state else None
    return Graph(
        [
            BlockSpec("a", layer(4, 5, 0), ("u",)),
            BlockSpec("b", layer(5, 5, 1), ("a",)),
            BlockSpec("near", linear(5, 2, 2), ("a",), loss=mse, state=state),
            BlockSpec("c", layer(14, 5, 3), ("b", "a", "u"), delays={"a": 3}),
            BlockSpec(
                "far", linear(5, 3 if state else 2, 4), ("c",), loss=mse, state=state, output=output
            ),
        ]
    )


def cycle(*, state=False):
    return Graph(
        [
            BlockSpec("a", layer(4 + 5, 5, 0), ("u", "b")),
            BlockSpec("b", layer(5 + 5, 5, 1), ("a", "b"), shape=(5,)),
            BlockSpec("r", linear(5, 2, 3), ("b",), loss=mse, state=state),
        ]
    )


STATE = {"locality": {"readout": "state"}}
CASES = {
    "trace": ("trace", chain, {}),
    "trace+weights": ("trace", chain, {"locality": {"memory": "trace+weights", "speed": 2}}),
    "backprop": ("backprop", chain, {}),
    "trace, branches": ("trace", branches, {}),
    "backprop, branches": ("backprop", branches, {}),
    "local": ("local", chain, {}),
    "local, branches": ("local", branches, {}),
    "local, cycle": ("local", cycle, {}),
    "held": ("group", branches, {"locality": {"speed": 3, "update": "last-tick"}}),
    "delay-free": ("delay-free", chain, {}),
    "lag": ("local", branches, {"dynamics": {"tau": 0.5, "c": 1.0, "eta": 0.2}}),
    "state": ("local", branches, STATE),
    "simultaneous": ("local", cycle, {"locality": {"readout": "state", "order": "simultaneous"}}),
    "sequential": ("local", branches, {"locality": {"readout": "state", "order": "sequential"}}),
}


def network(case: str) -> Network:
    level, graph, given = CASES[case]
    given = {"learning": {"lr": 0.1, "momentum": 0.4}, **given}
    state = given.get("locality", {}).get("readout") == "state"
    return Network(graph(state=state), settings(level, **given), samples(14, 3, 4, 2))


def named(net: Network, node, event) -> dict[int, tuple]:
    """Channel -> stamp of the signals that the schedule names for this event."""
    schedule, channels = net.plan.schedule, net.plan.channels
    stamps = {}
    for edge in net.graph.into[node.name]:
        stamps[channels.states[edge.index].number] = schedule.state(edge, event)
    for edge in net.graph.out_of[node.name]:
        stamps[channels.messages[edge.index].number] = schedule.message(edge, event)
    if node.name in channels.targets:
        stamps[channels.targets[node.name].number] = schedule.target(node.name, event)
    return {number: stamp for number, stamp in stamps.items() if stamp is not None}


class Poison:
    """Fills what `node` may not read in `event` with NaN; `undo` puts everything back."""

    def __init__(self, net: Network, node, event) -> None:
        self._undo = []
        self.filled = 0
        for other in net.nodes.values():
            modules = [c.module for c in (other.block.cell, _output(other)) if c is not None]
            for p in (p for m in modules for p in m.parameters()):
                self._set(p, "grad", nan(p))
            if other.name != node.name:
                self._foreign(other, modules)
        self._signals(net, named(net, node, event))

    def _set(self, owner, name, value) -> None:
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)
        self.filled += 1

    def _fill(self, tensor: Tensor) -> None:
        kept = tensor.detach().clone()
        self._undo.append(lambda: tensor.data.copy_(kept))
        tensor.data.fill_(float("nan"))
        self.filled += 1

    def _foreign(self, other, modules) -> None:
        # Weights in place, as nobody else may hold them. States are replaced, not filled: in one
        # process a signal's payload is the sender's tensor.
        for module in modules:
            for tensor in module.parameters():
                self._fill(tensor)
        block = other.block
        for weights in (block.weights, getattr(block, "output_weights", None)):
            if weights is not None:
                self._set(weights, "omega", [nan(o) for o in weights.omega])
        for name in ("h", "z", "_own"):
            if getattr(block, name, None) is not None:
                self._set(block, name, nan(getattr(block, name)))
        if getattr(block, "trace", None):
            self._set(block, "trace", {n: _nan_record(r) for n, r in block.trace.items()})
        if getattr(block, "_record", None) is not None:
            self._set(block, "_record", _nan_record(block._record))
        if isinstance(other, HoldNode):
            self._set(other, "shown", {i: nan(u) for i, u in other.shown.items()})
            if other._target is not None:
                self._set(other, "_target", nan(other._target))

    def _signals(self, net: Network, read) -> None:
        for number, queue in net.mailbox._queues.items():
            poisoned = deque(
                s
                if s.payload is None or read.get(number) == s.stamp
                else replace(s, payload=nan(s.payload))
                for s in queue
            )
            before = list(queue)
            self._undo.append(lambda q=queue, old=before, new=list(poisoned): _restore(q, old, new))
            queue.clear()
            queue.extend(poisoned)
            self.filled += len(before)

    def undo(self) -> None:
        for put_back in reversed(self._undo):
            put_back()


def _restore(queue: deque, old: list, new: list) -> None:
    """Put back what is still waiting; keep what was read away, and what was posted since."""
    index = {id(s): before for s, before in zip(new, old, strict=True)}
    after = [index.get(id(s), s) for s in queue]
    queue.clear()
    queue.extend(after)


def _output(node):
    return getattr(node.block, "output", None)


def _nan_record(record: ForwardRecord | Steps) -> ForwardRecord | Steps:
    if isinstance(record, Steps):
        kept = [[nan(k) if _is_real(k) else k for k in one] for one in record.saved]
        return replace(record, saved=kept, output=nan(record.output))
    leaves = [None if leaf is None else nan(leaf) for leaf in record.leaves]
    return ForwardRecord(leaves, [nan(t) for t in record.theta], nan(record.output), record.inputs)


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _held(record: ForwardRecord | Steps) -> list[Tensor]:
    if isinstance(record, Steps):
        return [record.output, *(k for one in record.saved for k in one if _is_real(k))]
    return [record.output, *record.theta]


def own(node) -> list[Tensor | None]:
    """All that an event may have changed in a block."""
    block = node.block
    found = [*block.weights.theta, *block.weights.omega]
    found += [getattr(block, "h", None), getattr(block, "z", None), getattr(block, "_own", None)]
    if getattr(block, "output_weights", None) is not None:
        found += [*block.output_weights.theta, *block.output_weights.omega]
    for _, record in sorted(getattr(block, "trace", {}).items()):
        found += _held(record)
    return [None if t is None else t.detach().clone() for t in found]


def same_bits(one: list[Tensor | None], two: list[Tensor | None]) -> bool:
    return len(one) == len(two) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def history(net: Network, *, poisoned: bool) -> tuple[list, list]:
    """Per event: block, event, what the block holds then, what it sent; and how much was filled."""
    events, filled, sent = [], [], []
    post = net.mailbox.post

    def watch(channel, signal):
        payload = None if signal.payload is None else signal.payload.detach().clone()
        sent.append((channel.number, signal.stamp, signal.end, payload))
        post(channel, signal)

    net.mailbox.post = watch
    poison = None

    def before(node, event):
        nonlocal poison
        sent.clear()
        if poisoned:
            poison = Poison(net, node, event)
            filled.append(poison.filled)

    def after(node, event):
        events.append((node.name, event, own(node), list(sent)))
        if poison is not None:
            poison.undo()

    net.run(before=before, after=after)
    return events, filled


@pytest.mark.parametrize("case", CASES)
def test_poison_elsewhere_is_not_seen(case):
    clean, _ = history(network(case), poisoned=False)
    dirty, filled = history(network(case), poisoned=True)
    assert len(clean) == len(dirty) > 30
    assert min(filled) > 10
    for (name, event, held, sent), (name2, event2, held2, sent2) in zip(clean, dirty, strict=True):
        assert (name, event) == (name2, event2)
        assert same_bits(held, held2), (name, event)
        assert [s[:3] for s in sent] == [s[:3] for s in sent2], (name, event)
        assert same_bits([s[3] for s in sent], [s[3] for s in sent2]), (name, event)
    last = {name: held for name, _, held, _ in clean}
    start = network(case)
    for name, node in start.nodes.items():  # the comparison is of something that moved
        theta = node.block.weights.theta
        assert not same_bits(clones(theta), last[name][: len(theta)])


def test_the_poison_is_poison():
    """What is filled would be seen if it were read: a block that peeks at its child's weights."""
    net = network("trace")
    a, b = net.nodes["a"].block, net.nodes["b"].block
    backward = a.backward

    def peeks(sample, messages):
        out = backward(sample, messages)  # type: ignore[call-arg]
        a.weights.theta[0].add_(0 * b.weights.theta[0].sum())
        return out

    a.backward = peeks
    with pytest.raises(DivergedError) as caught:
        history(net, poisoned=True)
    assert (caught.value.block, caught.value.quantity) == ("a", "h")
    assert math.isnan(caught.value.norm)


READ = ["state", "message", "target", "own weights"]


@pytest.mark.parametrize(
    ("case", "kind"), [("trace", "own trace"), *((c, k) for c in ("trace", "local") for k in READ)]
)
def test_poison_in_what_a_block_reads_is_seen(case, kind):
    """Positive control: the same fill, in a signal or a quantity that belongs to the event."""
    victim = "r" if kind == "target" else "b"
    net = network(case)
    seen = []

    def right(event):
        late = event.tick >= 9
        if case == "local" or kind in ("own weights", "target"):
            return late
        return late and (event.phase is Phase.FORWARD) == (kind == "state")

    def before(node, event):
        if node.name != victim or seen or not right(event):
            return
        seen.append(event)
        channels = net.plan.channels
        if kind == "own weights":
            node.block.weights.theta[0].fill_(float("nan"))
        elif kind == "own trace":
            # autograd's graph holds what it saved; the record's own output stands for it
            record = node.block.trace[event.sample]
            node.block.trace[event.sample] = ForwardRecord(
                record.leaves, record.theta, record.output * float("nan"), record.inputs
            )
        else:
            number = {
                "state": lambda: channels.states[net.graph.into["b"][0].index],
                "message": lambda: channels.messages[net.graph.out_of["b"][0].index],
                "target": lambda: channels.targets["r"],
            }[kind]().number
            queue = net.mailbox._queues[number]
            assert queue[0].stamp == named(net, node, event)[number]
            queue[0] = replace(queue[0], payload=nan(queue[0].payload))

    broken = []

    def after(node, event):
        if seen and event == seen[0] and node.name == victim:
            broken.extend(t for t in own(node) if t is not None and t.isnan().any())

    try:
        net.run(before=before, after=after)
    except DivergedError as error:
        broken += [error] * ((error.block, error.tick) == (victim, seen[0].tick))
    assert seen
    assert broken


def test_the_helpers_compare_bits():
    a = noise(0, 3)
    b = copy.deepcopy(a)
    b[0] = torch.nextafter(b[0], torch.tensor(9.0, dtype=b.dtype))
    assert same_bits([a, None], [a.clone(), None])
    assert not same_bits([a], [b])
    assert not same_bits([a], [None])
    assert not same_bits([nan(a)], [nan(a)])  # what is NaN is never the same
