"""What the process of a side runs: `python -m harness.serve`, calls on stdin.

An error ends the process, with its traceback on stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

READY = "ready"  # the call that does nothing
ROLES = {
    "centralised": "Centralised",
    "pipelining": "Stage",
    "exchange": "Peer",
    "arithmetic": "Arithmetic",
    "inprocess": "InProcess",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    served: dict[str, Any] = {}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        role, _, method = name.partition(".")
        if role not in served:
            served[role] = getattr(importlib.import_module(f"harness.{role}"), ROLES[role])()
        result = None if method == READY else getattr(served[role], method)(**arguments)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
