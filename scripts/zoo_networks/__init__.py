"""Public networks of other people, each a few thousand random weights, for scripts/zoo.

`NETWORKS` lists them by library; items.py makes the data that they take. A library is imported when
one of its networks is built.
"""

from zoo_networks.entry import Network
from zoo_networks.language import LANGUAGE
from zoo_networks.vision import VISION

NETWORKS: tuple[Network, ...] = (*LANGUAGE, *VISION)

__all__ = ["NETWORKS", "Network"]
