"""Level `pipeline`. Oracles: torch.optim.SGD on the whole batch in float64; tables of ticks drawn
by hand (1F1B: a block keeps as many micro-batches as blocks lie behind it, and one)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamics.graph.test_tied import Deep
from dynamics.helpers import (
    bare,
    bare_chain,
    check_drawn,
    drawn_events,
    edge,
    knobs,
    layer,
    relative,
    samples,
    settings,
    until,
)
from dynamics.helpers import mlp as mlp_of
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse as half
from hamdist.dynamics.schedule.events import Kind, Phase, Stamp
from hamdist.dynamics.schedule.make import make_schedule
from hamdist.dynamics.schedule.microbatches import auto_microbatches
from hamdist.dynamics.updates.accumulate import GradientSum
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import Column, Outer, TableRows, dense
from hamdist.errors import HamdistError, HamdistWarning, LevelError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import order_of, run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.placement.assign_blocks import place
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.timing.timed_graph import TimingModel
from hamdist.streams import Delayed, LateLabels, from_iterable

BOUND = 1e-12

# -- schedule ------------------------------------------------------------------------------------

# Sample 0 makes the pulses 0 ... M - 1, sample 1 those from M on.
TABLES = {
    (1, 2): """
tick | b0
0    | FB0
1    |
2    | FB1
3    | FB2
4    |
5    | FB3
""",
    (2, 2): """
tick | b0    | b1
0    | F0    |
1    |       | FB0
2    | F1 B0 |
3    |       | FB1
4    | B1    |
5    | F2    |
6    |       | FB2
7    | F3 B2 |
8    |       | FB3
9    | B3    |
""",
    (3, 4): """
tick | b0    | b1    | b2
0    | F0    |       |
1    |       | F0    |
2    | F1    |       | FB0
3    |       | F1 B0 |
4    | F2 B0 |       | FB1
5    |       | F2 B1 |
6    | F3 B1 |       | FB2
7    |       | F3 B2 |
8    | B2    |       | FB3
9    |       | B3    |
10   | B3    |       |
11   | F4    |       |
12   |       | F4    |
13   | F5    |       | FB4
""",
    (4, 2): """
tick | b0 | b1 | b2    | b3
0    | F0 |    |       |
1    |    | F0 |       |
2    | F1 |    | F0    |
3    |    | F1 |       | FB0
4    |    |    | F1 B0 |
5    |    | B0 |       | FB1
6    | B0 |    | B1    |
7    |    | B1 |       |
8    | B1 |    |       |
9    | F2 |    |       |
""",
}


def schedule_of(graph, parts):
    return make_schedule(graph, knobs("pipeline", microbatches=parts))


@pytest.mark.parametrize(("blocks", "parts"), TABLES)
def test_events_by_hand(blocks, parts):
    table = TABLES[blocks, parts]
    schedule = schedule_of(bare_chain(blocks), parts)
    last = check_drawn(schedule, table)
    emits = [e for e in drawn_events(table)["b0"] if e.phase is not Phase.BACKWARD]
    sent = until(schedule.emissions(), last - 1)
    assert [(e.tick + 1, e.sample) for e in sent] == [(e.tick, e.sample) for e in emits]


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_one_forward_one_backward(blocks, parts):
    """The oldest message comes before the next forward; D - l + 1 micro-batches are kept at most;
    no weight moves while a sample is in the network."""
    schedule = schedule_of(bare_chain(blocks), parts)
    trip = 2 * (blocks - 1) + 1
    assert schedule.c == trip + 2 * (parts - 1)
    for depth in range(blocks - 1):
        kept, most = set(), 0
        for e in until(schedule.events(f"b{depth}"), 3 * schedule.c):
            if e.phase is Phase.FORWARD:
                assert all(n // parts == e.sample // parts for n in kept)
                kept.add(e.sample)
            else:
                assert e.sample == min(kept)
                kept.remove(e.sample)
            most = max(most, len(kept))
        assert most == schedule.stored(f"b{depth}") == min(parts, blocks - depth)


def test_stamps_by_hand():
    graph = bare("a: u", "b: a", "c: a b")
    schedule, way = schedule_of(graph, 2), edge(graph, "a->c")
    read = until(schedule.events("c"), 20)
    assert [schedule.state(way, e) for e in read[:4]] == [
        Stamp(0, 0, 0), Stamp(2, 1, 0), Stamp(7, 2, 1), Stamp(9, 3, 1)
    ]  # fmt: skip
    assert [schedule.target("c", e) for e in read[:3]] == [
        Stamp(-1, 0, 0), None, Stamp(6, 2, 0)
    ]  # fmt: skip
    back = [e for e in until(schedule.events("a"), 20) if e.phase is Phase.BACKWARD]
    assert [schedule.message(way, e) for e in back[:3]] == [
        Stamp(2, 0, 0), Stamp(4, 1, 0), Stamp(9, 2, 1)
    ]  # fmt: skip
    assert schedule.in_flight(way, Kind.STATE) == 2
    assert schedule.staleness == 0


@pytest.mark.parametrize(
    "fields", [{"speed": 3}, {"credit": "heads", "memory": "none"}, {"presentation": "hold"}]
)
def test_knobs_that_contradict_micro_batches(fields):
    with pytest.raises(LevelError, match="microbatches 4"):
        knobs("pipeline", microbatches=4, **fields)


# -- blocks that lie apart -----------------------------------------------------------------------

# Four blocks of equal work on two actors, M = 2, as by hand: a forward or backward pass of a block
# takes 1. With runs of neighbours the actors wait (P - 1)(2 + 2) of the 12 that a sample takes;
# with v = 2 runs for each, as in Megatron-LM (Narayanan et al. 2021), 1/v of that, of 10.
NEIGHBOURS = [["b0", "b1"], ["b2", "b3"]]
APART = [["b0", "b2"], ["b1", "b3"]]
WORK_APART = [
    ["b0 F0", "b0 F1", "b2 F0", "b2 F1", "b2 B0", "b2 B1", "b0 B0", "b0 B1"],
    ["b1 F0", "b1 F1", "b3 FB0", "b3 FB1", "b1 B0", "b1 B1"],
]


def plan_of_four(**engine):
    blocks = [
        BlockSpec(
            f"b{i}", layer(4, 4, i), (f"b{i - 1}" if i else "u",), loss=half if i == 3 else None
        )
        for i in range(4)
    ]
    raw = settings(
        "pipeline",
        locality={"microbatches": 2},
        engine={"kind": "ray", "actors": 2, "balance": "parameters", **engine},
    )
    return make_plan(Graph(blocks), raw, from_iterable(samples(1, 4, 4, 4)).spec)


def test_work_of_blocks_that_lie_apart_by_hand():
    plan = plan_of_four(interleave=2)
    assert place(plan.graph, plan.engine, 2) == APART
    mailbox, log = Mailbox({INPUT, *plan.graph.blocks}), []
    nodes = [make_node(plan, name, mailbox) for name in plan.graph.blocks]
    for node in nodes:

        def step(node=node, step=node.step):
            log.append((node.name, f"{node.name} {node.event.phase.value}{node.event.sample}"))
            step()

        node.step = step
    source = SourceNode(plan, from_iterable(samples(1, 4, 4, 4)), mailbox)
    run_loop([source, *nodes], order=order_of(plan, APART[0]))
    done = [[what for name, what in log if name in group and int(what[-1]) < 2] for group in APART]
    assert done == WORK_APART


@pytest.mark.parametrize(
    ("placed", "engine", "period"),
    [(NEIGHBOURS, {}, 12), (APART, {"interleave": 2}, 10), (APART, {"placement": APART}, 10)],
)
def test_the_period_of_a_sample_by_hand(placed, engine, period):
    second = 1000.0  # (beside which signals cost nothing)
    seconds = {
        f"b{i}": {Phase.FORWARD: 2 * second, Phase.BACKWARD: 2 * second, Phase.READ: 4 * second}
        for i in range(4)
    }
    model = TimingModel(plan_of_four(**engine), seconds)
    assert model.sample_seconds(placed) / second == pytest.approx(period, abs=1e-3)


@pytest.mark.parametrize(
    ("level", "engine", "words"),
    [
        ("backprop", {"actors": 2}, "at level 'backprop'"),
        ("trace", {"actors": 2}, "at level 'trace'"),
        ("pipeline", {"actors": 3}, "3 actors with engine.interleave 2 for 4 blocks"),
        ("pipeline", {"kind": "inprocess"}, "kind 'inprocess'"),
        ("pipeline", {"placement": [["block0"], ["block1", "block2", "block3"]]}, "'placement'"),
    ],
)
def test_interleave_where_there_is_nothing_to_place(level, engine, words):
    with pytest.raises(HamdistError, match=words):
        hamdist.train(
            mlp_of([4, 4, 4, 4, 3]),
            samples(2, 8, 4, 3),
            loss="mse",
            level=level,
            engine={"kind": "ray", "interleave": 2, **engine},
        )


# -- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 40], ids=["dense", "factors"])
def test_a_sum_is_the_gradient_of_all_rows(size):
    """Factors stay factors where they are smaller than the weight; nothing is shared with what was
    added, whose memory is used again."""
    draw = torch.Generator().manual_seed(0)
    z, x = (torch.randn(12, size, generator=draw, dtype=torch.float64) for _ in "zx")
    index = torch.randint(size, (12,), generator=draw)
    found = GradientSum()
    z_used, x_used = z.clone(), x.clone()
    for rows_ in (slice(0, 5), slice(5, 9), slice(9, 12)):
        own_z, own_x = z_used[rows_], x_used[rows_]
        bias = Column(own_z)
        table = TableRows(index[rows_], own_z, size)
        found.add([Outer(own_z, own_x), bias, table, own_z.sum(0)])
        own_z.zero_()
        own_x.zero_()
    outer, bias, table, plain = found.take()
    assert isinstance(outer, torch.Tensor) == isinstance(bias, torch.Tensor) == (size == 4)
    torch.testing.assert_close(dense(outer), z.t() @ x, rtol=0, atol=BOUND)
    for one in (bias, plain):
        torch.testing.assert_close(dense(one), z.sum(0), rtol=0, atol=BOUND)
    rows_of_table = torch.zeros(size, size, dtype=torch.float64).index_add_(0, index, z)
    torch.testing.assert_close(dense(table), rows_of_table, rtol=0, atol=BOUND)
    assert found.take() is None


# -- equal to SGD on the whole batch -------------------------------------------------------------

B, FEATURES, CLASSES = 7, 6, 3


def mlp():
    layers = [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Skips(nn.Module):
    """Two skips, two readouts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.near, self.far = nn.Linear(8, CLASSES), nn.Linear(16, CLASSES)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        b = torch.tanh(self.b(a)) + a
        c = torch.tanh(self.c(b))
        return {"near": self.near(a), "far": self.far(torch.cat([a, c], 1))}


class Words(nn.Module):
    """A class for every token."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))))


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().double()


def batches(sizes, *, ignored=0.0, words=False):
    draw = torch.Generator().manual_seed(5)
    for n in sizes:
        shape, high = ((n, 5), 7) if words else ((n,), CLASSES)
        u = torch.randint(7, shape, generator=draw)
        if not words:
            u = torch.randn(n, FEATURES, generator=draw, dtype=torch.float64)
        y = torch.randint(high, shape, generator=draw)
        y[torch.rand(shape, generator=draw) < ignored] = -100
        if ignored:
            y.view(-1)[0] = 1  # one counts at least
        yield u, y


def by_sgd(model, items, loss, momentum=0.0):
    """The losses by sample and output, and the weights at the end."""
    step = torch.optim.SGD(model.parameters(), 0.3, momentum)
    curves = []
    for u, y in items:
        out = model(u)
        outs = list(out.values()) if isinstance(out, dict) else [out]
        losses = [loss(one, y) for one in outs]
        step.zero_grad()
        sum(losses).backward()
        step.step()
        curves.append([one.item() for one in losses])
    return curves


def masked(y, t):
    return functional.cross_entropy(y.flatten(0, -2), t.flatten())


def learned(model, items, **fields):
    given = {"learning": {"lr": 0.3}, "metrics": {"window": 1}, "engine": {"kind": "inprocess"}}
    locality = {"microbatches": fields.pop("parts", 3)}
    given = {"level": "pipeline", "locality": locality, **given, **fields}
    items = items if isinstance(items, LateLabels) else list(items)
    return hamdist.train(model, items, ignore_index=-100, **given)


def assert_same(result, plain, curves):
    found = [[w.mean_loss for w in ws] for ws in result.windows.values()]
    torch.testing.assert_close(
        torch.tensor(found).T, torch.tensor(curves), rtol=0, atol=BOUND, check_dtype=False
    )
    own = dict(result.model.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(own[name], p, rtol=0, atol=BOUND)


MOMENTUM = {"lr": 0.3, "momentum": 0.6}
BY_AUTOGRAD = {"kind": "inprocess", "step": "autograd"}
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp, 1 block": (mlp, {"partition": {"blocks": 1}}),
    "mlp, 2 blocks": (mlp, {"partition": {"blocks": 2}}),
    "mlp, 3 blocks, momentum": (mlp, {"partition": {"blocks": 3}, "learning": MOMENTUM}),
    "mlp, 5 blocks, delays": (mlp, {"partition": {"blocks": 5, "delay": 2}}),
    "mlp, autograd": (mlp, {"partition": {"blocks": 3}, "engine": BY_AUTOGRAD}),
    "mlp, slices": (mlp, {"partition": {"slices": {"block0": 2}}}),
    "skips, two readouts": (Skips, {"partition": {"blocks": 4}}),
    "tied": (Deep, {"partition": {"blocks": 5}}),
}


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_sgd(name, parts):
    """Seven rows: uneven parts; the last batches have fewer rows, one fewer than parts."""
    build, fields = NETWORKS[name]
    model = seeded(build)
    words = build is Deep
    items = list(batches([B] * 6 + [4, 1, B], words=words))
    plain = copy.deepcopy(model)
    momentum = fields.get("learning", {}).get("momentum", 0.0)
    loss = masked if words else functional.cross_entropy
    curves = by_sgd(plain, items, loss, momentum)
    result = learned(model, items, parts=parts, **fields)
    assert_same(result, plain, curves)
    assert all(block.updates == len(items) for block in result.blocks.values())


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("build", [Words, mlp, Skips])
def test_a_mean_over_what_is_not_ignored(build, parts):
    """Parts count by their rows (tokens) that count; in some none does."""
    words = build is Words
    items = list(batches([B] * 12, ignored=0.7, words=words))
    model = seeded(build)
    plain = copy.deepcopy(model)
    curves = by_sgd(plain, items, masked if words else functional.cross_entropy)
    result = learned(model, items, parts=parts, partition={"blocks": 3})
    assert_same(result, plain, curves)
    counted = sum(int((y != -100).sum()) for _, y in items)
    for windows in result.windows.values():
        assert (sum(w.rows for w in windows), len(windows)) == (counted, len(items))


def test_real_targets_a_loss_of_the_users_and_a_first_step():
    """mse (hamdist's: half the sum over outputs), and phi of the first sample."""
    draw = torch.Generator().manual_seed(2)
    items = [
        (
            torch.randn(B, FEATURES, generator=draw, dtype=torch.float64),
            torch.randn(B, CLASSES, generator=draw, dtype=torch.float64),
        )
        for _ in range(6)
    ]

    def huber(y, t):
        return functional.smooth_l1_loss(y, t)

    def half(y, t):
        return 0.5 * (y - t).square().sum(1).mean()

    for loss, own in (("mse", half), (huber, huber)):
        model = seeded(mlp)
        plain = copy.deepcopy(model)
        step = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.5, dampening=0.4)
        for u, y in items:
            step.zero_grad()
            own(plain(u), y).backward()
            step.step()
        learning = {"lr": 0.1, "momentum": 0.5, "dampening": 0.4}
        result = learned(model, items, loss=loss, learning=learning, partition={"blocks": 3})
        for a, b in zip(result.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=BOUND)


def test_items_without_targets_and_of_one_readout():
    items = list(batches([B] * 8))
    given = [
        (u, None if n == 2 else {"near": None if n % 3 == 1 else y, "far": y})
        for n, (u, y) in enumerate(items)
    ]
    given[0] = (items[0][0], {"near": items[0][1], "far": items[0][1]})
    runs = [learned(seeded(Skips), given, parts=parts, partition={"blocks": 4}) for parts in (1, 4)]
    for name, block in runs[0].blocks.items():
        for key, theta in block.theta.items():
            torch.testing.assert_close(runs[1].blocks[name].theta[key], theta, rtol=0, atol=BOUND)
    for ones, others in zip(*(run.windows.values() for run in runs), strict=True):
        assert [(w.first, w.last, w.samples, w.rows) for w in ones] == [
            (w.first, w.last, w.samples, w.rows) for w in others
        ]


def test_late_labels_and_a_mask_that_is_no_batch():
    """An input with other rows than the batch goes whole to every part."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, x, weights):
            return self.b(torch.tanh(self.a(x * weights.sum(0))))

    items = [
        ({"x": u, "weights": torch.ones(2, FEATURES, dtype=torch.float64)}, y)
        for u, y in batches([B] * 5)
    ]

    def stream():
        return from_iterable(list(batches([B] * 9)), classes=CLASSES)

    runs = [learned(seeded(Two), items, parts=n, partition={"blocks": 2}) for n in (1, 3)]
    late = [
        learned(seeded(mlp), LateLabels(Delayed(stream(), 2, tagged=False), 2), parts=n)
        for n in (1, 3)
    ]
    for one, other in (runs, late):
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=BOUND)
        (ones,), (others,) = one.windows.values(), other.windows.values()
        assert [(w.samples, w.correct, w.rows) for w in ones] == [
            (w.samples, w.correct, w.rows) for w in others
        ]


# -- order of work ------------------------------------------------------------------------------


def test_messages_leave_before_weights_move(monkeypatch):
    # The blocks of one process pass the sample's last message on to each other, and out, first.
    done = []
    move, post = Weights.move, Mailbox.post

    def moved(weights, *arguments):
        done.append("move")
        move(weights, *arguments)

    def posted(mailbox, channel, signal):
        if channel.kind is Kind.MESSAGE:
            done.append(f"{channel.sender} {signal.stamp.sample}")
        post(mailbox, channel, signal)

    monkeypatch.setattr(Weights, "move", moved)
    monkeypatch.setattr(Mailbox, "post", posted)
    learned(seeded(mlp), batches([6] * 2), parts=2, partition={"blocks": 3})
    for last in (1, 3):  # of the two samples
        at = [done.index(f"block{block} {last}") for block in (2, 1)]
        assert at == sorted(at)
        assert done[at[1] + 1 : at[1] + 4] == ["move"] * 3
    assert done.count("move") == 6


# -- what a user is told -------------------------------------------------------------------------


def told(model, items, **fields):
    with pytest.warns(HamdistWarning, match="locality.microbatches") as seen:
        learned(model, items, **fields)
    return " ".join(str(one.message) for one in seen)


def test_batch_norms_are_warned_of():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    )
    assert "batch norms normalise each micro-batch" in told(model, batches([8] * 3), parts=2)


BY_CLASS = nn.CrossEntropyLoss(torch.tensor([1, 4, 0.2]).double())
LOSSES: dict[str, Any] = {
    "weights of classes": (BY_CLASS, True),
    "weights of classes that nobody numbers": (BY_CLASS, True),
    "a mask": (lambda y, t: functional.cross_entropy(y, t, ignore_index=0), True),
    "a sum": (lambda y, t: functional.cross_entropy(y, t, reduction="sum") / 9, True),
    "smoothed labels": (nn.CrossEntropyLoss(label_smoothing=0.1), False),
    "other targets alone": (lambda y, t: functional.cross_entropy(y, {0: t}[0]), False),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_no_mean_over_rows_are_warned_of(kind):
    """Oracle: level backprop, where the batch is whole."""
    loss, warned = LOSSES[kind]
    one, parts = (
        hamdist.train(
            seeded(mlp),
            batches([8] * 3),
            level=level,
            loss=loss,
            classes=CLASSES if "nobody" not in kind else None,
            learning={"lr": 0.1},
            dtype="float64",
            engine={"kind": "inprocess"},
            **knobs,
        )
        for level, knobs in (("backprop", {}), ("pipeline", {"locality": {"microbatches": 2}}))
    )
    apart = relative(one.model.parameters(), parts.model.parameters())
    assert ("is no mean over rows" in str(parts.warnings)) == warned == (apart > 1e-6)


def test_auto_says_its_number():
    assert "'auto' is 2: batches have 32 row(s)" in told(
        seeded(mlp), batches([32] * 2), parts="auto"
    )
    assert [auto_microbatches(rows) for rows in (15, 16, 64, 128, 256, 9999)] == [1, 2, 2, 4, 8, 8]
    assert "'auto' is 1: batches have 7 row(s)" in told(seeded(mlp), batches([7] * 2), parts="auto")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"parts": 8}, r"microbatches 8 of batches of 7 row\(s\): use at most 7"),
        ({"learning": {"heads": {}}}, "learning.heads"),
        ({"learning": {"inputs": {}}}, "learning.inputs"),
    ],
)
def test_what_is_refused(fields, match):
    with pytest.raises(LevelError, match=match):
        learned(seeded(mlp), batches([B] * 2), **fields)


def test_a_mask_that_the_targets_alone_show():
    u, y = torch.randn(8, 4), torch.randn(8, 2)
    y[:3] = 999.0

    def loss(p, y):
        return (p - y)[y < 999].square().mean()

    with pytest.warns(HamdistWarning, match="is no mean over rows"):
        hamdist.train(
            nn.Sequential(nn.Linear(4, 2)),
            [(u, y)],
            level="pipeline",
            loss=loss,
            locality={"microbatches": 2},
        )
