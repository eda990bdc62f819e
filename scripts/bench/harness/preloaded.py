"""What the fork server (processes.py) has before it forks: all that the sides import. The garbage
collector leaves that alone; it would otherwise touch, and so copy, every page of it in each side,
in the middle of a turn."""

from __future__ import annotations

import gc
import importlib

from harness.serve import ROLES

for role in ROLES:
    importlib.import_module(f"harness.{role}")
gc.collect()
gc.freeze()
