"""Oracles: stamps counted by hand, torch.optim on the uncut model (float64), a delayed run written
down in closed form. A weight that several blocks use has one owner; the others send it gradients
and get it back."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.architectures import GPT, Config
from dynamics.helpers import F64, bare, bare_chain, knobs, relative, settings, until
from dynamics.tracing.test_any_network import STEPS, made, normal, text, whole
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.graph.spec import SharedWeight
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.dynamics.schedule.events import Kind, Phase, Stamp
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.errors import GraphError
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.results.result import RunFacts, WeightLag
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams import Sample, from_iterable
from hamdist.streams.sample import SampleSpec

ROUND_OFF = 1e-12
LR = 0.1

# -- when ----------------------------------------------------------------------------------------


def tie_of(graph, *users):
    tied = graph.over(graph.blocks.values(), [SharedWeight(tuple((u, "w") for u in users), 1)])
    (tie,) = tied.ties
    return tie


SIAMESE = bare("left: u", "right: u", "y: left right")
READOUTS = bare("a: u", "near: a", "b: a", "far: b")

# By graph, users and ticks between two samples: the owner; the gradient for its backward pass of
# samples 0 and 1; the first sample that passes the user with other weights, and what it takes.
#
# The first, from the table of a chain of 3 at c = 1 (schedule.py): block 0 moves by sample 0 in
# tick 4, so FB3 in tick 5 is the first that comes later; the gradient was made in FB0, in tick 2.
BY_HAND = [
    (bare_chain(3), ("b0", "b2"), 1, "b0", (2, 3), 3, Stamp(4, 0, 1)),
    (bare_chain(3), ("b0", "b2"), 2, "b0", (2, 4), 2, Stamp(4, 0, 1)),
    (bare_chain(3), ("b0", "b2"), "inf", "b0", (2, 7), 1, Stamp(4, 0, 1)),
    (bare_chain(3), ("b0", "b1"), 1, "b0", (3, 4), 4, Stamp(4, 0, 1)),
    (bare_chain(3), ("b0", "b1"), "inf", "b0", (3, 8), 1, Stamp(4, 0, 1)),
    (SIAMESE, ("left", "right"), 1, "right", (2, 3), 3, Stamp(2, 0, 1)),
    (SIAMESE, ("left", "right"), "inf", "right", (2, 5), 1, Stamp(2, 0, 1)),
    (READOUTS, ("near", "far"), 1, "far", (1, 2), 2, Stamp(2, 0, 1)),
]


@pytest.mark.parametrize(("graph", "users", "c", "owner", "made_in", "first", "taken"), BY_HAND)
def test_stamps_by_hand(graph, users, c, owner, made_in, first, taken):
    schedule = PulseSchedule(graph, knobs("trace", speed=c))
    tie = tie_of(graph, *users)
    assert tie.owner == owner
    assert tie.name == f"{owner}<->{tie.user}"
    back = [e for e in until(schedule.events(owner), 40) if e.phase is not Phase.FORWARD][:2]
    assert [schedule.gradient(tie, e) for e in back] == [
        Stamp(tick, n, n) for n, tick in enumerate(made_in)
    ]
    ahead = [e for e in until(schedule.events(tie.user), 40) if e.phase is not Phase.BACKWARD]
    assert [schedule.weight(tie, e) for e in ahead[: first + 1]] == [*[None] * first, taken]
    n = 1 + first
    later = Stamp(taken.tick + schedule.c, 1, 2)
    assert schedule.weight(tie, ahead[n]) == later
    assert schedule.weight_lag(tie) == first


@pytest.mark.parametrize(("graph", "users", "c"), [case[:3] for case in BY_HAND])
@pytest.mark.parametrize("samples", [1, 3, 9])
def test_room_for_what_waits(graph, users, c, samples):
    """By counting through the events, the owner as early and the user as late as can be."""
    schedule = PulseSchedule(graph, knobs("trace", speed=c))
    tie = tie_of(graph, *users)

    def passes(block, way):
        events = until(schedule.events(block), 100)
        return [e for e in events if e.phase is not way and e.sample < samples]

    sent = [schedule.gradient(tie, e).tick for e in passes(tie.owner, Phase.FORWARD)]
    read = [e.tick for e in passes(tie.owner, Phase.FORWARD)]
    most = max(sum(t <= now for t in sent) - sum(t < now for t in read) for now in read)
    assert most <= schedule.tie_in_flight(tie, Kind.GRADIENT)

    taken = [(e.tick, schedule.weight(tie, e)) for e in passes(tie.user, Phase.BACKWARD)]
    ticks = [tick for tick, stamp in taken if stamp is not None]
    ends = schedule.events(tie.owner)
    hears = next(e.tick for e in ends if e.sample == samples)  # its forward pass comes first
    posted = [
        e.tick
        for e in passes(tie.owner, Phase.FORWARD)
        if e.tick < hears or e.sample + schedule.weight_lag(tie) < samples
    ]
    most = max(sum(t <= now for t in posted) - sum(t < now for t in ticks) for now in [0, *posted])
    assert most <= schedule.tie_in_flight(tie, Kind.WEIGHT)
    assert len(ticks) <= len(posted)


# -- backprop is SGD -----------------------------------------------------------------------------


class Deep(nn.Module):
    """One layer at three depths, an embedding that is the output's, too, another layer twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = torch.tanh(self.first(self.embed(x)))
        x = torch.tanh(self.layer(x))
        x = torch.tanh(self.other(x))
        x = torch.tanh(self.layer(x))
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.layer(x))
        return self.head(x)


class Siamese(nn.Module):
    """One encoder of two inputs, side by side: equal depths."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(5, 4)
        self.squash = nn.Linear(4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, a, b):
        left = torch.tanh(self.squash(torch.tanh(self.encode(a))))
        right = torch.tanh(self.squash(torch.tanh(self.encode(b))))
        return self.head(torch.cat([left, right], 1))


class TwoHeads(nn.Module):
    """Two outputs predicted with one weight, behind blocks of different depths."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.near = nn.Linear(4, 3)
        self.middle = nn.Linear(4, 4)
        self.far = nn.Linear(4, 3)
        self.far.weight = self.near.weight

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return {"near": self.near(x), "far": self.far(torch.tanh(self.middle(x)))}


def gpt():
    return GPT(Config(tie_word_embeddings=True))


def chain():
    """A layer, and one that shares its weight, in an nn.Sequential."""
    twin = nn.Linear(6, 6)
    other = nn.Linear(6, 6)
    other.weight = twin.weight
    layers = [twin, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), other, nn.Tanh(), twin, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def tokens(n):
    ids = whole(n, 7, 4, 5)
    return ids, whole(n + 100, 7, 4, 5)


def rows(n):
    return normal(n, 4, 6), whole(n + 100, 3, 4)


def pairs(n):
    return {"a": normal(n, 4, 5), "b": normal(n + 50, 4, 5)}, whole(n + 100, 3, 4)


def heads(n):
    return normal(n, 4, 5), {"near": whole(n + 100, 3, 4), "far": whole(n + 150, 3, 4)}


NETWORKS = {
    "gpt": (gpt, text, 11),
    "deep": (Deep, tokens, 7),
    "siamese": (Siamese, pairs, 3),
    "two heads": (TwoHeads, heads, {"near": 3, "far": 3}),
    "chain": (chain, rows, 3),
}
CUTS = {
    "gpt": ["transformer.h.0.attention", "transformer.h.1", "lm_head"],
    "deep": ["first", "layer", "other", "head"],
    "siamese": ["squash", "head"],
    "two heads": ["middle"],
    "chain": ["2", "4", "6", "8"],
}


def by_class(prediction, target):
    if prediction.dim() == 3:
        prediction = prediction.transpose(1, 2)
    return functional.cross_entropy(prediction, target)


def centrally(model, items, optimiser):
    """What plain PyTorch makes of the uncut model."""
    model = copy.deepcopy(model)
    step = optimiser(model.parameters())
    for u, y in items:
        step.zero_grad()
        found = model(**u) if isinstance(u, dict) else model(u)
        if isinstance(y, dict):
            value = sum(by_class(found[k], t) for k, t in y.items() if t is not None)
        else:
            value = by_class(found, y)
        value.backward()
        step.step()
    return model


def run(name, level="backprop", items=None, steps=STEPS, **fields):
    build, item, classes = NETWORKS[name]
    given = [item(n) for n in range(steps)] if items is None else items
    chosen = settings(level, learning=fields.pop("learning", {"lr": LR}))
    return hamdist.train(made(build), from_iterable(given, classes=classes), chosen, **fields)


def sgd_of(name, optimiser=None):
    build, item, _ = NETWORKS[name]
    items = [item(n) for n in range(STEPS)]
    return centrally(made(build), items, optimiser or (lambda p: torch.optim.SGD(p, LR)))


def differs(found, expected):
    after, wanted = found.state_dict(), expected.state_dict()
    assert list(after) == list(wanted)
    return relative(after.values(), wanted.values())


@pytest.mark.parametrize("cut", ["by name", "by level", "two", "delays"])
@pytest.mark.parametrize("name", NETWORKS)
def test_backprop_is_sgd(name, cut):
    given = {
        "by name": {"cuts": CUTS[name]},
        "by level": {},
        "two": {"blocks": 2},
        "delays": {"cuts": CUTS[name], "delay": 2},
    }
    result = run(name, partition=given[cut])
    assert differs(result.model, sgd_of(name)) <= ROUND_OFF
    assert set(result.weight_lags.values()) <= {WeightLag(0, 0)}
    if cut == "by name":
        assert result.weight_lags


def test_the_uncut_model_comes_back():
    result = run("gpt", partition={"cuts": CUTS["gpt"]})
    assert type(result.model) is GPT
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    assert "transformer.wte.weight" in result.blocks["block0"].theta
    assert "lm_head.weight" not in result.blocks["block3"].theta
    # A gradient and a weight a sample, of 11 tokens in 8 dimensions.
    assert result.bytes_per_edge["block0<->block3"] == 2 * STEPS * 11 * 8 * 8


STEPPED = {
    "momentum": (
        {"learning": {"lr": LR, "momentum": 0.7}},
        lambda p: torch.optim.SGD(p, LR, momentum=0.7),
    ),
    "adam": (
        {"learning": {"lr": 0.01, "momentum": 0.9, "adaptive": {}}},
        lambda p: torch.optim.Adam(p, 0.01, (0.9, 0.999)),
    ),
    "weight cost": (
        {"dynamics": {"weight_cost": 0.02}},
        lambda p: torch.optim.SGD(p, LR, weight_decay=0.02),
    ),
    "look-ahead": (
        {"learning": {"lr": LR, "momentum": 0.7}, "locality": {"compensation": ["look-ahead"]}},
        lambda p: torch.optim.SGD(p, LR, momentum=0.7, nesterov=True),
    ),
    "weights kept": ({"locality": {"memory": "trace+weights"}}, None),
    "autograd": ({"engine": {"step": "autograd"}}, None),
}


@pytest.mark.parametrize("rule", STEPPED)
@pytest.mark.parametrize("name", ["deep", "chain"])
def test_the_owner_makes_the_step(name, rule):
    fields, optimiser = STEPPED[rule]
    result = run(name, partition={"cuts": CUTS[name]}, **copy.deepcopy(fields))
    assert differs(result.model, sgd_of(name, optimiser)) <= 1e-11  # Adam divides by small roots


def test_averages_are_the_owners():
    """Of an averaging that keeps the latest weights, and of one that looks back."""
    cuts = {"cuts": CUTS["deep"]}
    whole_net = run("deep", partition={"blocks": 1}, learning={"lr": LR, "average": 0.9})
    result = run("deep", partition=cuts, learning={"lr": LR, "average": 0.9})
    assert differs(result.model, whole_net.model) <= ROUND_OFF
    assert differs(result.plain, sgd_of("deep")) <= ROUND_OFF
    assert result.model.head.weight is result.model.embed.weight


def test_an_output_without_a_target():
    """The owner learns by what the other says; both ways, and in samples without any."""
    items = []
    for n in range(12):
        u, y = heads(n)
        kept = {0: y, 1: {**y, "far": None}, 2: {**y, "near": None}}[n % 3]
        items.append(Sample(u, kept))
    learning = {"lr": LR}
    spec_of = {"classes": {"near": 3, "far": 3}}
    source = from_iterable(items, **spec_of)
    chosen = settings("backprop", learning=learning)
    result = hamdist.train(made(TwoHeads), source, chosen, partition={"cuts": ["middle"]})
    plain = [(s.u, s.y) for s in items]
    expected = centrally(made(TwoHeads), plain, lambda p: torch.optim.SGD(p, LR))
    assert result.weight_lags
    assert differs(result.model, expected) <= ROUND_OFF


# -- delayed ---------------------------------------------------------------------------------------


def test_trace_by_hand():
    """h1 = tanh(W x), h2 = tanh(V h1), y = W h2 with L = |y - t|^2/2 at c = 1, from the table of a
    chain of 3: in tick k sample k passes block 0 (W_k, kept inputs), sample k - 1 block 1, sample
    k - 2 the readout, whose copy of W is block 0's as it was at the start of tick k - 1 ... k:
    the weights that were sent in earlier ticks."""
    layer, middle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), middle, nn.Tanh(), layer).double()
    items = [(normal(n, 3, 4), normal(n + 60, 3, 4)) for n in range(25)]
    w, v = layer.weight.detach().clone(), middle.weight.detach().clone()
    sent = {}  # by tick: W as block 0 sent it
    copied = w.clone()
    h0, h1, h2, to_1, to_0, g2 = {}, {}, {}, {}, {}, {}
    for k in range(25 + 4):
        if k < 25:  # block 0 forward
            h0[k] = items[k][0]
            h1[k] = torch.tanh(h0[k] @ w.T)
        moved = None
        if 0 <= k - 4 < 25:  # block 0 backward, by both gradients
            n = k - 4
            g0 = (to_0[n] * (1 - h1[n] ** 2)).T @ h0[n]
            moved = w - LR * (g0 + g2[n])
        v_then = v
        if 0 <= k - 1 < 25:
            h2[k - 1] = torch.tanh(h1[k - 1] @ v.T)
        if 0 <= k - 3 < 25:  # block 1 backward
            n = k - 3
            d = to_1[n] * (1 - h2[n] ** 2)
            to_0[n] = d @ v_then
            v = v - LR * d.T @ h1[n]
        if 0 <= k - 2 < 25:  # the readout
            n = k - 2
            copied = sent.get(k - 1, copied)
            e = (h2[n] @ copied.T - items[n][1]) / 3
            to_1[n], g2[n] = e @ copied, e.T @ h2[n]
        if moved is not None:
            w = moved
            sent[k] = w.clone()
    chosen = settings("trace", loss="mse", learning={"lr": LR}, partition={"cuts": ["2", "4"]})
    result = hamdist.train(model, from_iterable(items), chosen)
    assert result.weight_lags == {"block0<->block2": WeightLag(2, 2)}
    assert relative([result.model[0].weight, result.model[2].weight], [w, v]) <= ROUND_OFF
    assert result.model[4] is result.model[0]


def test_the_lag_is_told():
    """In samples and in ticks, by the speed."""
    lags = [
        run("gpt", "trace", steps=4, partition={"cuts": CUTS["gpt"]}, locality={"speed": c})
        for c in (1, 2, 7)
    ]
    found = [result.weight_lags["block0<->block3"] for result in lags]
    assert found == [WeightLag(3, 3), WeightLag(1, 2), WeightLag(0, 0)]
    facts = RunFacts(**lags[1].shared())
    assert facts.as_json()["weight_lags"] == {"block0<->block3": {"samples": 1, "ticks": 2}}
    assert RunFacts.from_json(facts.as_json()).weight_lags == lags[1].weight_lags


# -- graphs by hand, frozen weights, compression -------------------------------------------------


def by_hand(shared):
    class Argued(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, a, b):
            return self.layer(a) + b

    shared = shared.double()
    return Graph(
        [
            BlockSpec("a", nn.Sequential(shared, nn.Tanh()), ("u",)),
            BlockSpec("b", nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Tanh()), ("a",)),
            BlockSpec("c", Argued(shared), ("b", "a"), combine=Combine.ARGUMENTS),
            BlockSpec("y", nn.Linear(6, 3, dtype=F64), ("c",), loss=cross_entropy),
        ]
    )


def test_a_graph_of_blocks_that_share_a_module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        graph = by_hand(nn.Linear(6, 6))
    items = [rows(n) for n in range(STEPS)]
    chosen = settings("backprop", learning={"lr": LR})
    result = hamdist.train(graph, from_iterable(items, classes=3), chosen)
    whole_model = hamdist.train(
        graph, from_iterable(items[:1], classes=3), settings("backprop", learning={"lr": 0.0})
    ).model
    expected = centrally(whole_model, items, lambda p: torch.optim.SGD(p, LR))
    blocks = result.model.blocks
    assert blocks["a"].module[0].weight is blocks["c"].module.layer.weight
    assert differs(result.model, expected) <= ROUND_OFF
    assert graph.blocks["a"].module[0] is graph.blocks["c"].module.layer  # as it was


@pytest.mark.parametrize("level", ["backprop", "local", "heads", "trace"])
def test_a_frozen_weight_needs_no_owner(level):
    model = made(gpt)
    model.lm_head.weight.requires_grad_(False)
    items = [text(n) for n in range(STEPS)]
    source = from_iterable(items, classes=11)
    given = {"partition": {"cuts": ["transformer.h.1"]}}
    chosen = settings(level, learning={"lr": LR})
    result = hamdist.train(model, source, chosen, **given)
    assert not result.weight_lags
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    assert torch.equal(result.model.lm_head.weight, model.lm_head.weight)
    if level == "backprop":
        trained = centrally(model, items, lambda p: torch.optim.SGD(p, LR))
        assert differs(result.model, trained) <= ROUND_OFF


def test_weights_and_their_gradients_are_never_compressed():
    given = {"partition": {"cuts": CUTS["deep"]}, "engine": {"compress": "int8"}}
    plain = run("deep", "trace", partition=given["partition"])
    packed = run("deep", "trace", **given)
    between = [name for name in plain.bytes_per_edge if "<->" in name]
    assert between
    for name in between:
        assert packed.bytes_per_edge[name] == plain.bytes_per_edge[name]
        assert name not in packed.compression
    assert packed.compression


# -- what cannot be ------------------------------------------------------------------------------

TOGETHER = {
    "level 'local'": ("local", {}),
    "level 'heads'": ("heads", {}),
    "learning.heads": ("trace", {"learning": {"lr": LR, "heads": {}}}),
    "learning.inputs": ("trace", {"learning": {"lr": LR, "inputs": "centred"}}),
    "compensation 'weight-prediction'": (
        "trace",
        {"locality": {"compensation": ["weight-prediction"]}},
    ),
}


@pytest.mark.parametrize("why", TOGETHER)
def test_where_one_block_has_a_weight(why):
    level, fields = TOGETHER[why]
    cuts = {"cuts": ["transformer.h.1"]}
    with pytest.raises(GraphError) as caught:
        run("gpt", level, partition=cuts, steps=2, **copy.deepcopy(fields))
    assert str(caught.value) == (
        "no block can begin at 'transformer.h.1': the weight 'transformer.wte.weight' = "
        f"'lm_head.weight' is used in 'transformer.wte' and in 'lm_head', and with {why} a weight "
        "belongs to one block; give each user a weight of its own (untie them), or cut elsewhere"
    )
    assert list(run("gpt", level, steps=2, **copy.deepcopy(fields)).blocks) == ["block0"]
    with pytest.raises(
        GraphError, match=f"no block can begin at '.': .* with {why} a weight belongs"
    ):
        run("chain", level, steps=2, partition={"cuts": CUTS["chain"]}, **copy.deepcopy(fields))
    assert "block0" in run("chain", level, steps=2, **copy.deepcopy(fields)).blocks


class Count(nn.Module):
    """Another activation from its sixteenth call on, wherever that is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return torch.relu(self.layer(x)) if self.calls[0] <= 15 else torch.tanh(self.layer(x))


@pytest.mark.parametrize("cut", [["1"], ["4"], None])
def test_a_shared_module_that_keeps_something_is_not_copied(cut):
    def build():
        count = Count()
        return nn.Sequential(count, nn.Linear(6, 6), nn.Tanh(), count, nn.Linear(6, 3))

    items = [rows(n) for n in range(STEPS)]
    given = {} if cut is None else {"partition": {"cuts": cut}}
    source = from_iterable(items, classes=3)
    chosen = settings("backprop", learning={"lr": LR})
    if cut != ["1"]:
        result = hamdist.train(made(build), source, chosen, **given)
        expected = centrally(made(build), items, lambda p: torch.optim.SGD(p, LR))
        assert differs(result.model, expected) <= ROUND_OFF
        return
    with pytest.raises(GraphError, match="the weight '0.layer.weight' .* with '0', which stays"):
        hamdist.train(made(build), source, chosen, **given)
    with pytest.raises(GraphError, match="'a' and 'c' share a Count, which may keep Python state"):
        hamdist.train(by_hand(Count()), source, chosen)


def test_a_shared_buffer():
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 3)).double()
    chosen = settings("backprop", partition={"cuts": ["2"]})
    with pytest.raises(GraphError, match=r"'1.running_mean' = '3.running_mean' is used in '1' and"):
        hamdist.train(model, from_iterable([rows(0)], classes=3), chosen)


def test_slices():
    with pytest.raises(GraphError, match="'block0': slices is 2, but it has a weight that another"):
        run("chain", partition={"cuts": CUTS["chain"], "slices": {"block0": 2}})
    given = {"cuts": CUTS["chain"], "slices": {"block1": 2}}
    assert differs(run("chain", partition=given).model, sgd_of("chain")) <= ROUND_OFF


def test_a_plan_needs_copies():
    twin = nn.Linear(6, 6)
    graph = Graph([BlockSpec("a", twin, ("u",)), BlockSpec("y", twin, ("a",), loss=mse)])
    spec = SampleSpec((2, 6), torch.float32, (2, 6), torch.float32)
    chosen = settings("backprop", loss="mse", dtype="float32")
    with pytest.raises(GraphError, match="share a parameter"):
        make_plan(graph, chosen, spec)
    plan = make_plan(as_graph(graph, chosen, spec, mse), chosen, spec)
    assert plan.graph.foreign_weights("y") == {"weight", "bias"}
