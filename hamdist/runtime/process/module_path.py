"""The places where Python finds modules, for another process of it."""

from __future__ import annotations

import os
import sys

# What a program of `python -c` begins with: else modules of the current folder replace Python's.
WITHOUT_CURRENT_FOLDER = "import sys; sys.path[:] = filter(None, sys.path)\n"


def module_folders() -> list[str]:
    """Return the places where this process finds modules, as another one finds them, too."""
    # (Python passes over entries that are no texts, as a Path)
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]


def module_variables() -> dict[str, str]:
    """Return the environment variables with which another process finds the same modules."""
    return {"PYTHONPATH": os.pathsep.join(module_folders())}
