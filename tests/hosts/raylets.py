"""Several raylets of one host, then across.py on them: raylets.py FOLDER NUMBER CASES.

Each has the Ray resource host0, host1, ..., as the hosts of namespaces.py do.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

folder, number, cases = sys.argv[1:]
(Path(folder) / "ray").mkdir()
token = Path(folder) / "token"
token.touch(mode=0o600)
token.write_text(os.urandom(32).hex())
os.environ |= {
    "RAY_TMPDIR": folder,  # Ray's own folder is made below it
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(token),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}

from ray.cluster_utils import Cluster  # noqa: E402 (Ray reads the environment)

same = {"num_cpus": 2, "object_store_memory": 80 * 10**6}
head = {**same, "include_dashboard": False, "resources": {"host0": 9}}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    for i in range(1, int(number)):
        cluster.add_node(**same, resources={f"host{i}": 9})
    sys.argv[1:] = [cluster.address, cases]
    runpy.run_path(str(Path(__file__).with_name("across.py")))
finally:
    cluster.shutdown()
