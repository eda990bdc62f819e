"""Ray's own extras: its Jobs API needs a web server and its client."""

from __future__ import annotations

from importlib.util import find_spec

from hamdist.errors import ClusterError

NEEDED = ("aiohttp", "requests", "opencensus", "prometheus_client")


def missing_extras() -> list[str]:
    """The packages of `ray[default]` that are not installed here."""
    return [name for name in NEEDED if find_spec(name) is None]


def need_extras() -> None:
    """Raises ClusterError where Ray's Jobs API cannot be used."""
    missing = missing_extras()
    if missing:
        raise ClusterError(
            f"Ray's Jobs API needs packages that are not installed here ({', '.join(missing)}): "
            "pip install 'hamdist[cluster]' (or 'ray[default]')"
        )
