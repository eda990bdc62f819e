"""What tests run on host 0: each case in one process and on the cluster, and compares the two.

    across.py ADDRESS CASES       CASES: JSON, a list of [level, settings of `engine`]

Prints a line for each case: equal to the bit, or the error that hamdist gives. One driver for all
cases, as its actors are started once.
"""

from __future__ import annotations

import json
import sys

import torch
from runtime.engines.test_engines_equal import LEVELS, assert_equal, both, learned, samples_for
from runtime.networks import PortableStream, chain

from hamdist.config import EngineSettings
from hamdist.errors import HamdistError
from hamdist.runtime.ray_engine.session import ray_session

torch.set_num_threads(1)
address, cases = sys.argv[1:]
with ray_session(EngineSettings(kind="ray", address=address, encryption="on")):
    for level, engine in json.loads(cases):
        items = samples_for(level, 4)
        source = PortableStream(items)
        engine["address"] = address
        try:
            pair = both(chain, lambda source=source: source, engine, items, **LEVELS[level])
        except HamdistError as error:
            sys.stdout.write(f"{level}: {' '.join(str(error).split())}\n")
            continue
        assert_equal(*pair)
        assert learned(pair[1], chain)
        sys.stdout.write(f"{level}: equal on {len(pair[1].placement)} actors\n")
