"""A cluster of two raylets on this machine, and a run across them: for a process of its own, since
one process knows one Ray (test_links_hosts.py starts it)."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, chain

from hamdist.config import EngineSettings, Settings
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.train.train import train

ITEMS = 40
QUIET = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
PLACEMENT = [["block0"], ["block1", "block2"], ["block3", "block4"]]
HOSTS = {"block0": {"host": "left"}, "block[1-4]": {"host": "right"}}


def run(engine, partition):
    """25 ms between any two actors; two of the three share a host."""
    given = {"level": "trace", "steps": ITEMS, "engine": engine, "partition": partition, "seed": 5}
    return train(chain(), PortableStream(ITEMS), Settings.model_validate(given))


def main():
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"left": 1}, **QUIET}
    )
    try:
        cluster.add_node(num_cpus=2, resources={"right": 1}, object_store_memory=80 * 2**20)
        engine = {
            "kind": "ray", "address": cluster.address, "placement": PLACEMENT, "blocks": HOSTS,
            "link_delay": 0.025,
        }  # fmt: skip
        with ray_session(EngineSettings.model_validate(engine)):  # one set of actors for both runs
            spread = run(engine, {"delays": "auto"})
            with_them = run(engine, {"delays": spread.delays})
        crossing = {edge: d for edge, d in spread.delays.items() if d > 1}
        assert set(crossing) == {"block0->block1", "block2->block3"}, crossing
        assert "links" in spread.startup
        assert_equal(run({"kind": "inprocess"}, {"delays": spread.delays}), spread)
        assert_equal(spread, with_them)
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
    print("equal", sorted(crossing.values()))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
