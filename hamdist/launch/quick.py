"""What Ray is told, through the environment of its processes, before it starts on a host.

Found quickly (measured: a killed raylet or host in 1 s instead of 14, a cut link in 3 instead of
64, the cut-off host's own end in 13 instead of 120 and more). A host that is silent for

    period * threshold + timeout = 2 s

counts as dead, so hosts under heavy swapping may be given up wrongly: then raise the threshold.
"""

from __future__ import annotations

HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
    "RAY_raylet_liveness_self_check_interval_ms": "2000",
}
# Ray's workers at the priority of other processes; no calls home; a driver without a share of a GPU
# may still see them.
MANNERS = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
TOKEN_MODE = "RAY_AUTH_MODE"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
