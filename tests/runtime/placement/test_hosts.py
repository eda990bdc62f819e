"""Which host an actor goes to, and what it asks for. Oracles: hand-written tables; every pairing of
actors with hosts there is; the in-process engine."""

from __future__ import annotations

import itertools
import random

import pytest
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, chain, stream
from runtime.placement.test_placement import graph

from hamdist.config import BlockEngineSettings, EngineSettings, Settings, Spread
from hamdist.errors import ClusterError, SettingsError
from hamdist.runtime.placement.assign_blocks import Costs, place
from hamdist.runtime.placement.assign_hosts import (
    ActorOptions,
    HostInfo,
    options_of_actors,
    replacement_options,
)
from hamdist.runtime.placement.requirements import ActorRequirements, requirements
from hamdist.runtime.plan.dtypes import block_settings
from hamdist.runtime.train.train import train


def host(number, cpus=2.0, gpus=0.0, labels=(), **resources):
    named = {f"tag{i}": word for i, word in enumerate(labels)}
    return HostInfo(f"id{number}", f"10.0.0.{number}", f"h{number}", cpus, gpus, resources, named)


THREE = [host(1), host(2), host(3)]


def asks(*wanted):
    """Demands from what differs from an actor that asks for nothing."""
    return [ActorRequirements(**{"blocks": (f"b{i}",), **one}) for i, one in enumerate(wanted)]


def nodes(spread, requests, hosts, **more):
    found = options_of_actors(
        requests,
        hosts,
        Spread(spread),
        more.pop("busy", [1.0] * len(requests)),
        **more,
    )
    return [
        None if actor_options.node is None else int(actor_options.node[2:])
        for actor_options in found
    ]


@pytest.mark.parametrize(
    ("spread", "actors", "hosts", "expected"),
    [
        ("auto", 3, THREE, [None, None, None]),
        ("packed", 5, THREE, [1, 1, 2, 2, 3]),
        ("spread", 3, THREE, [1, 2, 3]),
        ("spread", 6, THREE, [1, 1, 2, 2, 3, 3]),  # neighbours together
        ("spread", 4, THREE, [1, 1, 2, 3]),
        ("spread", 2, THREE, [1, 2]),
        ("packed", 4, [host(1, 1), host(2, 8)], [1, 2, 2, 2]),
        ("spread", 4, [host(1, 1), host(2, 8)], [1, 2, 2, 2]),
    ],
)
def test_actors_that_ask_for_nothing(spread, actors, hosts, expected):
    assert nodes(spread, asks(*[{}] * actors), hosts) == expected


@pytest.mark.parametrize(
    ("actor_options", "was", "there", "expected"),
    [
        (ActorOptions(node="id1"), "id1", THREE, "id1"),
        (ActorOptions(node=None), "id1", THREE, None),  # Ray decides again
        (ActorOptions(node="id1"), "id1", THREE[1:], "id3"),  # id2 is full
        (ActorOptions(node=None), "id1", THREE[1:], "id3"),
        (
            ActorOptions(cpus=2.0, node="id1"),
            "id1",
            THREE[1:],
            None,
        ),  # no room is left: Ray waits for it
        (
            ActorOptions(resources=(("disk", 1.0),), node="id1"),
            "id1",
            [host(2, 9), host(3, disk=1.0)],
            "id3",
        ),
        (ActorOptions(node="id1"), "id1", [], None),
    ],
)
def test_a_lost_actor_goes_where_there_is_room(actor_options, was, there, expected):
    """Hosts of 2 processors, of which two actors have those of id2, and one has one of id3."""
    taken = [("id2", ActorOptions()), ("id2", ActorOptions()), ("id3", ActorOptions(node="id3"))]
    assert replacement_options(actor_options, was, there, taken) == actor_options.on(expected)


def test_what_is_asked_for_is_reserved():
    requests = asks(
        {"cpus": 2.0},
        {"host": "10.0.0.3", "resources": {"disk": 0.5}},
        {"gpus": 0.5},
        {"gpus": 0.5},
        {},
    )
    hosts = [host(1), host(2, 4, 1), host(3, 1, 0, disk=1.0)]
    assert options_of_actors(requests, hosts, Spread.PACKED, [1] * 5) == [
        ActorOptions(2, 0, (), "id1"),
        ActorOptions(1, 0, (("disk", 0.5),), "id3"),
        ActorOptions(1, 0.5, (), "id2"),
        ActorOptions(1, 0.5, (), "id2"),
        ActorOptions(1, 0, (), "id2"),
    ]
    assert nodes("auto", requests, hosts) == [None, 3, None, None, None]


@pytest.mark.parametrize("word", ["id2", "10.0.0.2", "h2", "fast", "rack7"])
def test_what_a_host_is_called(word):
    hosts = [host(1), host(2, labels=["rack7"], fast=1.0)]
    assert nodes("auto", asks({"host": word}), hosts) == [2]


@pytest.mark.parametrize(
    ("gpus", "actors", "share"),
    [
        ([1], 1, 1),
        ([1], 3, 0.3333),
        ([2], 3, 0.5),
        ([1, 1], 2, 1),
        ([4], 2, 1),
        ([0, 2], 5, 0.3333),
    ],
)
def test_blocks_on_cuda_share_the_gpus_evenly(gpus, actors, share):
    hosts = [host(i, 8, n) for i, n in enumerate(gpus)]
    found = options_of_actors(asks(*[{"gpus": 0.0}] * actors), hosts, Spread.PACKED, [1] * actors)
    assert [actor_options.gpus for actor_options in found] == [share] * actors


@pytest.mark.parametrize("seed", range(20))
def test_no_pairing_of_actors_and_hosts_is_faster(seed):
    """Hosts of one processor: the slowest actor is as fast as in the best of all pairings."""
    draw = random.Random(seed)
    busy = [draw.randint(1, 20) for _ in range(4)]
    slow = [2.0 ** draw.randint(0, 3) for _ in range(4)]
    hosts = [host(i, 1) for i in range(4)]
    speeds = {f"id{i}": s for i, s in enumerate(slow)}
    found = nodes("profile", asks(*[{}] * 4), hosts, busy=busy, speeds=speeds)
    time = max(b * slow[n] for b, n in zip(busy, found, strict=True))
    every = itertools.permutations(range(4))
    assert time == min(
        max(b * slow[n] for b, n in zip(busy, order, strict=True)) for order in every
    )


def test_hosts_that_are_alike_are_filled_in_order():
    speeds = {"id1": 1.05, "id2": 1.0, "id3": 2.0}
    assert nodes("profile", asks(*[{}] * 5), THREE, speeds=speeds) == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("requests", "hosts", "words"),
    [
        (
            [{"host": "h9"}],
            THREE,
            "block b0: host 'h9' is unknown; the cluster has h1 \\(10.0.0.1\\), h2",
        ),
        (
            [{"resources": {"tpu": 1}}],
            [host(1, disk=1)],
            "no host has the resource 'tpu'; known: disk",
        ),
        ([{"cpus": 3.0}], THREE, "b0 asks for 3 CPU\\(s\\), more than any host has"),
        ([{"cpus": 2.0, "host": "h1"}], [host(1, 1), host(2)], "more than host 'h1' has"),
        ([{}] * 7, THREE, "7 actors ask for 7 CPUs, the Ray cluster has 6"),
        ([{"gpus": 1.0}], THREE, "asks for 1 CPU\\(s\\), 1 GPU\\(s\\), more than any host has"),
        ([{"gpus": 1.0}] * 2, [host(1, 8, 1)], "2 actors ask for 2 GPUs, the Ray cluster has 1"),
        ([{"gpus": 0.0}], THREE, "b0 has the device 'cuda', but the cluster has no GPU .* 'auto'"),
        (
            [{"gpus": 0.0}, {"gpus": 1.0}],
            [host(1, 8, 1)],
            "b0 has the device 'cuda', but the cluster has none of its 1 GPU\\(s\\) left",
        ),
        ([{"gpus": 0.6}] * 3, [host(1, 8, 2)], "no room for the actor of block b2.* h1 .* full"),
        ([{"resources": {"disk": 2}}] * 2, [host(1, disk=3)], "4 of the resource 'disk', .* has 3"),
        (
            [{"host": "h1"}] * 3,
            THREE,
            "no room for the actor of block b2.*h1 \\(10.0.0.1\\) is full",
        ),
    ],
)
def test_what_the_cluster_does_not_have(requests, hosts, words):
    with pytest.raises(ClusterError, match=words):
        options_of_actors(asks(*requests), hosts, Spread.PACKED, [1] * len(requests))


def engine(blocks, **fields):
    return EngineSettings.model_validate({"kind": "ray", "blocks": blocks, **fields})


def test_what_an_actor_asks_for_is_what_its_blocks_do():
    own = engine(
        {
            "b0": {"host": "h1", "gpus": 0.5},
            "b1": {"resources": {"disk": 1}},
            "b2": {"cpus": 2, "resources": {"disk": 1, "net": 2}, "device": "cuda"},
        }
    )
    asked = block_settings(graph(2, 2, 2, 2), own)
    assert asked["b3"] == BlockEngineSettings()
    assert requirements(["b0", "b1", "b2"], asked, own) == ActorRequirements(
        "h1", 2, 0.5, {"disk": 1, "net": 2}, ("b0", "b1", "b2")
    )
    assert requirements(["b1"], asked, own) == ActorRequirements(
        None, 1, None, {"disk": 1}, ("b1",)
    )
    assert requirements(["b2"], asked, own).gpus == 0  # some
    assert requirements(["b3"], asked, engine({}, device="cuda")).gpus == 0
    assert requirements(["b3"], asked, engine({}, device="auto")).gpus is None


CONTRADICTIONS = [
    ({"host": "h1"}, {"host": "h2"}, "host 'h1' and 'h2'"),
    ({"cpus": 1}, {"cpus": 2}, "cpus 1 and 2"),
    ({"gpus": 0.5}, {"gpus": 1}, "gpus 0.5 and 1"),
    ({"resources": {"a": 1, "x": 2}}, {"resources": {"x": 3}}, "resources.x 2 and 3"),
]


@pytest.mark.parametrize(("one", "other", "words"), CONTRADICTIONS)
def test_blocks_of_one_actor_that_contradict_each_other(one, other, words):
    blocks = {"b0": one, "b2": other}
    words = f"'b0' and 'b2' share an actor, but ask for {words}"
    for asked in ({"placement": [["b0", "b1", "b2"], ["b3"]]}, {"actors": 1}):
        with pytest.raises(SettingsError, match=words):
            place(graph(2, 2, 2, 2), engine(blocks, **asked), 4)


@pytest.mark.parametrize(("one", "other", "words"), CONTRADICTIONS)
@pytest.mark.parametrize("costs", [None, Costs((9.0, 9.0, 9.0, 9.0))])
def test_neighbours_that_contradict_each_other_are_parted(one, other, words, costs):
    blocks = {"b0": one, "b1": one, "b[23]": other}
    for asked in ({"actors": "auto"}, {"actors": 2}):
        found = place(graph(2, 2, 2, 2), engine(blocks, **asked), 1, costs)
        assert found == [["b0", "b1"], ["b2", "b3"]]
    alternating = {"b0": one, "b1": other, "b2": one}
    found = place(graph(2, 2, 2, 2), engine(alternating), 1, costs)
    assert found == [["b0"], ["b1"], ["b2", "b3"]]


@pytest.mark.parametrize("seed", range(10))
def test_no_parting_is_faster(seed):
    """Of all cuts that part what has to be parted, the one with the least time."""
    draw = random.Random(seed)
    homes = [draw.choice(["h1", "h2"]) for _ in range(5)]
    costs = Costs(tuple(draw.randint(1, 30) for _ in range(5)))
    needed = 1 + sum(a != b for a, b in itertools.pairwise(homes))
    own = engine({f"b{i}": {"host": h} for i, h in enumerate(homes)}, actors=min(5, needed + 1))
    best = min(
        max(sum(costs.seconds[a:b]) for a, b in zip(cut, [*cut[1:], 5], strict=True))
        for cuts in itertools.combinations(range(1, 5), min(5, needed + 1) - 1)
        for cut in [[0, *cuts]]
        if all(len({*homes[a:b]}) == 1 for a, b in zip(cut, [*cut[1:], 5], strict=True))
    )
    found = place(graph(2, 2, 2, 2, 2), own, 5, costs)
    index = {f"b{i}": i for i in range(5)}
    assert all(len({homes[index[b]] for b in group}) == 1 for group in found)
    time = max(sum(costs.seconds[index[b]] for b in group) for group in found)
    assert time <= best * 1.05 / 0.95


def run_of(engine):
    wanted = {"steps": 30, "seed": 5, "level": "trace", "engine": engine}
    return train(chain(), PortableStream(30), Settings.model_validate(wanted))


@pytest.mark.ray
def test_on_ray(session, leaves_no_socket):
    """A host by its address, two processors for one block; then as if nothing had been asked."""
    import ray

    address = ray.nodes()[0]["NodeManagerAddress"]
    blocks = {"block0": {"cpus": 2}, "block[34]": {"host": address}}
    alone = run_of({"kind": "inprocess"})
    for asked in ({"blocks": blocks, "spread": "spread"}, {}):
        spread = run_of({"kind": "ray", "actors": 2, **asked})
        assert_equal(alone, spread)
    assert len(session.idle) == 2


@pytest.mark.ray
@pytest.mark.parametrize(
    ("block_setting", "words"),
    [
        ({"host": "mars"}, "host 'mars' is unknown"),
        ({"resources": {"tpu": 1}}, "no host has the resource 'tpu'; known: none"),
        ({"cpus": 99}, "asks for 99 CPU\\(s\\), more than any host has"),
        ({"gpus": 99}, "99 GPU\\(s\\), more than any host has"),
    ],
)
def test_errors_before_anything_starts(session, block_setting, words):
    before = [actor_options for actor_options, _ in session.idle]
    with pytest.raises(ClusterError, match=words):
        run_of({"kind": "ray", "actors": 2, "blocks": {"block2": block_setting}})
    assert [actor_options for actor_options, _ in session.idle] == before


def test_what_means_nothing_in_one_process_is_told():
    blocks = {"block0": {"cpus": 2, "host": "h1"}}
    with pytest.warns(UserWarning, match="engine.blocks: host, cpus mean nothing in one process"):
        train(
            chain(), stream(2), Settings.model_validate({"steps": 2, "engine": {"blocks": blocks}})
        )
