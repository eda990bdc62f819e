"""Digraphs with cycles, self-loops, skips and delays, whole or cut into neurons.

Oracle: H' of the whole network, differentiated by autograd in one piece, with nothing of blocks,
edges or messages. An edge of d ticks is d - 1 blocks of identity without lag or dissipation
(c tau = 1, eta_z = 0), which is the same equation.
B: batch, K: ticks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from dynamics.helpers import F64, Network, layer, linear, noise, relative, samples, settings
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.func import functional_call

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import GraphError, LevelError
from hamdist.models.tracker import First, tracker
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.streams.sources.signals import SignalStream

B, INPUTS, OUTPUTS, K = 2, 3, 2, 25
TAU, C, ETA, BETA, PHI = 0.2, 1.5, 0.3, 0.25, 0.7


@dataclass
class Node:
    """A block: 'a b+3' reads a, and b three ticks late."""

    module: nn.Module
    parents: str
    size: int
    c: float = C
    eta_z: float = ETA
    initial: torch.Tensor | None = None
    edges: list[tuple[str, int]] = field(init=False)

    def __post_init__(self):
        cut = [part.partition("+") for part in self.parents.split()]
        self.edges = [(name, int(delay or 1)) for name, _, delay in cut]


@dataclass
class Net:
    """Blocks with a state, and the readout: the name of one of them, or an output net."""

    nodes: dict[str, Node]
    readout: str | Node
    output: nn.Module | None = None

    def graph(self) -> Graph:
        reads = self.readout if isinstance(self.readout, str) else None
        blocks = [
            self.block(
                name,
                node,
                loss=mse if name == reads else None,
                state=name == reads,
                output=self.output if name == reads else None,
            )
            for name, node in self.nodes.items()
        ]
        if isinstance(self.readout, Node):
            blocks.append(self.block("y", self.readout, loss=mse))
        return Graph(blocks)

    @staticmethod
    def block(name, node, **more) -> BlockSpec:
        return BlockSpec(
            name,
            node.module,
            tuple(p for p, _ in node.edges),
            delays=dict(node.edges),
            shape=None if node.size is None else (node.size,),
            initial=node.initial,
            **more,
        )


class Oracle:
    """The whole network, step by step. h, z: by node, theta, omega: by (node, parameter)."""

    def __init__(self, net: Net, batch: int, order: str, weight_cost=0.0, sign=-1):
        self.order, self.sign, self.cost = order, sign, weight_cost
        self.nodes, self.output = dict(net.nodes), net.output
        self.readout = net.readout
        for name, node in list(self.nodes.items()):
            self.nodes[name] = self.relayed(name, node)
        if isinstance(net.readout, Node):
            self.readout = self.relayed("y", net.readout)
        self.h = {name: self.start(n, batch) for name, n in self.nodes.items()}
        self.z = {name: torch.zeros_like(h) for name, h in self.h.items()}
        modules = {name: n.module for name, n in self.nodes.items()}
        if isinstance(net.readout, Node):
            modules["y"] = net.readout.module
        self.modules = modules
        self.theta = {
            (name, key): p.detach().clone()
            for name, module in modules.items()
            for key, p in module.named_parameters()
        }
        self.omega = {key: torch.zeros_like(t) for key, t in self.theta.items()}

    def relayed(self, name: str, node: Node) -> Node:
        """The same with edges of one tick, over new blocks of identity."""
        edges = []
        for parent, delay in node.edges:
            before = parent
            for i in range(1, delay):
                own = self.nodes.get(parent)
                size = INPUTS if own is None else own.size
                initial = None if own is None else own.initial
                relay = Node(nn.Identity(), before, size, 1 / TAU, 0.0, initial)
                before = f"{parent}-{i}->{name}"
                self.nodes[before] = relay
            edges.append((before, 1))
        made = Node(node.module, "", node.size, node.c, node.eta_z, node.initial)
        made.edges = edges
        return made

    @staticmethod
    def start(node: Node, batch: int) -> torch.Tensor:
        h = torch.zeros(batch, node.size, dtype=F64)
        return h if node.initial is None else h + node.initial

    def f(self, name: str, node: Node, h, u, theta) -> torch.Tensor:
        x = torch.cat([u if p == "u" else h[p] for p, _ in node.edges], dim=-1)
        own = {key: t for (owner, key), t in theta.items() if owner == name}
        return functional_call(self.modules[name], own, (x,))

    def velocity(self, h, u, theta):
        return {n: v.c * (self.f(n, v, h, u, theta) - h[n]) for n, v in self.nodes.items()}

    def loss(self, h, u, target, theta) -> torch.Tensor:
        if isinstance(self.readout, Node):
            y = self.f("y", self.readout, h, u, theta)
        else:
            y = h[self.readout] if self.output is None else self.output(h[self.readout])
        return PHI * 0.5 * (y - target).square().sum() / len(target)

    def step(self, u, target):
        leaf = [
            {k: t.clone().requires_grad_() for k, t in part.items()}
            for part in (self.h, self.theta)
        ]
        h, theta = leaf
        moving = self.velocity(h, u, theta)
        after = {n: (h[n] + TAU * v).detach() for n, v in moving.items()}
        work = sum((self.z[n] * v).sum() for n, v in moving.items())
        cost = self.cost / 2 * sum(t.square().sum() for t in theta.values())
        if self.order == "sequential":
            new = {n: t.clone().requires_grad_() for n, t in after.items()}
            now = self.loss(new, u, target, theta)
            by_h = plus(gradient(now, new), gradient(work, h))
        else:
            now = self.loss(h, u, target, theta)
            by_h = gradient(now + work, h)
        z = {
            n: self.z[n] + TAU * (-self.sign * by_h[n] - self.nodes[n].eta_z * self.z[n])
            for n in self.nodes
        }
        if self.order == "sequential":
            work = sum((z[n] * v).sum() for n, v in moving.items())
        by_theta = gradient(now + work + cost, theta)
        omega = {k: o + TAU * (-self.sign * by_theta[k] - ETA * o) for k, o in self.omega.items()}
        by = self.omega if self.order == "simultaneous" else omega
        self.theta = {k: t - TAU * BETA * by[k] for k, t in self.theta.items()}
        self.h, self.z, self.omega = after, z, omega


def gradient(value, leaves):
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), found, strict=True)
    }


def plus(a, b):
    return {k: a[k] + b[k] for k in a}


def config(order: str, *, readout: str, **more) -> Settings:
    constants = {"tau": TAU, "c": C, "eta": ETA, "beta": BETA, "phi": PHI, **more}
    return settings(
        "local",
        locality={"order": order, "target": "current", "readout": readout},
        dynamics=constants,
    )


def check(net: Net, order: str, items, **more) -> Network:
    """Every h, z, theta and omega of every block after every tick."""
    whole = Oracle(
        net, len(items[0][0]), order, **{k: more[k] for k in ("weight_cost", "sign") if k in more}
    )
    states = [(whole.h, whole.z, whole.theta, whole.omega)]
    for u, target in items[:K]:
        whole.step(u, target)
        states.append((whole.h, whole.z, whole.theta, whole.omega))
    seen, waits = set(), order == "sequential"

    def after(node, event):
        k, name = event.tick, node.name
        if k >= K:
            return
        seen.add((name, k))
        block = node.block
        if name in net.nodes:
            close(block.h, states[k + 1][0][name], f"h of {name} after tick {k}")
            close(block.z, states[k][1][name], f"z of {name} in tick {k}")
        # In the sequential order the weights of tick k move when z_{k+1} is complete.
        at = k if waits and name in net.nodes else k + 1
        for part, found in ((2, block.weights.theta), (3, block.weights.omega)):
            wanted = [t for (owner, _), t in states[at][part].items() if owner == name]
            assert len(found) == len(wanted)
            for a, b in zip(found, wanted, strict=True):
                close(a, b, f"{('theta', 'omega')[part - 2]} of {name} after tick {k}")

    readout = "state" if isinstance(net.readout, str) else "output"
    network = Network(net.graph(), config(order, readout=readout, **more), items).run(after=after)
    assert len(seen) == K * len(network.graph.blocks)
    start = states[0][2].values()
    assert relative(states[-1][2].values(), start) > 1e-3, "it did not learn"
    return network


def close(found, wanted, what):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13, msg=lambda m: f"{what}\n{m}")


def stream(outputs=OUTPUTS, inputs=INPUTS):
    return samples(K + 8, B, inputs, outputs)


def cycles() -> Net:
    """b <-> c, self-loops on a and c, the skip a -> d, a state as readout."""
    return Net(
        {
            "a": Node(layer(7, 4, 1), "u a", 4),
            "b": Node(layer(7, 4, 2), "a c", 4),
            "c": Node(layer(7, 3, 3), "b c", 3),
            "d": Node(layer(7, 2, 4), "a c", 2),
        },
        "d",
    )


def delays() -> Net:
    """The same with edges of several ticks, on a self-loop, on a cycle, and from the input."""
    return Net(
        {
            "a": Node(layer(7, 4, 1), "u+3 a+2", 4),
            "b": Node(layer(7, 4, 2), "a c+4", 4),
            "c": Node(layer(7, 3, 3), "b+2 c+3", 3),
            "d": Node(layer(7, 2, 4), "a+2 c", 2),
        },
        "d",
    )


def output_net() -> Net:
    """An output net that reads the input beside two states, one of them late."""
    return Net(
        {
            "a": Node(layer(7, 4, 1), "u a", 4),
            "b": Node(layer(7, 3, 2), "a b", 3),
        },
        Node(linear(10, 2, 3), "u a b+2", None),
    )


def by_neuron() -> Net:
    """Four neurons, each a block, fully connected; the first two read the input."""
    names = "a b c d"
    nodes = {
        name: Node(layer(4 + 3 * (i < 2), 1, i), ("u " if i < 2 else "") + names, 1)
        for i, name in enumerate(names.split())
    }
    return Net(nodes, Node(linear(4, 2, 9), names, None))


def starting() -> Net:
    """Initial states, seen along edges of several ticks as well."""
    net = delays()
    for i, node in enumerate(net.nodes.values()):
        node.initial = noise(i, node.size)
    return net


def own_constants() -> Net:
    net = cycles()
    net.nodes["b"].c, net.nodes["b"].eta_z = 4.0, 0.0
    net.nodes["d"].c, net.nodes["d"].eta_z = 0.5, 1.0
    return net


ORDERS = ["simultaneous", "omega-first", "sequential"]
NETS = {net.__name__: net for net in (cycles, delays, output_net, by_neuron, starting)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NETS)
def test_trajectory(name, order):
    check(NETS[name](), order, stream())


@pytest.mark.parametrize("order", ORDERS)
def test_constants_of_single_blocks(order):
    blocks = {"b": {"c": 4.0, "eta_z": 0.0}, "d": {"c": 0.5, "eta_z": 1.0}}
    check(own_constants(), order, stream(), blocks=blocks, weight_cost=0.4)


@pytest.mark.parametrize("order", ORDERS)
def test_the_original_sign(order):
    """Edges of one tick: with s = +1 a block of identity would not be a mere delay for z."""
    check(cycles(), order, stream(), sign=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_tracker(order, bias):
    """No input, an output that picks the first neuron, weights that cost."""
    start = None if bias else torch.full((5,), 0.7, dtype=F64)
    module = tracker(5, bias=bias, seed=3, dtype=F64).blocks["x"].module
    net = Net({"x": Node(module, "x", 5, initial=start)}, "x", First())
    items = [(torch.zeros(1, 1, dtype=F64), y.reshape(1, 1)) for y in noise(5, K + 8)]
    check(net, order, items, weight_cost=1.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_slices_of_a_tracker_move_as_the_whole(bias, delay, order):
    """Oracle: the same net as one block. The same weights, whatever the cut."""
    items = [(torch.zeros(1, 1, dtype=F64), y.reshape(1, 1)) for y in noise(5, 60)]

    def course(blocks):
        graph = tracker(5, bias=bias, seed=3, dtype=F64, blocks=blocks, delay=delay)
        asked = config(order, readout="state", weight_cost=1.0, eta=1.0)
        asked = asked.model_copy(
            update={"metrics": asked.metrics.model_validate({"record": "trajectory"})}
        )
        result = train(graph, from_iterable(items), asked)
        records = result.records.values()
        states = [torch.cat([getattr(r, part)[:60] for r in records], -1) for part in "hz"]
        squares = sum(r.theta_norm[:60].square() for r in records)
        return *states, squares, sum(r.work[:60] for r in records)

    whole = course(1)
    assert whole[0].shape == (60, 1, 5)
    assert float(whole[2].std()) > 1e-3, "the weights did not move"
    for blocks in (2, 5):
        for part, (a, b) in enumerate(zip(course(blocks), whole, strict=True)):
            close(a, b, f"{('h', 'z', '|theta|^2', 'work')[part]} of {blocks} slices")


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_tracker_on_ray(session, leaves_no_socket):
    """Oracle: the in-process engine, to the bit. Nothing here comes from an input."""

    def run(engine):
        asked = Settings.model_validate(
            {
                "level": "local",
                "steps": 100,
                "dtype": "float64",
                "engine": engine,
                "locality": {"order": "simultaneous", "target": "current", "readout": "state"},
                "dynamics": {"tau": 0.001, "c": 300, "eta": 10, "phi": 100, "beta": 10},
            }
        )
        graph = tracker(3, bias=True, seed=3, dtype=F64, blocks=3)
        return train(graph, SignalStream(dtype=F64), asked)

    assert_equal(run({"kind": "inprocess"}), run({"kind": "ray", "actors": 2}))


def test_initial_states_that_cannot_be():
    wide, late = cycles(), output_net()
    wide.nodes["a"].initial = noise(0, 3)
    late.readout.initial = noise(0, 2)
    with pytest.raises(GraphError, match=r"'a'.*shape \(3,\), but its h has \(4,\)"):
        wide.graph().shapes((B, INPUTS), F64)
    with pytest.raises(GraphError, match="'y' is an output net, which has no initial state"):
        late.graph().shapes((B, INPUTS), F64)
    block = BlockSpec("a", layer(3, 2, 0), ("u",), initial=noise(0, 2))
    graph = Graph([block, BlockSpec("y", linear(2, 2, 1), ("a",), loss=mse)])
    with pytest.raises(LevelError, match="'a' has an initial state.*presentation 'pulse'"):
        train(graph, from_iterable(stream()), settings("trace"))
