"""Ray's settings for clusters on which a lost host is to be found in seconds.

The head asks each raylet every second; one that has not answered for 2 s, 4 times in a row, counts
as dead: within 8 to 10 s. Ray's own values take 64 s. A cut of 5 s is survived by most raylets.
"""

DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
