"""Environment variables that Ray's processes get before it starts on a host.

A host that is silent for

    period * threshold + timeout = 8 s

counts as dead (Ray's own values: 64 s); one that is cut off ends by itself some seconds later. A
link that is cut for 5 s costs no host, and hosts under heavy load are not given up wrongly.
"""

from __future__ import annotations

from importlib.util import find_spec

from hamdist.errors import ClusterError
from hamdist.runtime.ray_engine.local_ray import RAY_SETTINGS

HEALTH = RAY_SETTINGS | {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "6",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_raylet_liveness_self_check_interval_ms": "2000",
}
NEEDED = ("aiohttp", "requests", "opencensus", "prometheus_client")


def missing_extras() -> list[str]:
    """Return the packages of `ray[default]` that are not installed here."""
    return [name for name in NEEDED if find_spec(name) is None]


def need_extras() -> None:
    """Raise ClusterError if Ray's Jobs API cannot be used."""
    missing = missing_extras()
    if missing:
        raise ClusterError(
            f"Ray's Jobs API needs packages that are not installed here ({', '.join(missing)}): "
            "pip install 'hamdist[cluster]' (or 'ray[default]')"
        )
