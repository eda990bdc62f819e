"""Starts a worker of a local Ray: run as a script in place of Ray's setup_worker.py.

Ray's own script imports all of Ray, for about half a second, only to start Python once more. A
worker with a runtime environment (an actor with environment variables of its own) is left to it.
"""

from __future__ import annotations

import os
import sys

LANGUAGE = "--language=PYTHON"
ENVIRONMENT = "--serialized-runtime-env-context"


def main() -> None:
    """Replace this process by the worker that the arguments describe."""
    arguments = sys.argv[1:]
    if LANGUAGE not in arguments or any(a.startswith(ENVIRONMENT) for a in arguments):
        from ray._private.workers import setup_worker

        script = [setup_worker.__file__, *arguments]
    else:
        script = [a for a in arguments if a != LANGUAGE]
    os.execv(sys.executable, [sys.executable, *script])


if __name__ == "__main__":
    main()
