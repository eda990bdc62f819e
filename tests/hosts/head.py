"""A cluster of its own for test_head_dies.py: head.py lost FOLDER, or head.py together.

lost: its head is killed while a run goes on. together: two runs start at once, with room for one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import torch
from ray.cluster_utils import Cluster
from runtime.networks import EndlessStream, PortableStream, chain

from hamdist.config import Settings
from hamdist.errors import ClusterError
from hamdist.runtime.ray_engine import wired_workers
from hamdist.runtime.train.train import train

CPUS = 2


def settings(address: str, **fields: object) -> Settings:
    engine = {"kind": "ray", "actors": CPUS, "address": address, "balance": "parameters"}
    return Settings.model_validate({"level": "trace", "engine": engine, **fields})


def lost(address: str, folder: str) -> str:
    killed = []

    def look(progress: object) -> None:
        if progress.samples > 20 and not killed:  # type: ignore[attr-defined]
            (head,) = (p for p in psutil.Process().children(True) if "gcs_server" in p.name())
            head.kill()
            killed.append(head)

    try:
        train(
            chain(),
            EndlessStream(),
            settings(address, snapshots={"path": folder, "seconds": 1}),
            on_progress=look,
        )
    except ClusterError as error:
        again = Settings.model_validate({"level": "trace", "steps": error.result.samples})
        oracle = train(chain(), EndlessStream(), again)
        pairs = zip(error.result.model.parameters(), oracle.model.parameters(), strict=True)
        return f"{error} | {all(torch.equal(a, b) for a, b in pairs)} {error.result.snapshots}"
    return "no error"


def together(address: str) -> str:
    command = [sys.executable, __file__, "one", address]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return " ".join(run.communicate(timeout=150)[0].strip() for run in runs)


def one(address: str) -> str:
    wired_workers.GATHER_SECONDS = 3.0  # type: ignore[attr-defined]
    result = train(chain(), PortableStream(40), settings(address, steps=40))
    return f"{result.samples} {len(result.placement)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "one":
        sys.stdout.write(one(sys.argv[2]))
        sys.exit()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    memory = 80 * 10**6
    head_node = {"num_cpus": CPUS, "include_dashboard": False, "object_store_memory": memory}
    cluster = Cluster(initialize_head=True, head_node_args=head_node)
    try:
        what = {"lost": lost, "together": together}[sys.argv[1]]
        sys.stdout.write(what(cluster.address, *sys.argv[2:]) + "\n")
        sys.stdout.flush()
    finally:
        cluster.shutdown()
