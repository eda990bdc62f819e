"""Joins a cluster as one who has not all that it asks for; prints what hamdist says.

strangers.py ADDRESS      (what is missing is in the environment, which is not changed)
"""

import sys

from hamdist.config import EngineSettings
from hamdist.errors import ClusterError
from hamdist.runtime.ray_engine.session import ray_session

try:
    with ray_session(EngineSettings(kind="ray", address=sys.argv[1])):
        sys.stdout.write("joined\n")
except ClusterError as error:
    sys.stdout.write(f"refused: {error}\n")
